"""Gemma Scope 2's, circuit-tracer's and sparsify's files: the function they stand for, and refusals."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file
from torch import Tensor

from common.errors import InputError
from tests.transcoder.others import (
    CONFIG,
    D_OUT,
    D,
    F,
    Files,
    K,
    change_json,
    change_tensors,
    drawn,
    scope_2,
    sparse_coder,
    write_set,
)
from tests.transcoder.test_formats import layers, tiny_transcoder
from transcoder import Transcoder
from transcoder.formats import circuit_tracer, gemma_scope_2, sparsify
from transcoder.formats.circuit_tracer_set import THRESHOLD
from transcoder.transcoder import Parameters

FINITE = st.floats(-100, 100, width=32)


def refuses(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Transcoder.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# -- Gemma Scope 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_out", [D_OUT, D])
def test_gemma_scope_2_is_the_function_that_its_tensors_say(
    tmp_path: Path, d_out: int, dtype: torch.dtype
) -> None:
    """The skip connection is inputs @ A, told from its transpose where it is square, too."""
    own = {name: t.float() for name, t in scope_2(tmp_path / "a", d_out, dtype).items()}
    x = drawn(40, D, seed=9)
    pre = x @ own["w_enc"] + own["b_enc"]
    acts = torch.relu(pre) * (pre > own["threshold"])
    outputs = acts @ own["w_dec"] + own["b_dec"] + x @ own["affine_skip_connection"]
    for path in (tmp_path / "a", tmp_path / "a" / "params.safetensors", tmp_path / "a" / "config.json"):
        read = Transcoder.load(path)
        torch.testing.assert_close(read.encode(x), acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read(x), outputs, rtol=1e-5, atol=1e-5)
    assert read.metadata["source"] == {
        "model": "google/gemma-3-1b-pt",
        "layer": 12,
        "input": "mlp_in",
        "input_hook": "blocks.12.mlp.hook_in",
        "output_hook": "blocks.12.hook_mlp_out",
    }


def test_gemma_scope_2_without_a_skip_connection(tmp_path: Path) -> None:
    scope_2(tmp_path / "a")
    change_tensors(tmp_path / "a" / "params.safetensors", affine_skip_connection=None)
    refuses(tmp_path / "a", r"tensor affine_skip_connection: expected shape \[5, 3\], found none")
    change_json(tmp_path / "a" / "config.json", affine_connection=False, type="absent")
    assert Transcoder.load(tmp_path / "a").W_skip is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, r"config\.json: architecture: expected 'jump_relu', found 'topk'"),
        ({"architecture": "absent"}, "architecture: expected 'jump_relu', found none"),
        ({"type": "crosscoder"}, "type: expected 'transcoder', found 'crosscoder'"),
        ({"width": 12}, r"tensor w_enc: expected float32 \[5, 12\], found float32 \[5, 11\]"),
        ({"width": "11"}, "width: expected a whole number, found '11'"),
        ({"width": True}, "width: expected a whole number, found True"),
        ({"width": -1}, "width: expected at least 1, found -1"),
        ({"affine_connection": "yes"}, "affine_connection: expected true or false, found 'yes'"),
        ({"affine_connection": False}, "unknown tensor affine_skip_connection; expected w_enc"),
        ({"hf_hook_point_in": "absent"}, "hf_hook_point_in: expected a string, found none"),
        ({"hf_hook_point_in": ["x"] * 10**5}, "hf_hook_point_in: expected a string, found a list of 100000"),
        (
            {"hf_hook_point_in": "model.layers.12.output"},
            r"expected model\.layers\.N\. with pre_feedforward_layernorm\.output or mlp\.input, found 'model",
        ),
        ({"hf_hook_point_in": "../../layers.12.mlp.input"}, "hf_hook_point_in: expected model"),
        (
            {"hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output"},
            "hf_hook_point_out: expected layer 12 as the input's, found 13",
        ),
        (
            {"hf_hook_point_out": "model.layers.12.mlp.output"},
            "hf_hook_point_out: mlp.output lies before this model's norm after the MLP",
        ),
    ],
)
def test_a_gemma_scope_2_configuration_we_cannot_honour_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    scope_2(tmp_path / "a")
    change_json(tmp_path / "a" / "config.json", **changes)
    refuses(tmp_path / "a", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json: cannot be read: Expecting value"),
        ("[1]", "expected a JSON object, found a list of 1"),
        ("null", "expected a JSON object, found none"),
        ("[" * 10**5, "cannot be read: maximum recursion depth"),
        ("\udcff", "cannot be read: 'utf-8' codec"),
        (" " * (1 << 20) + "{}", r"config\.json: expected a configuration, found 1,048,578 bytes"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    scope_2(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuses(tmp_path / "a", message)
    (tmp_path / "a" / "config.json").unlink()
    refuses(
        tmp_path / "a", r"^[^ ]*config\.json: not found; Gemma Scope 2 keeps it beside params\.safetensors"
    )


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    scope_2(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert Transcoder.load(tmp_path / "a").d_sae == F


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_dec": None}, r"tensor w_dec: expected shape \[11, 3\], found none"),
        ({"w_enc": drawn(F, D)}, r"tensor w_enc: expected float32 \[11, 11\], found float32 \[11, 5\]"),
        ({"b_dec": torch.tensor(1.0)}, r"tensor w_dec: expected float32 \[11, 0\]"),
        ({"threshold": torch.ones(F, dtype=torch.int64)}, r"expected float32 \[11\], found int64 \[11\]"),
        ({"b_enc": torch.full((F,), torch.nan)}, "tensor b_enc: expected finite numbers"),
        ({"w_dec": torch.full((F, D_OUT), 1e300, dtype=torch.float64)}, "tensor W_dec: expected finite"),
        ({"more": drawn(1)}, "unknown tensor more; expected w_enc, b_enc"),
    ],
)
def test_a_wrong_tensor_of_gemma_scope_2_is_named(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    scope_2(tmp_path / "a")
    change_tensors(tmp_path / "a" / "params.safetensors", **changes)
    refuses(tmp_path / "a", message)


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_written_for_gemma_scope_2(tmp_path: Path, skip: bool) -> None:
    own = tiny_transcoder(skip, input="mlp_in", input_hook="blocks.3.mlp.hook_in", weights_sha256="a" * 64)
    folder = gemma_scope_2.write(tmp_path, *own.saved())
    assert folder == tmp_path / "transcoder" / ("layer_3_width_11_l0_3" + ("_affine" if skip else ""))
    assert json.loads((folder / "config.json").read_text()) == {
        "architecture": "jump_relu",
        "type": "transcoder",
        "model_name": "tests/tiny",
        "hf_hook_point_in": "model.layers.3.mlp.input",
        "hf_hook_point_out": "model.layers.3.mlp.output",
        "width": 11,
        "l0": 3.4,
        "affine_connection": skip,
        "weights_sha256": "a" * 64,
        "harvest_fingerprint": "f" * 64,
        "prefix_ends": [2, 5, 11],
        "git_commit": None,
    }
    read, x = Transcoder.load(folder), drawn(40, D)
    assert torch.equal(read(x), own(x))
    assert read.metadata["harvest_fingerprint"] == "f" * 64
    assert read.metadata["source"]["weights_sha256"] == "a" * 64
    gemma = tiny_transcoder(skip, model="google/gemma-3-1b-pt")
    hooks = json.loads((gemma_scope_2.write(tmp_path, *gemma.saved()) / "config.json").read_text())
    assert hooks["hf_hook_point_in"] == "model.layers.3.pre_feedforward_layernorm.output"
    assert hooks["hf_hook_point_out"] == "model.layers.3.post_feedforward_layernorm.output"


METADATA = tiny_transcoder(input="mlp_in", input_hook="blocks.3.mlp.hook_in").metadata


@st.composite
def cases(draw: Callable[..., Any]) -> dict[str, np.ndarray]:
    """Arrays of any transcoder by name, thresholds for each latent not below zero, and inputs x."""
    d_in, d_out, width = (draw(st.integers(1, 6)) for _ in range(3))
    shapes = {"W_enc": (width, d_in), "b_enc": (width,), "W_dec": (width, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if draw(st.booleans()) else {}
    shapes |= {"thresholds": (1, width), "x": (4, d_in)}
    return {name: draw(arrays("float32", shape, elements=FINITE)) for name, shape in shapes.items()}


def coder_of(case: dict[str, np.ndarray]) -> tuple[Transcoder, Tensor]:
    tensors = {name: torch.from_numpy(array) for name, array in case.items()}
    x, thresholds = tensors.pop("x"), tensors.pop("thresholds").abs()
    return Transcoder(Parameters(**tensors), thresholds, (thresholds.shape[1],), METADATA), x


@settings(max_examples=30)
@given(case=cases())
def test_gemma_scope_2_there_and_back(case: dict[str, np.ndarray], tmp_path_factory) -> None:
    own, x = coder_of(case)
    read = Transcoder.load(gemma_scope_2.write(tmp_path_factory.mktemp("a"), *own.saved()))
    for name, tensor in read.saved()[0].items():
        assert torch.equal(tensor, own.saved()[0][name]), name
    assert torch.equal(read(x), own(x))


# -- sparsify ------------------------------------------------------------------------------------------


def plainly(own: Files, x: Tensor, k: int, shift: bool = False) -> tuple[Tensor, Tensor]:
    """(activations, outputs), row by row: what sparsify's sources say."""
    acts = torch.zeros(len(x), len(own["encoder.bias"]))
    for row, inputs in enumerate(x - own["b_dec"] if shift else x):
        pre = torch.relu(own["encoder.weight"] @ inputs + own["encoder.bias"])
        for latent in pre.argsort(descending=True)[:k].tolist():
            acts[row, latent] = pre[latent]
    outputs = acts @ own["W_dec"] + own["b_dec"]
    return acts, outputs + x @ own["W_skip"].T if "W_skip" in own else outputs


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_keeps_the_k_largest_of_each_row(tmp_path: Path, skip: bool) -> None:
    folder = tmp_path / "layers.12.mlp"
    own, x = sparse_coder(folder, skip_connection=skip), drawn(40, D, seed=9)
    acts, outputs = plainly(own, x, K)
    for path in (folder, folder / "cfg.json", folder / "sae.safetensors"):
        read = Transcoder.load(path)
        torch.testing.assert_close(read.encode(x), acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read(x), outputs, rtol=1e-5, atol=1e-5)
    assert (acts > 0).sum(1).max() == K
    assert (acts > 0).sum(1).min() < K  # relu comes first: a row may have fewer
    assert read.metadata["source"] == {
        "layer": 12,
        "input": "mlp_in",
        "input_hook": "blocks.12.mlp.hook_in",
        "output_hook": "blocks.12.mlp.hook_out",
    }
    assert "top 3 of each row" in repr(read)


