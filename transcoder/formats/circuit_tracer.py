"""circuit-tracer's transcoder sets: a folder of config.yaml and layer_N.safetensors, one for every layer.

The tool replaces the MLP of every layer, so it wants layers 0 to the last and one width; its encoders are
[F, D] like ours, and one hook name, without the layer, holds for all of them. config.yaml has no `scan`: the tool's
loader puts in where it found the set, a path or a hub name, which is where its page looks for features/.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from common.errors import InputError
from common.files import write_whole
from transcoder import weights


def write(
    folder: Path,
    layers: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    partial: bool = False,
) -> Path:
    """Write one file per layer and config.yaml into `folder`, which is returned.

    `layers` are (tensors, metadata) in any order. `partial`: layers 0 to N of a deeper model, which the tool loads as
    transcoders but cannot trace a whole model with.
    Raises `InputError` naming the layers that are missing, or the layer that does not fit the others.
    """
    numbered = {metadata["source"]["layer"]: (tensors, metadata) for tensors, metadata in layers}
    first = numbered[min(numbered)][1]["source"]
    _check_layers(sorted(numbered), max(numbered) + 1 if partial else first["n_layers"])
    _check_alike(numbered)
    config = {
        "model_name": first["model"],
        "model_kind": "transcoder_set",
        "feature_input_hook": _without_layer(first["input_hook"]),
        "feature_output_hook": _without_layer(first["output_hook"]),
    }
    for layer, (tensors, metadata) in sorted(numbered.items()):
        stored = {name: tensor.contiguous() for name, tensor in tensors.items() if name != "thresholds"}
        stored["activation_function.threshold"] = weights.threshold_of_each(tensors)
        write_whole(folder / f"layer_{layer}.safetensors", save(stored, _header(metadata)))
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
    write_whole(folder / "config.yaml", lines.encode())
    return folder


def _check_layers(layers: list[int], n_layers: int) -> None:
    missing = [layer for layer in range(n_layers) if layer not in layers]
    if missing:
        alone = f", or export layers 0 to {max(layers)} alone with --partial (make: ARGS=--partial)"
        remedy = alone if min(missing) > max(layers) else ""
        raise InputError(
            f"circuit_tracer: needs a run of every layer from 0 to {n_layers - 1}, one width; missing "
            f"{' '.join(map(str, missing))}; train them{remedy}"
        )


def _check_alike(numbered: Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
    """Model, hooks, width and skip connection are the same in every layer."""

    def kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        source = metadata["source"]
        return {
            "model": source.get("weights_sha256") or source["model"],  # a name is for people
            "input hook": _without_layer(source["input_hook"]),
            "output hook": _without_layer(source["output_hook"]),
            "latents": len(tensors["W_enc"]),
            "skip connection": "W_skip" in tensors,
        }

    kinds = {layer: kind(*saved) for layer, saved in sorted(numbered.items())}
    first, expected = next(iter(kinds.items()))
    for layer, properties in kinds.items():
        for key, value in expected.items():
            if properties[key] != value:
                raise InputError(
                    f"circuit_tracer: all layers must be alike; {key}: layer {first} has {value}, layer {layer} has "
                    f"{properties[key]}"
                )


def _without_layer(hook: str) -> str:
    return hook.split(".", 2)[2]


def _header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The file's own account of what it is: the format has no place for it but the safetensors header."""
    source = metadata["source"]
    kept = {key: source[key] for key in ("model", "layer", "input", "input_hook", "output_hook")}
    kept["harvest_fingerprint"] = metadata.get("harvest_fingerprint")
    kept["git_commit"] = metadata.get("git_commit")
    return {key: str(value) for key, value in kept.items()}
