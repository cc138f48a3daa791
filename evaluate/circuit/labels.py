"""Labels of a circuit's nodes: words a latent fires on, from its layer's evaluation, and tokens it promotes."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.settings import Settings
from common.tokens import TokenText
from evaluate.circuit.graph import ERROR, LATENT, LOGIT, TOKEN, Nodes
from evaluate.files import is_of
from evaluate.kept.evaluations import main_evaluation
from evaluate.labels.effects import logit_effects
from evaluate.labels.read import label_words
from evaluate.notes import Note
from evaluate.report.templates import percent
from harvest.lm import LanguageModel
from transcoder import Transcoder

SHOWN = 3
"""Tokens in the text of a label."""


class Label(NamedTuple):
    """What is known of a node."""

    text: str
    """In one line."""
    word: str
    """The token of an embedding or a logit, what an error is at, or a person's label of a latent."""
    fires: list[str]
    """Words that best tell where a latent fires; none if its layer has no evaluation of these weights."""
    promotes: list[str]
    """Tokens of the store's text whose logits a latent raises most by itself."""


def labels(
    nodes: Nodes,
    model: LanguageModel,
    coders: Sequence[Transcoder],
    tokens: TokenText,
    pieces: Sequence[str],
    evaluations: Mapping[int, Path],
    ranked: np.ndarray | None,
) -> list[Label]:
    """Of each node; `pieces`: the text's tokens; `ranked`: see `logit_effects`."""
    found: list[Label] = [Label("", "", [], [])] * len(nodes)
    latents = np.flatnonzero(nodes.kind == LATENT)
    places = [*zip(nodes.layer[latents].tolist(), nodes.number[latents].tolist(), strict=True)]
    with_words = {layer for layer, _ in places} & evaluations.keys()
    known = {layer: label_words(evaluations[layer], tokens) for layer in with_words}
    # Of all layers at once: a call begins with 1,536 random directions.
    rows = [coders[layer].W_dec[number] for layer, number in places]
    promoted = logit_effects(model, torch.stack(rows), ranked).promoted.tolist() if rows else []
    for node, (layer, number), raised in zip(latents.tolist(), places, promoted, strict=True):
        words = known[layer][number] if layer in known else []
        promotes = [tokens.label(token) for token in raised]
        parts = [("fires on", words), ("promotes", promotes)]
        text = "; ".join(f"{what} {_listed(some)}" for what, some in parts if some)
        found[node] = Label(text, "", words, promotes)
    for node in np.flatnonzero(nodes.kind != LATENT).tolist():
        kind, position, number = (int(each[node]) for each in (nodes.kind, nodes.position, nodes.number))
        word = tokens.label(number) if kind == LOGIT else pieces[position]
        text = {
            TOKEN: f"token {word!r}",
            ERROR: f"error of layer {nodes.layer[node]} at {word!r}",
            LOGIT: f"next token {word!r}, {percent(float(nodes.value[node]))} %",
        }[kind]
        found[node] = Label(text, word, [], [])
    return found


def with_notes(found: Sequence[Label], nodes: Nodes, notes: Mapping[int, Mapping[int, Note]]) -> list[Label]:
    """The labels with a person's notes on the latents, by layer and number, before the automatic labels."""
    said = list(found)
    for node in np.flatnonzero(nodes.kind == LATENT).tolist():
        note = notes.get(int(nodes.layer[node]), {}).get(int(nodes.number[node]))
        if note is not None:
            text = "; ".join(part for part in (note.text, found[node].text) if part)
            said[node] = found[node]._replace(text=text, word=note.text)
    return said


def _listed(words: Sequence[str]) -> str:
    return " ".join(repr(word) for word in words[:SHOWN])


def evaluations(settings: Settings, weights: Mapping[int, str]) -> dict[int, Path]:
    """Folder of each layer's evaluation of the weights with these digests; of the others a line on standard error."""
    found, without = {}, []
    for layer, digest in weights.items():
        folder = main_evaluation(settings.of_layer(layer).run_dir(), digest)
        if is_of(folder, digest):
            found[layer] = folder
        else:
            without.append(layer)
    if without:
        print(
            f"layers without an evaluation of these weights: {' '.join(map(str, without))}; their latents are labelled "
            f"by what they promote alone (make evaluate LAYER=... RUN={settings.run})",
            file=sys.stderr,
        )
    return found
