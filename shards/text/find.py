"""Where a regular expression matches in the text of a split, and the rows whose tokens overlap a match.

Shapes: n rows, C contexts of T tokens.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from common.errors import InputError, shown
from common.tokens import TokenText, printable
from shards.layout import windows
from shards.text.tokens import ContextTable

READ = 512
"""Contexts read together: a file of the store."""
EXCERPTS, AROUND, WIDEST = 10, 60, 200
"""Matches that are kept to look at; characters kept either side of one, and of itself."""
ESCAPED = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are no character."""


class Places(Protocol):
    """The part of `shards.StoreSplit` that is searched; only text is read, no activation."""

    @property
    def contexts(self) -> ContextTable: ...

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]: ...


class Excerpt(NamedTuple):
    """A match and the text around it."""

    context: int
    """Number of the context in its split."""
    before: str
    match: str
    after: str


@dataclass
class Found:
    """The rows of a split whose tokens a pattern matches."""

    pattern: str
    mask: np.ndarray
    """[n] bool, whether a row's token overlaps a match; n: rows that were searched."""
    matches: int = 0
    """Number of matches that have a row; a match may have several rows, and a row several matches."""
    excerpts: list[Excerpt] = field(default_factory=list, repr=False)
    """The first matches with the text around them, at most ten."""

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the rows in the split, int64, ascending."""
        return np.flatnonzero(self.mask)

    def __repr__(self) -> str:
        return (
            f"Found({shown(self.pattern)}: {int(self.mask.sum()):,} of {len(self.mask):,} rows, "
            f"{self.matches:,} matches)"
        )

    def _repr_html_(self) -> str:
        def cell(text: str) -> str:
            return html.escape(printable(text))

        lines = "".join(
            f"<tr><td>{each.context}</td><td style='text-align:left'>{cell(each.before)}"
            f"<mark>{cell(each.match)}</mark>{cell(each.after)}</td></tr>"
            for each in self.excerpts
        )
        head = "<tr><th>context</th><th style='text-align:left'>the first matches</th></tr>" * bool(lines)
        return f"<code>{html.escape(repr(self))}</code><table>{head}{lines}</table>"


def find(
    split: Places, text: TokenText, pattern: str | re.Pattern[str], group: int | str, n_rows: int
) -> Found:
    """What `StoreSplit.find` gives, of the split's first `n_rows` rows.

    Two bytes of bookkeeping a token are held, and READ contexts of text.
    """
    regex = _compiled(pattern, group)
    covered = np.zeros(split.contexts.shape, bool)
    for window in windows(n_rows):
        covered[split.provenance(window.start, window.stop)] = True
    hit, found = np.zeros_like(covered), Found(regex.pattern, np.zeros(n_rows, bool))
    searched = np.flatnonzero(covered.any(1))
    for start in range(0, len(searched), READ):
        numbers = searched[start : start + READ]
        for number, ids in zip(numbers.tolist(), split.contexts[numbers].tolist(), strict=True):
            context = ContextText(ids, text)
            for first, last in context.spans(regex, group):
                tokens = context.tokens(first, last)
                if not covered[number, tokens].any():
                    continue
                hit[number, tokens] = True
                found.matches += 1
                if len(found.excerpts) < EXCERPTS:
                    found.excerpts.append(context.excerpt(number, first, last))
    for window in windows(n_rows):
        found.mask[window.start : window.stop] = hit[split.provenance(window.start, window.stop)]
    return found


class ContextText:
    """The text of a context, and which tokens its characters are of.

    A byte that is part of no character is one character, U+FFFD.
    """

    def __init__(self, ids: list[int], text: TokenText) -> None:
        pieces = [text.bytes_of(token) for token in ids]
        data = b"".join(pieces)
        self.ends = np.cumsum([len(piece) for piece in pieces])
        """[T] bytes of the text up to the end of each token."""
        self.starts = np.concatenate([[0], self.ends[:-1]])
        decoded = data.decode("utf-8", "surrogateescape")
        self._offsets = None if decoded.isascii() else _byte_offsets(decoded)
        self.text = decoded if decoded.isascii() else ESCAPED.sub("\ufffd", decoded)

    def spans(self, regex: re.Pattern[str], group: int | str) -> Iterator[tuple[int, int]]:
        """(first, after the last) character of each match, of those that are not empty."""
        for match in regex.finditer(self.text):
            first, last = match.span(group)
            if first < last:
                yield first, last

    def tokens(self, first: int, last: int) -> slice:
        """The tokens that characters [first, last) are of, wholly or in part."""
        if self._offsets is not None:
            first, last = int(self._offsets[first]), int(self._offsets[last])
        return slice(
            int(np.searchsorted(self.ends, first, "right")), int(np.searchsorted(self.starts, last, "left"))
        )

    def excerpt(self, number: int, first: int, last: int) -> Excerpt:
        """Characters [first, last) with what is around them."""
        match = self.text[first:last]
        if len(match) > WIDEST:
            match = f"{match[:WIDEST]}…"
        return Excerpt(
            number, self.text[max(first - AROUND, 0) : first], match, self.text[last : last + AROUND]
        )


def _byte_offsets(decoded: str) -> np.ndarray:
    """[characters + 1] where each character begins in the UTF-8 that it was decoded from, and where the last ends.

    >>> _byte_offsets("aé€\\udce2b").tolist()  # 1, 2, 3 bytes, one that is no character, 1
    [0, 1, 3, 6, 7, 8]
    """
    points = np.frombuffer(decoded.encode("utf-32-le", "surrogatepass"), "<u4")
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    sizes[(points >= 0xDC80) & (points <= 0xDCFF)] = 1
    return np.concatenate([[0], np.cumsum(sizes)])


def _compiled(pattern: str | re.Pattern[str], group: int | str) -> re.Pattern[str]:
    """The compiled pattern; `InputError` if it is not a regular expression, or has no such group."""
    given = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not isinstance(given, str):
        raise InputError(f"pattern: expected a regular expression for text (str), found {shown(given)}")
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"pattern {shown(given)}: not a regular expression: {error}") from error
    known = isinstance(group, str) and group in regex.groupindex
    if not known and not (isinstance(group, int) and 0 <= group <= regex.groups):
        raise InputError(
            f"group: expected 0 to {regex.groups} or a name in the pattern {shown(given)}, found {shown(group)}"
        )
    return regex
