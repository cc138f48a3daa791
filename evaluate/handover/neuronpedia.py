"""Neuronpedia's folder of an evaluated run: <model>/<layer>-<set>/ of JSON lines, one file a table of its database.

Fields as its importer takes them (hijohnnylin/neuronpedia ebb8426, apps/webapp/lib/db/import.ts and
prisma/schema.prisma): every line of a file has the keys of the first, and what is left out has the database's default.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.progress import progress
from common.settings import Settings
from evaluate.feature_pages import STRONGEST, Block, Evaluated, Quantile, evaluated_of, mended_by, short
from evaluate.handover.runs import folder_of, runs_of
from transcoder import Transcoder
from transcoder.export import export_folder, suffix
from transcoder.public import published

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that every Neuronpedia begins with (prisma/seed.ts); whose all exported data are."""
AUTHOR = "matryoshka-transcoder"
"""In place of a person's name, who may write theirs into release.jsonl and sourceset.jsonl."""
BATCH = 1024
"""Latents of a file, as in its own exports."""
INTERVALS = 4
"""Equal intervals of activation that the samples are shown under; they divide the histogram's 24 bins."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """What a source is called there."""

    model: str
    set: str
    layer: int

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set}"

    def of_latent(self, latent: int) -> Line:
        """The keys that all tables have."""
        return {"modelId": self.model, "layer": self.source, "index": str(latent)}

    def identifier(self, *parts: object) -> str:
        """An id of the form that the database makes, the same each time: an import done twice adds nothing."""
        text = "/".join(map(str, (self.model, self.source, *parts)))
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def export_neuronpedia(settings: Settings, prefix: int | None = None) -> Path:
    """Write the folder of each layer asked for into one, which is returned. All of them must be evaluated."""
    runs = runs_of(settings, prefix)
    layers = {}
    for layer, run_dir in runs.items():
        found = evaluated_of(settings, layer, run_dir)
        if isinstance(found, str):
            raise InputError(
                f"neuronpedia: layer {layer}: {found}; {mended_by(found, str(layer), settings)}, and export again"
            )
        layers[layer] = found
    folder = folder_of(settings, runs, "neuronpedia", prefix)
    with (
        export_folder(folder) as aside,
        progress("neuronpedia", len(layers), "layers") as bar,
    ):
        for layer, found in layers.items():
            coder = Transcoder.load(runs[layer])
            coder = coder if prefix is None else coder.prefix(prefix)
            _write_layer(aside, found, coder, settings, prefix)
            bar.update(1)
    return folder


def _write_layer(
    folder: Path, found: Evaluated, coder: Transcoder, settings: Settings, prefix: int | None
) -> None:
    shown = published(coder.metadata, settings.model.public_name)
    model = str(shown["source"].get("model", settings.model_slug))
    names = Names(slug(model.rpartition("/")[2]), slug(settings.run + suffix(prefix)), found.layer)
    source = folder / names.model / names.source
    source.mkdir(parents=True)
    for name, line in _tables(names, model, shown, found, coder).items():
        (source / f"{name}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    decoder = coder.W_dec.numpy()
    tables = {name: _Batches(source / name) for name in ("features", "activations", "explanations")}
    hook = shown["source"].get("output_hook") or f"blocks.{found.layer}.hook_mlp_out"
    for block in found.blocks(prefix):
        for latent, feature, activations in _latents(names, block, decoder, hook):
            tables["features"].add(latent, [feature])
            tables["activations"].add(latent, activations)
        for latent, explanations in _explanations(names, block, found):
            tables["explanations"].add(latent, explanations)
    for each in tables.values():
        each.close()


def slug(name: str) -> str:
    """A name as Neuronpedia's addresses have them; it splits a source's name at two underscores.

    >>> slug("SmolLM2-135M.Instruct"), slug("k=64__b")
    ('smollm2-135m-instruct', 'k-64_b')
    """
    return re.sub(r"_{2,}", "_", re.sub(r"[^a-z0-9_-]+", "-", name.lower())).strip("-") or "model"


def _tables(
    names: Names, model: str, shown: Mapping[str, Any], found: Evaluated, coder: Transcoder
) -> dict[str, Line]:
    """One line each: the release, the model, the set and this layer of it."""
    release = f"{names.model}-{names.set}".replace("_", "-")
    source = shown["source"]
    what = f"MLP transcoder, {coder.d_sae:,} latents in prefixes {'/'.join(map(str, coder.prefix_ends))}"
    public = {"creatorId": CREATOR, "visibility": "PUBLIC"}
    return {
        "release": {
            "name": release,
            "description": f"{what}, of {model}",
            "descriptionShort": f"{names.set}: {what}",
            "urls": [],
            "creatorName": AUTHOR,
            "creatorNameShort": AUTHOR,
            **public,
        },
        "model": {
            "id": names.model,
            "displayName": model,
            "displayNameShort": names.model,
            "instruct": names.model.endswith(("-it", "-instruct")),
            "layers": source.get("n_layers") or found.layer + 1,
            "neuronsPerLayer": 0,
            "dimension": coder.d_out,
            "owner": model.rpartition("/")[0],
            **public,
        },
        "sourceset": {
            "modelId": names.model,
            "name": names.set,
            "description": what,
            "creatorName": AUTHOR,
            "releaseName": release,
            "urls": [],
            "allowInferenceSearch": False,
            **public,
        },
        "source": {
            "id": names.source,
            "modelId": names.model,
            "setName": names.set,
            "dataset": source.get("dataset"),
            "num_prompts": len(found.contexts),
            "num_tokens_in_prompt": found.contexts.shape[1],
            "notes": f"{found.rows:,} rows that training never saw"
            if found.split == "heldout"
            else f"{found.rows:,} train rows",
            **public,
        },
    }


def _latents(
    names: Names, block: Block, decoder: np.ndarray, hook: str
) -> Iterator[tuple[int, Line, list[Line]]]:
    """Each latent's line in the tables Neuron and Activation."""
    largest, histogram = block.column("largest_activation"), block.column("activation_histogram")
    effects = {
        f"{key}_{part}": block.tokens(f"{what}_tokens") if part == "str" else block.column(f"{what}_logits")
        for key, what in (("pos", "promoted"), ("neg", "suppressed"))
        for part in ("str", "values")
    }
    logits, edges = block.column("effect_histogram"), block.column("effect_edges")
    for n, latent in enumerate(range(block.start, block.stop)):
        most = short(largest[n])
        feature = {
            **names.of_latent(latent),
            "sourceSetName": names.set,
            "creatorId": CREATOR,
            "maxActApprox": most,
            "hasVector": True,
            "vector": [short(value) for value in decoder[latent]],
            "vectorDefaultSteerStrength": most,
            "hookName": hook,
            **{
                key: [each if isinstance(each, str) else short(each) for each in values[n]]
                for key, values in effects.items()
            },
            "frac_nonzero": float(block.density[n]),
            **_bars("freq_hist_data", histogram[n], 0.0, float(largest[n])),
            **_bars("logits_hist_data", logits[n], *(map(float, edges[n]) if len(edges[n]) else (0.0, 0.0))),
        }
        yield latent, feature, _activations(names, latent, block.examples.of(n), histogram[n], most)


