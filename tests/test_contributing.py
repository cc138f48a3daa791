"""CONTRIBUTING.md's examples, applied to a copy of the project and used there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import ROOT

PACKAGES = ("common", "harvest", "shards", "transcoder", "train", "evaluate", "tests")

STORAGE = """
import sys
import numpy as np
from common.settings import Harvest
from tests.fixtures import make_store

inputs = np.random.default_rng(0).standard_normal((3000, 5)).astype(np.float32)
store = make_store(sys.argv[1] + "/s.zarr", (inputs, inputs), (inputs, inputs), storage="rounded")
assert (store.manifest.source.storage, Harvest(storage="rounded").storage) == ("rounded", "rounded")
for batch in store.train.loader(1024).batches():
    order = batch.rows
    assert np.array_equal(batch.inputs.numpy(), store.train.rows(0, 3000)[0].numpy()[order])
assert 0 < store.manifest.splits["train"].inputs.quantisation_fvu < 1e-6
"""
METRIC = """
import torch
from evaluate.metrics.measure import measure
from tests.evaluate.fakes import random_coder, random_rows

coder, rows = random_coder(5, 6, (3, 9)), random_rows(40, 5, 6)
prefixes = measure(coder, rows, 40, None, lambda _: None).result()
for g, prefix in enumerate(prefixes):
    error = (coder.prefix(g)(rows.inputs) - rows.outputs).double().square().sum(1)
    assert abs(prefix.largest_squared_error - float(error.max())) < 1e-4 * float(error.max())
"""
EXPORTER = """
from transcoder.export import FORMATS

assert "arrays" in FORMATS
"""
TESTS = {
    "A storage format": [
        "tests/shards/test_storage.py",
        "tests/shards/test_store.py",
        "tests/test_settings.py",
    ],
    "A metric": [
        "tests/evaluate/metrics/test_reconstruction.py",
        "tests/evaluate/metrics/test_measure.py",
        "tests/evaluate/test_ranks.py",
    ],
    "An exporter": ["tests/transcoder/test_arrays.py"],
}
"""What a change is most likely to break, by heading."""


def applied(section: str, root: Path) -> None:
    """Apply the diff below a heading: each hunk's old lines must be there exactly once."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section_diff = re.search(rf"^## {section}\n.*?```diff\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert section_diff
    for change in re.split(r"^--- ", section_diff[1], flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", change, flags=re.MULTILINE)
        file = root / head.split("+++ b/")[1].strip()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            before = file.read_text() if file.exists() else ""
            fits = before.count(old) == 1 if old else not before
            assert fits, f"CONTRIBUTING.md shows a change that no longer fits {file}; update it:\n{old}"
            file.write_text(before.replace(old, new) if old else new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "proof"), [("A storage format", STORAGE), ("A metric", METRIC), ("An exporter", EXPORTER)]
)
def test_an_addition_is_what_contributing_shows(section: str, proof: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for file in ("pipeline.toml", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / file, tmp_path)
    applied(section, tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for command in (["-c", proof, str(scratch)], ["-m", "pytest", "-q", *TESTS[section]]):
        line = [sys.executable, *command]
        process = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
