"""The one-way flow of docs/architecture.md, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "common": set(),
    "shards": {"common"},
    "transcoder": {"common", "shards"},
    "harvest": {"common", "shards"},
    "train": {"common", "shards", "transcoder"},
    "evaluate": {"common", "shards", "transcoder", "train", "harvest.lm", "harvest.replay"},
}
OURS = set(ALLOWED)
MODULES = 14
"""On one level: what a reader takes in at a glance."""


def imported(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
    return {name for name in names if name.split(".")[0] in OURS}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_go_one_way(package: str) -> None:
    assert files(package)
    for path in files(package):
        for name in imported(path):
            allowed = ALLOWED[package] | {package}
            fine = any(name == ok or name.startswith(ok + ".") for ok in allowed)
            assert fine, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", sorted(OURS))
def test_no_level_has_more_modules_than_a_reader_takes_in(package: str) -> None:
    for folder in {path.parent for path in files(package)}:
        modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= MODULES, f"{folder.relative_to(ROOT)} has {len(modules)} modules"


def test_transformer_lens_is_imported_in_one_file() -> None:
    users = [path for package in OURS for path in files(package) if "transformer_lens" in _imports(path)]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["harvest/lm.py"]


def _imports(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    names = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}
