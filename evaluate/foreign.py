"""Transcoders that compare can read: our run directories, and Gemma Scope's params.npz.

Shapes: F latents, G prefixes, D_in and D_out widths. Nothing is unpickled.
"""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluate.files import read_json
from evaluate.sparse import Coder
from pipeline import InputError
from shards import Store
from train import Transcoder

Convention = Literal["normalized", "mlp_in"]
"""Whether a coder expects inputs without (normalized) or with (mlp_in) the RMSNorm's gain."""


def read(path: Path, store: Store) -> Coder:
    """The transcoder at `path`, converted to the store's input convention.

    A directory with transcoder.safetensors (ours), or a params.npz or its directory (Gemma Scope).
    Raises `InputError` naming the file, what was expected and what was found.
    """
    file = path / "params.npz" if path.is_dir() else path
    if (path / "transcoder.safetensors").is_file():
        coder = Coder.of(Transcoder.load(path))
        record = read_json(path / "settings.json", "give a run directory as train leaves it")
        convention: Convention = record["settings"]["harvest"]["input"]
    elif file.suffix == ".npz" and file.is_file():
        coder, convention = _gemma_scope(file), "normalized"
    else:
        raise InputError(
            f"{path}: expected transcoder.safetensors (ours) or params.npz (Gemma Scope), found neither"
        )
    source = store.manifest.source
    found = (coder.W_enc.shape[1], coder.W_dec.shape[1])
    if found != (source.d_in, source.d_out):
        raise InputError(
            f"{path}: expected widths {source.d_in} -> {source.d_out} as in {store.path}, "
            f"found {found[0]} -> {found[1]}"
        )
    gain, bias = torch.tensor(source.gain), source.gain_bias
    bias = None if bias is None else torch.tensor(bias)
    return convert(coder, convention, source.input, gain, str(path), bias)


def convert(
    coder: Coder, found: Convention, wanted: Convention, gain: Tensor, name: str, bias: Tensor | None = None
) -> Coder:
    """The same function on inputs of the other convention: mlp_in = normalized * gain + bias.

    W_normalized = W_mlp_in * gain per input column, and b_normalized = b_mlp_in + W_mlp_in bias, are exact. The
    inverse divides, so it is refused where a gain of zero meets a column that is not. Only a LayerNorm has a `bias`.
    """
    if found == wanted:
        return coder

    def change(W: Tensor) -> Tensor:
        if wanted == "normalized":
            return W * gain.to(W)
        lost = ((gain == 0) & (W != 0).any(0)).nonzero()
        if len(lost):
            raise InputError(
                f"{name}: reads inputs without the norm's gain, and the gain of dimension {int(lost[0])} is zero: "
                "this store (harvest.input mlp_in) cannot feed it; use a store of normalized inputs"
            )
        return W / torch.where(gain == 0, 1.0, gain).to(W)

    shift = torch.zeros_like(gain) if bias is None else bias

    def moved(b: Tensor, W: Tensor, changed: Tensor) -> Tensor:
        return b + W @ shift.to(W) if wanted == "normalized" else b - changed @ shift.to(W)

    W_enc = change(coder.W_enc)
    made = replace(coder, W_enc=W_enc, b_enc=moved(coder.b_enc, coder.W_enc, W_enc))
    if coder.W_skip is None:
        return made
    W_skip = change(coder.W_skip)
    return replace(made, W_skip=W_skip, b_dec=moved(coder.b_dec, coder.W_skip, W_skip))


def _gemma_scope(file: Path) -> Coder:
    """A JumpReLU transcoder: acts = pre * (pre > threshold), each latent with its own threshold."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: not a readable .npz of plain arrays: {error}") from error
    d_in, d_sae = arrays.get("W_enc", np.zeros((0, 0))).shape if "W_enc" in arrays else (0, 0)
    d_out = arrays["b_dec"].shape[-1] if "b_dec" in arrays else 0
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
    }
    for name, shape in shapes.items():
        found = arrays[name].shape if name in arrays else None
        if found != shape:
            raise InputError(f"{file}: {name}: expected shape {shape}, found {found or 'no such array'}")
    tensors = {name: torch.from_numpy(arrays[name]) for name in shapes}
    return Coder(
        W_enc=tensors["W_enc"].T.contiguous(),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        prefix_ends=(d_sae,),
        thresholds=tensors["threshold"][None],
    )
