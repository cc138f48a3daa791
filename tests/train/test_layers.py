"""Several layers by one command: each as alone, a failing one beside the others, stopped and continued."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train.loop
from common.cli import run_stage
from common.errors import InputError
from common.settings import ROOT, Settings
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import command, sparse_rows, tiny_settings
from tests.train.test_log import FakeWandb
from train import log, sweep
from train.__main__ import main
from train.loop import Run
from transcoder.weights import read_metadata

Call = Callable[..., tuple[int, list[str], list[str]]]
Capture = pytest.CaptureFixture[str]
ROWS = 64 * 12
WEIGHTS = "transcoder.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of layers 0 to 2 of a model of four layers."""
    root = tmp_path_factory.mktemp("layers")
    for layer in range(3):
        rows = sparse_rows(2048, 2 + layer), sparse_rows(256, 9 + layer)
        make_store(root / "tiny" / f"layer_{layer}.zarr", *rows, layer=layer, n_layers=4)
    return root


def typed(root: Path, checkpoints: Path, *more: str, run: str = "a") -> list[str]:
    settings = tiny_settings(root, checkpoints, run, train__rows=ROWS, train__checkpoint_every=5)
    return command(settings, *more)[3:]


@pytest.fixture
def call(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Call:
    """`python -m train` in this process: its exit code, and the lines of both streams without bars and warnings."""

    def lines(text: str) -> list[str]:
        bars = ("rows/s", "warning:")
        return [line for line in text.splitlines() if line and not any(word in line for word in bars)]

    def call(*more: str, stage: Callable[[], None] = main) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train", *typed(root, tmp_path), *more])
        with pytest.raises(SystemExit) as stopped:
            run_stage(stage)
        said = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, lines(said.out), lines(said.err)

    return call


def run_of(checkpoints: Path, layer: int, run: str = "a") -> Path:
    return checkpoints / "transcoder" / "tiny" / f"layer_{layer}" / run


def tensor_bytes(run_dir: Path) -> bytes:
    """Of transcoder.safetensors, what comes after the header, which names places."""
    data = (run_dir / WEIGHTS).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the same runs, each trained by a command of its own."""
    checkpoints = tmp_path_factory.mktemp("alone")
    for layer in range(3):
        arguments = typed(root, checkpoints, "--layer", str(layer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", *arguments])
            with pytest.raises(SystemExit) as stopped:
                run_stage(main)
        assert stopped.value.code == 0
    return checkpoints


def assert_as_alone(checkpoints: Path, alone: Path, *layers: int, run: str = "a") -> None:
    for layer in layers:
        own, other = run_of(checkpoints, layer, run), run_of(alone, layer)
        assert tensor_bytes(own) == tensor_bytes(other)
        assert (own / "metrics.jsonl").exists()
    assert len({tensor_bytes(run_of(alone, layer)) for layer in layers}) == len(layers)


def table_of(out: list[str]) -> list[str]:
    """The rows of the last table."""
    begin = max(number for number, line in enumerate(out) if line.startswith("run "))
    return [line for line in out[begin:] if line.startswith("│")]


def test_all_layers_are_trained_as_each_alone(call: Call, tmp_path: Path, alone: Path, root: Path) -> None:
    """Layer 3 has no store: it fails by name, and the others are done; the same command skips these."""
    code, out, err = call("--layer", "all")
    assert code == 2
    assert [line for line in out if line.startswith("layer ")] == [
        f"layer {n} ({n + 1} of 4)" for n in range(4)
    ]
    first, last = err
    assert first.startswith(
        f"error: layer 3: {root}/tiny/layer_3.zarr: no such store; make harvest writes it"
    )
    assert last == "error: 1 of 4 layers failed (3), as said above; the same command tries them again"
    assert_as_alone(tmp_path, alone, 0, 1, 2)
    for layer, line in enumerate(table_of(out)):
        heldout = read_metadata(run_of(alone, layer))["heldout"]
        fvu = " ".join(f"{value:.4f}" for value in heldout["fvu"])
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells == [str(layer), fvu, f"{heldout['l0'][-1]:.1f}", f"{100 * heldout['dead'] / 64:.1f} %"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, again, _ = call("--layer", "all")
    assert (code, again.count(f"already trained on {ROWS:,} rows, nothing to do")) == (2, 3)
    assert table_of(again) == table_of(out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_layers_come_in_rising_order_and_one_alone_is_as_ever(call: Call) -> None:
    code, out, err = call("--layer", "2,0")
    assert (code, err) == (0, [])
    assert [line for line in out if line.startswith("layer ")] == ["layer 0 (1 of 2)", "layer 2 (2 of 2)"]
    code, out, _ = call("--layer", "2")
    assert out[0] == f"already trained on {ROWS:,} rows, nothing to do"
    assert not [line for line in out if line.startswith(("layer ", "run a"))]


def test_what_a_user_can_mend_goes_on_and_a_defect_stops(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in layer 0, a loss that is not finite in layer 1; then a defect in layer 1."""
    works = train.loop.train
    raises: dict[int, Exception] = {
        0: OSError(errno.ENOSPC, "No space left on device", "/full"),
        1: InputError("loss is not finite"),
    }

    def training(settings: Settings, store: Store) -> Any:
        if settings.layer in raises:
            raise raises[settings.layer]
        return works(settings, store)

    monkeypatch.setattr(train.loop, "train", training)
    code, out, err = call("--layer", "0-2")
    assert code == 2
    assert err == [
        "error: layer 0: /full: No space left on device; fix that and rerun the same command to continue",
        "error: layer 1: loss is not finite",
        "error: 2 of 3 layers failed (0 1), as said above; the same command tries them again",
    ]
    assert [line.split()[1] for line in table_of(out)] == ["2"]
    raises[1] = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError) as stopped:
        call("--layer", "0-2", "--run", "b")
    assert stopped.value.__notes__ == ["layer 1 stopped the set; the same command continues with it"]
    assert not run_of(tmp_path, 2, "b").exists()


