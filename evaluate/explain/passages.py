"""Passages of a store's text: where a latent fires, over the whole range of its activation, and where it does not.

A passage is a row and up to REACH tokens either side, of one document in one context. Those that a language model is
shown for its explanation and those that the explanation is scored on are of different documents.

Shapes: n rows, C contexts of T tokens. A place is context * T + position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.metrics.contexts import REACH, lottery
from evaluate.metrics.rows import ContextTable
from evaluate.probe.rows import separated
from evaluate.questions.firings import firings
from shards import Store
from shards.layout import kept_mask
from shards.manifest import Source
from shards.store import StoreSplit
from transcoder import Transcoder

SHOWN, SCORED = 0, 1
"""The two sides: documents of even and of odd number."""
BLOCKS, LEAST_BLOCK = 16, 8
"""Where the store does not say where documents end: at most so many blocks of contexts, of at least so many each, and
an eighth of each left out, so that a document that reaches from one into the next is in one of them."""


@dataclass(frozen=True)
class Passage:
    """A stretch of text of m tokens, and one latent's activations on it."""

    pieces: list[str]
    """[m] as `TokenText.pieces`."""
    activations: np.ndarray
    """[m] float32, 0 where the latent does not fire."""
    document: int
    place: int
    """Of its row."""


def documents(tokens: np.ndarray, source: Source) -> np.ndarray:
    """[C, T] int32 number of the document that each token belongs to; -1 for those that are left out.

    Exact where a token separates documents. Elsewhere (data.pack document, and chats, where that token also ends a
    message) a number stands for a block of contexts, whose first eighth is left out.
    """
    if separated(source):
        ends = tokens == source.separator_token_id
        if source.bos_token_id is not None:
            ends[:, 0] = False
        after = np.cumsum(ends.ravel(), dtype=np.int32)
        return (after - ends.ravel()).reshape(tokens.shape)
    size = max(LEAST_BLOCK, -(-len(tokens) // BLOCKS))
    block, within = np.divmod(np.arange(len(tokens), dtype=np.int32), size)
    block[(within < max(1, size // 8)) & (block > 0)] = -1
    return np.broadcast_to(block[:, None], tokens.shape)


def spread(n: int, m: int) -> np.ndarray:
    """Up to `m` of the numbers 0 to n - 1, evenly spaced: the middles of equal parts.

    >>> spread(10, 3).tolist(), spread(2, 3).tolist()
    ([1, 5, 8], [0, 1])
    """
    m = min(n, m)
    return (2 * np.arange(m) + 1) * n // (2 * m) if m else np.zeros(0, np.int64)


class Text:
    """The text of a split's first `n_rows` rows, and where each latent fires on it."""

    def __init__(self, store: Store, split: StoreSplit, coder: Transcoder, n_rows: int) -> None:
        source, self.text = store.manifest.source, split.text
        self.tokens = _all(split.contexts)
        self.length = self.tokens.shape[1]
        self.documents = documents(self.tokens, source).ravel()
        self._kept = kept_mask(self.tokens, source.dropped_token_ids).ravel()
        context, position = split.provenance(0, n_rows)
        self._places = context.astype(np.int64) * self.length + position
        unknown = self._kept.copy()
        unknown[self._places] = False
        self._unknown = np.concatenate([[0], np.cumsum(unknown)])
        self._firings = firings(coder, split, n_rows)

    @property
    def fired(self) -> np.ndarray:
        """[F] firings of each latent."""
        return np.diff(self._firings.bounds)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(places, activations) of a latent's firings, by place."""
        rows, values = self._firings.of(latent)
        places = self._places[rows]
        order = np.argsort(places)
        return places[order], values[order]

    def firing(self, latent: int, side: int, silent: np.ndarray | None = None) -> np.ndarray:
        """Places of a latent's firings on a side, one of each document in each context, strongest first.

        Which one of several is drawn by lot. `silent`: places of another latent's firings, none of which may be in the
        passage.
        """
        places, values = self.of(latent)
        fine = self._usable(places, side)
        if silent is not None:
            fine[fine] &= self._without(places[fine], silent)
        places, values = places[fine], values[fine]
        drawn = self._one_each(places)
        return places[drawn][np.lexsort((places[drawn], -values[drawn]))]

    def silent(self, latent_places: np.ndarray, side: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Up to `n` places on a side, drawn evenly, in whose passages a latent with these firings is silent."""
        places = self._places[self._usable(self._places, side)]
        places = places[self._without(places, latent_places)]
        places = places[self._one_each(places)]
        return rng.permutation(places)[:n]

    def passages(self, places: Iterable[int], latent: int) -> list[Passage]:
        """The passages around these places, with one latent's activations."""
        own, values = self.of(latent)
        return [self._passage(int(place), own, values) for place in places]

    def _passage(self, place: int, own: np.ndarray, values: np.ndarray) -> Passage:
        start, stop = (int(each[0]) for each in self._bounds(np.array([place])))
        there = self._kept[start:stop] & (self.documents[start:stop] == self.documents[place])
        gaps = np.flatnonzero(~there) + start
        start = int(gaps[gaps < place].max(initial=start - 1)) + 1
        stop = int(gaps[gaps > place].min(initial=stop))
        activations = np.zeros(stop - start, np.float32)
        first, last = np.searchsorted(own, [start, stop])
        activations[own[first:last] - start] = values[first:last]
        tokens = self.tokens.ravel()[start:stop].tolist()
        return Passage(self.text.pieces(tokens), activations, int(self.documents[place]), place)

    def _usable(self, places: np.ndarray, side: int) -> np.ndarray:
        """[.] bool: of a document of the side, and every token around them was measured."""
        document, (start, stop) = self.documents[places], self._bounds(places)
        whole = self._unknown[stop] == self._unknown[start]
        return (document >= 0) & (document % 2 == side) & self._kept[places] & whole

    def _without(self, places: np.ndarray, others: np.ndarray) -> np.ndarray:
        """[.] bool: none of `others`, ascending, is within REACH in the same context."""
        start, stop = self._bounds(places)
        return np.searchsorted(others, stop) == np.searchsorted(others, start)

    def _bounds(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        context = places // self.length * self.length
        return np.maximum(places - REACH, context), np.minimum(places + REACH + 1, context + self.length)

    def _one_each(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the places that are drawn, one of each document in each context."""
        context = places // self.length
        order = np.lexsort((lottery(places), self.documents[places], context))
        changes = np.diff(context[order]).astype(bool) | np.diff(self.documents[places][order]).astype(bool)
        return order[np.concatenate([[True] * bool(len(order)), changes]).astype(bool)]


def near(of: int, *kin: np.ndarray, alive: np.ndarray, rng: np.random.Generator) -> Sequence[int]:
    """Other living latents: those of each row of `kin` first, nearest first, then all others in random order."""
    first = [int(other) for each in kin for other in each[of] if other >= 0]
    every = rng.permutation(np.flatnonzero(alive)).tolist()
    return [other for other in dict.fromkeys([*first, *every]) if other != of and alive[other]]


def _all(contexts: ContextTable) -> np.ndarray:
    return contexts[np.arange(len(contexts))]