def test_sparsify_before_2025_read_inputs_without_the_decoders_bias(tmp_path: Path) -> None:
    """Its cfg.json has no key transcode; that of the run has. The same without it, where there is a skip connection."""
    x = drawn(40, D, seed=9)
    for skip in (False, True):
        folder = tmp_path / str(skip) / "layers.12.mlp"
        own = sparse_coder(folder, skip_connection=skip)
        change_json(folder / "cfg.json", transcode="absent")
        if not skip:
            refuses(
                folder,
                r"transcode: expected true, found no such key, here or in .*False/config\.json; an auto",
            )
            (folder.parent / "config.json").write_text(json.dumps({"transcode": True, "model": "a/b"}))
        read = Transcoder.load(folder)
        acts, outputs = plainly(own, x, K, shift=True)
        torch.testing.assert_close(read.encode(x), acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read(x), outputs, rtol=1e-5, atol=1e-5)
        assert read.metadata["source"].get("model") == (None if skip else "a/b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation: expected 'topk', found 'groupmax'; no other is read"),
        ({"signed": True}, "signed: expected False, found True"),
        ({"transcode": False}, "transcode: expected true, found false; an autoencoder is not read"),
        ({"transcode": "true"}, "transcode: expected true or false, found 'true'"),
        ({"k": 12}, r"k: expected at most the 11 latents, found 12"),
        ({"k": 0}, "k: expected at least 1, found 0"),
        ({"k": 3.0}, "k: expected a whole number, found 3.0"),
        ({"k": "absent"}, "k: expected a whole number, found none"),
        ({"d_in": 6}, r"tensor encoder\.weight: expected float32 \[11, 6\], found float32 \[11, 5\]"),
        ({"num_latents": 0}, r"tensor encoder\.weight: expected float32 \[160, 5\]"),
        ({"skip_connection": True}, r"tensor W_skip: expected shape \[5, 5\], found none"),
    ],
)
def test_a_sparsify_configuration_we_cannot_honour_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "layers.12.mlp"
    sparse_coder(folder)
    change_json(folder / "cfg.json", **changes)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, r"tensor W_dec: expected shape \[11, 5\], found none"),
        ({"W_skip": drawn(D, D)}, "unknown tensor W_skip"),
        ({"b_dec": torch.full((D,), torch.inf)}, "tensor b_dec: expected finite numbers"),
        ({"encoder.bias": torch.ones(F, dtype=torch.int32)}, r"found int32 \[11\]"),
    ],
)
def test_a_wrong_tensor_of_sparsify_is_named(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    sparse_coder(tmp_path / "layers.12.mlp")
    change_tensors(tmp_path / "layers.12.mlp" / "sae.safetensors", **changes)
    refuses(tmp_path / "layers.12.mlp", message)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.7.mlp", 7),
        ("h.7.mlp", 7),
        ("gpt_neox.layers.7.mlp", 7),
        ("language_model.layers.7.mlp", 7),
        ("layers.7.mlp/seed2", 7),
        ("mine", None),
        ("layers.x.mlp", None),
    ],
)
def test_sparsifys_directory_says_the_module(tmp_path: Path, name: str, layer: int | None) -> None:
    sparse_coder(tmp_path / name)
    source = Transcoder.load(tmp_path / name).metadata["source"]
    assert source.get("layer") == layer
    assert source.get("input") == (None if layer is None else "mlp_in")


