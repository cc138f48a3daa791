"""What leaves this machine with a transcoder: the model's name instead of its place, and no path of this machine."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

LOADED_AS = {"embedded/smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded models by the names under which other tools can load them."""
ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOCAL = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[\\/]|file:")
"""How a path of this machine begins; one that begins with a name is told by its being there."""


def public_name(model: str) -> str:
    """What others call the model that `model.name` says: a hub name, else the last part of its path.

    A directory of huggingface_hub's cache has its name in its path; another may have it in config.json.
    """
    if model in LOADED_AS:
        return LOADED_AS[model]
    path = Path(model)
    if not path.is_dir():
        if path.suffix.lower() == ".gguf":
            return _words(path.stem)
        if ON_HUB.fullmatch(model):
            return model
    if cached := re.search(
        r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/", path.absolute().as_posix() + "/"
    ):
        return "/".join(cached.groups())
    return _said_by(path / "config.json") or _words(last_part(os.path.normpath(path.absolute())))


def _said_by(config: Path) -> str | None:
    """A config.json's `_name_or_path`, where it is a hub name and not where a training has kept its checkpoints."""
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    on_hub = isinstance(name, str) and ON_HUB.fullmatch(name) and not _is_local(name)
    return name if on_hub and not re.search(r"/checkpoint-\d+$|^embedded/", name) else None


def _words(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "model"


def published(metadata: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A transcoder's metadata as they may be seen by others; without [paths].

    The model is called `name`, or else what its run's model.public_name says, or what `public_name` made of it when
    it was trained, or makes of it now. Files and directories are their last parts.
    """
    source, settings = dict(metadata.get("source", {})), dict(metadata.get("settings", {}))
    model = source.get("model")
    names = [name, settings.get("model", {}).get("public_name"), metadata.get("public_name")]
    known = next((each for each in names if isinstance(each, str)), None)
    known = known or (public_name(model) if isinstance(model, str) else None)
    shown = {**metadata, "source": source}
    if known is not None:
        source["model"] = known
        shown["public_name"] = known
    if "files" in source:
        source["files"] = _each(source["files"], last_part)
    if settings:
        settings.pop("paths", None)
        for section, key in (("model", "name"), ("data", "files"), ("train", "init_from")):
            part = dict(settings.get(section, {}))
            if key in part:
                part[key] = known if section == "model" else _each(part[key], last_part)
            settings[section] = part
        shown["settings"] = settings
    return _each(shown, lambda text: last_part(text) if _is_local(text) else text)


def _is_local(text: str) -> bool:
    if "://" in text and not text.startswith("file:"):
        return False
    try:
        return bool(LOCAL.match(text)) or ("/" in text and Path(text).exists())
    except (OSError, ValueError):  # no name that a file could have
        return False


def last_part(text: str) -> str:
    """The last part of a path; an address stays whole."""
    if "://" in text and not text.startswith("file:"):
        return text
    return PurePath(text.replace("\\", "/")).name


def _each(value: Any, change: Any) -> Any:
    """The same JSON value with `change` made to every string, names of keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each(each, change) for key, each in value.items()}
    return [_each(each, change) for each in value] if isinstance(value, list | tuple) else value
