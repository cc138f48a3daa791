"""circuit-tracer's transcoder sets: a folder of config.yaml and layer_N.safetensors, one for every layer.

The tool replaces the MLP of every layer, so it wants layers 0 to the last and one width; its encoders are
[F, D] like ours, and one hook name, without the layer, holds for all of them. config.yaml has no `scan`: the tool's
loader puts in where it found the set, a path or a hub name, which is where its page looks for features/.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.files import write_whole
from transcoder import tensor_files, weights

Saved = tuple[Mapping[str, Tensor], Mapping[str, Any]]


def write(folder: Path, layers: Iterable[Saved], partial: bool = False) -> Path:
    """Write one file per layer and config.yaml into `folder`, which is returned. One layer is in memory at a time.

    `layers` are (tensors, metadata) in any order. `partial`: layers 0 to N of a deeper model, which the tool loads as
    transcoders but cannot trace a whole model with.
    Raises `InputError` naming the layers that are missing, or the layer that does not fit the others; then no file is
    left.
    """
    kinds: dict[int, dict[str, Any]] = {}
    first: Mapping[str, Any] = {}
    try:
        for tensors, metadata in layers:
            source = metadata["source"]
            first = first or source
            kinds[source["layer"]] = _kind(tensors, source)
            _check_alike(kinds, source["layer"])
            stored = {name: tensor for name, tensor in tensors.items() if name != "thresholds"}
            stored["activation_function.threshold"] = weights.threshold_of_each(tensors)
            tensor_files.save(folder / _file(source["layer"]), stored, _header(metadata))
        check_layers(kinds, first["n_layers"], partial)
    except InputError:
        for layer in kinds:
            (folder / _file(layer)).unlink(missing_ok=True)
        raise
    config = {
        "model_name": first["model"],
        "model_kind": "transcoder_set",
        "feature_input_hook": _without_layer(first["input_hook"]),
        "feature_output_hook": _without_layer(first["output_hook"]),
    }
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
    write_whole(folder / "config.yaml", lines.encode())
    return folder


def check_layers(layers: Collection[int], n_layers: int, partial: bool) -> None:
    """Raise `InputError` naming what is missing of all layers of the model, or with `partial` of those from 0 on."""
    expected = max(layers) + 1 if partial else n_layers
    missing = [layer for layer in range(expected) if layer not in layers]
    if missing:
        alone = f", or export layers 0 to {max(layers)} alone with --partial (make: ARGS=--partial)"
        remedy = alone if min(missing) > max(layers) else ""
        raise InputError(
            f"circuit_tracer: needs a run of every layer from 0 to {expected - 1}, one width; missing "
            f"{' '.join(map(str, missing))}; train them{remedy}"
        )


def _kind(tensors: Mapping[str, Tensor], source: Mapping[str, Any]) -> dict[str, Any]:
    """Model, hooks, width and skip connection, which are the same in every layer."""
    return {
        "model": source.get("weights_sha256") or source["model"],  # a name is for people
        "input hook": _without_layer(source["input_hook"]),
        "output hook": _without_layer(source["output_hook"]),
        "latents": len(tensors["W_enc"]),
        "skip connection": "W_skip" in tensors,
    }


def _check_alike(kinds: Mapping[int, dict[str, Any]], layer: int) -> None:
    first, expected = next(iter(kinds.items()))
    for key, value in expected.items():
        if kinds[layer][key] != value:
            raise InputError(
                f"circuit_tracer: all layers must be alike; {key}: layer {first} has {value}, layer {layer} has "
                f"{kinds[layer][key]}"
            )


def _file(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def _without_layer(hook: str) -> str:
    return hook.split(".", 2)[2]


def _header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The file's own account of what it is: the format has no place for it but the safetensors header."""
    source = metadata["source"]
    kept = {key: source[key] for key in ("model", "layer", "input", "input_hook", "output_hook")}
    kept["harvest_fingerprint"] = metadata.get("harvest_fingerprint")
    kept["git_commit"] = metadata.get("git_commit")
    return {key: str(value) for key, value in kept.items()}
