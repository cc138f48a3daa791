"""make gpu runs to its end; here on the CPU and on the fake device, at its small sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import parts
from bench.gpu.parts import PARTS, SMALL
from common.errors import InputError
from common.settings import ROOT
from tests.pretend import DEVICE, pretend_device

ON_DEVICE = ("ceilings", "step", "loader", "loop", "resume", "evaluation")
"""The parts that need no language model and no other process."""
FIGURES = {
    "ceilings": "copy, TB/s",
    "step": "bfloat16, batch 128, 256 latents",
    "loader": "batch 64",
    "loop": "batch 64",
    "resume": "float32",
    "evaluation": "second pass, rows/s",
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_to_its_end_and_prints_its_table(part: str) -> None:
    results = ROOT / "bench" / "results" / "gpu.json"
    before = results.read_bytes()
    process = subprocess.run(
        [sys.executable, "-m", "bench.gpu", part, "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=True,
    )
    assert f"{part} on cpu" in process.stdout
    assert results.read_bytes() == before  # a CPU's figures are no GPU's


@pytest.mark.parametrize("part", ON_DEVICE)
def test_a_part_runs_to_its_end_on_a_device(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "REPEATS", 1)
    with pretend_device() as counts:
        figures = PARTS[part](DEVICE, SMALL)
        assert counts["kernels"] > 0
    assert FIGURES[part] in figures
    assert gpu.table(part, figures).row_count == len(figures)
    if part == "resume":
        assert all(each["tensors that differ"] == 0 < each["tensors"] for each in figures.values())


def test_what_was_done_with_this_code_is_not_done_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def part(name: str) -> Any:
        return lambda device, sizes: done.append(name) or {"figure": float(len(done))}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "PARTS", {name: part(name) for name in ("one", "two")})
    cuda = torch.device("cuda")
    gpu.run(["one"], cuda, SMALL)
    gpu.run(["one", "two"], cuda, SMALL)
    assert done == ["one", "two"]
    assert "one: done with this code before" in capsys.readouterr().out
    gpu.run(["one"], cuda, SMALL, again=True)
    monkeypatch.setattr(gpu, "code_version", lambda: "another")
    gpu.run(["two"], cuda, SMALL)
    assert done == ["one", "two", "one", "two"]
    written = json.loads((tmp_path / "gpu.json").read_text())["made"]
    assert (written["one"], written["two"]) == ({"figure": 3.0}, {"figure": 4.0})
    assert written["code"]["two"] == "another" != written["code"]["one"]


def test_an_unknown_part_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "expected some of tests, ceilings" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cuda:99"])
    with pytest.raises(InputError, match=r"^model\.device"):
        gpu.main()
