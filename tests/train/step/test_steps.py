"""The loss, its gradients, and the sparse step against the dense one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.steps import Problem, problem
from train.step.dense import DenseStep
from train.step.losses import REVIVAL, StepValues, aux_loss, nested_loss, prefix_weights, revival
from train.step.matrix import MatrixStep
from train.step.sparse import SparseStep
from transcoder.transcoder import Parameters

AnyStep = type[DenseStep] | type[SparseStep] | type[MatrixStep]


def run(step: AnyStep, case: Problem) -> tuple[StepValues, dict[str, Tensor]]:
    with torch.no_grad():
        rows = case.x, case.y, case.dead, case.objective.k, case.weights
        values, gradients = step(case.objective)(case.parameters, *rows)
        along = torch.cat([block.along for block in gradients.blocks()])
        return values, gradients.whole() | {"along": along}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ends = tuple(sum(groups[: g + 1]) for g in range(len(groups)))
    return {
        "seed": draw(st.integers(0, 1000)),
        "rows": draw(st.integers(1, 9)),
        "d_in": draw(st.integers(1, 7)),
        "d_out": draw(st.integers(1, 7)),
        "prefix_ends": ends,
        "k": draw(st.integers(1, ends[-1])),
        "n_dead": draw(st.integers(0, ends[-1])),
        "skip": draw(st.booleans()),
        "selection": draw(st.sampled_from(["batch_topk", "topk"])),
        "aux_k": draw(st.integers(0, 12)),
        "weighted": draw(st.booleans()),
        "bias": draw(st.sampled_from([0.0, -1.5, -100.0])),  # few, very few, no positive pre-activations
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes())
def test_every_step_equals_the_dense_one_in_float64(chosen: dict[str, Any]) -> None:
    case = problem(**chosen)
    dense, dense_gradients = run(DenseStep, case)
    for step in (SparseStep, MatrixStep):
        values, gradients = run(step, case)
        assert torch.equal(dense.entries.rows, values.entries.rows)
        assert torch.equal(dense.entries.latents, values.entries.latents)
        assert torch.equal(dense.fired, values.fired.long())
        torch.testing.assert_close(values.cut, dense.cut, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values.entries.values, dense.entries.values, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values.loss, dense.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values.aux_loss, dense.aux_loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(values.squared_errors, dense.squared_errors, rtol=1e-12, atol=1e-14)
        assert set(gradients) == {*case.parameters.named(), "along"}
        for name, gradient in dense_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
def test_sparse_equals_dense_in_float32_over_several_blocks(selection: str) -> None:
    case = problem(
        rows=301, d_in=65, d_out=33, prefix_ends=(64, 700, 1301), k=9, n_dead=130, aux_k=50, skip=True,
        selection=selection, dtype=torch.float32,
    )  # fmt: skip
    (_, dense), (_, sparse) = run(DenseStep, case), run(SparseStep, case)
    assert relative(dense["along"], (dense["W_dec"] * case.parameters.W_dec).sum(1)) < 1e-5
    for name, gradient in dense.items():
        assert relative(sparse[name], gradient) < 1e-5, name


def test_buffers_of_an_earlier_step_leave_no_trace() -> None:
    first, second = problem(seed=1, rows=9, n_dead=4), problem(seed=2, rows=9, n_dead=4)
    step = SparseStep(second.objective)
    with torch.no_grad():
        step(first.parameters, first.x, first.y, first.dead, first.objective.k)
        _, kept = step(second.parameters, second.x, second.y, second.dead, second.objective.k)
        again = kept.whole()
    _, fresh = run(SparseStep, second)
    assert all(torch.equal(again[name], fresh[name]) for name in again)


@pytest.mark.parametrize("step", [DenseStep, SparseStep])
def test_gradients_are_the_slopes_of_the_loss(step: AnyStep) -> None:
    case = problem(rows=5, d_in=4, n_dead=5, skip=True)
    _, gradients = run(step, case)
    generator = torch.Generator().manual_seed(0)
    detached = run(DenseStep, case)[0]  # aux's target is detached: its slope is that of a fixed residual

    def loss_at(parameters: Parameters) -> float:
        y_hat, errors, start = parameters.b_dec + case.x @ parameters.W_skip.T, [], 0
        pre = case.x @ parameters.W_enc.T + parameters.b_enc
        acts = torch.zeros_like(pre)
        rows, latents = detached.entries.rows, detached.entries.latents
        acts[rows, latents] = pre[rows, latents]
        for end in case.objective.prefix_ends:
            y_hat = y_hat + acts[:, start:end] @ parameters.W_dec[start:end]
            errors.append(((y_hat - case.y) ** 2).mean())
            start = end
        l2 = sum(w * e for w, e in zip(case.objective.prefix_weights, errors, strict=True))
        d = case.dead
        aux = aux_loss(
            case.x, residual, parameters.W_enc[d], parameters.b_enc[d], parameters.W_dec[d],
            aux_k=case.objective.aux_k, coefficient=case.objective.aux_coefficient,
        )  # fmt: skip
        return float(l2 + aux)

    p = case.parameters
    acts = torch.zeros(5, 11, dtype=torch.float64)
    acts[detached.entries.rows, detached.entries.latents] = detached.entries.values
    residual = case.y - (acts @ p.W_dec + p.b_dec + case.x @ p.W_skip.T)
    assert loss_at(p) == pytest.approx(float(detached.loss), rel=1e-12)
    for name, tensor in p.named().items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        up, down = (Parameters(**{**p.named(), name: tensor + h * direction}) for h in (1e-6, -1e-6))
        slope = (loss_at(up) - loss_at(down)) / 2e-6
        assert float((gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("step", [DenseStep, SparseStep])
@pytest.mark.parametrize("g", [0, 1, 2])
def test_every_prefix_sends_its_gradient(step: AnyStep, g: int) -> None:
    """Changing one prefix's weight changes the gradients of its latents, and of no latent beyond it."""
    case = problem(rows=30, k=4)
    weights = [0.0, 0.0, 0.0]
    weights[g] = 1.0
    alone = case._replace(objective=case.objective.__class__(
        case.objective.prefix_ends, tuple(weights), 4, "batch_topk", 0, 0.0
    ))  # fmt: skip
    _, gradients = run(step, alone)
    end = case.objective.prefix_ends[g]
    fired = run(step, alone)[0].entries.latents.unique()
    for f in fired.tolist():
        assert (gradients["W_dec"][f].norm() > 0) == (f < end)
        assert (gradients["W_enc"][f].norm() > 0) == (f < end)


