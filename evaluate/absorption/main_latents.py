"""The latents that stand for a class: how many it is split over.

Shapes: n rows, F latents.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_matrix

from evaluate.probe.fit import fit_probe

JUMP = 0.03
"""What a further latent must add to F1 to count as one that the class is split over; as Chanin et al."""
AT_MOST = 10
"""Latents that a class may be split over; as theirs."""


class Main(NamedTuple):
    """A class's main latents, the one that tells most first."""

    latents: list[int]
    f1: list[float]
    """Of the probe on the first 1, 2, ... of them, on measured rows."""


def main_latents(
    fitted: csc_matrix, positive: np.ndarray, measured: csc_matrix, measured_positive: np.ndarray
) -> Main:
    """Of activations [n, F] on rows for fitting and on measured ones, with whether they are of the class.

    The k-th is the one that a probe on those before it lacks most, see `lacking`; the probe on all k is fitted anew. It
    counts if F1 on the measured rows rises by more than `JUMP`, and the first always does. None where no latent fires
    rather on rows of the class.
    """
    latents: list[int] = []
    f1: list[float] = []
    weights = np.where(positive, 0.5 / positive.mean(), 0.5 / (1 - positive.mean()))
    scale = np.sqrt(np.asarray(fitted.multiply(fitted).T @ weights).ravel())
    logits = np.zeros(len(positive))
    while len(latents) < AT_MOST:
        lack = lacking(fitted, positive, weights, scale, logits)
        lack[latents] = 0
        best = int(lack.argmax())
        if lack[best] <= 0:
            break
        columns = [*latents, best]
        dense = fitted[:, columns].toarray()
        probe = fit_probe(dense, positive)
        reached = f1_of(probe.says(measured[:, columns].toarray()), measured_positive)
        if latents and reached <= f1[-1] + JUMP:
            break
        latents, f1 = columns, [*f1, reached]
        logits = dense @ probe.weights + probe.bias
    return Main(latents, f1)


def lacking(
    acts: csc_matrix, positive: np.ndarray, weights: np.ndarray, scale: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """[F] how fast the weighted log-likelihood of a probe with these `logits` rises with each latent's weight.

    Per unit of the latent's own size `scale`, the root of its weighted sum of squares; 0 for one that never fires.
    """
    residual = weights * (positive - 1 / (1 + np.exp(-logits)))
    return np.divide(acts.T @ residual, scale, out=np.zeros(len(scale)), where=scale > 0)


def f1_of(said: np.ndarray, positive: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 without a hit.

    >>> f1_of(np.array([True, True, False, False]), np.array([True, False, True, False]))
    0.5
    """
    return float(2 * (said & positive).sum() / max(said.sum() + positive.sum(), 1))
