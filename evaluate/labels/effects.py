"""What latents do to the logits by themselves: tokens promoted and suppressed, and whether that is more than chance.

An effect of a direction on a token is the token's logit of unembed(final_norm(direction)) less that of a zero direction
and less the mean over the vocabulary: it is what the softmax sees. The effects of random directions are a few times
larger on some tokens than on others: those with long rows of the unembedding, many of them pieces of words that the
model has hardly ever read (" strugg"). So tokens are ranked by z: the effect over its standard deviation over random
directions.

Shapes: F latents, D model width, V tokens that are ranked, n tokens shown per latent, H bins, K random directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.processes import ALONE, Processes
from evaluate.labels.words import READ
from evaluate.metrics.firing import tally
from evaluate.metrics.rows import ContextTable, share
from evaluate.records import EffectMetrics

if TYPE_CHECKING:
    from harvest.lm import LanguageModel
    from shards import Store

N_PROMOTED = 10
HISTOGRAM_BINS = 32
BLOCK = 256
"""Directions at once: 50 MB of logits at a vocabulary of 49,152."""
N_RANDOM, SEED = 512, 0
"""Random directions that each token's scale is taken from, as many for the limit, and as many to try it on."""
CHANCE = 0.01
"""Share of random directions that are beyond the limit."""
SEEN_CONTEXTS = 16_384
"""Contexts of a split that are read for the tokens that occur in it."""