def test_nested_loss_by_hand() -> None:
    errors = torch.tensor([8.0, 4.0], dtype=torch.float64)
    assert float(nested_loss(errors, (0.25, 0.75), n_values=4)) == 0.25 * 2 + 0.75 * 1


def test_aux_loss_by_hand() -> None:
    """Two rows, three dead latents, the two strongest of each row explain the residual."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    W_enc = torch.tensor([[1.0, 1.0], [2.0, -1.0], [0.5, 0.25]])
    b_enc = torch.tensor([0.0, 0.0, 0.5])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    residual = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    # z: row 0 relu(1, 2, 1) keeps one of the ones and 2; make it unique
    b_enc[2] = 0.25  # row 0: (1, 2, 0.75) -> (1, 2, 0); row 1: (2, -2, 0.75) -> (2, 0, 0.75)
    # e_hat: row 0 (1, 2); row 1 2*(1, 0) + 0.75*(0.6, 0.8) = (2.45, 0.6)
    error = 0 + 0 + (3 - 2.45) ** 2 + (1 - 0.6) ** 2
    aux = aux_loss(x, residual, W_enc, b_enc, W_dec, aux_k=2, coefficient=0.5)
    assert float(aux) == pytest.approx(0.5 * 1.0 * error / 15, rel=1e-6)
    few = aux_loss(x, residual, W_enc, b_enc, W_dec, aux_k=4, coefficient=0.5)
    # all three: row 0 + 0.75*(0.6, 0.8): error 0.75^2
    assert float(few) == pytest.approx(0.5 * 0.75 * (error + 0.5625) / 15, rel=1e-6)


def test_aux_loss_of_no_residual_is_zero() -> None:
    case = problem(n_dead=3)
    p, d = case.parameters, case.dead
    aux = aux_loss(
        case.x, torch.zeros_like(case.y), p.W_enc[d], p.b_enc[d], p.W_dec[d], aux_k=4, coefficient=1.0
    )
    assert float(aux) == 0.0


@pytest.mark.parametrize("step", [DenseStep, SparseStep])
def test_dead_latents_alone_get_the_aux_gradient(step: AnyStep) -> None:
    case = problem(rows=20, n_dead=3, bias=-1.0)
    values, gradients = run(step, case)
    without = run(step, case._replace(dead=case.dead[:0]))[1]
    changed = (gradients["W_enc"] != without["W_enc"]).any(1).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(case.dead.tolist())
    assert len(changed) > 0
    assert float(values.aux_loss) > 0
    torch.testing.assert_close(gradients["b_dec"], without["b_dec"], rtol=0, atol=0)


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
def test_bfloat16_changes_the_selection_at_most(selection: str) -> None:
    """Kept values are float32's, and the gradients those of the entries that were kept."""
    case = problem(
        rows=64, d_in=96, d_out=8, prefix_ends=(100, 700), k=12, selection=selection, dtype=torch.float32
    )
    exact, _ = run(SparseStep, case)
    half = case._replace(objective=replace(case.objective, precision="bfloat16"))
    values, gradients = run(SparseStep, half)
    rows, latents, kept, _ = values.entries
    pre = case.x @ case.parameters.W_enc.T + case.parameters.b_enc
    torch.testing.assert_close(kept, pre[rows, latents], rtol=1e-5, atol=1e-5)
    both = set(zip(*(part.tolist() for part in values.entries[:2]), strict=True))
    expected = set(zip(*(part.tolist() for part in exact.entries[:2]), strict=True))
    assert len(both & expected) > 0.98 * len(expected)
    if selection == "batch_topk":  # candidates are many more than are kept, so here nothing differs at all
        assert both == expected
        _, dense = run(DenseStep, case)
        assert relative(gradients["W_enc"], dense["W_enc"]) < 1e-5


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
def test_matrix_products_in_bfloat16_round_their_inputs_only(selection: str) -> None:
    """Relative error of bfloat16: 2^-9. Latents near the cut differ, so gradients are compared by norm."""
    case = problem(
        rows=64, d_in=96, d_out=80, prefix_ends=(100, 700), k=12, n_dead=40, aux_k=9, skip=True,
        selection=selection, dtype=torch.float32,
    )  # fmt: skip
    exact, expected = run(DenseStep, case)
    half = case._replace(objective=replace(case.objective, precision="bfloat16"))
    values, gradients = run(MatrixStep, half)
    assert float(values.loss) == pytest.approx(float(exact.loss), rel=1e-3)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    for name, gradient in expected.items():
        assert relative(gradients[name], gradient) < 0.1, name  # 2 % of the entries are others
    assert values.entries.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1.0,)),
        (2, (1.1 / 2.4, 1.3 / 2.4)),
        (3, (1.1 / 3.4, 1 / 3.4, 1.3 / 3.4)),
        (4, (0.25, 1 / 4.4, 1 / 4.4, 1.3 / 4.4)),
    ],
)
def test_weights_of_the_prefixes(n: int, expected: tuple[float, ...]) -> None:
    assert prefix_weights(n) == pytest.approx(expected)
    assert sum(prefix_weights(n)) == pytest.approx(1.0)


def test_dead_latents_biases_are_pulled_up_and_no_others() -> None:
    pull = revival(torch.tensor([1, 4]), d_sae=6, d_out=10)
    assert pull.tolist() == pytest.approx([0, -REVIVAL / 10, 0, 0, -REVIVAL / 10, 0])
    case = problem()
    with torch.no_grad():
        _, plain = SparseStep(case.objective)(case.parameters, case.x, case.y, case.dead, case.objective.k)
        before, after = plain.whole(), plain.plus(torch.arange(11.0).double()).whole()
    torch.testing.assert_close(after["b_enc"], before["b_enc"] + torch.arange(11.0).double())
    assert all(torch.equal(after[name], before[name]) for name in before if name != "b_enc")
