"""A latent's strongest contexts, as a notebook shows them."""

import html
from typing import NamedTuple

import numpy as np

from common.tokens import PART, printable

SHADE = "rgba(255, 140, 0, {:.2f})"
"""Behind a token, by its share of the largest activation shown; the letters keep the notebook's colour."""


class Context(NamedTuple):
    """A row on which a latent fires, and the text around it. m tokens."""

    row: int
    """Its number in the split."""
    activation: float
    context: int
    """Number of its context in the split."""
    position: int
    """In the context."""
    focus: int
    """Number of the row's own token among `tokens`."""
    tokens: list[str]
    """[m] A character that is split over tokens stands at the one that completes it; the others are empty."""
    activations: np.ndarray
    """[m] float32 of the latent; 0 where it does not fire, and at tokens without a row."""

    def __str__(self) -> str:
        """The text in one line, the row's own token in brackets."""
        parts = [f"[{each}]" if i == self.focus else each for i, each in enumerate(self.tokens)]
        return printable("".join(parts))


class Contexts(list[Context]):
    """Of one latent, strongest first, each of another context."""

    def __init__(self, latent: int, firings: int, rows: int) -> None:
        super().__init__()
        self.latent, self.firings, self.rows = latent, firings, rows
        """Rows on which it fires, of how many."""

    def __repr__(self) -> str:
        lines = [f"{each.activation:8.3g}  {each}" for each in self]
        return "\n".join([self._title, *lines])

    @property
    def _title(self) -> str:
        return f"latent {self.latent}: fires on {self.firings:,} of {self.rows:,} rows"

    def _repr_html_(self) -> str:
        largest = max((float(each.activations.max()) for each in self), default=0.0)
        lines = "".join(
            f"<tr><td>{each.activation:.3g}</td><td style='text-align:left'>{_text(each, largest)}</td></tr>"
            for each in self
        )
        head = "<tr><th>activation</th><th style='text-align:left'>strongest contexts</th></tr>" * bool(lines)
        return f"<code>{html.escape(self._title)}</code><table>{head}{lines}</table>"


def _text(context: Context, largest: float) -> str:
    """HTML of the tokens, shaded by activation; the row's own is bold."""
    parts = []
    for i, (token, value) in enumerate(zip(context.tokens, context.activations.tolist(), strict=True)):
        text = html.escape(printable(token) if token else PART * (value > 0))
        if value > 0:
            text = (
                f"<span style='background:{SHADE.format(value / largest)}' title='{value:.3g}'>{text}</span>"
            )
        parts.append(f"<b>{text}</b>" if i == context.focus else text)
    return "".join(parts)
