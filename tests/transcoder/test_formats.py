"""Other tools' files: what we write is what we read, and a wrong file is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import InputError
from tests.train.steps import problem
from transcoder import Transcoder
from transcoder.formats import circuit_tracer, gemma_scope, saelens

SOURCE = {
    "model": "tests/tiny",
    "layer": 3,
    "n_layers": 5,
    "input": "normalized",
    "input_hook": "blocks.3.ln2.hook_normalized",
    "output_hook": "blocks.3.hook_mlp_out",
    "context_length": 128,
    "bos_token_id": 1,
    "dropped_token_ids": [0, 1, 2],
    "dataset": "tests/text",
}


def tiny_transcoder(skip: bool = False, **source: object) -> Transcoder:
    p = problem(skip=skip, dtype=torch.float32)
    metadata = {
        "source": SOURCE | source,
        "harvest_fingerprint": "f" * 64,
        "heldout": {"rows": 9, "l0": [1.2, 2.6, 3.4]},
    }
    return Transcoder(p.parameters, torch.tensor([0.1, 0.2, 0.3]), (2, 5, 11), metadata)


def same(actual: Transcoder, expected: Transcoder, nested: bool = False) -> None:
    """Bit-identical tensors; the threshold of each latent is the whole dictionary's, but where prefixes are kept."""
    for name, tensor in expected.parameters.named().items():
        assert torch.equal(actual.parameters.named()[name], tensor), name
    assert actual.parameters.named().keys() == expected.parameters.named().keys()
    if nested:
        assert actual.prefix_ends == expected.prefix_ends
        assert torch.equal(actual.thresholds, expected.thresholds)
    else:
        assert actual.prefix_ends == (expected.d_sae,)
        assert torch.equal(actual.thresholds, torch.full((1, expected.d_sae), expected.threshold))


@pytest.mark.parametrize("prefix", [None, 0, 1])
@pytest.mark.parametrize("write", [saelens.write, gemma_scope.write])
def test_what_is_written_is_what_is_read(tmp_path: Path, write, prefix: int | None) -> None:
    own = tiny_transcoder() if prefix is None else tiny_transcoder().prefix(prefix)
    folder = write(tmp_path, *own.saved())
    loaded = Transcoder.load(folder)
    same(loaded, own, nested=write is saelens.write)
    x = problem(rows=50, dtype=torch.float32).x
    assert torch.equal(loaded.encode(x), own.encode(x))
    assert torch.equal(loaded(x), own(x))
    assert loaded.metadata["source"]["input"] == "normalized"


def test_gemma_scope_knows_no_l0_where_nothing_was_measured(tmp_path: Path) -> None:
    tensors, metadata = tiny_transcoder().saved()
    for nothing in ({"heldout": {"rows": 0, "l0": [0.0] * 3}}, {"heldout": {}}):
        assert gemma_scope.write(tmp_path, tensors, metadata | nothing).name == "average_l0_unknown"


def test_gemma_scope_puts_layer_width_and_l0_into_the_path(tmp_path: Path) -> None:
    assert (
        gemma_scope.write(tmp_path, *tiny_transcoder().saved())
        == tmp_path / "layer_3" / "width_11" / "average_l0_3"
    )
    narrow = gemma_scope.write(tmp_path, *tiny_transcoder().prefix(1).saved())
    assert narrow.relative_to(tmp_path).parts[1:] == ("width_5", "average_l0_3")
    arrays = np.load(narrow / "params.npz", allow_pickle=False)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "W_enc": ((5, 5), "float32"),
        "b_enc": ((5,), "float32"),
        "W_dec": ((5, 3), "float32"),
        "b_dec": ((3,), "float32"),
        "threshold": ((5,), "float32"),
    }


