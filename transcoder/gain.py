"""The two conventions of an MLP's input, without and with its norm's gain, and the algebra between them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from common.hooks import INPUT_HOOKS, Convention
from torch import Tensor

from common.errors import InputError
from transcoder.transcoder import Parameters, Transcoder


def convert(transcoder: Transcoder, wanted: Convention, norm: Mapping[str, Any], name: str) -> Transcoder:
    """The same function on inputs of convention `wanted`: mlp_in = normalized * gain (+ bias, of a LayerNorm).

    `norm` has `gain` [D_in] and, if there is one, `gain_bias` [D_in], as a store's manifest does. Taking the gain
    into the weights is exact. The inverse divides by it: refused, with the first dimension named, where a gain of
    zero meets a column of W_enc or W_skip that is not. `name` says which transcoder an error is about.
    """
    source = transcoder.metadata.get("source", {})
    found = source.get("input")
    if found not in INPUT_HOOKS:
        raise InputError(
            f"{name}: its metadata do not say whether it reads inputs with the norm's gain; "
            f"expected source.input to be one of {', '.join(INPUT_HOOKS)}, found {found}"
        )
    if found == wanted:
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
        now["input_hook"] = f"blocks.{source['layer']}.{INPUT_HOOKS[wanted]}"
    return replace(transcoder, parameters=changed, metadata=transcoder.metadata | {"source": now})


def _scaled(own: Parameters, gain: Tensor, bias: Tensor) -> Parameters:
    """What reads x as `own` reads x * gain + bias."""

    def moved(matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return (matrix * gain).to(matrix), (offset + matrix.double() @ bias).to(offset)

    W_enc, b_enc = moved(own.W_enc, own.b_enc)
    if own.W_skip is None:
        return replace(own, W_enc=W_enc, b_enc=b_enc)
    W_skip, b_dec = moved(own.W_skip, own.b_dec)
    return replace(own, W_enc=W_enc, b_enc=b_enc, W_skip=W_skip, b_dec=b_dec)


def _refuse_zeros(own: Parameters, gain: Tensor, name: str) -> None:
    read = (own.W_enc != 0).any(0)
    if own.W_skip is not None:
        read = read | (own.W_skip != 0).any(0)
    lost = ((gain == 0) & read).nonzero()
    if len(lost):
        raise InputError(
            f"{name}: reads inputs without the norm's gain, and the gain of dimension {int(lost[0])} is zero: "
            "inputs with the gain (harvest.input mlp_in) hold nothing of what it reads there; use normalized inputs"
        )
