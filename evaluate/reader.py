"""The language model of a store and a transcoder that reads along: rows and activations of any text.

Shapes: n tokens that give rows, D_in, D_out, F latents.
"""

from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.device import pick_device
from common.errors import InputError
from common.settings import Model
from common.tokens import TokenText
from shards import Store
from shards.layout import kept_mask
from shards.manifest import Source
from shards.store import as_harvested, read_tokenizer
from transcoder import Transcoder
from transcoder.gain import bind


class Sentence(NamedTuple):
    """Every token of a text but the first position and special tokens, which a harvest leaves out too."""

    tokens: list[str]
    """A character that is split over tokens stands at the one that completes it; the others are empty."""
    inputs: Tensor
    """[n, D_in] float32, by the store's convention: without the norm's gain, if it was harvested so."""
    outputs: Tensor
    """[n, D_out] float32"""
    acts: Tensor
    """[n, F]"""
    left_out: int
    """Tokens of the text beyond the end of the store's contexts."""


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

    def __call__(self, text: str) -> Sentence:
        """Run `text` through the model; it is cut where the store's contexts end.

        Raises `InputError` for a text without a token, or with bytes of the command line that are not UTF-8.
        """
        source = self.source
        context, left_out = context_of(text, self.tokenizer, source)
        hooks = [source.input_hook, source.output_hook]
        with self.model.capturing(hooks) as caught:
            self.model.run_blocks(context, source.layer)
            inputs, outputs = (caught[hook][0].float() for hook in hooks)
        kept = torch.from_numpy(kept_mask(context.numpy(), source.dropped_token_ids)[0])
        pieces = TokenText(self.tokenizer).pieces(context[0].tolist())
        tokens = [piece for piece, here in zip(pieces, kept.tolist(), strict=True) if here]
        inputs, outputs = (rows[kept.to(rows.device)].to(self.device) for rows in (inputs, outputs))
        return Sentence(tokens, inputs, outputs, self.transcoder.encode(inputs), left_out)


def context_of(text: str, tokenizer: Tokenizer, source: Source) -> tuple[Tensor, int]:
    """A text as one context of a store, [1, T] token ids, and how many tokens are beyond its end.

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
    whole = torch.tensor([start + ids])
    context = whole[:, : source.context_length]
    return context, whole.shape[1] - context.shape[1]
