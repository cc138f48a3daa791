"""sparsify's transcoders: a directory of cfg.json and sae.safetensors, named after the module that was replaced.

acts = the k largest of relu(inputs encoder.weight^T + encoder.bias) in each row,
outputs = acts W_dec + b_dec (+ inputs W_skip^T), on raw activations: from a module's input, with the norm's gain, to
its output. cfg.json does not say which module: the directory's name does, as layers.12.mlp. Until February 2025
transcoders read inputs - b_dec, and their cfg.json has no key `transcode`; config.json beside the layers has it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.hooks import OWN_OUTPUT, hooks_of
from transcoder.formats.files import exactly, floats_of, json_object, shown, size_of, value_of

FILE_NAME = "sae.safetensors"
CONFIG_NAME = "cfg.json"
RUN_NAME = "config.json"
"""The whole run's settings, beside its layers' directories; sparsify does not need it."""
MODULE = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h)\.(\d{1,4})((?:\.[A-Za-z_]+)*)")
"""Llama's, Gemma's and Pythia's modules, GPT-2's."""
SEED = re.compile(r"seed\d+")
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a directory, given its sae.safetensors.

    Raises `InputError` naming the file, the key or the tensor, what was expected and what was found.
    """
    config_path, folder = path.with_name(CONFIG_NAME), module_folder(path.parent)
    config = json_object(config_path, f"sparsify keeps it beside {FILE_NAME}")
    run_path = folder.parent / RUN_NAME
    run = json_object(run_path, "") if run_path.is_file() else {}
    shifted = _shifted(config_path, config, run)
    d_in, k = size_of(config_path, config, "d_in"), size_of(config_path, config, "k")
    d_sae = value_of(config_path, config, "num_latents", int, 0)
    d_sae = d_sae or d_in * size_of(config_path, config, "expansion_factor")
    if k > d_sae:
        raise InputError(f"{config_path}: k: expected at most the {d_sae} latents, found {k}")
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if value_of(config_path, config, "skip_connection", bool, False):
        shapes["W_skip"] = (d_in, d_in)
    checked = exactly(path, floats_of(path), shapes)
    tensors = {ours: checked[theirs] for ours, theirs in NAMES.items()}
    if shifted:
        bias = tensors["b_enc"].double() - tensors["W_enc"].double() @ tensors["b_dec"].double()
        tensors["b_enc"] = bias.float()
    if "W_skip" in checked:
        tensors["W_skip"] = checked["W_skip"]
    model = run.get("model")
    source = _source(path.parent, folder.name) | ({"model": model} if isinstance(model, str) else {})
    return tensors, {"prefix_ends": (d_sae,), "source": source, "selection": "topk", "k": k}


def _shifted(path: Path, config: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether b_dec is taken off the inputs; raises `InputError` for what is no top-k transcoder."""
    for key, only in (("activation", "topk"), ("signed", False)):
        if config.get(key, only) != only:
            raise InputError(
                f"{path}: {key}: expected {only!r}, found {shown(config[key])}; no other is read"
            )
    skip = value_of(path, config, "skip_connection", bool, False)
    older = "transcode" not in config
    source = run if older else config
    if not value_of(path, source, "transcode", bool, skip):
        found = f"no such key, here or in {path.parent.parent / RUN_NAME}" if older else "false"
        raise InputError(f"{path}: transcode: expected true, found {found}; an autoencoder is not read")
    return older


def module_folder(folder: Path) -> Path:
    """The directory that is named after the module: of several seeds each has one below it."""
    folder = folder.absolute()
    return folder.parent if SEED.fullmatch(folder.name) else folder


def _source(folder: Path, name: str) -> dict[str, Any]:
    """Where the transcoder reads and writes, by its module's `name`; nothing where that is no module's."""
    match = MODULE.fullmatch(name)
    if match is None:
        return {}
    if match[2] != ".mlp":
        raise InputError(
            f"{folder}: expected the transcoder of an MLP, in a directory named as its module (layers.12.mlp), found "
            f"{name}, another module's"
        )
    layer = int(match[1])
    input_hook, _ = hooks_of(layer, "mlp_in")
    hooks = {"input_hook": input_hook, "output_hook": f"blocks.{layer}.{OWN_OUTPUT}"}
    return {"layer": layer, "input": "mlp_in", **hooks}


def layer_folders(folder: Path, layer: int) -> list[Path]:
    """The directories in `folder` that are named after the MLP of `layer`."""
    return [
        path
        for path in sorted(folder.glob("*.mlp"))
        if (match := MODULE.fullmatch(path.name)) and int(match[1]) == layer and match[2] == ".mlp"
    ]
