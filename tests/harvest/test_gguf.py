"""A .gguf file as model.name: written here as llama.cpp writes it, read as a Hugging Face directory."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import InputError
from common.settings import Model, Settings
from harvest import embedded, lm
from harvest import gguf as ours
from harvest.run import harvest
from shards import Store
from tests.models import save_model

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ours, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def in_llama_cpp_order(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp's rotary embedding pairs them: neighbours, not halves."""
    out = matrix.shape[0]
    return matrix.reshape(heads, 2, out // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def as_stored(family: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's converter makes of a Hugging Face tensor."""
    if family == "llama" and ("q_proj" in name or "k_proj" in name):
        return in_llama_cpp_order(tensor, 4 if "q_proj" in name else 2)
    return tensor + 1 if family == "gemma2" and "norm" in name else tensor


def write_gguf(directory: Path, file: Path, leave_out: str = "nothing", quantise: str = "nothing") -> Path:
    """The Hugging Face model in `directory` as GGUF; matrices with `quantise` in their name as Q8_0."""
    config = AutoConfig.from_pretrained(directory)
    family = config.model_type
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_tokenizer(writer, directory)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma2": gguf.MODEL_ARCH.GEMMA2}[family]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored
        values = as_stored(family, name, tensor).numpy()
        if leave_out in name:
            continue
        if quantise in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    special = {token["content"] for token in model["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[token in special] for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in model["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_models_weights(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / family, family)
    file = write_gguf(directory, tmp_path / "tiny model.gguf")
    where = lm.locate(Model(name=str(file)))
    weights = AutoModelForCausalLM.from_pretrained(where).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=2e-7 if "norm" in name else 0), name


def test_the_models_tokens(llama: Path, tmp_path: Path) -> None:
    where = lm.locate(Model(name=str(write_gguf(llama, tmp_path / "tiny.gguf"))))
    text = "the red river sings <eos> under 7 stones."
    encoded = [
        lm.load_tokenizer(str(place), None).backend_tokenizer.encode(text, add_special_tokens=False).ids
        for place in (where, llama)
    ]
    assert encoded[0] == encoded[1]


def test_quantised_weights_are_unpacked(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "llama", "llama")
    where = lm.locate(Model(name=str(write_gguf(directory, tmp_path / "q.gguf", quantise="mlp.up_proj"))))
    weights, original = (load_file(Path(place) / "model.safetensors") for place in (where, directory))
    kind = gguf.GGMLQuantizationType.Q8_0
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        expected = gguf.dequantize(gguf.quantize(original[name].numpy(), kind), kind)
        assert np.array_equal(weights[name].numpy(), expected)
        assert not torch.equal(weights[name], original[name])


def test_a_harvest_of_a_file_and_its_directory_are_the_same_rows(
    llama: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    file = write_gguf(llama, tmp_path / "Tiny.gguf")
    by_file, by_directory = (Store.open(harvest(settings_for(model))[0]) for model in (file, llama))
    assert by_file.path.parent.name == "tiny"
    assert by_file.manifest.source.model == str(file)
    for ours_, theirs in zip(by_file.train.rows(0, 2000), by_directory.train.rows(0, 2000), strict=True):
        assert torch.equal(ours_, theirs)


def test_a_file_is_converted_once_and_again_when_it_changes(llama: Path, tmp_path: Path, cache: Path) -> None:
    file = write_gguf(llama, tmp_path / "tiny.gguf")
    model = Model(name=str(file))
    first = lm.locate(model)
    written = Path(first, "model.safetensors").stat().st_mtime_ns
    assert lm.locate(model) == first
    file.touch()  # the content decides, not the date or the place
    renamed = file.rename(tmp_path / "TINY.GGUF")
    assert lm.locate(Model(name=str(renamed))) == first
    assert Path(first, "model.safetensors").stat().st_mtime_ns == written
    write_gguf(llama, renamed.rename(file), quantise="mlp")
    second = lm.locate(model)
    assert second != first
    assert [str(path) for path in (cache / "gguf").iterdir()] == [second]  # 517 MB, of a real one


def test_files_that_are_no_whole_model(llama: Path, tmp_path: Path, cache: Path) -> None:
    whole = write_gguf(llama, tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "text.gguf").write_text("this is no model")
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"wrong"))
    write_gguf(llama, tmp_path / "lacks.gguf", leave_out="layers.1.mlp.up")
    lines = {
        "text.gguf": "cannot be read as GGUF: ",
        "short.gguf": "cannot be read as GGUF: ",
        "other.gguf": "cannot be read as GGUF: ",
        "lacks.gguf": "has no weights for model.layers.1.mlp.up_proj.weight",
        "absent.gguf": "no such file",
    }
    for name, line in lines.items():
        with pytest.raises(InputError, match=line) as stopped:
            lm.locate(Model(name=str(tmp_path / name)))
        assert "\n" not in str(stopped.value)
        assert not list(cache.glob("gguf/*"))


def test_of_several_processes_one_converts_also_after_a_kill(tmp_path: Path) -> None:
    half = tmp_path / ".made.new.tmp" / "half"
    half.parent.mkdir()
    half.touch()
    made = []

    def slow(directory: Path) -> None:
        made.append(directory)
        time.sleep(0.2)
        (directory / "file").touch()

    with ThreadPoolExecutor(3) as pool:  # each with a descriptor of its own, as processes have
        found = list(pool.map(lambda _: embedded.cached(tmp_path / "made", slow), range(3)))
    assert (found, len(made)) == ([tmp_path / "made"] * 3, 1)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["made", "made/file"]
