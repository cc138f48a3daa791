"""What the set's page says beside what was measured on it: each layer's own numbers, and which prefix suffices."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from evaluate.model.records import LayerMetrics, LayerPrefix, ReplacedMetrics, Sufficient
from evaluate.records import AblationLosses, Metrics
from evaluate.report.console import typical_fvu

LIMITS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Nats per token that the cross-entropy may rise by: perplexity 1.05, 1.11, 1.28, 1.65, 2.7 times the model's."""


def layer_metrics(layer: int, metrics: Metrics, evaluation: Path, folder: Path) -> LayerMetrics:
    """A layer's numbers from the `metrics` of its own `evaluation`, for a file in `folder`."""
    losses = metrics.cross_entropy
    clean = losses.clean if isinstance(losses, AblationLosses) else None

    def increase(g: int) -> float | None:
        own = metrics.prefixes[g].cross_entropy
        return None if own is None or clean is None else own.cross_entropy - clean

    def share(error: float | None) -> float | None:
        """Of what zeroing the MLP costs."""
        cost = losses.zero - losses.clean if isinstance(losses, AblationLosses) else 0
        return error / cost if error is not None and cost > 0 else None

    return LayerMetrics(
        layer=layer,
        rows=metrics.rows,
        positions=losses.positions if isinstance(losses, AblationLosses) else None,
        heavy_rows=metrics.errors.heavy.rows if metrics.errors.heavy else 0,
        heavy_variance=metrics.errors.heavy_variance if metrics.errors.heavy else None,
        prefixes=[
            LayerPrefix(
                end=prefix.end,
                fvu=prefix.fvu,
                fvu_typical=typical_fvu(metrics.errors, g),
                l0=prefix.l0,
                dead_fraction=prefix.dead_fraction,
                over_10_percent=prefix.over_10_percent,
                over_10_percent_fraction=prefix.over_10_percent_fraction,
                recovered_zero=prefix.cross_entropy and prefix.cross_entropy.recovered_zero,
                increase=increase(g),
                increase_error=prefix.cross_entropy and prefix.cross_entropy.increase_error,
                recovered_zero_error=share(prefix.cross_entropy and prefix.cross_entropy.increase_error),
                kl=prefix.cross_entropy and prefix.cross_entropy.kl,
            )
            for g, prefix in enumerate(metrics.prefixes)
        ],
        report=Path(os.path.relpath(evaluation / "report.html", folder)).as_posix(),
    )


def sufficient(replaced: ReplacedMetrics, layers: Sequence[LayerMetrics]) -> list[Sufficient]:
    """For each of LIMITS, which prefix suffices: of all MLPs at once, from the first up, and of each alone.

    Alone, a layer's own evaluation may have few tokens: its increase counts with its standard error added.
    """
    return [_within(limit, replaced, layers) for limit in LIMITS]


def _within(limit: float, replaced: ReplacedMetrics, layers: Sequence[LayerMetrics]) -> Sufficient:
    prefixes = replaced.prefixes
    prefix = _coarsest([each.increase for each in prefixes], limit)
    steps = [
        [line.increase for line in replaced.first.cumulative if line.prefix == g]
        for g in range(len(prefixes))
    ]
    alone = [
        [each.increase + (each.increase_error or 0) for each in layer.prefixes if each.increase is not None]
        for layer in layers
    ]
    known = all(len(each) == len(prefixes) for each in alone)
    found = [_coarsest(each, limit) for each in alone]
    return Sufficient(
        limit=limit,
        prefix=prefix,
        latents=None if prefix is None else prefixes[prefix].latents,
        l0=None if prefix is None else prefixes[prefix].l0,
        layers_from_the_first=[len([*takewhile(lambda each: each < limit, own)]) for own in steps],
        each_layer_alone=[found.count(g) for g in (*range(len(prefixes)), None)] if known else None,
    )


def _coarsest(increases: Sequence[float], limit: float) -> int | None:
    return next((g for g, increase in enumerate(increases) if increase < limit), None)
