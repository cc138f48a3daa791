"""The language model's own losses on a store's text: unchanged, with an MLP zeroed, with its mean output.

These losses do not depend on a transcoder. The first evaluation keeps them, every other one reads them: beside the
store, in <store>.losses, or in the cache (paths.cache) for a remote store or one whose directory is not writable. A
file's name is a digest of everything that decides its values, so that one of another model, layer, text, number of
tokens, dtype or kind of device is never read. The files may be removed at any time.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import InputError, first_line
from common.files import locked, remove_asides, write_whole
from common.settings import Settings
from evaluate.metrics.splice import Loss
from shards import Store
from shards.manifest import Source, digest
from shards.remote import is_url

VERSION = 1
"""Raised by hand with every change of how these losses are measured."""
TOLERANCE = 1e-4
"""Nats per token that the model's own loss may differ from the kept one: rounding by other versions or threads."""


@dataclass(frozen=True)
class OwnLosses:
    """The kept losses of one model on some contexts, with the MLPs of some layers ablated together."""

    key: str
    folders: Sequence[Path]
    """All are searched; losses are written to the first that is writable."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        stores: Sequence[Store],
        contexts: np.ndarray,
        means: Sequence[torch.Tensor],
        device: torch.device,
    ) -> "OwnLosses":
        """`stores`: of the ablated layers, the first one's folder is used; `contexts` [n, T] token ids; `means`: the
        mean output [D] that stands in for each layer's MLP.
        """
        first = stores[0].manifest.source
        key = {
            "version": VERSION,
            "model": first.weights_sha256,
            "dtype": first.dtype,
            "device": device.type,
            "layers": [_layer(store.manifest.source) for store in stores],
            "contexts": [*contexts.shape, _sha256(contexts.astype(np.int32))],
            "means": [_sha256(mean.cpu().float().numpy()) for mean in means],
        }
        cached = settings.paths.cache / "losses"
        local = not is_url(settings.store_path(first.layer))
        beside = [stores[0].path.with_suffix(".losses")] if local else []
        return cls(digest(key), [*beside, cached])

    def read(self) -> dict[str, Loss] | None:
        """Each loss by its name; None if none are kept. A damaged file is reported on standard error and ignored."""
        for folder in self.folders:
            path = folder / f"{self.key}.safetensors"
            if not path.is_file():
                continue
            try:
                return _read(path)
            except (OSError, SafetensorError, ValueError, LookupError) as error:
                print(f"{path}: damaged ({first_line(error)}); measured again", file=sys.stderr)
        return None

    def keep(self, losses: Mapping[str, Loss]) -> None:
        """Write them to the first writable folder, whole or not at all; if there is none, say so on standard error."""
        failed: list[str] = []
        for folder in self.folders:
            try:
                with locked(folder / ".lock", None):
                    remove_asides(folder)
                    write_whole(folder / f"{self.key}.safetensors", _written(losses))
                return
            except (OSError, InputError) as error:
                failed.append(f"{folder}: {first_line(error)}")
        print(
            f"the language model's own losses were not kept ({'; '.join(failed)}); the next evaluation measures them "
            "again",
            file=sys.stderr,
        )


def agree(kept: Loss, measured: Loss) -> bool:
    """Whether the model's own loss is the kept one, on the contexts that are measured so far: every evaluation measures
    it, for the divergence from it."""
    before, now = kept.contexts[: len(measured.contexts)], measured.contexts
    if [each.shape for each in before] != [each.shape for each in now]:
        return False
    return abs(float(np.concatenate(before).mean() - np.concatenate(now).mean())) <= TOLERANCE


def _layer(source: Source) -> list[object]:
    return [source.layer, source.input_hook, source.output_hook, sorted(source.dropped_token_ids)]


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _written(losses: Mapping[str, Loss]) -> bytes:
    tensors: dict[str, np.ndarray] = {}
    for name, loss in losses.items():
        tensors[name] = np.stack(loss.contexts)
        tensors[f"{name}.divergence"] = np.array(loss.divergence)
        tensors[f"{name}.agreed"] = np.array(loss.agreed)
    return save(tensors, {"sha256": _digest(tensors)})


def _read(path: Path) -> dict[str, Loss]:
    with safe_open(path, "numpy") as file:
        tensors: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = (file.metadata() or {}).get("sha256")
    if (found := _digest(tensors)) != expected:
        raise ValueError(f"sha256 of its values: expected {expected}, found {found}")
    losses: dict[str, Loss] = {}
    for name in (name for name in tensors if "." not in name):
        loss = Loss(divergence=float(tensors[f"{name}.divergence"]), agreed=int(tensors[f"{name}.agreed"]))
        for nats in tensors[name]:
            loss.add_context(nats)
        losses[name] = loss
    return losses


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    return digest({name: [*values.shape, _sha256(values)] for name, values in tensors.items()})
