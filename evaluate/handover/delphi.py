"""delphi's cache of activations (github.com/EleutherAI/delphi), from stores and weights: no language model.

layers.N.mlp/ of each layer has config.json and <first>_<last>.safetensors for every range of latents:
locations [n, 3] (context, position, latent - first), activations [n], tokens [C, T].
Shapes: C contexts of T tokens, n firings.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from common.device import pick_device
from common.errors import InputError
from common.files import sha256
from common.progress import progress
from common.settings import Settings
from evaluate.handover.runs import folder_of, runs_of
from evaluate.handover.splits import Split
from evaluate.metrics.rows import blocks
from shards import Store
from shards.layout import SHARD_ROWS, kept_mask, windows
from shards.store import StoreSplit
from transcoder import Transcoder
from transcoder.export import export_folder
from transcoder.gain import bind
from transcoder.public import published
from transcoder.weights import FILE_NAME, read_metadata

N_SPLITS = 5
"""Files of a layer at least, as delphi's own."""
PER_FILE = 1 << 24
"""Firings of a file, about: delphi reads a file whole, in some 50 bytes for each firing."""
READ = 1024
"""Contexts that are read together."""
EXAMPLE = 32
"""Tokens of delphi's examples, unless it is told otherwise. They must divide a context."""


class Fired(NamedTuple):
    """Firings in the order of the text: by context, position, latent. [n] each."""

    context: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    """float32, all positive"""


class Columns:
    """Rows of a few columns, in memory that is kept and grows: small arrays that outlive the large ones of each block
    of rows would leave those in pieces (820 MiB for the demo's first window, which so takes 375).

    >>> columns = Columns(np.int32)
    >>> columns.add(np.array([1, 2])), columns.add(np.array([3]))
    (None, None)
    >>> columns.taken()[0].tolist(), columns.taken()[0].tolist()
    ([1, 2, 3], [])
    """

    def __init__(self, *dtypes: npt.DTypeLike) -> None:
        self._arrays = [np.empty(0, dtype) for dtype in dtypes]
        self._n = 0

    def add(self, *columns: np.ndarray) -> None:
        """Add rows: their columns, of one length."""
        end = self._n + len(columns[0])
        if end > len(self._arrays[0]):
            larger = [np.empty(2 * end, array.dtype) for array in self._arrays]
            for new, old in zip(larger, self._arrays, strict=True):
                new[: self._n] = old[: self._n]
            self._arrays = larger
        for array, column in zip(self._arrays, columns, strict=True):
            array[self._n : end] = column
        self._n = end

    def taken(self) -> list[np.ndarray]:
        """The columns, until the next rows are added: they then take the place of these."""
        n, self._n = self._n, 0
        return [array[:n] for array in self._arrays]


class Text(NamedTuple):
    """The contexts that are handed over: the first ones, while every position of them that gives a row has one."""

    contexts: int
    rows: int
    sha256: str
    """Of all contexts of the split."""


@dataclass(frozen=True)
class Layer:
    """What one layer's cache is made of."""

    run_dir: Path
    store: Store
    split: str
    text: Text

    @property
    def rows(self) -> StoreSplit:
        return self.store.split(self.split)


def export_delphi(settings: Settings, prefix: int | None = None) -> Path:
    """Write the cache of each layer asked for into one folder, which is returned: delphi's `raw_dir`.

    Of the rows that evaluate.split and evaluate.rows name; a latent fires above the threshold of its prefix. Raises
    `InputError` for layers of different texts: delphi has one text for all.
    """
    runs, split = runs_of(settings, prefix), settings.evaluate.split
    layers = {}
    for layer, run_dir in runs.items():
        store = Store.of(settings.of_layer(layer))
        layers[layer] = Layer(run_dir, store, split, _text(store, split, settings.evaluate.rows))
    _refuse_texts(layers)
    _tell_of_examples(next(iter(layers.values())).store.manifest.source.context_length)
    folder = folder_of(settings, runs, "delphi", prefix, "" if split == "heldout" else f"_{split}")
    with export_folder(folder) as aside:
        for number, layer in layers.items():
            module = aside / f"layers.{number}.mlp"
            module.mkdir()
            _write_module(module, layer, settings, prefix)
    return folder


def _text(store: Store, split: str, rows: int | None) -> Text:
    """Which contexts lie wholly in the first `rows` rows (all); `InputError` where none does."""
    own, dropped = store.split(split), store.manifest.source.dropped_token_ids
    own.refuse_removed()
    n_rows = min(rows or len(own), len(own))
    kept = [
        kept_mask(own.contexts[start : start + READ], dropped).sum(1)
        for start in range(0, len(own.contexts), READ)
    ]
    ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *kept]))
    contexts = int((ends <= n_rows).sum())
    if not contexts or not ends[contexts - 1]:
        raise InputError(
            f"evaluate.rows: no context of {split} of {store.path} lies wholly in {n_rows:,} rows; give more"
        )
    return Text(contexts, int(ends[contexts - 1]), store.manifest.splits[split].contexts_sha256)


def _refuse_texts(layers: dict[int, Layer]) -> None:
    (first, of_first), *others = layers.items()
    for number, layer in others:
        if layer.text != of_first.text:
            raise InputError(
                f"delphi: the stores of layers {first} and {number} have different texts, and its cache has one for "
                f"all layers; export them one at a time (LAYER={first}, LAYER={number})"
            )