@pytest.mark.parametrize("name", ["layers.7", "layers.7.self_attn", "layers.7.mlp.down_proj"])
def test_another_modules_transcoder_is_no_mlps(tmp_path: Path, name: str) -> None:
    sparse_coder(tmp_path / name)
    refuses(
        tmp_path / name, rf"in a directory named as its module \(layers\.12\.mlp\), found {re.escape(name)}"
    )


def test_seeds_below_a_layer_are_named(tmp_path: Path) -> None:
    for seed in range(5):
        sparse_coder(tmp_path / "layers.7.mlp" / f"seed{seed}")
    refuses(tmp_path / "layers.7.mlp", "; there is one in seed0, seed1, seed2 and 2 more below it$")


# -- circuit-tracer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "topk, by its file"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_layer_of_a_circuit_tracer_set(tmp_path: Path, kind: str, skip: bool) -> None:
    more = {"W_skip": drawn(D_OUT, D, seed=7)} if skip else {}
    more |= {THRESHOLD: drawn(F, seed=8)} if kind == "jumprelu" else {}
    more |= {"k": torch.tensor(K)} if "file" in kind else {}
    said: dict[str, object] = {"activation": "topk", "k": K} if kind == "topk" else {}
    own, x = write_set(tmp_path / "set", 0, 1, tensors=more, **said), drawn(40, D, seed=9)
    pre = x @ own["W_enc"].T + own["b_enc"]
    if kind.startswith("topk"):
        gate = torch.zeros_like(pre).scatter_(1, pre.topk(K).indices, 1)
    else:
        gate = pre > own.get(THRESHOLD, torch.zeros(F))
    acts = torch.relu(pre) * gate
    outputs = acts @ own["W_dec"] + own["b_dec"] + (x @ own["W_skip"].T if skip else 0)
    read = Transcoder.load(tmp_path / "set" / "layer_1.safetensors")
    torch.testing.assert_close(read.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read(x), outputs, rtol=1e-5, atol=1e-5)
    assert read.metadata["source"] == {
        "model": "Qwen/Qwen3-0.6B",
        "layer": 1,
        "input": "mlp_in",
        "input_hook": "blocks.1.mlp.hook_in",
        "output_hook": "blocks.1.hook_mlp_out",
    }


