"""Best rows, even samples, shading and token statistics against brute force on dense activations."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.metrics import contexts
from evaluate.metrics.contexts import (
    Best,
    Shader,
    choose,
    lottery,
    on_device,
    strength,
    token_entropy,
    token_weights,
    top_tokens,
)
from transcoder.entries import Entries, entries_above

F, T, CONTEXTS = 7, 20, 15


def dense(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(acts [CONTEXTS * T, F], tokens): latent 0 is dead, 1 fires once, the last always."""
    rng = np.random.default_rng(seed)
    acts = np.maximum(rng.standard_normal((CONTEXTS * T, F)), 0).astype(np.float32)
    acts[:, 0] = 0
    acts[:, 1] = 0
    acts[33, 1] = 2.5
    acts[:, -1] = 1 + rng.random(CONTEXTS * T)
    return acts, rng.integers(0, 9, CONTEXTS * T).astype(np.int32)


def block(acts: np.ndarray, *of_rows: np.ndarray) -> tuple[Entries, Tensor]:
    """The entries of dense activations, and what is known of their rows, as a pass has them."""
    return entries_above(torch.from_numpy(acts), 0.0), on_device(torch.device("cpu"), *of_rows)


def collect(
    best: Best, acts: np.ndarray, tokens: np.ndarray, by_value: bool, order: np.ndarray, step: int
) -> Best:
    for start in range(0, len(order), step):
        place = order[start : start + step]
        entries, (drawn, places, token) = block(
            acts[place], lottery(np.arange(start, start + len(place))), place, tokens[place]
        )
        best.add(entries, strength(entries.values) if by_value else drawn[entries.rows], places, token)
    best.finish()
    return best


@pytest.mark.parametrize("buffer", [1, 50, 10**6])
@pytest.mark.parametrize("step", [13, 300])
def test_best_equals_a_full_sort(buffer: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BUFFER", buffer)
    acts, tokens = dense(0)
    order = np.random.default_rng(5).permutation(len(acts))
    best = collect(Best(F, 6), acts, tokens, True, order, step)
    for f in range(F):
        own = slice(*best.bounds()[f : f + 2])
        expected = sorted(np.flatnonzero(acts[:, f]), key=lambda place: -acts[place, f])[:6]
        assert best.places[own].tolist() == expected
        assert best.values[own].tolist() == acts[expected, f].tolist()
        assert best.tokens[own].tolist() == tokens[expected].tolist()


def test_the_even_sample_does_not_depend_on_blocks_and_is_even() -> None:
    acts, tokens = dense(1)
    order = np.arange(len(acts))
    small = collect(Best(F, 40), acts, tokens, False, order, 7)
    large = collect(Best(F, 40), acts, tokens, False, order, 300)
    assert np.array_equal(small.places, large.places)
    ranks = lottery(np.arange(20_000)) / 2**32
    counts, _ = np.histogram(ranks, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 0.03


def test_strength_keeps_the_order_of_floats() -> None:
    values = torch.tensor([1e-40, 1e-30, 0.5, 1.0, 1.0000001, 3e38])
    assert (strength(values).diff() > 0).all()


@pytest.fixture(scope="module")
def sampled() -> tuple[np.ndarray, np.ndarray, Best, contexts.Samples]:
    acts, tokens = dense(2)
    order = np.random.default_rng(6).permutation(len(acts))
    top = collect(Best(F, 32), acts, tokens, True, order, 50)
    even = collect(Best(F, 64), acts, tokens, False, order, 50)
    samples = choose(top, even, T)
    shader = Shader(samples, CONTEXTS, T)
    for place in np.array_split(order, 4):
        entries, (places,) = block(acts[place], place)
        shader.add(entries, places)
    return acts, tokens, even, samples


def test_strongest_samples_are_in_distinct_contexts(sampled) -> None:
    acts, _, _, samples = sampled
    for f in range(F):
        strongest = (samples.latents == f) & np.isnan(samples.quantiles)
        best = acts[:, f].reshape(CONTEXTS, T)
        expected = np.sort(best.max(1)[best.max(1) > 0])[::-1][: contexts.SHOWN_TOP]
        assert samples.values[strongest].tolist() == expected.tolist()
        assert len(set((samples.places[strongest] // T).tolist())) == strongest.sum()


def test_even_samples_run_through_the_quantiles(sampled) -> None:
    acts, _, _, samples = sampled
    assert (samples.latents == 0).sum() == 0
    assert samples.values[samples.latents == 1].tolist() == [2.5, 2.5]
    own = (samples.latents == F - 1) & ~np.isnan(samples.quantiles)
    assert own.sum() == contexts.SHOWN_EVEN
    assert (np.diff(samples.values[own]) < 0).all()
    true_quantile = (acts[:, -1][None] < samples.values[own][:, None]).mean(1)
    assert np.abs(true_quantile - samples.quantiles[own]).max() < 0.15


def test_shades_are_the_activations_around(sampled) -> None:
    acts, _, _, samples = sampled
    assert len(samples.latents) > 40
    for latent, place, shade in zip(samples.latents, samples.places, samples.shades, strict=True):
        for offset in range(-contexts.REACH, contexts.REACH + 1):
            inside = 0 <= place % T + offset < T
            expected = acts[place + offset, latent] if inside else 0.0
            assert shade[offset + contexts.REACH] == np.float16(expected)


def test_token_statistics_equal_brute_force(sampled) -> None:
    acts, tokens, _, _ = sampled
    order = np.arange(len(acts))
    weights = token_weights(collect(Best(F, 1000), acts, tokens, False, order, 40))
    entropy, (top, shares) = token_entropy(weights, F), top_tokens(weights, F, 3)
    assert np.isnan(entropy[0])
    assert top[0].tolist() == [-1, -1, -1]
    assert entropy[1] == 0.0
    assert shares[1].tolist() == [1.0, 0.0, 0.0]
    assert top[1].tolist() == [tokens[33], -1, -1]
    for f in range(2, F):
        fired = np.flatnonzero(acts[:, f])
        p = np.array(list(Counter(tokens[fired].tolist()).values())) / len(fired)
        assert entropy[f] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-12)
        activation = np.bincount(tokens[fired], weights=acts[fired, f].astype(float), minlength=9)
        heaviest = np.argsort(-activation, kind="stable")[:3]
        assert top[f].tolist() == heaviest.tolist()
        assert shares[f] == pytest.approx(activation[heaviest] / activation.sum())


def test_latents_that_never_fire_have_no_samples_and_no_tokens() -> None:
    best = Best(3, 4)
    best.finish()
    samples = choose(best, best, T)
    assert len(samples.latents) == 0
    Shader(samples, 5, T).add(entries_above(torch.ones(1, 2), 0.0), torch.tensor([7]))
    assert np.isnan(token_entropy(token_weights(best), 3)).all()
    assert (top_tokens(token_weights(best), 3, 2)[0] == -1).all()
