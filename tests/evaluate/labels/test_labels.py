"""Planted latents: the words of their labels, and precision and recall counted one row at a time."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from common.tokens import TokenText
from evaluate.labels import choose as choosing
from evaluate.labels.choose import Labels, choose, for_measuring
from evaluate.labels.measured import Measured, Quality
from evaluate.labels.read import label_texts
from evaluate.labels.words import Words, windows
from evaluate.metrics.contexts import N_LABEL, Best, lottery, on_device
from transcoder.entries import entries_above

PIECES = [
    "<bos>",
    "Ġthe",
    "Ġof",
    ",",
    "Ġcity",
    "ĠCity",
    "Ġrare",
    "ĠBer",
    "lin",
    "Ġdub",
    "ĠUniversity",
    "ĠNew",
]
PIECES += ["ĠUS", "Ġus", "Ã", *(f"Ġw{chr(97 + n)}" for n in range(20))]
THE, OF, COMMA, CITY, CAPITAL, RARE, BER, LIN, DUB, UNIVERSITY, NEW, US, LITTLE_US, PART = range(1, 15)
C, T = 160, 33


class Split(NamedTuple):
    """All rows of `contexts` but the first token of each, in another order."""

    contexts: np.ndarray
    context: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.context)

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.context[start:stop], self.position[start:stop]


class Planted(NamedTuple):
    labels: Labels
    quality: Quality
    texts: list[list[str]]
    acts: np.ndarray
    """[C, T, F]"""
    tokens: np.ndarray
    """[C, T]"""


@pytest.fixture(scope="module")
def text() -> TokenText:
    tokenizer = Tokenizer(WordLevel({piece: n for n, piece in enumerate(PIECES)}, unk_token="<bos>"))
    tokenizer.decoder = ByteLevel()
    return TokenText(tokenizer)


def planted_text(rng: np.random.Generator) -> np.ndarray:
    frequent = np.array(
        [THE, THE, THE, OF, OF, COMMA, COMMA, CITY, CITY, CAPITAL, NEW, UNIVERSITY, US, LITTLE_US]
    )
    tokens = rng.choice(np.concatenate([frequent, np.arange(15, len(PIECES))]), (C, T)).astype(np.int32)
    tokens[:, 0] = 0
    for first, second, many in ((BER, LIN, 200), (DUB, LIN, 200), (UNIVERSITY, OF, 200), (RARE, COMMA, 5)):
        at = rng.permutation(C * (T // 2))[:many]
        tokens[at // (T // 2), 1 + 2 * (at % (T // 2))] = first
        tokens[at // (T // 2), 2 + 2 * (at % (T // 2))] = second
    return tokens


@pytest.fixture(scope="module")
def planted(text: TokenText) -> Planted:
    rng = np.random.default_rng(3)
    tokens = planted_text(rng)
    before = np.roll(tokens, 1, axis=1)
    conditions = [
        (tokens == LIN) & (before == BER),
        (tokens == OF) & (before == UNIVERSITY),
        before == NEW,
        (tokens == CITY) | (tokens == CAPITAL),
        ((tokens == CITY) & (rng.random((C, T)) < 0.5)) | ((tokens == THE) & (rng.random((C, T)) < 0.15)),
        tokens == RARE,
        np.zeros((C, T), bool),
        tokens == US,
        tokens == BER,
        rng.random((C, T)) < 0.6,
    ]
    acts = np.stack(conditions, -1) * rng.uniform(0.5, 2, (C, T, len(conditions))).astype(np.float32)
    acts[:, 0] = 0  # no rows
    order = rng.permutation(C * (T - 1))
    split = Split(tokens, order // (T - 1), 1 + order % (T - 1))
    best = Best(acts.shape[-1], N_LABEL)
    entries = entries_above(torch.from_numpy(acts[split.context, split.position]), 0.0)
    place = split.context * T + split.position
    drawn, places, token = on_device(
        torch.device("cpu"), lottery(np.arange(len(order))), place, tokens.ravel()[place]
    )
    best.add(entries, drawn[entries.rows], places, token)
    best.finish()
    firings = np.bincount(entries.latents.numpy(), minlength=acts.shape[-1])
    words = Words(text, tokens)
    labels = choose(best, firings, split, len(order), words)  # type: ignore[arg-type]
    measured = Measured(labels, tokens, words)
    for start in range(0, len(order), 1000):
        where = split.provenance(start, start + 1000)
        measured.add(*where, entries_above(torch.from_numpy(acts[where]), 0.0))
    return Planted(labels, measured.result(), label_texts(labels.tokens, labels.kinds, text), acts, tokens)


@pytest.mark.parametrize(
    ("latent", "label"),
    [
        (0, ["Berlin"]),  # and not dublin, whose second token is the same
        (1, ["University of"]),
        (2, ["New …"]),
        (3, ["city"]),  # City and city are one word
        (4, ["city", "the"]),  # though the has more of its activation
        (5, ["rare"]),
        (6, []),
        (7, ["US"]),  # us does not belong to it
        (8, ["Ber…"]),
    ],
)
def test_labels_name_what_was_planted(planted: Planted, latent: int, label: list[str]) -> None:
    assert planted.texts[latent][: len(label)] == label
    assert len(planted.texts[latent]) == len(label) or latent in (2, 4)


def test_precision_and_recall_are_those_of_the_measured_rows(planted: Planted) -> None:
    tokens, acts = planted.tokens, planted.acts
    before = np.roll(tokens, 1, axis=1)
    row = for_measuring(np.arange(C))[:, None] & (np.arange(T) > 0)
    assert planted.quality.rows == row.sum()
    holds = {
        0: (tokens == LIN) & (before == BER),
        1: (tokens == OF) & (before == UNIVERSITY),
        3: (tokens == CITY) | (tokens == CAPITAL),
        7: tokens == US,
    }
    for f, hold in holds.items():
        fires, value = acts[row, f] > 0, acts[row, f].astype(float)
        assert (planted.quality.held[f], planted.quality.fired[f]) == (hold[row].sum(), fires.sum())
        assert planted.quality.precision[f] == pytest.approx((hold[row] & fires).sum() / hold[row].sum())
        assert planted.quality.recall[f] == pytest.approx((hold[row] & fires).sum() / fires.sum())
        assert planted.quality.activation_recall[f] == pytest.approx(
            value[hold[row]].sum() / value.sum(), rel=1e-5
        )
    assert planted.quality.precision[[0, 1, 3, 7]].tolist() == [1.0] * 4
    assert planted.labels.kinds[2, 0] == choosing.AFTER


def test_several_words_count_each_row_once(planted: Planted) -> None:
    """Latent 2's label has a word before, and a word that stands after it on some rows."""
    f = 2
    assert planted.labels.kinds[f, 0] == choosing.AFTER
    row = for_measuring(np.arange(C))[:, None] & (np.arange(T) > 0)
    fires = planted.acts[row, f] > 0
    assert planted.quality.recall[f] == 1.0
    assert planted.quality.precision[f] <= 1.0
    held = round(fires.sum() / float(planted.quality.precision[f]))
    assert held >= fires.sum()


