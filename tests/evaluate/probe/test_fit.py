"""Probes against closed forms and planted values."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from evaluate.probe.fit import accuracy, balanced, fit_dense, fit_probe, forward, mean_accuracy

RNG = np.random.default_rng(0)
POSITIVE = np.arange(400) % 2 == 0
DOCUMENT = np.arange(400) // 8


def test_a_probe_of_one_value_cuts_halfway_between_two_classes() -> None:
    """Values 3 and 5, constant 7: the likelihood is symmetric about 4, whatever the penalty."""
    values = np.stack([np.where(POSITIVE, 5.0, 3.0), np.full(400, 7.0)], 1).astype(np.float32)
    probe = fit_probe(values, POSITIVE)
    assert probe.weights[0] > 0
    assert probe.weights[1] == 0
    assert -probe.bias / probe.weights[0] == pytest.approx(4, abs=1e-4)
    assert (probe.says(values) == POSITIVE).all()
    assert (probe.says(csr_matrix(values)) == POSITIVE).all()


def test_units_and_offsets_of_values_change_no_answer() -> None:
    values = RNG.standard_normal((400, 3)) + np.outer(POSITIVE, [1.0, -0.5, 0.0])
    scale, offset = np.array([1e-3, 1.0, 1e4]), np.array([5.0, 0.0, -1e5])
    first, second = fit_probe(values, POSITIVE), fit_probe(values * scale + offset, POSITIVE)
    assert np.allclose(second.weights * scale, first.weights, rtol=1e-3)
    assert (first.says(values) == second.says(values * scale + offset)).mean() > 0.995


def test_values_that_are_all_the_same_say_nothing() -> None:
    probe = fit_probe(np.full((400, 2), 0.1, np.float32), POSITIVE)
    assert not probe.weights.any()
    assert probe.bias == 0


def test_a_dense_probe_takes_the_penalty_that_other_documents_favour() -> None:
    """Each of 200 dimensions tells a little and 30 % of the labels are wrong: a loose penalty learns these by heart."""
    rng, positive, document = np.random.default_rng(0), np.arange(600) % 2 == 0, np.arange(600) // 8
    values = rng.standard_normal((600, 200)) + np.where(positive, 0.1, -0.1)[:, None]
    told, train, test = positive ^ (rng.random(600) < 0.3), slice(0, 300), slice(300, 600)
    chosen, loose = (
        fit_dense(values[train], told[train], document[train]),
        fit_probe(values[train], told[train]),
    )
    right = [(probe.says(values[test]) == positive[test]).mean() for probe in (chosen, loose)]
    assert right[0] > right[1] + 0.15


def test_columns_are_chosen_for_what_those_before_do_not_tell() -> None:
    """Column 3 fires on 60 % of the class, 5 on most of the same rows, 7 on the other 40 %; 2 is constant."""
    nth = np.cumsum(POSITIVE) % 10
    values = np.where(RNG.random((400, 9)) < 0.2, RNG.random((400, 9)), 0)
    values[:, 2] = 3
    for column, part in ((3, nth < 6), (5, nth < 5), (7, nth >= 6)):
        values[:, column] = np.where(POSITIVE & part, 1 + RNG.random(400), 0)
    sparse = csr_matrix(values.astype(np.float32))
    chosen = forward(sparse, POSITIVE, 3)
    assert chosen[:2] == [3, 7]
    right = [
        (fit_probe(values[:, chosen[:k]], POSITIVE).says(values[:, chosen[:k]]) == POSITIVE).mean()
        for k in (1, 2)
    ]
    assert right == pytest.approx([0.8, 1.0])
    assert sorted(forward(sparse, POSITIVE, 20)) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert forward(csr_matrix(np.zeros((400, 3), np.float32)), POSITIVE, 2) == []


def test_as_many_rows_of_either_class_the_lowest_of_the_lottery() -> None:
    labels = np.array([1, 0, 0, -1, 1, 0, 0], np.int8)
    lottery = np.array([5, 4, 1, 0, 6, 3, 2])
    assert balanced(labels, lottery, most=10).tolist() == [0, 2, 4, 6]
    assert balanced(labels, lottery, most=1).tolist() == [0, 2]
    assert balanced(np.array([1, 1], np.int8), lottery[:2], most=5).tolist() == []


def test_the_error_counts_documents_not_rows() -> None:
    """Four documents of one row each: the usual sqrt(p (1 - p) / (n - 1)); ten copies of each row change nothing."""
    right = np.array([True, True, True, False])
    found = accuracy(right, np.arange(4))
    assert (found.value, found.error) == pytest.approx((0.75, np.sqrt(0.75 * 0.25 / 3)))
    tenfold = accuracy(np.repeat(right, 10), np.repeat(np.arange(4), 10))
    assert (tenfold.value, tenfold.error) == pytest.approx((found.value, found.error))
    assert np.isnan(accuracy(right, np.zeros(4, int)).error)


def test_the_error_of_a_difference_is_that_of_paired_rows() -> None:
    """Two probes that err on the same rows differ by nothing, without error; errors on other rows add up."""
    document = np.arange(100) // 2
    first = accuracy(np.arange(100) % 4 > 0, document, 60)
    assert first.less(first).error == 0
    other = accuracy(np.arange(100) % 4 != 2, document, 60)
    gap = first.less(other)
    assert gap.value == 0
    per_document = np.where(np.arange(50) % 2 == 0, -0.01, 0.01)  # one of 100 rows lost, or won
    assert gap.error == pytest.approx(np.sqrt(50 / 49 * (per_document**2).sum()))


def test_the_error_of_a_mean_counts_a_document_once() -> None:
    """The same answers to two questions are as uncertain as to one; answers in other documents halve the variance."""
    right, document = np.arange(100) % 4 > 0, np.arange(100)
    one = accuracy(right, document, 200)
    assert mean_accuracy([one, one]).error == pytest.approx(one.error)
    two = mean_accuracy([one, accuracy(right, document + 100, 200)])
    assert two.value == 0.75
    assert two.error == pytest.approx(one.error / np.sqrt(2), rel=1e-3)
