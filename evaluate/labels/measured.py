"""How well a label says where its latent fires, on rows that it was not chosen on.

Shapes: F latents, B rows and E entries of a block, I words of all labels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from evaluate.labels.choose import KINDS, Labels, for_measuring, keys_of
from evaluate.labels.words import Words, windows
from evaluate.metrics.firing import tally
from evaluate.metrics.rows import ContextTable
from transcoder.entries import Entries

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

    def __init__(
        self, labels: Labels, contexts: ContextTable, words: Words, device: torch.device | str = "cpu"
    ) -> None:
        self.contexts, self.words, self.labels = contexts, words, labels
        self.n_latents, self.rows = len(labels.kinds), 0
        self.held = np.zeros(self.n_latents, np.int64)
        self.fired, self.both = torch.zeros(2, self.n_latents, dtype=torch.int64, device=device)
        self.activation, self.activation_both = torch.zeros(
            2, self.n_latents, dtype=torch.float64, device=device
        )
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
        entries: Entries,
    ) -> None:
        """Add a block: [B] where its rows stand, and the entries of the full dictionary."""
        measured, n = for_measuring(context), self.n_latents
        self.rows += int(measured.sum())
        holds = self._holds(context, position, measured)
        self.held += np.bincount(holds % n, minlength=n)
        device = entries.rows.device
        own = entries.only(torch.from_numpy(measured).to(device, non_blocking=True)[entries.rows])
        both = own.at(
            _shared(own.rows * n + own.latents, torch.from_numpy(holds).to(device, non_blocking=True))
        )
        for part, fired, activation in (
            (own, self.fired, self.activation),
            (both, self.both, self.activation_both),
        ):
            fired += tally(part.latents, n)
            activation += tally(part.latents, n, part.values.double())

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

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        self.rows = peers.count(self.rows)
        peers.add(self.held)
        for counted in (self.fired, self.both, self.activation, self.activation_both):
            peers.total(counted)

    def result(self) -> Quality:
        """What was counted, as shares."""

        def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            known = self.labels.measured & (whole > 0)
            return np.where(known, part / np.where(known, whole, 1), np.nan).astype(np.float32)

        fired, both, activation, activation_both = (
            counted.cpu().numpy()
            for counted in (self.fired, self.both, self.activation, self.activation_both)
        )
        return Quality(
            self.rows,
            self.held,
            fired,
            share(both, self.held),
            share(both, fired),
            share(activation_both, activation),
        )


def _shared(ascending: Tensor, holds: Tensor) -> Tensor:
    """Places in `ascending` [E] of the numbers that are among `holds` [.], ascending too."""
    if not len(holds):
        return ascending.new_zeros(0)
    at = torch.searchsorted(holds, ascending).clamp_(max=len(holds) - 1)
    return (holds[at] == ascending).nonzero().squeeze(1)  # sync: how many
