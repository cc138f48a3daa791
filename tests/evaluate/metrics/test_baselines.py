import numpy as np
import pytest
import torch

from evaluate.metrics import baselines
from evaluate.metrics.baselines import Baselines, fit_ridge
from tests.evaluate.fakes import Rows


def linear_rows(n: int, noise: float, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 4, generator=torch.Generator().manual_seed(99))
    x = torch.randn(n, 5, generator=draw) * torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0]) + 4
    return Rows(x, x @ mixing + 7 + noise * torch.randn(n, 4, generator=draw))


def test_an_exactly_linear_map_is_found() -> None:
    linear = fit_ridge(linear_rows(3000, 0.0))
    fresh = linear_rows(500, 0.0, seed=1)
    baselines = Baselines(linear)
    baselines.add(fresh.inputs, fresh.outputs)
    deviation = float((fresh.outputs.double() - fresh.outputs.double().mean(0)).square().sum())
    result = baselines.result(deviation)
    assert result.linear.fvu < 1e-9
    assert result.mean.fvu == pytest.approx(1.0, abs=0.02)
    assert result.linear.fit_rows == 2400


def test_equals_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PENALTIES", (0.3,))
    rows = linear_rows(50, 1.0)
    linear = fit_ridge(rows)
    x, y = rows.inputs[:40].double().numpy(), rows.outputs[:40].double().numpy()
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.solve(x.T @ x + 0.3 * np.trace(x.T @ x) / 5 * np.eye(5), x.T @ y)
    assert linear.W.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_penalty_is_chosen_on_rows_that_were_not_fitted() -> None:
    noise = Rows(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(60, 4))
    noise.outputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    assert fit_ridge(noise).penalty == max(baselines.PENALTIES)
    assert fit_ridge(linear_rows(3000, 0.0)).penalty == min(baselines.PENALTIES)


def test_constant_inputs_and_one_row_give_the_mean() -> None:
    constant = Rows(torch.ones(30, 5), torch.randn(30, 4, generator=torch.Generator().manual_seed(2)))
    linear = fit_ridge(constant)
    assert torch.allclose(linear(constant.inputs), constant.outputs[:24].mean(0).expand(30, -1), atol=1e-6)
    one = Rows(torch.ones(1, 5), torch.full((1, 4), 3.0))
    assert torch.allclose(fit_ridge(one)(one.inputs), one.outputs)
