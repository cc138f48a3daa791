"""Inputs with and without the norm's gain: the same function, whichever a transcoder was trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.settings import Settings
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store
from tests.train.steps import problem
from train.loop import train
from transcoder import Transcoder
from transcoder.gain import bind, convert

GAIN = [0.5, -2.0, 3.0, 1.0, 0.1]


def with_convention(convention: str, dtype: torch.dtype = torch.float32) -> Transcoder:
    p = problem(skip=True, dtype=dtype)
    return Transcoder(p.parameters, torch.tensor([0.1]), (11,), {"source": {"input": convention, "layer": 7}})


@pytest.mark.parametrize("bias", [None, [0.3, -1.0, 0.0, 2.0, 5.0]])
@pytest.mark.parametrize("wanted", ["normalized", "mlp_in"])
def test_both_directions_are_the_same_function(wanted: str, bias: list[float] | None) -> None:
    convention = "mlp_in" if wanted == "normalized" else "normalized"
    own, x = with_convention(convention, torch.float64), problem(rows=30, dtype=torch.float64).x
    gain, shift = (torch.tensor(values, dtype=torch.float64) for values in (GAIN, bias or [0.0] * 5))
    fed = (x - shift) / gain if wanted == "normalized" else x * gain + shift
    other = convert(own, wanted, {"gain": GAIN, "gain_bias": bias}, "x")
    torch.testing.assert_close(other.pre_activations(fed), own.pre_activations(x))
    torch.testing.assert_close(other(fed), own(x))
    hook = {"normalized": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}[wanted]
    assert other.metadata["source"] == {"input": wanted, "layer": 7, "input_hook": f"blocks.7.{hook}"}
    assert own.metadata["source"]["input"] == convention


def test_powers_of_two_are_exact_and_nothing_changes_where_nothing_has_to() -> None:
    own, norm = with_convention("mlp_in"), {"gain": [0.5, 2.0, 4.0, 1.0, -0.25]}
    there = convert(own, "normalized", norm, "x")
    back = convert(there, "mlp_in", norm, "x")
    assert torch.equal(there.W_enc, own.W_enc * torch.tensor(norm["gain"]))
    assert torch.equal(back.W_enc, own.W_enc)
    assert torch.equal(back.W_skip, own.W_skip)
    assert convert(own, "mlp_in", norm, "x") is own


def test_a_gain_of_zero_is_refused_unless_nothing_is_read_there() -> None:
    norm = {"gain": [1.0, 0.0, 1.0, 1.0, 0.0]}
    assert not convert(with_convention("mlp_in"), "normalized", norm, "x").W_enc[:, 1].any()
    with pytest.raises(InputError, match=r"that\.npz: .*the gain of dimension 1 is zero"):
        convert(with_convention("normalized"), "mlp_in", norm, "that.npz")
    own = with_convention("normalized")
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
        convert(replace(with_convention("mlp_in"), metadata={}), "normalized", {"gain": GAIN}, "x")


HOOKS = {"input_hook": "blocks.0.ln2.hook_normalized", "output_hook": "blocks.0.hook_mlp_out"}


def of(**source: object) -> Transcoder:
    """A transcoder of the store's widths whose record says this."""
    return replace(random_coder(12, 10, (4, 11)), metadata={"source": {"input": "normalized", **source}})


def test_what_belongs_to_a_store_is_bound_and_what_is_not_known_is_not_checked(store: Store) -> None:
    own = of(**store.manifest.source.model_dump(mode="json"))
    assert bind(own, store) is own
    assert bind(of(), store).W_enc.shape == (11, 12)
    saelens = of(layer=0, **HOOKS, model="tests/tiny")
    assert bind(saelens, store) is saelens


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"layer": 1}, "it is of layer 1, there 0;"),
        ({"weights_sha256": "a" * 64}, r"weights are aaaaaaaaaaaa\.\.\., there 000000000000\.\.\.;"),
        (
            {"weights_sha256": "a" * 64, "dtype": "bfloat16"},
            "model.dtype bfloat16, there float32, which alone",
        ),
        (
            {"input_hook": "blocks.3.ln2.hook_normalized"},
            r"it reads blocks\.3\.ln2\.hook_normalized, there blocks\.0",
        ),
        (
            {"output_hook": "blocks.3.hook_mlp_out"},
            r"it predicts blocks\.3\.hook_mlp_out, there blocks\.0\.hook_mlp",
        ),
        (
            {"layer": 0, **HOOKS, "output_hook": "blocks.0.hook_attn_out"},
            r"it predicts blocks\.0\.hook_attn_out",
        ),
        ({"input": "mlp_in", "input_hook": "blocks.3.mlp.hook_in"}, r"there blocks\.0\.mlp\.hook_in;"),
    ],
)
def test_another_layer_model_or_hook_is_refused_unless_on_purpose(
    store: Store, source: dict, message: str
) -> None:
    other = of(**source)
    with pytest.raises(InputError, match=message) as caught:
        bind(other, store, "theirs")
    assert str(caught.value).startswith(f"theirs: does not belong to {store.path}: ")
    assert "--evaluate.allow_mismatch true (in Python: mismatch=True)" in str(caught.value)
    assert bind(other, store, mismatch=True).W_dec is other.W_dec


def test_widths_are_refused_even_on_purpose(store: Store) -> None:
    with pytest.raises(InputError, match=r"expected widths 12 -> 10 as in .*, found 12 -> 9"):
        bind(random_coder(12, 9, (4,)), store, mismatch=True)


def test_binding_converts_the_gain(tmp_path: Path) -> None:
    gain, rows = [2.0, 0.5, -1.0, 4.0, 1.0], tuple(np.ones((40, d), np.float32) for d in (5, 3))
    store = make_store(tmp_path / "s.zarr", rows, rows, gain=gain)
    own = replace(with_convention("mlp_in"), metadata={"source": {"input": "mlp_in", "layer": 0}})
    bound = bind(own, store)
    assert torch.equal(bound.W_enc, own.W_enc * torch.tensor(gain))
    assert bind(bound, store) is bound  # a second time nothing is left to convert


def test_another_name_alone_is_told_and_not_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    bind(of(model="elsewhere/TINY"), store)
    assert capsys.readouterr().err == ""
    bind(of(model="elsewhere/other"), store, "theirs")
    assert "theirs: says that it is of the model 'elsewhere/other'" in capsys.readouterr().err
    digest = store.manifest.source.weights_sha256
    bind(of(model="elsewhere/other", weights_sha256=digest), store)
    assert capsys.readouterr().err == ""


def test_a_run_does_not_start_from_another_layer_unless_on_purpose(
    store: Store, make_settings: Callable[..., Settings]
) -> None:
    other = make_settings(run="other")
    from_layer_1 = random_coder(12, 10, (8, 24, 64), layer=1)
    from_layer_1.save(other.run_dir())
    changes = {"train__init_from": str(other.run_dir()), "train__rows": 64 * 4}
    with pytest.raises(
        InputError, match=r"init_from: .*it is of layer 1, there 0; .*--train\.init_mismatch true"
    ):
        train(make_settings(run="b", **changes), store)
    assert train(make_settings(run="b", **changes, train__init_mismatch=True), store).d_sae == 64
