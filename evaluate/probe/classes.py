"""What is asked of a row: classes of its token, and classes of its document.

Shapes: n rows, V tokens of the vocabulary that occur.
"""

import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from common.tokens import TokenText

UNASKED = -1
"""In labels: a row of neither class. In tokens before a row: none is known."""
LETTERS = string.ascii_lowercase
MOST = 50
"""Classes of one question, those with the most rows: each takes seconds to probe."""


class Task(NamedTuple):
    """A question with two answers."""

    family: str
    """What tables sum it up under: "first letter"."""
    name: str
    """The class, "a": rows of it against rows of the others."""
    labels: np.ndarray
    """[n] int8: 1 of the class, 0 of the others, UNASKED of neither."""


def token_tasks(text: TokenText, token: np.ndarray, previous: np.ndarray) -> list[Task]:
    """Every question about the tokens of rows; `previous` [n]: the ids before them in the text, UNASKED where unknown.

    capitalised: the first letter is one; asked of tokens that begin with a letter that has both cases.
    digit, punctuation: of tokens that consist of digits, of punctuation and symbols (Unicode's P and S), against
    tokens that hold none. word start: see `word_starts`. first letter: see `first_letters`; each against the others.
    script: of tokens whose letters are all of one alphabet; asked only where a text has several.
    """
    starts, letter = word_starts(text, token, previous), first_letters(text, token, previous)
    alone = [("capitalised", _capital), ("digit", _digits), ("punctuation", _punctuation)]
    tasks = [Task(name, "", _by_token(text, token, answer)) for name, answer in alone]
    tasks.append(Task("word start", "", starts))
    tasks += class_tasks("first letter", LETTERS, letter)
    return [*tasks, *_script_tasks(text, token)]


def class_tasks(family: str, names: Sequence[str], number: np.ndarray) -> list[Task]:
    """Each class that occurs against all others, the `MOST` with the most rows; of two classes one question, as the
    other one is its reverse.

    `number` [n]: of each row's class among `names`, UNASKED for none.
    """
    counts = np.bincount(number[number != UNASKED], minlength=len(names))
    there = np.flatnonzero(counts)
    if len(there) < 2:
        return []
    largest = there[np.argsort(-counts[there], kind="stable")][:MOST]
    asked: list[int] = (there[:1] if len(there) == 2 else np.sort(largest)).tolist()
    return [
        Task(family, names[c], np.where(number == UNASKED, UNASKED, number == c).astype(np.int8))
        for c in asked
    ]


def word_starts(text: TokenText, token: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """[n] int8: 1 if a word begins with the token, 0 if it goes on with it; asked of tokens that begin with a letter.

    A word begins after a space, and after whatever is no letter or digit. Without a space in the token, and where
    the token before is not known, it is not asked.
    """
    spaced = _by_token(text, token, _spaced)  # UNASKED where no letter is first
    before = np.where(previous == UNASKED, UNASKED, _by_token(text, previous, _ends_in_word))
    follows = np.where(before == UNASKED, UNASKED, 1 - before)
    return np.where(spaced == 0, follows, spaced).astype(np.int8)


def first_letters(text: TokenText, token: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """[n] int8: 0 to 25 for a to z, in either case, of tokens of ASCII letters that begin a word; UNASKED otherwise.

    These are the tokens and the classes of Chanin et al. 2024 (arXiv:2409.14507), but for the words' later tokens.
    """
    letter = _by_token(text, token, _letter)
    return np.where(word_starts(text, token, previous) == 1, letter, UNASKED).astype(np.int8)


def _by_token(text: TokenText, token: np.ndarray, answer: Callable[[str], int]) -> np.ndarray:
    """`answer` to each token's text, [n] int8; UNASKED for a negative token, and one that is part of a character."""
    distinct, which = np.unique(token, return_inverse=True)
    return np.asarray([answer(_whole(text, each)) for each in distinct.tolist()], np.int8)[which]


def _script_tasks(text: TokenText, token: np.ndarray) -> list[Task]:
    distinct, which = np.unique(token, return_inverse=True)
    of_each = [_script(_whole(text, each)) for each in distinct.tolist()]
    names = sorted({*of_each} - {""})
    number = [names.index(each) if each else UNASKED for each in of_each]
    return class_tasks("script", names, np.asarray(number, np.int16)[which])


def _whole(text: TokenText, token: int) -> str:
    try:
        return text.bytes_of(token).decode() if token >= 0 else ""
    except UnicodeDecodeError:
        return ""  # which no class has


def _capital(token: str) -> int:
    first = token.lstrip()[:1]
    if not first.isalpha() or first.lower() == first.upper():
        return UNASKED
    return int(first != first.lower())


def _digits(token: str) -> int:
    return _all_or_none([each.isdigit() for each in token.strip()])


def _punctuation(token: str) -> int:
    return _all_or_none([unicodedata.category(each)[0] in "PS" for each in token.strip()])


def _all_or_none(marks: list[bool]) -> int:
    if not marks or any(marks) != all(marks):
        return UNASKED
    return int(marks[0])


def _spaced(token: str) -> int:
    bare = token.lstrip()
    return int(len(bare) < len(token)) if bare[:1].isalpha() else UNASKED


def _ends_in_word(token: str) -> int:
    return int(token[-1].isalnum()) if token else UNASKED


def _letter(token: str) -> int:
    bare = token.strip()
    return LETTERS.index(bare[0].lower()) if bare.isascii() and bare.isalpha() else UNASKED


NO_SCRIPT = {"MODIFIER", "MATHEMATICAL", "FEMININE", "MASCULINE", "MICRO", "SUPERSCRIPT", "SUBSCRIPT"}
"""First words of the names of letters that are of no script."""
KANA = {"KATAKANA-HIRAGANA": "KATAKANA"}


def _script(token: str) -> str:
    """Of a token whose letters are all of one script; otherwise nothing."""
    found = {_script_of(each) for each in token if each.isalpha()}
    return found.pop() if len(found) == 1 else ""


@cache
def _script_of(letter: str) -> str:
    """Latin, Cyrillic, Cjk, ...: the first word of the letter's Unicode name."""
    words = unicodedata.name(letter, "").split()
    if words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    name = words[0] if words else ""
    return "" if name in NO_SCRIPT else KANA.get(name, name).capitalize()
