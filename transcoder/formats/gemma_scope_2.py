"""Gemma Scope 2's transcoders: layer_17_width_16k_l0_small_affine/config.json and params.safetensors.

A JumpReLU transcoder, acts = pre * (pre > threshold) with a threshold for each latent, of Gemma 3's MLPs. Its encoder
is [D_in, F], its skip connection [D_in, D_out], used as inputs @ A. Where it reads and writes is in config.json, as
modules of the Hugging Face model: the output of the norm before the MLP is the MLP's input with the gain (mlp_in).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.files import write_whole
from common.hooks import NORM_FOLLOWS, OUTPUT_HOOK, OWN_OUTPUT, hooks_of
from transcoder import tensor_files, weights
from transcoder.formats.files import exactly, extent, floats_of, json_object, shown, size_of, value_of

FILE_NAME = "params.safetensors"
CONFIG_NAME = "config.json"
WHOSE = f"Gemma Scope 2 keeps it beside {FILE_NAME}: width, hooks and convention are in it"
ARCHITECTURE = "jump_relu"
NAMES = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"
INPUTS = ("pre_feedforward_layernorm.output", "mlp.input")
"""Both are the MLP's input with the gain."""
OUTPUTS = {"post_feedforward_layernorm.output": OUTPUT_HOOK, "mlp.output": OWN_OUTPUT}
KEPT = ("weights_sha256", "harvest_fingerprint")
"""Digests of one that this project has written."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a directory, given its params.safetensors.

    Raises `InputError` naming the file, the key or the tensor, what was expected and what was found.
    """
    config_path = path.with_name(CONFIG_NAME)
    config = json_object(config_path, WHOSE)
    for key, expected in (("architecture", ARCHITECTURE), ("type", "transcoder")):
        if config.get(key, expected if key == "type" else None) != expected:
            raise InputError(f"{config_path}: {key}: expected {expected!r}, found {shown(config.get(key))}")
    layer, output = _places(config_path, config)
    stored, width = floats_of(path), size_of(config_path, config, "width")
    skip = value_of(config_path, config, "affine_connection", bool, SKIP in stored)
    d_in, d_out = extent(stored, "w_enc", 0), extent(stored, "b_dec", 0)
    shapes = {"w_enc": (d_in, width), "b_enc": (width,), "w_dec": (width, d_out), "b_dec": (d_out,)}
    shapes |= {"threshold": (width,)} | ({SKIP: (d_in, d_out)} if skip else {})
    checked = exactly(path, stored, shapes)
    tensors = {ours: checked[theirs] for ours, theirs in NAMES.items()}
    tensors["W_enc"] = tensors["W_enc"].T
    tensors["thresholds"] = tensors.pop("threshold").clamp_min(0)[None]  # activations pass a ReLU as well
    if skip:
        tensors["W_skip"] = checked[SKIP].T
    input_hook, _ = hooks_of(layer, "mlp_in")
    source = {"model": _model(config), "layer": layer, "input": "mlp_in", "input_hook": input_hook}
    source["output_hook"] = f"blocks.{layer}.{output}"
    kept = {key: config[key] for key in KEPT if isinstance(config.get(key), str)}
    source |= {"weights_sha256": kept.pop("weights_sha256")} if "weights_sha256" in kept else {}
    return tensors, {"prefix_ends": (width,), "source": source} | kept


def _places(path: Path, config: Mapping[str, Any]) -> tuple[int, str]:
    """(layer, output hook within its block), by the Hugging Face modules that config.json names."""
    keys = {"hf_hook_point_in": INPUTS, "hf_hook_point_out": tuple(OUTPUTS)}
    found: list[tuple[str, str]] = []
    for key, known in keys.items():
        hook = value_of(path, config, key, str)
        match = re.fullmatch(r"(?:[A-Za-z_]+\.)*layers\.(\d{1,4})\.([a-z_.]+)", hook)
        if match is None or match[2] not in known:
            raise InputError(
                f"{path}: {key}: expected model.layers.N. with {' or '.join(known)}, found {shown(hook)}"
            )
        found.append((match[1], match[2]))
    (layer, _), (other, output) = found
    if layer != other:
        raise InputError(f"{path}: hf_hook_point_out: expected layer {layer} as the input's, found {other}")
    own = OUTPUTS[output]
    if own == OWN_OUTPUT and NORM_FOLLOWS.search(str(_model(config))):
        raise InputError(
            f"{path}: hf_hook_point_out: {output} lies before this model's norm after the MLP; expected "
            "post_feedforward_layernorm.output, what is added to the residual stream, as stores have it"
        )
    return int(layer), own


def _model(config: Mapping[str, Any]) -> str | None:
    name = config.get("model_name")
    return name if isinstance(name, str) else None


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write both files below `folder`, in directories named as Gemma Scope 2's; returns the one to load.

    The tensors are of a transcoder that reads inputs with the gain.
    """
    source = metadata["source"]
    stored = {
        theirs: weights.threshold_of_each(tensors) if ours == "threshold" else tensors[ours]
        for ours, theirs in NAMES.items()
    }
    stored["w_enc"] = tensors["W_enc"].T
    if "W_skip" in tensors:
        stored[SKIP] = tensors["W_skip"].T
    layer, block = source["layer"], f"model.layers.{source['layer']}"
    normed = NORM_FOLLOWS.search(str(source["model"])) is not None
    added = normed and source["output_hook"].endswith(OUTPUT_HOOK)
    heldout, width = metadata.get("heldout", {}), len(tensors["b_enc"])
    l0 = heldout["l0"][len(metadata["prefix_ends"]) - 1] if heldout.get("rows") else None
    config = {
        "architecture": ARCHITECTURE,
        "type": "transcoder",
        "model_name": source["model"],
        "hf_hook_point_in": f"{block}.{INPUTS[0 if normed else 1]}",
        "hf_hook_point_out": f"{block}.{[*OUTPUTS][0 if added else 1]}",
        "width": width,
        "l0": l0,
        "affine_connection": SKIP in stored,
        "weights_sha256": source.get("weights_sha256"),
        "harvest_fingerprint": metadata.get("harvest_fingerprint"),
        "prefix_ends": metadata["prefix_ends"],
        "git_commit": metadata.get("git_commit"),
    }
    size = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    name = f"layer_{layer}_width_{size}_l0_{'unknown' if l0 is None else f'{l0:.0f}'}"
    where = folder / "transcoder" / (name + ("_affine" if SKIP in stored else ""))
    tensor_files.save(where / FILE_NAME, stored)
    write_whole(where / CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())
    return where
