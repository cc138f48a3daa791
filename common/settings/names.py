"""A run's name, made of the settings that differ from the defaults."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from common.settings.settings import Settings

FREE = ("checkpoint_every", "log_every", "heldout_every", "sample_every", "latent_shards")
"""Settings of train that may change during a run and are not part of its name: they do not affect the weights, or only
their rounding."""
SHORT = {
    "group_sizes": "groups",
    "warmup_steps": "warmup",
    "dead_after_rows": "dead",
    "density_limit": "density",
}
"""What a setting is called in a run's name, where that is not its own name."""
NAME_LENGTH = 80
"""Longest automatic name; of what is beyond it, a digest stands for all that differs."""


def run_name(first: str, parts: Sequence[str]) -> str:
    """`first` and the parts (see `changes`), whole; of a long name what fits, and a digest of all."""
    name = "-".join([first, *parts])
    if len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256("-".join(parts).encode()).hexdigest()[:8]
    kept = list(parts)
    while kept and len("-".join([first, *kept, digest])) > NAME_LENGTH:
        kept.pop()
    return "-".join([first, *kept, digest])


def changes(base: Settings, settings: Settings) -> list[str]:
    """Key and value, as parts of a name, of every setting that decides a run's weights and differs from `base`."""
    return [
        f"{SHORT.get(key, key)}{_short(value)}"
        for section in ("transcoder", "train")
        for key, value in getattr(settings, section)
        if key not in FREE and value != getattr(getattr(base, section), key)
    ]


def _short(value: Any) -> str:
    items = value if isinstance(value, tuple) else (value,)
    return re.sub(
        r"[^A-Za-z0-9._+=]", "_", "_".join(_number(x) if isinstance(x, float) else str(x) for x in items)
    )


def _number(value: float) -> str:
    """The shorter of the ways to write it that lose nothing."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
