"""Captured tensors against Hugging Face's own forward hooks, for every family of tests/models.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.device import pick_device
from common.errors import InputError
from common.hooks import hooks_of
from common.identity import directory_sha256
from common.settings import Model
from harvest import lm
from tests.models import by_hugging_face, save_model


def load(directory: Path, dtype: str = "float32") -> lm.LanguageModel:
    model = Model(name=str(directory), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    return lm.load(model, lm.locate(model), lm.load_tokenizer(str(directory), None))


def tokens(batch: int = 3, length: int = 16) -> torch.Tensor:
    ids = torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_captured_tensors_equal_hugging_face(layer: int, model_directory: Path) -> None:
    model, ids = load(model_directory), tokens()
    expected = by_hugging_face(model_directory, layer, ids)
    names = [*hooks_of(layer, "normalized"), hooks_of(layer, "mlp_in")[0]]
    with model.capturing(names) as caught:
        model.run_blocks(ids, layer)
    # A LayerNorm is computed by TransformerLens in its own order of operations.
    near = {"rtol": 0, "atol": 2e-6 if "bias" in expected else 0}
    assert torch.allclose(caught[names[0]], expected["normalized"], rtol=0, atol=2e-6)
    assert torch.allclose(caught[names[1]], expected["added"], **near)
    assert torch.allclose(caught[names[2]], expected["mlp_in"], **near)
    gain = model.gain(layer)
    assert torch.equal(gain.values, expected["gain"])
    assert (gain.bias is None) == ("bias" not in expected)
    if gain.bias is not None:
        assert torch.equal(gain.bias, expected["bias"])
    shift = 0 if gain.bias is None else gain.bias
    assert torch.allclose(caught[names[0]] * gain.values + shift, expected["mlp_in"], rtol=0, atol=5e-6)


def test_logits_equal_hugging_faces(model_directory: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_directory, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits, expected = (
            load(model_directory).bridge(tokens(), return_type="logits"),
            reference(tokens()).logits,
        )
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)


def test_gemma_2_at_its_real_widths(wide_gemma: Path) -> None:
    model, ids = load(wide_gemma, "bfloat16"), tokens()
    expected = by_hugging_face(wide_gemma, 1, ids, torch.bfloat16)
    names = [*hooks_of(1, "normalized"), hooks_of(1, "mlp_in")[0]]
    with model.capturing(names) as caught:
        model.run_blocks(ids, 1)
    assert caught[names[0]].shape == (3, 16, 2304)
    assert torch.equal(caught[names[0]].bfloat16(), expected["normalized"].bfloat16())
    assert torch.equal(caught[names[1]], expected["added"])
    assert torch.equal(caught[names[2]], expected["mlp_in"])
    assert torch.equal(model.gain(1).values, expected["gain"])
    raw = model.bridge.blocks[1].ln2.w.detach().float()  # the trap: Gemma's gain is 1 + w, not w
    wrong = caught[names[0]].clone().float() * raw
    assert (wrong - caught[names[2]].float()).abs().max() > 1


def test_stops_early(llama: Path) -> None:
    model = load(llama)
    ran: list[int] = []
    for number, block in enumerate(model.bridge.original_model.model.layers):
        block.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    model.run_blocks(tokens(), 1)
    assert ran == [0, 1]


def test_the_last_layer_computes_one_position_of_logits(llama: Path) -> None:
    model = load(llama)
    shapes: list[torch.Size] = []
    model.bridge.original_model.lm_head.register_forward_hook(
        lambda module, args, out: shapes.append(out.shape)
    )
    model.run_blocks(tokens(), 2)
    assert [shape[1] for shape in shapes] == [1]


def test_a_norm_that_is_no_rmsnorm_is_refused(llama: Path) -> None:
    model = load(llama)
    model.bridge.original_model.model.layers[1].post_attention_layernorm.register_forward_hook(
        lambda module, args, out: out + 0.1
    )
    with pytest.raises(InputError, match="is not its normalised input times a gain"):
        model.gain(1)


def test_unknown_hook_points_are_listed(llama: Path) -> None:
    with (
        pytest.raises(InputError, match=r"no hook point blocks\.1\.nothing; .* this one has .* mlp\.hook_in"),
        load(llama).capturing(["blocks.1.nothing"]),
    ):
        pass


def test_the_digest_changes_with_any_weight(llama: Path) -> None:
    model = load(llama)
    before = model.weights_sha256()
    assert before == load(llama).weights_sha256()
    with torch.no_grad():
        model.bridge.original_model.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    assert model.weights_sha256() != before


def test_the_digest_takes_weights_without_dimensions(tmp_path: Path) -> None:
    """Apertus' activation has two; they cannot be viewed as bytes."""
    model = load(save_model(tmp_path / "apertus", "apertus", num_hidden_layers=1))
    beta = model.bridge.original_model.get_buffer("model.layers.0.mlp.act_fn.beta")
    before = model.weights_sha256()
    assert beta.ndim == 0
    beta += 1
    assert model.weights_sha256() != before


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("/nowhere/model", "model.name: no such directory /nowhere/model"),
        (
            "~/model",
            "model.name: no such directory ~/model; ~ and $ are not expanded here: give the whole path",
        ),
        (
            "https://huggingface.co/gpt2",
            "model.name: https://huggingface.co/gpt2 is an address; expected owner/name",
        ),
        ("embedded/other", "model.name: expected one of embedded/smollm2-135m, found 'embedded/other'"),
        ("nobody/nothing", "model nobody/nothing: the Hugging Face hub could not be reached"),
    ],
)
def test_models_that_are_not_there(name: str, line: str) -> None:
    with pytest.raises(InputError) as stopped:
        lm.locate(Model(name=name))
    assert str(stopped.value).startswith(line)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; expected a Hugging Face model directory"):
        lm.locate(Model(name=str(tmp_path)))


