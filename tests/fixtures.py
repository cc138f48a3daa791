"""Small stores made in the process."""

import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from common.files import write_whole
from shards import Store
from shards.codecs import Compressor
from shards.encode import Column
from shards.layout import windows
from shards.manifest import SPLITS, Source
from shards.text.contexts import ContextWriter
from shards.writer import StoreWriter, Text, WindowRows, stored_order

Rows = tuple[np.ndarray, np.ndarray]


def make_source(d_in: int, d_out: int, rows: int, **changes: object) -> Source:
    values = {
        "model": "tests/tiny",
        "revision": None,
        "weights_sha256": "0" * 64,
        "dtype": "float32",
        "layer": 0,
        "n_layers": 1,
        "input": "normalized",
        "input_hook": "blocks.0.ln2.hook_normalized",
        "output_hook": "blocks.0.hook_mlp_out",
        "d_in": d_in,
        "d_out": d_out,
        "gain": [1.0] * d_in,
        "dataset": "tests/tiny",
        "dataset_name": None,
        "dataset_revision": None,
        "dataset_split": None,
        "text_column": "text",
        "files": {},
        "pack": "concat",
        "context_length": 16,
        "bos_token_id": 0,
        "separator_token_id": 1,
        "dropped_token_ids": [0, 1],
        "heldout_fraction": 0.1,
        "rows": rows,
        "seed": 0,
        "storage": "float32",
        "input_compressor": "zstd-3",
        "output_compressor": "zstd-3",
        "shard_rows": 32768,
        "chunk_rows": 1024,
        "offsets": True,
        "versions": {},
    }
    return Source.model_validate(values | changes)


def make_store(
    path: str | Path,
    train: Rows,
    heldout: Rows,
    storage: str = "float32",
    compressor: str = "zstd-3",
    vocabulary: list[str] | None = None,
    max_quantisation_fvu: float = 1.0,
    max_dimension_fvu: float = math.inf,
    **source: object,
) -> Store:
    """A complete store that holds these rows: kept position i is row i; contexts are made of random tokens."""
    Compressor(compressor)
    origin = make_source(
        train[0].shape[1],
        train[1].shape[1],
        len(train[0]),
        storage=storage,
        input_compressor=compressor,
        output_compressor=compressor,
        **source,
    )
    writer = StoreWriter(Path(path))
    with writer.lock():
        begin(writer, origin, train, heldout, vocabulary)
        for name, rows in zip(SPLITS, (train, heldout), strict=True):
            for number in range(len(windows(len(rows[0])))):
                filled = filled_window(origin, name, number, rows)
                writer.write_window(name, number, filled, max_quantisation_fvu, max_dimension_fvu)
        writer.finish()
    return Store.open(path)


def begin(
    writer: StoreWriter, origin: Source, train: Rows, heldout: Rows, vocabulary: list[str] | None = None
) -> None:
    """Write the text of a store of these rows, random tokens, and begin the store."""
    words = vocabulary or ["<s>", "</s>", *(f"word{i}" for i in range(98))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    digest = write_whole(writer.root / "tokenizer.json", tokenizer.to_str().encode())
    splits = dict(zip(SPLITS, (train, heldout), strict=True))
    counts, digests = {}, {}
    for name, (inputs, _) in splits.items():
        contexts = ContextWriter(writer.root, name, origin.context_length)
        rng = np.random.default_rng(len(inputs))
        for _ in range(-(-len(inputs) // (origin.context_length - 1))):
            tokens = rng.integers(2, len(words), origin.context_length)
            tokens[0] = 0
            contexts.append(tokens)
        counts[name], digests[name] = contexts.contexts, contexts.finish()
    writer.finish_text({}, Text({s: len(r[0]) for s, r in splits.items()}, counts, digests, digest))
    writer.begin(origin)


def filled_window(origin: Source, split: str, number: int, values: Rows) -> WindowRows:
    """The rows of a window of a split with these rows."""
    window, per_context = windows(len(values[0]))[number], origin.context_length - 1
    rows = WindowRows.empty(len(window), origin)
    order = stored_order(origin, split, number, len(window))
    kept = np.arange(window.start, window.stop)
    for column, side in ((rows.inputs, values[0]), (rows.outputs, values[1])):
        assert isinstance(column, Column)
        column.put(order, side[kept])
    rows.context[order], rows.position[order] = kept // per_context, kept % per_context + 1
    return rows
