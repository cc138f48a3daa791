"""Where each latent fires: its strongest rows, an even sample of its firings, and the tokens around both.

Shapes: F latents, C kept entries per latent, E entries of a block, S chosen samples, T tokens of a context.
Two passes: the first finds the rows, the second adds the latent's activation on the tokens around them.
Memory depends on F and C only. A row's place is context * T + position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from shards.order import GOLDEN, mix
from transcoder.entries import Entries, strongest

N_TOP = 32
"""Strongest rows kept per latent. The page shows one of each context."""
N_EVEN = 256
"""Rows of the even sample of a latent; all of its firings if there are fewer."""
N_LABEL = 384
"""Rows of the larger even sample that labels are chosen on, three quarters of it: 256 and some more."""
SHOWN_TOP, SHOWN_EVEN = 10, 8
REACH = 16
"""Tokens shown on either side of a sample."""
BUFFER = 1 << 20
"""Entries collected before a merge. Sorting so many takes about 0.3 s, once in hundreds of blocks."""
Columns = tuple[Tensor, ...]
"""Ranks, latents, places, values and tokens of entries, on one device."""


class Best:
    """The `capacity` entries of highest rank (below 2^32) of each latent so far. Of equal ranks the lower place counts.

    Row 0 stands at place 7, row 1 at place 8. Latent 0 fires on both, latent 1 on row 1:

    >>> best = Best(n_latents=2, capacity=1)
    >>> entries = Entries(*map(torch.tensor, ([0, 1, 1], [0, 0, 1], [0.5, 2.0, 1.0])), n_rows=2)
    >>> best.add(entries, strength(entries.values), places=torch.tensor([7, 8]), tokens=torch.tensor([3, 4]))
    >>> best.finish()
    >>> best.places.tolist(), best.values.tolist(), best.bounds().tolist()
    ([8, 8], [2.0, 1.0], [0, 1, 2])
    """

    ranks: np.ndarray
    """[m] uint32: this and the four below are there once it is finished, sorted by latent, then rank, highest first."""
    latents: np.ndarray
    """[m] int32."""
    places: np.ndarray
    """[m] int64."""
    values: np.ndarray
    """[m] float32."""
    tokens: np.ndarray
    """[m] int32."""

    def __init__(self, n_latents: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.n_latents = n_latents
        self._floor = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """[F] rank below which an entry is not kept."""
        self._kept = self._none()
        self._waiting: list[Columns] = []
        self._n_waiting = 0

    def _none(self) -> Columns:
        none = self._floor[:0]
        return none, none.int(), none, none.float(), none.int()

    def add(self, entries: Entries, ranks: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Add a block's entries, with `ranks` [E] int64, and `places`, `tokens` [B] int64 of its rows.

        Those below their latent's lowest kept rank are dropped at once.
        """
        high = (ranks >= self._floor[entries.latents]).nonzero().squeeze(1)  # sync: how many
        rows, latents, values, _ = entries.at(high)
        self._waiting.append((ranks[high], latents.int(), places[rows], values.float(), tokens[rows].int()))
        self._n_waiting += len(high)
        if self._n_waiting > BUFFER:
            self._merge()

    def finish(self) -> None:
        """Merge what is left, and copy the result to the host."""
        self._merge()
        ranks, self.latents, self.places, self.values, self.tokens = (
            column.cpu().numpy() for column in self._kept
        )
        self.ranks = ranks.astype(np.uint32)
        self._kept = tuple(column[:0] for column in self._kept)

    def merge(self, peers: Processes) -> None:
        """Keep the best of the entries of all processes.

        Those of some latents at a time: what is sent is in memory once for each process.
        """
        if peers.world == 1:
            return
        self._merge()
        step, found = max(1, BUFFER // self.capacity), [self._none()]
        for start in range(0, self.n_latents, step):
            ends = torch.tensor([start, start + step], dtype=torch.int32, device=self._floor.device)
            kept = self._kept[1]
            first, last = torch.searchsorted(kept, ends).tolist()
            sent = [peers.gathered(column[first:last].contiguous()) for column in self._kept]
            found.append(_strongest(sent, self.capacity))
        self._kept = tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _merge(self) -> None:
        columns = [torch.cat(parts) for parts in zip(self._kept, *self._waiting, strict=True)]
        self._kept = ranks, latents, *_ = _strongest(columns, self.capacity)
        self._waiting, self._n_waiting = [], 0
        if len(ranks):
            every = torch.arange(self.n_latents + 1, dtype=torch.int32, device=ranks.device)
            bounds = torch.searchsorted(latents, every)
            lowest = ranks[(bounds[1:] - 1).clamp_min(0)]  # the last entry of a latent has its lowest rank
            self._floor = torch.where(bounds.diff() == self.capacity, lowest, self._floor)

    def first(self, capacity: int) -> "Best":
        """Those `capacity` entries of highest rank of each latent, once this is finished."""
        fewer = Best(self.n_latents, capacity)
        kept = _nth_of_its_latent(self.latents) < capacity
        for name in ("ranks", "latents", "places", "values", "tokens"):
            setattr(fewer, name, getattr(self, name)[kept])
        return fewer

    def bounds(self) -> np.ndarray:
        """[F + 1] int64: entries of latent f are [bounds[f], bounds[f + 1])."""
        return np.searchsorted(self.latents, np.arange(self.n_latents + 1))


def _strongest(columns: Sequence[Tensor], capacity: int) -> Columns:
    """Of each latent the `capacity` entries of highest rank, sorted by latent, then rank; of equal ranks by place."""
    ranks, latents, places, *_ = columns
    by_place = places.sort(stable=True).indices
    order = by_place[strongest(latents[by_place], ranks[by_place], capacity)]
    return tuple(column[order] for column in columns)


def strength(values: Tensor) -> Tensor:
    """[E] int64 rank of positive `values`: the bits of their float32, which have the same order.

    >>> strength(torch.tensor([0.5, 1.0, 2.0])).tolist()
    [1056964608, 1065353216, 1073741824]
    """
    return values.float().contiguous().view(torch.int32).long()


def lottery(rows: np.ndarray) -> np.ndarray:
    """[B] uint32 rank of each row, an arbitrary but fixed function of it: the upper half of SplitMix64.

    The rows of highest rank are an even sample, the same on every machine and for any blocks.

    >>> lottery(np.array([0, 1, 2])).tolist()
    [3793791033, 2433363436, 2539140574]
    """
    return (mix(rows.astype(np.uint64) + GOLDEN) >> np.uint64(32)).astype(np.uint32)


def on_device(device: torch.device, *of_rows: np.ndarray) -> Tensor:
    """[n, B] int64: what is known on the host of a block's rows, in one copy for which the host does not wait."""
    return torch.from_numpy(np.stack(of_rows).astype(np.int64)).to(device, non_blocking=True)


@dataclass(frozen=True)
class Samples:
    """The rows to show, sorted by latent; of each latent the strongest first, then the even sample."""

    latents: np.ndarray
    """[S] int32."""
    places: np.ndarray
    """[S] int64."""
    values: np.ndarray
    """[S] float32 activation on the row."""
    quantiles: np.ndarray
    """[S] float32 share of the latent's firings that are weaker; NaN for the strongest rows."""
    shades: np.ndarray
    """[S, 2 REACH + 1] float16 activation on the tokens around the row, 0 where the latent does not fire."""

    def tensors(self, n_latents: int, context_length: int) -> dict[str, torch.Tensor]:
        """As contexts.safetensors keeps them, `docs/outputs.md`; the shades without their zeros."""
        context, position = np.divmod(self.places, context_length)
        sample, column = np.nonzero(self.shades)
        columns = {
            "bounds": np.searchsorted(self.latents, np.arange(n_latents + 1)),
            "context": context.astype(np.int32),
            "position": position.astype(np.int32),
            "activation": self.values,
            "quantile": self.quantiles,
            "around_bounds": np.searchsorted(sample, np.arange(len(self.places) + 1)),
            "around_offset": (column - REACH).astype(np.int8),
            "around_activation": self.shades[sample, column],
        }
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()}


