"""The README and the pages it leads to: commands are commands, Python runs; docs/other_tools.md is tests/peers'."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.cli import load, parser
from common.settings import ROOT, SECTIONS
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store

PAGES = ("README.md", "docs/commands.md", "docs/your_model.md", "docs/python.md", "docs/other_tools.md")
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    for line in block.splitlines()
    if not language and line.startswith("make ")
]
TABLE = re.findall(r"^\| `(make [a-z]+)[^`]*` \|", TEXT, re.MULTILINE)
INSTALLED = {"pytest", "venv", "pip", "pip_audit"}
OWN = {"--plan"}
"""Options that are a stage's own."""


def lines_of(command: str) -> list[list[str]]:
    """The programs that a make command would start, as words."""
    skipped = [
        word for name in ("install", "install-dev", "install-embedded", "lint") for word in ("-o", name)
    ]
    words = ["make", "--dry-run", *skipped, *shlex.split(command.replace("$(seq -s ' ' 0 29)", "0 1"))[1:]]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in process.stdout.replace("\\\n", " ").splitlines() if " -m " in line]


def test_a_value_reaches_the_stage_as_it_was_given() -> None:
    text = 'it\'s $5 and $(shell echo more), ${HOME}; `id` "quoted" #1 * \\\\'
    (words,) = lines_of(shlex.join(["make", "read", f"TEXT={text}"]))
    assert words[words.index("--text") + 1] == text


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 12
    assert len(TABLE) >= 8


@pytest.mark.parametrize("command", [*COMMANDS, *TABLE])
def test_a_command_starts_a_stage_with_settings_that_exist(command: str) -> None:
    for words in lines_of(command):
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        path = ROOT / module.replace(".", "/")
        assert module in INSTALLED or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        if module in ("harvest", "train", "evaluate"):
            options = [word for word in arguments if word not in OWN]
            settings, _ = load(parser(module, ""), options)
            layers = re.search(r'LAYER="?([\d ]+)', command)
            assert settings.layers == (tuple(map(int, layers[1].split())) if layers else settings.layers)


def test_the_settings_that_newcomers_are_pointed_to_exist() -> None:
    lines = (ROOT / "docs" / "coming_from.md").read_text().splitlines()
    ours = [line.split(" | ")[1] for line in lines if line.startswith("| ") and " | " in line]
    named = [pair for cell in ours for pair in re.findall(r"`(\w+)\.(\w+)`", cell)]
    assert len(named) >= 20
    assert [pair for pair in named if pair[1] not in SECTIONS[pair[0]].model_fields] == []


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a store and a run at the paths that the README names."""
    (code,) = (block for language, block in BLOCKS if language == "python" and "Store.open(" in block)
    rng = np.random.default_rng(0)
    rows = (
        rng.standard_normal((2000, 6)).astype(np.float32),
        rng.standard_normal((2000, 5)).astype(np.float32),
    )
    monkeypatch.chdir(tmp_path)
    store = re.search(r'Store\.open\("(.+?)"\)', code)
    run = re.search(r'Transcoder\.load\("(.+?)"\)', code)
    assert store
    assert run
    split_store = make_store(store[1], rows, rows)
    coder = random_coder(6, 5, (4, 10))
    coder.save(run[1])
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    inputs = split_store.train.loader(batch_size=1024, seed=0)
    first, outputs = next(iter(inputs))
    expected = (coder.prefix(0)(first) - outputs).pow(2).mean()
    assert float(names["error"]) == pytest.approx(float(expected))  # pyright: ignore[reportArgumentType]
