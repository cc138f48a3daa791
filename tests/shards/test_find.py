"""Rows by the text that they stand on: exact for every byte, row and window, against slow readings of the same text."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.errors import InputError
from common.tokens import TokenText
from shards import Store
from shards.layout import SHARD_ROWS
from shards.text.find import ContextText, find
from tests.fixtures import make_store
from tests.models import save_tokenizer

TEXTS = (
    "the red river: 5 € for naïve 日本 cats",
    "a café under the 🦉 river’s stone",
    "rivers fall, the Río sings over 東京",
)


def zeros(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, 2), np.float32), np.zeros((n, 2), np.float32)


class Words:
    """Token i adds the bytes words[i]."""

    def __init__(self, words: list[bytes]) -> None:
        self.words = words

    def bytes_of(self, token: int) -> bytes:
        return self.words[token]


PIECE = st.one_of(
    st.sampled_from(
        [b"a", b"b ", b"\xe2", b"\x82", b"\xac", b"\xc3\xa9", b"\xf0\x9f", b"\xa6\x89", b"x\xe2"]
    ),
    st.binary(max_size=3),
    st.text("aé€🦉 ", max_size=2).map(str.encode),
)


@given(
    words=st.lists(PIECE, max_size=12),
    pattern=st.sampled_from(["a", ".", "€|é", r"\w+", "\ufffd", "(?s).{2}", "b "]),
)
def test_a_match_has_the_tokens_of_its_bytes(words: list[bytes], pattern: str) -> None:
    """Slowly: every byte has a character and a token."""
    text = ContextText(list(range(len(words))), Words(words))  # pyright: ignore[reportArgumentType]
    decoded = b"".join(words).decode("utf-8", "surrogateescape")
    token_of = [number for number, word in enumerate(words) for _ in word]
    at, tokens_of_character = 0, []
    for character in decoded:
        size = len(character.encode("utf-8", "surrogateescape"))
        tokens_of_character.append(set(token_of[at : at + size]))
        at += size
    assert len(text.text) == len(decoded)
    for match in re.finditer(pattern, re.sub("[\udc80-\udcff]", "\ufffd", decoded)):
        found = range(len(words))[text.tokens(*match.span())]
        touched = set().union(*tokens_of_character[match.start() : match.end()])
        assert {token for token in found if words[token]} == touched
        assert not touched or {min(touched), max(touched)} <= set(found) <= set(
            range(min(touched), max(touched) + 1)
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A window and a bit of random words; a window ends in the middle of a context."""
    return make_store(
        tmp_path_factory.mktemp("find") / "s.zarr",
        zeros(SHARD_ROWS + 3000),
        zeros(1500),
        context_length=12,
        vocabulary=["<s>", "</s>", *"abcdefgh"],
    )


def words_of(store: Store, split: str = "train") -> np.ndarray:
    return np.array(["<s>", "</s>", *"abcdefgh"])[store.split(split).contexts[:]]


@pytest.mark.parametrize("rows", [None, 1, 700, SHARD_ROWS - 5, SHARD_ROWS, SHARD_ROWS + 2000])
def test_rows_across_windows_and_chunks(store: Store, rows: int | None) -> None:
    """`c d` in one context, never from one to the next; rows in any order are those of its places."""
    assert SHARD_ROWS % 11
    found = store.train.find("c d", rows=rows)
    n = len(store.train) if rows is None else rows
    words = words_of(store)
    begins = np.zeros(words.shape, bool)
    begins[:, :-1] = (words[:, :-1] == "c") & (words[:, 1:] == "d")
    begins[:, 0] = False
    of_match = begins.copy()
    of_match[:, 1:] |= begins[:, :-1]
    context, position = store.train.provenance(0, n)
    assert np.array_equal(found.mask, of_match[context, position])
    assert np.array_equal(found.rows, np.flatnonzero(found.mask))
    here = np.zeros(words.shape, bool)
    here[context, position] = True
    assert found.matches == int((begins & (here | np.roll(here, -1, 1))).sum())
    assert rows == 1 or len(found.excerpts) == 10
    assert all(each.match == "c d" for each in found.excerpts)


def test_tokens_are_those_of_the_rows(store: Store) -> None:
    ids, texts = store.heldout.tokens(3, 1400)
    context, position = store.heldout.provenance(3, 1400)
    words = words_of(store, "heldout")[context, position]
    assert texts == [f" {word}" for word in words]
    assert ids.dtype == np.int32
    assert np.array_equal(store.heldout.find(" a").mask[3:1400], ids == 2)
    assert store.heldout.tokens(5, 5).texts == []
    with pytest.raises(InputError, match=r"rows 0 to 1501: expected 0 <= start <= stop <= 1500"):
        store.heldout.tokens(0, 1501)


