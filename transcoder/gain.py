"""A transcoder on a store's rows: whether it belongs there, and inputs without and with the norm's gain.

`bind` is the only way in: evaluate, compare, read, import and train.init_from all go through it.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from common.errors import InputError
from common.hooks import INPUT_HOOKS, OWN_OUTPUT, Convention, hooks_of, in_convention, same_output
from common.settings import model_slug
from shards import Store
from shards.manifest import Source
from transcoder.tensor_files import blocks
from transcoder.transcoder import Parameters, Transcoder

ON_PURPOSE = "--evaluate.allow_mismatch true (in Python: mismatch=True)"
"""The option that measures a transcoder where it does not belong."""


def bind(
    transcoder: Transcoder,
    store: Store,
    name: str = "this transcoder",
    mismatch: bool = False,
    option: str = ON_PURPOSE,
) -> Transcoder:
    """The transcoder as it reads the store's rows: checked, and converted to the store's input convention.

    Layer, weights of the language model, hooks and widths are the store's; what a file does not say is not checked.
    `mismatch` lets another layer, model or hook pass on purpose, `option` is what a refusal says of it. `name` says
    which transcoder an error is about. Raises `InputError` with what was expected and what was found.
    """
    source, own = store.manifest.source, transcoder.metadata.get("source", {})
    widths = (transcoder.d_in, transcoder.d_out)
    if widths != (source.d_in, source.d_out):
        raise InputError(
            f"{name}: expected widths {source.d_in} -> {source.d_out} as in {store.path}, "
            f"found {widths[0]} -> {widths[1]}"
        )
    refuse_mismatch(own, store, name, mismatch, option)
    _tell_of_name(own, store, name)
    _tell_of_output(own, store, name)
    return convert(transcoder, source.input, source.model_dump(), name)


def refuse_mismatch(
    recorded: Mapping[str, Any], store: Store, name: str, mismatch: bool, option: str = ON_PURPOSE
) -> list[str]:
    """What a transcoder's own `source` contradicts in the store's, in words; `InputError` where `mismatch` is false."""
    differing = _differing(recorded, store.manifest.source)
    if differing and not mismatch:
        raise InputError(
            f"{name}: does not belong to {store.path}: {'; '.join(differing)}; use the store that it was trained on, "
            f"or measure it here on purpose with {option}"
        )
    return differing


def _tell_of_name(recorded: Mapping[str, Any], store: Store, name: str) -> None:
    """Say on standard error that the model's name is another one, where no digest decides: names are for people."""
    source = store.manifest.source
    known, model = recorded.get("weights_sha256"), recorded.get("model")
    if not known and isinstance(model, str) and model_slug(model) != model_slug(source.model):
        tqdm.write(
            f"note: {name}: says that it is of the model {model!r:.80}, the store of {source.model!r:.80}; without "
            "a digest of the weights this is not checked",
            file=sys.stderr,
        )


def _tell_of_output(recorded: Mapping[str, Any], store: Store, name: str) -> None:
    """Say on standard error that two hooks are taken for one tensor because of what the model is called."""
    source = store.manifest.source
    hook = recorded.get("output_hook")
    if hook != source.output_hook and same_output(str(hook), source.output_hook, source.model):
        tqdm.write(
            f"note: {name}: predicts the MLP's output ({hook}), the store has what is added to the residual stream: "
            f"the same where no norm follows the MLP, as is taken to be so of {source.model!r:.80}",
            file=sys.stderr,
        )


def _differing(recorded: Mapping[str, Any], source: Source) -> list[str]:
    """Layer, weights and hooks that a record knows and that are not the store's; hooks only within one layer."""
    expected = {
        "layer": source.layer,
        "weights_sha256": source.weights_sha256,
        "output_hook": source.output_hook,
    }
    if (kind := recorded.get("input")) in INPUT_HOOKS:
        expected["input_hook"] = in_convention(source.input_hook, source.input, kind)
    differing = {
        key: recorded[key] for key, value in expected.items() if recorded.get(key) not in (None, value)
    }
    if same_output(str(recorded.get("output_hook")), source.output_hook, source.model):
        differing.pop("output_hook", None)
    if "layer" in differing:
        differing = {key: value for key, value in differing.items() if not key.endswith("hook")}
    said = [
        f"{_WORDS[key]} {_short(value)}, there {_short(expected[key])}" for key, value in differing.items()
    ]
    if str(differing.get("output_hook", "")).endswith(OWN_OUTPUT):
        said.append("between the two lies the norm after the MLP")
    if "weights_sha256" in differing and recorded.get("dtype", source.dtype) != source.dtype:
        said.append(f"model.dtype {recorded['dtype']}, there {source.dtype}, which alone changes the digest")
    return said


