"""What `make install` installs with and from where its packages import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import ROOT

GOOD = 'case "$1" in -c) exit 0;; *) echo "$0 $*" > "$SAID"; exit 3;; esac\n'
"""A Python that can make environments; it writes down that it was asked to, and stops make."""
BAD = "exit 127\n"
"""A stand-in of pyenv for a version that is not installed, or a Python without its venv."""


def asked_for_venv(folder: Path, pythons: dict[str, str], *typed: str) -> tuple[str | None, str]:
    """The Python of a PATH of `pythons` that make makes the environment with, and what make says."""
    there = folder / "path"
    there.mkdir()
    for name, script in pythons.items():
        (there / name).write_text(f"#!/bin/sh\n{script}")
        (there / name).chmod(0o755)
    for tool in ("sh", "make"):
        (there / tool).symlink_to(Path("/bin/sh") if tool == "sh" else Path("/usr/bin/make"))
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "PYTHON"}
    said = folder / "said"
    process = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), f"VENV={folder / 'new'}", *typed, "install"],
        cwd=ROOT,
        env=own | {"PATH": str(there), "SAID": str(said)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    return (Path(said.read_text().split()[0]).name if said.is_file() else None), process.stderr


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": GOOD, "python3.14": GOOD}, "python3.11"),
        ({"python3.12": GOOD, "python3.13": GOOD, "python3": GOOD}, "python3.13"),
        ({"python3.11": BAD, "python3.13": BAD, "python3.12": GOOD}, "python3.12"),
        ({"python3.14": BAD, "python3": GOOD}, "python3"),
        ({"python3.10": GOOD, "python3.15": GOOD, "python3": BAD}, None),
        ({}, None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_the_python_of_the_environment(pythons: dict[str, str], chosen: str | None, tmp_path: Path) -> None:
    """3.11, else the newest that runs; when there is none, one line that says what to install."""
    called, errors = asked_for_venv(tmp_path, pythons)
    assert called == chosen
    if chosen is None:
        assert "*** no Python of 3.11 to 3.14 that can make an environment: install Python 3.11" in errors
        assert errors.count("\n") == 1


def test_a_python_that_is_named(tmp_path: Path) -> None:
    called, _ = asked_for_venv(tmp_path, {"python3.11": GOOD, "python3.12": GOOD}, "PYTHON=python3.12")
    assert called == "python3.12"


def test_a_python_that_is_named_and_does_not_suit(tmp_path: Path) -> None:
    called, errors = asked_for_venv(tmp_path, {"python3.11": GOOD, "python3.9": BAD}, "PYTHON=python3.9")
    assert called is None
    assert "*** PYTHON=python3.9 is no Python of 3.11 to 3.14 that can make an environment: " in errors
    assert errors.count("\n") == 1


@pytest.mark.skipif(not (3, 11) <= sys.version_info[:2] <= (3, 14), reason="not a Python of the pins")
def test_this_python_suits(tmp_path: Path) -> None:
    """The question that make asks a Python, put to a real one."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    question = next(
        line.removeprefix("SUITS := ") for line in makefile.splitlines() if line.startswith("SUITS")
    )
    assert subprocess.run([sys.executable, "-c", question], check=False).returncode == 0
    older = question.replace("sys.version_info[:2]", "(3, 10)")
    assert subprocess.run([sys.executable, "-c", older], check=False).returncode == 1


def test_packages_import_from_any_directory(tmp_path: Path) -> None:
    """The editable install: pipeline.toml is the project's, relative paths are the directory's."""
    process = subprocess.run(
        [sys.executable, "-c", "import common.settings as s; print(s.ROOT); import shards, transcoder.selection"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert process.returncode == 0, (
        f"the environment is older than pyproject.toml: make install\n{process.stderr}"
    )
    assert (Path(process.stdout.strip()) / "pipeline.toml").is_file()
