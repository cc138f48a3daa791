"""A text through a language model and the transcoders of some of its layers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.files import sha256
from common.tokens import TokenText
from evaluate.files import is_of, latents_of
from evaluate.kept.evaluations import main_evaluation
from evaluate.prompt.records import VERSION, ActiveLatent, NamedLatent, Prompt, PromptLayer, PromptToken
from evaluate.reader import Reader, Sentence
from shards.store import read_tokenizer
from transcoder.fvu import ratio
from transcoder.weights import FILE_NAME


def measure_prompt(text: str, readers: Mapping[int, Reader], run_dirs: Mapping[int, Path]) -> Prompt:
    """`readers` and the directories of their runs, by layer; a long text is cut into contexts as a harvest does."""
    reader = next(iter(readers.values()))
    contexts = reader.contexts(text)
    tokens = [
        PromptToken(text=piece, context=number, row=row)
        for number, context in enumerate(contexts)
        for piece, row in zip(reader.pieces(context), reader.rows_of(context).tolist(), strict=True)
    ]
    layers = [_layer(layer, each, text, run_dirs[layer]) for layer, each in readers.items()]
    return Prompt(version=VERSION, model=reader.source.model, text=text, tokens=tokens, layers=layers)


def _layer(layer: int, reader: Reader, text: str, run_dir: Path) -> PromptLayer:
    """One context's activations are in memory at a time."""
    active: list[list[ActiveLatent]] = []
    shares: list[list[float | None]] = [[] for _ in reader.transcoder.prefix_ends]
    for sentence in reader.sentences(text):
        active += map(_active, sentence.acts)
        for own, more in zip(shares, _error_shares(reader, sentence), strict=True):
            own += more
    firing = sorted({each.latent for row in active for each in row})
    return PromptLayer(
        layer=layer,
        run=run_dir.name,
        prefix_ends=list(reader.transcoder.prefix_ends),
        error_share=shares,
        active=active,
        latents=_named(firing, reader, run_dir),
    )


def _active(acts: Tensor) -> list[ActiveLatent]:
    values, latents = acts.sort(descending=True, stable=True)
    n = int((values > 0).sum())
    pairs = zip(latents[:n].tolist(), values[:n].tolist(), strict=True)
    return [ActiveLatent(latent=latent, value=value) for latent, value in pairs]


def _error_shares(reader: Reader, sentence: Sentence) -> list[list[float | None]]:
    """[n] for each prefix: |y - y_hat|^2 / |y - mean(y)|^2, mean(y) of the train rows; none where y is it."""
    inputs, outputs = sentence.inputs, sentence.outputs
    moments = reader.store.manifest.splits["train"].outputs
    assert moments is not None, "a store has train rows"
    mean = torch.tensor(moments.mean, dtype=torch.float32, device=outputs.device)
    distance = (outputs - mean).square().sum(-1)
    shares = []
    for g in range(len(reader.transcoder.prefix_ends)):
        error = (outputs - reader.transcoder.prefix(g)(inputs)).square().sum(-1)
        pairs = zip(error.tolist(), distance.tolist(), strict=True)
        shares.append([ratio(*pair) for pair in pairs])
    return shares


def _named(firing: list[int], reader: Reader, run_dir: Path) -> dict[int, NamedLatent]:
    """Group of each latent, and where these weights were evaluated its density and label."""
    ends = reader.transcoder.prefix_ends
    group = {latent: next(g for g, end in enumerate(ends) if latent < end) for latent in firing}
    digest = sha256(run_dir / FILE_NAME)
    evaluation = main_evaluation(run_dir, digest)
    if not is_of(evaluation, digest):
        return {latent: NamedLatent(group=group[latent]) for latent in firing}
    density, top = latents_of(evaluation, "density", "top_tokens")
    text = TokenText(read_tokenizer(reader.store.tokenizer_path))
    return {
        latent: NamedLatent(
            group=group[latent],
            density=float(density[-1, latent]),
            label=tuple(text.label(token) for token in top[latent].tolist() if token >= 0),
        )
        for latent in firing
    }
