"""The catalogue as compact JSON for the page: columns as base64 arrays, each context's tokens only once.

Shapes: F latents, S samples, P pool of token strings.
"""

import base64
import json
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from common.tokens import TokenText
from evaluate.labels.read import label_texts
from evaluate.metrics.catalogue import Catalogue
from evaluate.metrics.contexts import REACH, Samples
from evaluate.metrics.rows import ContextTable

POOL_TOKENS = 2_500_000
"""Token strings in the page at most (13 MB in base64, where they are more than 65,536 different ones): beyond it each
latent shows fewer samples."""
SHOWN_LOGITS = 8
"""Tokens that a latent promotes, and as many that it suppresses."""
READ = 1024
"""Stretches whose contexts are read from the store together."""

TYPES = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "int32": "i32", "float32": "f32"}


class Packed(TypedDict):
    """An array as the page's script unpacks it."""

    type: str
    """Short name of the number's type."""
    width: int
    """Columns; 1 for a vector."""
    data: str
    """base64, little-endian."""


class PageData(TypedDict):
    """What the page's script reads."""

    latents: int
    strings: list[str]
    columns: dict[str, Packed]
    prefix_ends: list[int]


def page_data(catalogue: Catalogue, contexts: ContextTable, text: TokenText) -> PageData:
    """What the page's script reads. `contexts` [n, T] is the split's."""
    strings = Strings(text)
    samples, labels, effects = catalogue.samples, catalogue.labels, catalogue.effects
    shown = np.arange(len(samples.latents))
    stretches = Stretches.around(samples, shown, contexts.shape[1])
    while stretches.length > POOL_TOKENS and len(shown) > len(np.unique(samples.latents)):
        shown = shown[_first_half(samples.latents[shown])]
        stretches = Stretches.around(samples, shown, contexts.shape[1])
    pool = stretches.strings(contexts, strings)
    columns = {
        "group": catalogue.group.astype(np.uint8),
        "density": catalogue.density,
        "firings": catalogue.firings.astype(np.uint32),
        "largest": catalogue.largest.astype(np.float32),
        "mean": catalogue.mean.astype(np.float32),
        "energy": catalogue.energy.astype(np.float32),
        "entropy": catalogue.entropy.astype(np.float32),
        "topShare": catalogue.top_share.astype(np.float32),
        "tokens": strings.words(label_texts(labels.tokens, labels.kinds, text), labels.kinds.shape[1]),
        "tokenShares": labels.shares,
        "labelFirings": labels.firings.astype(np.uint32),
        "labelRows": catalogue.quality.held.astype(np.uint32),
        "labelFired": catalogue.quality.fired.astype(np.uint32),
        "labelPrecision": catalogue.quality.precision,
        "labelRecall": catalogue.quality.recall,
        "promoted": strings.labels(effects.promoted[:, :SHOWN_LOGITS]),
        "promotedBy": effects.promoted_by[:, :SHOWN_LOGITS],
        "suppressed": strings.labels(effects.suppressed[:, :SHOWN_LOGITS]),
        "suppressedBy": effects.suppressed_by[:, :SHOWN_LOGITS],
        "effectHistogram": log_levels(effects.histogram),
        "effectEdges": effects.edges,
        "likeRandom": effects.like_random.astype(np.uint8),
        "histogram": np.minimum(catalogue.histogram, 65_535).astype(np.uint16),
        "near": catalogue.neighbours.latents.numpy().astype(np.int32),
        "nearCosine": catalogue.neighbours.cosines.numpy(),
        "twins": catalogue.twins.latents,
        "twinScores": catalogue.twins.scores,
        "parents": catalogue.parents.latents,
        "parentScores": catalogue.parents.scores,
        **_sample_columns(catalogue, shown, stretches),
        "pool": pool,
    }
    return {
        "latents": len(catalogue.group),
        "strings": strings.texts,
        "columns": {name: pack(values) for name, values in columns.items()},
        "prefix_ends": np.cumsum(np.bincount(catalogue.group)).tolist(),
    }


def pack(values: np.ndarray) -> Packed:
    """An array of one or two dimensions, for the page."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    width = values.shape[1] if values.ndim == 2 else 1
    return {
        "type": TYPES[values.dtype.name],
        "width": width,
        "data": base64.b64encode(little.tobytes()).decode(),
    }


def log_levels(counts: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: log(1 + count), 255 being the largest of its row.

    >>> log_levels(np.array([[0, 9, 99]])).tolist()
    [[0, 128, 255]]
    """
    logs = np.log1p(counts)
    return np.rint(255 * logs / np.maximum(logs.max(1, initial=0, keepdims=True), 1e-9)).astype(np.uint8)


def script_json(values: object) -> str:
    """JSON that can stand in a <script> element: nothing in it can close the element or open a comment."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class Strings:
    """Distinct strings, and the number of each."""

    def __init__(self, text: TokenText) -> None:
        self.text = text
        self.texts: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, string: str) -> int:
        """The number of `string`, a new one when it was not seen before."""
        number = self._number.get(string)
        if number is None:
            number = self._number[string] = len(self.texts)
            self.texts.append(string)
        return number

    def labels(self, tokens: np.ndarray) -> np.ndarray:
        """int32 of the same shape: the number of each token's label, -1 where the token is -1."""
        distinct, which = np.unique(tokens, return_inverse=True)
        numbers = [-1 if token < 0 else self.number(self.text.label(int(token))) for token in distinct]
        return np.array(numbers, np.int32)[which].reshape(tokens.shape)

    def words(self, texts: list[list[str]], width: int) -> np.ndarray:
        """[., width] int32: the number of each text of each row, -1 behind its last."""
        numbers = np.full((len(texts), width), -1, np.int32)
        for row, own in zip(numbers, texts, strict=True):
            row[: len(own)] = [self.number(each) for each in own]
        return numbers


