"""The language model with the activations of some latents changed, beside the unchanged model.

At a row, what is added to an MLP's own output is the change of its reconstruction, the sum over the changed latents of
(activation after - activation before) * W_dec: what the transcoder does not reconstruct of the output stays. Where
several layers are changed, the activations before are those that a layer has with the changes below it in place.

Shapes: T positions, n of them with a row, V words of the vocabulary, m changed latents of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from common.errors import InputError
from shards.layout import kept_mask
from shards.manifest import Source
from transcoder import Transcoder

if TYPE_CHECKING:  # with transformers, which takes seconds
    from harvest.lm import LanguageModel

Hook = tuple[str, Callable[..., Any]]

LARGEST = 1e18
"""Change of an activation at most: the norms square it, and beyond 1.8e19 the square is infinite in float32. An RMSNorm
then gives zeros, and the logits look as if nothing were wrong."""


class Change(NamedTuple):
    """One latent's activation is set to a value, or multiplied by it."""

    latent: int
    multiplied: bool
    value: float
    row: int | None
    """Number of the row; none: all, those of tokens that the model writes too."""

    def after(self, acts: Tensor) -> Tensor:
        """Activations after the change, of those before."""
        return self.value * acts if self.multiplied else torch.full_like(acts, self.value)


class Site(NamedTuple):
    """The changes at one layer."""

    source: Source
    coder: Transcoder
    """Of the changed latents alone, where each has a threshold of its own to pass."""
    columns: Tensor
    """[m] number of each changed latent in `coder`."""
    latents: list[int]
    """m changed latents, in the order in which they are first named."""
    changes: Sequence[Change]

    def hooks(self, kept: Tensor, made: dict[int, Tensor]) -> list[Hook]:
        """Hooks that make the changes at the positions `kept` [T], and put what was added to the activations [n, m]
        into `made` at the layer's number."""
        caught: dict[str, Tensor] = {}

        def keep(tensor: Tensor, **_: Any) -> None:
            caught["inputs"] = tensor

        def write(output: Tensor, **_: Any) -> Tensor:
            here = kept.to(output.device)
            inputs = caught["inputs"][0, here].float().to(self.coder.W_enc.device)
            acts = self.coder.encode(inputs)[:, self.columns]
            after = acts.clone()
            for each in self.changes:
                column = self.latents.index(each.latent)
                rows = slice(None) if each.row is None else each.row
                after[rows, column] = each.after(acts[rows, column])
            made[self.source.layer] = after - acts
            _refuse_unless((after - acts).abs() < LARGEST, output.dtype)
            moved = output.clone()
            moved[0, here] += (made[self.source.layer] @ self.coder.W_dec[self.columns]).to(output)
            return moved

        return [(self.source.input_hook, keep), (self.source.output_hook, write)]


class Outcome(NamedTuple):
    """The model's predictions on one context, unchanged and with the changes."""

    before: Tensor
    """[T, V] logits"""
    after: Tensor
    """[T, V]"""
    kl: Tensor
    """[T] KL(before || after) of the next token's distribution, nats."""
    made: dict[int, Tensor]
    """Layer -> [n, m]: what was added to the activation of each of the site's latents."""
    continuation: tuple[list[int], list[int]]
    """Tokens that the model writes after it, before and after the change."""


def site(source: Source, coder: Transcoder, changes: Sequence[Change], where: str = "") -> Site:
    """The changes at a layer, checked; `where`: what an error begins with.

    Raises `InputError` for a latent that is not there, a value that is not finite, a latent that is changed twice.
    """
    seen: dict[int, list[int | None]] = {}
    for latent, _, value, row in changes:
        if not 0 <= latent < coder.d_sae:
            raise InputError(f"{where}latent: expected 0 to {coder.d_sae - 1}, found {latent}")
        if not torch.tensor(value, dtype=torch.float32).isfinite():
            raise InputError(f"{where}latent {latent}: expected a finite value, found {value}")
        rows = seen.setdefault(latent, [])
        if row in rows or None in rows or (row is None and rows):
            raise InputError(
                f"{where}latent {latent}: changed twice; give it in one of set, scale and ablate"
            )
        rows.append(row)
    latents = list(seen)
    chosen = torch.tensor(latents, dtype=torch.long, device=coder.W_enc.device)
    if coder.k is None:  # a row's k largest are found among all latents
        own = coder.parameters
        fewer = replace(
            own, W_enc=own.W_enc[chosen], b_enc=own.b_enc[chosen], W_dec=own.W_dec[chosen], W_skip=None
        )
        last = coder.thresholds[-1:]
        last = last[:, chosen] if last.ndim == 2 else last
        coder = replace(coder, parameters=fewer, thresholds=last, prefix_ends=(len(latents),))
        chosen = torch.arange(len(latents), device=chosen.device)
    return Site(source, coder, chosen, latents, changes)


def intervene(model: LanguageModel, context: Tensor, sites: Sequence[Site], new_tokens: int) -> Outcome:
    """Run a context [1, T] with the changes and as it is; then the model writes `new_tokens` more, the likeliest token
    each time, with the changes of all rows at the new positions too.

    Raises `InputError` where the model has no positions for them, or a change is too large for its numbers.
    """
    limit = (model.positions or sys.maxsize) - context.shape[1]
    if not 0 <= new_tokens <= limit:
        raise InputError(f"new_tokens: expected 0 to {limit}, the model's positions, found {new_tokens}")
    before, plain, _ = _continued(model, context, [], new_tokens)
    after, steered, made = _continued(model, context, sites, new_tokens) if sites else (before, plain, {})
    _refuse_unless(after.isfinite(), model.dtype)
    log_p, log_q = (log_softmax(logits.float(), -1) for logits in (before, after))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Outcome(before, after, kl, made, (plain, steered))


def _refuse_unless(fine: Tensor, dtype: torch.dtype) -> None:
    if not fine.all():
        raise InputError(
            "the changed activations are too large for the model's numbers "
            f"({str(dtype).removeprefix('torch.')}): give smaller values"
        )


@torch.inference_mode()
def _continued(
    model: LanguageModel, context: Tensor, sites: Sequence[Site], new_tokens: int
) -> tuple[Tensor, list[int], dict[int, Tensor]]:
    """Logits [T, V] of a context [1, T], the tokens of the continuation, and what was made of the changes."""
    tokens, length = context, context.shape[1]
    logits, made = _forward(model, tokens, sites)
    found = logits
    for step in range(new_tokens):
        tokens = torch.cat([tokens, found[-1:].argmax(-1, keepdim=True).to(tokens)], 1)
        if step + 1 < new_tokens:
            found, _ = _forward(model, tokens, sites)
    return logits, tokens[0, length:].tolist(), made


def _forward(model: LanguageModel, tokens: Tensor, sites: Sequence[Site]) -> tuple[Tensor, dict[int, Tensor]]:
    made: dict[int, Tensor] = {}
    hooks: list[Hook] = []
    for each in sites:
        kept = torch.from_numpy(kept_mask(tokens.cpu().numpy(), each.source.dropped_token_ids)[0])
        hooks += each.hooks(kept, made)
    model.check_hooks([name for name, _ in hooks])
    with model.bridge.hooks(fwd_hooks=hooks):
        logits = model.bridge(tokens.to(model.device), return_type="logits")
    return logits[0], made