@dataclass(frozen=True)
class LogitEffects:
    """What each latent's decoder row alone does to the logits, see `logit_effects`. n, H are 0 where that was not
    computed: the language model was not run, or it would take minutes."""

    promoted: np.ndarray
    """[F, n] int32 token ids whose logits it raises most, highest first."""
    promoted_by: np.ndarray
    """[F, n] float32, by how much more than the mean logit."""
    suppressed: np.ndarray
    """[F, n] int32 token ids whose logits it lowers most, lowest first."""
    suppressed_by: np.ndarray
    """[F, n] float32, negative where it lowers them more than the mean logit."""
    histogram: np.ndarray
    """[F, H] int32 number of ranked tokens by effect, in equal bins from the lowest to the highest."""
    edges: np.ndarray
    """[F, 2] float32 lowest and highest effect on the ranked tokens."""
    peak: np.ndarray
    """[F] float32 mean |z| of the n tokens where it is largest; NaN where it was not computed."""
    left_out: int
    """Tokens of the vocabulary that were left out."""
    chance: Chance | None
    """What random directions do; none where it was not computed."""

    @classmethod
    def none(cls, n_latents: int) -> LogitEffects:
        tokens, values = np.zeros((n_latents, 0), np.int32), np.zeros((n_latents, 0), np.float32)
        peak = np.full(n_latents, np.nan, np.float32)
        return cls(tokens, values, tokens, values, tokens, values, peak, 0, None)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays, by the fields' names: a number is an array of one, no `chance` an empty one."""
        chance = [] if self.chance is None else [self.chance.limit, self.chance.false_positives]
        single = {"left_out": np.array([self.left_out]), "chance": np.array(chance, np.float64)}
        return {each.name: single.get(each.name, getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> LogitEffects:
        """The inverse of `arrays`."""
        chance = arrays["chance"]
        columns = {name: values for name, values in arrays.items() if name not in ("left_out", "chance")}
        known = Chance(*chance.tolist()) if chance.size else None
        return cls(**columns, left_out=int(arrays["left_out"][0]), chance=known)

    @property
    def like_random(self) -> np.ndarray:
        """[F] bool: no more peaked than a random direction's; false where nothing was computed."""
        limit = -np.inf if self.chance is None else self.chance.limit
        return self.peak <= limit


@dataclass(frozen=True)
class Chance:
    """The effects of random directions of the same norm."""

    limit: float
    """Peak that `CHANCE` of `N_RANDOM` random directions exceed."""
    false_positives: float
    """Share of `N_RANDOM` others that exceed it."""


def tokens_in(contexts: ContextTable, size: int) -> np.ndarray:
    """[size] bool: which of so many token ids occur in the first `SEEN_CONTEXTS` of the contexts."""
    occurs = np.zeros(size, bool)
    for start in range(0, min(len(contexts), SEEN_CONTEXTS), READ):
        occurs[contexts[np.arange(start, min(start + READ, len(contexts)))]] = True
    return occurs


def tokens_of(store: Store, size: int) -> np.ndarray:
    """[size] bool: which of so many token ids occur in a store's text. Only these are ranked, on every page."""
    return tokens_in(store.train.contexts, size) | tokens_in(store.heldout.contexts, size)


@torch.inference_mode()
def logit_effects(
    model: LanguageModel,
    W_dec: Tensor,
    ranked: np.ndarray | None = None,
    n: int = N_PROMOTED,
    peers: Processes = ALONE,
) -> LogitEffects:
    """What each row [F, D] does to the logits of the `ranked` tokens (none: of all), a mask over the vocabulary.

    The direct path only: whatever later layers make of the direction is not seen. The values are those of a residual
    stream that holds nothing but the direction: in a text the norm's scale makes them smaller, all by the same factor,
    its gain is included. The biases' own logits, which a zero direction has too, are subtracted. With `peers` each
    process takes some of the rows; all have the result.
    """
    space = _Space(model, W_dec, ranked)
    n = min(n, space.size)
    parts = []
    start, stop = share(len(W_dec), peers, BLOCK)
    for block in W_dec[start:stop].to(model.dtype).split(BLOCK):
        effects = space.effects(block)
        edges = torch.stack(effects.aminmax(dim=1), 1)
        z = effects / space.scale
        most, least = z.topk(n), z.topk(n, largest=False)
        tokens = (space.tokens[each.indices].int() for each in (most, least))
        values = (effects.gather(1, each.indices) for each in (most, least))
        extremes = torch.cat([most.values, least.values], 1).abs()
        parts.append((*tokens, *values, _histograms(effects, edges).int(), edges, extremes))
    peers.wait()
    promoted, suppressed, promoted_by, suppressed_by, counts, edges, extremes = (
        peers.chained(torch.cat(column).cpu().numpy()) for column in zip(*parts, strict=True)
    )
    return LogitEffects(
        promoted,
        promoted_by,
        suppressed,
        suppressed_by,
        counts,
        edges,
        -np.sort(-extremes, axis=1)[:, :n].mean(1),
        space.left_out,
        space.chance(n),
    )


class _Space:
    """The logits of the ranked tokens, as directions change them."""

    def __init__(self, model: LanguageModel, W_dec: Tensor, ranked: np.ndarray | None) -> None:
        self.model = model
        self.biases = self._logits(torch.zeros_like(W_dec[:1], dtype=model.dtype))
        vocabulary = self.biases.shape[1]
        known = np.ones(vocabulary, bool) if ranked is None else ranked[:vocabulary]
        self.tokens = torch.from_numpy(np.flatnonzero(known)).to(self.biases.device)
        self.size, self.left_out = len(self.tokens), vocabulary - len(self.tokens)
        generator = torch.Generator().manual_seed(SEED)
        random = torch.randn(3 * N_RANDOM, W_dec.shape[1], generator=generator)
        random *= W_dec.float().norm(dim=1).mean().cpu() / random.norm(dim=1, keepdim=True)
        self.random = random.to(self.biases.device, model.dtype).split(N_RANDOM)
        blocks = self.random[0].split(BLOCK)
        squares = torch.stack([self.effects(block).square().sum(0) for block in blocks]).sum(0)
        self.scale = (squares / N_RANDOM).sqrt().clamp(min=1e-12)
        """[V] standard deviation of each token's effect over random directions, whose mean is 0."""

    def _logits(self, directions: Tensor) -> Tensor:
        return self.model.bridge.unembed(self.model.bridge.ln_final(directions[None]))[0]

    def effects(self, directions: Tensor) -> Tensor:
        """[B, V] float32 of each direction [B, D] on each ranked token."""
        effects = (self._logits(directions) - self.biases).float()
        effects -= effects.mean(1, keepdim=True)
        return effects if not self.left_out else effects[:, self.tokens]

    def chance(self, n: int) -> Chance:
        """The peak that few random directions exceed, set on some of them and tried on others."""

        def peaks(directions: Tensor) -> np.ndarray:
            parts = [
                (self.effects(block) / self.scale).abs().topk(n).values for block in directions.split(BLOCK)
            ]
            return torch.cat(parts).mean(1).cpu().numpy()

        limit = float(np.quantile(peaks(self.random[1]), 1 - CHANCE))
        return Chance(limit, float((peaks(self.random[2]) > limit).mean()))


def _histograms(effects: Tensor, edges: Tensor) -> Tensor:
    """[B, H] counts of each row's values in equal bins between its edges [B, 2]."""
    low, high = edges[:, :1], edges[:, 1:]
    width = ((high - low) / HISTOGRAM_BINS).clamp(min=1e-30)
    bins = ((effects - low) / width).long().clamp(0, HISTOGRAM_BINS - 1)
    bins += torch.arange(len(effects), device=effects.device)[:, None] * HISTOGRAM_BINS
    return tally(bins.flatten(), len(effects) * HISTOGRAM_BINS).view(-1, HISTOGRAM_BINS)


def effect_metrics(effects: LogitEffects, firings: np.ndarray, occurs: np.ndarray) -> EffectMetrics | None:
    """Of all latents together; `occurs`: mask over the vocabulary of what is in the evaluated text."""
    if effects.chance is None:
        return None
    promoted = effects.promoted[firings > 0]
    return EffectMetrics(
        promoted_in_text=float(occurs[np.minimum(promoted, len(occurs) - 1)].mean())
        if promoted.size
        else None,
        left_out=effects.left_out,
        like_random=int((effects.like_random & (firings > 0)).sum()),
        limit=effects.chance.limit,
        false_positives=effects.chance.false_positives,
    )
