import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from common.cli import load, parser
from common.settings import ROOT, Settings
from tests.harvest.shrunk import shrink
from tests.hub import TOKEN, Hub, Run, running
from tests.models import FAMILIES, save_model, save_wide_gemma, sentences, write_jsonl

# A subprocess on a busy machine would take a thread less and say so in a line of its own (common/device.py).
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-gemma", "gemma2")


@pytest.fixture(scope="session", params=FAMILIES)
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of every family, one after the other."""
    return save_model(tmp_path_factory.mktemp("families") / f"tiny-{request.param}", request.param)


@pytest.fixture(scope="session")
def wide_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide_gemma(tmp_path_factory.mktemp("models") / "wide-gemma")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "corpus.jsonl", sentences(600))


@pytest.fixture
def settings_for(tmp_path: Path, corpus: Path) -> Callable[..., Settings]:
    """Settings of a small harvest below `tmp_path`, with further --section.key options."""

    def make(model: Path, *options: str, layer: str = "1", rows: int = 2000) -> Settings:
        argv = [
            "--layer",
            layer,
            "--model.name",
            str(model),
            "--data.files",
            str(corpus),
            "--data.pack",
            "concat",
        ]
        argv += [
            "--harvest.rows",
            str(rows),
            "--harvest.context_length",
            "32",
            "--harvest.heldout_fraction",
            "0.1",
        ]
        argv += ["--paths.activations", str(tmp_path / "activations"), "--model.device", "cpu"]
        argv += ["--paths.checkpoints", str(tmp_path / "checkpoints"), *options]
        return load(parser("harvest", ""), argv)[0]

    return make


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def at_hub(hub: Hub, tmp_path: Path) -> Run:
    """A Python process whose hub is the server; HF_ENDPOINT is read when huggingface_hub is imported."""
    surroundings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    surroundings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    surroundings |= {"HF_HUB_DISABLE_XET": "1"}  # the real hub's storage protocol, which no fake speaks

    def call(*command: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | surroundings
        env |= {"HF_TOKEN": token} if token else {}
        line = [sys.executable, *command]
        return subprocess.run(
            line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    return call


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 512 rows (32 chunks of 16), so that small harvests have several."""
    shrink(monkeypatch.setattr)
