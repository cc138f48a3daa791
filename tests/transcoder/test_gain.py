"""Inputs with and without the norm's gain: the same function, whichever a transcoder was trained on."""

from dataclasses import replace

import pytest
import torch

from common.errors import InputError
from tests.train.steps import problem
from transcoder import Transcoder
from transcoder.gain import convert

GAIN = [0.5, -2.0, 3.0, 1.0, 0.1]


def made(found: str, dtype: torch.dtype = torch.float32) -> Transcoder:
    p = problem(skip=True, dtype=dtype)
    return Transcoder(p.parameters, torch.tensor([0.1]), (11,), {"source": {"input": found, "layer": 7}})


@pytest.mark.parametrize("bias", [None, [0.3, -1.0, 0.0, 2.0, 5.0]])
@pytest.mark.parametrize("wanted", ["normalized", "mlp_in"])
def test_both_directions_are_the_same_function(wanted: str, bias: list[float] | None) -> None:
    found = "mlp_in" if wanted == "normalized" else "normalized"
    own, x = made(found, torch.float64), problem(rows=30, dtype=torch.float64).x
    gain, shift = (torch.tensor(values, dtype=torch.float64) for values in (GAIN, bias or [0.0] * 5))
    fed = (x - shift) / gain if wanted == "normalized" else x * gain + shift
    other = convert(own, wanted, {"gain": GAIN, "gain_bias": bias}, "x")
    torch.testing.assert_close(other.pre_activations(fed), own.pre_activations(x))
    torch.testing.assert_close(other(fed), own(x))
    hook = {"normalized": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}[wanted]
    assert other.metadata["source"] == {"input": wanted, "layer": 7, "input_hook": f"blocks.7.{hook}"}
    assert own.metadata["source"]["input"] == found


def test_powers_of_two_are_exact_and_nothing_changes_where_nothing_has_to() -> None:
    own, norm = made("mlp_in"), {"gain": [0.5, 2.0, 4.0, 1.0, -0.25]}
    there = convert(own, "normalized", norm, "x")
    back = convert(there, "mlp_in", norm, "x")
    assert torch.equal(there.W_enc, own.W_enc * torch.tensor(norm["gain"]))
    assert torch.equal(back.W_enc, own.W_enc)
    assert torch.equal(back.W_skip, own.W_skip)
    assert convert(own, "mlp_in", norm, "x") is own


def test_a_gain_of_zero_is_refused_unless_nothing_is_read_there() -> None:
    norm = {"gain": [1.0, 0.0, 1.0, 1.0, 0.0]}
    assert not convert(made("mlp_in"), "normalized", norm, "x").W_enc[:, 1].any()
    with pytest.raises(InputError, match=r"that\.npz: .*the gain of dimension 1 is zero"):
        convert(made("normalized"), "mlp_in", norm, "that.npz")
    own = made("normalized")
    blind = replace(own.parameters, W_enc=own.W_enc * torch.tensor(norm["gain"]))
    with pytest.raises(InputError, match="dimension 1 is zero"):  # W_skip still reads there
        convert(replace(own, parameters=blind), "mlp_in", norm, "x")
    blind = replace(blind, W_skip=own.W_skip * torch.tensor(norm["gain"]))
    kept = convert(replace(own, parameters=blind), "mlp_in", norm, "x")
    assert torch.equal(kept.W_enc, blind.W_enc)


def test_a_transcoder_of_unknown_convention_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"expected source\.input to be one of normalized, mlp_in, found None"
    ):
        convert(replace(made("mlp_in"), metadata={}), "normalized", {"gain": GAIN}, "x")
