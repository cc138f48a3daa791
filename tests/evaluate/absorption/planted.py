"""A store whose words, inputs and outputs are planted, and transcoders that absorb and split on it."""

from pathlib import Path

import numpy as np
import torch

from tests.evaluate.runs import settings_of
from tests.fixtures import make_store
from transcoder import Transcoder
from transcoder.transcoder import Parameters

LETTERS = "abc"
WORDS = [f"{letter}x{chr(97 + n // 26)}{chr(97 + n % 26)}q" for letter in LETTERS for n in range(40)]
"""Of each letter 40 words; none has an ending."""
VOCABULARY = ["<s>", "</s>", *WORDS]
ABSORBED = [*range(0, 40, 3)]
"""Words of a on which its latent is silent, each with a latent of its own."""
D = 4 + len(ABSORBED) + 3
"""Dimensions 0 to 2: the letters; 3: some words of b; then each absorbed word; 3 of noise."""
ROWS = {"train": 4000, "heldout": 3000}


def tokens_of(n: int) -> np.ndarray:
    """Ids that `make_store` draws for the n rows of a split."""
    draw = np.random.default_rng(n)
    contexts = [draw.integers(2, len(VOCABULARY), 16)[1:] for _ in range(-(-n // 15))]
    return np.concatenate(contexts)[:n]


def split_off(tokens: np.ndarray) -> np.ndarray:
    """Whether a row's word is of b, and of the three fifths that have a latent of their own."""
    return (tokens - 2 >= 40) & (tokens - 2 < 80) & ((tokens - 2) % 5 < 3)


def planted(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and outputs that are the letter's direction, as large for all of its words."""
    tokens, draw = tokens_of(n), np.random.default_rng(n + 1)
    inputs = np.zeros((n, D), np.float32)
    inputs[np.arange(n), (tokens - 2) // 40] = 1
    outputs = 2 * inputs
    inputs[:, 3] = split_off(tokens)
    for dimension, word in enumerate(ABSORBED, 4):
        inputs[:, dimension] = tokens - 2 == word
    inputs[:, -3:] = 0.1 * draw.standard_normal((n, 3))
    return inputs, outputs + 0.01 * draw.standard_normal((n, D)).astype(np.float32)


def coder(absorbing: bool, split: bool) -> Transcoder:
    """Latents 0, 1, 2 read and write the letters; 3 writes b on some of its words, each further one a on one word.

    Where it is split or absorbed, the letter's own latent is silent there. The last one never fires.
    """
    W_enc, W_dec = torch.zeros(5 + len(ABSORBED), D), torch.zeros(5 + len(ABSORBED), D)
    W_enc[[0, 1, 2], [0, 1, 2]] = W_dec[[0, 1, 2], [0, 1, 2]] = 1
    W_dec[3, 1] = W_dec[4:, 0] = 1
    if split:
        W_enc[1, 3], W_enc[3, 3] = -2, 1
    if absorbing:
        own = torch.arange(4, 4 + len(ABSORBED))
        W_enc[0, own], W_enc[own, own] = -2, 1
    source = {"input": "normalized", "layer": 0}
    parameters = Parameters(2 * W_enc, torch.zeros(len(W_enc)), W_dec, torch.zeros(D))
    return Transcoder(parameters, torch.tensor([0.5, 0.5]), (3, len(W_enc)), {"source": source})


def stand_in(writes: float | None) -> Transcoder:
    """Latents of the letters, of which a's is silent on its absorbed words, and one latent that fires on all of these
    and writes so much of a; None: there is no such latent."""
    n = 3 if writes is None else 4
    W_enc, W_dec = torch.zeros(n, D), torch.zeros(n, D)
    W_enc[[0, 1, 2], [0, 1, 2]], W_dec[[0, 1, 2], [0, 1, 2]] = 2, 1
    W_enc[0, 4:-3] = -4
    if writes is not None:
        W_enc[3, 4:-3], W_dec[3, 0] = 2, writes
    return _coder(W_enc, W_dec)


def duplicated(each: float) -> Transcoder:
    """Latents of the letters, and c's a second time; either of the two writes `each` of c."""
    W_enc, W_dec = torch.zeros(4, D), torch.zeros(4, D)
    W_enc[[0, 1, 2, 3], [0, 1, 2, 2]], W_dec[[0, 1, 2, 3], [0, 1, 2, 2]] = 2, 1
    W_dec[2:, 2] = each
    return _coder(W_enc, W_dec)


def _coder(W_enc: torch.Tensor, W_dec: torch.Tensor) -> Transcoder:
    parameters = Parameters(W_enc, torch.zeros(len(W_enc)), W_dec, torch.zeros(D))
    source = {"input": "normalized", "layer": 0}
    return Transcoder(parameters, torch.tensor([0.5]), (len(W_enc),), {"source": source})


def plant(root: Path, **source: object) -> None:
    """A store, the run `tiny` which absorbs and splits, and `plain` and `split`, which do neither and only split."""
    settings = settings_of(root)
    train, heldout = (planted(n) for n in ROWS.values())
    make_store(settings.store_path(0), train, heldout, vocabulary=VOCABULARY, **source)
    ways = {"tiny": (True, True), "plain": (False, False), "split": (False, True)}
    for name, (absorbing, split) in ways.items():
        folder = settings.run_dir().with_name(name)
        folder.mkdir(parents=True)
        coder(absorbing, split).save(folder)
