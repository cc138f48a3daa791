"""The rows that probes are fitted and tested on: the token of each, the one before it, its document; and their values.

Shapes: n rows, C contexts of T tokens, D_in, D_out, F_g latents of prefix g.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from evaluate.metrics.measure import prefix_entries
from evaluate.metrics.rows import Split, blocks
from evaluate.probe.classes import UNASKED
from shards.manifest import Source
from shards.store import StoreSplit
from shards.text.find import READ
from shards.text.tokens import ContextTable
from transcoder import Transcoder
from transcoder.entries import Entries

STRETCHES = 50
"""Into which a text is cut where its documents are not known."""


class Places(NamedTuple):
    """[n] each, of rows in stored order."""

    token: np.ndarray
    """int32"""
    previous: np.ndarray
    """int32, the token before it in its context; UNASKED where that is the first one and inserted (BOS)."""
    document: np.ndarray
    """int32, from 0; see `by_separator` and `by_stretch`"""


class Values(NamedTuple):
    """Of chosen rows, what probes read."""

    inputs: np.ndarray
    """[n, D_in] float32"""
    outputs: np.ndarray
    """[n, D_out] float32"""
    latents: Sequence[csr_matrix]
    """[n, F_g] float32 for each prefix, gated by its own threshold"""


def places(split: StoreSplit, n_rows: int, source: Source, document: np.ndarray) -> Places:
    """Of rows [0, n_rows); `document` [C, T] of every token of the split's text."""
    first = 0 if source.bos_token_id is None else 1
    parts = []
    for start, stop in blocks(n_rows):
        context, position = (each.astype(np.int64) for each in split.provenance(start, stop))
        distinct, which = np.unique(context, return_inverse=True)
        text = split.contexts[distinct]
        before = np.where(position > first, text[which, np.maximum(position - 1, 0)], UNASKED)
        parts.append((text[which, position], before, document[context, position]))
    return Places(*(np.concatenate(each).astype(np.int32) for each in zip(*parts, strict=True)))


def separated(source: Source) -> bool:
    """Whether a token stands between documents, and nowhere else: in chats it ends each turn too."""
    return (
        source.pack == "concat" and source.separator_token_id is not None and source.special_tokens == "text"
    )


def by_separator(contexts: ContextTable, source: Source) -> np.ndarray:
    """[C, T] int32 number of the document of each token, where documents were joined with a token between them.

    An inserted first token has the document of the token after it.
    """
    first = 0 if source.bos_token_id is None else 1
    document, before = np.empty(contexts.shape, np.int32), 0
    for start in range(0, len(contexts), READ):
        ends = (
            contexts[np.arange(start, min(start + READ, len(contexts)))][:, first:]
            == source.separator_token_id
        )
        after = before + np.cumsum(ends.ravel()).reshape(ends.shape)
        document[start : start + len(ends), first:] = after - ends
        before = int(after[-1, -1])
    document[:, :first] = document[:, first : 2 * first]
    return document


def by_stretch(shape: tuple[int, ...]) -> np.ndarray:
    """[C, T] int32: at most STRETCHES stretches of whole contexts, in the text's order, in place of documents."""
    contexts, positions = shape
    stretch = np.arange(contexts) // -(-contexts // STRETCHES)
    return np.repeat(stretch.astype(np.int32)[:, None], positions, 1)


@torch.inference_mode()
def values_of(
    coder: Transcoder, split: Split, rows: np.ndarray, tick: Callable[[int], object] = lambda _: None
) -> Values:
    """One reading of the blocks that hold `rows`, ascending numbers; `tick` gets each block's rows."""
    device = coder.W_dec.device
    inputs, outputs = (np.empty((len(rows), width), np.float32) for width in (coder.d_in, coder.d_out))
    latents: list[list[csr_matrix]] = [[] for _ in coder.prefix_ends]
    for start, stop in blocks(int(rows[-1]) + 1):
        first, last = np.searchsorted(rows, (start, stop))
        if first < last:
            here = torch.from_numpy(rows[first:last] - start)
            x, y = (side[here] for side in split.rows(start, stop))
            inputs[first:last], outputs[first:last] = x.numpy(), y.numpy()
            active, _ = prefix_entries(x.to(device), coder)
            for found, entries, end in zip(latents, active, coder.prefix_ends, strict=True):
                found.append(_matrix(entries, end))
        tick(stop - start)
    return Values(inputs, outputs, [csr_matrix(vstack(each, format="csr")) for each in latents])


def _matrix(entries: Entries, width: int) -> csr_matrix:
    bounds = np.concatenate([[0], np.cumsum(entries.l0().cpu().numpy())])
    values, latents = entries.values.float().cpu().numpy(), entries.latents.int().cpu().numpy()
    return csr_matrix((values, latents, bounds), (entries.n_rows, width))