def _bars(name: str, counts: np.ndarray, low: float, high: float) -> Line:
    """A histogram of equal bins as heights and the middles of the bins; empty where nothing was counted."""
    if not counts.sum():
        counts = counts[:0]
    width = (high - low) / max(len(counts), 1)
    return {
        f"{name}_bar_heights": counts.tolist(),
        f"{name}_bar_values": [short(low + (each + 0.5) * width) for each in range(len(counts))],
    }


def _activations(
    names: Names, latent: int, samples: Sequence[Quantile], histogram: np.ndarray, most: float
) -> list[Line]:
    """A latent's samples: the strongest, and those of the even sample in their interval of activation."""
    counts = histogram.reshape(INTERVALS, -1).sum(1)
    lines = []
    each_of = ((group["quantile_name"], example) for group in samples for example in group["examples"])
    for number, (group, example) in enumerate(each_of):
        values, at = example["tokens_acts_list"], example["train_token_ind"]
        if group == STRONGEST:
            bins = {"binMin": -1.0, "binMax": most, "binContains": -1.0}
        else:
            which = min(int(INTERVALS * values[at] / most), INTERVALS - 1)
            bins = {
                "binMin": short(which * most / INTERVALS),
                "binMax": short((which + 1) * most / INTERVALS),
                "binContains": short(counts[which] / max(counts.sum(), 1)),
            }
        peak = int(np.argmax(values))
        lines.append(
            {
                "id": names.identifier("activation", latent, number),
                **names.of_latent(latent),
                "creatorId": CREATOR,
                "tokens": example["tokens"],
                "values": values,
                "maxValue": values[peak],
                "maxValueTokenIndex": peak,
                "minValue": min(values),
                **bins,
                "qualifyingTokenIndex": at,
            }
        )
    return lines


def _explanations(names: Names, block: Block, found: Evaluated) -> Iterator[tuple[int, list[Line]]]:
    """Each latent's labels: a person's or another program's, a language model's, and the automatic one."""
    precision, recall = block.column("label_precision"), block.column("label_recall")
    words = block.words()
    for n, latent in enumerate(range(block.start, block.stop)):
        said = []
        note = found.notes.get(latent)
        for own in (note, note.explanation) if note else ():
            if own and own.label:
                score = "" if own.score is None else f"; score {own.score:g}"
                said.append((own.label, (own.source or "notes") + score))
        if words[n]:
            measured = (
                f"; precision {precision[n]:.2f}, recall {recall[n]:.2f}" if np.isfinite(precision[n]) else ""
            )
            said.append((f"fires on {' | '.join(words[n])}", f"the words it fires on{measured}"))
        lines = [
            {
                "id": names.identifier("explanation", latent, number),
                **names.of_latent(latent),
                "description": text,
                "authorId": CREATOR,
                "notes": notes,
            }
            for number, (text, notes) in enumerate(said)
        ]
        yield latent, lines


class _Batches:
    """batch-N.jsonl.gz of a table: the lines of 1,024 latents each, added in order; no file without a line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = -1
        self._file: gzip.GzipFile | None = None

    def add(self, latent: int, lines: Iterable[Line]) -> None:
        for line in lines:
            if self._file is None or latent // BATCH != self._number:
                self.close()
                self._folder.mkdir(exist_ok=True)
                self._number = latent // BATCH
                # no time in the header: the same run gives the same bytes
                self._file = gzip.GzipFile(
                    self._folder / f"batch-{self._number}.jsonl.gz", "wb", compresslevel=5, mtime=0
                )
            text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            self._file.write(text.encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
