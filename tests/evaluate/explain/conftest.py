"""A run whose latents are words, evaluated once, and endpoints on loopback that answer in every way."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evaluate.run import evaluate
from tests.evaluate.explain.planted import make_planted, settings_of
from tests.evaluate.explain.server import Server, running


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    make_planted(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.run.draw", lambda *_: [])  # the plots: two thirds of the time
        evaluate(settings_of(root), ce_tokens=0)
    return root


@pytest.fixture
def root(planted: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(planted, tmp_path / "planted"))


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit code, standard output and error."""
    from common.cli import run_stage
    from evaluate.explain.__main__ import main
    from tests.evaluate.explain.planted import arguments

    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)

    def run(root: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["explain", *arguments(root), *options])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_stage(main)
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run
