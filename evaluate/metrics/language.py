"""What needs the language model: cross-entropy with every prefix spliced in, and what latents promote and suppress.

Shapes: F latents, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import InputError
from common.processes import ALONE, Processes
from common.progress import progress
from common.settings import Model, Settings
from evaluate.labels.effects import LogitEffects, logit_effects, tokens_of
from evaluate.metrics.rows import TextSplit
from evaluate.records import AblationLosses, LanguageMetrics, NotMeasured
from shards import Store
from shards.manifest import Source
from transcoder import Transcoder

if TYPE_CHECKING:
    from harvest.lm import LanguageModel

PROMOTE_LIMIT = 2e12
"""F * D * V up to which promoted tokens are computed on a CPU, about a minute; 1.3e11 in the demo."""


@dataclass(frozen=True)
class Language:
    """What the language model says of a transcoder."""

    cross_entropy: AblationLosses | NotMeasured
    """Of the model as it is and with both ablations, or why nothing was measured."""
    prefixes: list[LanguageMetrics]
    """Of every prefix, coarsest first; none where nothing was measured."""
    effects: LogitEffects
    by_context: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Cross-entropy of each context [n], nats per token: "clean", "zero", "mean", and each prefix by its number."""


def measure_language(
    settings: Settings,
    store: Store,
    split: TextSplit,
    coder: Transcoder,
    n_tokens: int,
    peers: Processes = ALONE,
) -> Language:
    """The cross-entropy with every prefix in the MLP's place, and what every latent promotes and suppresses.

    The first `n_tokens` tokens of the split's contexts are used (whole contexts, at least one). With `peers` each
    process loads the model, and takes some of the contexts and of the latents; all have the result.
    """
    nothing = LogitEffects.none(len(coder.W_dec))
    if n_tokens == 0:
        return Language(NotMeasured(skipped="it was not asked for"), [], nothing)
    try:
        model, why = language_model(settings.model, store.manifest.source), ""
    except InputError as error:
        model, why = None, str(error)
    reasons = [each for each in peers.said(why) if each]
    if model is None or reasons:
        return Language(NotMeasured(skipped=reasons[0]), [], nothing)
    coder = coder.to(model.device)
    losses, prefixes, by_context = _cross_entropy(model, settings, store, split, coder, n_tokens, peers)
    affordable = coder.W_dec.numel() * model.bridge.cfg.d_vocab <= PROMOTE_LIMIT or model.device.type != "cpu"
    if not affordable:
        return Language(losses, prefixes, nothing, by_context)
    ranked = tokens_of(store, model.bridge.cfg.d_vocab)
    return Language(losses, prefixes, logit_effects(model, coder.W_dec, ranked, peers=peers), by_context)


def _cross_entropy(
    model: LanguageModel,
    settings: Settings,
    store: Store,
    split: TextSplit,
    coder: Transcoder,
    n_tokens: int,
    peers: Processes,
) -> tuple[AblationLosses, list[LanguageMetrics], dict[str, np.ndarray]]:
    from evaluate.kept.losses import OwnLosses, agree  # these import transformers, which takes seconds
    from evaluate.metrics.splice import by_context, own_part, splice, summary

    source, moments = store.manifest.source, store.manifest.splits[settings.evaluate.split].outputs
    assert moments is not None, "a split with rows has moments"
    mean = torch.tensor(moments.mean, dtype=torch.float32, device=model.device)
    n_prefixes = len(coder.prefix_ends)
    ablations = {
        "zero": lambda inputs: torch.zeros(len(inputs), len(mean), device=inputs.device),
        "mean": lambda inputs: mean.expand(len(inputs), -1),
    }
    n_contexts = min(len(split.contexts), max(1, n_tokens // source.context_length))
    contexts = split.contexts[np.arange(n_contexts)]
    own = OwnLosses.of(settings, [store], contexts, [mean], model.device)
    kept = own.read()
    if peers.any(kept is None):
        kept = None
    replacements = {str(g): coder.prefix(g) for g in range(n_prefixes)}
    tokens = own_part(model, contexts, peers).size
    with progress("cross-entropy", tokens, "tokens") as bar:
        losses = splice(
            model, source, contexts, replacements if kept else ablations | replacements, bar.update, peers
        )
    if kept and peers.any(not agree(kept["clean"], losses["clean"])):
        kept = None
        with progress("ablations", tokens, "tokens") as bar:
            losses |= splice(model, source, contexts, ablations, bar.update, peers)
    if kept is None:
        if peers.leads:
            own.keep({name: losses[name] for name in ("clean", *ablations)})
    else:
        losses |= {name: kept[name] for name in ablations}
    clean, zero, ablated = (summary(losses, key).cross_entropy for key in ("clean", "zero", "mean"))
    whole = AblationLosses(
        skipped=None,
        contexts=n_contexts,
        positions=losses["clean"].positions,
        clean=clean,
        zero=zero,
        mean=ablated,
    )
    each = {name: by_context(loss) for name, loss in losses.items()}
    return whole, [summary(losses, str(g)) for g in range(n_prefixes)], each


def language_model(wanted: Model, source: Source) -> LanguageModel:
    """The language model of a store; raises `InputError` when it cannot be had, or is another one."""
    from harvest import lm

    where = lm.locate(wanted)
    model = lm.load(wanted, where, lm.load_tokenizer(where, wanted.revision))
    digest = model.weights_sha256()
    if digest != source.weights_sha256:
        raise InputError(
            f"model {wanted.name}: expected weights {source.weights_sha256[:12]}... as harvested, "
            f"found {digest[:12]}..."
        )
    return model
