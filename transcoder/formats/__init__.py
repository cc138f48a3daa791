"""Files that hold a transcoder: ours (transcoder/weights.py) and other tools', reading and writing in one file each.

Every reader gives, and every writer takes, tensors by our names (W_enc [F, D_in], b_enc [F], W_dec [F, D_out],
b_dec [D_out], thresholds [G] or [G, F], W_skip [D_out, D_in] or absent) and metadata: `prefix_ends` [G], and
under `source` what the store's manifest says of model, layer, hooks and gain, as far as it is known.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common import hub
from common.errors import InputError
from transcoder import weights
from transcoder.formats import circuit_tracer_set, gemma_scope, gemma_scope_2, saelens, sparsify

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by our names, metadata."""

READERS: dict[str, Callable[[Path], Saved]] = {
    weights.FILE_NAME: weights.read,
    gemma_scope.FILE_NAME: gemma_scope.read,
    saelens.FILE_NAME: saelens.read,
    gemma_scope_2.FILE_NAME: gemma_scope_2.read,
    sparsify.FILE_NAME: sparsify.read,
}
"""By the name of the file of weights; a layer of a circuit-tracer set is told by what is in it."""
WRITERS: dict[str, Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], Path]] = {
    "saelens": saelens.write,
    "gemma_scope": gemma_scope.write,
    "gemma_scope_2": gemma_scope_2.write,
}
"""By FORMAT; each writes below a directory and returns the one to load. A set of layers: circuit_tracer.py."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
CONFIGS = (saelens.CONFIG_NAME, gemma_scope_2.CONFIG_NAME, circuit_tracer_set.CONFIG_NAME)
"""What other tools keep beside the weights; given instead of them, it stands for its directory."""
EXPECTED = (
    f"{weights.FILE_NAME} (a run of ours), {gemma_scope.FILE_NAME} or {gemma_scope_2.FILE_NAME} (Gemma Scope), "
    f"{saelens.FILE_NAME} (SAELens), {sparsify.FILE_NAME} (sparsify) or {circuit_tracer_set.CONFIG_NAME} and "
    "layer_N.safetensors (circuit-tracer)"
)


def fetched(path: str | Path, layer: int | None = None) -> Path:
    """The local path of a directory or file; hf://owner/name/path is downloaded into the hub's cache.

    Of a set of layers in one directory (circuit-tracer's, sparsify's) that of `layer`, downloaded alone.
    """
    if not hub.is_hub(path):
        return _of_layer(Path(path), layer)
    beside = [
        "settings.json",
        *(f"{where}{name}" for name in (*CONFIGS, weights.PARTS) for where in ("", "../")),
    ]
    if layer is not None:
        files = (sparsify.FILE_NAME, sparsify.CONFIG_NAME)
        beside += [circuit_tracer_set.layer_file(layer), *(f"*.{layer}.mlp/{name}" for name in files)]
    return _of_layer(hub.download(str(path), tuple(READERS), beside), layer)


def _of_layer(path: Path, layer: int | None) -> Path:
    """What a directory holds of `layer`, if it is a set; else `path` itself."""
    if path.name in CONFIGS and path.is_file():
        path = path.parent
    if not path.is_dir() or _weights_in(path):
        return path
    if (path / circuit_tracer_set.CONFIG_NAME).is_file():
        return circuit_tracer_set.of_layer(path, layer)
    folders = [] if layer is None else sparsify.layer_folders(path, layer)
    return folders[0] if len(folders) == 1 else path


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in READERS if (folder / name).is_file()), None)


def weights_file(path: Path) -> Path:
    """The file of weights in a directory, or `path` itself; raises `InputError` when there is none."""
    path = _of_layer(path, None)
    weights_path = _weights_in(path) if path.is_dir() else path
    if weights_path is None and path.is_dir():
        weights_path = next((each for each in sorted(path.iterdir()) if each.suffix in PICKLES), None)
    if weights_path is not None and weights_path.suffix in PICKLES and weights_path.is_file():
        raise InputError(
            f"{weights_path}: a pickle, which is not read; save its tensors as SAELens' or Gemma Scope's files"
        )
    if weights_path is None or not weights_path.is_file():
        if (path / "settings.json").is_file():
            raise InputError(
                f"{path}: interrupted, or still training; its weights are written when it ends: rerun the same make "
                "train to continue; make evaluate ARGS='--evaluate.checkpoint true' evaluates the checkpoint"
            )
        raise InputError(f"{path}: no transcoder here; expected {EXPECTED}{_below(path)}")
    return weights_path


def _below(path: Path) -> str:
    """The directories in `path` that hold one, in words; nothing where none does."""
    there = [each.name for each in sorted(path.iterdir()) if _weights_in(each)] if path.is_dir() else []
    more = f" and {len(there) - 3} more" if len(there) > 3 else ""
    return f"; there is one in {', '.join(there[:3])}{more} below it" if there else ""


def read(path: Path) -> Saved:
    """What the file or directory at `path` holds; raises `InputError` naming the file and what is wrong."""
    file = weights_file(path)
    if file.suffix == ".npz":
        return gemma_scope.read(file)
    layer = circuit_tracer_set.is_layer
    return READERS.get(file.name, circuit_tracer_set.read if layer(file) else weights.read)(file)
