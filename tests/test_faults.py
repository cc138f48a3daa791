"""docs/faults.md names tests that exist; nothing depends on the wall clock."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE)))
TIMED = {"common/nodes/watch.py": "torchrun's note of an error has a time, by which it finds the first"}
CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}


def test_every_fault_names_a_test() -> None:
    faults = [
        line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| fault |")
    ]
    assert len(faults) >= 20
    assert [line for line in faults if not re.search(r"`tests/[\w/]+\.py::\w+`", line)] == []


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_nothing_asks_what_time_it_is() -> None:
    """time.perf_counter measures spans and cannot go back; file dates only order a cache and mark conversions."""
    for package in ("common", "harvest", "shards", "transcoder", "train", "evaluate"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = node.func.value
                    clock = isinstance(owner, ast.Name) and owner.id in ("time", "datetime", "date")
                    asked = clock and node.func.attr in CLOCKS
                    assert not asked or str(file.relative_to(ROOT)) in TIMED, f"{file}: {ast.unparse(node)}"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_in_an_import_that_swallows_it(number: str, tmp_path: Path) -> None:
    """As PyTorch's of numpy does: the stage must not go on with half a module."""
    swallows = f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{number})\nexcept BaseException:\n    pass\n"
    (tmp_path / "swallows.py").write_text(swallows)
    code = f"import sys\nfrom common import cli\nsys.path.append({str(tmp_path)!r})\n"
    code += "def main():\n    import swallows\n    print('went on')\ncli.run_stage(main)\n"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = (process.returncode, process.stdout, process.stderr)
    assert said == (130, "", "interrupted: the same command continues\n")


@pytest.mark.parametrize(
    ("first", "package"),
    [("-m", each) for each in ("common", "harvest", "shards", "transcoder", "train", "evaluate")]
    + [("script.py", "train")],
)
def test_ctrl_c_while_a_package_is_imported(first: str, package: str) -> None:
    """As by `python -m package`; a notebook, or a script that imports it, keeps Python's own answer."""
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the
    )
    code += f"sys.argv = [{first!r}]\nimport {package}\n"  # background of a shell ignores it
    code += "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('raised')\n"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = (process.returncode, process.stdout, process.stderr)
    stopped = (130, "", "interrupted: the same command continues\n")
    assert said == (stopped if first == "-m" else (0, "raised\n", ""))


def test_a_reader_that_leaves() -> None:
    """`| head -1` of more than a pipe holds, and of a line that is still in Python's buffer."""
    for lines in (100_000, 2):
        code = f"from common import cli\ndef main():\n    for i in range({lines}):\n        print(i)\n"
        code += "cli.run_stage(main)\n"
        command, buffered = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=buffered, **pipes) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if lines > 2:
                assert process.stdout.readline() == b"0\n"
            process.stdout.close()
            said = process.stderr.read()
        assert (process.returncode, said) == (141, b"")


SAYS = (
    "import sys\nfrom common import cli, errors\n"
    "def main():\n    print('caf\\u00e9 \\u4e2d')\n    print('said', file=sys.stderr)\n"
)
WRITES = "    open('out', 'w').write('x')\n"


@pytest.mark.parametrize(
    ("closed", "said"), [("2>&-", "caf\u00e9 \u4e2d\n"), (">&-", ""), ("<&- >&- 2>&-", "")]
)
def test_closed_standard_streams(closed: str, said: str, tmp_path: Path) -> None:
    """What is printed goes nowhere, least of all into the first file that is opened."""
    code = (
        f"{SAYS}{WRITES}    import subprocess\n    subprocess.run(['echo', 'child'])\ncli.run_stage(main)\n"
    )
    (tmp_path / "stage_.py").write_text(code.replace("    print('caf", "    print('caf", 1), encoding="utf-8")
    line = f"'{sys.executable}' '{tmp_path}/stage_.py' {closed}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert process.returncode == 0
    assert process.stdout.decode().replace("child\n", "") == said
    assert (tmp_path / "out").read_text(encoding="utf-8") == "x"


def test_standard_error_on_a_full_disk() -> None:
    """The line cannot be read there, but the exit code can."""
    code = f"{SAYS}    raise errors.InputError('no')\ncli.run_stage(main)\n"
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("encoding", "said"), [("latin-1", b"caf\xe9 \\u4e2d\n"), ("ascii", b"caf\\xe9 \\u4e2d\n")]
)
def test_a_terminal_that_lacks_a_character(encoding: str, said: bytes) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding}
    code = f"{SAYS}cli.run_stage(main)\n"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, said, b"said\n")
