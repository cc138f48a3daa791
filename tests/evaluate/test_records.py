"""metrics.json, compare.json and model.json: the records, the files that they stand for, and the document of them."""

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from docs.outputs import DOCUMENT, FILES, keys, places, with_tables
from evaluate.comparison.records import Comparison
from evaluate.files import METRICS_VERSION
from evaluate.model.records import ModelMetrics
from evaluate.model.run import VERSION
from evaluate.records import AblationLosses, Metrics, NotMeasured, OneGroupMetrics, Record
from tests.golden.write import GOLDEN

WRITTEN = {"metrics.json": Metrics, "compare.json": Comparison, "model.json": ModelMetrics}
"""In tests/golden: put together from files that the code before there were records wrote, long lists cut short. If this
fails, what a file holds has changed: raise METRICS_VERSION (of model.json: VERSION in evaluate/model/run.py), and
change the golden file likewise by hand."""


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_record_is_its_file_byte_for_byte(name: str) -> None:
    record = WRITTEN[name].model_validate(golden(name))
    assert json.dumps(record.written(), indent=1, allow_nan=False) + "\n" == (GOLDEN / name).read_text()
    assert (METRICS_VERSION, VERSION) == (3, 2), "are the golden files of these versions?"


@pytest.mark.parametrize("name", WRITTEN)
def test_the_golden_files_have_every_key(name: str) -> None:
    """Or a key could change its place without a test that fails."""
    seen = {record for path, record in _parts(WRITTEN[name].model_validate(golden(name)))}
    assert {record for _, record in places(WRITTEN[name])} - seen <= {NotMeasured, *_not_compared(name)}
    for part, record in _parts(WRITTEN[name].model_validate(golden(name))):
        absent = {"training_selection"} if record is OneGroupMetrics else set()  # the sibling has it
        assert part.written().keys() == keys(record).keys() - absent


def _not_compared(name: str) -> set[type[Record]]:
    """compare measures neither with training's selection nor with the language model."""
    fields = ("training_selection", "cross_entropy") if name == "compare.json" else ()
    return {record for path, record in places(Comparison) if path.endswith(fields)} if fields else set()


def _parts(record: Record) -> list[tuple[Record, type[Record]]]:
    """Every record within one, itself first."""
    below = [each for _, value in record for each in (value if isinstance(value, list) else [value])]
    parts = [part for each in below if isinstance(each, Record) for part in _parts(each)]
    return [(record, type(record)), *parts]


def test_keys_that_the_interface_fixes() -> None:
    metrics = golden("metrics.json")
    assert {"rows", "prefixes", "latents", "redundancy", "provenance"} <= metrics.keys()
    fixed = {"end", "fvu", "mse", "mae", "cosine", "l0", "threshold", "dead_fraction", "cross_entropy"}
    assert all(fixed <= prefix.keys() for prefix in metrics["prefixes"])


def test_what_was_not_measured_stands_alone() -> None:
    values = golden("metrics.json") | {"cross_entropy": {"skipped": "it was not asked for"}}
    metrics = Metrics.model_validate(values)
    assert isinstance(metrics.cross_entropy, NotMeasured)
    assert metrics.written() == values
    assert isinstance(Metrics.model_validate(golden("metrics.json")).cross_entropy, AblationLosses)


def test_nothing_is_filled_in_later() -> None:
    metrics = Metrics.model_validate(golden("metrics.json"))
    for part, name in (
        (metrics, "rows"),
        (metrics.prefixes[0], "cross_entropy"),
        (metrics.provenance, "run"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, None)
    with pytest.raises(ValidationError, match="colour"):
        Metrics.model_validate(golden("metrics.json") | {"colour": "blue"})


def test_the_tables_of_the_document_are_the_records() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_tables(text), "run python -m docs.outputs"
    tables = text[text.index("## evaluation/metrics.json") :]
    named = set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE))
    assert named == {key for whole in FILES.values() for _, record in places(whole) for key in keys(record)}
    earlier: set[type[Record]] = set()  # a file's own table is not repeated below another
    for whole in FILES.values():
        for path, record in places(whole):
            assert not path or f"`{path}`" in tables or record in earlier, path
            assert all(keys(record).values()), f"{record.__name__}: a field without a docstring"
        earlier |= {record for _, record in places(whole)}
