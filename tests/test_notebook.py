"""The notebooks of docs/colab.md and docs/questions.md: one text, derived tables, real settings, and cells that run."""

import ast
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from bench.expected import disk, recipes, table
from common.cli import load, parser
from common.settings import ROOT, SECTIONS, Settings
from docs.notebook import NOTEBOOK, PAGE, QUESTIONS, notebook_of
from evaluate.labels.effects import logit_effects
from harvest.run import harvest
from tests.evaluate.fakes import random_coder

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "n_cells"), [(PAGE, 15), (QUESTIONS, 10)])
def test_the_notebook_is_the_page_without_outputs(page: Path, n_cells: int) -> None:
    notebook = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    made = notebook_of(page.read_text(encoding="utf-8"), gpu=page == PAGE)
    assert notebook == made, "run python docs/notebook.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == n_cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_tables_of_the_page_are_the_derived_ones() -> None:
    assert table() in TEXT
    bytes_a_row, recipe = re.search(r"([\d,]+) bytes a row", TEXT), recipes()[0]
    assert bytes_a_row
    assert disk(recipe) / recipe.harvest.expected_rows == pytest.approx(
        int(bytes_a_row[1].replace(",", "")), rel=1e-3
    )


def test_the_guides_settings_exist_and_fit_together() -> None:
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"(?:--|`)((?:{sections})\.[a-z_]+)", TEXT))
    known = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    assert len(named) > 15
    assert named <= known
    spans = re.findall(r"`(--[a-z]+\.[a-z_]+ [^`]+)`", TEXT)
    assert len(spans) > 8
    for span in spans:
        load(parser("train", ""), ["--layer", "17", *span.split()])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebooks_cells_run(tmp_path: Path) -> None:
    """End to end without GPU and Colab: the demo at 20,000 rows, in this environment."""
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stamp in (".installed", ".installed-embedded"):  # what the tests run in is installed
        (environment / stamp).touch()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code" and re.search(r"^\s*!make", cell.source, re.MULTILINE):
            cells.append(new_code_cell("assert _exit_code == 0, _exit_code"))
    notebook.cells = cells
    data = tmp_path / "data"
    keys = {"HF_TOKEN": "", "WANDB_API_KEY": ""}
    kept = {name: value for name, value in os.environ.items() if name not in keys}
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**kept, "VENV": str(environment), "DATA": str(data)})

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    shown = [output["data"] for output in outputs if "data" in output]
    assert "20,000 train" in text
    assert re.search(r"prefix 3: 4,608 latents, [\d.]+ active per row, FVU 0\.\d+", text)
    assert sum("text/html" in each for each in shown) == 2
    assert sum("image/png" in each for each in shown) == 1
    run = data / "checkpoints" / "transcoder" / "smollm2-135m" / "layer_12" / "colab"
    assert (run / "evaluation" / "report.html").stat().st_size > 100_000


def data_of_questions(settings: Settings, folder: Path) -> None:
    """In `folder` a tiny model's store and a random transcoder, where the questions look for the demo's."""
    harvest(settings)
    shutil.copytree(settings.store_path(1), folder / "activations/smollm2-135m/layer_12.zarr")
    random_coder(32, 32, (4, 16), layer=1).save(folder / "checkpoints/transcoder/smollm2-135m/layer_12/demo")


def run_cells(sources: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """The names that the cells leave, and what each cell shows: its last line, if it has a value."""
    names: dict[str, Any] = {}
    values = []
    for source in sources:
        cell = ast.parse(source)
        if isinstance(last := cell.body[-1], ast.Expr):
            cell.body[-1] = ast.Assign([ast.Name("_", ast.Store())], last.value)
        exec(compile(ast.fix_missing_locations(cell), "cell", "exec"), names)
        values += [names.pop("_")] if isinstance(last, ast.Expr) else []
    return names, [value for value in values if value is not None]


def test_the_questions_are_answered(
    llama: Path,
    settings_for: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, on a tiny model: what each cell shows."""
    data_of_questions(settings_for(llama), tmp_path)
    monkeypatch.setenv("DATA", str(tmp_path))
    notebook = nbformat.read(QUESTIONS.with_suffix(".ipynb"), as_version=4)
    names, values = run_cells([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    _, found, tokens, _, table, contexts, others = values
    assert 0 < found.matches <= len(found.rows) == found.mask.sum()
    assert tokens.texts[0].strip() in "river"
    assert len(table) == 8
    assert contexts.latent == table.index[0]
    assert 0 < len(contexts) <= 6
    assert not any(found.mask[each.row] for each in others)
    assert all(found.mask[each.row] for each in contexts)
    ask, reader, latents = names["ask"], names["reader"], names["table"].index[:4]
    writes = ask.writes(latents, reader, n=6)
    text = names["store"].heldout.text
    occurs = np.zeros(320, bool)
    for split in (names["store"].train, names["store"].heldout):
        occurs[split.contexts[:]] = True
    effects = logit_effects(reader.model, names["transcoder"].W_dec[latents.tolist()], occurs, 6)
    expected = {
        (latent, side): [alike, *(text.label(int(token)) for token in line)]
        for side, ids in (("promoted", effects.promoted), ("suppressed", effects.suppressed))
        for latent, alike, line in zip(latents, effects.like_random, ids, strict=True)
    }
    assert {key: writes.loc[key].tolist() for key in expected} == expected
    assert isinstance(writes, pd.DataFrame)
    said = capsys.readouterr().out
    assert re.search(
        r"they raise \['.*'\]\nwithout them the prediction there changes by \d\.\de-\d\d nats", said
    )
    assert writes.to_string() in said, "no column is left out"
    assert re.search(r"prefix 1: latent \d+, F1 0\.\d\d, AUC 0\.\d{3}\n$", said)
    for latent in (-1, 16):
        with pytest.raises(ValueError, match=f"latent: expected 0 to 15, found {latent}"):
            ask.writes([latent], reader)


@pytest.mark.slow
def test_the_questions_cells_run(llama: Path, settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    """In a notebook's kernel."""
    data_of_questions(settings_for(llama), tmp_path)
    notebook = nbformat.read(QUESTIONS.with_suffix(".ipynb"), as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**os.environ, "DATA": str(tmp_path)})
    shown = [
        output["data"] for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output
    ]
    assert sum("text/html" in each for each in shown) == 5, "what a latent writes is printed"
