"""Where each latent fires: its strongest rows, an even sample of its firings, and their surroundings.

Shapes: F latents, C kept entries per latent, E entries of a block, S chosen samples, T tokens of a context.
Two passes: the first finds the rows, the second fills in what the latent does on the tokens around them.
Memory depends on F and C only. A row's place is context * T + position.
"""

from dataclasses import dataclass

import numpy as np

N_TOP = 32
"""Strongest rows kept per latent; several can share a context, of which one is shown."""
N_EVEN = 256
"""Even sample per latent: all of its firings when there are no more."""
SHOWN_TOP, SHOWN_EVEN = 10, 8
REACH = 16
"""Tokens shown either side of a sample."""
BUFFER = 1 << 20
"""Entries collected before they are merged: about 0.3 s of sorting against hundreds of blocks."""


class Best:
    """For each latent the `capacity` entries of highest rank (uint32) seen so far."""

    def __init__(self, n_latents: int, capacity: int) -> None:
        self.capacity = capacity
        self.n_latents = n_latents
        self.ranks = np.zeros(0, np.uint32)
        self.latents = np.zeros(0, np.int32)
        self.places = np.zeros(0, np.int64)
        self.values = np.zeros(0, np.float32)
        self.tokens = np.zeros(0, np.int32)
        self._floor = np.zeros(n_latents, np.int64)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._n_waiting = 0

    def add(
        self,
        latents: np.ndarray,
        ranks: np.ndarray,
        places: np.ndarray,
        values: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        """Entries of a block, [E] each. What cannot enter any more is dropped at once."""
        good = ranks >= self._floor[latents]
        kept = (ranks[good], latents[good].astype(np.int32), places[good], values[good], tokens[good])
        self._waiting.append(kept)
        self._n_waiting += len(kept[0])
        if self._n_waiting > BUFFER:
            self._merge()

    def finish(self) -> None:
        """After it the arrays hold the result, sorted by latent, then rank, highest first."""
        self._merge()

    def _merge(self) -> None:
        state = (self.ranks, self.latents, self.places, self.values, self.tokens)
        columns = [np.concatenate(parts) for parts in zip(state, *self._waiting, strict=True)]
        ranks, latents = columns[0].astype(np.int64), columns[1].astype(np.int64)
        order = np.lexsort((columns[2], (latents << 32) | (0xFFFFFFFF - ranks)))
        latents = latents[order]
        first = np.searchsorted(latents, np.arange(self.n_latents + 1))
        nth = np.arange(len(latents)) - first[latents]
        order = order[nth < self.capacity]
        self.ranks, self.latents, self.places, self.values, self.tokens = (
            column[order] for column in columns
        )
        full = np.flatnonzero(np.diff(self.bounds()) == self.capacity)
        self._floor[full] = self.ranks[self.bounds()[full + 1] - 1]
        self._waiting, self._n_waiting = [], 0

    def bounds(self) -> np.ndarray:
        """[F + 1] int64: entries of latent f are [bounds[f], bounds[f + 1])."""
        return np.searchsorted(self.latents, np.arange(self.n_latents + 1))


def strength(values: np.ndarray) -> np.ndarray:
    """[E] uint32 rank of positive float32 `values`: their bits have their order."""
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def lottery(rows: np.ndarray) -> np.ndarray:
    """[E] uint32 rank that is an arbitrary but fixed function of the row: splitmix64's upper half.

    The highest ranks are an even sample, the same on every machine and for any blocks.
    """
    x = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class Samples:
    """Chosen rows, sorted by latent; in each latent the strongest first, then the even sample."""

    latents: np.ndarray
    """[S] int32."""
    places: np.ndarray
    """[S] int64."""
    values: np.ndarray
    """[S] float32 activation on the row itself."""
    quantiles: np.ndarray
    """[S] float32 share of the latent's firings that are weaker; NaN for the strongest ones."""
    shades: np.ndarray
    """[S, 2 REACH + 1] float16 activation on the tokens around, 0 where it does not fire."""


def choose(top: Best, even: Best, context_length: int) -> Samples:
    """The `SHOWN_TOP` strongest rows in distinct contexts, and `SHOWN_EVEN` at evenly spaced quantiles."""
    strongest = _distinct_contexts(top, context_length, SHOWN_TOP)
    spread, quantiles = _evenly_spaced(even, SHOWN_EVEN)
    latents = np.concatenate([top.latents[strongest], even.latents[spread]])
    order = np.argsort(latents, kind="stable")

    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(top, name)[strongest], getattr(even, name)[spread]])[order]

    quantile = np.concatenate([np.full(len(strongest), np.nan), quantiles])[order].astype(np.float32)
    shades = np.zeros((len(latents), 2 * REACH + 1), np.float16)
    return Samples(latents[order], both("places"), both("values"), quantile, shades)


