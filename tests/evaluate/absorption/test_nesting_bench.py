"""bench.nesting: what it compares, and its numbers on planted transcoders."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import nesting
from bench.nesting import Asked, asked, of_layer, table
from bench.recipe import keep
from common.errors import InputError
from tests.evaluate.absorption.planted import coder, plant
from tests.evaluate.runs import settings_of


def test_the_runs_differ_in_seed_and_nesting_only() -> None:
    settings = settings_of(Path(), "--run", "default", "--train.rows", "4096")
    found = [each for seed in (0, 1) for each in asked(settings, seed, steps=None)]
    assert [each.path.name for each in found] == [
        *("default", "default-one_group", "layers.0.mlp"),
        *("default-seed_1", "default-seed_1-one_group", "layers.0.mlp"),
    ]
    nested, flat, peer = found[3:]
    assert (nested.settings.train.seed, nested.settings.train.order_seed) == (1, 1)
    assert flat.settings.transcoder.group_sizes == (settings.transcoder.d_sae,)
    for one in (nested, flat):
        same = {"run", "train", "transcoder"}
        assert one.settings.model_dump(exclude=same) == settings.model_dump(exclude=same)
        assert one.settings.train.model_dump(exclude={"seed", "order_seed"}) == settings.train.model_dump(
            exclude={"seed", "order_seed"}
        )
    assert peer.path.parent.name == "adam-3e-3-steps_4-seed_1"
    assert (
        next(
            iter(each for each in asked(settings, 0, steps=2) if each.kind == "sparsify")
        ).settings.train.rows
        == 2048
    )


def test_results_of_other_layers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nesting, "RESULTS", tmp_path / "results" / "nesting.json")
    keep(nesting.RESULTS, {"12": {"a": 1}, "20": {"a": 1}})
    keep(nesting.RESULTS, {"12": {"a": 2}})
    assert json.loads(nesting.RESULTS.read_text()) == {"12": {"a": 2}, "20": {"a": 1}}


def test_a_layer_that_is_not_one_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.nesting", "--layers", "12", "99"])
    with pytest.raises(InputError, match=r"^layers: expected some of 2 3 .*, found 99$"):
        nesting.main()


def test_planted_transcoders(tmp_path: Path) -> None:
    """Two nested ones that absorb, one of them in another order of its last latents, beside two that do not."""
    plant(tmp_path, pack="document")
    settings = settings_of(tmp_path)
    runs = settings.run_dir().parent
    coder(True, True).save(runs / "tiny-1")
    coder(False, True).save(runs / "split-1")
    ones = [
        Asked(0, seed, kind, settings, runs / name)
        for name, kind, seed in (
            ("tiny", "nested", 0),
            ("plain", "one group", 0),
            ("tiny-1", "nested", 1),
            ("split-1", "one group", 1),
        )
    ]
    found = of_layer(ones)
    assert found["classes"] == ["first letter a", "first letter b", "first letter c"]
    coarse, full = found["kinds"]["nested"]
    flat = found["kinds"]["one group"][-1]
    rate = full["absorbed"]["value"]
    assert rate > 0.05
    assert coarse["absorbed"]["value"] == flat["absorbed"]["value"] == 0
    difference = found["less_one_group"]["nested"]
    assert difference["absorbed"]["value"] == pytest.approx(rate)
    assert difference["absorbed"]["error"] == pytest.approx(rate)  # one class of three
    assert difference["latents"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert full["stable"] == {"value": 1.0, "error": 0.0}
    assert full["stable_group"] == {"value": 1.0, "error": 0.0}
    assert 0 < flat["stable"]["value"] < 1
    assert found["most_firing"]["nested"] == {"value": 1.0, "error": 0.0}
    assert found["most_firing"]["one group"]["value"] > flat["stable"]["value"]
    assert full["probes"]["value"] > coarse["probes"]["value"] - 0.01 > 0.9
    shown = Console(file=io.StringIO(), width=200)
    shown.print(table({"0": found}))
    assert f"{100 * rate:+.1f} ± {100 * rate:.1f}" in shown.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
