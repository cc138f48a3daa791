"""make gpu runs to its end; here on the CPU, at its small sizes."""

import subprocess
import sys

import pytest

from bench import gpu
from common.errors import InputError
from common.settings import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ceilings", "step", "loop", "harvest"])
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


def test_an_unknown_part_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "expected some of ceilings" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cuda:99"])
    with pytest.raises(InputError, match=r"^model\.device"):
        gpu.main()
