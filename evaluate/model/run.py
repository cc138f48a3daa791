"""A layer set's own page, in a straight line: transcoders, stores and evaluations in, model.json and model.html out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from common.errors import InputError
from common.files import locked, remove_asides, sha256
from common.progress import progress
from common.settings import Settings
from evaluate.files import finished, read_json, write_record
from evaluate.kept.evaluations import Evaluation, evaluation_on
from evaluate.metrics.language import language_model
from evaluate.model.layer_set import LayerSet, open_set
from evaluate.model.page import draw_plots, write_page
from evaluate.model.records import LayerMetrics, ModelMetrics, ReplacedMetrics, SetProvenance
from evaluate.model.summary import layer_metrics, sufficient
from evaluate.records import Metrics, NotMeasured
from shards.store import StoreSplit
from transcoder.weights import FILE_NAME

VERSION = 2
"""Raised by hand with every change of what is measured or how the page shows it: another one is measured again."""
FILE = "model.json"
PAGE = "model.html"
PART = 4
"""One of so many contexts is for what takes a pass for every layer: of 30 layers, half of the whole time."""


def describe(settings: Settings, tokens: int, whole: bool = False) -> tuple[ModelMetrics, bool]:
    """What model.json of the set holds that `settings` name (see `open_set`), and whether it had to be measured.

    `tokens`: tokens of the split's contexts on which all MLPs are replaced, 0 for none. Nothing is measured again while
    weights, stores, tokens and version are the same; where only a layer's evaluation is another, the page is made anew.
    """
    if settings.evaluate.checkpoint:
        raise InputError(
            "evaluate.checkpoint: a layer set is of finished runs; train them to their end (make train)"
        )
    found = open_set(settings, whole)
    split = {layer: getattr(store, settings.evaluate.split) for layer, store in found.stores.items()}
    digests = {layer: sha256(settings.of_layer(layer).run_dir() / FILE_NAME) for layer in found.layers}
    folder = settings.set_dir()
    metrics = evaluations(settings, found, digests)
    layers = [layer_metrics(layer, each.metrics, each.folder, folder) for layer, each in metrics.items()]
    provenance = _provenance(settings, found, digests, tokens)
    earlier = read(folder)
    same = earlier is not None and earlier.provenance == provenance
    if (
        earlier
        and same
        and earlier.layers == layers
        and all((folder / each).exists() for each in earlier.files)
    ):
        return earlier, False
    with locked(folder / ".model", f"{folder}: another make model is at work on it"):
        replaced = earlier.replaced if earlier and same else _measure(settings, found, split, layers, tokens)
        result = ModelMetrics(
            provenance=provenance,
            layers=layers,
            replaced=replaced,
            sufficient=sufficient(replaced, layers) if isinstance(replaced, ReplacedMetrics) else [],
            files=[],
        )
        return _write(folder, result), True


def evaluations(settings: Settings, found: LayerSet, digests: Mapping[int, str]) -> dict[int, Evaluation]:
    """Each layer's evaluation, of just these weights and stores.

    Raises `InputError` that names every layer without one, and the command that makes them.
    """
    metrics: dict[int, Evaluation] = {}
    lacking: dict[str, list[int]] = {}
    for layer in found.layers:
        fingerprint = found.stores[layer].manifest.fingerprint
        run_dir = settings.of_layer(layer).run_dir()
        place = evaluation_on(run_dir, digests[layer], fingerprint, settings.evaluate.split)
        each = finished(place)
        if why := _unfit(each, found, layer, digests[layer], settings.evaluate.split):
            lacking.setdefault(why, []).append(layer)
        elif each is not None:
            metrics[layer] = Evaluation(place, each)
    if lacking:
        said = "; ".join(f"layer {' '.join(map(str, layers))} {why}" for why, layers in lacking.items())
        which = " ".join(map(str, sorted(layer for layers in lacking.values() for layer in layers)))
        more = f' ARGS="--evaluate.split {settings.evaluate.split}"' * (settings.evaluate.split != "heldout")
        raise InputError(f"run {found.name}: {said}; first: {settings.command('evaluate', which)}{more}")
    return metrics


def _unfit(metrics: Metrics | None, found: LayerSet, layer: int, digest: str, split: str) -> str | None:
    """Why an evaluation is none of this layer of the set, or None."""
    if metrics is None:
        return "is not evaluated"
    if metrics.provenance.weights_sha256 != digest:
        return "was evaluated with other weights"
    if metrics.provenance.store_fingerprint != found.stores[layer].manifest.fingerprint:
        return "was evaluated on another harvest"
    if metrics.provenance.split != split:
        return f"was evaluated on {metrics.provenance.split} rows"
    return None


def _provenance(
    settings: Settings, found: LayerSet, digests: Mapping[int, str], tokens: int
) -> SetProvenance:
    first, *_ = found.layers
    manifests = {layer: store.manifest for layer, store in found.stores.items()}
    source, name = manifests[first].source, settings.evaluate.split
    texts = {layer: manifest.splits[name].contexts_sha256 for layer, manifest in manifests.items()}
    return SetProvenance(
        run=found.name,
        model=source.model,
        model_sha256=source.weights_sha256,
        n_layers=source.n_layers,
        layers=[*found.layers],
        split=name,
        contexts_of_layer=first,
        other_text=[layer for layer, text in texts.items() if text != texts[first]],
        tokens=tokens,
        weights_sha256={str(layer): digest for layer, digest in digests.items()},
        store_fingerprint={str(layer): each.fingerprint for layer, each in manifests.items()},
        version=VERSION,
    )


def read(folder: Path) -> ModelMetrics | None:
    """What was measured before; None where there is nothing, or it is of a version with other fields."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return ModelMetrics.model_validate(read_json(path, "remove it to measure again (make model)"))
    except ValidationError:
        return None


