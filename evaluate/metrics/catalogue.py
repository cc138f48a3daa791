"""Everything that is known of each latent: what the page's browser shows, and latents.safetensors keeps.

Shapes: F latents, G prefixes, S samples, n neighbours or partners, H histogram bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluate.labels.choose import Labels
from evaluate.labels.effects import LogitEffects
from evaluate.labels.measured import Measured, Quality
from evaluate.metrics.coactivation import Partners
from evaluate.metrics.contexts import Best, Samples, token_entropy, token_weights, top_tokens
from evaluate.metrics.passes import First
from evaluate.metrics.redundancy import Neighbours
from evaluate.records import GroupMetrics, LabelMetrics, SplitPair

HISTOGRAM_BINS = 24
N_TOKENS = 5
COMMON = 256
"""Firings below which a label is said to be of few."""


@dataclass(frozen=True)
class Catalogue:
    """[F] unless said otherwise; the full dictionary's threshold unless said otherwise."""

    group: np.ndarray
    """int, nesting level."""
    density: np.ndarray
    """[G, F] share of rows on which the latent fires under each prefix's threshold; 0 outside a prefix."""
    firings: np.ndarray
    largest: np.ndarray
    mean: np.ndarray
    """Over the rows on which it fires."""
    energy: np.ndarray
    """Share of the summed squared activations: what it writes, as decoder rows have unit norm."""
    entropy: np.ndarray
    """Bits, of the tokens it fires on; NaN for a dead one."""
    top_share: np.ndarray
    """Share of its activation that one token has; NaN for a dead one."""
    tokens: np.ndarray
    """[F, N_TOKENS] token ids with most of its activation, -1 where there are fewer."""
    token_shares: np.ndarray
    """[F, N_TOKENS]"""
    histogram: np.ndarray
    """[F, H] firings of the even sample by activation, H equal bins from 0 to `largest`."""
    percentiles: np.ndarray
    """[F, 100] float32 activation that 1, 2, ... 100 % of the even sample do not exceed; 0 for a dead one."""
    neighbours: Neighbours
    twins: Partners
    parents: Partners
    samples: Samples
    effects: LogitEffects
    labels: Labels
    quality: Quality
    """Of the labels."""


def catalogue(
    first: First,
    samples: Samples,
    neighbours: Neighbours,
    effects: LogitEffects,
    ends: Sequence[int],
    measured: Measured,
    partners: tuple[Partners, Partners],
) -> Catalogue:
    """Puts together what the passes and the language model found; `partners`: twins and parents."""
    n_latents = ends[-1]
    twins, parents = partners
    prefixes = first.measurement.prefixes
    firing = prefixes[-1].firing
    density = np.zeros((len(ends), n_latents), np.float32)
    for g, prefix in enumerate(prefixes):
        density[g, : prefix.end] = prefix.firing.density.cpu().numpy()
    weights = token_weights(first.even)
    tokens, token_shares = top_tokens(weights, n_latents, N_TOKENS)
    squares, largest = firing.squared.cpu().numpy(), firing.largest.cpu().numpy()
    return Catalogue(
        group=np.repeat(np.arange(len(ends)), np.diff((0, *ends))),
        density=density,
        firings=firing.firings.cpu().numpy(),
        largest=largest,
        mean=firing.mean.cpu().numpy(),
        energy=squares / max(float(squares.sum()), 1e-300),
        entropy=token_entropy(weights, n_latents),
        top_share=np.where(tokens[:, 0] >= 0, token_shares[:, 0], np.nan),
        tokens=tokens,
        token_shares=token_shares,
        histogram=activation_histogram(first.even, largest),
        percentiles=activation_percentiles(first.even),
        neighbours=neighbours,
        twins=twins,
        parents=parents,
        samples=samples,
        effects=effects,
        labels=measured.labels,
        quality=measured.result(),
    )


