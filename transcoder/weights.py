"""The file `transcoder.safetensors`: named tensors, and metadata as JSON strings in its header.

Above `MAX_FILE` the large tensors have files of their own beside it, as on the Hugging Face hub:

    transcoder-00001-of-00002.safetensors   W_dec; its header has a digest of the transcoder's metadata, `part_of`
    transcoder-00002-of-00002.safetensors   W_enc
    transcoder.safetensors.index.json       which tensor is in which file, for other tools; we do not read it
    transcoder.safetensors                  the rest, and the metadata: `parts` has those files' names and sha256

transcoder.safetensors is written last, and its own digest stands for all files.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.errors import InputError
from common.files import inside, obey_umask, publish, sha256, write_whole
from common.identity import differs
from common.settings import Settings
from transcoder import tensor_files

FILE_NAME = "transcoder.safetensors"
MAX_FILE = 5 * 10**9
"""Bytes of tensors in one file; the Hugging Face hub's tools split above this."""
LARGE = 10
"""In a split transcoder each tensor of more than `MAX_FILE` / `LARGE` has a file of its own; the rest together then
stays far below the limit."""
PARTS = "transcoder-?????-of-?????.safetensors"
"""Names of such files, as a pattern."""
CHECKPOINT = "state/latest"
"""What a run has from its first checkpoint on (train/checkpoint.py)."""
BEGUN = "settings.json"
"""What a run has from its beginning on (train/record.py); an imported one has none."""
FORMAT = "matryoshka-transcoder"
FORMAT_VERSION = 1
RECORDS = {"settings", "source", "versions", "heldout", "training"}
"""Metadata that are JSON objects, if a header has them."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write whole: aside, flushed to disk, then renamed; a reader never sees half a file.

    `path`: the file, or the directory it belongs in, here and in the functions below. A tensor is converted to float32
    and copied to the host in blocks of rows.
    """
    try:
        begin(path, tensor_files.shapes_of(tensors), metadata)
        for name, tensor in tensors.items():
            put(path, name, 0, tensor, flushed=False)
        commit(path)
    except BaseException:
        drop(path)
        raise


def begin(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> None:
    """Make the files aside, at their full size, with float32 tensors that are all zero.

    One process calls it; then any processes write rows with `put`; when all rows are there, one process calls `commit`.
    All of them must see the same file system. Removes what a killed process has left.
    """
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _asides(path):
        left.unlink()
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **metadata}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in header.items()}
    parts, own = _split(path, shapes)
    if parts:
        texts["parts"] = json.dumps(dict.fromkeys(parts, "0" * 64))  # `commit` knows the digests
    for name, tensors in parts.items():
        tensor_files.create(_aside(path.with_name(name)), tensors, {"part_of": _identity(texts)})
    tensor_files.create(_aside(path), own, texts)


def put(path: Path, name: str, start: int, rows: Tensor, flushed: bool = True) -> None:
    """Write `rows` as rows [start, start + len(rows)) of tensor `name`; if `flushed`, wait until they are on disk.

    Any process may call it, between `begin` and `commit`. Raises `ValueError` for rows that do not fit, and `OSError`
    that names the file if the disk refuses.
    """
    path = _file(path)
    _, _, texts = tensor_files.contents(_aside(path))
    for each in (path, *(path.with_name(part) for part in _parts(texts))):
        if name in tensor_files.contents(_aside(each))[1]:
            tensor_files.put(_aside(each), name, start, rows, flushed)
            return
    raise ValueError(f"{path}: no tensor {name} was begun")


def commit(path: Path) -> None:
    """Rename the files into their places, last the one that marks a finished run.

    One process calls it, when all rows are there. If several files replace those of another transcoder, the run is
    unfinished between the first rename and the last.
    """
    path = _file(path)
    aside = _aside(path)
    _, entries, texts = tensor_files.contents(aside)
    files = [path.with_name(name) for name in _parts(texts)]
    index = path.with_name(f"{path.name}.index.json")
    if files:
        with ThreadPoolExecutor(len(files)) as threads:
            digests = list(threads.map(sha256, map(_aside, files)))
        texts["parts"] = json.dumps({file.name: digest for file, digest in zip(files, digests, strict=True)})
        tensor_files.set_metadata(aside, texts)
        where = dict.fromkeys(entries, path.name)
        for file in files:
            where |= dict.fromkeys(tensor_files.contents(_aside(file))[1], file.name)
        size = sum(_data_size(each) for each in map(_aside, (path, *files)))
        path.unlink(missing_ok=True)
        for file in files:
            publish(_aside(file), file)
        listed = {"metadata": {"total_size": size}, "weight_map": where}
        write_whole(index, (json.dumps(listed, indent=2, sort_keys=True) + "\n").encode())
    publish(aside, path)
    for old in [*_beside(path), *([] if files else [index])]:
        if old not in files:
            old.unlink(missing_ok=True)