def _distinct_contexts(best: Best, context_length: int, n: int) -> np.ndarray:
    """Indices of each latent's first `n` entries that are the first of their context."""
    contexts = best.places // context_length
    _, first = np.unique(np.stack([best.latents, contexts]), axis=1, return_index=True)
    first = np.sort(first)
    latents = best.latents[first]
    nth = np.arange(len(first)) - np.searchsorted(latents, latents)
    return first[nth < n]


def _evenly_spaced(even: Best, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, quantiles) of up to `n` entries of each latent at evenly spaced ranks, strongest first."""
    order = np.lexsort((even.places, -even.values, even.latents))
    bounds = even.bounds()
    counts = np.diff(bounds)
    shown = np.minimum(counts, n)
    latent = np.repeat(np.arange(even.n_latents), shown)
    nth = np.arange(len(latent)) - np.repeat(np.cumsum(shown) - shown, shown)
    rank = ((2 * nth + 1) * counts[latent]) // (2 * shown[latent])
    quantiles = 1 - (rank + 0.5) / counts[latent]
    return order[bounds[latent] + rank], quantiles


class Shader:
    """The second pass: writes activations around the samples into `samples.shades`."""

    def __init__(self, samples: Samples, n_contexts: int, context_length: int) -> None:
        self.samples, self.context_length, self.n_contexts = samples, context_length, n_contexts
        keys = samples.latents * np.int64(n_contexts) + samples.places // context_length
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._most = int(np.unique(keys, return_counts=True)[1].max(initial=0))

    def add(self, latents: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
        """Entries of a block, [E] each."""
        keys = latents * np.int64(self.n_contexts) + places // self.context_length
        first = np.searchsorted(self._keys, keys)
        for nth in range(self._most):  # samples of one latent in one context: one, rarely a few
            at = first + nth
            found = np.flatnonzero(
                (at < len(self._keys)) & (self._keys[np.minimum(at, len(self._keys) - 1)] == keys)
            )
            sample = self._order[at[found]]
            offset = places[found] - self.samples.places[sample] + REACH
            near = (offset >= 0) & (offset <= 2 * REACH)
            self.samples.shades[sample[near], offset[near]] = values[found[near]]


@dataclass(frozen=True)
class TokenWeights:
    """Each distinct (latent, token) of an even sample, sorted by latent, heaviest token first."""

    latents: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    """Firings of the latent on the token."""
    shares: np.ndarray
    """Share of the latent's summed activation."""


def token_weights(even: Best) -> TokenWeights:
    """How the firings and the activation of each latent are shared among tokens."""
    order = np.lexsort((even.tokens, even.latents))
    latents, tokens = even.latents[order], even.tokens[order]
    new = np.ones(len(order), bool)
    new[1:] = (latents[1:] != latents[:-1]) | (tokens[1:] != tokens[:-1])
    starts = np.flatnonzero(new)
    of = latents[starts]
    counts = np.diff(np.append(starts, len(order)))
    weights = np.zeros(len(starts))
    if len(starts):
        weights = np.add.reduceat(even.values[order].astype(np.float64), starts)
    shares = weights / np.bincount(of, weights=weights, minlength=even.n_latents)[of]
    heavy = np.lexsort((-shares, of))
    return TokenWeights(of[heavy], tokens[starts][heavy], counts[heavy], shares[heavy])


def token_entropy(weights: TokenWeights, n_latents: int) -> np.ndarray:
    """[F] bits: -sum over tokens of p log2 p, p the share of the sampled firings that are on that token.

    NaN for a latent without firings. The sample is the same size for all frequent latents, so that theirs
    compare; a latent with m < N_EVEN firings cannot exceed log2 m.
    """
    total = np.bincount(weights.latents, weights=weights.counts, minlength=n_latents)
    p = weights.counts / total[weights.latents]
    entropy = np.bincount(weights.latents, weights=-p * np.log2(p), minlength=n_latents)
    return np.where(total > 0, np.maximum(entropy, 0.0), np.nan)


def top_tokens(weights: TokenWeights, n_latents: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [F, n], -1 where there are fewer; their shares of the latent's activation [F, n])."""
    nth = np.arange(len(weights.latents)) - np.searchsorted(weights.latents, weights.latents)
    kept = nth < n
    tokens, shares = np.full((n_latents, n), -1, np.int32), np.zeros((n_latents, n), np.float32)
    tokens[weights.latents[kept], nth[kept]] = weights.tokens[kept]
    shares[weights.latents[kept], nth[kept]] = weights.shares[kept]
    return tokens, shares