@dataclass(frozen=True)
class Stretches:
    """The stretches of text around samples, overlapping ones merged, laid end to end in a pool."""

    starts: np.ndarray
    """[W] int64 first place of each stretch."""
    lengths: np.ndarray
    """[W]"""
    sample_at: np.ndarray
    """[S] where in the pool each sample's stretch begins."""
    sample_lengths: np.ndarray
    sample_focus: np.ndarray
    """[S] the sample's own token within its stretch."""
    context_length: int

    @property
    def length(self) -> int:
        """Tokens of the pool."""
        return int(self.lengths.sum())

    @classmethod
    def around(cls, samples: Samples, shown: np.ndarray, context_length: int) -> "Stretches":
        """Stretches of REACH tokens either side of the `shown` samples, within their contexts of `context_length`.

        Contexts of 100 tokens, REACH 16. Positions 5 and 30 of context 0 overlap: one stretch, [0, 47); position 20 of
        context 1, place 120, has [104, 137), which begins at 47 in the pool:

        >>> places, empty = np.array([5, 30, 120]), np.zeros(0)
        >>> samples = Samples(latents=np.arange(3), places=places, values=empty, quantiles=empty, shades=empty)
        >>> stretches = Stretches.around(samples, shown=np.arange(3), context_length=100)
        >>> stretches.starts.tolist(), stretches.lengths.tolist()
        ([0, 104], [47, 33])
        >>> stretches.sample_at.tolist(), stretches.sample_focus.tolist()  # sample 1 begins at its place 14
        ([0, 14, 47], [5, 16, 16])
        """
        places = samples.places[shown]
        context = places // context_length
        start = np.maximum(places - REACH, context * context_length)
        stop = np.minimum(places + REACH + 1, (context + 1) * context_length)
        order = np.argsort(start, kind="stable")
        reached = np.maximum.accumulate(stop[order])
        new = np.ones(len(order), bool)
        new[1:] = (start[order][1:] >= reached[:-1]) | (np.diff(context[order]) != 0)
        stretch = np.empty(len(order), np.int64)
        stretch[order] = np.cumsum(new) - 1
        starts = start[order][new]
        last = np.append(np.flatnonzero(new)[1:], len(order)) - 1
        lengths = reached[last] - starts if len(order) else np.zeros(0, np.int64)
        offset = np.cumsum(lengths) - lengths
        at = offset[stretch] + start - starts[stretch]
        return cls(starts, lengths, at, stop - start, places - start, context_length)

    def strings(self, contexts: ContextTable, strings: Strings) -> np.ndarray:
        """[P] number of each pooled token's string."""
        context, first = np.divmod(self.starts, self.context_length)
        pool = np.zeros(self.length, np.int64)
        at = 0
        for begin in range(0, len(context), READ):
            part = slice(begin, begin + READ)
            distinct, which = np.unique(context[part], return_inverse=True)
            rows = contexts[distinct]
            for row, start, length in zip(which, first[part], self.lengths[part], strict=True):
                pieces = strings.text.pieces(rows[row, start : start + length].tolist())
                pool[at : at + length] = [strings.number(piece) for piece in pieces]
                at += length
        return pool.astype(np.uint16 if len(strings.texts) <= 65_536 else np.uint32)


def _first_half(latents: np.ndarray) -> np.ndarray:
    """Mask of the even-numbered entries of each latent, so that both kinds of samples stay.

    >>> _first_half(np.array([4, 4, 4, 7, 7])).tolist()
    [True, False, True, True, False]
    """
    nth = np.arange(len(latents)) - np.searchsorted(latents, latents)
    return nth % 2 == 0


def _sample_columns(catalogue: Catalogue, shown: np.ndarray, stretches: Stretches) -> dict[str, np.ndarray]:
    """Samples, and the shades around them as (offset in the stretch, level of 255 of the latent's largest)."""
    samples = catalogue.samples
    latents = samples.latents[shown]
    shades = samples.shades[shown]
    sample, column = np.nonzero(shades)
    level = np.rint(255 * shades[sample, column].astype(np.float32) / catalogue.largest[latents[sample]])
    first = REACH - stretches.sample_focus[sample]
    quantile = np.nan_to_num(samples.quantiles[shown] * 254, nan=255).astype(np.uint8)
    return {
        "sampleBounds": np.searchsorted(latents, np.arange(len(catalogue.group) + 1)).astype(np.uint32),
        "sampleAt": stretches.sample_at.astype(np.uint32),
        "sampleLength": stretches.sample_lengths.astype(np.uint8),
        "sampleFocus": stretches.sample_focus.astype(np.uint8),
        "sampleValue": samples.values[shown],
        "sampleQuantile": quantile,
        "shadeBounds": np.searchsorted(sample, np.arange(len(shown) + 1)).astype(np.uint32),
        "shadeAt": (column - first).astype(np.uint8),
        "shadeLevel": np.clip(level, 1, 255).astype(np.uint8),
    }
