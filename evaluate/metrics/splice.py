"""What the language model loses when its MLP is replaced by a reconstruction.

Shapes: b contexts, T positions, D model width, V vocabulary. The layer's input is read at the store's input
hook and its replacement written at the store's output hook. Positions without a row in the store (the
beginning of the text, special tokens) keep their own MLP output, as the transcoder never saw any.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from common.processes import ALONE, Processes
from evaluate.metrics.rows import share
from evaluate.records import LanguageMetrics
from harvest.lm import LanguageModel
from shards.layout import kept_mask
from shards.manifest import Source
from transcoder.fvu import ratio

LOGITS = 1 << 25
"""Logits at once, b * T * V: 128 MB in float32, of which three such arrays are alive."""

Replacement = Callable[[Tensor], Tensor]
"""Inputs [n, D_in] -> outputs [n, D_out]."""


class Clean:
    """What the model as it is predicts on a batch: probabilities [b, T - 1, V], their entropy and the likeliest tokens
    [b, T - 1].
    """

    def __init__(self, logits: Tensor) -> None:
        log_p = log_softmax(logits[:, :-1].float(), -1)
        self.p = log_p.exp()
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p)
        self.top = logits[:, :-1].argmax(-1)


@dataclass
class Loss:
    """Sums over predicted positions, in nats."""

    positions: int = 0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    """KL(clean || spliced)"""
    agreed: int = 0
    """Positions whose likeliest token is the clean model's."""
    contexts: list[np.ndarray] = field(default_factory=list, compare=False)
    """Cross-entropy of each context's predicted positions, [T - 1] float32."""

    def add_context(self, nats: np.ndarray) -> None:
        """The cross-entropy [T - 1] of the next context."""
        self.contexts.append(nats)
        self.positions += len(nats)
        self.cross_entropy += float(torch.from_numpy(nats).double().sum())

    def add(self, clean: Clean, logits: Tensor, tokens: Tensor) -> None:
        """`logits` [b, T, V], `tokens` [b, T]: position t predicts token t + 1. One context at a time; the numbers of
        all are one copy to the host.
        """
        columns = []
        said = zip(clean.p, clean.negative_entropy, clean.top, logits, tokens, strict=True)
        for p, negative_entropy, top, q, own in said:
            log_q = log_softmax(q[:-1].float(), -1)
            nats = -log_q.gather(1, own[1:, None])[:, 0]
            divergence = (negative_entropy - torch.linalg.vecdot(p, log_q)).double().sum(0, keepdim=True)
            agreed = (q[:-1].argmax(-1) == top).sum(0, keepdim=True)
            columns.append(torch.cat([divergence, agreed.double(), nats.double()]))
        for divergence, agreed, *nats in torch.stack(columns).tolist():  # sync: the copy
            self.add_context(np.array(nats, np.float32))
            self.divergence += divergence
            self.agreed += int(agreed)

    def merge(self, peers: Processes) -> None:
        """Add the contexts of all processes, which are equally long and come one after another in order of rank."""
        if peers.world == 1:
            return
        peers.wait()
        nats = peers.chained(np.concatenate([np.zeros(0, np.float32), *self.contexts]))
        contexts = nats.reshape(peers.count(len(self.contexts)), -1)
        self.divergence = float(peers.chained(np.array([self.divergence])).sum())
        self.agreed = peers.count(self.agreed)
        self.contexts, self.positions, self.cross_entropy = [], 0, 0.0
        for own in contexts:
            self.add_context(own)


