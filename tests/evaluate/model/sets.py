"""A layer set on disk: a harvested tiny model, random transcoders in every layer, evaluations with known numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.cli import load, parser
from common.files import sha256
from common.settings import Settings
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.golden.write import GOLDEN
from transcoder.weights import FILE_NAME

ENDS = (4, 9)
LAYERS = (0, 1, 2)
RUN = "tiny"
CLEAN = 3.0


def arguments(root: Path, model: Path, *more: str) -> list[str]:
    """Command line of the set below `root`, without its layers."""
    values = {
        "--run": RUN,
        "--model.name": str(model),
        "--model.device": "cpu",
        "--data.files": str(root / "corpus.jsonl"),
        "--data.pack": "concat",
        "--harvest.rows": "2000",
        "--harvest.context_length": "32",
        "--harvest.heldout_fraction": "0.1",
        "--paths.activations": str(root / "activations"),
        "--paths.checkpoints": str(root / "checkpoints"),
    }
    return [*(word for pair in values.items() for word in pair), *more]


def settings_at(root: Path, model: Path, *more: str, layer: str = "0 1 2") -> Settings:
    return load(parser("evaluate", ""), [*arguments(root, model, *more), "--layer", layer])[0]


def one(settings: Settings, layer: int) -> Settings:
    return settings.of_layer(layer)


def save_coder(settings: Settings, layer: int, ends: tuple[int, ...] = ENDS, seed: int | None = None) -> None:
    """A random transcoder in the layer's run directory, as training leaves it."""
    store = Store.open(settings.store_path(layer))
    source = store.manifest.source.model_dump(mode="json")
    coder = random_coder(32, 32, ends, seed=layer if seed is None else seed, layer=layer)
    folder = one(settings, layer).run_dir()
    folder.mkdir(parents=True, exist_ok=True)
    replace(coder, metadata={"source": source, "harvest_fingerprint": store.manifest.fingerprint}).save(
        folder
    )


def increase_of(layer: int, g: int) -> float:
    """Of the cross-entropy with this MLP alone replaced."""
    return 0.3 * (layer + 1) / (g + 1)


def save_evaluation(
    settings: Settings, layer: int, ends: tuple[int, ...] = ENDS, cross_entropy: bool = True, **changes: Any
) -> None:
    """metrics.json and a page, as evaluate leaves them; `changes`: of the provenance."""
    values = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))
    store, run_dir = Store.open(settings.store_path(layer)), one(settings, layer).run_dir()
    lines = []
    for g, end in enumerate(ends):
        language = {"cross_entropy": CLEAN + increase_of(layer, g), "kl": 0.1, "recovered_mean": 0.5}
        language["recovered_zero"] = 0.9 - 0.1 * layer
        line = values["prefixes"][0] | {"end": end, "fvu": 0.1 * (layer + 1) / (g + 1), "l0": 2.0 + layer + g}
        lines.append(line | {"cross_entropy": language if cross_entropy else None})
    measured = values["cross_entropy"] | {"clean": CLEAN}
    provenance = values["provenance"] | {
        "run": RUN,
        "layer": layer,
        "split": "heldout",
        "store_fingerprint": store.manifest.fingerprint,
        "weights_sha256": sha256(run_dir / FILE_NAME),
    }
    values |= {"prefixes": lines, "provenance": provenance | changes, "files": ["report.html"]}
    values["cross_entropy"] = measured if cross_entropy else {"skipped": "it was not asked for"}
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    (folder / "report.html").write_text("<p>a layer's page")
    (folder / "metrics.json").write_text(json.dumps(values))


def make_set(root: Path, model: Path, corpus: Path) -> Settings:
    """The whole set below `root`."""
    shutil.copy(corpus, root / "corpus.jsonl")
    settings = settings_at(root, model)
    harvest(settings)
    for layer in LAYERS:
        save_coder(settings, layer)
        save_evaluation(settings, layer)
    return settings
