"""The language model of a store and a transcoder that reads along: rows and activations of any text.

Shapes: n tokens that give rows, D_in, D_out, F latents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from operator import index
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.device import pick_device
from common.errors import InputError
from common.settings import Model
from common.tokens import TokenText
from evaluate.prompt.intervene import Change, intervene, site
from shards import Store
from shards.layout import kept_mask
from shards.manifest import Source
from shards.store import as_harvested, read_tokenizer
from transcoder import Transcoder
from transcoder.gain import bind


class Sentence(NamedTuple):
    """Every token of a text but the first position and special tokens, which a harvest leaves out too."""

    tokens: list[str]
    """[n] Numbered as rows are: entry 0 is token 1 of the context. A character that is split over tokens stands at the
    one that completes it; the others are empty."""
    inputs: Tensor
    """[n, D_in] float32, by the store's convention: without the norm's gain, if it was harvested so."""
    outputs: Tensor
    """[n, D_out] float32"""
    acts: Tensor
    """[n, F]"""
    left_out: int
    """Tokens of the text beyond the end of the store's contexts."""


class Intervention(NamedTuple):
    """The model's predictions on a text, unchanged and with some latents changed. V: size of its vocabulary."""

    tokens: list[str]
    """The T tokens of the text, including those without a row; entry 0 is the context's first."""
    before: Tensor
    """[T, V] logits of the unchanged model."""
    after: Tensor
    """[T, V] logits with the change."""
    kl: Tensor
    """[T] KL(before || after) of the next token's distribution, nats; numbered as `tokens`, not as rows are."""
    changes: Tensor
    """[n, latents] what was added to each latent's activation: those of `set`, then of `ablate` and `scale`. Numbered
    as rows are: those of `Sentence`."""
    continuation: tuple[str, str]
    """The model's greedy continuation, before and after the change."""


