"""Scores of explanations: of one latent on its passages, and of many latents. Imports no torch."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from evaluate.explain.records import GroupExplanations, LatentExplanation, MeanScore, ScoreMetrics


def score_of(judged: Iterable[tuple[bool, bool]], not_judged: int = 0) -> ScoreMetrics:
    """Of pairs (what is right, what was said).

    Three of four that fit are found, one of two others is not taken for one: (3/4 + 1/2) / 2.

    >>> pairs = [(True, True)] * 3 + [(True, False), (False, False), (False, True)]
    >>> made = score_of(pairs)
    >>> made.score, round(made.error, 4)
    (0.625, 0.2073)
    """
    pairs = list(judged)
    rates, counts = [], []
    for truth in (True, False):
        said = [verdict == truth for right, verdict in pairs if right == truth]
        counts.append(len(said))
        rates.append(sum(said) / len(said) if said else None)
    tpr, tnr = rates
    variance = sum(r * (1 - r) / n for r, n in zip(rates, counts, strict=True) if r is not None)
    return ScoreMetrics(
        score=None if tpr is None or tnr is None else (tpr + tnr) / 2,
        error=None if tpr is None or tnr is None else math.sqrt(variance) / 2,
        true_positive_rate=tpr,
        true_negative_rate=tnr,
        positives=counts[0],
        negatives=counts[1],
        not_judged=not_judged,
    )


def mean_of(values: Iterable[float | None]) -> MeanScore:
    """Over those that are numbers.

    >>> mean_of([0.5, 1.0, None])
    MeanScore(mean=0.75, error=0.25, latents=2)
    """
    known = [value for value in values if value is not None]
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None
    return MeanScore(mean=float(np.mean(known)) if known else None, error=error, latents=len(known))


def groups_of(latents: Sequence[LatentExplanation]) -> list[GroupExplanations]:
    """All latents, then those of each group that has any."""
    numbers = sorted({each.group for each in latents})
    return [_group(None, latents)] + [
        _group(group, [each for each in latents if each.group == group]) for group in numbers
    ]


def _group(group: int | None, latents: Sequence[LatentExplanation]) -> GroupExplanations:
    explained = [each for each in latents if each.explanation is not None]
    return GroupExplanations(
        group=group,
        latents=len(latents),
        explained=len(explained),
        score=mean_of(each.score for each in explained),
        detection=mean_of(each.detection.score for each in explained if each.detection),
        fuzzing=mean_of(each.fuzzing.score for each in explained if each.fuzzing),
    )
