"""python -m bench.nesting [--layers 12 20] [--seeds 0 1] [--steps N] [--train]: did nesting help?

Of each layer of SmolLM2-135M and each seed (initial weights and order of the rows) three transcoders of the same rows,
number of latents and k: nested, not nested, and sparsify's class, which needs what `make install-peers` installs. What
is trained already is not trained again, and a run that was interrupted goes on; `--train` ends there. Then FVU,
absorption, splitting and stability as evaluate.absorption has them, and probes on 5 latents as evaluate.probe has them,
on the held-out rows; what is not trained yet is left out, and said. Numbers are means over the seeds, with standard
errors over classes (over documents for probes, over latents for stability). JSON: bench/results/nesting.json.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse import csc_matrix, csr_matrix

from bench.against_sparsify import python_of_peers, rows_of, theirs
from bench.recipe import SMOLLM2, WORK, keep, not_nested, subjects
from common.cli import run_stage
from common.errors import InputError
from common.settings import ROOT, Settings
from evaluate.absorption.directions import classes
from evaluate.absorption.measure import MEANS, Passed, mean_of, of_transcoder, passed, stability, value_of
from evaluate.absorption.records import AbsorbedPrefix, Estimate
from evaluate.absorption.sample import sample
from evaluate.absorption.stability import partnered
from evaluate.probe.classes import token_tasks
from evaluate.probe.documents import documents_of, sides
from evaluate.probe.fit import Accuracy, accuracy, fit_probe, forward, mean_accuracy
from evaluate.probe.measure import Asked as AskedOfRows
from evaluate.probe.measure import asked as asked_of_rows
from evaluate.probe.rows import places, values_of
from evaluate.subject import read
from shards import Store
from train import record
from train.loop import train
from train.recipe import Recipe
from transcoder import Transcoder

RESULTS = ROOT / "bench" / "results" / "nesting.json"
LAYERS, SEEDS = (12, 20), (0, 1)
KINDS = ("nested", "one group", "sparsify")
OPTIMIZER = ("adam", "3e-3")
"""Of sparsify: see bench.against_sparsify for the others."""
K = 5
"""Latents of the probes."""


class Asked(NamedTuple):
    """One trained transcoder of the table."""

    layer: int
    seed: int
    kind: str
    settings: Settings
    """Of the run; for sparsify of the run without nesting that it stands beside."""
    path: Path


def asked(settings: Settings, seed: int, steps: int | None) -> Iterator[Asked]:
    """The three kinds for the layer of `settings`, which are those of the nested run with seed 0."""
    both = {"seed": seed, "order_seed": seed}
    name = f"{settings.run}-seed_{seed}" if seed else settings.run
    nested = settings.model_copy(update={"train": settings.train.model_copy(update=both), "run": name})
    flat, layer = not_nested(nested), settings.layer
    yield Asked(layer, seed, "nested", nested, nested.run_dir())
    yield Asked(layer, seed, "one group", flat, flat.run_dir())
    n = steps or flat.train.rows // flat.train.batch_size
    folder = WORK / "sparsify" / f"{'-'.join(OPTIMIZER)}-steps_{n}-seed_{seed}" / f"layers.{layer}.mlp"
    rows = flat.train.model_copy(update={"rows": n * flat.train.batch_size})
    yield Asked(layer, seed, "sparsify", flat.model_copy(update={"train": rows}), folder)


def is_trained(one: Asked) -> bool:
    """Whether it is trained to its end."""
    if one.kind == "sparsify":
        return one.path.is_dir()  # it appears whole
    return record.finished(one.path, one.settings, None) is not None


def ensure(one: Asked) -> None:
    """Trains it where that is not done."""
    store = Store.of(one.settings)
    if one.kind != "sparsify":
        if record.finished(one.path, one.settings, store.manifest.fingerprint) is None:
            train(one.settings, store)
        return
    if is_trained(one):
        return
    python, gain = python_of_peers(), torch.tensor(store.manifest.source.gain)
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as scratch:
        rows, folder = Path(scratch) / "rows.safetensors", Path(scratch) / "trained"
        # sparsify's transcoders read the MLP's input with the norm's gain, and its directories say nothing else.
        rows_of(store, one.settings, rows, gain if store.manifest.source.input == "normalized" else 1.0)
        theirs(python, rows, Recipe.of(one.settings, store), *OPTIMIZER, folder)
        one.path.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(one.path)


class Probed(NamedTuple):
    """The rows of the probes on K latents."""

    questions: AskedOfRows
    document: np.ndarray
    """[n] of each row of the split"""


def probed(store: Store, settings: Settings) -> Probed:
    """Which rows the token classes of evaluate.probe are asked of; the same for all transcoders of the store."""
    split, n = store.heldout, len(store.heldout)
    documents = documents_of(settings, store, split, "heldout")
    where = places(split, n, store.manifest.source, documents.of)
    on = sides(np.bincount(where.document, minlength=int(documents.of.max()) + 1) > 0, documents.how)
    tasks = token_tasks(split.text, where.token, where.previous)
    width = store.manifest.source.d_in + store.manifest.source.d_out
    return Probed(asked_of_rows(tasks, where.document, on, width), where.document)


def probe_accuracies(rows: Probed, coder: Transcoder, store: Store) -> list[Accuracy]:
    """Of each prefix: mean over the classes of probes on K latents, held-out documents."""
    questions, document = rows.questions, rows.document
    n_documents = int(document.max()) + 1
    found = []
    for latents in values_of(coder, store.heldout, questions.rows).latents:
        parts = []
        for question in questions.questions:
            train, test = (np.searchsorted(questions.rows, each) for each in (question.train, question.test))
            positive, expected = (question.task.labels[each] == 1 for each in (question.train, question.test))
            here = csr_matrix(latents[train])
            chosen = forward(here, positive, K)
            fit, check = (csc_matrix(each)[:, chosen].toarray() for each in (here, latents[test]))
            right = fit_probe(fit, positive).says(check) == expected
            parts.append(accuracy(right, document[question.test], n_documents))
        found.append(mean_accuracy(parts))
    return found


class Numbers(NamedTuple):
    """Of one transcoder, each prefix."""

    absorbed: list[AbsorbedPrefix]
    probes: list[Accuracy]


def of_layer(ones: Sequence[Asked]) -> dict[str, Any]:
    """All numbers of one layer's transcoders; the JSON of `RESULTS`."""
    store = Store.of(ones[0].settings)
    coders = {one.path: read(one.path, store) for one in ones}
    numbered = {str(number): coder for number, coder in enumerate(coders.values())}
    held = dict(zip(coders, passed(numbered, store.heldout, len(store.heldout)).values(), strict=True))
    rows = sample(store, len(store.heldout))
    told, asked_rows = classes(rows), probed(store, ones[0].settings)
    numbers = {}
    for one in ones:
        name, coder = f"layer {one.layer}, {one.kind}, seed {one.seed}", coders[one.path]
        line = of_transcoder(name, coder, told, rows, held[one.path])
        numbers[one.path] = Numbers(line.prefixes, probe_accuracies(asked_rows, coder, store))
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in ones)]
    return {
        "classes": [f"{each.task.family} {each.task.name}".strip() for each in told if each.used],
        "kinds": {
            kind: of_kind([one for one in ones if one.kind == kind], numbers, coders, held) for kind in kinds
        },
        "less_one_group": less(ones, numbers),
        "most_firing": {
            kind: most_firing([one.path for one in ones if one.kind == kind], coders, held) for kind in kinds
        },
    }