class Reader:
    """The language model that a store was harvested from, and a transcoder that reads along.

    The transcoder is bound to the store (`transcoder.gain.bind`): checked, and converted to the store's input
    convention; `mismatch` lets one of another layer or model read on purpose. `model`: where the model is, if not where
    it was harvested from. Raises `InputError` when it cannot be had, or is another one.
    """

    def __init__(
        self,
        store: Store,
        transcoder: Transcoder,
        device: str = "auto",
        model: str | None = None,
        mismatch: bool = False,
    ) -> None:
        from evaluate.metrics.language import language_model

        self.store, self.source = store, store.manifest.source
        self.device = pick_device(device)
        self.transcoder = bind(transcoder, store, mismatch=mismatch).to(self.device)
        requested = Model.model_validate(
            {
                "name": model or self.source.model,
                "revision": self.source.revision,
                "dtype": self.source.dtype,
                "device": device,
            }
        )
        self.model = language_model(requested, self.source)
        self.tokenizer = as_harvested(read_tokenizer(store.tokenizer_path), self.source.special_tokens)
        self.token_text = TokenText(self.tokenizer)

    def __call__(self, text: str) -> Sentence:
        """Run `text` through the model; it is cut where the store's contexts end.

        Raises `InputError` for a text without a token, or with bytes of the command line that are not UTF-8.
        """
        return self._read(*context_of(text, self.tokenizer, self.source))

    def contexts(self, text: str) -> list[Tensor]:
        """Token ids of `text` in contexts [1, T] of at most the store's length, each with its first token."""
        whole, length = tokens_of(text, self.tokenizer, self.source), self.source.context_length
        start = whole[:, : 0 if self.source.bos_token_id is None else 1]
        parts = whole[:, start.shape[1] :].split(length - start.shape[1], dim=1)
        return [torch.cat([start, part], 1) for part in parts]

    def beside(self, store: Store, transcoder: Transcoder, mismatch: bool = False) -> Reader:
        """A reader of another layer of the same language model, which is not loaded again.

        Raises `InputError` for a store of another model, or of contexts of another kind.
        """
        same_model(self.source, store)
        other = copy(self)
        other.store, other.source = store, store.manifest.source
        other.transcoder = bind(transcoder, store, mismatch=mismatch).to(self.device)
        return other

    def _read(self, context: Tensor, left_out: int) -> Sentence:
        hooks = [self.source.input_hook, self.source.output_hook]
        with self.model.capturing(hooks) as caught:
            self.model.run_blocks(context, self.source.layer)
        kept = self.rows_of(context).to(caught[hooks[0]].device)
        inputs, outputs = (caught[hook][0, kept].float().to(self.device) for hook in hooks)
        tokens = [piece for piece, here in zip(self.pieces(context), kept.tolist(), strict=True) if here]
        return Sentence(tokens, inputs, outputs, self.transcoder.encode(inputs), left_out)

    def run(
        self,
        text: str,
        *,
        set: Mapping[int, float] | None = None,  # noqa: A002 - what it does
        scale: Mapping[int, float] | None = None,
        ablate: Collection[int] = (),
        positions: Collection[int] | None = None,
        new_tokens: int = 0,
    ) -> Intervention:
        """Run `text` unchanged, and with some latents' activations changed.

        `set` gives latents a value, `scale` multiplies their activation, `ablate` sets it to zero; at the rows numbered
        `positions`, counted as `Sentence.tokens` are, or at all: token 5 of `Intervention.tokens`, and of the command
        line's @5, is row 4 where the text has no special tokens of its own. The MLP keeps its own output; the change of
        the reconstruction, the sum over the latents of (activation after - before) * W_dec, is added to it, so the
        reconstruction error stays in place. `new_tokens`: length of the greedy continuation that is then generated; if
        `positions` is None, with the same change at the new positions. Raises what a call of the reader does, and
        `InputError` for a latent or position that does not exist, or a latent that is changed twice.
        """
        context, _ = context_of(text, self.tokenizer, self.source)
        n_rows = int(self.rows_of(context).sum())
        if strange := [each for each in positions or () if not 0 <= index(each) < n_rows]:
            there = f"from 0 to {n_rows - 1}" if n_rows else "(this text has none)"
            raise InputError(f"positions: expected numbers of rows {there}, found {strange[0]}")
        asked = [(index(latent), False, value) for latent, value in (set or {}).items()]
        asked += [(index(latent), True, 0.0) for latent in ablate]
        asked += [(index(latent), True, factor) for latent, factor in (scale or {}).items()]
        rows = [None] if positions is None else sorted({*positions})
        changes = [Change(*each, row) for each in asked for row in rows]
        own = site(self.source, self.transcoder, changes)
        found = intervene(self.model, context, [own] if changes else [], new_tokens)
        nothing = torch.zeros(n_rows, len(own.latents), device=self.device)
        before, after = (
            self.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in found.continuation
        )
        return Intervention(
            self.pieces(context),
            found.before,
            found.after,
            found.kl,
            found.made.get(self.source.layer, nothing),
            (before, after),
        )

    def rows_of(self, context: Tensor) -> Tensor:
        """[T] bool: whether a token of a context [1, T] gives a row."""
        return torch.from_numpy(kept_mask(context.numpy(), self.source.dropped_token_ids)[0])

    def pieces(self, context: Tensor) -> list[str]:
        """The text of each token of a context [1, T]; see `Sentence.tokens`."""
        return self.token_text.pieces(context[0].tolist())


def same_model(source: Source, store: Store) -> None:
    """Raise `InputError` where a store is of another model than this source, or of contexts of another kind."""
    other = store.manifest.source
    for key in ("weights_sha256", "context_length", "bos_token_id", "special_tokens", "dropped_token_ids"):
        if getattr(other, key) != getattr(source, key):
            raise InputError(
                f"{store.path}: {key}: expected {getattr(source, key)!s:.12} as in layer {source.layer}, found "
                f"{getattr(other, key)!s:.12}"
            )


def tokens_of(text: str, tokenizer: Tokenizer, source: Source) -> Tensor:
    """[1, T] the text's token ids, behind the token that every context of the store begins with.

    Raises `InputError` for a text without a token, or with bytes of the command line that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: not UTF-8, or half of a surrogate pair, at its character {error.start + 1}"
        ) from error
    start = [] if source.bos_token_id is None else [source.bos_token_id]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if source.special_tokens == "parse" and ids[:1] == start:
        ids = ids[1:]  # every context begins with one
    if not ids:
        raise InputError("text: nothing to read; give some words")
    return torch.tensor([start + ids])


def context_of(text: str, tokenizer: Tokenizer, source: Source) -> tuple[Tensor, int]:
    """A text as one context of a store, [1, T] token ids, and how many tokens are beyond its end; see `tokens_of`."""
    whole = tokens_of(text, tokenizer, source)
    context = whole[:, : source.context_length]
    return context, whole.shape[1] - context.shape[1]
