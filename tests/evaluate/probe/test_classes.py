"""Classes of tokens, each on tokens written down here."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from common.tokens import TokenText
from evaluate.probe.classes import UNASKED, class_tasks, first_letters, token_tasks, word_starts

PIECES = [
    "<s>",
    "ĠThe",
    "the",
    "Ġ",
    "12",
    "ĠB2",
    "!",
    "Ġ$",
    "Ġna",
    "ïve",
    "Ã",
    "ÐĻ",
    "Ċ",
    "ing",
    "'s",
    "Ġlow",
    "ä¸Ń",
]
"""The, the, a space, 12, B2, !, $, na, ïve as bytes of no character (0xEF 'v' 'e'), half a character, Й, a line, 中"""
THE, LOWER, SPACE, DIGITS, MIXED, MARK, DOLLAR, NA, BROKEN, HALF, CYRILLIC, LINE, ING, ENDING, LOW, HAN = (
    range(1, 17)
)


@pytest.fixture(scope="module")
def text() -> TokenText:
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<s>"))
    tokenizer.decoder = ByteLevel()
    return TokenText(tokenizer)


def answers(text: TokenText, previous: int = UNASKED) -> dict[str, dict[int, int]]:
    """Family and class -> token -> label, of those that are asked; every piece once after the token `previous`."""
    token = np.arange(1, len(PIECES))
    tasks = token_tasks(text, token, np.full(len(token), previous))
    assert all(task.labels.dtype == np.int8 and task.labels.shape == token.shape for task in tasks)
    return {
        f"{task.family} {task.name}".strip(): {
            t: int(label) for t, label in zip(token.tolist(), task.labels, strict=True) if label != UNASKED
        }
        for task in tasks
    }


def test_classes_of_a_tokens_own_text(text: TokenText) -> None:
    found = answers(text)
    letters = {THE: 1, LOWER: 0, MIXED: 1, NA: 0, CYRILLIC: 1, ING: 0, LOW: 0}
    assert found["capitalised"] == letters  # 中 has no case, 's begins with none
    words = dict.fromkeys((THE, LOWER, NA, CYRILLIC, ING, LOW, HAN), 0)
    assert found["digit"] == words | {DIGITS: 1, MARK: 0, DOLLAR: 0, ENDING: 0}  # B2 is half a number
    assert found["punctuation"] == words | {DIGITS: 0, MIXED: 0, MARK: 1, DOLLAR: 1}  # 's is half of it
    assert found["script Cyrillic"] == {
        THE: 0,
        LOWER: 0,
        MIXED: 0,
        NA: 0,
        CYRILLIC: 1,
        ING: 0,
        LOW: 0,
        HAN: 0,
        ENDING: 0,
    }
    assert {"script Latin", "script Cjk"} < set(found)


def test_a_text_of_one_script_has_no_question_of_scripts(text: TokenText) -> None:
    token = np.array([THE, LOWER, CYRILLIC, LOW])
    previous = np.full(4, SPACE)
    assert [t.name for t in token_tasks(text, token, previous) if t.family == "script"] == ["Cyrillic"]
    token[2] = NA
    assert [t.name for t in token_tasks(text, token, previous) if t.family == "script"] == []


@pytest.mark.parametrize(
    ("token", "before", "starts"),
    [
        (THE, LOWER, 1),
        (THE, UNASKED, 1),
        (LOWER, UNASKED, UNASKED),
        (LOWER, NA, 0),
        (LOWER, DIGITS, 0),
        (LOWER, MARK, 1),
        (LOWER, SPACE, 1),
        (LOWER, LINE, 1),
        (LOWER, HALF, UNASKED),
        (DIGITS, SPACE, UNASKED),
        (HALF, SPACE, UNASKED),
    ],
)
def test_where_a_word_starts(text: TokenText, token: int, before: int, starts: int) -> None:
    assert word_starts(text, np.array([token]), np.array([before])).tolist() == [starts]


def test_first_letters_are_of_words_of_ascii_letters(text: TokenText) -> None:
    token = np.array([THE, LOWER, LOWER, NA, MIXED, CYRILLIC, LOW, ENDING])
    previous = np.array([UNASKED, SPACE, NA, UNASKED, UNASKED, SPACE, UNASKED, LOW])
    t, n, low = (ord(letter) - ord("a") for letter in "tnl")
    assert first_letters(text, token, previous).tolist() == [t, t, -1, n, -1, -1, low, -1]
    found = {
        task.name: task.labels.tolist()
        for task in token_tasks(text, token, previous)
        if task.family == "first letter"
    }
    assert found == {
        "t": [1, 1, -1, 0, -1, -1, 0, -1],
        "n": [0, 0, -1, 1, -1, -1, 0, -1],
        "l": [0, 0, -1, 0, -1, -1, 1, -1],
    }


def test_of_two_classes_one_is_asked_for_and_of_one_none() -> None:
    number = np.array([0, 2, UNASKED, 2])
    (task,) = class_tasks("source", ["a", "b", "c"], number)
    assert (task.name, task.labels.tolist()) == ("a", [1, 0, UNASKED, 0])
    assert class_tasks("source", ["a", "b", "c"], np.array([2, 2])) == []
