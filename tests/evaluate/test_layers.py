"""Several layers by one command: one run for all of them, the others beside one that fails, a table at the end."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import evaluate.model.push as push_of_several
from common.cli import run_stage
from common.settings import Settings
from evaluate import compare, export, push, runs, stores
from evaluate.__main__ import main as evaluate_main
from shards.__main__ import main as shards_main
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import D_IN, D_OUT, ENDS, arguments, make_run, settings_of, tiny_transcoder

Stage = Callable[[], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Layers 0 and 1 of a model of three, each with the runs tiny and, in layer 1 alone, a newer one."""
    for layer in range(2):
        make_run(tmp_path, tiny_transcoder(layer), layer=layer, n_layers=3)
    newer = settings_of(tmp_path, "--layer", "1", "--run", "newer").run_dir()
    tiny_transcoder(9).save(newer)
    return tmp_path


@pytest.fixture
def call(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], list[str]]]:
    def call(stage: Stage, *more: str, named: bool = True) -> tuple[int, list[str], list[str]]:
        words = arguments(root, *more)
        if not named:
            at = words.index("--run")
            del words[at : at + 2]
        monkeypatch.setattr(sys, "argv", ["x", *words])
        with pytest.raises(SystemExit) as stopped:
            run_stage(stage)
        said = capsys.readouterr()
        errors = [
            line for line in said.err.splitlines() if line and "rows/s" not in line and "files/s" not in line
        ]
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, said.out.splitlines(), errors

    return call


Call = Callable[..., tuple[int, list[str], list[str]]]
FAILED = "error: 1 of 3 layers failed (2), as said above; the same command tries them again"


def cells(lines: list[str]) -> list[list[str]]:
    begin = max(number for number, line in enumerate(lines) if line.startswith("run "))
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines[begin:]
        if line.startswith("│")
    ]


def test_all_layers_are_evaluated_and_compared(root: Path, call: Call) -> None:
    code, out, err = call(evaluate_main, "--layer", "all", "--cross-entropy-tokens", "0")
    assert code == 2
    assert err[0].startswith(f"error: layer 2: {root}/checkpoints/transcoder/tiny/layer_2/tiny")
    assert err[1:] == [FAILED]
    for layer, row in enumerate(cells(out)):
        file = settings_of(root, "--layer", str(layer)).run_dir() / "evaluation" / "metrics.json"
        prefixes = json.loads(file.read_text())["prefixes"]
        assert row[:3] == [
            str(layer),
            " ".join(f"{prefix['fvu']:.3f}" for prefix in prefixes),
            f"{prefixes[-1]['l0']:.1f}",
        ]
    again = call(evaluate_main, "--layer", "all", "--cross-entropy-tokens", "0")[1]
    assert again.count("nothing has changed since the last evaluation: nothing was measured again") == 2
    assert cells(again) == cells(out)

    for layer in range(2):
        other = settings_of(root, "--layer", str(layer), "--run", "other").run_dir()
        random_coder(D_IN, D_OUT, ENDS, seed=5, layer=layer).save(other)
    code, out, _ = call(compare.main, "--layer", "0-1", "--with", "other")
    assert code == 0
    assert [row[:2] for row in cells(out)] == [[n, run] for n in "01" for run in ("tiny", "other")]
    code, out, err = call(compare.main, "--layer", "0-1", "--with", "othr")
    assert (code, out) == (2, [])
    assert err == ["error: with: othr: no layer asked for has a run of this name (newer other tiny)"]
    code, out, err = call(compare.main, "--layer", "0-1")
    assert (code, out, len(err)) == (2, [], 1)
    assert "give WITH=" in err[0]
    code, _, err = call(compare.main, "--layer", "0-1", "--with", str(root / "other"))
    assert code == 2
    assert err == [
        f"error: with: {root}/other: belongs to one layer; for several, WITH takes names of runs that every "
        "layer has"
    ]


def test_the_newest_run_is_that_of_all_layers(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 has no run "newer", which would fail there."""
    seen: list[tuple[int, str]] = []

    def evaluated(settings: Settings, _: int) -> tuple[dict[str, object], bool]:
        seen.append((settings.layer, settings.run))
        return {}, False

    monkeypatch.setattr("evaluate.run.evaluate", evaluated)
    monkeypatch.setattr("evaluate.__main__.show", lambda *_: None)
    code, _, err = call(evaluate_main, "--layer", "0-1", named=False)
    assert (code, err) == (0, ["run tiny, the one that all 2 layers have; RUN=name takes another"])
    code, _, err = call(evaluate_main, "--layer", "1", named=False)
    assert (code, err) == (0, ["run newer, the newest of 2 runs of layer 1; RUN=name takes another"])
    assert seen == [(0, "tiny"), (1, "tiny"), (1, "newer")]


def test_stores_are_verified_layer_by_layer(root: Path, call: Call) -> None:
    """A missing one and a damaged one are named; the whole one is checked between them."""
    Path(settings_of(root).store_path(0), "tokenizer.json").write_text("{}")
    code, out, err = call(shards_main, "verify", "--layer", "all")
    assert code == 2
    assert f"{settings_of(root).store_path(1)}: every byte is as it was committed" in out
    said = [line.split(": ")[1] for line in err]
    assert said == [
        "layer 0",
        "layer 2",
        "2 of 3 layers failed (0 2), as said above; the same command tries them again",
    ]


def test_each_layer_is_exported_and_pushed(root: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = call(export.main, "--layer", "0-2", "--format", "saelens")
    assert (code, err[-1]) == (2, FAILED)
    folders = [settings_of(root, "--layer", str(n)).run_dir() / "export" / "saelens" for n in range(2)]
    assert [line for line in out if line.startswith("/")] == list(map(str, folders))
    assert all(any(folder.iterdir()) for folder in folders)
    pushed: list[tuple[object, str]] = []
    monkeypatch.setattr(push, "push", lambda run_dir, address, _: pushed.append((run_dir, address)))
    monkeypatch.setattr(
        push_of_several, "push_set", lambda settings, address, _: pushed.append((settings.layers, address))
    )
    assert call(push.main, "--layer", "0-1", "--repo", "me/set/")[0] == 0
    assert call(push.main, "--repo", "me/one")[0] == 0
    code, _, err = call(push.main, "--repo", "me/one", "--pages")
    assert (code, len(pushed)) == (2, 2)
    assert "--pages: circuit-tracer's feature pages are of a set of layers, found one layer" in err[0]
    assert [address for _, address in pushed] == ["hf://me/set", "hf://me/one"]
    assert pushed[0][0] == (0, 1)


def test_all_is_no_limit_to_the_listings(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    _, out, _ = call(runs.main, "--layer", "all")
    assert sum(" tiny " in line for line in out) >= 2
    _, out, _ = call(stores.main, "--layer", "all")
    assert sum("complete" in line for line in out) == 2
    _, out, _ = call(stores.main, "--layer", "1-2")
    assert sum("complete" in line for line in out) == 1
