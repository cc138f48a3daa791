"""The step on a device that is no CPU: the CPU's results, few kernels, and the host waits twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend import DEVICE, pretend_device
from tests.pretend import counted as on_the_fake_device
from tests.train.steps import problem
from train.state import State
from train.step.losses import revival
from train.step.matrix import MatrixStep
from train.step.optimizer import apply
from train.step.sparse import SparseStep

KERNELS = 160
"""Per step, with dead latents."""
WAITS = 2
"""Number of candidates, of dead latents."""


def trained(
    step: Any, device: torch.device, aux_k: int, selection: str, steps: int = 3
) -> tuple[dict[str, Tensor], State]:
    """Parameters after some steps of a problem with dead latents and a skip connection."""
    case = problem(
        rows=300, d_in=24, d_out=20, prefix_ends=(64, 700, 1301), k=9, skip=True, selection=selection,
        aux_k=aux_k, dtype=torch.float32,
    )  # fmt: skip
    parameters = case.parameters.map(lambda tensor: tensor.to(device))
    x, y = case.x.to(device), case.y.to(device)
    state, compute = State.start(parameters, case.objective.prefix_ends), step(case.objective)
    with torch.no_grad():
        for _ in range(steps):
            dead = state.dead(after_rows=250)
            values, gradients = compute(state.parameters, x, y, dead, case.objective.k)
            state.note_failure(values.loss)
            apply(state.adam, gradients.plus(revival(dead, 1301, 20)), 1e-3)
            state.count(values.cut, values.fired, case.objective.prefix_ends, 300, counting=0)
    return state.parameters.named(), state


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
@pytest.mark.parametrize("aux_k", [7, 2000])
@pytest.mark.parametrize("step", [SparseStep, MatrixStep])
def test_a_device_gives_the_cpus_results(step: Any, aux_k: int, selection: str) -> None:
    expected, _ = trained(SparseStep, torch.device("cpu"), aux_k, selection)
    with pretend_device():
        computed, state = trained(step, DEVICE, aux_k, selection)
        tensors = [*computed.values(), *state.tensors().values()]
        assert all(tensor.device.type == DEVICE.type for tensor in tensors)
    for name, tensor in expected.items():
        torch.testing.assert_close(computed[name].cpu(), tensor, rtol=1e-4, atol=2e-6, msg=name)


def counted(step: Any) -> Counter[str]:
    """Counts of the fourth step, which has dead latents: what four steps count and three do not."""
    counts: list[Counter[str]] = []
    for steps in (1, 3, 4):  # the first copies constants to the device
        with pretend_device() as now:
            trained(step, DEVICE, 512, "batch_topk", steps)
            counts.append(Counter(now))
    return counts[2] - counts[1]


@on_the_fake_device
@pytest.mark.parametrize("step", [SparseStep, MatrixStep])
def test_a_step_is_few_kernels_and_the_host_waits_seldom(step: Any) -> None:
    counts = counted(step)
    assert 50 < counts["kernels"] <= KERNELS, counts
    assert 0 < counts["waits"] <= WAITS, counts


@on_the_fake_device
def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretend_device(), pytest.raises(RuntimeError, match="meet"):
        torch.ones(3).to(DEVICE) + torch.ones(3)


@on_the_fake_device
def test_waits_and_kernels_are_counted() -> None:
    with pretend_device() as counts:
        x = torch.arange(4.0).to(DEVICE)
        before = Counter(counts)
        assert float((x + 1).sum()) == 10
        assert len((x > 1).nonzero()) == 2
        x[x > 1]
        more = Counter(counts) - before
        assert (more["waits"], more["add"], more["nonzero"]) == (3, 1, 1)
        assert (counts["bytes to device"], counts["bytes to host"]) == (16, 4)
        x.to("cpu")
        torch.ones(2).to(DEVICE, non_blocking=True)
    assert (counts["bytes to device"], counts["bytes to host"]) == (24, 20)
    assert counts["waits"] == 5  # of the copies only two waited


@on_the_fake_device
def test_sums_in_an_open_order_are_counted() -> None:
    """What adds to one place twice, as index_add_ with equal indices does, and what adds once."""
    with pretend_device() as counts:
        x, ones = torch.zeros(4).to(DEVICE), torch.ones(2).to(DEVICE)
        twice, once = torch.tensor([1, 1]).to(DEVICE), torch.tensor([1, 3]).to(DEVICE)
        x.index_add_(0, once, ones)
        x.long().index_add_(0, twice, ones.long())
        assert counts["sums in an open order"] == 0
        x.index_add_(0, twice, ones)
        x.index_put_((twice,), ones, accumulate=True)
        x.cumsum(0)
    assert counts["sums in an open order"] == 3
