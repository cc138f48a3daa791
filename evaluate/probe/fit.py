"""Linear probes: logistic regression on the values of rows, on all of them or on k that are chosen.

k-sparse probing is Gurnee et al. 2023 (arXiv:2305.01610).

Shapes: n rows, D values of a row (dimensions, or latents).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

Values = np.ndarray | csr_matrix
"""[n, D]"""
INVERSE_PENALTIES = (0.001, 0.01, 0.1)
"""Of dense probes, C of scikit-learn, on standardised values. Its default 1 takes twice as long and was never best."""
STEPS = 1000
"""Of the solver, at most."""


class Probe(NamedTuple):
    """Says yes to a row where values @ weights + bias > 0."""

    weights: np.ndarray
    """[D] float64, of the values as they are, not standardised"""
    bias: float

    def logits(self, values: Values) -> np.ndarray:
        """[n] values @ weights + bias"""
        return np.asarray(values @ self.weights).ravel() + self.bias

    def says(self, values: Values) -> np.ndarray:
        """[n] bool"""
        return self.logits(values) > 0


class Accuracy(NamedTuple):
    """A share of right answers."""

    value: float
    by_document: np.ndarray
    """[documents] what each document's rows take the sum of right answers off `value`, over all rows; 0 without any"""
    n_documents: int
    """That have rows."""

    @property
    def error(self) -> float:
        """Standard error over documents, whose rows are not independent; NaN of one document.

        That of a ratio of sums over D documents: sqrt(D / (D - 1) sum_d (right_d - value n_d)^2) / n.
        """
        d = self.n_documents
        return float(np.sqrt(d / (d - 1) * (self.by_document**2).sum())) if d > 1 else float("nan")

    def less(self, other: "Accuracy") -> "Accuracy":
        """The difference of two accuracies on the same documents, with its own error."""
        return Accuracy(
            self.value - other.value,
            self.by_document - other.by_document,
            max(self.n_documents, other.n_documents),
        )


def balanced(labels: np.ndarray, lottery: np.ndarray, most: int) -> np.ndarray:
    """Rows, ascending: as many of the class (1) as of the others (0), at most `most` of each.

    Those with the lowest `lottery` [n] are taken: with one lottery for all questions, these share rows.
    """
    sides = [np.flatnonzero(labels == answer) for answer in (0, 1)]
    count = min(most, *map(len, sides))
    lowest = [side[np.argsort(lottery[side], kind="stable")[:count]] for side in sides]
    return np.sort(np.concatenate(lowest))


def fit_probe(values: np.ndarray, positive: np.ndarray, inverse_penalty: float = 1.0) -> Probe:
    """Logistic regression of `positive` [n] bool on standardised values, with a squared penalty, classes weighed alike.

    `inverse_penalty` is C of scikit-learn. A value that is the same on all rows has weight 0. Both classes must occur.
    """
    mean, scale = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    moves = scale > 1e-6 * np.abs(mean)  # what rounding leaves of a constant is none
    if not moves.any():
        return Probe(np.zeros(values.shape[1]), 0.0)
    standard = (values[:, moves] - mean[moves]) / scale[moves]
    model = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=STEPS)
    model.fit(standard, positive)
    weights = np.zeros(values.shape[1])
    weights[moves] = model.coef_[0] / scale[moves]
    return Probe(weights, float(np.ravel(model.intercept_)[0] - mean @ weights))


def fit_dense(values: np.ndarray, positive: np.ndarray, document: np.ndarray) -> Probe:
    """`fit_probe` with the penalty of `INVERSE_PENALTIES` that is right most often on a fifth of the documents.

    `document` [n] of each row. The probe is then fitted on all rows. Of equal penalties the strongest is taken.
    """
    apart = document % 5 == np.bincount(np.unique(document) % 5).argmax()
    if any(len(np.unique(positive[side])) < 2 for side in (apart, ~apart)):
        return fit_probe(values, positive)
    shares = [
        _share(fit_probe(values[~apart], positive[~apart], each), values[apart], positive[apart])
        for each in INVERSE_PENALTIES
    ]
    return fit_probe(values, positive, INVERSE_PENALTIES[int(np.argmax(shares))])


def _share(probe: Probe, values: np.ndarray, positive: np.ndarray) -> float:
    right = probe.says(values) == positive
    return float(np.mean([right[positive].mean(), right[~positive].mean()]))


def forward(values: csr_matrix, positive: np.ndarray, most: int) -> list[int]:
    """Columns of a k-sparse probe, best first, at most `most`: the first k of them are those of k.

    Each is the one whose values correlate most with the errors, in probability, of the probe on those before it: of two
    that tell the same, one is taken. Columns that are the same on all rows are never taken.
    """
    values = csr_matrix(values, dtype=np.float64)
    mean = np.asarray(values.mean(0)).ravel()
    scale = np.sqrt(np.maximum(np.asarray(values.multiply(values).mean(0)).ravel() - mean**2, 0))
    moves = scale > 1e-6 * np.abs(mean)
    chosen, error = list[int](), positive - positive.mean()
    for _ in range(min(most, int(moves.sum()))):
        covariance = np.abs(np.asarray(values.T @ error).ravel() - mean * error.sum()) / len(error)
        strength = np.divide(covariance, scale, out=np.full(len(scale), -1.0), where=moves)
        strength[chosen] = -1
        chosen.append(int(strength.argmax()))
        here = values[:, chosen].toarray()
        error = positive - 1 / (1 + np.exp(-fit_probe(here, positive).logits(here)))
    return chosen


def accuracy(right: np.ndarray, document: np.ndarray, n_documents: int = 0) -> Accuracy:
    """Share of rows that are right [n], a bool or a share of several answers; `document` [n] of each row.

    `n_documents`: of the split, where accuracies of several questions are put together (`mean_accuracy`).
    """
    share = float(right.mean())
    residual = np.bincount(document, right - share, minlength=n_documents) / len(right)
    return Accuracy(share, residual, len(np.unique(document)))


def mean_accuracy(parts: Sequence[Accuracy]) -> Accuracy:
    """Of several questions, each with the same weight; a document's rows in all of them count as one sample."""
    return Accuracy(
        float(np.mean([each.value for each in parts])),
        np.mean([each.by_document for each in parts], axis=0),
        max(each.n_documents for each in parts),
    )
