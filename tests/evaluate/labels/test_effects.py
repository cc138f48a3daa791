"""Effects on the logits of a language model that is a matrix: closed forms, and how often chance is taken for more."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.labels.effects import (
    HISTOGRAM_BINS,
    N_RANDOM,
    LogitEffects,
    effect_metrics,
    logit_effects,
    tokens_in,
)

D, V, LONG, WANTED = 24, 400, 3, 7


@pytest.fixture(scope="module")
def unembedding() -> Tensor:
    rows = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    rows[LONG] *= 8  # a piece of words that was hardly ever read
    return rows + 2  # all share a direction, which the softmax does not see


@pytest.fixture(scope="module")
def model(unembedding: Tensor) -> Any:
    bias = torch.linspace(-3, 3, V)
    bridge = SimpleNamespace(
        unembed=lambda x: x @ unembedding.T + bias,
        ln_final=lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt(),
    )
    return SimpleNamespace(bridge=bridge, dtype=torch.float32, device=torch.device("cpu"))


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def rows(unembedding: Tensor) -> Tensor:
    planted = unit(unembedding[WANTED : WANTED + 1] - unembedding.mean(0))
    return torch.cat(
        [planted, -planted, unit(torch.randn(300, D, generator=torch.Generator().manual_seed(2)))]
    )


@pytest.fixture(scope="module")
def effects(model: Any, rows: Tensor) -> LogitEffects:
    return logit_effects(model, rows)


def test_values_are_logits_less_their_mean(effects: LogitEffects, unembedding: Tensor, rows: Tensor) -> None:
    logits = rows @ unembedding.T * D**0.5
    expected = logits - logits.mean(1, keepdim=True)
    for tokens, values in (
        (effects.promoted, effects.promoted_by),
        (effects.suppressed, effects.suppressed_by),
    ):
        found = expected.gather(1, torch.from_numpy(tokens).long())
        torch.testing.assert_close(torch.from_numpy(values), found, rtol=1e-3, atol=1e-3)
    assert effects.promoted[0, 0] == effects.suppressed[1, 0] == WANTED


def test_a_long_row_does_not_win(effects: LogitEffects, unembedding: Tensor, rows: Tensor) -> None:
    logits = rows @ unembedding.T
    plain = (logits - logits.mean(1, keepdim=True)).topk(1).indices
    assert (plain == LONG).float().mean() > 0.2
    assert (effects.promoted[:, 0] == LONG).mean() < 0.03


def test_histograms_hold_every_token_between_the_extremes(
    effects: LogitEffects, unembedding: Tensor, rows: Tensor
) -> None:
    logits = (rows @ unembedding.T * D**0.5).numpy()
    centred = logits - logits.mean(1, keepdims=True)
    assert effects.histogram.sum(1).tolist() == [V] * len(rows)
    assert effects.edges[:, 0] == pytest.approx(centred.min(1), rel=1e-3, abs=1e-3)
    assert effects.edges[:, 1] == pytest.approx(centred.max(1), rel=1e-3, abs=1e-3)
    expected, _ = np.histogram(centred[5], HISTOGRAM_BINS, effects.edges[5])
    assert np.abs(effects.histogram[5] - expected).sum() <= 2  # on an edge


def test_chance_is_rarely_taken_for_more(effects: LogitEffects) -> None:
    assert not effects.like_random[:2].any()
    assert effects.like_random[2:].mean() > 0.95
    assert effects.chance is not None
    assert effects.chance.false_positives <= 0.01 + 3 * (0.01 / N_RANDOM) ** 0.5 + 0.01


def test_tokens_that_are_not_in_the_text_are_left_out(model: Any, rows: Tensor) -> None:
    seen = tokens_in(np.array([[0, 1, 2], [30, 31, 390]]), V)
    effects = logit_effects(model, rows[:4], seen)
    assert effects.left_out == V - 6
    assert set(effects.promoted.ravel().tolist()) == {0, 1, 2, 30, 31, 390}
    assert effects.histogram.sum(1).tolist() == [6] * 4
    metrics = effect_metrics(effects, np.ones(4), tokens_in(np.array([[0, 1, 2]]), V))
    assert metrics is not None
    assert metrics.promoted_in_text == 0.5
    assert metrics.left_out == V - 6


def test_without_a_language_model_there_is_nothing() -> None:
    nothing = LogitEffects.none(3)
    assert effect_metrics(nothing, np.ones(3), np.ones(5, bool)) is None
    assert nothing.like_random.tolist() == [False] * 3
