"""How well a label says where its latent fires, on rows that it was not chosen on.

Shapes: F latents, B rows and E entries of a block, I words of all labels.
"""

from dataclasses import dataclass

import numpy as np

from evaluate.labels.choose import KINDS, Labels, for_measuring, keys_of
from evaluate.labels.words import Words, windows
from evaluate.metrics.rows import ContextTable

WEAK_RECALL = 0.25
"""A label with a lower recall is dimmed: of 88 measured labels judged by hand (docs/labels.md), 62 % of those below and
84 % of the others named the concept. Precision tells less: 65 to 76 % below, and 74 to 77 % above, limits of 0.05 to
0.25."""


@dataclass(frozen=True)
class Quality:
    """[F] each, shares float32; NaN for a label that was not measured, or where there is no row to share."""

    rows: int
    """Measured rows."""
    held: np.ndarray
    """int64: on how many of them the label holds."""
    fired: np.ndarray
    """int64: on how many of them the latent fires."""
    precision: np.ndarray
    """Share of the rows on which the label holds on which the latent fires."""
    recall: np.ndarray
    """Share of the rows on which the latent fires on which the label holds."""
    activation_recall: np.ndarray
    """Share of the latent's summed activation on rows on which the label holds."""


class Measured:
    """Counts rows of three kinds: on which the label holds, on which the latent fires, on which both.

    A label holds on a row that stands on one of its words, on the second word of one of its pairs, or right after one
    of its words before.
    """

    def __init__(self, labels: Labels, contexts: ContextTable, words: Words) -> None:
        self.contexts, self.words, self.labels = contexts, words, labels
        self.n_latents, self.rows = len(labels.kinds), 0
        self.held, self.fired, self.both = (np.zeros(self.n_latents, np.int64) for _ in range(3))
        self.activation, self.activation_both = (np.zeros(self.n_latents) for _ in range(2))
        self._tables = []
        """Of each kind: distinct keys [.], first of each in the next [. + 1], latents [I]."""
        kind, key, latent = (
            np.concatenate(part) if labels.chosen else np.zeros(0, np.uint64)
            for part in (zip(*labels.chosen, strict=True) if labels.chosen else ((), (), ()))
        )
        for each in KINDS:
            own, of = key[kind == each], latent[kind == each].astype(np.int64)
            order = np.argsort(own, kind="stable")
            distinct, first = np.unique(own[order], return_index=True)
            self._tables.append((distinct, np.append(first, len(own)), of[order]))

    def add(
        self,
        context: np.ndarray,
        position: np.ndarray,
        row: np.ndarray,
        latent: np.ndarray,
        value: np.ndarray,
    ) -> None:
        """Add a block: [B] where its rows stand, [E] entries of the full dictionary."""
        measured = for_measuring(context)
        self.rows += int(measured.sum())
        entry = measured[row]
        row, latent, value = row[entry], latent[entry].astype(np.int64), value[entry]
        holds = self._holds(context, position, measured)
        both = np.isin(row * np.int64(self.n_latents) + latent, holds, assume_unique=True)
        self.held += np.bincount(holds % self.n_latents, minlength=self.n_latents)
        self.fired += np.bincount(latent, minlength=self.n_latents)
        self.both += np.bincount(latent[both], minlength=self.n_latents)
        self.activation += np.bincount(latent, weights=value, minlength=self.n_latents)
        self.activation_both += np.bincount(latent[both], weights=value[both], minlength=self.n_latents)

    def _holds(self, context: np.ndarray, position: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Distinct row * F + latent of the rows and labels that hold on them."""
        rows = np.flatnonzero(measured)
        keys = keys_of(self.words.standing(windows(self.contexts, context[rows], position[rows])))
        found = []
        for (distinct, first, latents), key in zip(self._tables, keys, strict=True):
            if not len(distinct):
                continue
            at = np.minimum(np.searchsorted(distinct, key), len(distinct) - 1)
            hit = distinct[at] == key
            begin, count = first[at[hit]], (first[at[hit] + 1] - first[at[hit]])
            nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            found.append(
                np.repeat(rows[hit], count) * self.n_latents + latents[np.repeat(begin, count) + nth]
            )
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def result(self) -> Quality:
        """What was counted, as shares."""

        def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            known = self.labels.measured & (whole > 0)
            return np.where(known, part / np.where(known, whole, 1), np.nan).astype(np.float32)

        return Quality(
            self.rows,
            self.held,
            self.fired,
            share(self.both, self.held),
            share(self.both, self.fired),
            share(self.activation_both, self.activation),
        )
