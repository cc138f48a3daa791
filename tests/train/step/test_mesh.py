"""Latents over several processes: the step is that of one process, and sends what it must and no more."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.mesh import Mesh
from tests.pretend import DEVICE, pretend_device
from tests.train.steps import Problem, problem
from tests.train.threads import Threads, meshes, together
from train.state import State
from train.step.dense import DenseStep
from train.step.gradients import Gradients
from train.step.losses import StepValues, ends_within, revival
from train.step.matrix import MatrixStep
from train.step.optimizer import apply, clip_divisor
from train.step.sparse import SparseStep

Divided = type[SparseStep] | type[MatrixStep]


def cut_of(case: Problem, mesh: Mesh) -> tuple[Problem, slice, slice]:
    """The part of a problem that one process has; its latents and its rows."""
    latents, n = mesh.part(case.objective.d_sae), len(case.x)
    rows = slice(n * mesh.rows.rank // mesh.rows.world, n * (mesh.rows.rank + 1) // mesh.rows.world)
    dead = case.dead[(case.dead >= latents.start) & (case.dead < latents.stop)] - latents.start
    weights = None if case.weights is None else case.weights[rows]
    part = Problem(
        case.parameters.of(latents), case.x[rows], case.y[rows], dead, case.objective.of(latents), weights
    )
    return part, latents, rows


def run(step: Divided, case: Problem, mesh: Mesh) -> tuple[StepValues, dict[str, Tensor], Tensor]:
    """One process's values, the gradients of its latents over all rows, and the divisor of a clip norm."""
    part, _, _ = cut_of(case, mesh)
    with torch.no_grad():
        values, gradients = step(part.objective, mesh)(
            part.parameters, part.x, part.y, part.dead, part.objective.k, part.weights
        )
        gradients = gradients.over(mesh.rows, part.objective.d_sae)
        kept = [block.copy() for block in gradients.blocks()]
        summed = Gradients(gradients.shared, lambda: iter(kept))
        divisor = clip_divisor(summed, 1e-3, mesh.latents)
        along = torch.cat([block.along for block in kept])
        return values, summed.whole() | {"along": along}, divisor


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ends = tuple(sum(groups[: g + 1]) for g in range(len(groups)))
    return {
        "seed": draw(st.integers(0, 1000)),
        "rows": 2 * draw(st.integers(1, 5)),
        "d_in": draw(st.integers(1, 7)),
        "d_out": draw(st.integers(1, 7)),
        "prefix_ends": ends,
        "k": draw(st.integers(1, ends[-1])),
        "n_dead": draw(st.integers(0, ends[-1])),
        "skip": draw(st.booleans()),
        "selection": draw(st.sampled_from(["batch_topk", "topk"])),
        "aux_k": draw(st.integers(0, 12)),
        "weighted": draw(st.booleans()),
        "bias": draw(st.sampled_from([0.0, -1.5, -100.0])),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes(), st.sampled_from([(1, 2), (1, 3), (1, 4), (2, 2), (2, 1)]))