def test_our_own_set_comes_back(tmp_path: Path) -> None:
    own = layers(0, 1)
    folder = circuit_tracer.write(tmp_path / "set", [t.saved() for t in own], partial=True)
    read = Transcoder.load(folder / "layer_1.safetensors")
    assert torch.equal(read(drawn(9, D)), own[1](drawn(9, D)))
    assert read.metadata["source"]["input_hook"] == "blocks.1.ln2.hook_normalized"
    (folder / "config.yaml").unlink()
    (folder / "layer_1.safetensors").rename(tmp_path / "mine.safetensors")
    alone = Transcoder.load(tmp_path / "mine.safetensors")
    assert torch.equal(alone.W_enc, own[1].W_enc)
    assert alone.metadata["source"] == {}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_kind": "cross_layer_transcoder"}, {}, "model_kind: expected transcoder_set, found 'cross_l"),
        (
            {"feature_input_hook": "hook_resid_mid"},
            {},
            r"feature_input_hook: expected ln2\.hook_normalized or mlp\.hook_in, found 'hook_resid_mid'",
        ),
        ({"feature_output_hook": None}, {}, "feature_output_hook: expected a string, found none"),
        ({"feature_input_hook": "[a, b]"}, {}, "feature_input_hook: expected a string, found a list of 2"),
        ({"model_name": 3}, {}, "model_name: expected a string, found 3"),
        ({"activation": "gelu"}, {}, "activation: expected relu, jumprelu or topk, found 'gelu'"),
        ({"activation": "topk"}, {}, "k: expected a whole number, found none"),
        (
            {"activation": "topk", "k": 12},
            {},
            "k: expected at most the 11 latents and no thresholds, found 12",
        ),
        ({}, {"k": torch.tensor(2.5)}, "tensor k: expected one whole number of at least 1"),
        ({"activation": "relu"}, {THRESHOLD: drawn(F)}, "expected none, as .* has activation relu"),
        ({}, {"log_thresholds": drawn(F)}, "unknown tensor log_thresholds"),
        ({}, {"W_dec": drawn(F, D)}, r"tensor W_dec: expected float32 \[11, 3\], found float32 \[11, 5\]"),
        ({}, {"W_skip": drawn(D, D_OUT)}, r"tensor W_skip: expected float32 \[3, 5\]"),
        ({}, {"b_enc": torch.full((F,), torch.nan)}, "tensor b_enc: expected finite numbers"),
    ],
)
def test_a_set_that_we_cannot_honour_is_named(
    tmp_path: Path, config: dict[str, Any], tensors: Files, message: str
) -> None:
    write_set(tmp_path / "set", 0, tensors=tensors, **config)
    refuses(tmp_path / "set" / "layer_0.safetensors", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"config\.yaml: cannot be read: line 1: while parsing a flow node"),
        (
            "model_kind: x\n b: c: d",
            r"config\.yaml: cannot be read: line 2: mapping values are not allowed here",
        ),
        ("- a", "expected keys and values, as circuit-tracer writes them, found a list of 1"),
        ("a: &a [x, x]\nb: [*a, *a]", r"config\.yaml: has an alias \(\*name\)"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "cannot be read: line 1: could not determine a constructor",
        ),
        ("[" * 5000, r"expected a flat list of keys and values, found 5,000 brackets"),
        ("- " * 5000, "cannot be read: maximum recursion depth"),
    ],
)
def test_a_config_yaml_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    write_set(tmp_path / "set", 0)
    (tmp_path / "set" / "config.yaml").write_text(text)
    refuses(tmp_path / "set" / "layer_0.safetensors", message)


