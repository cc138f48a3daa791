"""A store and a run directory on disk, as harvest and train leave them, made in the process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import load, parser
from common.settings import Settings
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store
from transcoder import Transcoder

D_IN, D_OUT, ENDS, K = 6, 5, (4, 10, 24), 4


def arguments(root: Path, *more: str) -> list[str]:
    """Command line of the tiny run below `root`."""
    paths = [
        "--paths.activations",
        str(root / "activations"),
        "--paths.checkpoints",
        str(root / "checkpoints"),
    ]
    return [
        "--layer",
        "0",
        "--run",
        "tiny",
        "--model.name",
        "tests/tiny",
        "--wandb.mode",
        "disabled",
        *paths,
        *more,
    ]


def settings_of(root: Path, *more: str) -> Settings:
    return load(parser("evaluate", ""), arguments(root, *more))[0]


def tiny_transcoder(seed: int = 0) -> Transcoder:
    return random_coder(D_IN, D_OUT, ENDS, seed=seed)


def make_run(
    root: Path,
    transcoder: Transcoder | None = None,
    vocabulary: list[str] | None = None,
    heldout: int = 1500,
    constant: bool = False,
    **source: Any,
) -> Store:
    """Store, weights, settings and log of the run "tiny"; outputs are a noisy linear map of the inputs, or constant.

    `source`: what the store was harvested from, its layer too.
    """
    settings = settings_of(root, "--layer", str(source.get("layer", 0)))
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((D_IN, D_OUT)).astype(np.float32)

    def rows(n: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.standard_normal((n, D_IN)).astype(np.float32)
        noise = 0.1 * rng.standard_normal((n, D_OUT)).astype(np.float32)
        return inputs, np.ones_like(noise) if constant else inputs @ mixing + noise + 1

    store = make_store(
        settings.store_path(settings.layer), rows(2000), rows(heldout), vocabulary=vocabulary, **source
    )
    run_dir = settings.run_dir()
    run_dir.mkdir(parents=True)
    saved = settings.model_dump(mode="json")
    saved["transcoder"] |= {"k": K, "group_sizes": np.diff((0, *ENDS)).tolist(), "d_sae": ENDS[-1]}
    record = {"settings": saved, "harvest_fingerprint": store.manifest.fingerprint}
    source = store.manifest.source.model_dump(mode="json")
    replace(transcoder or tiny_transcoder(), metadata=record | {"source": source}).save(run_dir)
    (run_dir / "settings.json").write_text(json.dumps(record | {"d_in": D_IN}))
    lines = [log_line(step) for step in range(50, 301, 50)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return store


def log_line(step: int) -> dict[str, float]:
    line = {"step": step, "rows": 1024 * step, "loss": 1.0 / step, "l2_loss": 0.9 / step, "fvu": 10 / step}
    if step % 100 == 0:
        line |= {f"heldout_fvu/prefix_{g}": 0.5 / (g + 1) + 5 / step for g in range(len(ENDS))}
    return line