def of_kind(
    ones: Sequence[Asked],
    numbers: Mapping[Path, Numbers],
    coders: Mapping[Path, Transcoder],
    held: Mapping[Path, Passed],
) -> list[dict[str, Any]]:
    """A line for each prefix, means over the seeds."""
    lines = []
    for g, end in enumerate(coders[ones[0].path].prefix_ends):
        each = [numbers[one.path].absorbed[g] for one in ones]
        probes = mean_accuracy([numbers[one.path].probes[g] for one in ones])
        line: dict[str, Any] = {"end": end, "seeds": [one.seed for one in ones]}
        line |= {key: [getattr(one, key) for one in each] for key in ("fvu", "l0")}
        line |= {key: _written(over_seeds(each, key)) for key in MEANS}
        lines.append(line | {"probes": _written(Estimate(value=probes.value, error=probes.error))})
    both = [
        stability(coders[a], held[a], "", coders[b], held[b])
        for a, b in permutations([one.path for one in ones], 2)
    ]
    for g, line in enumerate(lines):
        line["stable_group"] = of_both([each.groups[g].partnered for each in both])
    lines[-1]["stable"] = of_both([each.partnered for each in both])
    return lines


def most_firing(
    paths: Sequence[Path], coders: Mapping[Path, Transcoder], held: Mapping[Path, Passed]
) -> dict[str, float] | None:
    """Share of stable latents among as many as the nested runs' first group has: those that fire on the most rows.

    Frequent latents are more stable than rare ones in any dictionary; the first group's are frequent.
    """
    n = min(coder.prefix_ends[0] for coder in coders.values())
    shares = []
    for a, b in permutations(paths, 2):
        own = held[a].fired
        marks = partnered(own, coders[a].W_dec, held[b].fired, coders[b].W_dec)
        shares.append(mean_of(marks[np.argsort(-own.counts, kind="stable")[:n]].astype(float).tolist()))
    return of_both(shares)


def of_both(shares: Sequence[Estimate | None]) -> dict[str, float] | None:
    """Mean of the shares of stable latents in both directions."""
    known = [each for each in shares if each is not None]
    if not known:
        return None
    error = max(each.error or 0.0 for each in known)  # of both directions: about the same latents
    return {"value": float(np.mean([each.value for each in known])), "error": error}


def over_seeds(prefixes: Sequence[AbsorbedPrefix], key: str) -> Estimate | None:
    """Mean over the classes of each class's mean over the seeds."""
    by_class = zip(*(prefix.classes for prefix in prefixes), strict=True)
    return mean_of([float(np.mean([value_of(one, key) for one in same])) for same in by_class])


