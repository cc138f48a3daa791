"""The tables of all stages in a terminal of 80 columns: nothing is cut, and no number or unit is torn."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.layers import driver
from common.numbers import Uncertain
from common.terminal.table import Table
from evaluate import compare, runs, stores
from evaluate.__main__ import show as show_evaluation
from evaluate.circuit import __main__ as circuit
from evaluate.circuit.graph import LATENT, LOGIT, TOKEN, Circuit, Nodes, Route
from evaluate.circuit.labels import Label
from evaluate.comparison.records import Comparison
from evaluate.model import __main__ as model
from evaluate.model.records import ModelMetrics
from evaluate.records import Metrics
from shards import __main__ as shards
from tests.evaluate.runs import make_run, settings_of
from tests.golden.write import GOLDEN
from train import samples_page, sweep
from train.finish import line_of, summary

WIDTH = 80


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was printed since, after it was looked at: no line is wider than the terminal, and no word is cut."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def looked_at() -> str:
        text = capsys.readouterr().out
        assert "…" not in text
        of_tables = [line for line in text.splitlines() if line and line[0] in "┏┃┡│└├"]
        assert of_tables
        assert [line for line in of_tables if len(line) > WIDTH] == []
        return text

    return looked_at


def words(text: str) -> set[str]:
    return {word for line in re.split(r"[\n┃│]", text) for word in line.split()}


def columns(text: str) -> set[str]:
    """Whole cells."""
    return {cell.strip() for line in re.split(r"[\n]", text) for cell in re.split("[┃│]", line)}


def to_stdout() -> Console:
    return Console(width=WIDTH, file=sys.stdout)


def golden(name: str, **more: Any) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text()) | more


def test_evaluate(terminal: Callable[[], str], tmp_path: Path) -> None:
    values = golden("metrics.json")
    values["prefixes"][-1] |= {"end": 147_456, "threshold": 0.00123456, "l0": 1024.5, "dead_fraction": 1.0}
    values["prefixes"][-1] |= {"over_10_percent_fraction": 1.0, "over_10_percent_verdict": "moderate"}
    show_evaluation(settings_of(tmp_path), Metrics.model_validate(values), True, to_stdout())
    said = columns(terminal())
    assert {"147,456", "1024.5", "100.0 % moderate", "0.00123", "threshold"} <= said


def test_compare(terminal: Callable[[], str], tmp_path: Path) -> None:
    values = golden("compare.json")
    name = "gemma_scope_prefix_1/layer_3/width_864/average_l0_18"
    for line in (values["lines"][-1], values["transcoders"][-1]):
        line["transcoder"] = name
    values["equal_l0"][0]["other"] = name
    first = f"0.572 ({values['lines'][0]['difference']['fvu']:+.3f})"
    compare.show(Comparison.model_validate(values), tmp_path, to_stdout())
    said = terminal()
    assert {first, "2,016", "transcoder", "difference", "+0.000"} <= columns(said)
    assert "layer_3/width_864/average_" in words(said)


def test_what_is_marked_keeps_its_decimals_below_the_others(terminal: Callable[[], str]) -> None:
    table = Table("layer", "FVU", "increase", caption="† what it is")
    table.add_row("10", "0.431", Uncertain(0.0363, 0.0006))
    table.add_row("11", "0.442†", Uncertain(0.074, 0.007))
    table.add_row("12", "-", "-")
    to_stdout().print(table)
    rows = [row for row in terminal().splitlines() if row.startswith("│")]
    first, second, _ = rows
    assert first.index(".431") == second.index(".442")
    assert first.index("+0.0363 ± 0.0006") == second.index("+0.0740 ± 0.0070")
    assert len({len(row) for row in rows}) == 1


def line(n_prefixes: int) -> dict[str, Any]:
    return {
        "heldout": {
            "rows": 43_153,
            "fvu": [0.123456] * n_prefixes,
            "l0": [12_345.678] * n_prefixes,
            "dead": 147_456,
            "dead_fraction": [1.0] * n_prefixes,
            "over_10_percent_fraction": [1.0] * n_prefixes,
        },
        "prefix_ends": [147_456] * n_prefixes,
        "thresholds": [1.23456e-5] * n_prefixes,
        "training": {"l0": [12_345.678] * n_prefixes},
    }


def test_train_and_sweep(terminal: Callable[[], str]) -> None:
    to_stdout().print(summary(line(6)))
    assert {"0.1235", "12345.68", "1.235e-05", "147,456", "threshold"} <= columns(terminal())
    long = "default-lr0.0003-k64-groups1152x2304x4608x10368-warmup500-skipTrue"
    table = Table("run", *line_of(line(4)))
    table.add_row(long, *line_of(line(4)).values())
    to_stdout().print(table)
    said = terminal()
    assert {"12345.7", "100.0 %", "0.1235 0.1235 0.1235 0.1235"} <= columns(said)
    assert long in "".join(re.split("[┃│]", row)[1].strip() for row in said.splitlines() if row[0] == "│")
    assert sweep.Table is Table


@pytest.mark.parametrize("n_prefixes", [3, 6, 12])
def test_several_layers(n_prefixes: int, terminal: Callable[[], str]) -> None:
    own = {
        "FVU of each prefix": " ".join(["0.123"] * n_prefixes),
        "L0": "1024.5",
        "dead %": "100.0",
        "over 10 %": "100.0",
        "CE recovered": "-123.4 %",
    }
    driver._print_table("default", [(layer, own) for layer in (0, 25)])
    said = terminal()
    assert {"1024.5", "-123.4 %", "100.0"} <= columns(said)
    assert words(said) >= {"recovered", "0.123"}


def test_model(terminal: Callable[[], str], tmp_path: Path) -> None:
    values = golden("model.json")
    for prefix in values["replaced"]["prefixes"]:
        prefix |= {"latents": 3_833_856, "l0": 12_345.0, "recovered_zero": -1.234, "cross_entropy": 12.345}
    result = ModelMetrics.model_validate(values)
    model.show(settings_of(tmp_path), result, True, to_stdout())
    said = columns(terminal())
    assert {"3,833,856", "12,345", "-123.4", "12.345", "original model"} <= said
    assert "increase" in said


def test_circuit(terminal: Callable[[], str]) -> None:
    text = "fires on ' Deutschland', ' Bundesrepublik', ' Österreich'; promotes ' Berlin', ' Hauptstadt', ' München'"
    nodes = Nodes(
        kind=np.array([TOKEN, LATENT, LATENT, LOGIT]),
        layer=np.array([-1, 12, 25, 26]),
        position=np.array([0, 3, 3, 3]),
        number=np.array([5, 147_455, 99_999, 7]),
        value=np.array([1.0, 2.0, 3.0, 0.4321]),
    )
    found = circuit_of(nodes)
    labels = [Label("", " The", [], []), *[Label(text, "", [], [])] * 2, Label("", " Berlin", [], [])]
    circuit._print(found, labels, {3: [Route((0, 1, 2, 3), 0.123)] * 2})
    said = terminal()
    assert {"12/147455@3", "25/99999@3", "' Berlin'", "43.2 %", "12.3"} <= columns(said)
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.splitlines() if row[0] == "│"]
    starts = [row[3].split(",")[0] for row in rows if row[2].startswith(("12/", "25/"))]
    assert starts == ["fires on ' Deutschland'"] * 4, "a label stands beside its own node"


def circuit_of(nodes: Nodes) -> Circuit:
    ends = SimpleNamespace(tokens=0.5, errors=0.25, not_followed=0.25)
    return SimpleNamespace(nodes=nodes, ends=ends, source=np.arange(3))  # type: ignore[return-value]


def test_stores_and_their_info(terminal: Callable[[], str], tmp_path: Path) -> None:
    make_run(tmp_path)
    store = Path(settings_of(tmp_path).store_path(0))
    rows = dict.fromkeys(stores.COLUMNS, "-") | {
        "model": "gemma-2-2b",
        "layer": "25",
        "harvest": "my_second_harvest",
    }
    rows |= {"rows": "15,000,000", "held-out": "300,000", "width": "2304 -> 2304", "storage": "bfloat16"}
    rows |= {"input": "normalized", "cost FVU": "1.0e-04 / 1.0e-04", "size": "65.4 GB"}
    unreadable = "cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    stores.print_table([rows | {"state": "complete"}, rows | {"state": unreadable}], stores.COLUMNS, "none")
    said = terminal()
    assert {
        "15,000,000",
        "2304 -> 2304",
        "1.0e-04 / 1.0e-04",
        "65.4 GB",
        "bfloat16",
        "normalized",
    } <= columns(said)
    assert set(unreadable.split()) <= words(said)
    assert said.count("my_second_harvest") >= 4, "each part says which store"
    shards._info(str(store), settings_of(tmp_path).paths)
    terminal()


def test_runs(terminal: Callable[[], str]) -> None:
    row = dict.fromkeys(runs.COLUMNS, "-") | {
        "model": "gemma-2-2b",
        "layer": "25",
        "run": "default-lr0.0003-k64",
    }
    row |= {"rows": "1,638,400 of 15,000,000", "latents": "147,456", "k": "1024", "rate": "1.23e-05"}
    row |= {"FVU": "0.123", "L0": "1024.5", "dead %": "100.0", "size": "123.4 MB"}
    state = "cannot be read: field latents.groups.0: field required: it is of another version"
    stores.print_table([row | {"evaluated": "yes"}, row | {"evaluated": state}], runs.COLUMNS, "none")
    said = terminal()
    assert {"1,638,400 of 15,000,000", "147,456", "1.23e-05", "1024.5", "123.4 MB"} <= columns(said)
    assert {"evaluated", *state.split()} <= words(said)


def test_samples(terminal: Callable[[], str]) -> None:
    sample = {"value": 12.3456, "row": 3, "context": 0, "position": 1, "token": " [red]fox"}
    text = {"before": "the quick brown and rather long-winded " * 3, "after": " jumps over\nthe lazy dog" * 3}
    samples = [
        {"latent": 7, "group": 1, "samples": [sample | text] * 2},
        {"latent": 8, "group": 1, "samples": []},
    ]
    samples_page.print_latents(map(samples_page.LINE.validate_python, samples))
    said = terminal()
    assert {"12.346", "[[", "[red]fox]]"} <= words(said)
    assert "latent 8 (group 1)\n  never active when looked at" in said