def drop(path: Path) -> None:
    """Remove what was begun and is not to be finished."""
    for aside in _asides(_file(path)):
        aside.unlink(missing_ok=True)


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _asides(path: Path) -> list[Path]:
    return [each for each in (_aside(path), *_beside(path, ".tmp")) if each.exists()]


def _beside(path: Path, ending: str = "") -> list[Path]:
    """The files of large tensors beside `path`, whichever transcoder they belong to."""
    name = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}\.safetensors" + re.escape(ending))
    return sorted(each for each in path.parent.iterdir() if name.fullmatch(each.name))


def files_of(run_dir: Path) -> list[Path]:
    """The files of a directory's finished transcoder."""
    file = run_dir / FILE_NAME
    index = file.with_name(f"{file.name}.index.json")
    return [file, *_beside(file), *([index] if index.exists() else [])]


def _split(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    """(tensors of each file beside `path`, tensors of `path` itself)."""
    sizes = {name: tensor_files.size_of(shape) for name, shape in shapes.items()}
    whole = sum(sizes.values()) <= MAX_FILE
    large = [] if whole else [name for name in sorted(sizes) if sizes[name] > MAX_FILE / LARGE]
    parts = {
        f"{path.stem}-{i:05d}-of-{len(large):05d}.safetensors": {name: shapes[name]}
        for i, name in enumerate(large, 1)
    }
    return parts, {name: shape for name, shape in shapes.items() if name not in large}


def _parts(texts: Mapping[str, str]) -> list[str]:
    """Names of the other files of a transcoder that is being written."""
    return [*json.loads(texts.get("parts", "{}"))]


def _identity(texts: Mapping[str, str]) -> str:
    """Digest of a transcoder's metadata; files with the same one belong together."""
    return hashlib.sha256(json.dumps({**texts, "parts": ""}, sort_keys=True).encode()).hexdigest()


def _data_size(path: Path) -> int:
    return path.stat().st_size - tensor_files.contents(path)[0]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in its place, with the permissions that the umask gives a new file. Raises `OSError`
    that names it if the disk refuses: safetensors' own class of errors does not tell a full disk from a defect.
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
    """(tensors, metadata) of a file or of the run directory that holds it; the tensors are maps of the files on disk.

    Raises `InputError` when one of its files is missing, damaged, foreign or of another version.
    """
    file = _present(path)
    tensors, texts = tensor_files.mapped(file)
    metadata, digests = _checked(file, tensors, texts)
    for name in digests:
        part = inside(file.parent, name)
        if not part.is_file():
            raise InputError(
                f"{part}: not found; it is one of the {len(digests) + 1} files of {file}: copy all of them"
            )
        more, told = tensor_files.mapped(part)
        if told.get("part_of") != _identity(texts):
            raise InputError(
                f"{part}: belongs to another transcoder than {file}; copy all of its files together"
            )
        tensors |= more
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone; raises as `read` does."""
    file = _present(path)
    return _checked(file, *tensor_files.mapped(file))[0]


def _present(path: Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: no transcoder here; train one, or give a run directory that holds {FILE_NAME}"
        )
    return path


def _checked(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, the other files with their digests) from a file's header."""
    if "part_of" in texts:
        raise InputError(
            f"{path}: a part of a transcoder; give its directory, or the file there without -of- in its name"
        )
    if "format_version" not in texts:
        raise InputError(f"{path}: {_foreign(set(tensors))}")
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    _check_format(path, metadata)
    for key in (RECORDS | {"parts"}) & metadata.keys():
        if not isinstance(metadata[key], dict):
            raise InputError(f"{path}: {key}: expected a JSON object, found {metadata[key]!r:.80}")
    return metadata, metadata.pop("parts", {})


def _foreign(names: set[str]) -> str:
    """What to say of a safetensors file that this project has not written, by the names of its tensors."""
    shown = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"expected {FORMAT} version {FORMAT_VERSION}, found none: another tool's file ({shown}); this project reads "
        "its own runs and transcoders of SAELens, Gemma Scope, circuit-tracer and sparsify"
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
