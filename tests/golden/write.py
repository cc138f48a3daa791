"""Golden files: python -m tests.golden.write adds those that are missing, for a new storage, say.

A golden file is written once and kept; a failing test is no reason to write it again. This module says which values the
files hold. Every number is exact in float32 and comes from integers, so neither a random generator nor rounding decides
a byte.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import Store
from shards.storage import STORAGES
from tests.fixtures import Rows, make_store
from transcoder.transcoder import Parameters, Transcoder
from transcoder.weights import FILE_NAME

GOLDEN = Path(__file__).parent
EXPECTED = GOLDEN / "expected.json"
COMPRESSORS = {"int8": "zstd-3", "bfloat16": "blosc-zstd-3-bitshuffle", "float32": "blosc-zstd-3-shuffle"}
"""One for each storage; together they are all that harvest.compressor = "auto" chooses."""
HELDOUT_ROWS = {"int8": 2, "bfloat16": 0, "float32": 0}
SHOWN = [0, 1023, 1029]
"""Stored rows whose values are in expected.json as numbers: both ends of the first chunk, the end of the second."""
PREFIX_ENDS = (2, 5)
INPUTS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.25]])


def rows(n: int, d_in: int = 3, d_out: int = 2) -> Rows:
    """(inputs, outputs): 11 values, four scales of rows, a scale for each column."""

    def values(width: int, step: int) -> np.ndarray:
        i, j = np.arange(n)[:, None], np.arange(width)[None, :]
        return (((i * step + 3 * j) % 11 - 5) * 0.5 ** (i % 4) * (1 + j / 8)).astype(np.float32)

    return values(d_in, 7), values(d_out, 4)


def write_store(path: Path, storage: str) -> Store:
    """A store of 1,030 train rows (two chunks, the second nearly empty) and a few held-out ones."""
    train, heldout = rows(1030), rows(HELDOUT_ROWS[storage])
    return make_store(
        path, train, heldout, storage, COMPRESSORS[storage], vocabulary=["<s>", "</s>", "a", "b"]
    )


def decoded(store: Store) -> dict[str, Any]:
    """What a store's files decode to: digests of all values, and some of the numbers."""
    splits = {}
    for name, split in (("train", store.train), ("heldout", store.heldout)):
        inputs, outputs = (side.numpy() for side in split.rows(0, len(split)))
        context, position = split.provenance(0, len(split))
        shown = [row for row in SHOWN if row < len(split)]
        columns = {"inputs": inputs, "outputs": outputs, "context": context, "position": position}
        splits[name] = {
            "sha256": {key: _digest(values) for key, values in columns.items()},
            "contexts_sha256": _digest(split.contexts[:]),
            "shown": {
                str(row): {key: values[row].tolist() for key, values in columns.items()} for row in shown
            },
        }
    return splits


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def golden_transcoder() -> Transcoder:
    """Three inputs, two outputs, five latents in two prefixes, a skip connection."""

    def numbers(*shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        return (((torch.arange(count) * 5) % 9 - 4) / 4).reshape(shape)

    parameters = Parameters(
        W_enc=numbers(5, 3),
        b_enc=numbers(5) / 8,
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.6, 0.8]]),
        b_dec=numbers(2),
        W_skip=numbers(2, 3) / 16,
    )
    metadata = {
        "settings": {"transcoder": {"k": 2}},
        "source": {"model": "tests/tiny", "layer": 0, "input": "normalized"},
    }
    return Transcoder(parameters, torch.tensor([0.25, 0.5]), PREFIX_ENDS, metadata)


def contents(transcoder: Transcoder) -> dict[str, Any]:
    """What transcoder.safetensors decodes to, and what it makes of INPUTS."""
    tensors, metadata = transcoder.saved()
    return {
        "tensors": {name: tensor.tolist() for name, tensor in sorted(tensors.items())},
        "metadata": metadata | {"prefix_ends": list(metadata["prefix_ends"])},
        "activations": transcoder.encode(INPUTS).tolist(),
        "outputs": transcoder(INPUTS).tolist(),
        "outputs_of_prefix_0": transcoder.prefix(0)(INPUTS).tolist(),
    }


def main() -> None:
    """Write the golden files that are missing, and their values into expected.json; the others stay as they are."""
    expected: dict[str, Any] = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {"stores": {}}
    for storage in STORAGES:
        path = GOLDEN / f"{storage}.zarr"
        if not path.is_dir():
            expected["stores"][storage] = decoded(write_store(path, storage))
            shutil.rmtree(path / ".harvest", ignore_errors=True)
    if not (GOLDEN / FILE_NAME).is_file():
        golden_transcoder().save(GOLDEN)
        expected["transcoder"] = contents(Transcoder.load(GOLDEN))
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
