"""SAELens' transcoders: a directory of cfg.json and sae_weights.safetensors, version 6.

`SAE.load_from_disk(directory)` makes a JumpReLUTranscoder of it, or a JumpReLUSkipTranscoder when it has a skip
connection. Its encoder is [D_in, F]; hooks and provenance are in cfg.json under `metadata`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from common.errors import InputError
from common.files import write_whole
from common.hooks import INPUT_HOOKS
from transcoder import tensor_files, weights
from transcoder.formats.files import floats_of, json_object, shown

FILE_NAME = "sae_weights.safetensors"
CONFIG_NAME = "cfg.json"
VERSION = "6.0.0"
"""The SAELens whose layout this is: older ones are rewritten by its loader."""
ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
THRESHOLDS = "prefix_thresholds"
"""Of our own in cfg.json's metadata, which SAELens keeps: a threshold for each prefix, its last that of the file."""
FIXED = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
"""What our encoder does not do; a file that asks for it is not a transcoder of raw activations."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a directory, given its sae_weights.safetensors.

    Raises `InputError` naming the file, the key or the tensor, what was expected and what was found.
    """
    config_path = path.with_name(CONFIG_NAME)
    config = _config(config_path)
    architecture, d_in, d_sae, d_out = (config.get(key) for key in ("architecture", "d_in", "d_sae", "d_out"))
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{config_path}: architecture: expected one of {', '.join(ARCHITECTURES)}, found {architecture!r}"
        )
    for key, wanted in FIXED.items():
        if config.get(key, wanted) != wanted:
            raise InputError(f"{config_path}: {key}: expected {wanted!r}, found {config[key]!r}")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    stored = floats_of(path)
    tensors = {
        name: weights.check_shape(path, name, stored.get(name), shape) for name, shape in shapes.items()
    }
    threshold = tensors.pop("threshold", torch.zeros_like(tensors["b_enc"]))
    tensors["W_enc"] = tensors["W_enc"].T
    threshold = threshold.clamp_min(0)  # activations pass a ReLU as well
    ends, tensors["thresholds"] = _prefixes(path, config["metadata"], threshold)
    metadata = {"prefix_ends": ends, "source": _source(config_path, config["metadata"])}
    fingerprint = config["metadata"].get("harvest_fingerprint")  # of one that this project has written
    return tensors, metadata | ({"harvest_fingerprint": fingerprint} if isinstance(fingerprint, str) else {})


def _config(path: Path) -> dict[str, Any]:
    config = json_object(path, f"SAELens keeps it beside {FILE_NAME}")
    if not isinstance(config.get("metadata"), dict):
        raise InputError(f"{path}: expected an object with metadata, as SAELens 6 writes it")
    return config


def _prefixes(path: Path, metadata: Mapping[str, Any], threshold: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """(prefix ends, thresholds [G]) of one that this project has written, whatever tool has saved it since.

    Without them, or where its thresholds were changed since, (its number of latents, thresholds [1, F]).
    """
    ends, cuts = metadata.get("prefix_ends"), metadata.get(THRESHOLDS)
    whole = (len(threshold),), threshold[None]
    if not isinstance(ends, list) or not isinstance(cuts, list):
        return whole
    numbers = all(type(end) is int for end in ends) and all(type(cut) in (int, float) for cut in cuts)
    if not numbers or len(ends) != len(cuts) or ends[-1:] != [len(threshold)]:
        raise InputError(
            f"{path.with_name(CONFIG_NAME)}: metadata: expected as many {THRESHOLDS} as prefix_ends, numbers, the last "
            f"end {len(threshold)}, found {shown(cuts)} and {shown(ends)}"
        )
    thresholds = torch.tensor(cuts, dtype=torch.float32)
    if not (threshold == thresholds[-1]).all():
        tqdm.write(
            f"note: {path}: its thresholds are not those that were exported; it is read without its prefixes",
            file=sys.stderr,
        )
        return whole
    return tuple(ends), thresholds


def _source(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Where the transcoder reads and writes, in the terms of a store's manifest."""
    hook, module = str(metadata.get("hook_name")), str(metadata.get("hf_hook_name"))
    if hook.endswith(".hook_mlp_in") and module.endswith(".pre_feedforward_layernorm.output"):
        hook = hook.replace("hook_mlp_in", INPUT_HOOKS["mlp_in"])  # SAELens 6.54's mistake in Gemma Scope 2's
    parts = hook.split(".", 2)
    kinds = {name: kind for kind, name in INPUT_HOOKS.items()}
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdecimal() or parts[2] not in kinds:
        raise InputError(
            f"{path}: hook_name: expected blocks.N. with {' or '.join(kinds)} (an MLP's input), found {hook}"
        )
    source = {"model": metadata.get("model_name"), "layer": int(parts[1]), "input": kinds[parts[2]]}
    source |= {"input_hook": hook, "output_hook": metadata.get("hook_name_out")}
    digest = metadata.get("weights_sha256")  # of one that this project has written
    return source | ({"weights_sha256": digest} if isinstance(digest, str) else {})


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write both files into `folder`, which is returned."""
    stored = {name: tensor for name, tensor in tensors.items() if name != "thresholds"}
    stored["W_enc"] = tensors["W_enc"].T
    stored["threshold"] = weights.threshold_of_each(tensors)
    d_in, d_sae = stored["W_enc"].shape
    config = {
        "architecture": "jumprelu_skip_transcoder" if "W_skip" in tensors else "jumprelu_transcoder",
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": len(tensors["b_dec"]),
        "dtype": "float32",
        "device": "cpu",
        **FIXED,
        "metadata": _metadata(metadata, tensors["thresholds"]),
    }
    tensor_files.save(folder / FILE_NAME, stored)
    write_whole(folder / CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())
    return folder


def _metadata(metadata: Mapping[str, Any], cuts: Tensor) -> dict[str, Any]:
    """SAELens' own keys first, then what only we know."""
    source = metadata["source"]
    known = {
        "sae_lens_version": VERSION,
        "model_name": source["model"],
        "hook_name": source["input_hook"],
        "hook_name_out": source["output_hook"],
    }
    if "context_length" in source:
        known |= {
            "context_size": source["context_length"],
            "prepend_bos": source["bos_token_id"] is not None,
            "exclude_special_tokens": source["dropped_token_ids"],
            "dataset_path": source["dataset"],
        }
    return known | {
        "layer": source["layer"],
        "input": source["input"],
        "weights_sha256": source.get("weights_sha256"),
        "harvest_fingerprint": metadata.get("harvest_fingerprint"),
        "prefix_ends": metadata["prefix_ends"],
        THRESHOLDS: cuts.clamp_min(0).tolist() if cuts.ndim == 1 else None,
        "git_commit": metadata.get("git_commit"),
    }
