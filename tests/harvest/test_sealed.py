"""Loading a model starts nothing and, where it lies on this disk, asks nobody: for every family of tests/models.py."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from common.errors import InputError
from common.settings import Model, Settings
from harvest import lm
from harvest.plan import plan_only
from harvest.run import harvest
from harvest.sealed import NETWORK, PROGRAMS, sealed
from tests.models import save_tokenizer

_seen: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in PROGRAMS + NETWORK:
        _seen.append(f"{event} {arguments!r:.200}")


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_watch)  # stays for good, silent outside of `nothing_started`


@pytest.fixture
def nothing_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a program or connection was asked for; none is made."""
    global _watching

    def refused(*arguments: object, **_: object) -> None:
        _seen.append(f"{arguments!r:.200}")
        raise AssertionError(f"asked for {arguments!r:.200}")

    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr(subprocess, "check_call", refused)
    monkeypatch.setattr(os, "system", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    _seen.clear()
    _watching = True
    yield
    _watching = False
    assert not _seen


@pytest.fixture(scope="session")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with its eyes, and without the files of their processor."""
    directory = tmp_path_factory.mktemp("models") / "tiny-gemma3-sees"
    tokenizer = save_tokenizer(directory)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "sliding_window": 64,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def _load(directory: Path) -> lm.LanguageModel:
    model = Model(name=str(directory), device="cpu")
    return lm.load(model, lm.locate(model), lm.load_tokenizer(str(directory), None))


@pytest.mark.usefixtures("nothing_started")
def test_a_local_model_of_every_family(model_directory: Path) -> None:
    model = _load(model_directory)
    model.gain(1)
    assert lm.shape(str(model_directory), None) == (32, 3)


@pytest.mark.usefixtures("nothing_started")
def test_a_model_that_sees_without_its_processor(sees: Path) -> None:
    """TransformerLens ran `pip install torchvision` for it, which brought another torch."""
    model = _load(sees)
    assert (model.n_layers, model.d_model) == (2, 32)
    assert len(model.gain(1).values) == 32


def test_what_is_asked_for_all_the_same_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with sealed(network=False):
        for call in (
            lambda: subprocess.run(["touch", str(ran)], check=False),
            lambda: os.system(f"touch {ran}"),
            lambda: os.posix_spawn("/usr/bin/touch", ["touch", str(ran)], {}),
            lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: socket.getaddrinfo("huggingface.co", 443),
        ):
            with pytest.raises(
                PermissionError, match=r"a library wanted to (start a program|make a connection)"
            ):
                call()
    assert not ran.exists()
    with sealed(network=True), pytest.raises(ConnectionRefusedError):  # of the hub's models
        socket.create_connection(("127.0.0.1", 9))
    subprocess.run(["touch", str(ran)], check=True)
    assert ran.exists()


# -- code that comes with a model ----------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path({ran!r}).touch()\n" + (
    "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
REFUSED = "it needs Python code of its own (auto_map), which is never run; expected a model whose model_type"


@pytest.fixture
def own_code(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """A model whose config and tokenizer name code beside them, and the file that the code would leave."""

    def agreed(*_: object) -> str:
        raise AssertionError("asked whether to run the code")

    monkeypatch.setattr("builtins.input", agreed)

    def make(model_type: str, *, config: bool = True, tokenizer: bool = False) -> tuple[Path, Path]:
        directory, ran = shutil.copytree(llama, tmp_path / "own"), tmp_path / "ran"
        (directory / "own.py").write_text(CODE.format(ran=str(ran)))
        values = json.loads((directory / "config.json").read_text()) | {"model_type": model_type}
        if config:
            values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (directory / "config.json").write_text(json.dumps(values))
        if tokenizer:
            values = json.loads((directory / "tokenizer_config.json").read_text())
            values |= {
                "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
                "tokenizer_class": "OwnTokenizer",
            }
            (directory / "tokenizer_config.json").write_text(json.dumps(values))
        return directory, ran

    return make


@pytest.mark.parametrize("what", [harvest, plan_only])
def test_code_of_a_models_own_is_never_run(
    what: Callable[[Settings], object],
    own_code: Callable[..., tuple[Path, Path]],
    settings_for: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    directory, ran = own_code("own")
    with pytest.raises(InputError) as stopped:
        what(settings_for(directory))
    assert REFUSED in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not ran.exists()
    assert not [path for path in tmp_path.glob("activations/**/*") if path.is_file()]


def test_code_of_a_tokenizers_own_is_never_run(own_code: Callable[..., tuple[Path, Path]]) -> None:
    directory, ran = own_code("llama", config=False, tokenizer=True)
    with pytest.raises(InputError) as stopped:
        lm.load_tokenizer(str(directory), None)
    assert REFUSED in str(stopped.value)
    assert not ran.exists()


def test_a_known_family_needs_no_code_that_lies_beside_it(own_code: Callable[..., tuple[Path, Path]]) -> None:
    """As Phi-3 and Falcon come: the classes of transformers are taken."""
    directory, ran = own_code("llama")
    assert type(_load(directory).bridge.original_model).__module__.startswith("transformers.models.llama")
    assert not ran.exists()