def copy_with(model: Path, directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    copied = shutil.copytree(model, directory)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    return copied


def test_a_checkpoint_without_some_weights(llama: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    weights = load_file(llama / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    with pytest.raises(
        InputError,
        match=r"cannot be loaded: no weights for model.layers.1.mlp.down_proj.weight "
        r"\(and 2 more\)",
    ):
        load(copy_with(llama, tmp_path / "lacking", kept))


def test_weights_that_the_configuration_has_no_place_for_are_named(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bias, as of a config.json without attention_bias."""
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.bias"] = torch.ones(32)
    weights["model.layers.1.mlp.down_proj.bias"] = torch.ones(32)
    load(copy_with(llama, tmp_path / "more", weights))
    said = capsys.readouterr().err
    lacking = "config.json has no place for the weights of model.layers.0.mlp.down_proj.bias (and 1 more)"
    assert said.count(f"{lacking}; they are not used") == 1
    load(llama)
    assert "no place" not in capsys.readouterr().err


def fp8(weights: dict[str, torch.Tensor], scale: str = "weight_scale_inv") -> dict[str, torch.Tensor]:
    """Every projection as 8-bit floats and one scale."""
    stored = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        step = weights[name].abs().max() / 448
        stored[name] = (weights[name] / step).to(torch.float8_e4m3fn)
        stored[name.replace("weight", scale)] = step.reshape(1, 1)
    return stored


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scales"])
def test_codes_are_not_taken_for_weights(scale: str, llama: Path, tmp_path: Path) -> None:
    """Without a quantization_config, or with one that transformers does not know, it would drop the scales."""
    copy = copy_with(llama, tmp_path / "fp8", fp8(load_file(llama / "model.safetensors"), scale))
    line = r"its weights are stored as codes \(model\.layers\.0\.mlp\.down_proj\.\w+\), .* before it was quantised"
    with pytest.raises(InputError, match=line):
        load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "nobody's"}})
    )
    with pytest.raises(InputError, match=line):
        load(copy)


def test_integers_are_not_taken_for_weights(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.ones(32, 64, dtype=torch.int8)
    with pytest.raises(InputError, match=r"stored as codes \(model\.layers\.1\.mlp\.down_proj\.weight\)"):
        load(copy_with(llama, tmp_path / "int8", weights))


def test_a_quantisation_that_transformers_undoes_is_read(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    copy = copy_with(llama, tmp_path / "fp8", fp8(weights))
    config = json.loads((copy / "config.json").read_text())
    fine = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": fine}))
    held = load(copy).bridge.original_model.model.layers[1].mlp.down_proj.weight
    expected = weights["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(held.detach(), expected, rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq", "compressed-tensors"])
def test_no_package_is_advised_for_a_quantised_model(method: str, llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "quantised")
    said = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(InputError, match=r"give the model as it was before it was quantised$") as caught:
        load(copy)
    assert "pip" not in str(caught.value)


@pytest.mark.parametrize("own", ["flash_attention_2", "sdpa", "kernels-community/flash-attn"])
def test_the_attention_of_the_configuration_has_no_say(own: str, gemma: Path, tmp_path: Path) -> None:
    """Gemma-2 needs the eager one; a kernel would be downloaded and run."""
    copy = shutil.copytree(gemma, tmp_path / "own")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_attn_implementation": own}))
    ids, hook = tokens(), "blocks.1.hook_mlp_out"
    outputs = []
    for model in (load(gemma), load(copy)):
        assert model.bridge.original_model.config._attn_implementation == "eager"
        with model.capturing([hook]) as caught:
            model.run_blocks(ids, 1)
        outputs.append(caught[hook])
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "nobody's"}, {"rope_scaling": {"rope_type": "nobody's"}}], ids=str
)
def test_a_name_that_transformers_does_not_know_is_said(
    change: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(llama, tmp_path / "other")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    line = 'cannot be loaded: its files name "nobody\'s", which transformers does not know'
    with pytest.raises(InputError, match=line):
        load(copy)


def test_an_adapter_is_not_left_out_silently(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "adapter")
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        InputError, match=r"has an adapter \(adapter_config\.json\), which is not applied; .*merged"
    ):
        lm.locate(Model(name=str(copy)))


def test_a_checkpoint_of_other_shapes(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"down_proj.weight: expected shape \(32, 64\), found \(3, 3\)"):
        load(copy_with(llama, tmp_path / "wrong", weights))


def test_a_checkpoint_cut_short(llama: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama, tmp_path / "short")
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded: "):
        load(copied)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_is_not_made_up(name: str, llama: Path, tmp_path: Path) -> None:
    """Of these classes transformers makes one with an empty vocabulary where the files are missing."""
    copy = shutil.copytree(llama, tmp_path / "settings_only")
    (copy / "tokenizer.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    with pytest.raises(InputError, match=r"has no tokenizer, only its settings; copy tokenizer\.json beside"):
        lm.load_tokenizer(str(copy), None)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_what_git_leaves_of_a_large_file_is_named(name: str, llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "cloned")
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    line = rf"{name}: is a pointer of Git LFS, not the file; fetch it \(git lfs pull\)$"
    with pytest.raises(InputError, match=line):
        lm.load_tokenizer(str(copy), None) if name == "tokenizer.json" else directory_sha256(copy)


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama, tmp_path / "pickled")
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"has no \.safetensors file; pickled weights \(\.bin, \.pt\) are not read"
    ):
        load(copied)


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="cuda requested, but PyTorch finds no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N, found 'gpu'"):
        pick_device("gpu")
