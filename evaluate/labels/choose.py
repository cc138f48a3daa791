"""Labels of latents: the words, pairs of words and preceding words that best tell where each fires.

Shapes: F latents, N words of a label, E sampled firings, I candidates, B rows of a block, R rows of a split.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.processes import ALONE, Processes
from evaluate.labels.words import WINDOW, Standing, Words, windows
from evaluate.metrics.contexts import Best
from evaluate.metrics.rows import TextSplit, blocks

N_WORDS = 5
"""Most words of a label."""
ON, PAIR, AFTER = 1, 2, 3
"""Kinds of candidates: the row stands on the word; on the second word of a pair; anywhere right after the word."""
KINDS = (ON, PAIR, AFTER)
OPEN = 4
"""Added to the kind of a word that continues after the row in most of its firings: it is part of a longer one."""
WORTH = {ON: 1.0, PAIR: 0.8, AFTER: 0.6}
"""Factors of the scores: of two equally good candidates the simpler one wins."""
DOUBT = 2.0
"""Occurrences without a firing that are added to a candidate's: a word seen once must not have a precision of 1."""
LEAST_LIFT = 1.5
"""From the second word on: a word on which a latent fires hardly more often than on rows overall says nothing."""
CASE = 0.5
"""Another case of a word belongs to it if its precision is at least this share of the word's."""
TOGETHER = 400_000
"""Sampled firings at once: about 200 MB."""
FEW = 32
"""Firings on the rows for choosing; with fewer a label is chosen on all rows, and not measured."""
MEASURED_EVERY, STRETCH = 4, 8
"""Every fourth block of eight contexts is for measuring; a block keeps most documents in one piece."""
_PAIR = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Labels:
    """[F, N] unless said otherwise; best words first, kind 0 after the last."""

    kinds: np.ndarray
    """uint8"""
    tokens: np.ndarray
    """[F, N, WINDOW] int32 token ids of each text, padded with -1."""
    shares: np.ndarray
    """float32 share of the latent's sampled activation on rows of this word and none before it in the label."""
    lifts: np.ndarray
    """float32: how much more often it fires on the word than on any row."""
    firings: np.ndarray
    """[F] int64: sampled firings that the label was chosen on."""
    measured: np.ndarray
    """[F] bool: whether rows are left to measure the label on."""
    chosen: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """(kind, key, latent) of the words and of the cases that belong to them, in parts: what the label stands for."""

    @classmethod
    def none(cls, n_latents: int) -> "Labels":
        """No label of any latent."""
        shape = n_latents, N_WORDS
        return cls(
            np.zeros(shape, np.uint8),
            np.full((*shape, WINDOW), -1, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(n_latents, np.int64),
            np.zeros(n_latents, bool),
            [],
        )

    def merge(self, peers: Processes) -> None:
        """Add the labels that other processes have chosen for other latents: none of its own has both."""
        if peers.world == 1:
            return
        peers.wait()
        self.tokens[...] += 1
        peers.add(
            self.kinds, self.tokens, self.shares, self.lifts, self.firings, self.measured.view(np.uint8)
        )
        self.tokens[...] -= 1
        none = np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64)
        own = (np.concatenate(parts) for parts in zip(none, *self.chosen, strict=True))
        kind, key, latent = (peers.chained(column) for column in own)
        self.chosen[:] = [(kind, key, latent)]


def for_measuring(context: np.ndarray) -> np.ndarray:
    """[B] whether rows of these contexts measure labels, rather than choose them.

    >>> for_measuring(np.array([0, 23, 24, 31, 32])).tolist()
    [False, False, True, True, False]
    """
    return context // STRETCH % MEASURED_EVERY == MEASURED_EVERY - 1


def keys_of(standing: Standing, folded: bool = False) -> list[np.ndarray]:
    """[B] uint64 of each kind: rows with the same key are rows of the same candidate."""
    word, before = (standing.folded, standing.folded_before) if folded else (standing.word, standing.before)
    return [word, before * _PAIR + word, before]


