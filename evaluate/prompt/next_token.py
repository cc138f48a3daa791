"""What a text's positions say of the token that follows them, and how a direction of the residual stream speaks to it.

The direct effect of a vector d, written into the residual stream at a position, on the logit of the token v that
follows it: d . P gain (W_U[v] - mean over the vocabulary of W_U) / s. s is the scale of the final norm there, as it
is in the model (the vector does not change it); P takes the mean off where the norm is a LayerNorm; the mean over the
vocabulary is taken off because a constant added to all logits says nothing. The logits are those before a soft cap.
What later layers make of the vector is not in it. Of a latent, d is its activation times its decoder row.

Shapes: T positions, D model width, V words of the vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from harvest.lm import LanguageModel, gain_of

NORM = {part: f"ln_final.hook_{part}" for part in ("in", "scale", "normalized", "out")}
"""Hook points of the final norm."""
TOLERANCE = 1e-4
"""Of what norm and unembedding make of the model's own values, relative to the largest; in float32."""


class Following(NamedTuple):
    """The token after each position."""

    tokens: Tensor
    """[T] its id: the one that follows in the text, and where none does the likeliest."""
    probabilities: Tensor
    """[T] that the model gives it."""


def following(logits: Tensor, after: Tensor) -> Following:
    """`logits` [T, V] of a context; `after` [T]: ids of the tokens that follow, -1 where none does."""
    logits = logits.float()
    tokens = torch.where(after < 0, logits.argmax(-1), after.to(logits.device))
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return Following(tokens, (chosen - logits.logsumexp(-1)).exp())


def directions(model: LanguageModel, caught: Mapping[str, Tensor], logits: Tensor, tokens: Tensor) -> Tensor:
    """[T, D]: the direct effect of a vector at a position is its product with this.

    `caught`: at NORM's hook points, of the pass of the `logits` [T, V]; `tokens` [T]: those that follow. Raises
    `InputError` where final norm and unembedding are not what makes the logits of this model.
    """
    hidden, scale, normalized, out = (caught[name].float() for name in NORM.values())
    tolerance = max(TOLERANCE, 4 * torch.finfo(model.dtype).eps)
    centred = hidden - hidden.mean(-1, keepdim=True)
    undone = normalized * scale
    errors = [float((each - undone).abs().max() / undone.abs().max()) for each in (hidden, centred)]
    gain = gain_of(model.bridge.ln_final.original_component, normalized, out)
    own = model.unembedding(tokens, out[0, -1], logits[-1])
    for what, error in (
        ("its final norm is neither RMSNorm nor LayerNorm", min(errors)),
        ("its final norm does not multiply by a gain", gain.error),
        ("its logits are not its unembedding times its final norm's output", own.error),
    ):
        if not error <= tolerance:  # NaN too
            raise InputError(
                f"{model.name}: {what} (deviation {error:.2g}, expected at most {tolerance:.2g})"
            )
    pulled = own.directions * gain.values / scale[0]
    return pulled - pulled.mean(-1, keepdim=True) if errors[1] < errors[0] else pulled
