"""The direct effect on the next token: a closed form, and finite differences of a model in which all else is frozen."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import InputError
from common.settings import Model
from evaluate.prompt.next_token import NORM, directions, following
from harvest import lm

TOKENS = torch.tensor([[0, 40, 77, 130, 12, 9, 201, 55]])
AFTER = torch.tensor([40, 77, 130, 12, 9, 201, 55, -1])
LAYER = 1


def model_at(directory: Path) -> lm.LanguageModel:
    where = str(directory)
    return lm.load(Model(name=where, device="cpu"), where, lm.load_tokenizer(where, None))


def through(model: lm.LanguageModel, more: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], Tensor]:
    with torch.inference_mode(), model.capturing([*NORM.values(), *more]) as caught:
        logits = model.bridge(TOKENS, return_type="logits")[0]
    return dict(caught), logits


def uncapped(model: lm.LanguageModel, logits: Tensor) -> Tensor:
    cap = getattr(model.bridge.original_model.config, "final_logit_softcapping", None)
    return cap * torch.atanh(logits / cap) if cap else logits


def test_the_closed_form(llama: Path) -> None:
    """v . gain (W_U[next] - mean W_U) / s, s = sqrt(mean(residual^2) + eps), with Hugging Face's own parameters."""
    model = model_at(llama)
    caught, logits = through(model)
    then = following(logits, AFTER)
    assert then.tokens.tolist() == [*AFTER.tolist()[:-1], int(logits[-1].argmax())]
    torch.testing.assert_close(then.probabilities, logits.softmax(-1).gather(1, then.tokens[:, None])[:, 0])
    found = directions(model, caught, logits, then.tokens)
    hf = model.bridge.original_model
    norm, W_U = hf.model.norm.weight.detach(), hf.lm_head.weight.detach()
    residual = caught["ln_final.hook_in"][0]
    scale = (residual.square().mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(found, norm * (W_U[then.tokens] - W_U.mean(0)) / scale, rtol=1e-4, atol=1e-6)


def test_finite_differences_of_a_frozen_model(model_directory: Path) -> None:
    """Llama, Gemma-2 (soft cap), Gemma-3, GPT-2 (LayerNorm): attention, later MLPs and the final scale held fixed, a
    vector written where the MLP of layer 1 writes moves the next token's centred logit by its product with it.
    """
    model = model_at(model_directory)
    later = [
        f"blocks.{k}.hook_{part}_out" for k in range(LAYER + 1, model.n_layers) for part in ("attn", "mlp")
    ]
    caught, logits = through(model, tuple(later))
    then = following(logits, AFTER)
    found = directions(model, caught, logits, then.tokens)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    at = 4

    def fixed(name: str) -> Callable[..., Any]:
        return lambda tensor, hook: caught[name].clone()

    def moved(output: Tensor, hook: object) -> Tensor:
        output = output.clone()
        output[0, at] += vector
        return output

    hooks = [(name, fixed(name)) for name in (*later, NORM["scale"])]
    hooks.append((f"blocks.{LAYER}.hook_mlp_out", moved))
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a norm whose scale is set
        after = model.bridge(TOKENS, return_type="logits")[0]
    change = uncapped(model, after) - uncapped(model, logits)
    expected = change[at, then.tokens[at]] - change[at].mean()
    assert abs(expected) > 0.01
    torch.testing.assert_close(vector @ found[at], expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(change[at + 1], torch.zeros_like(change[at + 1]), rtol=0, atol=1e-4)


def test_logits_that_are_no_unembedding_have_no_direct_effect(llama: Path) -> None:
    """Granite divides them, Cohere multiplies them."""
    model = model_at(llama)
    caught, logits = through(model)
    with pytest.raises(InputError, match="its logits are not its unembedding times its final norm's output"):
        directions(model, caught, 0.25 * logits, following(logits, AFTER).tokens)
