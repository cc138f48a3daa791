"""Adam in blocks against torch.optim, and the decoder's unit norm."""

import pytest
import torch

from tests.train.steps import Problem, problem
from train.step import sparse
from train.step.gradients import Gradients
from train.step.optimizer import BETAS, Adam, apply, clip_scale
from train.step.sparse import SparseStep


def gradients_of(made: Problem) -> Gradients:
    with torch.no_grad():
        return SparseStep(made.objective)(made.parameters, made.x, made.y, made.dead)[1]


def reference(
    made: Problem, lr: float, steps: int, clip_norm: float | None = None
) -> dict[str, torch.Tensor]:
    """The same steps with whole gradients, torch.optim.Adam, and the constraint written plainly."""
    named = {name: tensor.clone() for name, tensor in made.parameters.named().items()}
    factors = {"b_enc": 5**0.5 / 2, "W_dec": 2.0}  # 5 inputs
    parts = [{"params": [tensor], "lr": lr * factors.get(name, 1.0)} for name, tensor in named.items()]
    optimizer = torch.optim.Adam(parts, betas=BETAS)
    for _ in range(steps):
        parameters = made.parameters.__class__(**named)
        gradients = gradients_of(made._replace(parameters=parameters)).whole()
        W = named["W_dec"]
        gradients["W_dec"] -= (gradients["W_dec"] * W).sum(1, keepdim=True) * W
        for name, tensor in named.items():
            tensor.grad = gradients[name]
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), clip_norm)
        optimizer.step()
        W /= W.norm(dim=1, keepdim=True)
    return named


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_steps_equal_torch_adam_with_the_constraint(
    clip_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "LATENTS", 4)  # 11 latents: two whole blocks and a rest
    made = problem(rows=20, n_dead=3, skip=True)
    expected = reference(made, 1e-2, 5, clip_norm)
    adam = Adam(made.parameters)
    for _ in range(5):
        with torch.no_grad():
            apply(adam, gradients_of(made), 1e-2, clip_norm)
    for name, tensor in made.parameters.named().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_decoder_rows_keep_unit_norm_whatever_the_rate() -> None:
    made = problem(rows=20)
    adam = Adam(made.parameters)
    for _ in range(10):
        with torch.no_grad():
            apply(adam, gradients_of(made), 0.5)
    norms = made.parameters.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_clip_scale_by_hand() -> None:
    made = problem(rows=20)
    whole = gradients_of(made).whole()
    W = made.parameters.W_dec
    whole["W_dec"] -= (whole["W_dec"] * W).sum(1, keepdim=True) * W
    norm = float(sum(g.square().sum() for g in whole.values()) ** 0.5)
    assert clip_scale(made.parameters, gradients_of(made), norm / 4) == pytest.approx(0.25)
    assert clip_scale(made.parameters, gradients_of(made), norm * 4) == 1.0
