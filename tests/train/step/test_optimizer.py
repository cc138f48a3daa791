"""Adam in blocks against torch.optim.AdamW, and the decoder's unit norm."""

from typing import Any

import pytest
import torch

from tests.train.steps import Problem, problem
from train.step import sparse
from train.step.dense import DenseStep
from train.step.gradients import Gradients
from train.step.losses import revival
from train.step.matrix import MatrixStep
from train.step.optimizer import BETAS, DECAY, Adam, apply, clip_divisor, group_rates
from train.step.sparse import SparseStep


def gradients_of(case: Problem, step: Any = SparseStep) -> Gradients:
    with torch.no_grad():
        return step(case.objective)(case.parameters, case.x, case.y, case.dead, case.objective.k)[1]


def reference(
    case: Problem, lr: float, steps: int, clip_norm: float | None = None
) -> dict[str, torch.Tensor]:
    """The same steps with whole gradients, torch.optim.AdamW by group, and the constraint written plainly."""
    named = {name: tensor.clone() for name, tensor in case.parameters.named().items()}
    factors = {"b_enc": 5**0.5 / 2, "W_dec": 2.0}  # 5 inputs
    ends = case.objective.prefix_ends
    groups = list(zip((0, *ends[:-1]), ends, group_rates(ends), strict=True))
    parts, grads = [], []  # a parameter of its own for each group of each tensor
    for name, tensor in named.items():
        shared = name in ("b_dec", "W_skip")
        for start, end, rate in [(0, len(tensor), 1.0)] if shared else groups:
            decay = DECAY / rate if name == "W_enc" else 0.0
            part = tensor[start:end]
            grads.append((part, name, start, end))
            parts.append({"params": [part], "lr": lr * factors.get(name, 1.0) * rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(parts, betas=BETAS)
    for _ in range(steps):
        parameters = case.parameters.__class__(**named)
        gradients = gradients_of(case._replace(parameters=parameters)).whole()
        W = named["W_dec"]
        gradients["W_dec"] -= (gradients["W_dec"] * W).sum(1, keepdim=True) * W
        for part, name, start, end in grads:
            part.grad = gradients[name][start:end]
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([part for part, *_ in grads], clip_norm)
        optimizer.step()
        W /= W.norm(dim=1, keepdim=True)
    return named


@pytest.mark.parametrize("step", [SparseStep, DenseStep, MatrixStep])
@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_steps_equal_torch_adamw_by_group_with_the_constraint(
    clip_norm: float | None, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "LATENTS", 4)  # 11 latents: two whole blocks and a rest
    case = problem(rows=20, n_dead=3, skip=True)
    expected = reference(case, 1e-2, 5, clip_norm)
    adam = Adam(case.parameters, case.objective.prefix_ends)
    for _ in range(5):
        with torch.no_grad():
            apply(adam, gradients_of(case, step), 1e-2, clip_norm)
    for name, tensor in case.parameters.named().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_decoder_rows_keep_unit_norm_whatever_the_rate() -> None:
    case = problem(rows=20)
    adam = Adam(case.parameters)
    for _ in range(10):
        with torch.no_grad():
            apply(adam, gradients_of(case), 0.5)
    norms = case.parameters.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_clip_divisor_by_hand() -> None:
    case = problem(rows=20)
    whole = gradients_of(case).whole()
    W = case.parameters.W_dec
    whole["W_dec"] -= (whole["W_dec"] * W).sum(1, keepdim=True) * W
    norm = float(sum(g.square().sum() for g in whole.values()) ** 0.5)
    assert clip_divisor(gradients_of(case), norm / 4).tolist() == pytest.approx([4.0])
    assert clip_divisor(gradients_of(case), norm * 4).tolist() == [1.0]


def test_group_rates_by_hand() -> None:
    assert group_rates((1, 16, 256)) == pytest.approx([4.0, 2.0, 1.0])
    assert group_rates((7,)) == [1.0]


@pytest.mark.parametrize("step", [SparseStep, DenseStep, MatrixStep])
def test_a_clip_that_clips_nothing_changes_nothing(step: Any) -> None:
    """The blocks are computed twice then, and what is added to one must not be found in the other."""
    ends = []
    for clip_norm in (None, 1e9):
        case = problem(rows=40, n_dead=8, skip=True)
        adam, lift = Adam(case.parameters, case.objective.prefix_ends), revival(case.dead, 11, 3) * 1000
        with torch.no_grad():
            apply(adam, gradients_of(case, step).plus(lift), 1e-2, clip_norm)
        ends.append(case.parameters.named())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-12, atol=1e-14, msg=name)
