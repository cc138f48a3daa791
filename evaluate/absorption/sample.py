"""The rows that classes are told apart on: the probes' own, and those that everything is measured on.

Shapes: n rows, D_in, D_out.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common.errors import InputError
from common.tokens import TokenText
from evaluate.metrics.rows import Split, blocks
from evaluate.probe.classes import UNASKED, Task, token_tasks
from evaluate.probe.rows import Places, by_separator, by_stretch, places, separated
from shards import Store
from shards.manifest import Source
from shards.store import StoreSplit

PER_WORD = 8
"""Rows of one word at most: otherwise a class of words would be its most frequent one."""
UNSEEN = 4
"""Every fourth word is kept from the probes, and measured: they must not know words by heart."""
MOST, VALUES = 60_000, 1 << 28
"""Rows that probes are fitted on; values of all of them, 1 GB."""
SCANNED = 1 << 19
"""Train rows that these are taken from; windows are shuffled, so the first are as good as any."""
ENDINGS = (
    *("ing", "ed", "ly", "ion", "er", "or", "al", "ent", "ant", "ous", "ive", "est"),
    *("ity", "ic", "able", "ful", "ness", "less", "ism", "ist", "ize", "ate", "ary", "s"),
)
LEAST_LETTERS = 4
"""Of a token whose ending is asked for."""


@dataclass(frozen=True)
class Sample:
    """Rows of train documents for fitting, then rows of held-out documents, which stand on other words."""

    apart: np.ndarray
    """[n] bool: whether a row is of the held-out documents, and measured."""
    place: np.ndarray
    """[n] int64: number of the row in its split, ascending in each."""
    word: np.ndarray
    """[n] int64: the same for the same word, in either case."""
    document: np.ndarray
    """[n] int32: number of its document in its split, see `documents`."""
    inputs: torch.Tensor
    """[n, D_in]"""
    outputs: torch.Tensor
    """[n, D_out]"""
    tasks: list[Task]

    def __len__(self) -> int:
        return len(self.place)

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As a split's."""
        return self.inputs[start:stop], self.outputs[start:stop]


def sample(store: Store, n_measured: int) -> Sample:
    """Up to `PER_WORD` rows of each word, the measured ones among the first `n_measured` held-out rows.

    A word is a token's text without spaces around it, upper and lower case taken as one; its hash decides whether it is
    measured or for fitting. Raises `InputError` where a split has no row.
    """
    source, text = store.manifest.source, store.train.text
    most = min(MOST, VALUES // (source.d_in + source.d_out))
    sides = [
        _choose(store.train, min(len(store.train), SCANNED), source, False, most),
        _choose(store.heldout, n_measured, source, True, most),
    ]
    if not all(len(side.place) for side in sides):
        raise InputError(f"{store.path}: expected train and held-out rows of several words, found none")
    place, word = (np.concatenate([getattr(side, name) for side in sides]) for name in ("place", "word"))
    token, previous, document = (
        np.concatenate(both) for both in zip(*(side.places for side in sides), strict=True)
    )
    rows = [_read(split, side.place) for split, side in zip((store.train, store.heldout), sides, strict=True)]
    inputs, outputs = (torch.cat(parts) for parts in zip(*rows, strict=True))
    tasks = [*token_tasks(text, token, previous), *_ending_tasks(endings(text, token))]
    apart = np.arange(len(place)) >= len(sides[0].place)
    return Sample(apart, place, word, document, inputs, outputs, tasks)


def endings(text: TokenText, token: np.ndarray) -> np.ndarray:
    """[n] int8: number in `ENDINGS` of the longest that a token ends in, of tokens of four or more ASCII letters.

    One that ends in none has the number after the last; UNASKED of other tokens.
    """
    by_length = sorted(ENDINGS, key=len, reverse=True)

    def number(token: int) -> int:
        bare = text.label(token).strip().lower()
        if len(bare) < LEAST_LETTERS or not (bare.isascii() and bare.isalpha()):
            return UNASKED
        return next((ENDINGS.index(each) for each in by_length if bare.endswith(each)), len(ENDINGS))

    distinct, which = np.unique(token, return_inverse=True)
    return np.array([number(int(each)) for each in distinct], np.int8)[which]


def _ending_tasks(number: np.ndarray) -> list[Task]:
    asked = number != UNASKED
    return [
        Task("ending", name, np.where(asked, number == each, UNASKED).astype(np.int8))
        for each, name in enumerate(ENDINGS)
    ]


class _Side(NamedTuple):
    """The chosen rows of one split; see `Sample`."""

    place: np.ndarray
    word: np.ndarray
    places: Places


def _choose(split: StoreSplit, n_rows: int, source: Source, apart: bool, most: int) -> _Side:
    contexts = split.contexts
    document = by_separator(contexts, source) if separated(source) else by_stretch(contexts.shape)
    found = places(split, n_rows, source, document)
    distinct, which = np.unique(found.token, return_inverse=True)
    word = np.array([_word(split.text.label(int(each))) for each in distinct], np.int64)[which]
    order = np.random.default_rng(0).permutation(np.flatnonzero((word % UNSEEN == 0) == apart))
    place = np.sort(order[_nth(word[order]) < PER_WORD][:most])
    return _Side(place, word[place], Places(*(each[place] for each in found)))


def _word(label: str) -> int:
    return zlib.crc32((label.strip() or label).casefold().encode())


def _nth(values: np.ndarray) -> np.ndarray:
    """Which occurrence of its value each is, from 0.

    >>> _nth(np.array([7, 5, 7, 7, 5])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    nth = np.empty(len(values), np.int64)
    nth[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return nth


def _read(split: Split, place: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of rows, ascending."""
    parts = []
    for start, stop in blocks(int(place[-1]) + 1):
        own = place[slice(*np.searchsorted(place, (start, stop)))] - start
        if len(own):
            parts.append([side[own] for side in split.rows(start, stop)])
    inputs, outputs = (torch.cat(side) for side in zip(*parts, strict=True))
    return inputs, outputs
