"""From the settings of a layer set and a text to its circuit, on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import InputError
from common.files import sha256
from common.progress import progress
from common.settings import Model, Settings
from common.tokens import TokenText
from evaluate.circuit.attribute import Effects, Text, attribute
from evaluate.circuit.graph import LATENT, LOGIT, Circuit, Route, paths, pruned
from evaluate.circuit.labels import Label, evaluations, labels, with_notes
from evaluate.circuit.write import EDGE_SHARE, NODE_SHARE, About, write
from evaluate.labels.effects import tokens_of
from evaluate.metrics.language import language_model
from evaluate.model.layer_set import LayerSet, open_set
from evaluate.notes import Note, notes_of
from evaluate.reader import context_of
from harvest.lm import LanguageModel
from shards.layout import kept_mask
from shards.manifest import Source
from shards.store import as_harvested, read_tokenizer
from transcoder import Transcoder
from transcoder.gain import convert
from transcoder.weights import FILE_NAME

N_ROUTES = 5
"""Paths listed for each logit."""


class Traced(NamedTuple):
    """A circuit and where it was written."""

    folder: Path
    circuit: Circuit
    labels: list[Label]
    routes: dict[int, list[Route]]
    """The strongest paths to each logit, by its index in the circuit's nodes."""


def trace(settings: Settings, text: str, prefix: int | None, n_nodes: int) -> Traced:
    """The circuit of `text` through prefix `prefix` (none: the last) of the run's transcoders in every layer.

    Raises `InputError` where a layer has none, the text has no token, or the model cannot be frozen.
    """
    layer_set = open_set(settings, whole=True)
    coders = readers(layer_set, prefix)
    notes = _notes(settings, layer_set)
    store = layer_set.stores[0]
    source = store.manifest.source
    tokenizer = as_harvested(read_tokenizer(store.tokenizer_path), source.special_tokens)
    context, left_out = context_of(text, tokenizer, source)
    if left_out:
        print(f"the last {left_out} tokens are left out: contexts of this set have {source.context_length}")
    model = exact(settings.model, source)
    kept = torch.from_numpy(kept_mask(context.numpy(), source.dropped_token_ids)[0])
    begins = source.bos_token_id is not None
    effects = Effects(model, coders, Text(context[0], kept, begins))
    n_latents, n_logits = (int((effects.nodes.kind == kind).sum()) for kind in (LATENT, LOGIT))
    with progress("effects", n_logits + min(n_nodes, n_latents), "targets") as bar:
        graph = attribute(effects, n_nodes, bar.update)
    circuit = pruned(graph, NODE_SHARE, EDGE_SHARE)
    tokens = TokenText(tokenizer)
    about = About(
        model=settings.model_slug,
        run=settings.run,
        prefix=len(coders[0].prefix_ends) - 1,
        n_layers=model.n_layers,
        prompt=text,
        pieces=tokens.pieces(context[0].tolist()),
        n_nodes=n_nodes,
        weights=_digests(settings, layer_set.layers),
    )
    folder = settings.set_dir() / "circuits" / about.slug
    found = evaluations(settings, about.weights)
    ranked = tokens_of(store, model.bridge.cfg.d_vocab)
    named = labels(circuit.nodes, model, coders, tokens, about.pieces, found, ranked)
    named = with_notes(named, circuit.nodes, notes)
    logits = np.flatnonzero(circuit.nodes.kind == LOGIT)
    order = logits[np.argsort(-circuit.nodes.value[logits])].tolist()
    routes = {logit: paths(circuit, logit, N_ROUTES) for logit in order}
    write(folder, about, circuit, named, routes, found)
    return Traced(folder, circuit, named, routes)


def readers(layer_set: LayerSet, prefix: int | None) -> list[Transcoder]:
    """A prefix of every layer's transcoder (none: the last), reading inputs without the norm's gain."""
    last = layer_set.n_prefixes - 1
    if prefix is not None and not 0 <= prefix <= last:
        raise InputError(f"prefix: run {layer_set.name} has prefixes 0 to {last}, found {prefix}")
    return [
        convert(
            coder.prefix(last if prefix is None else prefix),
            "normalized",
            layer_set.stores[layer].manifest.source.model_dump(),
            f"{layer_set.name}, layer {layer}",
        )
        for layer, coder in layer_set.coders.items()
    ]


def exact(wanted: Model, source: Source) -> LanguageModel:
    """The language model of a store, with its weights in float32, in which effects are told apart from rounding."""
    model = language_model(wanted.model_copy(update={"dtype": source.dtype}), source)
    torch.nn.Module.to(model.bridge, torch.float32)  # its own `to` prints a line
    model.bridge.cfg.dtype = model.dtype = torch.float32
    return model


def _notes(settings: Settings, layer_set: LayerSet) -> dict[int, dict[int, Note]]:
    """A person's notes on the latents, by layer and number."""
    return {
        layer: notes_of(settings.of_layer(layer).run_dir(), layer, coder.d_sae)
        for layer, coder in layer_set.coders.items()
    }


def _digests(settings: Settings, layers: Sequence[int]) -> dict[int, str]:
    return {layer: sha256(settings.of_layer(layer).run_dir() / FILE_NAME) for layer in layers}
