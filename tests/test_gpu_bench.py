"""make gpu runs to its end; here on the CPU, at its small sizes."""

import subprocess
import sys

import pytest

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


def test_an_unknown_part_or_a_missing_gpu_is_one_line() -> None:
    for arguments, expected in (
        (["nonsense"], "expected some of ceilings"),
        (["--device", "cuda:99"], "model.device"),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        assert process.returncode == 2
        assert expected in process.stderr.splitlines()[-1]
