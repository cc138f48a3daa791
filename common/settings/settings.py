"""All sections together, where the artifacts live, and what a mistake in them is told."""

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import InputError
from common.settings.sections import (
    Data,
    Evaluate,
    Harvest,
    Model,
    Paths,
    Section,
    Sweep,
    Train,
    Transcoder,
    Wandb,
)


def model_slug(model: str) -> str:
    """The last part of a model's name, lower-case, without .gguf: gemma-2-2b of google/gemma-2-2b."""
    return Path(model).name.lower().removesuffix(".gguf")


class Settings(BaseModel):
    """Everything a stage needs to know; written beside every artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(default=(), description="Layers asked for with --layer.")
    profile: str | None = None
    run: str = "default"
    harvest_name: str | None = None
    model: Model = Model()
    data: Data = Data()
    harvest: Harvest = Harvest()
    transcoder: Transcoder = Transcoder()
    train: Train = Train()
    sweep: Sweep = Sweep()
    wandb: Wandb = Wandb()
    evaluate: Evaluate = Evaluate()
    paths: Paths = Paths()

    @property
    def layer(self) -> int:
        """The one layer of a stage that takes one."""
        if len(self.layers) != 1:
            layers = " ".join(map(str, self.layers)) or "none"
            raise InputError(f"layer: expected one layer, found {layers}; give LAYER=17 (--layer 17)")
        return self.layers[0]

    def of_layer(self, layer: int) -> "Settings":
        """The same for this layer alone."""
        return self.model_copy(update={"layers": (layer,)})

    @property
    def model_slug(self) -> str:
        """Directory name of the model; raises `InputError` where its name does not end in one."""
        slug = model_slug(self.model.name)
        if slug in ("", "..") or re.search(r"[\\\x00-\x1f\x7f]", slug):
            raise InputError(
                f"model.name: {self.model.name!r} does not end in a name for a directory; give its full path"
            )
        return slug

    def store_path(self, layer: int) -> str:
        """Directory or address of a layer's store."""
        suffix = f"_{self.harvest_name}" if self.harvest_name else ""
        return f"{self.paths.activations.rstrip('/')}/{self.model_slug}/layer_{layer}{suffix}.zarr"

    def run_dir(self) -> Path:
        """Directory of the run of one layer; raises `InputError` when several were asked for."""
        return self.paths.checkpoints / "transcoder" / self.model_slug / f"layer_{self.layer}" / self.run

    def command(self, target: str, layers: str = "", *, run: bool = True) -> str:
        """`make target` for these layers (one: its own), profile, harvest and run: an error's remedy."""
        asked = {"LAYER": layers or f"{self.layer}", "PROFILE": self.profile, "HARVEST": self.harvest_name}
        if run:
            asked["RUN"] = self.run
        given = (f"{name}={shlex.quote(value)}" for name, value in asked.items() if value)
        return " ".join(["make", target, *given])

    def set_dir(self) -> Path:
        """Directory of what belongs to the runs of one name in all layers together."""
        return self.paths.checkpoints / "transcoder" / self.model_slug / "sets" / self.run


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def validated(values: Any, source: str) -> Settings:
    """Settings from plain values; raises `InputError` that names `source`, the first wrong key and what is allowed."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {first_mistake(error)}") from error


def first_mistake(error: ValidationError) -> str:
    """The first wrong key, what is allowed and what was found, in one line."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    if first["type"] == "extra_forbidden":
        known = SECTIONS[where[0]].model_fields if len(where) > 1 and where[0] in SECTIONS else SECTIONS
        every = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]
        return (
            f"unknown setting {key}{nearest(key, [*SECTIONS, *every]) or '; known are ' + ', '.join(known)}"
        )
    if key and first["type"] in ("model_type", "dict_type"):
        return f"{key}: expected a section [{key}] with its keys, found {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = re.sub("^expected (?=greater|less)", "expected a number ", message)
    if first["type"] == "too_short":
        message = "expected at least one value"
    value = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{key}: {message}{value}".removeprefix(": ")


def nearest(name: str, known: Sequence[str]) -> str:
    """A question after the name that may have been meant: the same word in a section, or one that is spelt alike."""
    section, dot, word = name.rpartition(".")
    near = [each for each in known if each.endswith(f".{word.lstrip('-')}")]
    beside = [each for each in known if dot and each.startswith(section + dot)]
    if not near and beside:  # by the last word alone: all names of a section are alike
        words = [each.rpartition(".")[2] for each in beside]
        near = [section + dot + each for each in difflib.get_close_matches(word, words, 1)]
    elif not near:
        near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {' or '.join(near)}?" if near else ""
