"""Every combination in one pass, each as if it were alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from common.settings import Settings, Sweep
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import command, sparse_rows, tensors, tiny_settings
from train import loop, sweep
from train.loop import train

WANTED = {"lr": (1e-3, 3e-3), "d_sae": (64, 128)}


@pytest.fixture
def base(store_root: Path, tmp_path: Path) -> Settings:
    return tiny_settings(store_root, tmp_path, run="s", train__rows=64 * 30)


def swept(base: Settings, **lists: object) -> Settings:
    return base.model_copy(update={"sweep": Sweep.model_validate(lists)})


def test_combinations_are_named_after_what_differs(base: Settings) -> None:
    runs = sweep.combinations(swept(base, **WANTED), d_in=12)
    assert [one.run for one in runs] == [
        "s-lr0.001",
        "s-d_sae128-groups16_32_80-lr0.001",
        "s",
        "s-d_sae128-groups16_32_80",
    ]
    assert runs[1].transcoder.group_sizes == (16, 32, 80)
    nested = sweep.combinations(swept(base, group_sizes=("4x", "1x/3x")), d_in=12)
    assert [one.transcoder.resolve(12) for one in nested] == [(48, (48,)), (48, (12, 36))]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, "nothing to combine"),
        ({"lr": (1e-3, 1e-3)}, "two runs would be called s-lr0.001; list each value once"),
        ({"d_sae": (65,)}, r"cannot grow in proportion to 65 latents"),
        ({"k": (500,)}, "k is 500, but there are only 64 latents"),
    ],
)
def test_impossible_sweeps_stop_with_one_line(base: Settings, lists: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep.combinations(swept(base, **lists), d_in=12)


def test_what_decides_the_batches_cannot_be_swept() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        Sweep.model_validate({"batch_size": (32, 64)})
    with pytest.raises(ValueError, match="not both"):
        Sweep.model_validate({"d_sae": (64,), "group_sizes": ((64,),)})


def test_a_sweep_from_the_command_line(
    base: Settings, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = command(base, "--sweep.lr", "1e-3,3e-3", "--sweep.skip", "false,true")[3:]
    monkeypatch.setattr("sys.argv", ["train.sweep", *options])
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    groups: list[str | None] = []
    together = loop.train_together

    def trained(*given: Any) -> Any:
        groups.append(os.environ.get("WANDB_RUN_GROUP"))
        return together(*given)

    monkeypatch.setattr(loop, "train_together", trained)
    sweep.main()
    assert groups == ["tiny-layer_0-s-sweep"]
    assert "WANDB_RUN_GROUP" not in os.environ
    printed = capsys.readouterr().out
    assert "4 runs, 0 of them already trained" in printed
    folder = base.run_dir().with_name("s-sweep")
    results = json.loads((folder / "results.json").read_text())
    assert {row["run"] for row in results} == {"s", "s-lr0.001", "s-skipTrue", "s-skipTrue-lr0.001"}
    fvu = [row["fvu"][-1] for row in results]
    assert fvu == sorted(fvu)
    assert (folder / "sweep.png").stat().st_size > 10_000

    alone = base.model_copy(update={"run": "alone", "train": base.train.model_copy(update={"lr": 1e-3})})
    train(alone, store)
    one, other = tensors(alone.run_dir()), tensors(base.run_dir().with_name("s-lr0.001"))
    assert all(one[name].equal(other[name]) for name in one)

    sweep.main()
    assert "4 runs, 4 of them already trained" in capsys.readouterr().out
    assert not (folder / "earlier").exists()

    before = {name: (folder / name).read_bytes() for name in ("results.json", "sweep.png")}
    monkeypatch.setattr("sys.argv", ["train.sweep", *options[:-2], "--sweep.skip", "true"])  # fewer runs
    sweep.main()
    (kept,) = (folder / "earlier").iterdir()
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert f"the table that was here is kept: {kept}" in capsys.readouterr().err
    assert len(json.loads((folder / "results.json").read_text())) == 2
    monkeypatch.setattr("sys.argv", ["train.sweep", *options])  # these and more: nothing is lost
    sweep.main()
    assert len(list((folder / "earlier").iterdir())) == 1


@pytest.mark.parametrize("text", ["[{", "3", '[{"lr": 1}]'])
def test_a_table_that_cannot_be_read_is_kept_too(text: str, tmp_path: Path) -> None:
    (tmp_path / sweep.RESULTS).write_text(text)
    assert not sweep._runs_in(tmp_path) <= {"a"}
    assert sweep._runs_in(tmp_path / "nothing") == set()


def test_a_store_without_heldout_rows_has_nothing_to_compare(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = base.model_copy(update={"paths": base.paths.model_copy(update={"activations": str(tmp_path)})})
    make_store(moved.store_path(0), sparse_rows(4096, 2), sparse_rows(0, 3))
    monkeypatch.setattr("sys.argv", ["train.sweep", *command(moved, "--sweep.lr", "1e-3,3e-3")[3:]])
    sweep.main()
    assert "- - -" in capsys.readouterr().out  # three prefixes
    results = json.loads((moved.run_dir().with_name("s-sweep") / "results.json").read_text())
    assert [row["fvu"] for row in results] == [[None] * 3] * 2