def test_the_part_of_a_match_that_counts(store: Store) -> None:
    """A group, by number or name, and what stands before it, are the same rows."""
    before = store.find(r"(?<= a) \w").mask
    assert before.any()
    assert np.array_equal(store.find(r" a(?=( \w))", group=1).mask, before)
    assert np.array_equal(
        store.find(re.compile(" A(?=(?P<next> [A-H]))", re.IGNORECASE), group="next").mask, before
    )
    assert not store.find(" a(x)?", group=1).mask.any()  # a group that is no part of any match


def test_what_has_no_row_is_no_match(store: Store) -> None:
    """The first token, <s>, is part of the text; alone it has no row, and an empty match has none."""
    assert store.find("<s>").matches == 0
    assert not store.find("x*").mask.any()
    assert store.find("<s> [a-h]").matches == len(store.heldout.contexts)
    first = store.find("<s> [a-h]").rows
    assert set(store.heldout.provenance(0, 1500)[1][first].tolist()) == {1}


def test_what_is_shown_is_escaped(tmp_path: Path) -> None:
    vocabulary = ["<s>", "</s>", "<script>", "\x1b[2J"]
    store = make_store(tmp_path / "s.zarr", zeros(100), zeros(40), vocabulary=vocabulary)
    found = store.find("script|J")
    assert repr(found) == f"Found('script|J': 40 of 40 rows, {found.matches} matches)"
    page = found._repr_html_()
    assert "<script" not in page
    assert "&lt;<mark>script</mark>&gt;" in page
    assert "\x1b" not in page
    assert "<table></table>" in store.find("absent")._repr_html_()


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (
            "(a",
            {},
            r"pattern '\(a': not a regular expression: missing \), unterminated subpattern at position 0",
        ),
        ("a{99999999999}", {}, r"pattern 'a\{9+\}': not a regular expression: the repetition number"),
        (b"a", {}, "pattern: expected a regular expression for text .str., found b'a'"),
        (re.compile(b"a"), {}, "pattern: expected a regular expression for text"),
        ("a(b)", {"group": 2}, r"group: expected 0 to 1 or a name in the pattern 'a\(b\)', found 2"),
        ("a(?P<b>b)", {"group": "c"}, "found 'c'"),
        ("a", {"split": "test"}, "split: expected train or heldout, found 'test'"),
        ("a", {"rows": 1501}, "rows: expected 1 to 1500, those of the split, found 1501"),
        ("a", {"rows": 0}, "rows: expected 1 to 1500"),
    ],
)
def test_what_cannot_be_searched_for(store: Store, pattern: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        store.find(pattern, **options)


@dataclass
class Written:
    """TEXTS, a context each behind a token without a row, its rows in some order."""

    tokenizer: Tokenizer
    contexts: np.ndarray
    places: np.ndarray
    """[n, 2]"""

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.places[start:stop, 0], self.places[start:stop, 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """By a tokenizer that knows none of their letters but the plainest."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    contexts = np.full((len(TEXTS), 96), 2)
    for number, text in enumerate(TEXTS):
        ids = [0, *tokenizer.encode(text).ids]
        contexts[number, : len(ids)] = ids
    places = np.random.default_rng(0).permutation(np.argwhere(contexts > 2))
    return Written(tokenizer, contexts, places)


@pytest.mark.parametrize(
    "pattern", ["river", "€", "é", "🦉", "日本|東京", r"\w+’s", "í", "the r", " ", r"(?i)R[ií]"]
)
def test_characters_that_are_split_over_tokens(written: Written, pattern: str) -> None:
    """The tokenizer's own offsets say which characters a token is of; a split character is of all its tokens."""
    expected, matches = np.zeros(written.contexts.shape, bool), 0
    for number, text in enumerate(TEXTS):
        for match in re.finditer(pattern, text):
            matches += 1
            for at, (first, last) in enumerate(written.tokenizer.encode(text).offsets):
                expected[number, 1 + at] |= first < match.end() and last > match.start()
    n = len(written.places)
    found = find(written, TokenText(written.tokenizer), pattern, 0, n)
    assert np.array_equal(found.mask, expected[written.provenance(0, n)])
    assert found.matches == matches > 0
