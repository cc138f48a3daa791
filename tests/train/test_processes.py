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
from tests.train.runs import D_IN, D_OUT, command, tensors, tiny_settings
from train.loop import train
from train.step.sparse import LATENTS


def run_two(settings: Settings, noted: Path | None = None) -> None:
    """Train in two processes; `noted`: see tests/train/collectives.py."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    _, _, stage, *options = command(settings)
    program = [stage] if noted is None else ["tests.train.collectives", str(noted)]
    arguments = [*torchrun, "-m", "--", *program, *options]  # "--": torchrun would take --run for its own
    process = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(("selection", "groups"), [("batch_topk", (200, 400, 600)), ("topk", (8, 16, 40))])
def test_two_processes_equal_one(
    selection: str, groups: tuple[int, ...], store: Store, store_root: Path, tmp_path: Path
) -> None:
    """20 steps with dead latents from the third on, a clip norm and a skip connection; three blocks of latents, or one.

    The gradients are sent in four collectives at most, and each number once.
    """
    changes = {
        "transcoder__d_sae": sum(groups),
        "transcoder__group_sizes": groups,
        "train__rows": 64 * 20,
        "train__dead_after_rows": 100,
        "train__clip_norm": 0.05,
        "transcoder__selection": selection,
        "transcoder__skip": True,
    }
    one = tiny_settings(store_root, tmp_path, run="one", **changes)
    two = tiny_settings(store_root, tmp_path, run="two", **changes)
    train(one, store)
    run_two(two, noted=tmp_path / "collectives.json")
    steps = json.loads((tmp_path / "collectives.json").read_text())
    assert len(steps) == 20
    shared, a_latent = D_OUT + D_IN * D_OUT, D_IN + 1 + D_OUT + 1
    for number, step in enumerate(steps, 1):
        sent = [
            size for name, kind, size in step if (name, kind) == ("all_reduce", "torch.float32") and size > 4
        ]
        assert len(sent) == (4 if sum(groups) > LATENTS else 2)
        assert sum(sent) == 4 * (shared + sum(groups) * a_latent)
        assert "barrier" not in {name for name, _, _ in step}
        samples = 6 if number % 5 == 0 else 0
        assert len(step) <= (16 if sum(groups) > LATENTS else 13) + samples, step
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
