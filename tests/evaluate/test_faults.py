"""What an evaluation stops at with one line, and starts again from."""

from pathlib import Path

import pytest

from common.cli import run_stage
from common.errors import InputError
from common.files import locked
from evaluate.files import finished
from evaluate.run import evaluate
from tests.disk import small_disk
from tests.evaluate.runs import make_run, settings_of


@pytest.mark.parametrize("room", [8, 200])
def test_a_full_disk(room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With room for the first file or for some: no metrics.json, no half file; with more room all of it."""
    with small_disk(tmp_path / "disk", "8m") as (disk, remount):
        make_run(disk)
        folder = settings_of(disk).run_dir() / "evaluation"
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
        remount(f"size={used // 1024 + room}k")
        with pytest.raises(SystemExit) as stopped:
            run_stage(lambda: evaluate(settings_of(disk), ce_tokens=0) and None)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2
        assert line.startswith(f"error: {folder}/")
        assert line.endswith("No space left on device; fix that and rerun the same command to continue")
        assert finished(folder) is None
        assert not list(disk.rglob("*.tmp"))
        remount("size=8m")
        metrics, fresh = evaluate(settings_of(disk), ce_tokens=0)
        assert fresh
        assert finished(folder) == metrics


def test_two_evaluations_of_a_run_and_what_a_killed_one_left(tmp_path: Path) -> None:
    make_run(tmp_path)
    settings = settings_of(tmp_path)
    folder, lock = settings.run_dir() / "evaluation", settings.run_dir() / ".evaluation"
    with locked(lock, "held"), pytest.raises(InputError, match="another evaluation is writing it"):
        evaluate(settings, ce_tokens=0)
    folder.mkdir(exist_ok=True)
    (folder / "report.html.77.tmp").write_text("half")
    lock.write_text("77\n")
    metrics, _ = evaluate(settings, ce_tokens=0)
    assert {path.name for path in folder.iterdir()} == {*metrics.files, "metrics.json"}
    assert not lock.exists()