def choose(
    sampled: Best,
    firings: np.ndarray,
    split: TextSplit,
    n_rows: int,
    words: Words,
    peers: Processes = ALONE,
) -> Labels:
    """Labels by an even sample of each latent's `firings` [F] on rows [0, n_rows).

    With `peers` each process chooses those of some latents; all have the result.
    """
    labels = Labels.none(sampled.n_latents)
    for number, (start, stop) in enumerate(_parts(sampled.bounds())):
        if number % peers.world == peers.rank:
            _Block(sampled, firings, split, n_rows, words, start, stop).choose(labels)
    labels.merge(peers)
    return labels


def _parts(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of latents that together have about `TOGETHER` of the sampled firings, and at least one."""
    start, n = 0, len(bounds) - 1
    while start < n:
        stop = max(start + 1, int(np.searchsorted(bounds, bounds[start] + TOGETHER, side="right")) - 1)
        if bounds[stop] > bounds[start]:
            yield start, stop
        start = stop


class _Block:
    """Firings and candidates of latents [start, stop), which are numbered from 0 here."""

    def __init__(
        self,
        sampled: Best,
        firings: np.ndarray,
        split: TextSplit,
        n_rows: int,
        words: Words,
        start: int,
        stop: int,
    ) -> None:
        bounds = sampled.bounds()[start : stop + 1]
        own = slice(bounds[0], bounds[-1])
        self.start, self.n = start, stop - start
        latents = sampled.latents[own].astype(np.int64) - start
        context, position = np.divmod(sampled.places[own], split.contexts.shape[1])
        use = ~for_measuring(context)
        self.few = np.bincount(latents[use], minlength=self.n) < FEW
        use |= self.few[latents]
        latents, context, position = latents[use], context[use], position[use]
        self.latents, self.weight = latents, sampled.values[own][use].astype(np.float64)
        self.n_used = np.bincount(latents, minlength=self.n)
        self.per_sampled = firings[start:stop] / np.maximum(np.diff(bounds), 1)
        """Firings that each sampled one stands for."""
        self.window = windows(split.contexts, context, position, after=1)
        self.standing = words.standing(self.window[:, :WINDOW])
        last, following = self.window[:, -2], self.window[:, -1]
        self.goes_on = (following >= 0) & words.joined(last, np.maximum(following, 0))
        self._find(split, n_rows, words)

    def _find(self, split: TextSplit, n_rows: int, words: Words) -> None:
        """The candidates: each distinct word, pair and preceding word of each latent's firings, sorted by latent."""
        kinds, columns, self.of = [], [], []
        folded = keys_of(self.standing, folded=True)
        for kind, key, fold in zip(KINDS, keys_of(self.standing), folded, strict=True):
            first, which = _distinct(self.latents, key)
            kinds.append(np.full(len(first), kind))
            columns.append((self.latents[first], key[first], fold[first], first))
            self.of.append(which + sum(map(len, kinds[:-1])))
        self.kind = np.concatenate(kinds)
        self.latent, self.key, fold, self.example = (
            np.concatenate(each) for each in zip(*columns, strict=True)
        )
        _, self.family = _distinct(self.latent * len(KINDS) + self.kind, fold)
        counts, rows = occurrences(self.kind, self.key, split, n_rows, words)
        few = self.few[self.latent].astype(int)
        occurring, rows = counts[few, np.arange(len(few))], np.maximum(rows[few], 1)
        size = len(self.kind)
        firings = sum(np.bincount(of, minlength=size) for of in self.of)
        going = sum(np.bincount(of, weights=self.goes_on, minlength=size) for of in self.of)
        expected = occurring / self.per_sampled[self.latent]
        self.precision = firings / (np.maximum(expected, firings) + DOUBT)
        self.lift = firings / self.n_used[self.latent] * rows / np.maximum(occurring, 1)
        self.open = (2 * going > firings) & (self.kind != AFTER)
        self.worth = np.array([WORTH[kind] for kind in KINDS])[self.kind - 1] * (self.key != 0)

    def choose(self, labels: Labels) -> None:
        """Greedy: the best word first, then the best for the firings that are not on it, and so on."""
        size, left = len(self.kind), self.weight.copy()
        total = np.bincount(self.latents, weights=left, minlength=self.n)
        by_latent = np.argsort(self.latent, kind="stable")
        living, begins = np.unique(self.latent[by_latent], return_index=True)
        for word in range(N_WORDS):
            covered = sum(np.bincount(of, weights=left, minlength=size) for of in self.of)
            score = self.worth * np.sqrt(covered / total[self.latent] * self.precision)
            if word:
                score[self.lift < LEAST_LIFT] = 0
            sorted_scores = score[by_latent]
            best = np.maximum.reduceat(sorted_scores, begins)
            is_best = np.flatnonzero(sorted_scores == np.repeat(best, np.diff([*begins, size])))
            _, first = np.unique(self.latent[by_latent][is_best], return_index=True)
            picked = by_latent[is_best[first]][best > 0]
            if not len(picked):
                break
            taken = self._with_cases(picked)
            on = taken[self.of[0]] | taken[self.of[1]] | taken[self.of[2]]
            share = np.bincount(self.latents[on], weights=left[on], minlength=self.n) / np.maximum(
                total, 1e-300
            )
            left[on] = 0
            f = self.latent[picked]
            labels.kinds[self.start + f, word] = self.kind[picked] + OPEN * self.open[picked]
            labels.tokens[self.start + f, word] = self._texts(picked)
            labels.shares[self.start + f, word] = share[f]
            labels.lifts[self.start + f, word] = self.lift[picked]
            labels.chosen.append((self.kind[taken], self.key[taken], self.start + self.latent[taken]))
        labels.firings[self.start + living] = self.n_used[living]
        labels.measured[self.start + living] = ~self.few[living]

    def _with_cases(self, picked: np.ndarray) -> np.ndarray:
        """Mask of the candidates that are picked, or the same word in another case and about as precise."""
        of_family = np.full(int(self.family.max()) + 1, np.inf)
        of_family[self.family[picked]] = CASE * self.precision[picked]
        return self.precision >= of_family[self.family]

    def _texts(self, picked: np.ndarray) -> np.ndarray:
        """[., WINDOW] token ids of the candidates, padded with -1: the word, the pair, or the preceding word."""
        example, kind = self.example[picked], self.kind[picked]
        length, before = self.standing.length[example], self.standing.length_before[example]
        begin = WINDOW - length - np.where(kind == ON, 0, before)
        end = np.where(kind == AFTER, WINDOW - length, WINDOW)
        columns = begin[:, None] + np.arange(WINDOW)
        tokens = self.window[example[:, None], np.minimum(columns, WINDOW - 1)]
        return np.where(columns < end[:, None], tokens, -1)


def _distinct(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of one entry of each distinct pair, sorted; number of each entry's pair).

    >>> _distinct(np.array([5, 3, 5, 5]), np.array([1, 1, 2, 1]))
    (array([1, 0, 2]), array([1, 0, 2, 1]))
    """
    order = np.lexsort((second, first))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(first[order]) != 0) | (second[order][1:] != second[order][:-1])
    which = np.empty(len(order), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


def occurrences(
    kind: np.ndarray, key: np.ndarray, split: TextSplit, n_rows: int, words: Words
) -> tuple[np.ndarray, np.ndarray]:
    """([2, I] rows of each candidate, [2] rows altogether): of those for choosing, and of all [0, n_rows).

    Reads the text only.
    """
    counts, rows = np.zeros((2, len(key)), np.int64), np.array([0, n_rows])
    tables = [np.unique(key[kind == each], return_inverse=True) for each in KINDS]
    found = [np.zeros((2, len(table)), np.int64) for table, _ in tables]
    for start, stop in blocks(n_rows):
        context, position = split.provenance(start, stop)
        choosing = ~for_measuring(context)
        rows[0] += choosing.sum()
        own = keys_of(words.standing(windows(split.contexts, context, position)))
        for (table, _), count, keys in zip(tables, found, own, strict=True):
            at = np.minimum(np.searchsorted(table, keys), max(len(table) - 1, 0))
            hit = table[at] == keys
            count[0] += np.bincount(at[hit & choosing], minlength=len(table))
            count[1] += np.bincount(at[hit], minlength=len(table))
    for each, (_, which), count in zip(KINDS, tables, found, strict=True):
        counts[:, kind == each] = count[:, which]
    return counts, rows