def test_every_mesh_gives_the_step_of_one_process(chosen: dict[str, Any], shape: tuple[int, int]) -> None:
    """Slices of unequal sizes, groups that end anywhere in them."""
    case = problem(**chosen)
    assume(case.objective.d_sae >= shape[1])
    with torch.no_grad():
        whole, gradients = DenseStep(case.objective)(
            case.parameters, case.x, case.y, case.dead, case.objective.k, case.weights
        )
        blocks = list(gradients.blocks())
        divisor = clip_divisor(Gradients(gradients.shared, lambda: iter(blocks)), 1e-3)
        expected = gradients.whole() | {"along": torch.cat([block.along for block in blocks])}
    for step in (SparseStep, MatrixStep):
        places = meshes(*shape)
        results = together(places, lambda mesh, step=step: run(step, case, mesh))
        fired = torch.zeros_like(whole.fired)
        for mesh, (values, own, own_divisor) in zip(places, results, strict=True):
            _, latents, _ = cut_of(case, mesh)
            fired[latents] += values.fired
            for name in ("cut", "loss", "aux_loss", "squared_errors"):
                found, wanted = getattr(values, name), getattr(whole, name)
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13, msg=name)
            assert values.n_dead == len(case.dead)
            torch.testing.assert_close(own_divisor, divisor)
            for name, gradient in expected.items():
                part = gradient if name in ("b_dec", "W_skip") else gradient[latents]
                torch.testing.assert_close(own[name], part, rtol=1e-10, atol=1e-13, msg=name)
        assert torch.equal(fired, whole.fired)


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
@pytest.mark.parametrize("step", [SparseStep, MatrixStep])
def test_what_a_step_sends(step: Divided, selection: str) -> None:
    """At most B G D_out + 1.25 K B values, and a few numbers; with dead latents B D_out and B aux_k more."""
    rows, d_out, groups, k, aux_k = 256, 24, (64, 192, 512, 1600), 8, 16
    for n_dead in (0, 200):
        case = problem(
            rows=rows, d_in=16, d_out=d_out, prefix_ends=groups, k=k, n_dead=n_dead, aux_k=aux_k,
            selection=selection, dtype=torch.float32,
        )  # fmt: skip
        places = meshes(1, 4)
        together(places, lambda mesh, case=case: run(step, case, mesh))
        everyone, latents = places[0].everyone, places[0].latents
        assert isinstance(everyone, Threads)
        assert isinstance(latents, Threads)
        revived = rows * (d_out + aux_k) if n_dead else 0
        few = 4 * (len(groups) + 1) + 2000  # of the sample: 1.25 K B / stride + 8, here all there are
        sent = everyone.meeting.sent + latents.meeting.sent
        assert sent <= rows * len(groups) * d_out + 1.25 * k * rows + revived + few


def trained(step: Divided, case: Problem, mesh: Mesh, device: torch.device) -> dict[str, Tensor]:
    """Parameters of one process's latents after three steps with dead latents and a clip norm, on the CPU."""
    part, latents, _ = cut_of(case, mesh)
    parameters = part.parameters.map(lambda tensor: tensor.clone().to(device))
    x, y = part.x.to(device), part.y.to(device)
    state = State.start(parameters, case.objective.prefix_ends, latents=latents)
    compute, own = step(part.objective, mesh), part.objective
    with torch.no_grad():
        for _ in range(3):
            dead = state.dead(after_rows=250)
            values, gradients = compute(state.parameters, x, y, dead, own.k)
            state.note_failure(values.loss)
            gradients = gradients.over(mesh.rows, own.d_sae).plus(revival(dead, own.d_sae, y.shape[1]))
            apply(state.adam, gradients, 1e-3, 0.05, mesh.latents)
            fired = mesh.rows.total(values.fired)
            state.count(values.cut, fired, own.prefix_ends, len(case.x), 0, mesh.latents)
    kept = {"kept": state.kept, "density": state.density}
    assert state.kept.device.type == device.type
    return {name: tensor.cpu() for name, tensor in (state.parameters.named() | kept).items()}


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
@pytest.mark.parametrize("step", [SparseStep, MatrixStep])
def test_a_mesh_of_devices_trains_as_one_cpu(step: Divided, selection: str) -> None:
    """On the fake device no tensor of the CPU meets one of the device, whatever is exchanged."""
    case = problem(
        rows=300, d_in=24, d_out=20, prefix_ends=(64, 700, 1301), k=9, skip=True, selection=selection,
        aux_k=7, dtype=torch.float32,
    )  # fmt: skip
    expected = trained(SparseStep, case, Mesh(), torch.device("cpu"))
    with pretend_device():
        places = meshes(2, 2, DEVICE)
        computed = together(places, lambda mesh: trained(step, case, mesh, DEVICE))
    for mesh, found in zip(places, computed, strict=True):
        latents = mesh.part(1301)
        for name, tensor in expected.items():
            part = tensor if name in ("b_dec", "W_skip", "kept") else tensor[latents]
            torch.testing.assert_close(found[name], part, rtol=1e-4, atol=2e-6, msg=name)


def test_groups_within_a_slice() -> None:
    assert ends_within((4, 10, 20), slice(0, 20)) == (4, 10, 20)
    assert ends_within((4, 10, 20), slice(4, 10)) == (0, 6, 6)
    assert ends_within((4, 10, 20), slice(12, 12)) == (0, 0, 0)
