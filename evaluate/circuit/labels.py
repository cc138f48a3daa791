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
from evaluate.labels.effects import LogitEffects, logit_effects
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
    like_random: bool = False
    """Whether those are no more than a random direction promotes, and say little (`LogitEffects.like_random`)."""


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
    effects = logit_effects(model, torch.stack(rows), ranked) if rows else LogitEffects.none(0)
    promoted, alike = effects.promoted.tolist(), effects.like_random.tolist()
    for node, (layer, number), raised, random in zip(latents.tolist(), places, promoted, alike, strict=True):
        words = known[layer][number] if layer in known else []
        promotes = [tokens.label(token) for token in raised]
        found[node] = Label(latent_text(words, promotes, random), "", words, promotes, random)
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


def latent_text(fires: Sequence[str], promotes: Sequence[str], like_random: bool) -> str:
    """What a latent fires on and promotes, in one line.

    Tokens that a random direction might promote as well are left out, or marked where nothing else is known: in
    SmolLM2-135M they are those of 95 to 98 % of the latents.

    >>> latent_text(["city"], [" Paris"], False), latent_text(["city"], [" Paris"], True)
    ("fires on 'city'; promotes ' Paris'", "fires on 'city'")
    >>> latent_text([], [" Paris"], True)
    "promotes ' Paris' (no more than a random direction might)"
    """
    parts = [f"fires on {_listed(fires)}"] if fires else []
    if promotes and not (like_random and fires):
        parts.append(
            f"promotes {_listed(promotes)}" + (" (no more than a random direction might)" * like_random)
        )
    return "; ".join(parts)


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
            f"by what they promote alone ({settings.command('evaluate', ' '.join(map(str, without)))})",
            file=sys.stderr,
        )
    return found
