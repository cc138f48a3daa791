"""make evaluate NPROC=n: real processes, which end as one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from common.settings import ROOT, Settings
from evaluate.files import finished
from evaluate.records import Metrics
from evaluate.run import evaluate
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import arguments, make_run, settings_of
from tests.evaluate.test_ranks import assert_same

LIMIT = 300
"""Seconds: of a machine that does other things too."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each process has: float32 products of several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started(processes: int, words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "common.launch", str(processes), "evaluate", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(processes: int, words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with started(processes, words) as launcher:
        out, error = launcher.communicate(timeout=LIMIT)
    return launcher.returncode, out, error


def compare(processes: int, settings: Settings, words: list[str], tokens: int) -> Metrics:
    """Evaluates a run in one process and in several; what both write is the same, and then nothing is done again."""
    folder = settings.run_dir() / "evaluation"
    expected, _ = evaluate(settings, tokens)
    tables = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    shutil.rmtree(folder)
    shutil.rmtree(Path(settings.store_path(settings.layer)).with_suffix(".losses"), ignore_errors=True)
    code, out, error = ended(processes, [*words, "--cross-entropy-tokens", str(tokens)])
    assert code == 0, error
    assert out.count("held-out rows") == 1
    found = finished(folder)
    assert found is not None
    assert_same(found.written(), expected.written())
    assert_same({path.name: load_file(path) for path in folder.glob("*.safetensors")}, tables)
    assert evaluate(settings, tokens) == (found, False)
    return found


@pytest.mark.timeout(LIMIT)
def test_three_processes_write_what_one_writes(tmp_path: Path) -> None:
    make_run(tmp_path, heldout=4500)
    assert compare(3, settings_of(tmp_path), arguments(tmp_path), 0).rows == 4500


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_two_processes_with_the_language_model(llama: Path, settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(llama, "--run", "a", "--wandb.mode", "disabled")
    harvest(settings)
    source = Store.open(settings.store_path(1)).manifest.source.model_dump(mode="json")
    replace(random_coder(32, 32, (4, 9)), metadata={"source": source}).save(settings.run_dir())
    words = ["--layer", "1", "--run", "a", "--model.name", str(llama), "--model.device", "cpu"]
    paths = settings.paths
    words += [f"--paths.activations={paths.activations}", f"--paths.checkpoints={paths.checkpoints}"]
    assert compare(2, settings, [*words, "--wandb.mode", "disabled"], 64).cross_entropy.skipped is None


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
def test_a_rank_that_cannot_read_its_rows_ends_all(tmp_path: Path) -> None:
    """The chunk is in the second one's part, and in no sample of the rows that all read."""
    store = make_run(tmp_path, heldout=40_000)
    shard = max((store.path / "heldout" / "inputs").rglob("*"), key=lambda path: path.stat().st_size)
    assert shard.stat().st_size > 700_000
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size * 41 // 64)
        file.write(b"\xff" * 64)
    code, _, error = ended(3, arguments(tmp_path))
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2, error
    assert sum("damaged" in line or "checksum" in line for line in lines) == 1, error
    assert "Traceback" not in error
    assert finished(settings_of(tmp_path).run_dir() / "evaluation") is None


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    make_run(tmp_path, heldout=150_000)
    with started(3, arguments(tmp_path)) as launcher:
        assert launcher.stderr is not None
        while "statistics" not in launcher.stderr.readline():
            time.sleep(0.01)
        launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not (settings_of(tmp_path).run_dir() / "evaluation").exists()
