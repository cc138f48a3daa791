"""Absorption, splitting and stability of transcoders on the rows of one store.

Shapes: n rows, F latents, G prefixes, D_out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from common.progress import progress
from evaluate.absorption.absorbed import NONE, absorbed
from evaluate.absorption.directions import Class
from evaluate.absorption.main_latents import main_latents
from evaluate.absorption.records import (
    AbsorbedClass,
    AbsorbedPrefix,
    AbsorbedTranscoder,
    Absorber,
    AbsorptionDifference,
    Estimate,
    Stability,
    StableGroup,
)
from evaluate.absorption.sample import Sample
from evaluate.absorption.stability import Fired, partnered
from evaluate.metrics.measure import Measurement
from evaluate.metrics.rows import BLOCK_ROWS, Split, blocks
from evaluate.probe.fit import Accuracy, accuracy
from evaluate.probe.rows import values_of
from transcoder import Transcoder

FIRED_ROWS = 1 << 17
"""Rows on which firings are compared, at most: 8 bytes a firing."""
ABSORBERS = 5
MEANS = ("absorbed", "fraction", "silent", "latents", "f1")


@dataclass(frozen=True)
class Passed:
    """What one pass over the held-out rows says of a transcoder."""

    measurement: Measurement
    fired: Fired
    """Of the full dictionary, on the first `fired_rows` rows."""
    fired_rows: int


@torch.inference_mode()
def passed(coders: Mapping[str, Transcoder], split: Split, n_rows: int) -> dict[str, Passed]:
    """One reading of rows [0, n_rows) for all transcoders."""
    measurements = {name: Measurement(coder, select=None) for name, coder in coders.items()}
    firings: dict[str, list[np.ndarray]] = {name: [] for name in coders}
    with progress("statistics", n_rows, "rows") as bar:
        for start, stop in blocks(n_rows):
            inputs, outputs = split.rows(start, stop)
            for name, measurement in measurements.items():
                device = measurement.coder.W_dec.device
                entries = measurement.add(inputs.to(device), outputs.to(device))[0][-1]
                if start < FIRED_ROWS:
                    firings[name].append(torch.stack([entries.latents, entries.rows + start]).cpu().numpy())
            bar.update(stop - start)
    rows = min(n_rows, -(-FIRED_ROWS // BLOCK_ROWS) * BLOCK_ROWS)
    return {
        name: Passed(measurement, Fired.of(np.concatenate(firings[name], 1), measurement.coder.d_sae), rows)
        for name, measurement in measurements.items()
    }


def of_transcoder(
    name: str, coder: Transcoder, told: Sequence[Class], rows: Sample, held: Passed
) -> AbsorbedTranscoder:
    """Every prefix of one transcoder."""
    used = [each for each in told if each.used]
    W_dec = coder.W_dec.double().cpu().numpy()
    prefixes = []
    with progress(name, len(used) * len(coder.prefix_ends), "classes") as bar:
        for acts, numbers in zip(
            values_of(coder, rows, np.arange(len(rows))).latents, held.measurement.result(), strict=True
        ):
            classes = []
            for each in used:
                classes.append(of_class(each, acts, rows, W_dec[: numbers.end]))
                bar.update(1)
            means = {key: mean_of([value_of(one, key) for one in classes]) for key in MEANS}
            prefixes.append(
                AbsorbedPrefix(end=numbers.end, fvu=numbers.fvu, l0=numbers.l0, **means, classes=classes)
            )
    return AbsorbedTranscoder(transcoder=name, prefixes=prefixes)


def value_of(one: AbsorbedClass, key: str) -> float:
    """What is averaged over classes."""
    match key:
        case "latents":
            return float(len(one.latents))
        case "f1":
            return one.f1[-1] if one.f1 else 0.0
        case "fraction":
            return one.fraction
        case _:
            return getattr(one, key).value


def mean_of(values: Sequence[float]) -> Estimate | None:
    """With its standard error; None of none.

    >>> mean_of([1.0, 3.0])
    Estimate(value=2.0, error=1.0)
    """
    if not values:
        return None
    n = len(values)
    return Estimate(
        value=float(np.mean(values)), error=float(np.std(values, ddof=1) / n**0.5) if n > 1 else None
    )


def of_class(each: Class, acts: csr_matrix, rows: Sample, W_dec: np.ndarray) -> AbsorbedClass:
    """One class in a prefix of activations [n, F] on all of the sample's rows; `W_dec` [F, D_out]."""
    labels = each.task.labels == 1
    fitted, positive = acts[each.fitted].tocsc(), labels[each.fitted]
    main = main_latents(fitted, positive, acts[each.measured].tocsc(), labels[each.measured])
    others = ~positive / (~positive).sum()
    usual, direction = np.asarray(fitted.T @ others).ravel(), each.direction
    effect = W_dec @ direction
    moves = each.scale > 0
    length = np.linalg.norm(W_dec[:, moves] / each.scale[moves], axis=1) * np.linalg.norm(
        direction * each.scale
    )
    cosine = np.divide(effect, length, out=np.zeros_like(effect), where=length > 0)
    found = absorbed(acts[each.found], main.latents, effect, cosine, usual, each.effect)
    document = rows.document[each.found]
    by, count = np.unique(found.by[found.by != NONE], return_counts=True)
    most = np.argsort(-count, kind="stable")[:ABSORBERS]
    return AbsorbedClass(
        family=each.task.family,
        name=each.task.name,
        absorbed=_share(found.absorbed, document),
        fraction=float(found.fraction.mean()),
        silent=_share(found.silent, document),
        latents=main.latents,
        f1=main.f1,
        absorbers=[Absorber(latent=int(by[i]), rows=int(count[i])) for i in most],
    )


def _share(marks: np.ndarray, document: np.ndarray) -> Estimate:
    return estimate(accuracy(marks, document))


def estimate(share: Accuracy) -> Estimate:
    """A share of rows, its error over documents."""
    return Estimate(value=share.value, error=None if np.isnan(share.error) else share.error)


def difference(other: AbsorbedTranscoder, run: AbsorbedTranscoder) -> AbsorptionDifference:
    """The full dictionaries' numbers, `other` less `run`, class by class."""
    theirs, own = other.prefixes[-1], run.prefixes[-1]
    pairs = [*zip(theirs.classes, own.classes, strict=True)]
    less = {key: mean_of([value_of(a, key) - value_of(b, key) for a, b in pairs]) for key in MEANS}
    fvu = None if theirs.fvu is None or own.fvu is None else theirs.fvu - own.fvu
    return AbsorptionDifference(other=other.transcoder, fvu=fvu, **less)


def stability(coder: Transcoder, own: Passed, name: str, other: Transcoder, theirs: Passed) -> Stability:
    """The latents of `coder` beside those of the transcoder `name`."""
    found = partnered(own.fired, coder.W_dec, theirs.fired, other.W_dec)
    fires = own.fired.counts > 0
    groups = []
    for g, (begin, end) in enumerate(zip((0, *coder.prefix_ends), coder.prefix_ends, strict=False)):
        marks = found[begin:end][fires[begin:end]]
        groups.append(StableGroup(group=g, firing=len(marks), partnered=_of_latents(marks)))
    return Stability(other=name, rows=own.fired_rows, groups=groups, partnered=_of_latents(found[fires]))


def _of_latents(marks: np.ndarray) -> Estimate | None:
    """The share that is marked, each latent on its own."""
    return mean_of(marks.astype(float).tolist())
