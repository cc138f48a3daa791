"""docs/colab.md and docs/colab.ipynb: one text, derived tables, real settings, and cells that run."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from bench.expected import disk, recipes, table
from common.cli import load, parser
from common.settings import ROOT, SECTIONS
from docs.notebook import NOTEBOOK, PAGE, notebook_of

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_notebook_is_the_page_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook == notebook_of(TEXT), "run python docs/notebook.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
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