def test_a_stopped_set_continues_in_the_layer_where_it_was(
    call: Call, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Run.feed

    def feeding(self: Run, *args: Any) -> None:
        if (self.settings.layer, self.state.step) == (1, 6):
            os.kill(os.getpid(), signal.SIGINT)
        feed(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "feed", feeding)
        code, out, err = call("--layer", "0-2")
    assert (code, out[-1]) == (130, "layer 1 (2 of 3)")
    assert err == ["interrupted: layer 1: step 7 is saved; the same command continues"]
    assert not run_of(tmp_path, 2).exists()
    assert call("--layer", "0-2")[0] == 0
    assert_as_alone(tmp_path, alone, 0, 1, 2)


KILLED = """
import os, signal, sys
from common.cli import run_stage
from train.__main__ import main
from train.loop import Run

feed = Run.feed
def feeding(self, *args):
    if (self.settings.layer, self.state.step) == (1, 6):
        os.kill(os.getpid(), signal.SIGKILL)
    feed(self, *args)

Run.feed = feeding
run_stage(main)
"""


def test_a_killed_set_continues_by_the_same_command(
    call: Call, root: Path, tmp_path: Path, alone: Path
) -> None:
    """kill -9 at step 6 of the second layer; its last checkpoint is that of step 5."""
    words = [sys.executable, "-c", KILLED, *typed(root, tmp_path), "--layer", "0-2"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert killed.returncode == -9, killed.stderr
    assert (run_of(tmp_path, 1) / "state" / "latest").read_text() == "step_5\n"
    code, out, _ = call("--layer", "0-2")
    assert (code, out[1]) == (0, f"already trained on {ROWS:,} rows, nothing to do")
    assert_as_alone(tmp_path, alone, 0, 1, 2)


def test_a_layer_is_gone_before_the_next_begins(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store, run or thread of the one before is left, and its run of W&B has ended."""
    said: list[str] = []
    alive: list[tuple[int, int, int]] = []

    class Told(FakeWandb):
        def init(self, **arguments: Any) -> FakeWandb:
            said.append(f"{arguments['name']} begins")
            return super().init(**arguments)

        def finish(self) -> None:
            said.append("ends")

    start = Run.__init__

    def starting(self: Run, *args: Any, **keywords: Any) -> None:
        things = gc.get_objects()
        stores, runs = (sum(type(each) is kind for each in things) for kind in (Store, Run))
        alive.append((stores, runs, threading.active_count()))
        start(self, *args, **keywords)

    monkeypatch.setitem(sys.modules, "wandb", Told())
    monkeypatch.setattr(log, "check", lambda _: None)  # looks for the package
    monkeypatch.setattr(Run, "__init__", starting)
    assert call("--layer", "0-2", "--wandb.mode", "offline")[0] == 0
    assert said == [word for n in range(3) for word in (f"tiny-layer_{n}-a begins", "ends")]
    assert len(alive) == 3
    assert len(set(alive)) == 1


def test_a_sweep_of_layers_has_a_table_each_and_the_best_of_all(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs of W&B are grouped by layer."""
    groups: list[str] = []

    class Told(FakeWandb):
        def init(self, **arguments: Any) -> FakeWandb:
            groups.append(arguments["group"])
            return super().init(**arguments)

    monkeypatch.setitem(sys.modules, "wandb", Told())
    monkeypatch.setattr(log, "check", lambda _: None)  # looks for the package
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    wanted = ("--layer", "0 1", "--sweep.k", "3,4", "--train.rows", "640", "--wandb.mode", "offline")
    code, out, _ = call(*wanted, stage=sweep.main)
    assert code == 0
    assert groups == [f"tiny-layer_{n}-a-sweep" for n in (0, 0, 1, 1)]
    assert "WANDB_RUN_GROUP" not in os.environ
    for layer, line in enumerate(table_of(out)):
        best = json.loads((run_of(tmp_path, layer, "a-sweep") / "results.json").read_text())[0]
        assert [cell.strip() for cell in line.strip("│").split("│")][:2] == [str(layer), best["run"]]


def test_a_rank_of_torchrun_takes_one_layer(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    around = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "1",
    }
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    code, _, err = call("--layer", "0-2")
    assert code == 2
    assert err == [
        "error: rank 0: layer: several layers in processes that torchrun has started; give one layer to each torchrun, "
        "or let NPROC=n (python -m common.launch n) start them"
    ]


def launched(root: Path, checkpoints: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "common.launch", "2", "train", *typed(root, checkpoints), *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_two_processes_that_share_the_layers_train_each_as_alone(
    root: Path, tmp_path: Path, alone: Path
) -> None:
    """The missing one does not stop the other process; every line says of which layer it is."""
    process = launched(root, tmp_path, "--layer", "all", "--spread", "layers")
    assert process.returncode == 2, process.stderr
    assert_as_alone(tmp_path, alone, 0, 1, 2)
    *layers, last = [line for line in process.stderr.splitlines() if "warning:" not in line]
    assert last == "error: 1 of 4 layers failed (3), as said above; the same command tries them again"
    assert {line.split(" | ")[0] for line in layers} == {f"layer {n}" for n in range(4)}
    assert [line for line in layers if line.startswith(f"layer 3 | error: {root}/tiny/layer_3.zarr: no such")]
    assert len(table_of(process.stdout.splitlines())) == 3


@pytest.mark.slow
def test_two_processes_share_the_rows_of_one_layer_after_another(root: Path, tmp_path: Path) -> None:
    """As two of them train one layer; the failing first one stops neither."""
    (root / "tiny" / "layer_1.zarr").rename(root / "away")
    try:
        process = launched(root, tmp_path, "--layer", "1 2")
    finally:
        (root / "away").rename(root / "tiny" / "layer_1.zarr")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: 1 of 2 layers failed (1), as said above")
    assert launched(root, tmp_path, "--layer", "2", "--run", "b").returncode == 0
    assert tensor_bytes(run_of(tmp_path, 2)) == tensor_bytes(run_of(tmp_path, 2, "b"))
