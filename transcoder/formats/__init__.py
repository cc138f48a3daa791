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
from transcoder.formats import gemma_scope, saelens

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by our names, metadata."""

READERS: dict[str, Callable[[Path], Saved]] = {
    weights.FILE_NAME: weights.read,
    gemma_scope.FILE_NAME: gemma_scope.read,
    saelens.FILE_NAME: saelens.read,
}
WRITERS: dict[str, Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], Path]] = {
    "saelens": saelens.write,
    "gemma_scope": gemma_scope.write,
}
"""By FORMAT; each writes below a directory and returns the one to load. A set of layers: circuit_tracer.py."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
BESIDE = ("settings.json", saelens.CONFIG_NAME)
"""What a transcoder's directory holds besides the weights."""


def fetched(path: str | Path) -> Path:
    """The local path of a directory or file; hf://owner/name/path is downloaded into the hub's cache."""
    if not hub.is_hub(path):
        return Path(path)
    return hub.download(str(path), (*READERS, *BESIDE))


def weights_file(path: Path) -> Path:
    """The file of weights in a directory, or `path` itself; raises `InputError` when there is none."""
    path = path.parent if path.name == saelens.CONFIG_NAME else path
    files = [path / name for name in READERS] if path.is_dir() else [path]
    weights_path = next((file for file in files if file.is_file()), None)
    if weights_path is not None and weights_path.suffix in PICKLES:
        raise InputError(
            f"{weights_path}: a pickle, which is not read; save its tensors as SAELens' or Gemma Scope's files"
        )
    if weights_path is None:
        if (path / "settings.json").is_file():
            raise InputError(
                f"{path}: interrupted, or still training; its weights are written when it ends: rerun the same make "
                "train to continue; make evaluate ARGS='--evaluate.checkpoint true' evaluates the checkpoint"
            )
        if (path / "config.yaml").is_file() and (layers := sorted(path.glob("layer_*.safetensors"))):
            return layers[0]  # circuit-tracer's set: its reader says what it is
        raise InputError(
            f"{path}: no transcoder here; expected {weights.FILE_NAME} (a run of ours), {gemma_scope.FILE_NAME} "
            f"(Gemma Scope) or {saelens.FILE_NAME} (SAELens)"
        )
    return weights_path


def read(path: Path) -> Saved:
    """What the file or directory at `path` holds; raises `InputError` naming the file and what is wrong."""
    file = weights_file(path)
    reader = gemma_scope.read if file.suffix == ".npz" else READERS.get(file.name, weights.read)
    return reader(file)
