"""Every question asked of raw inputs and outputs, of k latents of each prefix, and of k random ones.

Shapes: n rows of the split, D documents, F_g latents of prefix g.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from evaluate.probe.classes import UNASKED, Task
from evaluate.probe.documents import Sides
from evaluate.probe.fit import (
    Accuracy,
    Probe,
    accuracy,
    balanced,
    fit_dense,
    fit_probe,
    forward,
    mean_accuracy,
)
from evaluate.probe.records import (
    ClassProbes,
    FamilyPrefix,
    FamilyProbes,
    LatentProbe,
    LeftOutClass,
    ProbeAccuracy,
    ProbedPrefix,
    SparseProbe,
)
from evaluate.probe.rows import Values

KS = (1, 2, 5, 16)
"""Latents of the sparse probes."""
MOST_TRAIN, MOST_TEST = 2000, 1000
"""Rows of either class that a probe is fitted on, and tested on."""
LEAST_TRAIN, LEAST_TEST = 100, 50
"""Fewer are no measure of a class: 50 and 50 test rows have a standard error of 5 points."""
DRAWS = 5
"""Of random latents, for each prefix, k and class."""
HELD = 1 << 27
"""Raw values of rows that are held, float32: 512 MB."""


class Question(NamedTuple):
    """A task with the rows that its probes are fitted and tested on: ascending numbers, as many of either class."""

    task: Task
    train: np.ndarray
    test: np.ndarray


class Asked(NamedTuple):
    """What will be asked."""

    questions: list[Question]
    left_out: list[LeftOutClass]
    rows: np.ndarray
    """All rows of the questions, ascending."""


class Sparse(NamedTuple):
    """The probe on k latents, with what it is held against, on the same test rows."""

    k: int
    latents: list[int]
    own: Accuracy
    random: Accuracy
    """Mean over the draws."""
    draws_variance: float
    """Of that mean, from the draws."""


class Answer(NamedTuple):
    """All probes of one question."""

    question: Question
    inputs: Accuracy
    outputs: Accuracy
    prefixes: list[list[Sparse]]
    """For each prefix, for each k."""


def asked(tasks: Sequence[Task], document: np.ndarray, on: Sides, width: int) -> Asked:
    """The rows of every task; `document` [n] of each row, `width` raw values of a row.

    Of each class at most MOST_TRAIN and MOST_TEST rows are drawn, fewer where all together would be more than HELD.
    """
    lottery = np.random.default_rng(1).permutation(len(document))
    sides = on.train[document], on.test[document]
    most = MOST_TRAIN
    while True:
        questions, left_out = list[Question](), list[LeftOutClass]()
        for task in tasks:
            limits = (most, most * MOST_TEST // MOST_TRAIN)
            train, test = (
                balanced(np.where(side, task.labels, UNASKED), lottery, limit)
                for side, limit in zip(sides, limits, strict=True)
            )
            if len(train) < 2 * LEAST_TRAIN or len(test) < 2 * LEAST_TEST:
                left_out.append(LeftOutClass(family=task.family, name=task.name, why=_too_few(train, test)))
            else:
                questions.append(Question(task, train, test))
        rows = np.unique(np.concatenate([np.empty(0, int), *(r for q in questions for r in q[1:])]))
        if len(rows) * width <= HELD or most <= LEAST_TRAIN:
            return Asked(questions, left_out, rows.astype(np.int64))
        most = max(most // 2, LEAST_TRAIN)


def _too_few(train: np.ndarray, test: np.ndarray) -> str:
    return (
        f"{len(train) // 2} rows of either class to fit on and {len(test) // 2} to test on, fewer than {LEAST_TRAIN} "
        f"and {LEAST_TEST}"
    )


def answers(
    questions: Asked, values: Values, document: np.ndarray, n_documents: int, tick: Callable[[int], object]
) -> list[Answer]:
    """Every question asked; `values` of `questions.rows`, `document` [n] of each row of the split."""
    found = []
    for number, question in enumerate(questions.questions):
        found.append(_answer(question, questions.rows, values, document, n_documents, number))
        tick(1)
    return found


def _answer(
    question: Question, rows: np.ndarray, values: Values, document: np.ndarray, n_documents: int, seed: int
) -> Answer:
    train, test = (np.searchsorted(rows, each) for each in (question.train, question.test))
    positive, expected = (question.task.labels[each] == 1 for each in (question.train, question.test))
    where = document[question.test]

    def right(probe: Probe, of: np.ndarray) -> np.ndarray:
        return probe.says(of) == expected

    def dense(of: np.ndarray) -> Accuracy:
        probe = fit_dense(of[train], positive, document[question.train])
        return accuracy(right(probe, of[test]), where, n_documents)

    def sparse(fit: csc_matrix, check: csc_matrix, latents: Sequence[int]) -> np.ndarray:
        columns = np.asarray(latents, np.int64)
        probe = fit_probe(fit[:, columns].toarray(), positive)
        return right(probe, check[:, columns].toarray())

    rng = np.random.default_rng(seed)
    prefixes = []
    for latents in values.latents:
        here = csr_matrix(latents[train])
        chosen = forward(here, positive, max(KS))
        fit, check = csc_matrix(here), csc_matrix(latents[test])
        living = np.unique(latents.indices)
        probes = []
        for k in KS:
            draws = [
                sparse(fit, check, rng.choice(living, min(k, len(living)), replace=False).tolist())
                for _ in range(DRAWS)
            ]
            means = np.array([each.mean() for each in draws])
            probes.append(
                Sparse(
                    k,
                    chosen[:k],
                    accuracy(sparse(fit, check, chosen[:k]), where, n_documents),
                    accuracy(np.mean(draws, axis=0), where, n_documents),
                    float(means.var(ddof=1)) / DRAWS,
                )
            )
        prefixes.append(probes)
    return Answer(question, dense(values.inputs), dense(values.outputs), prefixes)


# -- records -------------------------------------------------------------------------------------------


def class_record(answer: Answer, ends: Sequence[int], document: np.ndarray) -> ClassProbes:
    """What probes.json says of a class."""
    task, train, test = answer.question
    return ClassProbes(
        family=task.family,
        name=task.name,
        train_rows=len(train),
        test_rows=len(test),
        test_documents=len(np.unique(document[test])),
        inputs=_written(answer.inputs),
        outputs=_written(answer.outputs),
        prefixes=[
            ProbedPrefix(
                end=end,
                sparse=[LatentProbe(**dict(_sparse([each], [answer])), latents=each.latents) for each in of],
            )
            for end, of in zip(ends, answer.prefixes, strict=True)
        ],
    )


def family_records(found: Sequence[Answer], ends: Sequence[int]) -> list[FamilyProbes]:
    """Means over the classes of each question."""
    families = dict.fromkeys(each.question.task.family for each in found)
    return [
        _family(name, [each for each in found if each.question.task.family == name], ends)
        for name in families
    ]


def _family(name: str, of: Sequence[Answer], ends: Sequence[int]) -> FamilyProbes:
    return FamilyProbes(
        family=name,
        classes=len(of),
        inputs=_written(mean_accuracy([each.inputs for each in of])),
        outputs=_written(mean_accuracy([each.outputs for each in of])),
        prefixes=[
            FamilyPrefix(
                end=end,
                sparse=[_sparse([each.prefixes[g][i] for each in of], of) for i in range(len(KS))],
            )
            for g, end in enumerate(ends)
        ],
    )


def _sparse(probes: Sequence[Sparse], of: Sequence[Answer]) -> SparseProbe:
    """Means over the classes."""
    own, random = (mean_accuracy([getattr(each, side) for each in probes]) for side in ("own", "random"))
    below = mean_accuracy([each.outputs for each in of]).less(own)
    draws = sum(each.draws_variance for each in probes) / len(probes) ** 2
    return SparseProbe(
        k=probes[0].k,
        accuracy=own.value,
        error=own.error,
        below_outputs=below.value,
        below_outputs_error=below.error,
        random=random.value,
        random_error=float(np.sqrt(random.error**2 + draws)),
    )


def _written(found: Accuracy) -> ProbeAccuracy:
    return ProbeAccuracy(accuracy=found.value, error=found.error)
