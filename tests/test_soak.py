"""The soak of `make soak`, short; and that it sees what it looks for."""

import shutil
from pathlib import Path

import pytest
import torch

from bench.soak import Cycle, differences, slope, soak, verdict
from tests.fixtures import make_store
from tests.train.runs import sparse_rows, tiny_settings
from train.loop import train


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    cycles_run = soak(tmp_path, seed=3, minutes=0, cycles=2, steps=300)
    assert len(cycles_run) == 2
    assert sum(len(each.kills) for each in cycles_run) > 0
    assert verdict(cycles_run)[1] == []


def test_a_difference_and_a_left_over_are_found(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path / "activations", tmp_path / "checkpoints", train__rows=64 * 20)
    store = make_store(settings.store_path(0), sparse_rows(2048, 2), sparse_rows(600, 3))
    train(settings, store)
    first = settings.run_dir().rename(tmp_path / "first")
    train(settings, store)
    second = settings.run_dir()
    assert differences(second, first) == []
    (second / "state" / "latest.7.tmp").touch()
    assert differences(second, first) == ["state/latest.7.tmp: only in one"]
    (second / "state" / "latest.7.tmp").unlink()
    for name in ("state/step_20/tensors.safetensors", "metrics.jsonl", "activation_samples/samples.jsonl"):
        kept = (second / name).read_bytes()
        (second / name).write_bytes(
            kept.replace(b"1", b"2", 1) if name.endswith("l") else kept[:-1] + b"\x07"
        )
        assert differences(second, first) == [f"{name}: differs"]
        (second / name).write_bytes(kept)
    shutil.rmtree(second)
    train(
        tiny_settings(tmp_path / "activations", tmp_path / "checkpoints", train__rows=64 * 20, train__seed=1),
        store,
    )
    assert "transcoder.safetensors: differs" in differences(second, first)


def test_growth_is_found_and_one_outlier_is_not() -> None:
    assert slope([5.0]) == 0
    assert slope([10, 12, 14, 16, 18]) == 2
    assert slope([10, 10, 90, 10, 10, 10]) == 0
    steady = [Cycle(1.0, ["train SIGKILL 1.0"], 200.0 + n % 2, 300.0) for n in range(8)]
    assert verdict(steady)[1] == []
    growing = [Cycle(1.0, [], 200.0 + 1.5 * n, 300.0) for n in range(8)]
    assert verdict(growing)[1] == ["this process: memory grows by 1.50 MB a cycle"]