def activation_histogram(even: Best, largest: np.ndarray) -> np.ndarray:
    """[F, H] counts of the even sample's activations in H equal bins from 0 to each latent's `largest`."""
    top = np.maximum(largest[even.latents], 1e-30)
    which = np.minimum((even.values / top * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    flat = np.bincount(
        even.latents * np.int64(HISTOGRAM_BINS) + which, minlength=len(largest) * HISTOGRAM_BINS
    )
    return flat.reshape(len(largest), HISTOGRAM_BINS)


def activation_percentiles(even: Best) -> np.ndarray:
    """[F, 100] the smallest activation of the even sample that p % of it, p from 1 to 100, do not exceed.

    Of 1, 2, 3, 4 the first quarter is 1, the second 2:

    >>> from transcoder.entries import Entries
    >>> even, rows = Best(1, 8), torch.arange(4)
    >>> entries = Entries(rows, torch.zeros(4).long(), torch.tensor([4.0, 1.0, 3.0, 2.0]), n_rows=4)
    >>> even.add(entries, ranks=rows, places=rows, tokens=rows)
    >>> even.finish()
    >>> activation_percentiles(even)[0, [0, 24, 25, 49, 99]].tolist()
    [1.0, 1.0, 2.0, 2.0, 4.0]
    """
    order = np.lexsort((even.values, even.latents))
    bounds = even.bounds()
    alive = np.flatnonzero(np.diff(bounds))
    counts = np.diff(bounds)[alive, None]
    rank = -(-np.arange(1, 101) * counts // 100) - 1
    percentiles = np.zeros((even.n_latents, 100), np.float32)
    percentiles[alive] = even.values[order[bounds[alive, None] + rank]]
    return percentiles


def group_summaries(catalogue: Catalogue, ends: Sequence[int]) -> list[GroupMetrics]:
    """What each nesting level is like: are early groups more general? Medians are over living latents."""
    nearest = catalogue.neighbours.cosines[:, :1].numpy()
    lines = []
    for g, end in enumerate(ends):
        own = catalogue.group == g
        alive = own & (catalogue.firings > 0)
        lines.append(
            GroupMetrics(
                start=end - int(own.sum()),
                end=end,
                alive=int(alive.sum()),
                dead_fraction=1 - float(alive.sum() / own.sum()),
                l0=float(catalogue.density[-1][own].sum()),
                energy_share=float(catalogue.energy[own].sum()),
                median_density=_median(catalogue.density[-1][alive]),
                median_entropy_bits=_median(catalogue.entropy[alive]),
                median_top_token_share=_median(catalogue.top_share[alive]),
                median_mean_activation=_median(catalogue.mean[alive]),
                median_nearest_cosine=_median(nearest[alive]),
                with_parent_fraction=_mean(catalogue.parents.scores[alive, 0] > 0.5) if g else None,
            )
        )
    return lines


def splitting(catalogue: Catalogue, n: int = 50) -> list[SplitPair]:
    """The pairs of latents whose firings overlap most: candidates of one feature split in two."""
    best, partner = catalogue.twins.scores[:, 0], catalogue.twins.latents[:, 0]
    order = np.argsort(-best, kind="stable")
    pairs: dict[tuple[int, int], float] = {}
    for f in order:
        if best[f] <= 0 or len(pairs) == n:
            break
        pairs.setdefault((min(int(f), int(partner[f])), max(int(f), int(partner[f]))), float(best[f]))
    return [SplitPair(latents=list(pair), jaccard=score) for pair, score in pairs.items()]


def label_metrics(catalogue: Catalogue) -> LabelMetrics:
    """How well the labels say where latents fire."""
    quality, firings = catalogue.quality, catalogue.labels.firings
    known = ~np.isnan(quality.recall)
    return LabelMetrics(
        rows=quality.rows,
        measured=int(known.sum()),
        median_precision=_median(quality.precision[~np.isnan(quality.precision)]),
        median_recall=_median(quality.recall[known]),
        median_activation_recall=_median(quality.activation_recall[known]),
        rare=int(((firings < COMMON) & (catalogue.firings > 0)).sum()),
    )


def tensors(catalogue: Catalogue) -> dict[str, torch.Tensor]:
    """Per-latent columns for notebooks: latents.safetensors."""
    return {
        "group": torch.from_numpy(catalogue.group),
        "density": torch.from_numpy(catalogue.density),
        "firings": torch.from_numpy(catalogue.firings),
        "largest_activation": torch.from_numpy(catalogue.largest),
        "mean_activation": torch.from_numpy(catalogue.mean),
        "energy_share": torch.from_numpy(catalogue.energy),
        "token_entropy_bits": torch.from_numpy(catalogue.entropy),
        "top_token_share": torch.from_numpy(catalogue.top_share),
        "top_tokens": torch.from_numpy(catalogue.tokens),
        "activation_histogram": torch.from_numpy(catalogue.histogram.astype(np.int32)),
        "activation_percentiles": torch.from_numpy(catalogue.percentiles),
        "label_kinds": torch.from_numpy(catalogue.labels.kinds),
        "label_tokens": torch.from_numpy(catalogue.labels.tokens),
        "label_shares": torch.from_numpy(catalogue.labels.shares),
        "label_lifts": torch.from_numpy(catalogue.labels.lifts),
        "label_firings": torch.from_numpy(catalogue.labels.firings),
        "label_precision": torch.from_numpy(catalogue.quality.precision),
        "label_recall": torch.from_numpy(catalogue.quality.recall),
        "label_activation_recall": torch.from_numpy(catalogue.quality.activation_recall),
        "promoted_tokens": torch.from_numpy(catalogue.effects.promoted),
        "promoted_logits": torch.from_numpy(catalogue.effects.promoted_by),
        "suppressed_tokens": torch.from_numpy(catalogue.effects.suppressed),
        "suppressed_logits": torch.from_numpy(catalogue.effects.suppressed_by),
        "effect_histogram": torch.from_numpy(catalogue.effects.histogram),
        "effect_edges": torch.from_numpy(catalogue.effects.edges),
        "effect_peak": torch.from_numpy(catalogue.effects.peak),
        "effect_like_random": torch.from_numpy(catalogue.effects.like_random),
        "nearest_latents": catalogue.neighbours.latents,
        "nearest_cosines": catalogue.neighbours.cosines,
        "twins": torch.from_numpy(catalogue.twins.latents),
        "twins_jaccard": torch.from_numpy(catalogue.twins.scores),
        "parents": torch.from_numpy(catalogue.parents.latents),
        "parents_lift": torch.from_numpy(catalogue.parents.scores),
    }


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None