_WORDS = {
    "layer": "it is of layer",
    "weights_sha256": "the language model's weights are",
    "input_hook": "it reads",
    "output_hook": "it predicts",
}


def _short(value: Any) -> str:
    """A digest's first digits; anything else as it is."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else f"{text:.80}"


def convert(transcoder: Transcoder, wanted: Convention, norm: Mapping[str, Any], name: str) -> Transcoder:
    """The same function on inputs of convention `wanted`: mlp_in = normalized * gain (+ bias, of a LayerNorm).

    `norm` has `gain` [D_in] and, if there is one, `gain_bias` [D_in], as a store's manifest does. Taking the gain
    into the weights is exact. The inverse divides by it: refused, with the first dimension named, where a gain of
    zero meets a column of W_enc or W_skip that is not. `name` says which transcoder an error is about.
    """
    source = transcoder.metadata.get("source", {})
    convention = source.get("input")
    if convention not in INPUT_HOOKS:
        raise InputError(
            f"{name}: its file does not say whether it reads inputs with the norm's gain; expected source.input to be "
            f"one of {', '.join(INPUT_HOOKS)}, found {convention!s:.80}; say it in importing it: make import "
            "ARGS='--input mlp_in' (with the gain) or ARGS='--input normalized' (without)"
        )
    if convention == wanted:
        return transcoder
    own = transcoder.parameters
    gain = torch.tensor(norm["gain"], dtype=torch.float64, device=own.W_enc.device)
    bias = torch.tensor(norm.get("gain_bias") or [0.0] * len(gain), dtype=torch.float64, device=gain.device)
    if wanted == "mlp_in":
        _refuse_zeros(own, gain, name)
        gain = torch.where(gain == 0, 1.0, gain).reciprocal()
        bias = -bias * gain
    changed = _scaled(own, gain, bias)
    now = source | {"input": wanted}
    if "layer" in source:
        now["input_hook"], _ = hooks_of(source["layer"], wanted)
    return replace(transcoder, parameters=changed, metadata=transcoder.metadata | {"source": now})


def _scaled(own: Parameters, gain: Tensor, bias: Tensor) -> Parameters:
    """What reads x as `own` reads x * gain + bias."""

    def moved(matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """In blocks: in float64 a whole matrix would take twice its memory."""
        scaled, shifts = torch.empty_like(matrix), []
        for rows, into in zip(blocks(matrix), blocks(scaled), strict=True):
            into.copy_(rows * gain)
            shifts.append(rows.double() @ bias)
        return scaled, (offset + torch.cat(shifts)).to(offset)

    W_enc, b_enc = moved(own.W_enc, own.b_enc)
    if own.W_skip is None:
        return replace(own, W_enc=W_enc, b_enc=b_enc)
    W_skip, b_dec = moved(own.W_skip, own.b_dec)
    return replace(own, W_enc=W_enc, b_enc=b_enc, W_skip=W_skip, b_dec=b_dec)


def _refuse_zeros(own: Parameters, gain: Tensor, name: str) -> None:
    matrices = [own.W_enc] if own.W_skip is None else [own.W_enc, own.W_skip]
    read = torch.stack([(rows != 0).any(0) for matrix in matrices for rows in blocks(matrix)]).any(0)
    lost = ((gain == 0) & read).nonzero()
    if len(lost):
        raise InputError(
            f"{name}: reads inputs without the norm's gain, and the gain of dimension {int(lost[0])} is zero: "
            "inputs with the gain (harvest.input mlp_in) hold nothing of what it reads there; use normalized inputs"
        )