def test_few_firings_are_said_and_not_measured(planted: Planted) -> None:
    fired = (planted.acts[:, 1:, 5] > 0).sum()
    assert 0 < fired <= 5
    assert planted.labels.firings[5] == fired
    assert not planted.labels.measured[5]
    assert np.isnan(planted.quality.recall[5])
    assert planted.labels.firings[6] == 0
    assert np.isnan(planted.quality.precision[6])


def test_a_latent_that_fires_anywhere_has_a_word_of_little_recall(planted: Planted) -> None:
    assert len(planted.texts[9]) >= 1
    assert planted.labels.firings[9] >= 256
    assert planted.quality.recall[9] < 0.3


def test_blocks_of_latents_give_the_same_labels(
    planted: Planted, text: TokenText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "TOGETHER", 1)
    again = planted_again(planted, text)
    assert np.array_equal(again.tokens[:9], planted.labels.tokens[:9])
    assert np.array_equal(again.kinds[:9], planted.labels.kinds[:9])


def planted_again(planted: Planted, text: TokenText) -> Labels:
    """The labels of the same rows in their order: the sample holds all firings of all but the last latent."""
    order = np.arange(C * (T - 1))
    split = Split(planted.tokens, order // (T - 1), 1 + order % (T - 1))
    acts = planted.acts[split.context, split.position]
    entries = entries_above(torch.from_numpy(acts), 0.0)
    best = Best(acts.shape[-1], 1 << 20)
    drawn, places = on_device(
        torch.device("cpu"), lottery(np.arange(len(order))), split.context * T + split.position
    )
    best.add(entries, drawn[entries.rows], places, places)
    best.finish()
    firings = np.bincount(entries.latents.numpy(), minlength=10)
    return choose(best, firings, split, len(order), Words(text, planted.tokens))  # type: ignore[arg-type]


def test_a_character_cut_in_two_is_shown_in_hexadecimal(text: TokenText) -> None:
    tokens = np.full((1, 1, 8), -1, np.int32)
    tokens[0, 0, 0] = PART
    assert label_texts(tokens, np.array([[1]], np.uint8), text) == [["<C3>"]]


def test_words_are_not_longer_than_their_context(text: TokenText) -> None:
    tokens = np.array([[0, BER, LIN, BER, LIN, LIN, LIN, LIN, LIN]], np.int32)
    standing = Words(text, tokens).standing(windows(tokens, np.zeros(4, int), np.array([1, 2, 4, 8])))
    assert standing.length.tolist() == [1, 2, 2, 4]
    assert standing.word[1] == standing.word[2]  # Berlin both times
    assert standing.before[0] == standing.before[1] != 0  # <bos>
    first = Words(text, tokens).standing(windows(tokens, np.zeros(1, int), np.zeros(1, int)))
    assert first.before.tolist() == [0]