@settings(max_examples=30)
@given(case=cases(), k=st.integers(1, 6))
def test_top_k_there_and_back(case: dict[str, np.ndarray], k: int, tmp_path_factory) -> None:
    """sparsify's layout, circuit-tracer's and our own file of one top-k transcoder are one function."""
    own, x = coder_of(case)
    own = replace(own, k=min(k, own.d_sae), thresholds=torch.zeros(1))
    root = tmp_path_factory.mktemp("a")
    own.save(root / "ours")
    config = {"k": own.k, "activation": "topk"}
    write_set(root / "set", 0, tensors=own.parameters.named(), **config)
    files = [root / "ours", root / "set" / "layer_0.safetensors"]
    if own.d_in == own.d_out:
        theirs = {sparsify.NAMES.get(name, name): each for name, each in own.parameters.named().items()}
        size = {"d": own.d_in, "f": own.d_sae, "k": own.k}
        sparse_coder(root / "layers.0.mlp", **size, skip_connection="W_skip" in theirs)
        save_file(theirs, root / "layers.0.mlp" / "sae.safetensors")
        files.append(root / "layers.0.mlp")
    for file in files:
        read = Transcoder.load(file)
        assert read.k == own.k
        assert torch.equal(read.encode(x), own.encode(x))
        assert torch.equal(read(x), own(x))
