"""Tiny real models and tokenizers, built in the process and saved as Hugging Face directories."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = "the a of red blue river stone sings falls under over old new house tree cat dog and or not".split()  # noqa: SIM905
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
    """A randomly initialised model whose norm gains are random too, so that a wrong gain shows."""
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
    config = AutoConfig.for_model(family, **(values | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.5)
    model.save_pretrained(directory)
    return directory


def save_wide_gemma(directory: Path) -> Path:
    """Gemma-2-2B's real widths (d 2304, d_mlp 9216, 8 heads of 256) with two layers and a small vocabulary."""
    return save_model(
        directory,
        "gemma2",
        dtype=torch.bfloat16,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
