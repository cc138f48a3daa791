"""circuit-tracer's feature pages: what its graph shows of a node's latent, from the evaluations of a set's runs.

In features/: index.json.gz, {layer: {filename, offsets}}, and layer_N.bin, where bytes [offsets[f], offsets[f + 1])
are the length (uint32, little-endian) and the zlib of latent f's JSON. F latents, S samples.
"""

import gzip
import json
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from common.errors import InputError
from common.files import sha256, write_whole
from common.progress import progress
from common.settings import Settings
from common.tokens import TokenText
from evaluate.files import CONTEXTS, LATENTS, METRICS_VERSION, complete
from evaluate.kept.evaluations import main_evaluation
from evaluate.labels.read import label_texts
from evaluate.metrics.contexts import Samples
from evaluate.metrics.rows import ContextTable
from evaluate.notes import Note, notes_of
from evaluate.report.page_data import Stretches, Strings
from shards import Store
from shards.store import read_tokenizer
from transcoder.weights import FILE_NAME, read_metadata

FOLDER, INDEX = "features", "index.json.gz"
BLOCK = 512
"""Latents whose samples and texts are in memory together: 4 MB."""
STRONGEST = "strongest contexts"
QUARTERS = ("strongest quarter", "second quarter", "third quarter", "weakest quarter")

OTHER_VERSION = "evaluated by another version"
NO_STORE = "no store of their texts"


class Example(TypedDict):
    """A stretch of text."""

    tokens: list[str]
    tokens_acts_list: list[float]
    train_token_ind: int
    """The sample's own token."""
    is_repeated_datapoint: bool


class Quantile(TypedDict):
    quantile_name: str
    examples: list[Example]


class Page(TypedDict):
    """A latent, as circuit_tracer/frontend/feature_models.py has it."""

    transcoder_id: str
    index: int
    examples_quantiles: list[Quantile]
    top_logits: list[str]
    bottom_logits: list[str]
    act_min: float
    act_max: float
    quantile_values: list[float]
    histogram: list[float]
    """Equal bins from `act_min` to `act_max`."""
    activation_frequency: float


class _Made(BaseModel):
    """What is read of an evaluation's provenance."""

    metrics_version: int = 0
    weights_sha256: str
    store_fingerprint: str
    split: Literal["train", "heldout"]
    rows: int


@dataclass(frozen=True)
class Evaluated:
    """What a layer's pages are made of."""

    layer: int
    folder: Path
    """Of the evaluation."""
    rows: int
    contexts: ContextTable
    """Of the evaluated split."""
    text: TokenText
    notes: Mapping[int, Note]
    """A person's notes on the latents."""
    split: str

    def blocks(self, prefix: int | None = None) -> Iterator["Block"]:
        """All latents of the prefix (none: all), in order, a few hundred at a time. Activations above the full
        dictionary's threshold, frequency by the prefix's.

        Raises `InputError` where a file of the evaluation is damaged.
        """
        try:
            with (
                safe_open(self.folder / LATENTS, "numpy") as latents,
                safe_open(self.folder / CONTEXTS, "numpy") as contexts,
            ):
                group = latents.get_tensor("group")
                g = int(group.max()) if prefix is None else prefix
                for start in range(0, end := int((group <= g).sum()), BLOCK):
                    stop = min(start + BLOCK, end)
                    examples = Examples(contexts, start, stop, self.contexts, self.text)
                    yield Block(latents, start, stop, g, self.text, examples)
        except SafetensorError as error:
            raise InputError(
                f"{self.folder}: damaged ({error}); remove it and evaluate layer {self.layer} again (make evaluate)"
            ) from error

    def pages(self, prefix: int | None = None) -> Iterator[Page]:
        """Of every latent that `blocks` gives."""
        for block in self.blocks(prefix):
            yield from self._pages(block)

    def _pages(self, block: "Block") -> Iterator[Page]:
        largest, histogram, percentiles = map(
            block.column, ("largest_activation", "activation_histogram", "activation_percentiles")
        )
        promoted, suppressed = block.tokens("promoted_tokens"), block.tokens("suppressed_tokens")
        density, words, alike = block.density, block.words(), block.column("effect_like_random")
        for n, latent in enumerate(range(block.start, block.stop)):
            yield Page(
                transcoder_id=f"layer_{self.layer}",
                index=latent,
                examples_quantiles=self._said(latent, words[n], bool(alike[n]), block.examples.of(n)),
                top_logits=promoted[n],
                bottom_logits=suppressed[n],
                act_min=0.0,
                act_max=short(largest[n]),
                quantile_values=[short(value) for value in percentiles[n]],
                histogram=histogram[n].tolist(),
                activation_frequency=float(density[n]),
            )

    def _said(
        self, latent: int, words: list[str], like_random: bool, examples: list[Quantile]
    ) -> list[Quantile]:
        """The contexts, the first ones headed by a person's label and the automatic one; or that there are none.

        Readers take the first entry's examples for the strongest ones: the labels are no entry of their own, nor is
        that the promoted tokens, for which the format has no mark, say little.
        """
        said = [self.notes[latent].text] if latent in self.notes else []
        if not examples:
            return [_note("; ".join([*said, f"fires on none of {self.rows:,} rows"]))]
        said += [f"fires on {' | '.join(words)}"] if words else []
        said += ["promotes no more than a random direction might"] if like_random else []
        name = "; ".join([*said, examples[0]["quantile_name"]])
        return [Quantile(quantile_name=name, examples=examples[0]["examples"]), *examples[1:]]


