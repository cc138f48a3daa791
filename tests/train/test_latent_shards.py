"""Latents over several processes: whole runs equal those of one process; checkpoints of any number of them go on."""

import contextlib
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from common.mesh import Mesh, row_shards
from common.settings import ROOT, Settings
from shards import Store
from tests.train.runs import command, tensors, tiny_settings
from tests.train.steps import problem
from tests.train.threads import meshes, together
from train import checkpoint
from train.loop import _check_alike, train
from train.state import State

CHANGES = {
    "train__rows": 64 * 20,
    "train__dead_after_rows": 100,
    "train__clip_norm": 0.05,
    "train__checkpoint_every": 7,
    "train__heldout_every": 10,
    "transcoder__skip": True,
    "transcoder__d_sae": 65,  # slices of unequal sizes, and groups that end within them
    "transcoder__group_sizes": (8, 16, 41),
}

GONE = object()
"""In place of a value of state.json: that it has none."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(settings: Settings, world: int, shards: int) -> list[str]:
    """The command that trains in `world` processes, of which `shards` share the latents."""
    shared = settings.train.model_copy(update={"latent_shards": shards})
    _, _, stage, *options = command(settings.model_copy(update={"train": shared}))
    return [sys.executable, "-m", "common.launch", str(world), stage, *options]


def run(settings: Settings, world: int, shards: int, check: bool = True) -> str:
    """Train in processes; what they print on standard error."""
    process = subprocess.run(
        launch(settings, world, shards),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr


def assert_close(actual: Path, expected: Path) -> None:
    found, wanted = tensors(actual), tensors(expected)
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-4, name


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "activation_samples" / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("rows", "latents", "selection"),
    [
        (1, 4, "batch_topk"),
        (2, 2, "topk"),
        (2, 2, "batch_topk"),
        (4, 1, "batch_topk"),
        pytest.param(1, 4, "topk", marks=pytest.mark.slow),
        pytest.param(4, 1, "topk", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_equals_one_process(
    rows: int, latents: int, selection: str, store: Store, store_root: Path, tmp_path: Path
) -> None:
    """20 steps with dead latents from the third on, a clip norm, a skip connection, samples, measurements meanwhile."""
    one, mesh = (
        tiny_settings(store_root, tmp_path, run=name, transcoder__selection=selection, **CHANGES)
        for name in ("one", "mesh")
    )
    train(one, store)
    run(mesh, rows * latents, latents)
    assert_close(mesh.run_dir(), one.run_dir())
    found, wanted = lines(mesh.run_dir()), lines(one.run_dir())
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for key, value in wanted[-1].items():
        if key not in ("rows_per_second", "data_wait_seconds", "peak_memory_bytes"):
            assert found[-1][key] == pytest.approx(value, rel=1e-4), key
    assert wanted[-1]["aux_loss"] > 0
    ours, theirs = (samples(s.run_dir()) for s in (mesh, one))
    assert [line["latent"] for line in ours] == list(range(65))
    same = sum(a["samples"][:1] == b["samples"][:1] for a, b in zip(ours, theirs, strict=True))
    assert same > 50  # values are rounded to 5 digits
    newest = mesh.run_dir() / "state" / "step_20"
    names = {path.name for path in newest.iterdir()}
    assert len(names) == latents + 1
    assert latents != 4 or "tensors-0-16.safetensors" in names


def test_another_number_of_processes_goes_on(store: Store, store_root: Path, tmp_path: Path) -> None:
    """14 steps in 3 slices, then 6 more in one process, in two slices, in two shards of the rows."""

    def asked(name: str, steps: int) -> Settings:
        return tiny_settings(store_root, tmp_path, run=name, **CHANGES | {"train__rows": 64 * steps})

    for steps in (14, 20):
        train(asked("whole", steps), store)
    run(asked("first", 14), 3, 3)
    first = asked("first", 14).run_dir()
    files = {path.name for path in (first / "state" / "step_14").iterdir()}
    assert files == {f"tensors-{part}.safetensors" for part in ("0-21", "21-43", "43-65")} | {"state.json"}
    for name, world, shards in (("one", 1, 1), ("two", 2, 2), ("rows", 2, 1)):
        shutil.copytree(first, asked(name, 20).run_dir())
        run(asked(name, 20), world, shards)
        assert_close(asked(name, 20).run_dir(), asked("whole", 20).run_dir())
        newest = asked(name, 20).run_dir() / "state" / "step_20"
        assert len(list(newest.iterdir())) == shards + 1


def begun(settings: Settings) -> int:
    """When the run was begun, or went on: settings.json is written again."""
    file = settings.run_dir() / "settings.json"
    return file.stat().st_mtime_ns if file.exists() else 0


def kill_one(settings: Settings, world: int, shards: int, rank: int, seconds: float) -> bool:
    """Start a training, and SIGKILL one of its processes so long after the run was begun; whether it was there."""
    before = begun(settings)
    process = subprocess.Popen(
        launch(settings, world, shards),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while process.poll() is None and begun(settings) == before:
            time.sleep(0.01)
        time.sleep(seconds)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = sorted(map(int, children.read_text().split())) if process.poll() is None else []
        killed = len(ranks) == world
        if killed:
            os.kill(ranks[rank], signal.SIGKILL)
        process.communicate(timeout=300)
        return killed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def killed_and_run_again(
    settings: Settings, whole: Path, world: int, shards: int, kills: list[tuple[int, float]]
) -> int:
    """Kill a run at these (rank, seconds), let the last go on to its end: the bits of `whole`. How many were killed."""
    killed = 0
    for rank, seconds in kills:
        killed += kill_one(settings, world, shards, rank, seconds)
        state = settings.run_dir() / "state"
        if (state / "latest").exists():
            assert (state / (state / "latest").read_text().strip() / "state.json").exists()
    run(settings, world, shards)
    found, wanted = tensors(settings.run_dir()), tensors(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not list(settings.run_dir().rglob("*.tmp"))
    return killed


LONG = CHANGES | {"train__rows": 64 * 120, "train__checkpoint_every": 9, "train__heldout_every": 50}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_instants(store_root: Path, tmp_path: Path) -> None:
    longer = LONG | {"train__rows": 64 * 2000}  # not at its end after 20 s
    whole, killed = (tiny_settings(store_root, tmp_path, run=name, **longer) for name in ("whole", "killed"))
    run(whole, 4, 2)
    chance = random.Random(0)
    kills = [(chance.randrange(4), chance.random()) for _ in range(20)]
    assert killed_and_run_again(killed, whole.run_dir(), 4, 2, kills) == 20


def test_files_that_do_not_make_a_checkpoint(store: Store, store_root: Path, tmp_path: Path) -> None:
    """Slices in another order, with a gap, or overlapping; files of each other's names or of another step; one less."""
    settings = tiny_settings(store_root, tmp_path, run="sliced", **CHANGES)
    run(settings, 2, 2)
    whole, folder = settings.run_dir(), settings.run_dir().with_name("copy")
    longer = {"train__rows": 64 * 30}
    copy = tiny_settings(store_root, tmp_path, run="copy", **CHANGES | longer)
    newest = folder / "state" / "step_20"
    one, two = newest / "tensors-0-32.safetensors", newest / "tensors-32-65.safetensors"

    def recorded(**values: object) -> None:
        record = json.loads((newest / "state.json").read_text())
        kept = {key: value for key, value in (record | values).items() if value is not GONE}
        (newest / "state.json").write_text(json.dumps(kept))

    def swapped() -> None:
        one.rename(newest / "aside")
        two.rename(one)
        (newest / "aside").rename(two)

    mistakes = [
        (lambda: recorded(slices=[[32, 65], [0, 32]]), "slices: expected 0 to 65 without a gap, found"),
        (lambda: recorded(slices=[[0, 32], [33, 65]]), "slices: expected 0 to 65 without a gap, found"),
        (lambda: recorded(slices=[[0, 40], [32, 65]]), "slices: expected 0 to 65 without a gap, found"),
        (lambda: recorded(slices=[[0, 32]]), "slices: expected 0 to 65 without a gap, found"),
        (lambda: recorded(slices=None), "not a readable checkpoint"),
        (swapped, "tensors-0-32.safetensors: expected {'latents': '0-32', 'step': '20'}, found"),
        (two.unlink, "No such file or directory"),
        (
            lambda: recorded(slices=[[0, 32.5], [32, 65]]),
            "slices[0]: expected a whole number from 0, found 32.5",
        ),
        (lambda: recorded(slices=[[0, math.inf]]), "slices[0]: expected a whole number from 0, found inf"),
        (lambda: recorded(step=GONE), "step: expected a whole number from 0, found None"),
        (lambda: recorded(step="20"), "step: expected a whole number from 0, found '20'"),
        (lambda: recorded(rows="many"), "rows: expected a whole number from 0, found 'many'"),
        (lambda: recorded(epoch=-1), "epoch: expected a whole number from 0, found -1"),
    ]
    for breaks, line in mistakes:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        breaks()
        with pytest.raises(InputError, match=re.escape(line)):
            train(copy, store)


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_of_them(
    full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has said so before the other has begun to write: nothing is removed under that one's hands, or stays."""
    written = list[Path]()

    def writes(file: Path, *_: object) -> None:
        if first_of(file) == full * 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        time.sleep(0.5)
        file.write_bytes(b"")
        written.append(file)

    def first_of(file: Path) -> int:
        return int(file.name.split("-")[1])

    def one(place: Mesh) -> str:
        own = place.part(12)
        parameters = problem(prefix_ends=(len(range(12)[own]),), dtype=torch.float32).parameters
        state = State.start(parameters, (4, 12), latents=own)
        with pytest.raises((OSError, InputError)) as stopped:
            checkpoint.save(tmp_path, state, own, place)
        return str(stopped.value)

    monkeypatch.setattr(checkpoint, "save_tensors", writes)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    said = together(meshes(1, 2), one)
    assert "No space left on device" in said[full]
    assert said[1 - full].startswith("another of the 1 processes has ended; its output")
    assert [first_of(file) for file in written] == [6 - 6 * full]
    assert not list((tmp_path / "state").iterdir())


def test_processes_that_were_asked_for_other_runs(store: Store, store_root: Path, tmp_path: Path) -> None:
    """By srun, say, with a pipeline.toml of each node's own: each says what differs, none waits for another."""
    alike, fewer = (tiny_settings(store_root, tmp_path, "asked", train__rows=rows) for rows in (6144, 640))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    started = [
        subprocess.Popen(
            command(asked),
            cwd=ROOT,
            env=ENVIRONMENT | here | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, asked in enumerate((alike, fewer))
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "rank 1: train.rows: expected 6144, as rank 0 has it, found 640; start all" in said[1]
    assert not alike.run_dir().exists()

    def one(place: Mesh) -> str:
        asked = [[alike], [fewer], [alike, alike]][place.everyone.rank]
        try:
            _check_alike(asked, store, place.everyone)
        except InputError as error:
            return str(error)
        return ""

    first, second, third = together(meshes(3, 1), one)
    assert first.startswith("another of the 1 processes has ended; its output or its")
    assert second.startswith(
        "train.rows: expected 6144, as rank 0 has it, found 640; start all processes with the"
    )
    assert third.startswith("runs: expected 1, as rank 0 has it, found 2")


def test_processes_that_make_no_mesh(store: Store, store_root: Path, tmp_path: Path) -> None:
    settings = tiny_settings(store_root, tmp_path, run="none", **CHANGES | {"train__latent_shards": 2})
    with pytest.raises(InputError, match=r"number of processes \(1\), found 2; give NPROC=2 or a mult"):
        train(settings, store)
    assert not settings.run_dir().exists()
    with pytest.raises(InputError, match=r"processes \(6\), found 4"):
        row_shards(6, 4)
    assert [row_shards(6, shards) for shards in (1, 2, 3, 6)] == [6, 3, 2, 1]