def test_saelens_keeps_the_skip_connection_and_says_where_it_belongs(tmp_path: Path) -> None:
    folder = saelens.write(tmp_path, *tiny_transcoder(skip=True).saved())
    same(Transcoder.load(folder), tiny_transcoder(skip=True), nested=True)
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu_skip_transcoder"
    assert (config["d_in"], config["d_sae"], config["d_out"], config["dtype"]) == (5, 11, 3, "float32")
    assert config["metadata"] == {
        "sae_lens_version": "6.0.0",
        "model_name": "tests/tiny",
        "hook_name": "blocks.3.ln2.hook_normalized",
        "hook_name_out": "blocks.3.hook_mlp_out",
        "context_size": 128,
        "prepend_bos": True,
        "exclude_special_tokens": [0, 1, 2],
        "dataset_path": "tests/text",
        "layer": 3,
        "input": "normalized",
        "weights_sha256": None,
        "harvest_fingerprint": "f" * 64,
        "prefix_ends": [2, 5, 11],
        "prefix_thresholds": tiny_transcoder().thresholds.tolist(),
        "git_commit": None,
    }
    assert Transcoder.load(folder).metadata["source"] == {
        "model": "tests/tiny",
        "layer": 3,
        "input": "normalized",
        "input_hook": "blocks.3.ln2.hook_normalized",
        "output_hook": "blocks.3.hook_mlp_out",
    }


