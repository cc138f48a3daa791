"""Two processes of half the batch against one of the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.settings import ROOT, Settings
from shards import Store
from tests.train.runs import command, tensors, tiny_settings
from train.loop import train


def run_two(settings: Settings) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*torchrun, "-m", "--", *command(settings)[2:]]  # "--": torchrun would take --run for its own
    process = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
def test_two_processes_equal_one(selection: str, store: Store, store_root: Path, tmp_path: Path) -> None:
    """20 steps with dead latents from the third on, a clip norm and a skip connection."""
    changes = {
        "train__rows": 64 * 20,
        "train__dead_after_rows": 100,
        "train__clip_norm": 0.05,
        "transcoder__selection": selection,
        "transcoder__skip": True,
    }
    one = tiny_settings(store_root, tmp_path, run="one", **changes)
    two = tiny_settings(store_root, tmp_path, run="two", **changes)
    train(one, store)
    run_two(two)
    expected, actual = tensors(one.run_dir()), tensors(two.run_dir())
    for name, tensor in expected.items():
        assert float((actual[name] - tensor).norm() / tensor.norm()) < 1e-4, name
    last = [json.loads((s.run_dir() / "metrics.jsonl").read_text().splitlines()[-1]) for s in (one, two)]
    for name in ("loss", "aux_loss", "l0_norm", "fvu/prefix_0", "dead_features_percentage", "threshold"):
        assert last[1][name] == pytest.approx(last[0][name], rel=1e-4), name
    assert last[0]["aux_loss"] > 0


@pytest.mark.slow
def test_two_processes_resume(store: Store, store_root: Path, tmp_path: Path) -> None:
    whole = tiny_settings(store_root, tmp_path, run="whole", train__rows=64 * 40)
    parts = tiny_settings(store_root, tmp_path, run="parts", train__rows=64 * 40)
    run_two(whole)
    run_two(parts)
    (parts.run_dir() / "transcoder.safetensors").unlink()
    run_two(parts)  # goes on from the last checkpoint to the same file
    first, second = tensors(whole.run_dir()), tensors(parts.run_dir())
    assert all(torch.equal(first[name], second[name]) for name in first)
