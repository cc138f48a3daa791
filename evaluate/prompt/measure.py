"""A text through a language model and the transcoders of some of its layers, one transcoder in memory at a time.

Shapes: T tokens of a context, n of them with a row, D model width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from common.files import sha256
from common.tokens import TokenText
from evaluate.files import is_of, latents_of
from evaluate.kept.evaluations import main_evaluation
from evaluate.labels.read import label_words
from evaluate.notes import Note, notes_of
from evaluate.prompt.next_token import NORM, directions, following
from evaluate.prompt.records import ActiveLatent, NamedLatent, PromptLayer, PromptToken
from evaluate.reader import Reader
from shards import Store
from shards.manifest import Source
from shards.store import read_tokenizer
from transcoder.fvu import ratio
from transcoder.weights import FILE_NAME

HELD = 1 << 27
"""Numbers of all layers' rows that are held while one transcoder after the other reads them: 0.5 GB."""


class Place(NamedTuple):
    """A layer that is read, and the run that reads it."""

    store: Store
    run_dir: Path

    @property
    def source(self) -> Source:
        return self.store.manifest.source


Open = Callable[[Place], Reader]
"""The reader of a layer; the one before it may be let go."""


class Text(NamedTuple):
    """A text in contexts, as a harvest cuts a document."""

    contexts: list[Tensor]
    """Of [1, T] token ids."""
    pieces: list[list[str]]
    """The text of each token; a character that is split over tokens stands at the one that completes it."""

    @classmethod
    def of(cls, text: str, reader: Reader) -> "Text":
        contexts = reader.contexts(text)
        start = 0 if reader.source.bos_token_id is None else 1
        # In one piece: a character may be split over two contexts.
        own = iter(reader.token_text.pieces(torch.cat([each[0, start:] for each in contexts]).tolist()))
        first = [reader.token_text.label(int(token)) for token in contexts[0][0, :start]]
        return cls(contexts, [[*first, *(next(own) for _ in each[0, start:])] for each in contexts])

    def after(self, context: int, start: int) -> Tensor:
        """[T] ids of the tokens that follow those of a context, -1 after the last; `start`: see `of`."""
        more = self.contexts[context + 1][0, start : start + 1] if context + 1 < len(self.contexts) else None
        return torch.cat([self.contexts[context][0, 1:], torch.tensor([-1]) if more is None else more])


class Rows(NamedTuple):
    """What each layer's MLP reads and writes at one context's rows, and how what it writes speaks to the next token."""

    inputs: dict[int, Tensor]
    """Layer -> [n, D] float32"""
    outputs: dict[int, Tensor]
    directions: Tensor | None
    """[n, D], or none where direct effects cannot be had."""


@dataclass
class Found:
    """What is known of one layer, context by context."""

    shares: list[list[float | None]]
    """Of each prefix."""
    active: list[list[ActiveLatent]] = field(default_factory=list)
    output_effect: list[float] = field(default_factory=list)

    def add(self, reader: Reader, rows: Rows) -> None:
        """The rows of one more context."""
        layer = reader.source.layer
        inputs, outputs = rows.inputs[layer], rows.outputs[layer]
        towards = rows.directions
        for i, acts in enumerate(reader.transcoder.encode(inputs)):
            self.active.append(
                _active(acts, reader.transcoder.W_dec, None if towards is None else towards[i])
            )
        if towards is not None:
            self.output_effect += map(short, torch.linalg.vecdot(outputs, towards).tolist())
        for own, more in zip(self.shares, _error_shares(reader, inputs, outputs), strict=True):
            own += more


class Measured(NamedTuple):
    """What `measure_layers` gives."""

    tokens: list[PromptToken]
    layers: list[PromptLayer]
    effects_skipped: str | None
    evaluations: dict[int, Path]
    """Layer -> folder of the evaluation of the weights that read it; without those that have none."""


def measure_layers(text: Text, places: Sequence[Place], opened: Open) -> Measured:
    """The text through the transcoder of each place."""
    found: dict[int, Found] = {}
    layers: list[PromptLayer] = []
    evaluations: dict[int, Path] = {}
    tokens: list[PromptToken] = []
    why: str | None = None
    reader = opened(places[0])
    for block in _blocks(text, reader, len(places)):
        held: list[Rows] = []
        for number in block:
            said, rows, refused = _through(text, number, reader, [place.source for place in places])
            why = why or refused
            tokens += said
            held.append(rows)
        for place in places:
            reader = opened(place)
            own = found.setdefault(place.source.layer, Found([[] for _ in reader.transcoder.prefix_ends]))
            for rows in held:
                own.add(reader, rows)
            if block[-1] == len(text.contexts) - 1:
                if evaluation := _evaluation(place.run_dir):
                    evaluations[place.source.layer] = evaluation
                layers.append(_layer(own, reader, place.run_dir, evaluation, effects=why is None))
    return Measured(tokens, layers, why, evaluations)


