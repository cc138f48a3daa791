"""Whether a class can be told from the inputs and from the outputs, and the direction that tells it in the outputs.

Shapes: n rows, D_out.
"""

from dataclasses import dataclass

import numpy as np

from common.progress import progress
from evaluate.absorption.sample import Sample
from evaluate.probe.classes import UNASKED, Task
from evaluate.probe.fit import Accuracy, accuracy, balanced, fit_probe

LEAST_FITTED, LEAST_MEASURED, LEAST_WORDS = 50, 20, 8
"""Rows of a class to fit probes on; to measure; measured words of it."""
MOST_FITTED = 4000
"""Rows of the class, and of the others, that a probe is fitted on."""
INVERSE_PENALTY = 0.01
"""Of the probes, C of scikit-learn."""
ENOUGH = 0.8
"""Accuracy on words that a probe has not seen, as many of the class as of others, from which on it is believed."""


@dataclass(frozen=True)
class Class:
    """A class that has enough rows, and what two probes say of its measured rows."""

    task: Task
    inputs: Accuracy
    """Of the probe on the inputs, on as many measured rows of the class as of the others."""
    outputs: Accuracy
    direction: np.ndarray
    """[D_out] weights of the probe on the outputs: what its logit gains from each output."""
    scale: np.ndarray
    """[D_out] standard deviations of the outputs that the probe was fitted on, by which it divides them."""
    fitted: np.ndarray
    """Rows for fitting of which the class is asked, ascending."""
    measured: np.ndarray
    """Measured rows of which it is asked."""
    found: np.ndarray
    """Measured rows of the class that both probes find."""
    effect: np.ndarray
    """[found] what their outputs add to the logit, beyond the mean of the other classes' rows for fitting."""

    @property
    def used(self) -> bool:
        """Whether both probes are right often enough for the class to count."""
        return min(self.inputs.value, self.outputs.value) >= ENOUGH


def classes(rows: Sample) -> list[Class]:
    """Those of the sample's tasks that have enough rows."""
    lottery = np.random.default_rng(1).permutation(len(rows.place))
    sides = rows.inputs.numpy(), rows.outputs.numpy()
    tasks = [task for task in rows.tasks if _enough(task, rows)]
    found = []
    with progress("probes", len(tasks), "classes") as bar:
        for task in tasks:
            found.append(_class(task, rows, sides, lottery))
            bar.update(1)
    return found


def _enough(task: Task, rows: Sample) -> bool:
    fitted, measured = (task.labels == 1) & ~rows.apart, (task.labels == 1) & rows.apart
    others = [((task.labels == 0) & side).sum() for side in (~rows.apart, rows.apart)]
    return (
        fitted.sum() >= LEAST_FITTED
        and measured.sum() >= LEAST_MEASURED
        and len(np.unique(rows.word[measured])) >= LEAST_WORDS
        and others[0] >= LEAST_FITTED
        and others[1] >= LEAST_MEASURED
    )


def _class(task: Task, rows: Sample, sides: tuple[np.ndarray, np.ndarray], lottery: np.ndarray) -> Class:
    fitting, measuring = (np.where(own, task.labels, UNASKED) for own in (~rows.apart, rows.apart))
    on, off = balanced(fitting, lottery, MOST_FITTED), balanced(measuring, lottery, len(lottery))
    probes, said = [], []
    for values in sides:
        probe = fit_probe(values[on], task.labels[on] == 1, INVERSE_PENALTY)
        probes.append(probe)
        right = probe.says(values[off]) == (task.labels[off] == 1)
        said.append(accuracy(right, rows.document[off]))
    members, direction = np.flatnonzero(measuring == 1), probes[1].weights
    usual = sides[1][fitting == 0].mean(0, dtype=np.float64)
    both = np.all([probe.says(values[members]) for probe, values in zip(probes, sides, strict=True)], axis=0)
    return Class(
        task=task,
        inputs=said[0],
        outputs=said[1],
        direction=direction,
        scale=sides[1][on].std(0, dtype=np.float64),
        fitted=np.flatnonzero(fitting != UNASKED),
        measured=np.flatnonzero(measuring != UNASKED),
        found=members[both],
        effect=(sides[1][members[both]] - usual) @ direction,
    )
