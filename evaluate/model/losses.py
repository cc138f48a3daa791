"""From the sums over all positions to the records of model.json."""

import math
from collections.abc import Mapping, Sequence

from common.errors import InputError
from evaluate.metrics.splice import Loss, summary
from evaluate.model.records import (
    ChangedModel,
    CumulativeLine,
    ErrorTermsLine,
    FirstContexts,
    LayerMetrics,
    ReplacedMetrics,
    ReplacedPrefix,
)
from evaluate.model.replaced import CLEAN, MEAN, ZERO, Measured


def replaced_metrics(
    found: Measured, layers: Sequence[LayerMetrics], contexts: tuple[int, int]
) -> ReplacedMetrics:
    """Everything measured with all MLPs replaced; `contexts`: how many, and how many of them for the slow part.

    Raises `InputError` where a loss is no finite number, saying with what replaced.
    """
    _refuse_no_numbers(found, layers)
    clean = _changed(found.whole[CLEAN])
    return ReplacedMetrics(
        skipped=None,
        contexts=contexts[0],
        positions=found.whole[CLEAN].positions,
        clean=clean.cross_entropy,
        zero=_changed(found.whole[ZERO]),
        mean=_changed(found.whole[MEAN]),
        prefixes=[_whole(found.whole, g, layers) for g in range(len(layers[0].prefixes))],
        first=_first(found, contexts[1]),
    )


def _refuse_no_numbers(found: Measured, layers: Sequence[LayerMetrics]) -> None:
    """A float16 model overflows at 65,504; a transcoder far outside of what it was trained on may give as much."""
    sums = {
        f"with the layers up to {layer} replaced by prefix {g}": loss for (g, layer), loss in _ordered(found)
    }
    sums = {"as it is": found.whole[CLEAN], **sums}
    sums |= {
        f"with all MLPs replaced by prefix {g}": found.whole[str(g)] for g in range(len(layers[0].prefixes))
    }
    for what, loss in sums.items():
        if not math.isfinite(loss.cross_entropy + loss.divergence):
            raise InputError(
                f"the model {what}: its cross-entropy is no finite number; train with more rows, or harvest with "
                "--model.dtype float32 if it is a float16 model, which overflows above 65,504"
            )


def _ordered(found: Measured) -> list[tuple[tuple[int, int], Loss]]:
    """What was measured cumulatively, prefix by prefix, from the first layer up."""
    return sorted(found.cumulative.items(), key=lambda each: each[0])


def _whole(losses: Mapping[str, Loss], g: int, layers: Sequence[LayerMetrics]) -> ReplacedPrefix:
    shares, changed = summary(losses, str(g)), _changed(losses[str(g)])
    return ReplacedPrefix(
        **dict(changed),
        latents=sum(layer.prefixes[g].end for layer in layers),
        l0=sum(layer.prefixes[g].l0 for layer in layers),
        increase=changed.cross_entropy - _changed(losses[CLEAN]).cross_entropy,
        recovered_zero=shares.recovered_zero,
        recovered_mean=shares.recovered_mean,
    )


def _changed(loss: Loss) -> ChangedModel:
    n = max(loss.positions, 1)
    return ChangedModel(
        cross_entropy=loss.cross_entropy / n, kl=loss.divergence / n, top1_agreement=loss.agreed / n
    )


def _first(found: Measured, contexts: int) -> FirstContexts:
    clean = _changed(found.part_clean).cross_entropy

    def line(loss: Loss, g: int) -> dict[str, float]:
        changed = _changed(loss)
        return {**dict(changed), "prefix": g, "increase": changed.cross_entropy - clean}

    return FirstContexts(
        contexts=contexts,
        positions=found.part_clean.positions,
        clean=clean,
        cumulative=[
            CumulativeLine.model_validate(line(loss, g) | {"layer": layer})
            for (g, layer), loss in _ordered(found)
        ],
        with_error_terms=[
            ErrorTermsLine.model_validate(line(loss, g) | {"largest_difference": found.largest_difference[g]})
            for g, loss in sorted(found.with_errors.items())
        ],
    )
