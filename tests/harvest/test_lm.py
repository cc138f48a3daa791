"""Captured tensors against Hugging Face's own forward hooks, for both norm conventions."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harvest import lm
from pipeline import InputError, Model
from shards.device import pick_device


def load(directory: Path, dtype: str = "float32") -> lm.LanguageModel:
    model = Model(name=str(directory), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    return lm.load(model, lm.locate(model), lm.load_tokenizer(str(directory), None))


def tokens(batch: int = 3, length: int = 16) -> torch.Tensor:
    made = torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(0))
    made[:, 0] = 0
    return made


def by_hugging_face(
    directory: Path, layer: int, ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """MLP input, MLP output, and what is added to the residual, from Hugging Face forward hooks."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    block = model.model.layers[layer]
    caught: dict[str, torch.Tensor] = {}
    sandwich = hasattr(block, "post_feedforward_layernorm")
    added = block.post_feedforward_layernorm if sandwich else block.mlp
    block.mlp.register_forward_pre_hook(lambda module, args: caught.__setitem__("mlp_in", args[0]))
    added.register_forward_hook(lambda module, args, out: caught.__setitem__("added", out))
    norm = block.pre_feedforward_layernorm if sandwich else block.post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: caught.__setitem__("residual", args[0]))
    with torch.inference_mode():
        model(ids)
    epsilon = norm.eps if sandwich else norm.variance_epsilon
    wide = caught["residual"].float()
    caught["normalized"] = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    caught["gain"] = (1 + norm.weight.float() if sandwich else norm.weight.float()).detach()
    return caught


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_captured_tensors_equal_hugging_face(family: str, layer: int, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(family)
    model, ids = load(directory), tokens()
    expected = by_hugging_face(directory, layer, ids, torch.float32)
    names = [*lm.hooks_of(layer, "normalized"), lm.hooks_of(layer, "mlp_in")[0]]
    with model.capturing(names) as caught:
        model.run_blocks(ids, layer)
    assert torch.allclose(caught[names[0]], expected["normalized"], rtol=0, atol=1e-6)
    assert torch.equal(caught[names[1]], expected["added"])
    assert torch.equal(caught[names[2]], expected["mlp_in"])
    gain = model.gain(layer, ids)
    assert torch.equal(gain.values, expected["gain"])


def test_gemma_2_at_its_real_widths(wide_gemma: Path) -> None:
    model, ids = load(wide_gemma, "bfloat16"), tokens()
    expected = by_hugging_face(wide_gemma, 1, ids, torch.bfloat16)
    names = [*lm.hooks_of(1, "normalized"), lm.hooks_of(1, "mlp_in")[0]]
    with model.capturing(names) as caught:
        model.run_blocks(ids, 1)
    assert caught[names[0]].shape == (3, 16, 2304)
    assert torch.equal(caught[names[0]].bfloat16(), expected["normalized"].bfloat16())
    assert torch.equal(caught[names[1]], expected["added"])
    assert torch.equal(caught[names[2]], expected["mlp_in"])
    assert torch.equal(model.gain(1, ids).values, expected["gain"])
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
        model.gain(1, tokens())


def test_unknown_hook_points_are_listed(llama: Path) -> None:
    with (
        pytest.raises(
            InputError, match=r"no hook point blocks\.1\.nothing; this model has .*blocks\.1\.mlp\.hook_in"
        ),
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


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("/nowhere/model", "model.name: no such directory /nowhere/model"),
        ("embedded/other", "model.name: expected one of embedded/smollm2-135m, found 'embedded/other'"),
        ("nobody/nothing", "model nobody/nothing: the Hugging Face hub was not reached"),
    ],
)
def test_models_that_are_not_there(name: str, line: str) -> None:
    with pytest.raises(InputError) as stopped:
        lm.locate(Model(name=name))
    assert str(stopped.value).startswith(line)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; expected a Hugging Face model directory"):
        lm.locate(Model(name=str(tmp_path)))


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="cuda asked for, but PyTorch finds no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="expected auto, cpu or cuda, found 'gpu'"):
        pick_device("gpu")
