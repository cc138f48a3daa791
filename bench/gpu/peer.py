"""Run by the other tools' Python, without this project: milliseconds of a training step of SAELens or sparsify.

python peer.py TOOL DEVICE PRECISION BATCH WIDTH LATENTS K ENDS REPEATS; ENDS: prefixes' ends, with commas. Prints JSON.
Steps on one batch of random rows, with torch.optim.Adam, medians. sparsify: its SparseCoder as a transcoder, not
nested. SAELens 6.54 has no class that trains a transcoder: its MatryoshkaBatchTopKTrainingSAE of the same shape, an
autoencoder, has the same products.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Both are of the other environment.

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

LR = 1e-4


def sparsify(x: torch.Tensor, y: torch.Tensor, latents: int, k: int, ends: list[int]) -> Callable[[], None]:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(
        x.shape[1], SparseCoderConfig(num_latents=latents, k=k, transcode=True), device=x.device
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)

    def once() -> None:
        coder(x, y).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def saelens(x: torch.Tensor, y: torch.Tensor, latents: int, k: int, ends: list[int]) -> Callable[[], None]:
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput

    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=latents, k=k, matryoshka_widths=ends, device=str(x.device)
    )
    coder = MatryoshkaBatchTopKTrainingSAE(config)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)
    dead = torch.zeros(latents, dtype=torch.bool, device=x.device)
    given = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )

    def once() -> None:
        coder.training_forward_pass(given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def main() -> None:
    tool, where, precision, *numbers, ends, repeats = sys.argv[1:]
    batch, width, latents, k = map(int, numbers)
    device = torch.device(where)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tfloat32"
    x, y = torch.randn(2, batch, width, device=device)
    make = {"sparsify": sparsify, "saelens": saelens}[tool]
    once, taken = make(x, y, latents, k, [int(end) for end in ends.split(",")]), []
    for _ in range(int(repeats) + 2):  # two to warm up
        begun = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1000 * (time.perf_counter() - begun))
    print(json.dumps({"step, ms": round(statistics.median(taken[2:]), 3)}))


if __name__ == "__main__":
    main()
