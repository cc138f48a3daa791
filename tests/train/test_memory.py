"""The plan against what a training process really takes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from common.errors import InputError
from common.settings import ROOT
from train import memory
from train.step.losses import Objective

OBJECTIVE = Objective((512, 4096, 16384), (1 / 3,) * 3, 32, "batch_topk", 0, 0.0)
D, BATCH = 512, 512

STEPS = f"""
import json, torch
from tests.memory import resident
from train.step.losses import Objective
from train.step.optimizer import Adam, apply
from train.step.sparse import SparseStep
from train.recipe import initialise
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = resident("VmHWM")
objective = Objective((512, 4096, 16384), (1 / 3,) * 3, 32, "batch_topk", 0, 0.0)
adam = Adam(initialise({D}, 16384, torch.zeros({D}), skip=False, seed=0))
step, none = SparseStep(objective), torch.arange(0)
with torch.no_grad():
    for _ in range(3):
        values, gradients = step(adam.parameters, torch.randn({BATCH}, {D}), torch.randn({BATCH}, {D}), none)
        apply(adam, gradients, 1e-3)
print(json.dumps(resident("VmHWM") - before))
"""


def test_steps_take_what_was_planned() -> None:
    process = subprocess.run(
        [sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    measured = json.loads(process.stdout)
    planned = memory.kept(OBJECTIVE, D, D) + memory.passing(OBJECTIVE, D, D, BATCH)
    assert 0.5 * planned < measured < 1.15 * planned + 2**26, (measured, planned)


def test_what_cannot_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 4 * memory.GIB)
    memory.check(memory.GIB, memory.GIB, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"needs about 11\.\d GiB \(10\.0 of weights and Adam, 0\.1 of a step"
    ):
        memory.check(10 * memory.GIB, memory.GIB // 10, torch.device("cpu"))


def test_a_gpu_must_hold_the_step_and_the_host_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 8 * memory.GIB, "cpu": memory.GIB}
    monkeypatch.setattr(memory, "available", lambda device: free[device.type])
    gpu = torch.device("cuda")
    memory.check(6 * memory.GIB, memory.GIB, gpu)
    with pytest.raises(InputError, match=r"needs about 9\.0 GiB on cuda \(8\.0 of weights and Adam"):
        memory.check(8 * memory.GIB, memory.GIB, gpu)
    free["cpu"] = memory.GIB // 2
    with pytest.raises(InputError, match=r"needs about 0\.9 GiB on cpu \(loader and program\)"):
        memory.check(memory.GIB, memory.GIB, gpu)


def test_a_gpu_also_needs_all_gradients_at_once() -> None:
    half = replace(OBJECTIVE, precision="bfloat16")
    ours, theirs = (memory.passing(half, D, D, BATCH, torch.device(name)) for name in ("cpu", "cuda"))
    gradients, copy_of_W_dec, low_acts = (
        2 * D * OBJECTIVE.d_sae * 4,
        D * OBJECTIVE.d_sae * 2,
        2 * BATCH * OBJECTIVE.d_sae * 2,
    )
    assert theirs - ours == gradients + copy_of_W_dec + low_acts
