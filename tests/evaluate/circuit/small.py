"""A tiny language model of any family with random transcoders in every layer."""

from dataclasses import replace
from pathlib import Path

import torch

from common.settings import Model
from evaluate.circuit.attribute import Effects, Text
from harvest import lm
from harvest.lm import LanguageModel
from tests.evaluate.fakes import random_coder
from transcoder import Transcoder

TOKENS = torch.tensor([0, 17, 204, 33, 290, 17, 118])


def load(directory: Path) -> LanguageModel:
    where = str(directory)
    return lm.load(Model(name=where, device="cpu"), where, lm.load_tokenizer(where, None))


def coders_of(model: LanguageModel, skip: bool = False) -> list[Transcoder]:
    coders = [
        random_coder(model.d_model, model.d_model, (4, 40), seed=layer, skip=skip, layer=layer)
        for layer in range(model.n_layers)
    ]
    return [replace(coder, thresholds=coder.thresholds / 2) for coder in coders]


def text(tokens: torch.Tensor = TOKENS, begins: bool = True) -> Text:
    kept = torch.ones(len(tokens), dtype=torch.bool)
    kept[0] = False
    return Text(tokens, kept, begins)


def effects_of(directory: Path, skip: bool = False, begins: bool = True) -> Effects:
    model = load(directory)
    return Effects(model, coders_of(model, skip), text(begins=begins))