@torch.inference_mode()
def splice(
    model: LanguageModel,
    source: Source,
    contexts: np.ndarray,
    replacements: Mapping[str, Replacement],
    tick: Callable[[int], object],
    peers: Processes = ALONE,
) -> dict[str, Loss]:
    """Loss of the model as it is ("clean") and with each replacement on `contexts` [n, T] token ids.

    The blocks below the layer run once per context; what follows once per replacement. `tick` is
    called with the number of tokens of each batch. With `peers` each process takes some of the batches; all have the
    result.
    """
    losses = {name: Loss() for name in ("clean", *replacements)}
    before = f"blocks.{source.layer}.hook_in"
    for block in batches(model, contexts, peers):
        tokens = torch.from_numpy(block.astype(np.int64)).to(model.device)
        kept = torch.from_numpy(kept_mask(block, source.dropped_token_ids)).to(model.device)
        with model.capturing([before, source.input_hook]) as caught:
            logits = model.bridge(tokens, return_type="logits")
            residual, inputs = caught[before], caught[source.input_hook].float()
        where, clean = kept.nonzero(as_tuple=True), Clean(logits)  # sync: how many rows
        rows = inputs[where]
        losses["clean"].add(clean, logits, tokens)
        for name, replacement in replacements.items():
            outputs = replacement(rows)
            with model.bridge.hooks(fwd_hooks=[(source.output_hook, writer(where, outputs))]):
                logits = continued(model, residual, source.layer)
            losses[name].add(clean, logits, tokens)
        tick(tokens.numel())
    for loss in losses.values():
        loss.merge(peers)
    return losses


def batches(model: LanguageModel, contexts: np.ndarray, peers: Processes = ALONE) -> Iterator[np.ndarray]:
    """The contexts [n, T] in blocks whose logits fit into LOGITS, one at least; with `peers`, this process's blocks."""
    own, size = own_part(model, contexts, peers), _together(model, contexts)
    for start in range(0, len(own), size):
        yield own[start : start + size]


def own_part(model: LanguageModel, contexts: np.ndarray, peers: Processes) -> np.ndarray:
    """This process's part of the contexts [n, T]."""
    first, last = share(len(contexts), peers, _together(model, contexts))
    return contexts[first:last]


def _together(model: LanguageModel, contexts: np.ndarray) -> int:
    return max(1, LOGITS // (contexts.shape[1] * model.bridge.cfg.d_vocab))


def continued(model: LanguageModel, residual: Tensor, layer: int) -> Tensor:
    """Logits [b, T, V] of a forward pass that enters block `layer` with `residual` [b, T, D]."""
    with skipped(model.bridge.blocks[:layer]):
        return model.bridge(residual, start_at_layer=layer, return_type="logits")


@contextlib.contextmanager
def skipped(blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While open these blocks hand on what they get.

    The bridge's `start_at_layer` runs the blocks below and throws their output away; at layer 12 of 30
    that is a third of the time.
    """
    for block in blocks:
        vars(block)["forward"] = lambda hidden, *_, **__: hidden  # its setattr would reach the model's own
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def writer(where: tuple[Tensor, ...], replacement: Tensor) -> Callable[..., Tensor]:
    """A hook that puts the rows of `replacement` [n, D] at n places (context, position) of [b, T]."""

    def write(output: Tensor, hook: object) -> Tensor:
        changed = output.clone()
        changed[where] = replacement.to(output.dtype)
        return changed

    return write


def summary(losses: Mapping[str, Loss], name: str) -> LanguageMetrics:
    """Cross-entropy and KL of one replacement in nats per token, and the share of the damage undone.

    recovered_zero = (CE_zero - CE) / (CE_zero - CE_clean): 1 if the replacement costs nothing, 0 if it is
    as bad as no MLP output at all; recovered_mean the same against the mean output.
    """
    ce = {key: loss.cross_entropy / max(loss.positions, 1) for key, loss in losses.items()}
    own = losses[name]

    def recovered(floor: str) -> float | None:
        return ratio(ce[floor] - ce[name], ce[floor] - ce["clean"])

    return LanguageMetrics(
        cross_entropy=ce[name],
        increase=ce[name] - ce["clean"],
        increase_error=standard_error(by_context(own) - by_context(losses["clean"])),
        kl=own.divergence / max(own.positions, 1),
        recovered_zero=recovered("zero"),
        recovered_mean=recovered("mean"),
    )


def by_context(loss: Loss) -> np.ndarray:
    """[contexts] mean cross-entropy of each, float64."""
    return np.array([nats.mean(dtype=np.float64) for nats in loss.contexts])


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of `values`: their standard deviation (n - 1) over the root of n; none for fewer than two.

    What is counted is contexts: the positions of one depend on each other.
    """
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