def example_length(length: int) -> int:
    """The divisor of a context's length that is nearest to delphi's examples, as a ratio.

    >>> [example_length(length) for length in (1024, 100, 48, 127)]
    [32, 25, 24, 127]
    """
    divisors = [size for size in range(1, length + 1) if length % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size / EXAMPLE)))


def _tell_of_examples(length: int) -> None:
    fits = example_length(length)
    if fits != EXAMPLE:
        print(
            f"note: delphi's examples of {EXAMPLE} tokens do not divide these contexts of {length}; give it "
            f"ConstructorConfig(example_ctx_len={fits})",
            file=sys.stderr,
        )


def fired(
    coder: Transcoder, split: StoreSplit, n_rows: int, tick: Callable[[int], object]
) -> Iterator[Fired]:
    """The firings of each window, on the first `n_rows` rows of the text; `tick` gets each block's rows.

    A window holds consecutive rows of the text, shuffled: sorting each of them sorts all.
    """
    device, found = coder.W_dec.device, Columns(np.uint16, np.int32, np.float32)
    for window in windows(len(split)):
        wanted = min(n_rows - window.start, len(window))
        if wanted <= 0:
            return
        context, position = split.provenance(window.start, window.stop)
        order = np.lexsort((position, context))
        rank = np.empty(len(order), np.uint16)  # a window has 2^15 rows; 16 bits are sorted by radix
        rank[order] = np.arange(len(order))
        for start, stop in blocks(len(window)):
            inputs = split.inputs(window.start + start, window.start + stop).to(device)
            entries = coder.active(inputs)
            row = rank[start:stop][entries.rows.cpu().numpy()]
            found.add(row, entries.latents.cpu().numpy(), entries.values.cpu().numpy())
            tick(min(stop, wanted) - min(start, wanted))
        row, latent, value = found.taken()
        by = np.argsort(row, kind="stable")
        by = by[: np.searchsorted(row[by], wanted)]
        at = order[row[by]]
        yield Fired(context[at], position[at], latent[by], value[by])


@torch.inference_mode()
def _write_module(folder: Path, layer: Layer, settings: Settings, prefix: int | None) -> None:
    """Write one layer's files, and config.json last. Memory is that of a window's firings, whatever the rows."""
    coder = bind(
        Transcoder.load(layer.run_dir, pick_device(settings.model.device)),
        layer.store,
        str(layer.run_dir),
        settings.evaluate.allow_mismatch,
    )
    coder = coder if prefix is None else coder.prefix(prefix)
    source, text = layer.store.manifest.source, layer.text
    splits: list[Split] = []
    with (
        ExitStack() as files,
        progress(f"delphi's cache, layer {source.layer}", text.rows, "rows") as bar,
    ):
        for part in fired(coder, layer.rows, text.rows, bar.update):
            if not splits:
                expected = len(part.value) / min(text.rows, SHARD_ROWS) * text.rows
                splits = [
                    files.enter_context(Split(folder, first, last, text.contexts))
                    for first, last in ranges(coder.d_sae, expected)
                ]
            starts = np.array([split.first for split in splits])
            number = (np.searchsorted(starts, part.latent, side="right") - 1).astype(np.uint16)
            by = np.argsort(number, kind="stable")
            bounds = np.searchsorted(number[by], np.arange(len(splits) + 1))
            for split, start, stop in zip(splits, bounds[:-1], bounds[1:], strict=True):
                split.add(*(column[by[start:stop]] for column in part))
        made_of = {
            "weights_sha256": sha256(layer.run_dir / FILE_NAME),
            "store_fingerprint": layer.store.manifest.fingerprint,
            "split": layer.split,
            "prefix": str(len(coder.prefix_ends) - 1),
        }
        for split in splits:
            split.finish(layer.rows.contexts, made_of)
    config = _config(layer, len(splits), settings.model.public_name)
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def ranges(n_latents: int, firings: float) -> list[tuple[int, int]]:
    """(first, last) latent of each file, cut as delphi cuts: bounds at equal steps, rounded down.

    >>> ranges(10, firings=0)
    [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    >>> ranges(3, firings=0)
    [(0, 0), (1, 1), (2, 2)]
    """
    n = min(max(N_SPLITS, -(-int(firings) // PER_FILE)), n_latents)
    bounds = [n_latents * each // n for each in range(n + 1)]
    return [(start, stop - 1) for start, stop in itertools.pairwise(bounds)]


def _config(layer: Layer, n_splits: int, name: str | None) -> dict[str, object]:
    """What delphi's config.py says of a cache."""
    source = layer.store.manifest.source
    length = source.context_length
    shown = published({**read_metadata(layer.run_dir), "source": source.model_dump()}, name)
    return {
        "dataset_repo": shown["source"]["dataset"],
        "dataset_split": source.dataset_split or "",
        "dataset_name": source.dataset_name or "",
        "dataset_column": source.text_column,
        "batch_size": 1,
        "cache_ctx_len": length,
        "n_tokens": layer.text.contexts * length,
        "n_splits": n_splits,
        "model_name": shown["source"]["model"],
    }
