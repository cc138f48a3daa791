"""Quantised .gguf files as plain Hugging Face directories, converted once into `.cache/`."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common.errors import ENVIRONMENT, InputError, first_line
from common.files import locked, obey_umask, whole_folder
from common.identity import file_sha256
from common.settings import ROOT
from harvest.sealed import sealed

CACHE = ROOT / ".cache"
ORIGIN = "unpacked_from.txt"
"""In an unpacked directory: the path of its file, whose older content is not kept beside it."""


def directory_of(file: Path) -> Path:
    """The model in `file`, unpacked to float32; known by its content, wherever it lies and whatever its date.

    What an older content of the same file was unpacked to is removed: 517 MB for the demo's model.
    """
    if not file.is_file():
        raise InputError(f"model.name: no such file {file}")
    with file.open("rb") as opened:
        if (begins := opened.read(4)) != b"GGUF":
            raise InputError(
                f"model.name: {file}: cannot be read as GGUF: expected it to start with GGUF, found {begins!r}; "
                "give a Hugging Face directory of this model"
            )
    return cached(CACHE / "gguf" / file_sha256(file)[:32], lambda directory: _unpack(file, directory))


def _unpack(file: Path, directory: Path) -> None:
    with sealed(network=False):
        convert(file, directory)
    origin = str(file.resolve())
    for other in (CACHE / "gguf").glob(f"*/{ORIGIN}"):
        if other.read_text(encoding="utf-8") == origin:
            shutil.rmtree(other.parent)
    (directory / ORIGIN).write_text(origin, encoding="utf-8")


def cached(directory: Path, make: Callable[[Path], None]) -> Path:
    """`directory`, which `make` fills once, whole; of several processes one does, and the others wait for it."""
    if not directory.is_dir():
        with locked(directory.with_name(f".{directory.name}.lock"), refusal=None):
            if not directory.is_dir():
                with whole_folder(directory) as aside:
                    make(aside)
    return directory


def convert(file: Path, directory: Path) -> None:
    """Write the model and tokenizer of a GGUF file as safetensors, float32.

    The unpacked directory loads in 0.4 s, the file in 15 (SmolLM2-135M); the weights are equal, bit for bit.
    Raises `InputError` naming the file when transformers cannot read it, or finds not all of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    tqdm.write(f"{file}: unpacking, once", file=sys.stderr)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            # Else the weights stay in their blocks where a kernel for those is installed.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the readers of transformers and gguf raise whatever a bad byte makes them
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise
        raise InputError(
            f"model.name: {file}: cannot be read as GGUF: {first_line(error)}; "
            "give a Hugging Face directory of this model"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model.name: {file}: has no weights for {missing[0]} (and {len(missing) - 1} more); "
            "expected one whole file of a model that transformers knows"
        )
    model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        obey_umask(file)
    tokenizer.save_pretrained(directory)
