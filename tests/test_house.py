"""The house rules that a reader relies on: files and functions of a size to read, and a tree that lists them all."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from common.settings import ROOT

FILE_LINES, FUNCTION_LINES = 500, 60
LONGER = {
    "evaluate/report/figures.py:all_plots": "the list of all plots, one entry after the other",
}
"""What is longer, and why."""
FILES = sorted(
    path.relative_to(ROOT)
    for package in (
        "common",
        "harvest",
        "shards",
        "transcoder",
        "train",
        "evaluate",
        "bench",
        "tests",
    )
    for path in (ROOT / package).rglob("*.py")
)


def lengths(file: Path) -> dict[str, int]:
    """Lines of the file and of each of its functions, by name."""
    text = (ROOT / file).read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    per_function = {
        f"{file}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions
    }
    return {str(file): len(text.splitlines())} | per_function


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_are_of_a_size_to_read(file: Path) -> None:
    for name, lines in lengths(file).items():
        limit = FUNCTION_LINES if ":" in name else FILE_LINES
        assert lines <= limit or name in LONGER, f"{name} has {lines} lines, more than {limit}"


@pytest.mark.parametrize("file", [file for file in FILES if "tests" not in file.parts], ids=str)
def test_text_names_its_encoding(file: Path) -> None:
    """Without one it is the locale's, ISO-8859-1 for some: what one machine writes another cannot read."""
    for call in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        keywords = {word.arg for word in call.keywords}
        words = [word.value for word in call.args if isinstance(word, ast.Constant)]
        if name in ("read_text", "write_text"):
            text = len(call.args) < (1 if name == "read_text" else 2)
        elif name == "open":
            mine = isinstance(call.func, ast.Name) or ast.unparse(call.func.value) not in (
                "Store",
                "cls",
                "os",
                "archive",
            )
            text = mine and not any(isinstance(mode, str) and "b" in mode for mode in words)
        else:
            starts = name in ("run", "Popen", "check_output", "check_call", "call")
            text = starts and bool(keywords & {"text", "universal_newlines"})
        assert not text or "encoding" in keywords, f"{file}:{call.lineno}: {ast.unparse(call)}"


def test_every_exception_is_one() -> None:
    sizes = {name: lines for file in FILES for name, lines in lengths(file).items()}
    for name in LONGER:
        assert sizes[name] > (FUNCTION_LINES if ":" in name else FILE_LINES), (
            f"{name} is no exception any more"
        )


def test_the_tree_lists_every_module() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[-2]
    for package in ("common", "harvest", "shards", "transcoder", "train", "evaluate"):
        block = re.search(rf"^{package}/.*\n((?:  .*\n)+)", tree, re.MULTILINE)
        assert block
        listed = re.findall(r"^ +(\w+\.py)", block[1], re.MULTILINE)
        files = (ROOT / package).rglob("*.py")
        there = [
            path.name for path in files if not path.name.startswith("__") and path.parent.name != "formats"
        ]
        assert sorted(listed) == sorted(there), package


def test_every_document_is_reached_from_the_readme_or_the_log() -> None:
    """A page that nothing links to is a page that nobody reads."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    texts = {name: (ROOT / name).read_text() for name in tracked or ["README.md"]}
    for name in texts:
        if name == "README.md" or name.startswith("evaluate/report/page"):
            continue
        linked = any(Path(name).name in text for other, text in texts.items() if other != name)
        assert linked, f"{name}: nothing links to it"
