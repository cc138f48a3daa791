"""A layer set on disk: a harvested tiny model, random transcoders in every layer, evaluated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.cli import load, parser
from common.settings import Settings
from evaluate.run import evaluate
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder

ENDS = (4, 9)
LAYERS = (0, 1, 2)
RUN = "tiny"


def settings_at(root: Path, model: Path, corpus: Path, layer: str = "0 1 2", *more: str) -> Settings:
    """Settings of the set below `root`."""
    values = {
        "--layer": layer,
        "--run": RUN,
        "--model.name": str(model),
        "--model.device": "cpu",
        "--data.files": str(corpus),
        "--data.pack": "concat",
        "--harvest.rows": "2000",
        "--harvest.context_length": "32",
        "--harvest.heldout_fraction": "0.1",
        "--wandb.mode": "disabled",
        "--paths.activations": str(root / "activations"),
        "--paths.checkpoints": str(root / "checkpoints"),
    }
    return load(parser("evaluate", ""), [*(word for pair in values.items() for word in pair), *more])[0]


def one(settings: Settings, layer: int) -> Settings:
    return settings.model_copy(update={"layers": (layer,)})


def save_coder(settings: Settings, layer: int, ends: tuple[int, ...] = ENDS, seed: int | None = None) -> None:
    """A random transcoder in the layer's run directory, as training leaves it."""
    store = Store.open(settings.store_path(layer))
    source = store.manifest.source.model_dump(mode="json")
    coder = random_coder(32, 32, ends, seed=layer if seed is None else seed, layer=layer)
    folder = one(settings, layer).run_dir()
    folder.mkdir(parents=True, exist_ok=True)
    replace(
        coder, metadata={"source": source, "harvest_fingerprint": store.manifest.fingerprint}
    ).save(folder)


def make_set(
    settings: Settings, ce_tokens: Callable[[int], int] = lambda layer: 64
) -> Settings:
    harvest(settings)
    for layer in settings.layers:
        save_coder(settings, layer)
        evaluate(one(settings, layer), ce_tokens(layer))
    return settings
