"""The text of labels: the one place that turns what an evaluation keeps of them into words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.tokens import TokenText
from evaluate.files import latents_of
from evaluate.labels.choose import AFTER, OPEN

ELLIPSIS = "…"
"""Stands for what follows: any word after `AFTER`'s, the rest of an open word."""


def label_words(folder: Path, text: TokenText) -> list[list[str]]:
    """The label of every latent of an evaluation, best words first; none where it never fired."""
    return label_texts(*latents_of(folder, "label_tokens", "label_kinds"), text)


def label_texts(tokens: np.ndarray, kinds: np.ndarray, text: TokenText) -> list[list[str]]:
    """The same of arrays [F, N, WINDOW], [F, N] as `choose.Labels` has them."""
    labels = []
    for own, kind in zip(tokens.tolist(), kinds.tolist(), strict=True):
        words = zip(own, kind, strict=True)
        labels.append(list(dict.fromkeys(_word(part, each, text) for part, each in words if each)))
    return labels


def _word(tokens: list[int], kind: int, text: TokenText) -> str:
    follows = f" {ELLIPSIS}" if kind % OPEN == AFTER else ELLIPSIS if kind >= OPEN else ""
    return spelled([token for token in tokens if token >= 0], text) + follows


def spelled(tokens: Sequence[int], text: TokenText) -> str:
    """Tokens that follow each other as one text, without spaces around it; in hexadecimal what is no character."""
    data = b"".join(map(text.bytes_of, tokens))
    try:
        joined = data.decode()
    except UnicodeDecodeError:
        joined = "".join(map(text.label, tokens))
    return joined.strip(" ") or joined
