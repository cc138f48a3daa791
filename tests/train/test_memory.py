"""The plan against what a training process really takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from common.errors import InputError
from common.settings import ROOT
from train.plan import memory
from train.step.losses import Objective

GPU = ROOT / "bench" / "results" / "gpu.json"
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
        x, y = torch.randn({BATCH}, {D}), torch.randn({BATCH}, {D})
        values, gradients = step(adam.parameters, x, y, none, objective.k)
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


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 4 * memory.GIB)
    cpu = torch.device("cpu")
    memory.check(memory.GIB, memory.GIB, cpu)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=r"about 2\.9 GiB in each of 2 processes \(.*, 4\.0 GiB are free"):
        memory.check(memory.GIB, memory.GIB, cpu)
    memory.check(memory.GIB, 0, torch.device("cpu"))


def test_several_processes_hold_all_gradients_and_a_part_of_them_twice() -> None:
    alone, together = (memory.passing(OBJECTIVE, D, D, BATCH, processes=n) for n in (1, 2))
    gradients = 4 * 16384 * (2 * D + 2)
    assert gradients < together - alone < 1.4 * gradients


def test_many_active_latents_on_a_gpu_take_the_matrix_steps_memory() -> None:
    gpu, many = torch.device("cuda"), replace(OBJECTIVE, k=3000)
    plans = [
        memory.passing(replace(many, precision=precision), D, D, BATCH, gpu)
        for precision in ("float32", "tfloat32")
    ]
    assert plans[0] == plans[1] > memory.passing(replace(many, k=1), D, D, BATCH, gpu) + 8 * BATCH * 16384


def test_the_peak_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert memory.peak(torch.device("cuda:0")) == 123
    before = memory.peak(torch.device("cpu"))
    assert before is not None
    torch.ones(before // 4 + 2**24).sum()  # 64 MiB more than there ever was
    assert memory.peak(torch.device("cpu")) >= before + 2**26


def test_a_gpus_plan_holds_what_an_h100_measured() -> None:
    """bench/results/gpu.json: peaks of the step alone, which has no loader and folds nothing."""
    (steps,) = [device["step"] for device in json.loads(GPU.read_text(encoding="utf-8")).values()]
    assert len(steps) == 18
    for name, figures in steps.items():
        precision, batch, latents = re.fullmatch(r"(\w+), batch ([\d,]+), ([\d,]+) latents", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        rows, d_sae = (int(number.replace(",", "")) for number in (batch, latents))
        ends = tuple(d_sae * share // 16 for share in (1, 3, 7, 16))
        objective = Objective(ends, (0.25,) * 4, 96, "batch_topk", 512, 1.0, precision)
        plan = memory.kept(objective, 2304, 2304)
        plan += memory.passing(objective, 2304, 2304, rows, torch.device("cuda"))
        assert 0.6 * plan < figures["peak memory, GiB"] * memory.GIB < plan, (name, plan / memory.GIB)