def choose(top: Best, even: Best, context_length: int) -> Samples:
    """The `SHOWN_TOP` strongest rows in distinct contexts, and `SHOWN_EVEN` at evenly spaced quantiles."""
    peaks = _distinct_contexts(top, context_length, SHOWN_TOP)
    spread, quantiles = _evenly_spaced(even, SHOWN_EVEN)
    latents = np.concatenate([top.latents[peaks], even.latents[spread]])
    order = np.argsort(latents, kind="stable")  # stable: the strongest rows stay before the even sample

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(top, name)[peaks], getattr(even, name)[spread]])[order]

    quantile = np.concatenate([np.full(len(peaks), np.nan), quantiles])[order].astype(np.float32)
    shades = np.zeros((len(latents), 2 * REACH + 1), np.float16)
    return Samples(latents[order], column("places"), column("values"), quantile, shades)


def _nth_of_its_latent(latents: np.ndarray) -> np.ndarray:
    """[E] number of each entry among those of its latent, from 0; `latents` ascending.

    >>> _nth_of_its_latent(np.array([2, 2, 2, 5, 7, 7])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    return np.arange(len(latents)) - np.searchsorted(latents, latents)


def _distinct_contexts(best: Best, context_length: int, n: int) -> np.ndarray:
    """Indices of the first `n` entries of each latent, of each context the first only.

    Places 41, 43 and 12 are in contexts 4, 4 and 1 of ten tokens. Entry 1 is the second of context 4:

    >>> best = Best(1, 8)
    >>> entries = Entries(torch.arange(3), torch.zeros(3).long(), torch.tensor([3.0, 2.0, 1.0]), n_rows=3)
    >>> best.add(entries, strength(entries.values), torch.tensor([41, 43, 12]), tokens=torch.zeros(3).long())
    >>> best.finish()
    >>> _distinct_contexts(best, context_length=10, n=2).tolist()
    [0, 2]
    """
    contexts = best.places // context_length
    _, first = np.unique(np.stack([best.latents, contexts]), axis=1, return_index=True)
    first = np.sort(first)  # unique sorts by context; the order of `best` is by latent and rank
    return first[_nth_of_its_latent(best.latents[first]) < n]


def _evenly_spaced(even: Best, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, quantiles) of up to `n` entries of each latent at evenly spaced ranks, strongest first.

    Of 6 entries 2 are the middles of the two halves, ranks 1 and 4; 4.5 and 1.5 of the 6 are weaker:

    >>> even, rows = Best(1, 8), torch.arange(6)
    >>> values = torch.tensor([10.0, 60, 30, 20, 50, 40])
    >>> even.add(Entries(rows, torch.zeros(6).long(), values, 6), ranks=rows, places=rows, tokens=rows)
    >>> even.finish()
    >>> indices, quantiles = _evenly_spaced(even, n=2)
    >>> even.values[indices].tolist(), quantiles.tolist()
    ([50.0, 20.0], [0.75, 0.25])
    """
    order = np.lexsort((even.places, -even.values, even.latents))
    bounds = even.bounds()
    counts = np.diff(bounds)
    shown = np.minimum(counts, n)
    latent = np.repeat(np.arange(even.n_latents), shown)
    nth = _nth_of_its_latent(latent)
    # the middle of interval nth of `shown` equal ones over `counts` entries: (nth + 1/2) * counts / shown
    rank = ((2 * nth + 1) * counts[latent]) // (2 * shown[latent])
    quantiles = 1 - (rank + 0.5) / counts[latent]
    return order[bounds[latent] + rank], quantiles


