"""The file `transcoder.safetensors`: named tensors, and metadata as JSON strings in its header."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import InputError
from common.files import obey_umask, publish
from common.identity import differs
from common.settings import Settings

FILE_NAME = "transcoder.safetensors"
CHECKPOINT = "state/latest"
"""What a run has from its first checkpoint on (train/checkpoint.py)."""
BEGUN = "settings.json"
"""What a run has from its beginning on (train/record.py); an imported one has none."""
FORMAT = "matryoshka-transcoder"
FORMAT_VERSION = 1
RECORDS = {"settings", "source", "versions", "heldout", "training"}
"""Objects of a header, where it has them."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write whole: aside, flushed to disk, then renamed; a reader never sees half a file."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **metadata}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        save_tensors(
            aside, tensors, {key: json.dumps(value, sort_keys=True) for key, value in header.items()}
        )
        publish(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in its place, as readable as the umask lets a new file be. Raises `OSError` naming it
    where the disk refuses: safetensors' own class of errors does not tell a full disk from a defect.
    """
    try:
        save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, path, metadata)
    except SafetensorError as error:
        if match := re.search(r"os error (\d+)", str(error)):
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    obey_umask(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file or of the run directory that holds it.

    Raises `InputError` when the file is missing, damaged, foreign or of another version.
    """
    with _opened(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone; raises as `read` does."""
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: no transcoder here; train one, or give a run directory that holds {FILE_NAME}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "format_version" not in header:
                raise InputError(f"{path}: {_foreign(set(file.keys()))}")
            metadata = {key: json.loads(text) for key, text in header.items()}
            _check_format(path, metadata)
            for key in RECORDS & metadata.keys():
                if not isinstance(metadata[key], dict):
                    raise InputError(f"{path}: {key}: expected a JSON object, found {metadata[key]!r:.80}")
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error


def _foreign(names: set[str]) -> str:
    """What to say of a safetensors file that this project has not written, by the names of its tensors."""
    shown = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"expected {FORMAT} version {FORMAT_VERSION}, found none: another tool's file ({shown}); read are runs of this "
        "project and transcoders of SAELens, Gemma Scope, circuit-tracer and sparsify"
    )


def _check_format(path: Path, metadata: dict[str, Any]) -> None:
    version = metadata.pop("format", None), metadata.pop("format_version", None)
    if version != (FORMAT, FORMAT_VERSION):
        raise InputError(
            f"{path}: expected {FORMAT} version {FORMAT_VERSION}, found {version[0]} version {version[1]}; "
            "use the version of this project that wrote it"
        )


def threshold_of_each(tensors: Mapping[str, Tensor]) -> Tensor:
    """[F] the whole dictionary's threshold of every latent, however the file's `thresholds` are kept."""
    return tensors["thresholds"][-1].expand(len(tensors["W_enc"])).contiguous()


def check_shape(path: Path, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> Tensor:
    """The tensor itself, if it is there, float32, and of the expected shape."""
    if tensor is None:
        raise InputError(f"{path}: tensor {name}: expected shape {list(expected)}, found none")
    if tuple(tensor.shape) != expected or tensor.dtype != torch.float32:
        raise InputError(
            f"{path}: tensor {name}: expected float32 {list(expected)}, "
            f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
    return tensor


def refuse_another_model(run_dir: Path, settings: Settings) -> None:
    """Raise `InputError` when there is a finished run that is of another model than is asked for.

    Run directories are named after the last part of the model's name, which two models may share. What was imported
    from another tool has no settings, and passes.
    """
    metadata = read_metadata(run_dir) if (run_dir / FILE_NAME).is_file() else {}
    if metadata.get("settings") and (other := differs(settings.model, metadata.get("source") or {})):
        raise InputError(
            f"{run_dir}: holds a run of another model than is asked for ({other}); "
            "give another name (RUN=name), or --model.name of this run"
        )


def chosen_run(settings: Settings, named: str | None, every_layer: bool | None = None) -> Settings:
    """Settings of the run that a stage reads where none is `named`; a line on standard error says which it is.

    The run that profile and training settings name, if it is there; else the newest finished one of the layer, or,
    with `every_layer` (None: where several are asked for), the newest of those that all layers asked for have (none
    asked for: all there are; no run in all: those in the most). With evaluate.checkpoint: the newest one that has a
    checkpoint. Where there is none of them, the newest that was begun: what reads it says how far it is.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    if named:
        return settings
    if len(settings.layers) > 1 if every_layer is None else every_layer:
        layers = [model / f"layer_{layer}" for layer in settings.layers] or _layers_in(model)
    else:
        layers = [settings.run_dir().parent]
    begun, finished = _ages(layers, BEGUN), _ages(layers, FILE_NAME)
    checkpoint = settings.evaluate.checkpoint
    found = (_ages(layers, CHECKPOINT) if checkpoint else finished) or begun
    if not found:
        return settings
    most = max(map(len, found.values()))
    age = {name: max(times) for name, times in found.items() if len(times) == most}
    newest = max(age, key=lambda name: (age[name], name))
    if settings.run != "default" and settings.run in found:
        later = "" if settings.run == newest else f"; the newest is {newest} (RUN={newest})"
        print(f"run {settings.run}, by its settings{later}", file=sys.stderr)
        return settings
    what = "newest checkpoint" if checkpoint and found is not begun else "newest"
    other = "; RUN=name takes another" if len(found) > 1 else ""
    print(f"run {newest}, {_place(layers, most, len(age), what)}{other}", file=sys.stderr)
    unfinished = sorted(name for name in begun.keys() - finished.keys() if max(begun[name]) > age[newest])
    if unfinished and not checkpoint:
        print(f"begun later, not finished: {', '.join(unfinished)}", file=sys.stderr)
    return settings.model_copy(update={"run": newest})


def _place(layers: Sequence[Path], most: int, n: int, newest: str) -> str:
    """Which run one is: the `newest` of `n` that `most` of the layers have.

    >>> _place([Path("layer_3")], 1, 2, "newest"), _place([Path("layer_3")], 1, 1, "newest")
    ('the newest of 2 runs of layer 3', 'the newest of layer 3')
    >>> _place([Path("layer_3"), Path("layer_4")], 2, 1, "newest")
    'the one that all 2 layers have'
    >>> _place([Path("layer_3"), Path("layer_4")], 1, 2, "newest")
    'the newest of 2 that most layers have (1 of 2)'
    """
    if len(layers) == 1:
        of = f"layer {layers[0].name.removeprefix('layer_')}"
        return f"the {newest} of {n} runs of {of}" if n > 1 else f"the {newest} of {of}"
    which = f"the {newest} of {n}" if n > 1 else "the one"
    all_of_them = (
        f"all {most} layers have" if most == len(layers) else f"most layers have ({most} of {len(layers)})"
    )
    return f"{which} that {all_of_them}"


def _layers_in(model: Path) -> list[Path]:
    """Directories of the layers that have a run; a copy put aside, layer_3_old, is none."""
    folders = [folder for folder in model.glob("layer_*") if folder.name.removeprefix("layer_").isdecimal()]
    return [folder for folder in folders if any(folder.glob(f"*/{FILE_NAME}"))]


def layers_of(settings: Settings) -> tuple[int, ...]:
    """The layers that have a finished run `settings.run`; a copy put aside, layer_3_old, is none."""
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    found = [path.parts[-3] for path in model.glob(f"layer_*/{settings.run}/{FILE_NAME}")]
    names = [name.removeprefix("layer_") for name in found]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def n_layers(settings: Settings) -> int:
    """How many layers the model has, as a run of any of them says, else a store: for LAYER=all."""
    from shards.store import n_layers  # which reads more than a header

    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    for file in sorted(model.glob(f"layer_*/*/{FILE_NAME}")):
        try:
            source = read_metadata(file).get("source") or {}
        except InputError:
            continue  # what is asked of its layer names it
        if isinstance(found := source.get("n_layers"), int) and not differs(settings.model, source):
            return found
    return n_layers(settings)


def _ages(layers: Sequence[Path], mark: str) -> dict[str, list[float]]:
    """Name -> times of a file `mark`, of the runs below the directories of layers that have one."""
    ages: dict[str, list[float]] = {}
    for layer in layers:
        for path in layer.glob(f"*/{mark}"):
            ages.setdefault(path.relative_to(layer).parts[0], []).append(path.stat().st_mtime)
    return ages
