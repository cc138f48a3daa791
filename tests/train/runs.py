"""Rows and settings of runs that take seconds."""

import sys
from pathlib import Path

import numpy as np
import torch

from common.settings import Settings
from transcoder import Transcoder

D_IN, D_OUT, CAUSES = 12, 10, 48


def sparse_rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs made of the same few active causes, so that there is something to learn."""
    causes = np.random.default_rng(1)
    to_input = causes.standard_normal((CAUSES, D_IN))
    to_output = causes.standard_normal((CAUSES, D_OUT))
    rng = np.random.default_rng(seed)
    active = (rng.random((n, CAUSES)) < 0.06) * rng.random((n, CAUSES))
    inputs, outputs = active @ to_input * 3 + 1, active @ to_output * 5 - 2
    return inputs.astype(np.float32), outputs.astype(np.float32)


def tiny_settings(store_root: Path, checkpoints: Path, run: str = "a", **changes: object) -> Settings:
    """Settings of a run of 96 steps; arguments like train__lr=1e-3 change them."""
    values: dict[str, dict[str, object]] = {
        "model": {"name": "tests/tiny", "device": "cpu"},
        "transcoder": {"d_sae": 64, "group_sizes": (8, 16, 40), "k": 4},
        "train": {
            "rows": 64 * 96,
            "batch_size": 64,
            "lr": 3e-3,
            "min_lr": 3e-5,
            "warmup_steps": 8,
            "dead_after_rows": 1500,
            "aux_k": 16,
            "checkpoint_every": 20,
            "log_every": 10,
            "heldout_every": 40,
            "sample_every": 5,
        },
        "wandb": {"mode": "disabled"},
        "paths": {"activations": str(store_root), "checkpoints": str(checkpoints)},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return Settings.model_validate({"layers": (0,), "run": run, **values})


def command(settings: Settings, *more: str) -> list[str]:
    """The command line that asks for these settings."""
    options = [sys.executable, "-m", "train", "--layer", "0", "--run", settings.run, *more]
    for section in ("model", "transcoder", "train", "wandb", "paths"):
        for key, value in getattr(settings, section):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            options += [f"--{section}.{key}", text]
    return options


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    loaded = Transcoder.load(run_dir)
    return loaded.parameters.named() | {"thresholds": loaded.thresholds}
