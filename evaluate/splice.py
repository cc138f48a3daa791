"""What the language model loses when its MLP is replaced by a reconstruction.

Shapes: b contexts, T positions, D model width, V vocabulary. The layer's input is read at the store's input
hook and its replacement written at the store's output hook. Positions without a row in the store (the
beginning of the text, special tokens) keep their own MLP output, as the transcoder never saw any.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from evaluate.reconstruction import ratio
from harvest.lm import LanguageModel
from shards.manifest import Source

LOGITS = 1 << 26
"""Logits at once, b * T * V: 256 MB in float32, of which two or three are alive."""
ROWS = 512
"""Positions whose log-probabilities are compared at a time."""

Replacement = Callable[[Tensor], Tensor]
"""Inputs [n, D_in] -> outputs [n, D_out]."""


@dataclass
class Loss:
    """Sums over predicted positions, in nats."""

    positions: int = 0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    """KL(clean || spliced)"""

    def add(self, clean: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """`clean`, `logits` [b, T, V], `tokens` [b, T]: position t predicts token t + 1."""
        labels = tokens[:, 1:].flatten().to(logits.device)
        self.positions += len(labels)
        pairs = (clean[:, :-1].flatten(0, 1), logits[:, :-1].flatten(0, 1), labels)
        for p, q, label in zip(*(values.split(ROWS) for values in pairs), strict=True):
            q = q.float()
            self.cross_entropy += float(cross_entropy(q, label, reduction="none").double().sum())
            if clean is not logits:
                log_p, log_q = log_softmax(p.float(), -1), log_softmax(q, -1)
                self.divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())


@torch.inference_mode()
def splice(
    model: LanguageModel,
    source: Source,
    contexts: np.ndarray,
    replacements: Mapping[str, Replacement],
    tick: Callable[[int], object],
) -> dict[str, Loss]:
    """Loss of the model as it is ("clean") and with each replacement on `contexts` [n, T] token ids.

    The blocks below the layer run once per context; what follows once per replacement. `tick` is
    called with the contexts of each batch.
    """
    losses = {name: Loss() for name in ("clean", *replacements)}
    before = f"blocks.{source.layer}.hook_in"
    size = max(1, LOGITS // (contexts.shape[1] * model.bridge.cfg.d_vocab))
    for start in range(0, len(contexts), size):
        tokens = torch.from_numpy(contexts[start : start + size].astype(np.int64)).to(model.device)
        kept = rows_of(tokens, source)
        with model.capturing([before, source.input_hook]) as caught:
            clean = model.bridge(tokens, return_type="logits")
            residual, inputs = caught[before], caught[source.input_hook].float()
        losses["clean"].add(clean, clean, tokens)
        for name, replacement in replacements.items():
            made = replacement(inputs[kept])
            hook = (source.output_hook, _writer(kept, made))
            with model.bridge.hooks(fwd_hooks=[hook]):
                logits = model.bridge(residual, start_at_layer=source.layer, return_type="logits")
            losses[name].add(clean, logits, tokens)
        tick(len(tokens))
    return losses


def rows_of(tokens: Tensor, source: Source) -> Tensor:
    """[b, T] bool: the positions that have a row in the store."""
    dropped = torch.tensor(source.dropped_token_ids, dtype=tokens.dtype, device=tokens.device)
    kept = ~torch.isin(tokens, dropped)
    if source.bos_token_id is not None:
        kept[:, 0] &= tokens[:, 0] != source.bos_token_id
    return kept


def _writer(kept: Tensor, made: Tensor) -> Callable[..., Tensor]:
    def write(output: Tensor, hook: Any) -> Tensor:
        changed = output.clone()
        changed[kept] = made.to(output.dtype)
        return changed

    return write


def summary(losses: Mapping[str, Loss], name: str) -> dict[str, float | None]:
    """Cross-entropy and KL of one replacement in nats per token, and the share of the damage undone.

    recovered_zero = (CE_zero - CE) / (CE_zero - CE_clean): 1 if the replacement costs nothing, 0 if it is
    as bad as no MLP output at all; recovered_mean the same against the mean output.
    """
    ce = {key: loss.cross_entropy / max(loss.positions, 1) for key, loss in losses.items()}
    own = losses[name]

    def recovered(floor: str) -> float | None:
        return ratio(ce[floor] - ce[name], ce[floor] - ce["clean"])

    return {
        "cross_entropy": ce[name],
        "kl": own.divergence / max(own.positions, 1),
        "recovered_zero": recovered("zero"),
        "recovered_mean": recovered("mean"),
    }
