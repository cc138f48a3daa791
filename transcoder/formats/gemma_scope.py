"""Gemma Scope's transcoders: layer_17/width_16k/average_l0_N/params.npz, plain float32 arrays.

A JumpReLU transcoder of the MLP's normalised input, without the norm's gain, to the MLP's output as it is added
to the residual: acts = pre * (pre > threshold), each latent with its own threshold. The file knows neither model
nor layer; its path does. Layout as documented at https://huggingface.co/google/gemma-scope-2b-pt-transcoders.
"""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.files import whole
from common.hooks import hooks_of
from transcoder import tensor_files, weights

FILE_NAME = "params.npz"
ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a params.npz; raises `InputError` naming the array that is wrong."""
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle and say how to load that
        raise InputError(f"{path}: not a readable .npz of plain arrays: no zip archive")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {
                name: torch.from_numpy(stored[name].astype(np.float32, copy=False))
                for name in stored.files
                if name in ARRAYS
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz of plain arrays: {error}") from error
    W_enc, b_dec = arrays.get("W_enc", torch.empty(0, 0)), arrays.get("b_dec", torch.empty(0))
    d_in, d_sae = W_enc.shape if W_enc.ndim == 2 else (0, 0)
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, *b_dec.shape),
        "b_dec": tuple(b_dec.shape),
        "threshold": (d_sae,),
    }
    checked = {
        name: weights.check_shape(path, name, arrays.get(name), shape) for name, shape in shapes.items()
    }
    thresholds = checked.pop("threshold").clamp_min(0)[None]  # activations pass a ReLU as well
    tensors = {**checked, "W_enc": W_enc.T, "thresholds": thresholds}
    return tensors, {"prefix_ends": (d_sae,), "source": {"input": "normalized"} | _layer(path)}


def _layer(path: Path) -> dict[str, Any]:
    """Layer and hooks, by Gemma Scope's directories: layer_17/width_16k/average_l0_12/params.npz."""
    match = re.search(r"layer_(\d+)/width_[^/]+/average_l0_[^/]+/[^/]+$", path.absolute().as_posix())
    if match is None:
        return {}
    layer = int(match[1])
    input_hook, output_hook = hooks_of(layer, "normalized")
    return {"layer": layer, "input_hook": input_hook, "output_hook": output_hook}


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write params.npz below `folder`, in the directories by which Gemma Scope tells layer, width and L0.

    Returns the file's directory. Raises `InputError` for a skip connection, which the format does not have.
    """
    if "W_skip" in tensors:
        raise InputError(
            "gemma_scope: this transcoder has a skip connection, which the format has no place for; "
            "use FORMAT=saelens or circuit_tracer"
        )
    d_sae = len(tensors["W_enc"])
    width = f"{d_sae // 1024}k" if d_sae % 1024 == 0 else str(d_sae)
    g = len(metadata["prefix_ends"]) - 1
    heldout = metadata.get("heldout", {})
    l0 = f"{heldout['l0'][g]:.0f}" if heldout.get("rows") else "unknown"
    where = folder / f"layer_{metadata['source']['layer']}" / f"width_{width}" / f"average_l0_{l0}"
    arrays = {
        "W_enc": tensors["W_enc"].T,
        "b_enc": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "threshold": weights.threshold_of_each(tensors),
    }
    with whole(where / FILE_NAME) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as array:
                for piece in _npy(tensor):
                    array.write(piece)
    return where


def _npy(tensor: Tensor) -> Iterator[bytes | memoryview]:
    """A float32 tensor as np.save writes it, in pieces; one that is turned, column by column."""
    turned = tensor_files.turned(tensor)
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": turned, "shape": tuple(tensor.shape)}
    np.lib.format.write_array_header_1_0(header, described)
    yield header.getvalue()
    for rows in tensor_files.blocks(tensor.T if turned else tensor):
        yield rows.contiguous().numpy().data
