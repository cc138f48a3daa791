"""tests/mistakes.md is the table: every row is made true in a directory of its own, and its command is run.

Whole commands as a person meets them, in this process (`make` in a real one): exactly the line that the page shows
on standard error, exit code 2, no traceback, and no file written or changed but what the row says stays.
Python 3.11's words, where the line is argparse's own.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from common.settings import ROOT
from shards import Store
from tests.mistakes import ENVIRONMENTS, MISTAKES, call, make_right

PAGE = ROOT / "tests" / "mistakes.md"
STAYS = {
    "the unfinished store stays": "activations/",
    "the language model's losses stay": "activations/",
}
"""What a row may say of what is left behind, and where that is."""
ROW = re.compile(r"\| (?P<wrong>[^|`]+) \| `(?P<command>[^|`]+)` \| `+ ?(?P<line>[^|]+?) ?`+ \|")
PROGRESS = re.compile(r"\d+%\||: 0(\.00)?\S* ?\[|make(\[\d+\])?: \*\*\*")


class Row(NamedTuple):
    wrong: str
    command: str
    line: str


def rows() -> list[Row]:
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    matched = [(line, ROW.fullmatch(line)) for line in table if not line.startswith("| what is wrong |")]
    assert not [line for line, match in matched if not match]
    return [Row(**match.groupdict()) for _, match in matched if match]


def files(root: Path) -> dict[str, bytes]:
    """Path -> bytes of every file; an empty directory is nothing."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def said(errors: str) -> list[str]:
    """Lines of standard error without progress bars, digests shortened to what does not depend on the machine."""
    lines = [line for line in re.split(r"[\r\n]+", errors) if line.strip() and not PROGRESS.search(line)]
    return [re.sub(r"[0-9a-f]{12,}", "0123456789ab", line) for line in lines]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make arguments` here, on this Python."""
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "install", f"VENV={sys.prefix}", *arguments]
    # `make test ARGS=...` hands its own words down
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "ARGS"}
    environment = own | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("right")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(root)
        make_right()
    return root


@pytest.fixture
def here(right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the right directory, made the current one."""
    shutil.copytree(right, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.wrong)
def test_a_mistake(
    row: Row, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = MISTAKES.get(row.wrong, lambda: None)()
    before = files(here)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        ENVIRONMENTS.get(row.wrong, lambda _: None)(patch)
        program, *arguments = shlex.split(row.command)
        if program == "make":
            process = make(*arguments)
            code, errors = process.returncode, process.stderr
        else:
            assert [program, arguments[0]] == ["python", "-m"]
            code, errors = call(*arguments[1:]), capfd.readouterr().err
    if isinstance(handle, io.IOBase):
        handle.close()  # the other process lets go
    (line,) = said(errors)
    assert (line[: len(row.line) - 3] + "..." if row.line.endswith("...") else line) == row.line
    assert code == 2
    after = files(here)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    stays = next((where for words, where in STAYS.items() if words in row.wrong), None)
    assert {path.split("/")[0] + "/" for path in changed} == ({stays} if stays else set())


def test_every_mistake_is_on_the_page_once() -> None:
    wrong = [row.wrong for row in rows()]
    assert len(wrong) == len(set(wrong)) >= 60
    assert (MISTAKES | ENVIRONMENTS).keys() <= set(wrong)


def test_processes_that_stop_together_end_as_one(here: Path) -> None:
    process = make("train", "LAYER=x", "NPROC=2")
    assert set(said(process.stderr)) == {
        "error: layer: expected layer numbers from 0, found 'x'; for example LAYER=17, LAYER=\"0-5 12\" or LAYER=all"
    }
    assert process.returncode == 2


@pytest.mark.slow
def test_names_with_spaces(here: Path) -> None:
    """Model, text, stores and runs in places with spaces and a quote: from `make harvest` to the report."""
    Path("my models").mkdir()
    Path("models/tiny-llama").rename("my models/Bob's tiny llama")
    Path("text.jsonl").rename("my text.jsonl")
    shutil.rmtree("activations")
    shutil.rmtree("checkpoints")
    options = ["--layer", "0", "--run", "a", "--model.name", "my models/Bob's tiny llama"]
    options += ["--paths.activations", "my stores", "--paths.checkpoints", "my runs"]
    text = ["--data.files", "my text.jsonl", "--data.pack", "concat", "--harvest.context_length", "32"]
    text += ["--harvest.rows", "2000", "--harvest.heldout_fraction", "0.1"]
    process = make("harvest", "LAYER=0", f"ARGS={shlex.join([*options, *text])}")
    assert process.returncode == 0, process.stderr
    assert call("train", *options) == 0
    assert call("evaluate", *options, "--cross-entropy-tokens", "64") == 0
    run = Path("my runs/transcoder/bob's tiny llama/layer_0/a")
    assert json.loads((run / "evaluation/metrics.json").read_text())["cross_entropy"]["skipped"] is None
    assert call("train.samples_page", *options) == 0
    assert call("evaluate.export", *options, "--format", "saelens") == 0
    assert call("evaluate.compare", *options, "--with", str(run / "export/saelens")) == 0


def test_a_huge_document_is_text_like_any_other(here: Path) -> None:
    """One line of 10.6 MB, more than datasets reads at a time: contexts are cut from it until there are enough."""
    Path("text.jsonl").write_text(json.dumps({"text": "the red river sings. " * 505_000}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harvest.run.is_heldout", lambda *_, **__: False)
        assert call("harvest", "--layer", "0") == 0
    assert len(Store.open("activations/tiny-llama/layer_0.zarr").train) == 2000