def test_gemma_scope_has_no_skip_connection(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has a skip connection, which the format has no place for"):
        gemma_scope.write(tmp_path, *tiny_transcoder(skip=True).saved())
    assert not list(tmp_path.iterdir())


def layers(*numbers: int, **changes: object) -> list[Transcoder]:
    hooks = {"input_hook": "blocks.{}.ln2.hook_normalized", "output_hook": "blocks.{}.hook_mlp_out"}
    return [
        tiny_transcoder(layer=n, **{key: hook.format(n) for key, hook in hooks.items()}, **changes)
        for n in numbers
    ]


def test_circuit_tracer_is_one_file_per_layer_and_a_config(tmp_path: Path) -> None:
    saved = [transcoder.saved() for transcoder in layers(4, 0, 1, 2, 3)]
    circuit_tracer.write(tmp_path, saved)
    assert (tmp_path / "config.yaml").read_text() == (
        'model_name: "tests/tiny"\n'
        'model_kind: "transcoder_set"\n'
        'feature_input_hook: "ln2.hook_normalized"\n'
        'feature_output_hook: "hook_mlp_out"\n'
    )
    own = tiny_transcoder()
    for layer in range(5):
        stored = load_file(tmp_path / f"layer_{layer}.safetensors")
        assert stored.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "activation_function.threshold"}
        assert torch.equal(stored["W_enc"], own.W_enc)
        assert torch.equal(stored["activation_function.threshold"], torch.full((11,), 0.3))
    with safe_open(tmp_path / "layer_3.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["layer"], header["input"], header["harvest_fingerprint"]) == ("3", "normalized", "f" * 64)


@pytest.mark.parametrize(
    ("numbers", "partial", "message"),
    [
        ((0, 2), False, r"every layer from 0 to 4, one width; missing 1 3 4; train them$"),
        (
            (0, 1),
            False,
            r"missing 2 3 4; train them, or export layers 0 to 1 alone with --partial \(make: ARGS=--partial\)",
        ),
        ((0, 2), True, "from 0 to 2, one width; missing 1; train them$"),
        ((3,), True, "from 0 to 3, one width; missing 0 1 2; train them$"),
    ],
)
def test_circuit_tracer_names_missing_layers(
    tmp_path: Path, numbers: tuple[int, ...], partial: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        circuit_tracer.write(tmp_path, [t.saved() for t in layers(*numbers)], partial)
    assert not list(tmp_path.iterdir())


def test_circuit_tracer_takes_layers_from_0_on_request_and_refuses_a_mixture(tmp_path: Path) -> None:
    circuit_tracer.write(tmp_path, [t.saved() for t in layers(0, 1)], partial=True)
    assert (tmp_path / "layer_1.safetensors").is_file()
    first, second = layers(0, 1)
    with pytest.raises(InputError, match="latents: layer 0 has 11, layer 1 has 5"):
        circuit_tracer.write(tmp_path, [first.saved(), second.prefix(1).saved()], partial=True)
    with pytest.raises(InputError, match="model: layer 0 has tests/tiny, layer 1 has other"):
        circuit_tracer.write(tmp_path, [first.saved(), layers(1, model="other")[0].saved()], partial=True)


def test_a_threshold_below_zero_is_zero_after_their_relu(tmp_path: Path) -> None:
    own = replace(tiny_transcoder(), thresholds=torch.linspace(-1, 1, 11)[None], prefix_ends=(11,))
    for write in (saelens.write, gemma_scope.write):
        loaded = Transcoder.load(write(tmp_path / write.__module__, *own.saved()))
        assert torch.equal(loaded.thresholds, own.thresholds.clamp_min(0))


def test_relu_transcoders_of_saelens_have_a_threshold_of_zero(tmp_path: Path) -> None:
    folder = saelens.write(tmp_path, *tiny_transcoder().saved())
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": "transcoder"}))
    stored = load_file(folder / "sae_weights.safetensors")
    del stored["threshold"]
    save_file(
        {name: tensor.bfloat16() for name, tensor in stored.items()}, folder / "sae_weights.safetensors"
    )
    loaded = Transcoder.load(folder)
    assert not loaded.thresholds.any()
    assert torch.equal(loaded.W_enc, tiny_transcoder().W_enc.bfloat16().float())


@pytest.mark.parametrize("skip", [False, True])
def test_thresholds_of_each_latent_survive_our_own_file_and_prefixes(tmp_path: Path, skip: bool) -> None:
    own = replace(tiny_transcoder(skip), thresholds=torch.rand(3, 11))
    own.save(tmp_path)
    loaded, x = Transcoder.load(tmp_path), problem(rows=40, dtype=torch.float32).x
    assert torch.equal(loaded.thresholds, own.thresholds)
    pre = own.pre_activations(x)
    torch.testing.assert_close(loaded.encode(x), torch.where(pre > own.thresholds[-1], pre, 0.0))
    low, high = own.thresholds[-1].min(), own.thresholds[-1].max()
    assert f"threshold {low:.3g} to {high:.3g}" in repr(loaded)
    assert f"<td>{own.thresholds[0].min():.3g} to {own.thresholds[0].max():.3g}</td>" in loaded._repr_html_()
    narrow = loaded.prefix(1)
    torch.testing.assert_close(narrow.encode(x), torch.where(pre > own.thresholds[1], pre, 0.0)[:, :5])


def change_npz(folder: Path, **changes: np.ndarray | None) -> None:
    arrays = dict(np.load(folder / "params.npz")) | changes
    np.savez(folder / "params.npz", **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": np.zeros(3)}, r"tensor threshold: expected float32 \[11\], found float32 \[3\]"),
        ({"W_dec": np.zeros((11, 9))}, r"tensor W_dec: expected float32 \[11, 3\], found float32 \[11, 9\]"),
        ({"W_enc": None}, r"tensor W_enc: expected shape \[0, 0\], found none"),
        ({"W_enc": np.array([{}], dtype=object)}, r"not a readable \.npz of plain arrays"),
        ({"b_enc": np.array(["a"])}, r"not a readable \.npz of plain arrays"),
    ],
)
def test_a_damaged_npz_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    folder = gemma_scope.write(tmp_path, *tiny_transcoder().saved())
    change_npz(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        Transcoder.load(folder)
    assert str(folder / "params.npz") in str(caught.value)


def test_a_truncated_npz_is_named(tmp_path: Path) -> None:
    file = gemma_scope.write(tmp_path, *tiny_transcoder().saved()) / "params.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="not a readable"):
        Transcoder.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "standard"}, "architecture: expected one of transcoder, .*found 'standard'"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations: expected 'none', found 'layer_norm'",
        ),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input: expected False, found True"),
        ({"d_sae": 12}, r"tensor W_enc: expected float32 \[5, 12\], found float32 \[5, 11\]"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_mid"}}, r"hook_name: expected blocks\.N\."),
        ({"metadata": None}, "expected an object with metadata"),
    ],
)
def test_a_saelens_configuration_we_cannot_honour_is_named(
    tmp_path: Path, changes: dict, message: str
) -> None:
    folder = saelens.write(tmp_path, *tiny_transcoder().saved())
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=message):
        Transcoder.load(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"cfg\.json: not found"):
        Transcoder.load(folder)