@dataclass(frozen=True)
class Block:
    """What an evaluation knows of latents [start, stop)."""

    latents: Any
    """latents.safetensors, opened."""
    start: int
    stop: int
    g: int
    """The prefix."""
    text: TokenText
    examples: "Examples"

    def column(self, name: str) -> np.ndarray:
        """A column of latents.safetensors."""
        return self.latents.get_slice(name)[self.start : self.stop]

    def tokens(self, name: str) -> list[list[str]]:
        """The texts of a column of token ids."""
        return [[self.text.label(token) for token in tokens] for tokens in self.column(name).tolist()]

    @property
    def density(self) -> np.ndarray:
        """The share of rows on which each latent fires, by the prefix's threshold."""
        return self.latents.get_slice("density")[self.g, self.start : self.stop]

    def words(self) -> list[list[str]]:
        """The automatic label of each latent."""
        return label_texts(self.column("label_tokens"), self.column("label_kinds"), self.text)


class Examples:
    """The samples of latents [start, stop) with the text around them; of contexts.safetensors, opened."""

    def __init__(self, file: Any, start: int, stop: int, contexts: ContextTable, text: TokenText) -> None:
        self.bounds = file.get_slice("bounds")[start : stop + 1]
        first, last = map(int, self.bounds[[0, -1]])
        self.bounds = self.bounds - first
        length = contexts.shape[1]
        self.places = file.get_slice("context")[first:last].astype(np.int64) * length
        self.places += file.get_slice("position")[first:last]
        self.values, self.quantiles = (
            file.get_slice(name)[first:last] for name in ("activation", "quantile")
        )
        self.around = file.get_slice("around_bounds")[first : last + 1]
        begin, end = map(int, self.around[[0, -1]])
        self.around = self.around - begin
        self.offset = file.get_slice("around_offset")[begin:end]
        finite = np.finfo(np.float16).max  # what is beyond it became infinite
        self.activation = np.minimum(file.get_slice("around_activation")[begin:end], finite)
        empty = np.zeros(0)
        samples = Samples(empty, self.places, empty, empty, empty)
        self.stretches = Stretches.around(samples, np.arange(last - first), length)
        strings = Strings(text)
        self.pool = self.stretches.strings(contexts, strings)
        self.texts = strings.texts

    def of(self, n: int) -> list[Quantile]:
        """Of the block's nth latent: its strongest contexts, then a few of each quarter of its firings."""
        names = (STRONGEST, *QUARTERS)
        groups: dict[str, list[Example]] = {name: [] for name in names}
        seen: set[int] = set()
        for sample in range(self.bounds[n], self.bounds[n + 1]):
            quantile = self.quantiles[sample]
            which = 0 if np.isnan(quantile) else 1 + min(int(4 * (1 - quantile)), 3)
            groups[names[which]].append(self._example(sample, int(self.places[sample]) in seen))
            seen.add(int(self.places[sample]))
        return [Quantile(quantile_name=name, examples=some) for name, some in groups.items() if some]

    def _example(self, sample: int, repeated: bool) -> Example:
        at, length, focus = (
            int(column[sample])
            for column in (
                self.stretches.sample_at,
                self.stretches.sample_lengths,
                self.stretches.sample_focus,
            )
        )
        activations = [0.0] * length
        near = slice(self.around[sample], self.around[sample + 1])
        for offset, value in zip(self.offset[near].tolist(), self.activation[near].tolist(), strict=True):
            activations[focus + offset] = short(value)
        activations[focus] = short(self.values[sample])
        return Example(
            tokens=[self.texts[number] for number in self.pool[at : at + length].tolist()],
            tokens_acts_list=activations,
            train_token_ind=focus,
            is_repeated_datapoint=repeated,
        )


