"""python -m bench.expected: times derived for GPUs that were not measured, and disk. Arithmetic only.

Floating-point operations and bytes are counted from the code, the GPUs' rates are those of NVIDIA's data sheets,
taken at SHARE of their peak. docs/colab.md holds the table; a test compares the two.
"""

from typing import NamedTuple

from common.cli import load, parser
from common.settings import Settings
from shards.plan import bytes_per_row, human, manifest_bytes

SHARE = 0.4
"""Of a GPU's peak: what plain PyTorch usually reaches in large products and streaming kernels."""
STORING = 32_768 * 2 * 576 / 0.5
"""Numbers a second that two CPU cores quantise, compress and write (docs/log.md: 0.5 s a window of the demo)."""
D, D_MLP, D_QUERIES, D_KEYS = 2304, 9216, 2048, 1024
"""Gemma-2-2B: width, MLP, all query heads, all key heads."""


class Gpu(NamedTuple):
    name: str
    dtype: str
    """Of the model; the first of each GPU is what model.dtype auto picks."""
    products: float
    """Peak of matrix products in that type, 1/s."""
    float32: float
    """Peak in float32, which training runs in, 1/s."""
    bandwidth: float
    """Bytes/s."""


GPUS = (
    Gpu("T4", "float16", 65e12, 8.1e12, 320e9),
    Gpu("T4", "float32", 8.1e12, 8.1e12, 320e9),
    Gpu("L4", "bfloat16", 121e12, 30.3e12, 300e9),
    Gpu("V100", "float16", 125e12, 15.7e12, 900e9),
    Gpu("A100 40 GB", "bfloat16", 312e12, 19.5e12, 1555e9),
)


def harvest_seconds(settings: Settings, gpu: Gpu) -> float:
    """The slower of the model's blocks up to the layer, and of storing in the background."""
    rows = settings.harvest.expected_rows
    weights = D * (2 * D_QUERIES + 2 * D_KEYS) + 3 * D * D_MLP
    attention = 2 * settings.harvest.context_length * D_QUERIES
    operations = 2 * (settings.layer + 1) * (weights + attention)
    return max(rows * operations / (SHARE * gpu.products), rows * 2 * D / STORING)


def training_seconds(settings: Settings, gpu: Gpu) -> float:
    """One after the other: the encoder product, and what streams through memory.

    Bytes a step: each parameter 44 (Adam reads and writes weight and two moments, the gradient is written and
    read, decoder rows are projected and renormalised), [B, F] pre-activations 4 times, and the four gathers of
    K*B rows of width D.
    """
    d_sae, _ = settings.transcoder.resolve(D)
    batch, k = settings.train.batch_size, settings.transcoder.k
    operations = 2 * batch * D * d_sae
    moved = 44 * 2 * D * d_sae + 4 * 4 * batch * d_sae + 4 * 4 * k * batch * D
    step = operations / (SHARE * gpu.float32) + moved / (SHARE * gpu.bandwidth)
    return settings.train.rows / batch * step


def disk(settings: Settings) -> int:
    """Bytes of the store."""
    harvest = settings.harvest
    return int(manifest_bytes(2 * D) + harvest.expected_rows * bytes_per_row(2 * D, harvest.storage))


def recipes() -> list[Settings]:
    return [load(parser("bench.expected", ""), ["--layer", layer])[0] for layer in ("17", "12", "8")]


def table() -> str:
    """The Markdown table of docs/colab.md: harvest + training of the three recipes."""
    columns = recipes()
    heads = [f"layer {s.layer}: {s.harvest.rows / 1e6:.0f} M rows, {human(disk(s))}" for s in columns]
    lines = [["GPU", *heads], ["---"] * (len(columns) + 1)]
    for gpu in GPUS:
        times = [f"{_text(harvest_seconds(s, gpu))} + {_text(training_seconds(s, gpu))}" for s in columns]
        lines.append([f"{gpu.name}, {gpu.dtype}", *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(seconds / 60, 1):.0f} min"


if __name__ == "__main__":
    print(table())
