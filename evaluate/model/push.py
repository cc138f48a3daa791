"""A layer set on the Hugging Face hub, in the forms of three tools, with one card for the model.

    config.yaml, layer_N.safetensors, features/   circuit-tracer's set, where the set has every layer
    saelens/layer_N/                              SAELens
    matryoshka/layer_N/                           ours, all prefixes, with the layer's own card

circuit-tracer downloads what matches layer_*.safetensors, in folders too; ours lies elsewhere.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import hub
from common.files import locked, sha256
from common.settings import Settings
from evaluate.feature_pages import SetPages
from evaluate.files import finished
from evaluate.kept.evaluations import main_evaluation
from evaluate.push import write
from evaluate.records import Metrics
from evaluate.report.card import LayerLine, set_card
from evaluate.report.console import typical_fvu
from transcoder import weights
from transcoder.export import exported, write_set
from transcoder.formats import WRITERS


def push_set(settings: Settings, address: str, pages: bool = False) -> None:
    """Publish the evaluated runs named `settings.run` of `settings.layers` at `address` (hf://owner/name/path).

    `pages`: with circuit-tracer's feature pages, which quote the text. One commit: all of it is there, or nothing.
    Raises `InputError` for the first layer that is not trained here, or not evaluated as it is now, before anything is
    sent.
    """
    hub.parse(address)
    set_dir = settings.set_dir()
    set_dir.mkdir(parents=True, exist_ok=True)
    with (
        locked(set_dir / ".push", f"{set_dir}: another make push of this set is at work"),
        _folder(set_dir) as folder,
    ):
        message = write_forms(settings, Path(folder), address, pages)
        hub.upload(Path(folder), address, message)


def _folder(set_dir: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder on the set's own disk, as it may hold gigabytes; what a killed push has left there is removed."""
    for left in set_dir.glob(".push-*"):
        shutil.rmtree(left)
    return tempfile.TemporaryDirectory(dir=set_dir, prefix=".push-")


def _line(layer: int, metrics: Metrics) -> LayerLine:
    last = len(metrics.prefixes) - 1
    typical = (typical_fvu(metrics.errors, 0), typical_fvu(metrics.errors, last))
    return LayerLine(layer, metrics.prefixes[0], metrics.prefixes[last], typical)


def write_forms(settings: Settings, folder: Path, address: str, pages: bool = False) -> str:
    """Write what `push_set` publishes into `folder`; returns the commit's message."""
    lines, name = [], settings.model.public_name
    source: dict[str, Any] = {}
    for layer in settings.layers:
        run_dir = settings.of_layer(layer).run_dir()
        weights.refuse_another_model(run_dir, settings)
        own = folder / "matryoshka" / f"layer_{layer}"
        own.mkdir(parents=True)
        write(run_dir, own, f"{address}/matryoshka/layer_{layer}", name)
        tensors, metadata = exported(run_dir, None, name).saved()
        WRITERS["saelens"](folder / "saelens" / f"layer_{layer}", tensors, metadata)
        source = metadata["source"]
        metrics = finished(main_evaluation(run_dir, sha256(run_dir / weights.FILE_NAME)))
        assert metrics is not None, "write has checked it"
        lines.append(_line(layer, metrics))
    missing = [layer for layer in range(source["n_layers"]) if layer not in settings.layers]
    if not missing:
        write_set(folder, settings, add=SetPages(settings).write if pages else None)
    text = set_card(lines, source, missing, address)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return f"Transcoders {settings.run}, {len(lines)} layers"
