"""A store of random words, and a transcoder whose latent f fires on the words of class f and nowhere else.

A word is its class, a letter and a digit: c7a, c7b. Half of the words have no latent. With several documents in a
context, or one, as `pack` says.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cli import load, parser
from common.settings import Settings
from shards import Store
from tests.fixtures import make_store
from transcoder import Transcoder
from transcoder.transcoder import Parameters

N, ENDS, D_OUT, LENGTH = 12, (3, 6, 12), 8, 64
SEPARATOR = 2
CLASSES = [f"c{latent}{letter}" for latent in range(N) for letter in "ab"]
OTHERS = [f"plain{number}" for number in range(150)]
WORDS = ["<s>", "</s>", "<end>", *CLASSES, *OTHERS]
DEAD = N - 1
"""The last latent has no words in the text."""


def arguments(root: Path, *more: str) -> list[str]:
    paths = [
        "--paths.activations",
        str(root / "activations"),
        "--paths.checkpoints",
        str(root / "checkpoints"),
    ]
    named = ["--layer", "0", "--run", "planted", "--model.name", "tests/tiny", "--model.device", "cpu"]
    return [*named, "--wandb.mode", "disabled", *paths, *more]


def settings_of(root: Path, *more: str) -> Settings:
    return load(parser("evaluate", ""), arguments(root, *more))[0]


def class_of(word: str) -> int | None:
    """The latent that fires on a word."""
    return int(word[1:-1]) if word in CLASSES else None


def tokens_of(rows: int) -> np.ndarray:
    """[rows] tokens of the kept positions, as `make_store` draws them."""
    rng = np.random.default_rng(rows)
    contexts = [rng.integers(2, len(WORDS), LENGTH)[1:] for _ in range(-(-rows // (LENGTH - 1)))]
    return np.concatenate(contexts)[:rows]


def rows_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = np.zeros((n, N), np.float32)
    tokens = tokens_of(n)
    for row, token in enumerate(tokens.tolist()):
        latent = class_of(WORDS[token])
        if latent is not None and latent != DEAD:
            inputs[row, latent] = rng.uniform(0.5, 4)
    return inputs, rng.standard_normal((n, D_OUT)).astype(np.float32)


def planted_transcoder(**metadata: Any) -> Transcoder:
    decoder = torch.randn(N, D_OUT, generator=torch.Generator().manual_seed(0))
    parameters = Parameters(
        W_enc=torch.eye(N),
        b_enc=torch.zeros(N),
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=torch.zeros(D_OUT),
    )
    return Transcoder(parameters, torch.full((len(ENDS),), 0.25), ENDS, metadata)


def make_planted(root: Path, heldout: int = 8000, **source: Any) -> Store:
    """Store and run directory."""
    settings = settings_of(root)
    made = {
        "context_length": LENGTH,
        "separator_token_id": SEPARATOR,
        "dropped_token_ids": [0, 1, SEPARATOR],
    } | source
    store = make_store(settings.store_path(0), rows_of(2000), rows_of(heldout), vocabulary=WORDS, **made)
    run_dir = settings.run_dir()
    run_dir.mkdir(parents=True)
    record = {
        "harvest_fingerprint": store.manifest.fingerprint,
        "source": store.manifest.source.model_dump(mode="json"),
    }
    saved = settings.model_dump(mode="json")
    saved["transcoder"] |= {"k": 4, "group_sizes": np.diff((0, *ENDS)).tolist(), "d_sae": N}
    replace(planted_transcoder(), metadata=record | {"settings": saved}).save(run_dir)
    return store