def less(ones: Sequence[Asked], numbers: Mapping[Path, Numbers]) -> dict[str, Any]:
    """Kind -> full dictionary less that of one group, class by class, over the seeds that both have."""
    full = {(one.kind, one.seed): numbers[one.path].absorbed[-1] for one in ones}
    found: dict[str, Any] = {}
    for kind in ("nested", "sparsify"):
        seeds = [seed for other, seed in full if other == kind and ("one group", seed) in full]
        if not seeds:
            continue
        pairs = [(full[kind, seed], full["one group", seed]) for seed in seeds]
        found[kind] = {"seeds": seeds, "fvu": [a.fvu / b.fvu - 1 for a, b in pairs if a.fvu and b.fvu]}
        for key in MEANS:
            by_class = zip(*(zip(a.classes, b.classes, strict=True) for a, b in pairs), strict=True)
            differences = [
                float(np.mean([value_of(a, key) - value_of(b, key) for a, b in same])) for same in by_class
            ]
            found[kind][key] = _written(mean_of(differences))
    return found


def _written(each: Estimate | None) -> dict[str, float | None] | None:
    return None if each is None else {"value": each.value, "error": each.error}


def table(results: dict[str, dict[str, Any]]) -> Table:
    """A line for each layer, kind and prefix."""
    shown = Table(title="held-out rows; means over seeds ± standard errors", title_justify="left")
    columns = (
        "layer",
        "",
        "latents",
        "FVU",
        "absorbed %",
        "fraction %",
        "silent %",
        "split",
        "F1",
        f"k = {K} %",
        "stable %",
        "of the group",
    )
    for column in columns:
        shown.add_column(column, justify="left" if not column else "right")
    for layer, numbers in results.items():
        for kind, lines in numbers["kinds"].items():
            for line in lines:
                fvu = " ".join(f"{each:.4f}" for each in line["fvu"])
                shares = (_cell(line[key], 100, 1) for key in ("absorbed", "fraction", "silent"))
                rest = (_cell(line["latents"], 1, 2), _cell(line["f1"], 1, 3), _cell(line["probes"], 100, 1))
                shown.add_row(
                    layer,
                    kind,
                    f"{line['end']:,}",
                    fvu,
                    *shares,
                    *rest,
                    *(_cell(line.get(key), 100, 1) for key in ("stable", "stable_group")),
                )
        for kind, line in numbers["less_one_group"].items():
            fvu = " ".join(f"{100 * each:+.1f} %" for each in line["fvu"])
            shares = (_cell(line[key], 100, 1, "+") for key in ("absorbed", "fraction", "silent"))
            rest = (_cell(line["latents"], 1, 2, "+"), _cell(line["f1"], 1, 3, "+"))
            shown.add_row(layer, f"{kind}, less one group", "", fvu, *shares, *rest, "", "", "")
        for kind, share in numbers["most_firing"].items():
            shown.add_row(layer, f"{kind}, as many that fire most", *[""] * 9, _cell(share, 100, 1))
        shown.add_section()
    return shown


def _cell(each: dict[str, float | None] | None, times: float, decimals: int, sign: str = "") -> str:
    if each is None or each["value"] is None:
        return "-"
    error = "" if each["error"] is None else f" ± {times * each['error']:.{decimals}f}"
    return f"{times * each['value']:{sign}.{decimals}f}{error}"


def main() -> None:
    options = argparse.ArgumentParser(description="Nested, one group and sparsify's class on the same rows.")
    options.add_argument("--layers", nargs="+", type=int, default=LAYERS, help="[%(default)s]")
    options.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="[%(default)s]")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="[%(default)s]")
    options.add_argument(
        "--steps", type=int, help="of sparsify, of 1,024 rows [as many rows as the other two see]"
    )
    options.add_argument("--train", action="store_true", help="only train what is missing")
    arguments = options.parse_args()
    if others := sorted({*arguments.layers} - {*SMOLLM2}):
        raise InputError(f"layers: expected some of {' '.join(map(str, SMOLLM2))}, found {others[0]}")
    console = Console(width=150)
    wanted = [f"SmolLM2-135M layer {layer}" for layer in arguments.layers]
    layers = [each for name, each in subjects(console, wanted) if name in wanted]
    ones = [
        each
        for seed in arguments.seeds
        for settings in layers
        for each in asked(settings, seed, arguments.steps)
        if each.kind in arguments.kinds
    ]
    if arguments.train:
        for one in ones:
            console.print(f"layer {one.layer}, seed {one.seed}, {one.kind}: {one.path}", highlight=False)
            ensure(one)
        return
    for one in ones:
        if not is_trained(one):
            console.print(f"left out, not trained (--train): {one.path}", highlight=False)
    results: dict[str, dict[str, Any]] = {}
    for layer in arguments.layers:
        if own := [one for one in ones if one.layer == layer and is_trained(one)]:
            results[str(layer)] = of_layer(own)
            keep(RESULTS, results)
    console.print(table(results))


if __name__ == "__main__":
    run_stage(main)
