"""Runs on real rows of the demo's model, and the environment that the other tools are installed in."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.cli import load, parser
from common.errors import InputError
from common.settings import ROOT, Model, Settings
from harvest import embedded, lm
from harvest.run import harvest
from shards import Store
from train import loop
from transcoder import Transcoder

TOOLS = Path(__file__).parent / "tools.py"
LAYERS = (0, 1)
Peer = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def peer_python() -> Path:
    python = ROOT / os.environ.get("PEERS", ".venv-peers") / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{python} is not there; make test-peers installs it")
    return python


@pytest.fixture
def peer(peer_python: Path, tmp_path: Path) -> Peer:
    """peer(command, *paths or tensors): what tools.py wrote; tensors are handed over as a file of `name`."""

    def call(command: str, *arguments: str | Path | dict[str, Tensor]) -> dict[str, Tensor]:
        line, out = [str(peer_python), str(TOOLS), command], tmp_path / "out.safetensors"
        for number, argument in enumerate(arguments):
            if isinstance(argument, dict):
                file = tmp_path / f"argument_{number}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in argument.items()}, file)
                argument = file
            line.append(str(argument))
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        process = subprocess.run(
            [*line, str(out)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
        )
        assert process.returncode == 0, process.stderr
        return load_file(out)

    return call


@pytest.fixture(scope="session")
def settings_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    """Settings of small runs on the demo's model, with further options; one directory for all of them."""
    root = tmp_path_factory.mktemp("peers")

    def make(*options: str, layer: str = "1") -> Settings:
        argv = ["--profile", "demo", "--layer", layer, "--run", "demo", "--wandb.mode", "disabled"]
        argv += ["--harvest.rows", "4096", "--train.rows", "38400", "--train.batch_size", "256"]
        argv += ["--transcoder.d_sae", "1152", "--transcoder.group_sizes", "288,288,576"]
        argv += ["--paths.activations", str(root / "activations")]
        argv += ["--paths.checkpoints", str(root / "checkpoints"), *options]
        return load(parser("tests", ""), argv)[0]

    return make


@pytest.fixture(scope="session")
def model(settings_of: Callable[..., Settings]) -> Path:
    """The demo's model."""
    try:
        return embedded.model_directory(settings_of().model.name)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def runs(settings_of: Callable[..., Settings], model: Path) -> dict[str, Settings]:
    """Trained runs: demo on both layers (harvested in one pass), skip, and gain, whose inputs are with the gain."""
    harvest(settings_of(layer=" ".join(map(str, LAYERS))))
    settings_by_name = {f"demo_{layer}": settings_of(layer=str(layer)) for layer in LAYERS}
    settings_by_name["skip"] = settings_of("--run", "skip", "--transcoder.skip", "true")
    settings_by_name["gain"] = settings_of("--run", "gain", "--harvest", "gain", "--harvest.input", "mlp_in")
    harvest(settings_by_name["gain"])
    for settings in settings_by_name.values():
        loop.train(settings, Store.of(settings))
    return settings_by_name


def heldout(settings: Settings, n: int = 400) -> Tensor:
    """[n, D_in] held-out inputs of the run's store."""
    return Store.of(settings).heldout.rows(0, n)[0]


def tokens(settings: Settings, n: int) -> Tensor:
    """[n, T] int64, the first held-out contexts."""
    return torch.from_numpy(Store.of(settings).heldout.contexts[np.arange(n)].astype(np.int64))


def agree(own: Transcoder, inputs: Tensor, theirs: dict[str, Tensor]) -> int:
    """Asserts that another tool computes what we do on `inputs`; returns how many rows were set apart.

    Pre-activations to 1e-5. A row with a pre-activation within 1e-5 of the jump may go either way and is set apart;
    on all others the same latents are active, with the same values and outputs.
    """
    pre = own.pre_activations(inputs)
    torch.testing.assert_close(theirs["pre"], pre, rtol=1e-5, atol=1e-5)
    threshold = torch.as_tensor(own.threshold)
    near = ((pre - threshold).abs() <= 1e-5 * threshold.clamp_min(1)).any(1)
    assert near.float().mean() < 0.05
    acts = own.encode(inputs)
    assert torch.equal((theirs["acts"] > 0)[~near], (acts > 0)[~near])
    assert (acts[~near] > 0).sum() > len(inputs)
    torch.testing.assert_close(theirs["acts"][~near], acts[~near], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["outputs"][~near], own(inputs)[~near], rtol=1e-4, atol=1e-4)
    return int(near.sum())


def language_model(directory: Path) -> lm.LanguageModel:
    model = Model(name=str(directory), device="cpu", dtype="float32")
    return lm.load(model, lm.locate(model), lm.load_tokenizer(str(directory), None))


def as_transformers_4_reads_it(model: Path, folder: Path) -> Path:
    """A model directory that transformers 5 wrote, for the peers' transformers 4: two keys have moved."""
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".json" or path.name not in ("config.json", "tokenizer_config.json"):
            (folder / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder
