"""The streaming pass against a dense, whole-array computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluate.metrics import rows as rows_of
from evaluate.metrics.measure import measure, training_selection
from tests.evaluate.fakes import Rows, random_coder, random_rows
from transcoder import Transcoder


def dense(coder: Transcoder, rows: Rows, g: int) -> tuple[np.ndarray, np.ndarray]:
    """(acts [N, P_g], y_hat [N, D_out]) of prefix g in float64."""
    end, threshold = coder.prefix_ends[g], coder.thresholds[g]
    pre = rows.inputs.double() @ coder.W_enc.double().T + coder.b_enc.double()
    acts = torch.where((pre > threshold) & (pre > 0), pre, 0.0)[:, :end]
    y_hat = acts @ coder.W_dec[:end].double() + coder.b_dec.double()
    if coder.W_skip is not None:
        y_hat = y_hat + rows.inputs.double() @ coder.W_skip.double().T
    return acts.numpy(), y_hat.numpy()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("per_latent", [False, True])
def test_equals_the_dense_computation(skip: bool, per_latent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of, "BLOCK_ROWS", 7)
    coder = random_coder(5, 6, ends=(3, 8, 20), skip=skip, per_latent=per_latent)
    rows = random_rows(31, 5, 6)
    seen: list[int] = []
    measured = measure(coder, rows, n_rows=31, select=None, tick=seen.append)
    assert sum(seen) == 31
    assert max(seen) == 7
    y = rows.outputs.double().numpy()
    for g, prefix in enumerate(measured.result()):
        acts, y_hat = dense(coder, rows, g)
        assert prefix.end == coder.prefix_ends[g]
        assert prefix.fvu == pytest.approx(((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5)
        assert prefix.mae == pytest.approx(np.abs(y - y_hat).mean(), rel=1e-5)
        assert prefix.l0 == pytest.approx((acts > 0).sum(1).mean())
        assert prefix.l1 == pytest.approx(acts.sum(1).mean(), rel=1e-5)
        assert prefix.dead_fraction == pytest.approx((acts.max(0) == 0).mean())
        frequent = ((acts > 0).mean(0) > 0.1).mean()
        assert prefix.over_10_percent_fraction == pytest.approx(frequent)
        assert prefix.over_10_percent_verdict == ("poor" if frequent > 0.05 else "moderate")
        assert prefix.training_selection is None
    acts, _ = dense(coder, rows, 2)
    assert measured.prefixes[-1].firing.result().largest_activation == pytest.approx(acts.max(), rel=1e-6)


def test_only_the_asked_rows_are_read() -> None:
    coder, rows = random_coder(5, 6, ends=(4,)), random_rows(40, 5, 6)
    few = measure(coder, rows, n_rows=11, select=None, tick=lambda _: None)
    cut = Rows(rows.inputs[:11], rows.outputs[:11])
    assert few.result() == measure(coder, cut, n_rows=11, select=None, tick=lambda _: None).result()
    assert few.deviation.rows == 11


def test_training_selection_keeps_k_per_row_on_average() -> None:
    coder, rows = random_coder(5, 6, ends=(10, 30)), random_rows(64, 5, 6)
    result = measure(
        coder, rows, n_rows=64, select=training_selection("batch_topk", 4), tick=lambda _: None
    ).result()
    coarse, full = (prefix.training_selection for prefix in result)
    assert coarse
    assert full
    assert 0 < coarse.l0 < full.l0 == 4.0


def test_per_row_selection_keeps_k_in_every_row() -> None:
    pre = torch.randn(9, 14, generator=torch.Generator().manual_seed(3)) + 5
    assert training_selection("topk", 3)(pre).l0().tolist() == [3] * 9
    assert len(training_selection("batch_topk", 3)(pre).values) == 27


def test_a_transcoder_that_never_fires_says_its_bias() -> None:
    coder, rows = random_coder(5, 6, ends=(4, 9)), random_rows(20, 5, 6)
    own = replace(coder.parameters, b_dec=rows.outputs.mean(0))
    coder = replace(coder, parameters=own, thresholds=torch.full((2,), 1e6))
    measured = measure(
        coder, rows, n_rows=20, select=training_selection("batch_topk", 2), tick=lambda _: None
    )
    assert measured.result()[1].fvu == pytest.approx(1.0, abs=1e-6)
    assert measured.result()[1].l0 == 0.0
    assert measured.prefixes[1].firing.result().dead == 9


def test_one_row_has_no_fvu() -> None:
    coder, rows = random_coder(5, 6, ends=(4,)), random_rows(1, 5, 6)
    result = measure(coder, rows, n_rows=1, select=None, tick=lambda _: None).result()
    assert result[0].fvu is None
