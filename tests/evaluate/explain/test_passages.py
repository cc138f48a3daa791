"""Documents, passages, prompts and their replies, and what is reckoned with before anything is asked."""

import doctest
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from common.settings import ROOT
from evaluate.explain import passages, prompts, scores
from evaluate.explain.ask import SENTENCE, Asked
from evaluate.explain.endpoint import Endpoint
from evaluate.explain.passages import SCORED, SHOWN, Text, documents
from evaluate.explain.prompts import explain_prompt, read_explanation, read_verdicts, score_prompt
from evaluate.explain.replies import Replies
from evaluate.explain.tasks import Example, Task
from evaluate.metrics.contexts import REACH
from tests.evaluate.explain.planted import LENGTH, SEPARATOR, make_planted, planted_transcoder
from tests.fixtures import make_source


@pytest.mark.parametrize("module", [passages, prompts, scores])
def test_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_documents_end_at_the_separator() -> None:
    """It belongs to the document that it ends; the first token of a context is none, though GPT-2's BOS is the same."""
    tokens = np.array([[2, 7, 2, 8], [2, 8, 9, 2], [2, 5, 5, 5]])
    source = make_source(3, 3, 9, separator_token_id=2, bos_token_id=2)
    assert documents(tokens, source).tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 2, 2]]
    without = make_source(3, 3, 9, separator_token_id=2, bos_token_id=None)
    assert documents(tokens[:1], without).tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("changes", [{"separator_token_id": None}, {"special_tokens": "parse"}])
def test_where_documents_are_not_known_there_are_blocks_with_gaps(changes: dict[str, object]) -> None:
    source = make_source(3, 3, 9, **changes)
    found = documents(np.zeros((20, 4), int), source)[:, 0].tolist()
    assert found == [0] * 8 + [-1] + [1] * 7 + [-1] + [2] * 3
    many = documents(np.zeros((1000, 4), int), source)[:, 0]
    assert sorted(set(many.tolist())) == [-1, *range(16)]
    assert (many == -1).sum() == 15 * (63 // 8)


@pytest.mark.parametrize("n_rows", [3000, 1000])
def test_a_passage_is_of_one_document_and_known_as_a_whole(tmp_path: Path, n_rows: int) -> None:
    """A third of the rows of a window, in random order, know no passage from end to end: there is none then."""
    store = make_planted(tmp_path, heldout=3000)
    text = Text(store, store.heldout, planted_transcoder(), n_rows)
    flat, fires = text.tokens.ravel(), text.of(4)[0]
    context, position = store.heldout.provenance(0, n_rows)
    known = np.isin(np.arange(flat.size), context.astype(np.int64) * LENGTH + position) | (flat <= SEPARATOR)
    for side in (SHOWN, SCORED):
        firing, silent = text.firing(4, side), text.silent(fires, side, 50, np.random.default_rng(0))
        assert (min(len(firing), len(silent)) >= 10) == (len(firing) + len(silent) > 0) == (n_rows == 3000)
        assert np.isin(firing, fires).all()
        for passage in text.passages([*firing, *silent], 4):
            place, start = passage.place, passage.place // LENGTH * LENGTH
            ends = np.flatnonzero(flat[start : start + LENGTH] <= SEPARATOR) + start
            first = max(place - REACH, ends[ends < place].max() + 1)  # BOS, or the end of the document before
            last = min(place + REACH + 1, start + LENGTH, *ends[ends > place])
            assert passage.pieces == text.text.pieces(flat[first:last].tolist())
            assert known[first:last].all()
            assert (np.flatnonzero(passage.activations) + first).tolist() == fires[
                (fires >= first) & (fires < last)
            ].tolist()
            assert passage.document == (flat[:place] == SEPARATOR).sum()
            assert passage.document % 2 == side
        assert all(passage.activations.max() == 0 for passage in text.passages(silent, 4))


@pytest.mark.parametrize(
    ("reply", "explanation"),
    [
        ("EXPLANATION: capital cities", "capital cities"),
        ("Let me see.\n\n**EXPLANATION:** *capital cities*\n", "capital cities"),
        ("[EXPLANATION]: capital\tcities", "capital cities"),
        ("explanation:\ncapital cities", "capital cities"),
        ("EXPLANATION: draft\nNo.\nEXPLANATION: capital cities", "capital cities"),
        ("<think>EXPLANATION: draft</think>EXPLANATION: capital cities", "capital cities"),
        ("<think>EXPLANATION: draft</think>I cannot say.", None),
        ("I'm sorry, but I can't help with that.", None),
        ("EXPLANATION:", None),
        ("EXPLANATION: **", None),
        ("", None),
    ],
)
def test_what_is_read_as_an_explanation(reply: str, explanation: str | None) -> None:
    assert read_explanation(reply) == explanation


@pytest.mark.parametrize(
    ("reply", "verdicts"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ("```json\n[1,0,1]\n```", [1, 0, 1]),
        ("[true, False, 1]", [1, 0, 1]),
        ('["1", "0", "1"]', [1, 0, 1]),
        ("Passage [2] is odd. [1, 0, 1]", [1, 0, 1]),
        ("[0, 0, 0]? No: [1, 0, 1]", [1, 0, 1]),
        ("<think>[0, 0, 0]</think>[1, 0, 1]", [1, 0, 1]),
        ("[1, 0]", None),
        ("[1, 0, 1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, ]", None),
        ("[1, 0, 1", None),
        ("1, 0, 1", None),
        ("[]", None),
        ("all of them", None),
    ],
)
def test_what_is_read_as_verdicts(reply: str, verdicts: list[int] | None) -> None:
    found = read_verdicts(reply, 3)
    assert found == (verdicts and [bool(each) for each in verdicts])


def test_the_document_has_the_prompts_word_for_word() -> None:
    page = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    for template in (prompts.EXPLAIN, prompts.DETECT, prompts.FUZZ):
        assert f"```\n{template}\n```" in page


def test_braces_in_a_text_are_text() -> None:
    assert "1: {x} <<{0}>>" in explain_prompt([("{x} <<{0}>>", "{}")])
    assert "{explanation}\n" in score_prompt("fuzzing", "{explanation}", ["{n}"])


def test_the_cost_is_the_prompts_own_tokens(tmp_path: Path) -> None:
    """Counted word by word here; a prompt whose explanation is lacking is counted with SENTENCE tokens of it."""
    tokenizer = Tokenizer(WordLevel({"x": 0}, unk_token="x"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    batch = [Example("a b c", True, "fires"), Example("d e", False, "random")]
    task = Task(3, 0, 9, 4, "please explain", [batch], [batch, batch])
    asked = Asked(
        [task], Endpoint("m", "http://x/v1", "none", 1, 0, 0, None), Replies(tmp_path / "replies.jsonl")
    )
    words: Callable[[str], int] = lambda text: len(text.split())  # noqa: E731
    cost = asked.cost(tokenizer)
    assert (cost.requests, cost.left) == (4, 4)
    judged = words(score_prompt("detection", "", ["a b c", "d e"])) + 2 * words(
        score_prompt("fuzzing", "", ["a b c", "d e"])
    )
    assert cost.tokens_in == 2 + judged + 3 * SENTENCE
    assert not (tmp_path / "replies.jsonl").exists()
