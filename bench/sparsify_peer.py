"""Run by the other tools' Python, without this project: sparsify's SparseCoder as a transcoder on rows of a store.

python sparsify_peer.py ROWS OUT LATENTS K BATCH STEPS WARMUP SEED OPTIMIZER LR|default [FOLDER]

ROWS: safetensors with inputs, outputs [n, D] (train rows in the order of training), heldout_inputs, heldout_outputs
[m, D], all float32. OUT: JSON with the held-out FVU against the rows' own mean, L0, the share of latents that never
fire, rows/s. FOLDER: where the trained coder is saved, in sparsify's own format. The class, its defaults, the start of
its biases and the optimizers are sparsify's own; its Trainer is not used, as it runs the language model along.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Both are of the other environment.

import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from sparsify import SparseCoder, SparseCoderConfig


def optimizer_of(name: str, coder: SparseCoder, lr: float | None, warmup: int, steps: int):
    """(optimizer, schedule or None) as sparsify's trainer makes them."""
    if name == "adam":
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.Adam(coder.parameters(), lr=lr or 2e-4 / (coder.num_latents / 2**14) ** 0.5)
        return optimizer, get_linear_schedule_with_warmup(optimizer, warmup, steps)
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    lr = lr or 5e-3 / (coder.num_latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
    optimizer.train()
    return optimizer, None


def main() -> None:
    rows, out, *sizes, name, lr = sys.argv[1:11]
    latents, k, batch, steps, warmup, seed = map(int, sizes)
    torch.manual_seed(seed)
    with safe_open(rows, framework="pt") as file:
        inputs, outputs = file.get_tensor("inputs"), file.get_tensor("outputs")
        heldout = file.get_tensor("heldout_inputs"), file.get_tensor("heldout_outputs")
    config = SparseCoderConfig(num_latents=latents, k=k, transcode=True)
    coder = SparseCoder(inputs.shape[1], config)
    optimizer, schedule = optimizer_of(name, coder, None if lr == "default" else float(lr), warmup, steps)
    coder.b_dec.data.copy_(outputs[:batch].mean(0))
    coder.encoder.bias.data.copy_(-inputs[:batch].mean(0) @ coder.encoder.weight.data.T)
    begun = time.perf_counter()
    for step in range(steps):
        first = step * batch % (len(inputs) - batch + 1)
        x, y = inputs[first : first + batch], outputs[first : first + batch]
        coder(x, y).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    seconds = time.perf_counter() - begun
    if name == "signum":
        optimizer.eval()
    for folder in sys.argv[11:]:
        coder.save_to_disk(folder)
    Path(out).write_text(
        json.dumps({**measured(coder, *heldout), "rows_per_second": steps * batch / seconds}),
        encoding="utf-8",
    )


@torch.no_grad()
def measured(coder: SparseCoder, inputs: torch.Tensor, outputs: torch.Tensor) -> dict[str, float]:
    """Held-out numbers, errors in float64."""
    error, ever = 0.0, torch.zeros(coder.num_latents, dtype=torch.bool)
    active = 0
    for x, y in zip(inputs.split(1024), outputs.split(1024), strict=True):
        acts, latents, _ = coder.encode(x)
        error += float((coder.decode(acts, latents) - y).double().square().sum())
        positive = acts > 0
        ever[latents[positive]] = True
        active += int(positive.sum())
    variation = float((outputs.double() - outputs.double().mean(0)).square().sum())
    never = float((~ever).double().mean())
    return {"fvu": error / variation, "l0": active / len(inputs), "never_fire": never}


if __name__ == "__main__":
    main()