def short(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def _note(text: str) -> Quantile:
    """A line on a page without contexts: where the index has no page, the tool goes on to show the latent before."""
    return Quantile(quantile_name=text, examples=[])


def empty_pages(layer: int, n_latents: int, why: str) -> Iterator[Page]:
    """Pages of a layer of which nothing is known, but why."""
    for f in range(n_latents):
        yield Page(
            transcoder_id=f"layer_{layer}",
            index=f,
            examples_quantiles=[_note(why)],
            top_logits=[],
            bottom_logits=[],
            act_min=0.0,
            act_max=0.0,
            quantile_values=[],
            histogram=[],
            activation_frequency=0.0,
        )


def write_layer(path: Path, pages: Iterable[Page]) -> list[int]:
    """Write a layer's file; returns the offsets [F + 1] of its records. One page is in memory at a time."""
    offsets = [0]
    with path.open("wb") as file:
        for page in pages:
            text = json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            record = zlib.compress(text.encode())
            file.write(struct.pack("<I", len(record)) + record)
            offsets.append(offsets[-1] + 4 + len(record))
    return offsets


def write_index(folder: Path, offsets: Mapping[int, list[int]]) -> None:
    """Write index.json.gz of the layers' files."""
    index = {str(layer): {"filename": _file(layer), "offsets": each} for layer, each in offsets.items()}
    write_whole(folder / INDEX, gzip.compress(json.dumps(index).encode(), mtime=0))


def _file(layer: int) -> str:
    return f"layer_{layer}.bin"


@dataclass
class SetPages:
    """`write` adds features/ to an exported set, from the evaluations of the runs that it is made of."""

    settings: Settings
    prefix: int | None = None
    lacking: dict[str, list[int]] = field(default_factory=dict)
    """Why there is nothing to show -> of which layers."""

    def write(self, folder: Path, runs: Mapping[int, Path]) -> None:
        """`runs`: each layer's run directory. One line on standard error for each reason why layers are left without.

        Raises `InputError` where an evaluation is of other weights than the run's, or damaged.
        """
        found = {
            layer: evaluated_of(self.settings, layer, run_dir) for layer, run_dir in sorted(runs.items())
        }
        for layer, each in found.items():
            if isinstance(each, str):
                self.lacking.setdefault(each, []).append(layer)
        for why, layers in self.lacking.items():
            numbers = " ".join(map(str, layers))
            remedy = mended_by(why, numbers, self.settings)
            print(f"no feature pages of layers {numbers}: {why}; {remedy}, and export again", file=sys.stderr)
        if not any(isinstance(each, Evaluated) for each in found.values()):
            return
        (folder / FOLDER).mkdir()
        offsets: dict[int, list[int]] = {}
        with progress("feature pages", len(found), "layers") as bar:
            for layer, each in found.items():
                if isinstance(each, str):
                    ends = read_metadata(runs[layer])["prefix_ends"]
                    n = ends[-1 if self.prefix is None else self.prefix]
                    pages = empty_pages(layer, n, f"layer {layer}: {each}")
                else:
                    pages = each.pages(self.prefix)
                offsets[layer] = write_layer(folder / FOLDER / _file(layer), pages)
                bar.update(1)
        write_index(folder / FOLDER, offsets)


def evaluated_of(settings: Settings, layer: int, run_dir: Path) -> Evaluated | str:
    """The layer's evaluation and store, or why there is nothing to show.

    Raises `InputError` where an evaluation is of other weights than the run's, or damaged.
    """
    digest = sha256(run_dir / FILE_NAME)
    folder = main_evaluation(run_dir, digest)
    values = complete(folder)
    if values is None:
        return "not evaluated"
    try:
        made = _Made.model_validate(values["provenance"])
    except ValidationError:
        return OTHER_VERSION
    if made.weights_sha256 != digest:
        raise InputError(
            f"{folder}: is of other weights than {run_dir / FILE_NAME}; evaluate the run again (make evaluate "
            f"LAYER={layer} RUN={run_dir.name}), or export without its pages (--without-pages)"
        )
    if made.metrics_version != METRICS_VERSION:
        return OTHER_VERSION
    try:
        store = Store.of(settings.of_layer(layer))
    except InputError:
        return f"{NO_STORE} can be read in {settings.paths.activations}"
    if store.manifest.fingerprint != made.store_fingerprint:
        return "evaluated on another harvest than is in the store"
    split = getattr(store, made.split)
    text = TokenText(read_tokenizer(store.tokenizer_path))
    notes = notes_of(run_dir, layer, read_metadata(run_dir)["prefix_ends"][-1])
    return Evaluated(layer, folder, made.rows, split.contexts, text, notes, made.split)


def mended_by(why: str, layers: str, settings: Settings) -> str:
    """The command that gives `evaluated_of` what it lacks in these layers."""
    if why.startswith(NO_STORE):
        return settings.command("harvest", layers, run=False)
    return settings.command("evaluate", layers)