def _measure(
    settings: Settings,
    found: LayerSet,
    splits: Mapping[int, StoreSplit],
    layers: list[LayerMetrics],
    tokens: int,
) -> ReplacedMetrics | NotMeasured:
    if tokens == 0:
        return NotMeasured(skipped="it was not asked for")
    from evaluate.kept.losses import OwnLosses  # these import transformers, which takes seconds
    from evaluate.model.losses import replaced_metrics
    from evaluate.model.replaced import CLEAN, MEAN, ZERO, measure, passes

    contexts = _contexts(found, splits[found.layers[0]], tokens)
    n_part = -(-len(contexts) // PART)
    means = _means(found, settings.evaluate.split)
    model = language_model(settings.model, found.stores[found.layers[0]].manifest.source)
    coders = {layer: coder.to(model.device) for layer, coder in found.coders.items()}
    on_device = LayerSet(found.name, found.stores, coders)
    first, stores = settings.of_layer(found.layers[0]), [*found.stores.values()]
    own = OwnLosses.of(first, stores, contexts, [*means.values()], model.device)
    kept = own.read()
    total = passes(model, on_device, len(contexts), n_part, contexts.shape[1], kept is not None)
    moved = {layer: mean.to(model.device) for layer, mean in means.items()}
    try:
        with progress(f"{len(coders)} MLPs replaced", total, "tokens") as bar:
            measured = measure(model, on_device, moved, contexts, n_part, bar.update, kept)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written; the same command begins again") from None
    if kept is None or measured.whole[ZERO] is not kept[ZERO]:
        own.keep({name: measured.whole[name] for name in (CLEAN, ZERO, MEAN)})
    return replaced_metrics(measured, layers, (len(contexts), n_part))


def _contexts(found: LayerSet, split: StoreSplit, tokens: int) -> np.ndarray:
    """[n, T] token ids: the split's first contexts, whole ones, at least one; read before the model is loaded."""
    length = found.stores[found.layers[0]].manifest.source.context_length
    return split.contexts[np.arange(min(len(split.contexts), max(1, tokens // length)))]


def _means(found: LayerSet, split: str) -> dict[int, torch.Tensor]:
    """Mean output [D] of each layer's rows of the split."""
    means: dict[int, torch.Tensor] = {}
    for layer, store in found.stores.items():
        moments = store.manifest.splits[split].outputs
        assert moments is not None, "a split that was evaluated has rows"
        means[layer] = torch.tensor(moments.mean, dtype=torch.float32)
    return means


def _write(folder: Path, result: ModelMetrics) -> ModelMetrics:
    """Plots and page; model.json last, so that it stands for all of them. Other files of the set stay."""
    remove_asides(folder)
    for old in (folder / FILE, *folder.glob("model_*.png")):
        old.unlink(missing_ok=True)
    drawn = draw_plots(result, folder)
    result = result.model_copy(update={"files": [PAGE, *(each.plot.file for each in drawn)]})
    write_page(folder / PAGE, result, drawn)
    write_record(folder / FILE, result)
    return result
