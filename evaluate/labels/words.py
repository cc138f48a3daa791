"""The word that each row stands on and the word before it, as numbers that compare.

Shapes: B rows, K columns of a window that ends at the row's own token, V token ids.
"""

from typing import NamedTuple

import numpy as np

from common.tokens import TokenText
from evaluate.metrics.rows import ContextTable

PARTS = 4
"""Tokens of a word at most, counted back from the row's own; a longer one begins inside."""
WINDOW = 2 * PARTS
"""Tokens of a window: the row's word and the one before it."""
READ = 1024
"""Contexts that are read together."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Standing(NamedTuple):
    """Where rows stand in their texts. Two rows have the same number where they stand on the same word."""

    word: np.ndarray
    """[B] uint64: the tokens of the word up to the row's own, without spaces around it."""
    before: np.ndarray
    """[B] uint64: the word before that one; 0 at the start of a context."""
    folded: np.ndarray
    """[B] uint64: `word`, upper and lower case taken as one."""
    folded_before: np.ndarray
    length: np.ndarray
    """[B] tokens of the word."""
    length_before: np.ndarray
    """[B] tokens of the word before; 0 at the start of a context."""


class Words:
    """Which tokens are one word: a letter or digit continues the word of a letter or digit before it.

    The number of a word is a hash of 64 bits: of a million words two share one in one of 40 million texts.
    """

    def __init__(self, text: TokenText, contexts: ContextTable) -> None:
        """Of the tokens that occur in these contexts: a vocabulary has many more."""
        occurs = np.zeros(text.size, bool)
        for start in range(0, len(contexts), READ):
            occurs[contexts[np.arange(start, min(start + READ, len(contexts)))]] = True
        tokens = np.flatnonzero(occurs)
        labels = [text.label(int(token)) for token in tokens]
        stripped = [label.strip(" ") or label for label in labels]
        self._spelled, self._folded = np.zeros((2, text.size), np.uint64)
        self._spelled[tokens] = _numbered(stripped)
        self._folded[tokens] = _numbered([each.casefold() for each in stripped])
        self._opens, self._closes = np.zeros((2, text.size), bool)
        self._opens[tokens] = [label[:1].isalnum() for label in labels]
        self._closes[tokens] = [label[-1:].isalnum() for label in labels]

    def standing(self, window: np.ndarray) -> Standing:
        """Of rows with these windows [B, WINDOW] of token ids, -1 before the start of a context."""
        known = window >= 0
        token = np.where(known, window, 0)
        joined = np.zeros(window.shape, bool)
        joined[:, 1:] = self.joined(token[:, :-1], token[:, 1:]) & known[:, :-1]
        end = np.full(len(window), window.shape[1] - 1)
        length = _length(joined, end)
        length_before = _length(joined, end - length)
        length_before[~known[np.arange(len(end)), end - length]] = 0
        spelled, folded = (
            np.where(known, table[token], np.uint64(0)) for table in (self._spelled, self._folded)
        )
        return Standing(
            _hash(spelled, end, length),
            _hash(spelled, end - length, length_before),
            _hash(folded, end, length),
            _hash(folded, end - length, length_before),
            length,
            length_before,
        )

    def joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether each token of `second`, next to one of `first`, continues its word."""
        return self._closes[first] & self._opens[second]


def windows(contexts: ContextTable, context: np.ndarray, position: np.ndarray, after: int = 0) -> np.ndarray:
    """[B, WINDOW + after] token ids up to `after` behind each row's own, -1 beyond its context's ends."""
    distinct, which = np.unique(context, return_inverse=True)
    tokens = contexts[distinct]
    columns = position[:, None] + np.arange(1 - WINDOW, 1 + after)
    inside = (columns >= 0) & (columns < tokens.shape[1])
    return np.where(inside, tokens[which[:, None], np.where(inside, columns, 0)], -1)


def _numbered(texts: list[str]) -> np.ndarray:
    """[V] uint64 from 1: the same for the same text."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(each, 1 + len(numbers)) for each in texts], np.uint64)


def _length(joined: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[B] tokens of the word that ends at column `end` of each row."""
    rows, length = np.arange(len(end)), np.ones(len(end), np.int64)
    going = np.ones(len(end), bool)
    for back in range(PARTS - 1):
        going &= joined[rows, np.maximum(end - back, 0)] & (end > back)
        length += going
    return length


def _hash(spelled: np.ndarray, end: np.ndarray, length: np.ndarray) -> np.ndarray:
    """[B] uint64 of the `length` numbers up to column `end` of each row; 0 of none."""
    rows, number = np.arange(len(end)), np.zeros(len(end), np.uint64)
    for back in range(PARTS - 1, -1, -1):
        more = number * _FACTOR + spelled[rows, np.maximum(end - back, 0)]
        number = np.where(back < length, more, number)
    return number
