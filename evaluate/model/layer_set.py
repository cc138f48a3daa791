"""A layer set: the runs of one name in several layers of one language model, each bound to its layer's store."""

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import InputError
from common.settings import Settings
from evaluate.subject import read, refuse_missing
from shards import Store
from transcoder import Transcoder
from transcoder.weights import layers_of


@dataclass(frozen=True)
class LayerSet:
    """Transcoders and stores by layer, in rising order; all of one language model, one number of prefixes."""

    name: str
    """Of the runs."""
    stores: Mapping[int, Store]
    coders: Mapping[int, Transcoder]
    """Each reads its store's rows: see `transcoder.gain.bind`."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.coders)

    @property
    def n_layers(self) -> int:
        """Of the language model."""
        return next(iter(self.stores.values())).manifest.source.n_layers

    @property
    def n_prefixes(self) -> int:
        return len(next(iter(self.coders.values())).prefix_ends)

    @property
    def missing(self) -> list[int]:
        """Layers of the model that are not in the set."""
        return [layer for layer in range(self.n_layers) if layer not in self.coders]


def open_set(settings: Settings, whole: bool = False) -> LayerSet:
    """The runs named `settings.run` of `settings.layers`; without layers, of every layer that has a finished one.

    `whole`: every layer of the model must be there. Raises `InputError` naming the layers that are missing, or the
    first that is of another model or tokenizer, or has another number of prefixes, than the first of the set.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    layers = settings.layers or layers_of(settings)
    if not layers:
        raise InputError(
            f"{model}: no layer has a finished run {settings.run}; train them (make train LAYER=all "
            f"RUN={settings.run})"
        )
    one = [settings.of_layer(layer) for layer in layers]
    for each in one:
        refuse_missing(each.run_dir())
    stores = {each.layer: Store.of(each) for each in one}
    coders = {each.layer: read(each.run_dir(), stores[each.layer]) for each in one}
    opened = LayerSet(settings.run, stores, coders)
    _check_alike(opened)
    if whole and opened.missing:
        raise InputError(
            f"{model}: run {settings.run}: expected every layer from 0 to {opened.n_layers - 1}, missing "
            f"{' '.join(map(str, opened.missing))}; train them (make train LAYER=all RUN={settings.run})"
        )
    return opened


def _check_alike(found: LayerSet) -> None:
    def kind(layer: int) -> dict[str, object]:
        manifest = found.stores[layer].manifest
        source = manifest.source
        return {
            "model": source.weights_sha256,
            "tokenizer": manifest.tokenizer_sha256,
            "context length": source.context_length,
            "prefixes": len(found.coders[layer].prefix_ends),
        }

    first, *others = found.layers
    expected = kind(first)
    for layer in others:
        for key, value in kind(layer).items():
            if value != expected[key]:
                raise InputError(
                    f"run {found.name}: all layers of a set must be alike; {key}: layer {first} has "
                    f"{expected[key]!s:.12}, layer {layer} has {value!s:.12}"
                )