class Shader:
    """The second pass: writes the activations around the samples into `samples.shades`.

    Latent 0 has its sample at place 5, and fires on places 5 and 6 of the same context of ten tokens:

    >>> shades = np.zeros((1, 2 * REACH + 1), np.float16)
    >>> samples = Samples(*map(np.array, ([0], [5], [2.0], [np.nan])), shades)
    >>> entries = Entries(torch.arange(3), torch.zeros(3).long(), torch.tensor([2.0, 0.5, 9.0]), n_rows=3)
    >>> Shader(samples, n_contexts=2, context_length=10).add(entries, places=torch.tensor([5, 6, 15]))
    >>> shades[0, REACH - 1 : REACH + 3].tolist()  # place 15 is of the next context
    [0.0, 2.0, 0.5, 0.0]
    """

    def __init__(
        self, samples: Samples, n_contexts: int, context_length: int, device: torch.device | str = "cpu"
    ) -> None:
        self.samples, self.context_length, self.n_contexts = samples, context_length, n_contexts
        # A key is a (latent, context) pair. Several samples can have the same, at most self._most.
        keys = samples.latents * np.int64(n_contexts) + samples.places // context_length
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        sought = self._keys.astype(np.int64)
        self._sought = torch.from_numpy(sought).to(device)
        self._most = int(np.unique(keys, return_counts=True)[1].max(initial=0))

    def add(self, entries: Entries, places: Tensor) -> None:
        """Add a block's entries; `places` [B] int64 of its rows. Only those of a sample's context go to the host."""
        if not len(self._keys):
            return
        of = places[entries.rows]
        keys = entries.latents * self.n_contexts + of // self.context_length
        first = torch.searchsorted(self._sought, keys)
        found = self._sought[first.clamp(max=len(self._sought) - 1)] == keys
        near = found.nonzero().squeeze(1)  # sync: how many
        columns = [
            column[near].double() for column in (first, of, entries.values)
        ]  # it has places up to 2^53
        first, of, values = torch.stack(columns).cpu().numpy()  # sync: the copy
        first, of = first.astype(np.int64), of.astype(np.int64)
        for nth in range(self._most):  # the nth sample of an entry's latent and context; usually there is one
            index = np.minimum(first + nth, len(self._keys) - 1)
            entry = np.flatnonzero((self._keys[index] == self._keys[first]) & (index == first + nth))
            sample = self._order[index[entry]]
            offset = of[entry] - self.samples.places[sample] + REACH
            near = (offset >= 0) & (offset <= 2 * REACH)
            self.samples.shades[sample[near], offset[near]] = values[entry[near]]

    def merge(self, peers: Processes) -> None:
        """Add the activations on the rows of all processes: each is of one row, zero for the others."""
        peers.add(self.samples.shades)


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
    """How the firings and the activation of each latent are divided among tokens.

    Of latent 0 token 4 has two firings of together 3, token 9 one of 1:

    >>> even, rows = Best(1, 8), torch.arange(3)
    >>> entries = Entries(rows, torch.zeros(3).long(), torch.tensor([1.0, 1.0, 2.0]), n_rows=3)
    >>> even.add(entries, ranks=rows, places=rows, tokens=torch.tensor([4, 9, 4]))
    >>> even.finish()
    >>> weights = token_weights(even)
    >>> weights.tokens.tolist(), weights.counts.tolist(), weights.shares.tolist()
    ([4, 9], [2, 1], [0.75, 0.25])
    """
    order = np.lexsort((even.tokens, even.latents))
    latents, tokens = even.latents[order], even.tokens[order]
    # A run of equal (latent, token) pairs begins where either differs from the entry before.
    begins = np.ones(len(order), bool)
    begins[1:] = (latents[1:] != latents[:-1]) | (tokens[1:] != tokens[:-1])
    starts = np.flatnonzero(begins)
    of = latents[starts]
    counts = np.diff(np.append(starts, len(order)))
    weights = np.zeros(len(starts))
    if len(starts):
        weights = np.add.reduceat(even.values[order].astype(np.float64), starts)
    shares = weights / np.bincount(of, weights=weights, minlength=even.n_latents)[of]
    heavy = np.lexsort((-shares, of))
    return TokenWeights(of[heavy], tokens[starts][heavy], counts[heavy], shares[heavy])


def token_entropy(weights: TokenWeights, n_latents: int) -> np.ndarray:
    """[F] bits: -sum over tokens of p log2 p, p being the token's share of the sampled firings.

    NaN for a latent without firings. All frequent latents have samples of one size, so their entropies compare.
    A latent with m < N_EVEN firings cannot exceed log2 m.
    """
    total = np.bincount(weights.latents, weights=weights.counts, minlength=n_latents)
    p = weights.counts / total[weights.latents]
    entropy = np.bincount(weights.latents, weights=-p * np.log2(p), minlength=n_latents)
    return np.where(total > 0, np.maximum(entropy, 0.0), np.nan)


def top_tokens(weights: TokenWeights, n_latents: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [F, n], -1 where there are fewer; their shares of the latent's activation [F, n])."""
    nth = _nth_of_its_latent(weights.latents)
    kept = nth < n
    tokens, shares = np.full((n_latents, n), -1, np.int32), np.zeros((n_latents, n), np.float32)
    tokens[weights.latents[kept], nth[kept]] = weights.tokens[kept]
    shares[weights.latents[kept], nth[kept]] = weights.shares[kept]
    return tokens, shares
