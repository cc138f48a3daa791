"""Tiny real models and tokenizers, built in the process and saved as Hugging Face directories."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = "the a of red blue river stone sings falls under over old new house tree cat dog and or not".split()  # noqa: SIM905
FAMILIES = ("llama", "gemma2", "gemma3_text", "gpt2")
SPECIAL = ["<bos>", "<eos>", "<pad>"]


def sentences(documents: int, words: int = 40, seed: int = 0) -> list[str]:
    """Deterministic documents of random words."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (documents, words), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + f" {number}." for number, row in enumerate(picks)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens; ids 0, 1, 2 are BOS, EOS and padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences(50), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A randomly initialised model whose norms' gains and biases are random too, so that a wrong one shows."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(directory)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    if family.startswith("gemma"):
        values |= {"head_dim": 8, "sliding_window": 64}
    if family in ("gpt2", "opt"):
        del values["num_key_value_heads"]  # the bridge would believe it
    config = AutoConfig.for_model(family, **(values | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.5)
    model.save_pretrained(directory)
    return directory


class Parts(NamedTuple):
    """Modules of one block of a Hugging Face model."""

    norm: torch.nn.Module
    """Before the MLP."""
    mlp: torch.nn.Module
    added: torch.nn.Module
    """Whose output is added to the residual stream: the MLP, or the norm after it."""


def parts_of(model: Any, layer: int) -> Parts:
    if hasattr(model, "transformer"):
        block = model.transformer.h[layer]
        return Parts(block.ln_2, block.mlp, block.mlp)
    block = model.model.layers[layer]
    if hasattr(block, "post_feedforward_layernorm"):
        return Parts(block.pre_feedforward_layernorm, block.mlp, block.post_feedforward_layernorm)
    return Parts(block.post_attention_layernorm, block.mlp, block.mlp)


def by_hugging_face(
    directory: Path, layer: int, ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What forward hooks of plain Hugging Face see on `ids` [b, T]: residual, MLP input, MLP output as added;
    and from the residual and the norm's own parameters: normalised input, gain, and a LayerNorm's bias."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    norm, mlp, added = parts_of(model, layer)
    caught: dict[str, torch.Tensor] = {}
    norm.register_forward_pre_hook(lambda module, args: caught.__setitem__("residual", args[0]))
    mlp.register_forward_pre_hook(lambda module, args: caught.__setitem__("mlp_in", args[0]))
    added.register_forward_hook(lambda module, args, out: caught.__setitem__("added", out))
    with torch.inference_mode():
        model(ids)
    wide, weight = caught["residual"].float(), norm.weight.detach().float()
    if isinstance(norm, torch.nn.LayerNorm):
        caught["normalized"] = torch.nn.functional.layer_norm(wide, weight.shape, eps=norm.eps)
        return caught | {"gain": weight, "bias": norm.bias.detach().float()}
    epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
    caught["normalized"] = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return caught | {"gain": 1 + weight if "Gemma" in type(norm).__name__ else weight}


def save_wide_gemma(directory: Path, layers: int = 2, d_mlp: int = 9216) -> Path:
    """Gemma-2-2B's real widths (d 2304, d_mlp 9216, 8 heads of 256) with two layers and a small vocabulary."""
    return save_model(
        directory,
        "gemma2",
        dtype=torch.bfloat16,
        hidden_size=2304,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
