"""From sums to records: by hand, and sums that are no numbers."""

import re
from typing import Any

import pytest

from common.errors import InputError
from evaluate.metrics.splice import Loss
from evaluate.model.losses import replaced_metrics
from evaluate.model.records import LayerMetrics, LayerPrefix
from evaluate.model.replaced import CLEAN, MEAN, ZERO, Measured

NATS = {CLEAN: 3.0, ZERO: 7.0, MEAN: 5.0, "0": 4.0, "1": 3.5}


def measured(**changed: Any) -> Measured:
    whole = {name: Loss(10, 10 * ce, 5.0, 4) for name, ce in NATS.items()}
    return Measured(
        whole=whole | changed.pop("whole", {}),
        part_clean=Loss(4, 10.0, 0.0, 4),
        cumulative={(g, layer): Loss(4, 12.0 + layer - g, 2.0, 3) for g in (1, 0) for layer in (2, 0)}
        | changed.pop("cumulative", {}),
        with_errors={g: Loss(4, 10.0, 0.0, 4) for g in (0, 1)},
        largest_difference={0: 0.0, 1: 1e-6},
    )


def layers() -> list[LayerMetrics]:
    numbers = {"fvu": 0.5, "dead_fraction": 0.0, "over_10_percent": 0, "over_10_percent_fraction": 0.0}
    rest = dict.fromkeys(("recovered_zero", "increase", "kl"))
    return [
        LayerMetrics(
            layer=layer,
            rows=9,
            positions=None,
            prefixes=[
                LayerPrefix.model_validate({"end": end + layer, "l0": end / 2, **numbers, **rest})
                for end in (4, 10)
            ],
            report="report.html",
        )
        for layer in (0, 2)
    ]


def test_by_hand() -> None:
    found = replaced_metrics(measured(), layers(), (5, 2))
    assert [each.written() for each in found.prefixes] == [
        {
            "cross_entropy": 4.0,
            "kl": 0.5,
            "top1_agreement": 0.4,
            "latents": 4 + 6,
            "l0": 4.0,
            "increase": 1.0,
            "recovered_zero": 0.75,
            "recovered_mean": 0.5,
        },
        {
            "cross_entropy": 3.5,
            "kl": 0.5,
            "top1_agreement": 0.4,
            "latents": 10 + 12,
            "l0": 10.0,
            "increase": 0.5,
            "recovered_zero": 0.875,
            "recovered_mean": 0.75,
        },
    ]
    first = found.first
    assert (first.contexts, first.positions, first.clean) == (2, 4, 2.5)
    assert [(line.prefix, line.layer, line.increase) for line in first.cumulative] == [
        (0, 0, 0.5),
        (0, 2, 1.0),
        (1, 0, 0.25),
        (1, 2, 0.75),
    ]
    assert [line.largest_difference for line in first.with_error_terms] == [0.0, 1e-6]
    assert [line.increase for line in first.with_error_terms] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"whole": {CLEAN: Loss(10, float("nan"))}}, "as it is"),
        ({"cumulative": {(1, 0): Loss(4, float("inf"))}}, "with the layers up to 0 replaced by prefix 1"),
        ({"whole": {"1": Loss(10, 1.0, float("nan"))}}, "with all MLPs replaced by prefix 1"),
    ],
)
def test_what_is_no_number_is_refused(change: dict[str, Any], what: str) -> None:
    """It would be no JSON either, after minutes of measuring."""
    with pytest.raises(
        InputError, match=re.escape(f"the model {what}: its cross-entropy is no finite number")
    ):
        replaced_metrics(measured(**change), layers(), (5, 2))