def _evaluation(run_dir: Path) -> Path | None:
    """Folder of the evaluation of the run's weights as they are; none where there is none."""
    digest = sha256(run_dir / FILE_NAME)
    folder = main_evaluation(run_dir, digest)
    return folder if is_of(folder, digest) else None


def _blocks(text: Text, reader: Reader, layers: int) -> Iterator[range]:
    """Numbers of the contexts whose rows are held together, in order."""
    size = max(1, HELD // (text.contexts[0].shape[1] * reader.model.d_model * (2 * layers + 1)))
    for start in range(0, len(text.contexts), size):
        yield range(start, min(start + size, len(text.contexts)))


@torch.inference_mode()
def _through(
    text: Text, number: int, reader: Reader, sources: Sequence[Source]
) -> tuple[list[PromptToken], Rows, str | None]:
    """A context through the model, once for all layers; also why there are no direct effects, where there are none."""
    context, model = text.contexts[number], reader.model
    kept = reader.rows_of(context)
    norm = [name for name in NORM.values() if name in model.bridge.hook_dict]
    hooks = [name for source in sources for name in (source.input_hook, source.output_hook)]
    with model.capturing(hooks + norm) as caught:
        logits = model.bridge(context.to(model.device), return_type="logits")[0]
    after = text.after(number, 0 if reader.source.bos_token_id is None else 1)
    then = following(logits, after)
    why, towards = None, None
    try:
        if len(norm) < len(NORM):
            raise InputError(f"{model.name}: TransformerLens has no hook points at its final norm")
        towards = directions(model, caught, logits, then.tokens)
    except InputError as error:  # said in prompt.json, on the page and in the terminal
        why = str(error)
    here = kept.to(logits.device)
    inputs, outputs = (
        {source.layer: caught[getattr(source, hook)][0, here].float() for source in sources}
        for hook in ("input_hook", "output_hook")
    )
    said = zip(
        text.pieces[number],
        kept.tolist(),
        map(reader.token_text.label, then.tokens.tolist()),
        (after >= 0).tolist(),
        map(short, then.probabilities.tolist()),
        strict=True,
    )
    tokens = [
        PromptToken(text=piece, context=number, row=row, next=token, next_given=given, next_probability=p)
        for piece, row, token, given, p in said
    ]
    return tokens, Rows(inputs, outputs, None if towards is None else towards[here]), why


def short(value: float) -> float:
    """Six significant digits: what float32 has, in a third of the characters."""
    return float(f"{value:.6g}")


def _layer(
    found: Found, reader: Reader, run_dir: Path, evaluation: Path | None, effects: bool
) -> PromptLayer:
    """With the direct effects of all contexts, or of none."""
    if not effects:
        found.output_effect = []
        found.active = [
            [ActiveLatent(latent=each.latent, value=each.value) for each in row] for row in found.active
        ]
    firing = sorted({each.latent for row in found.active for each in row})
    return PromptLayer(
        layer=reader.source.layer,
        run=run_dir.name,
        prefix_ends=list(reader.transcoder.prefix_ends),
        error_share=found.shares,
        active=found.active,
        output_effect=found.output_effect,
        latents=_named(firing, reader, run_dir, evaluation),
    )


def _active(acts: Tensor, W_dec: Tensor, towards: Tensor | None) -> list[ActiveLatent]:
    values, latents = acts.sort(descending=True, stable=True)
    n = int((values > 0).sum())
    values, latents = values[:n], latents[:n]
    pairs = zip(latents.tolist(), values.tolist(), strict=True)
    if towards is None:
        return [ActiveLatent(latent=latent, value=value) for latent, value in pairs]
    effects = (values * (W_dec[latents] @ towards)).tolist()
    return [
        ActiveLatent(latent=latent, value=value, effect=short(effect))
        for (latent, value), effect in zip(pairs, effects, strict=True)
    ]


def _error_shares(reader: Reader, inputs: Tensor, outputs: Tensor) -> list[list[float | None]]:
    """[n] for each prefix: |y - y_hat|^2 / |y - mean(y)|^2, mean(y) of the train rows; none where y is it."""
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


def _named(
    firing: list[int], reader: Reader, run_dir: Path, evaluation: Path | None
) -> dict[int, NamedLatent]:
    """Group of each latent and a person's note, and where these weights were evaluated its density and label."""
    ends = reader.transcoder.prefix_ends
    notes = notes_of(run_dir, reader.source.layer, ends[-1])
    group = {latent: next(g for g, end in enumerate(ends) if latent < end) for latent in firing}
    if evaluation is None:
        return {latent: NamedLatent(group=group[latent], note=_noted(notes, latent)) for latent in firing}
    (density,) = latents_of(evaluation, "density")
    labels = label_words(evaluation, TokenText(read_tokenizer(reader.store.tokenizer_path)))
    return {
        latent: NamedLatent(
            group=group[latent],
            density=float(density[-1, latent]),
            label=tuple(labels[latent]),
            note=_noted(notes, latent),
        )
        for latent in firing
    }


def _noted(notes: Mapping[int, Note], latent: int) -> str:
    return notes[latent].text if latent in notes else ""