def test_other_tools_files_are_named(tmp_path: Path) -> None:
    """A language model, a pickle, a directory of pickles."""
    save_file({"model.embed": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"found none: another tool's file \(model\.embed\); this project reads"
    ):
        Transcoder.load(tmp_path / "model.safetensors")
    (tmp_path / "ae.pt").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=r"ae\.pt: a pickle, which is not read"):
        Transcoder.load(tmp_path / "ae.pt")
    with pytest.raises(InputError, match=r"ae\.pt: a pickle, which is not read"):
        Transcoder.load(tmp_path)


def test_layers_of_a_set_are_alike_by_the_weights_digest_and_not_by_name(tmp_path: Path) -> None:
    """A model moved between two harvests is the same; another one of the same name is not."""
    same = [layers(0, weights_sha256="a" * 64)[0], layers(1, weights_sha256="a" * 64, model="moved/tiny")[0]]
    circuit_tracer.write(tmp_path / "same", [t.saved() for t in same], partial=True)
    other = [layers(0, weights_sha256="a" * 64)[0], layers(1, weights_sha256="b" * 64)[0]]
    with pytest.raises(InputError, match="model: layer 0 has aaaa"):
        circuit_tracer.write(tmp_path / "other", [t.saved() for t in other], partial=True)


def test_saelens_files_whose_thresholds_were_changed_are_read_without_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saelens.write(tmp_path, *tiny_transcoder().saved())
    stored = load_file(folder / "sae_weights.safetensors")
    stored["threshold"][4] = 0.5
    save_file(stored, folder / "sae_weights.safetensors")
    changed = Transcoder.load(folder)
    assert changed.prefix_ends == (11,)
    assert torch.equal(changed.thresholds, stored["threshold"][None])
    assert (
        "its thresholds are not those that were exported; it is read without its" in capsys.readouterr().err
    )
    config = json.loads((folder / "cfg.json").read_text())
    for ends, cuts in (([2, 5, 12], [0.1] * 3), ([2, 5, 11], [0.1] * 2), ([2, 5, 11], ["a"] * 3)):
        config["metadata"] |= {"prefix_ends": ends, "prefix_thresholds": cuts}
        (folder / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(
            InputError, match="as many prefix_thresholds as prefix_ends, numbers, the last end 11"
        ):
            Transcoder.load(folder)


def test_saelens_name_for_gemma_scope_2s_input_is_read_by_its_module(tmp_path: Path) -> None:
    """SAELens 6.54 calls it the residual before the norm (blocks.N.hook_mlp_in); its hf_hook_name is right."""
    folder = saelens.write(tmp_path, *tiny_transcoder().saved())
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": "blocks.3.hook_mlp_in"}
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"an MLP's input\), found blocks\.3\.hook_mlp_in"):
        Transcoder.load(folder)
    config["metadata"] |= {"hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output"}
    (folder / "cfg.json").write_text(json.dumps(config))
    source = Transcoder.load(folder).metadata["source"]
    assert (source["input"], source["input_hook"]) == ("mlp_in", "blocks.3.mlp.hook_in")


def test_gemma_scopes_directories_name_the_layer(tmp_path: Path) -> None:
    folder = gemma_scope.write(tmp_path, *tiny_transcoder().saved())
    hooks = {"input_hook": "blocks.3.ln2.hook_normalized", "output_hook": "blocks.3.hook_mlp_out"}
    assert Transcoder.load(folder).metadata["source"] == {"input": "normalized", "layer": 3, **hooks}
    moved = (folder / "params.npz").rename(tmp_path / "params.npz")
    assert Transcoder.load(moved).metadata["source"] == {"input": "normalized"}


def test_saelens_keeps_the_digest_of_the_language_models_weights(tmp_path: Path) -> None:
    folder = saelens.write(tmp_path, *tiny_transcoder(weights_sha256="a" * 64).saved())
    for path in (folder, folder / "cfg.json", folder / "sae_weights.safetensors"):
        assert Transcoder.load(path).metadata["source"]["weights_sha256"] == "a" * 64
