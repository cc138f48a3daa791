"""circuit-tracer's transcoder sets, read: config.yaml and layer_N.safetensors, a file a layer, ours and others'.

acts = relu(pre), or pre * (pre > activation_function.threshold), or the k largest of each row where config.yaml says
`activation: topk` (the authors' version; a file of its own saving has `k` too). Our activations are positive: where
fewer than k are, that tool keeps negative ones. config.yaml names the two hooks, without the layer, for all of them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InputError
from common.hooks import INPUT_HOOKS, OUTPUT_HOOK, OWN_OUTPUT
from transcoder.formats.files import exactly, extent, floats_of, shown, size_of, text_of, value_of

CONFIG_NAME = "config.yaml"
LAYER = re.compile(r"layer_(\d{1,4})\.safetensors")
THRESHOLD = "activation_function.threshold"
TENSORS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
"""What every layer's file has, the decoder too, however lazily the tool loads it."""
BRACKETS = 200
"""In config.yaml; none in those seen. PyYAML takes 10 s for 5,000 open ones."""
OUTPUTS = (OUTPUT_HOOK, OWN_OUTPUT)


def layer_file(layer: int) -> str:
    """The name of a layer's file in its set."""
    return f"layer_{layer}.safetensors"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of one layer's file; what only config.yaml says is not known where there is none.

    Raises `InputError` naming the file, the key or the tensor, what was expected and what was found.
    """
    config_path, stored = path.with_name(CONFIG_NAME), floats_of(path)
    config = configuration(config_path) if config_path.is_file() else {}
    d_sae, d_in = extent(stored, "b_enc", 0), extent(stored, "W_enc", 1)
    d_out = extent(stored, "b_dec", 0)
    k = _k(path, config_path, config, stored)
    shapes = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {THRESHOLD: (d_sae,)} if THRESHOLD in stored else {}
    shapes |= {"W_skip": (d_out, d_in)} if "W_skip" in stored else {}
    if k is not None and (THRESHOLD in stored or k > d_sae):
        raise InputError(f"{path}: k: expected at most the {d_sae} latents and no thresholds, found {k}")
    if config.get("activation") == "relu" and THRESHOLD in stored:
        raise InputError(f"{path}: tensor {THRESHOLD}: expected none, as {config_path} has activation relu")
    tensors = exactly(path, {name: tensor for name, tensor in stored.items() if name != "k"}, shapes)
    threshold = tensors.pop(THRESHOLD, None)
    metadata: dict[str, Any] = {"prefix_ends": (d_sae,), "source": _source(path, config_path, config)}
    if k is not None:
        return tensors, metadata | {"selection": "topk", "k": k}
    own = tensors["b_enc"].new_zeros(d_sae) if threshold is None else threshold
    return {**tensors, "thresholds": own.clamp_min(0)[None]}, metadata


def _k(path: Path, config_path: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> int | None:
    """Of top-k, by config.yaml or the file's own tensor; None for the other two activations."""
    activation = value_of(config_path, config, "activation", str, "topk" if "k" in stored else "jumprelu")
    if activation not in ("topk", "relu", "jumprelu"):
        raise InputError(
            f"{config_path}: activation: expected relu, jumprelu or topk, found {shown(activation)}"
        )
    if activation != "topk":
        return None
    if config.get("k") is not None or "k" not in stored:
        return size_of(config_path, config, "k")
    k = stored["k"]
    if k.numel() != 1 or k.is_floating_point() or int(k) < 1:
        raise InputError(f"{path}: tensor k: expected one whole number of at least 1")
    return int(k)


def _where(error: Exception) -> str:
    """The line of a YAML error that knows it, from 1."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark is not None else ""


def configuration(path: Path) -> dict[str, Any]:
    """A set's config.yaml, checked: a set of transcoders, its hooks those of an MLP."""
    text = text_of(path, "circuit-tracer keeps it beside the layers")
    if (brackets := text.count("[") + text.count("{")) > BRACKETS:
        raise InputError(f"{path}: expected a flat list of keys and values, found {brackets:,} brackets")
    try:
        aliased = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        config = None if aliased else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {_where(error)}{str(error).splitlines()[0]}") from error
    if aliased:
        raise InputError(f"{path}: has an alias (*name), which a few lines of make gigabytes; write it out")
    if not isinstance(config, dict):
        raise InputError(
            f"{path}: expected keys and values, as circuit-tracer writes them, found {shown(config)}"
        )
    hooks = {"feature_input_hook": tuple(INPUT_HOOKS.values()), "feature_output_hook": OUTPUTS}
    for key, known in {"model_kind": ("transcoder_set",), **hooks}.items():
        if value_of(path, config, key, str) not in known:
            raise InputError(f"{path}: {key}: expected {' or '.join(known)}, found {shown(config[key])}")
    return config


def _source(path: Path, config_path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the transcoder reads and writes, as far as its name and config.yaml say."""
    match = LAYER.fullmatch(path.name)
    source: dict[str, Any] = {}
    if match:
        source["layer"] = int(match[1])
    if config:
        kinds = {name: kind for kind, name in INPUT_HOOKS.items()}
        model = value_of(config_path, config, "model_name", str, "")
        source |= {"model": model or None, "input": kinds[config["feature_input_hook"]]}
        if match:
            block = f"blocks.{source['layer']}"
            source["input_hook"] = f"{block}.{config['feature_input_hook']}"
            source["output_hook"] = f"{block}.{config['feature_output_hook']}"
    return source


def is_layer(path: Path) -> bool:
    """Whether a .safetensors file holds what a set's layers do, and is not of this project."""
    try:
        with safe_open(path, framework="np") as file:
            return "format_version" not in (file.metadata() or {}) and TENSORS.issubset(file.keys())
    except (OSError, SafetensorError):  # whoever reads it says so
        return False


def of_layer(folder: Path, layer: int | None) -> Path:
    """The file of `layer` in a set's directory; raises `InputError` that names those there are, or where it lies."""
    config = configuration(folder / CONFIG_NAME)
    there = sorted(
        int(match[1]) for path in folder.glob("layer_*.safetensors") if (match := LAYER.fullmatch(path.name))
    )
    elsewhere = config.get("transcoders")
    if not there and isinstance(elsewhere, list) and elsewhere:
        places = [place for place in elsewhere if isinstance(place, str)]
        place = places[min(layer or 0, len(places) - 1)] if places else "none"
        at = re.sub(r"^(hf://[^/]+/[^/?]+)(/[^?]*)\?revision=(.+)$", r"\1@\3\2", place)
        raise InputError(
            f"{folder}: a set whose {len(elsewhere)} layers lie elsewhere; bring in that file itself, {shown(at)}"
        )
    if not there:
        raise InputError(
            f"{folder}: a set without a layer; expected layer_N.safetensors beside {CONFIG_NAME}"
        )
    if layer is None:
        raise InputError(
            f"{folder}: a set of layers; give the file of one, as {folder / layer_file(there[0])}"
        )
    if layer not in there:
        raise InputError(
            f"{folder}: no {layer_file(layer)} in this set; it has layer{'s' * (len(there) > 1)} "
            f"{' '.join(map(str, there))}"
        )
    return folder / layer_file(layer)
