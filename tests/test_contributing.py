"""CONTRIBUTING.md's examples, applied to a copy of the project and used there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import ROOT

PACKAGES = ("harvest", "shards", "train", "evaluate", "tests")

STORAGE = """
import sys
import numpy as np
from pipeline import Harvest
from tests.fixtures import make_store

inputs = np.random.default_rng(0).standard_normal((3000, 5)).astype(np.float32)
store = make_store(sys.argv[1] + "/s.zarr", (inputs, inputs), (inputs, inputs), storage="float16")
assert (store.train.readers["inputs"].array.dtype, Harvest(storage="float16").storage) == ("<f2", "float16")
for batch in store.train.loader(1024).batches():
    order = batch.rows
    assert np.array_equal(batch.inputs.numpy(), store.train.rows(0, 3000)[0].numpy()[order])
assert 0 < store.manifest.splits["train"].inputs.quantisation_fvu < 1e-6
"""
METRIC = """
import torch
from evaluate.measure import measure
from tests.evaluate.fakes import random_coder, random_rows

coder, rows = random_coder(5, 6, (3, 9)), random_rows(40, 5, 6)
found = measure(coder, rows, 40, None, lambda _: None).result()["prefixes"]
for g, prefix in enumerate(found):
    error = (coder.prefix(g)(rows.inputs) - rows.outputs).double().square().sum(1)
    assert abs(prefix["largest_squared_error"] - float(error.max())) < 1e-4 * float(error.max())
"""
EXPORTER = """
import sys
import numpy as np
import torch
from pathlib import Path
from tests.evaluate.runs import tiny_transcoder
from train import Transcoder
from train.export import FORMATS, export

tiny_transcoder().save(sys.argv[1])
made = export(Path(sys.argv[1]), "arrays", prefix=0)
assert "arrays" in FORMATS
assert np.array_equal(np.load(made / "W_enc.npy"), Transcoder.load(sys.argv[1]).prefix(0).W_enc.numpy())
"""


def applied(section: str, root: Path) -> None:
    """Apply the diff below a heading: each hunk's old lines must be there exactly once."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^## {section}\n.*?```diff\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found
    for change in re.split(r"^--- ", found[1], flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", change, flags=re.MULTILINE)
        file = root / head.split("+++ b/")[1].strip()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            before = file.read_text() if file.exists() else ""
            assert before.count(old) == 1 if old else not before, (file, old)
            file.write_text(before.replace(old, new) if old else new)


@pytest.mark.parametrize(
    ("section", "proof"), [("A storage format", STORAGE), ("A metric", METRIC), ("An exporter", EXPORTER)]
)
def test_an_addition_is_what_contributing_shows(section: str, proof: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for file in ("pipeline.py", "pipeline.toml"):
        shutil.copy(ROOT / file, tmp_path)
    applied(section, tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", proof, str(scratch)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
