"""What make hands to a stage: the words that were typed, whatever they hold, and nothing of the environment."""

import os
import subprocess
from pathlib import Path

import pytest

from common.settings import ROOT

STAND_IN = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >> "$SAID"
printf '\\0' >> "$SAID"
"""
"""A Python that writes down what it was called with: words that end in a zero byte, an empty one after each call."""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment in a place with spaces, an apostrophe and brackets, installed by its stamps."""
    environment = tmp_path / "Bob's  new (2) venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(STAND_IN)
    (environment / "bin" / "python").chmod(0o755)
    for name in (".installed", ".installed-dev", ".installed-embedded"):
        (environment / name).touch()
    return environment


def make(venv: Path, *typed: str, **around: str) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """The calls that `make typed` makes, as words, and how it ended; `around`: the environment."""
    said = venv.parent / "said"
    said.write_bytes(b"")
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "ARGS"}
    command = ["make", "-f", str(ROOT / "Makefile"), f"VENV={venv}", *typed]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=own | around | {"SAID": str(said)}
    )
    calls = said.read_bytes().decode().split("\0\0")[:-1]
    return [call.split("\0") for call in calls], process


TEXTS = [
    "two\nlines",
    "a\n\n- list\n@ and + at a line's start\n\tand a tab",
    'it\'s $5, $(shell id) ${HOME} `id` "quoted" #1 * \\\\ % ; & | < > !',
    "trailing backslash \\",
    "-5 degrees",
    "--help",
    "naïve 日本語 🙂",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_typed(text: str, venv: Path) -> None:
    calls, process = make(venv, "read", "LAYER=3", f"TEXT={text}", "RUN=a")
    assert (process.returncode, process.stderr) == (0, "")
    said = [["--text", text], [f"--text={text}"]][text.startswith("-")]
    assert calls == [["-m", "evaluate.read", *said, "--layer", "3", "--run", "a"]]


def test_changes_of_latents_arrive(venv: Path) -> None:
    changes = ("SET=12/345=3.0 12/7=-1", "SCALE=12/1@2=2", "ABLATE=12/3@5")
    calls, process = make(venv, "read", "LAYER=12", "TEXT=a", *changes)
    assert (process.returncode, process.stderr) == (0, "")
    said = ["--set", "12/345=3.0 12/7=-1", "--scale", "12/1@2=2", "--ablate", "12/3@5"]
    assert calls == [["-m", "evaluate.read", "--text", "a", *said, "--layer", "12"]]


def test_args_are_words_of_the_shell_on_any_number_of_lines(venv: Path) -> None:
    typed = "ARGS=--a 'x $5 y'\n--b \"$HOME\"\n"
    calls, _ = make(venv, "train", "LAYER=8\n12", typed, HOME="/my home")
    assert calls == [["-m", "train", "--layer", "8\n12", "--a", "x $5 y", "--b", "/my home"]]


def test_the_environment_has_no_say(venv: Path) -> None:
    names = (
        "LAYER",
        "PROFILE",
        "RUN",
        "HARVEST",
        "NPROC",
        "NODES",
        "HEAD",
        "RESTARTS",
        "ARGS",
        "TO",
        "TEXT",
        "SET",
        "SCALE",
        "ABLATE",
        "WITH",
        "FORMAT",
        "PREFIX",
        "FROM",
        "REPO",
        "MODEL",
    )
    around = dict.fromkeys(names, "of the environment")
    for target, module in {
        "train": "train", "evaluate": "evaluate", "read": "evaluate.read", "export": "evaluate.export",
        "compare": "evaluate.compare", "absorption": "evaluate.absorption", "import": "transcoder.import_",
        "push": "evaluate.push", "runs": "evaluate.runs", "circuit": "evaluate.circuit", "model": "evaluate.model",
        "probe": "evaluate.probe", "explain": "evaluate.explain",
        "stores": "evaluate.stores", "sweep": "train.sweep",
    }.items():  # fmt: skip
        assert make(venv, target, **around)[0] == [["-m", module]]
    assert make(venv, "upload", **around)[0] == [["-m", "shards", "upload"]]
    assert make(venv, "export", "PREFIX=0", **around)[0] == [["-m", "evaluate.export", "--prefix", "0"]]


def test_demo_takes_run_and_layer(venv: Path) -> None:
    calls, _ = make(venv, "demo", "RUN=x", "LAYER=3", "ARGS=--train.lr 1e-3")
    options = ["--profile", "demo", "--layer", "3", "--run", "x", "--train.lr", "1e-3"]
    assert calls == [["-m", stage, *options] for stage in ("harvest", "train", "evaluate")]
    calls, process = make(venv, "demo", "PROFILE=guide")
    assert (calls, process.returncode) == ([], 2)
    assert "make demo is PROFILE=demo" in process.stderr


def test_spread_starts_processes_where_each_has_its_own_layers(venv: Path) -> None:
    """NPROC alone: for the stages whose rows are shared."""
    layers = ["--layer", "all", "--spread", "layers"]
    for target, module in {"train": "train", "sweep": "train.sweep", "evaluate": "evaluate"}.items():
        typed = (target, "LAYER=all", "NPROC=4")
        assert make(venv, *typed, "SPREAD=layers")[0] == [["-m", "common.launch", "4", module, *layers]]
        alone = ["-m", module] if target == "sweep" else ["-m", "common.launch", "4", module]
        assert make(venv, *typed)[0] == [[*alone, "--layer", "all"]]
    assert make(venv, "train", "SPREAD=layers")[0] == [["-m", "train", "--spread", "layers"]]
    calls = make(venv, "demo", "LAYER=all", "NPROC=2", "SPREAD=layers")[0]
    options = ["--profile", "demo", "--layer", "all"]
    assert calls == [
        ["-m", "common.launch", "2", "harvest", *options],
        ["-m", "common.launch", "2", "train", *options, "--spread", "layers"],
        ["-m", "common.launch", "2", "evaluate", *options, "--spread", "layers"],
    ]


def test_a_stage_of_one_process_says_that_nproc_is_not_for_it(venv: Path) -> None:
    for target in ("export", "probe", "compare", "verify"):
        calls, process = make(venv, target, "LAYER=3", "NPROC=4")
        assert calls[0][:1] == ["-m"]
        assert "common.launch" not in calls[0]
        assert process.stdout.startswith(
            f"note: make {target} runs in one process; NPROC is for harvest, train,"
        )
    for typed in (("train", "NPROC=4"), ("probe", "NPROC=4", "SPREAD=layers"), ("export",)):
        assert "note:" not in make(venv, *typed, "LAYER=3")[1].stdout


def test_a_plan_of_given_width_needs_no_model(venv: Path) -> None:
    """The training's part comes first: the harvest's asks the hub for the model."""
    plans = [["-m", "harvest", "--plan", "--layer", "3"], ["-m", "train.plan", "--layer", "3"]]
    assert make(venv, "plan", "LAYER=3")[0] == plans
    wide = ["-m", "train.plan", "--width", "2304", "--layer", "3"]
    assert make(venv, "plan", "LAYER=3", "WIDTH=2304")[0] == [wide, plans[0]]


def test_nodes_start_processes_on_each(venv: Path) -> None:
    where = ["-m", "common.launch", "--nodes", "4", "--head", "gpu-1:29400"]
    for target in ("train", "harvest", "evaluate"):
        typed = (target, "LAYER=3", "NODES=4", "HEAD=gpu-1:29400")
        assert make(venv, *typed, "NPROC=8")[0] == [[*where, "8", target, "--layer", "3"]]
        assert make(venv, *typed)[0] == [[*where, "1", target, "--layer", "3"]]
        again = make(venv, *typed, "NPROC=8", "RESTARTS=3")[0]
        assert again == [[*where, "--max-restarts", "3", "8", target, "--layer", "3"]]


def test_a_misspelt_variable_stops_make(venv: Path) -> None:
    calls, process = make(venv, "train", "LAYER=3", "RUM=x")
    assert (calls, process.returncode) == ([], 2)
    assert "RUM=... is not a variable of this Makefile; expected LAYER PROFILE RUN" in process.stderr
    assert process.stderr.count("\n") == 1


def test_an_environment_in_a_place_with_spaces_is_made_and_kept(venv: Path) -> None:
    """Its Python is called by its whole name; stamps tell what is installed."""
    assert make(venv, "install-dev", "install-embedded")[0] == []
    (venv / ".installed-dev").unlink()
    calls, process = make(venv, "install-dev")
    assert process.returncode == 0, process.stderr
    assert calls[0][-2:] == ["--group", "dev"]
    assert str(venv / ".constraints") in calls[0]
    assert (venv / ".installed-dev").is_file()


def test_help_lists_every_target_of_the_readme(venv: Path) -> None:
    shown = make(venv, "help")[1].stdout
    for target in ("runs", "stores", "train", "evaluate", "read"):
        assert target in shown
