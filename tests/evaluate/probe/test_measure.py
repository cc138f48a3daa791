"""Planted dictionaries: latents that are exactly a class of tokens, among latents that know nothing of tokens."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from torch import Tensor

from common.tokens import TokenText
from evaluate.probe import measure
from evaluate.probe.classes import UNASKED, token_tasks
from evaluate.probe.documents import Sides, sides
from evaluate.probe.measure import LEAST_TEST, answers, asked, class_record, family_records
from evaluate.probe.records import ClassProbes, SparseProbe
from evaluate.probe.rows import by_separator, places, values_of
from tests.fixtures import make_source
from transcoder import Transcoder
from transcoder.transcoder import Parameters

PIECES = ["<s>", "</s>", "ĠLow", "Ġlow", "ĠBay", "Ġbay", "ĠBee", "Ġbee", "12", "9", "!", ","]
BOS, EOS, DIGITS = 0, 1, (8, 9)
CAPITALS = (2, 4, 6)
C, T, D_IN, ENDS = 90, 33, 8, (400, 900)
CAPITAL, DIGIT = 7, 650
"""Latents; the second is of the second group alone."""
SOURCE = make_source(D_IN, 4, C * T, context_length=T)


class Split(NamedTuple):
    """All rows of `contexts` but first and separating tokens, in an order of its own."""

    contexts: np.ndarray
    context: np.ndarray
    position: np.ndarray
    inputs: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.context)

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.context[start:stop], self.position[start:stop]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop], self.outputs[start:stop]


def planted_split() -> Split:
    """Inputs whose first two dimensions are whether the token is a capitalised word, and digits; the rest is noise."""
    rng = np.random.default_rng(0)
    contexts = rng.integers(2, len(PIECES), (C, T)).astype(np.int32)
    contexts[:, 0], contexts[:, 17] = BOS, EOS
    context, position = (each[rng.permutation(C * (T - 2))] for each in np.nonzero(contexts > EOS))
    rng.shuffle(order := np.arange(len(context)))
    context, position = context[order].astype(np.uint32), position[order].astype(np.uint16)
    token = contexts[context, position]
    inputs = rng.standard_normal((len(token), D_IN)).astype(np.float32)
    inputs[:, 0], inputs[:, 1] = np.isin(token, CAPITALS), np.isin(token, DIGITS)
    outputs = rng.standard_normal((len(token), 4)).astype(np.float32)
    return Split(contexts, context, position, torch.from_numpy(inputs), torch.from_numpy(outputs))


def planted_coder() -> Transcoder:
    draw = torch.Generator().manual_seed(0)
    W_enc = torch.randn(ENDS[-1], D_IN, generator=draw)
    W_enc[:, :2] = 0
    W_enc[CAPITAL], W_enc[DIGIT] = torch.eye(D_IN)[0], torch.eye(D_IN)[1]
    parameters = Parameters(W_enc, torch.zeros(ENDS[-1]), torch.zeros(ENDS[-1], 4), torch.zeros(4))
    return Transcoder(parameters, torch.tensor([0.5, 0.9]), ENDS)


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, ClassProbes], list[SparseProbe]]:
    """Classes by question, and the k = 1, 3 probes of the mean over both of the full dictionary."""
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<s>"))
    tokenizer.decoder = ByteLevel()
    split = planted_split()
    document = by_separator(split.contexts, SOURCE)
    where = places(split, len(split), SOURCE, document)
    tasks = [
        task._replace(family="both") if task.family == "digit" else task
        for task in token_tasks(TokenText(tokenizer), where.token, where.previous)
        if task.family in ("capitalised", "digit")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "KS", (1, 3))
        n = int(document.max()) + 1
        questions = asked(tasks, where.document, sides(np.ones(n, bool), "text"), D_IN + 4)
        values = values_of(planted_coder(), split, questions.rows)
        got = answers(questions, values, where.document, n, lambda _: None)
        classes = [class_record(each, ENDS, where.document) for each in got]
        got = [
            each._replace(question=each.question._replace(task=each.question.task._replace(family="all")))
            for each in got
        ]
        (family,) = family_records(got, ENDS)
    return {each.family: each for each in classes}, family.prefixes[-1].sparse


def test_a_latent_that_is_exactly_a_class_is_a_perfect_probe_of_one(
    found: tuple[dict[str, ClassProbes], list[SparseProbe]],
) -> None:
    of, _ = found
    for question, latent, groups in (("capitalised", CAPITAL, (0, 1)), ("both", DIGIT, (1,))):
        for g in groups:
            one, three = of[question].prefixes[g].sparse
            assert (one.k, one.latents, one.accuracy, one.error) == (1, [latent], 1.0, 0.0)
            assert (three.accuracy, three.latents[0]) == (1.0, latent)
        assert of[question].inputs.accuracy == 1.0


def test_a_prefix_without_the_latent_knows_what_its_latents_tell(
    found: tuple[dict[str, ClassProbes], list[SparseProbe]],
) -> None:
    """The first group has no latent for digits, but one for capitals: of ten pieces two are digits, three capitals, so
    "a digit where no capital is" is right on all digits and on 3/8 of the others."""
    one, _ = found[0]["both"].prefixes[0].sparse
    assert one.latents == [CAPITAL]
    assert abs(one.accuracy - (1 + 3 / 8) / 2) < 3 * one.error < 0.1


def test_random_latents_and_outputs_without_the_class_are_at_chance(
    found: tuple[dict[str, ClassProbes], list[SparseProbe]],
) -> None:
    for each in found[0].values():
        assert abs(each.outputs.accuracy - 0.5) < 4 * each.outputs.error
        for prefix in each.prefixes:
            for probe in prefix.sparse:
                assert abs(probe.random - 0.5) < 4 * probe.random_error < 0.2
                assert probe.below_outputs == pytest.approx(each.outputs.accuracy - probe.accuracy)


def test_a_question_counts_its_classes_alike(found: tuple[dict[str, ClassProbes], list[SparseProbe]]) -> None:
    of, mean = found
    for i, probe in enumerate(mean):
        classes = [each.prefixes[-1].sparse[i] for each in of.values()]
        assert probe.accuracy == pytest.approx(np.mean([each.accuracy for each in classes]))
        assert probe.random == pytest.approx(np.mean([each.random for each in classes]))


def test_no_document_is_on_both_sides_and_rows_are_of_their_side() -> None:
    document = np.arange(4000) // 10
    on = sides(np.ones(400, bool), "text")
    assert not (on.train & on.test).any()
    assert (on.train.sum(), on.test.sum()) == (280, 120)
    labels = np.where(np.arange(4000) % 3 == 0, 1, 0).astype(np.int8)
    questions = asked([measure.Task("x", "", labels)], document, on, 2)
    (question,) = questions.questions
    assert on.train[document[question.train]].all()
    assert on.test[document[question.test]].all()
    assert (labels[question.test] == 1).mean() == (labels[question.train] == 1).mean() == 0.5


def test_of_stretches_the_last_are_tested_on_and_the_one_before_is_left_out() -> None:
    on = sides(np.ones(50, bool), "stretches")
    assert np.flatnonzero(on.test).tolist() == [*range(35, 50)]
    assert np.flatnonzero(on.train).tolist() == [*range(34)]


def test_a_class_with_too_few_rows_is_left_out_and_said() -> None:
    document = np.arange(4000) // 10
    on = Sides(np.arange(400) < 280, np.arange(400) >= 280)
    labels = np.zeros(4000, np.int8)
    labels[:500] = 1
    labels[-LEAST_TEST + 1 :] = 1
    found = asked([measure.Task("first letter", "q", labels)], document, on, 2)
    assert not found.questions
    assert (
        found.left_out[0].why == "500 rows of either class to fit on and 49 to test on, fewer than 100 and 50"
    )


def test_rows_are_drawn_fewer_where_they_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    document = np.arange(40_000) // 10
    on = sides(np.ones(4000, bool), "text")
    labels = (np.arange(40_000) % 2).astype(np.int8)
    task = measure.Task("x", "", labels)
    assert len(asked([task], document, on, 100).rows) == 6000
    monkeypatch.setattr(measure, "HELD", 200_000)
    found = asked(
        [task, measure.Task("y", "", np.where(labels == 1, UNASKED, 0).astype(np.int8))], document, on, 100
    )
    assert len(found.rows) == 1500
