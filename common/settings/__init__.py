"""The settings of every stage, frozen and validated, and where the artifacts live. A leaf: imports nothing of ours.

`pipeline.toml` overrides the defaults here; common/cli.py merges it with profile, recipe and command line.
"""

from common.settings.names import FREE, changes, run_name
from common.settings.sections import (
    ROOT,
    Data,
    Evaluate,
    Harvest,
    Model,
    Paths,
    Sweep,
    Train,
    Transcoder,
    Wandb,
    latents,
)
from common.settings.settings import SECTIONS, Settings, first_mistake, model_slug, nearest, validated

__all__ = [
    "FREE",
    "ROOT",
    "SECTIONS",
    "Data",
    "Evaluate",
    "Harvest",
    "Model",
    "Paths",
    "Settings",
    "Sweep",
    "Train",
    "Transcoder",
    "Wandb",
    "changes",
    "first_mistake",
    "latents",
    "model_slug",
    "nearest",
    "run_name",
    "validated",
]
