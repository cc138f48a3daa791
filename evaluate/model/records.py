"""model.json as records: what a layer set loses, layer by layer and all MLPs at once. See evaluate/records.py."""

from evaluate.records import NotMeasured, PrefixEnd, Record


class LayerPrefix(PrefixEnd):
    """One prefix of one layer's transcoder, from the layer's own metrics.json."""

    fvu: float | None
    """fraction of variance unexplained; null for constant outputs"""
    l0: float
    """active latents per row, mean"""
    dead_fraction: float
    """share of the prefix's latents that fired on none of the rows"""
    over_10_percent: int
    """latents that fire on more than 10 % of the rows"""
    over_10_percent_fraction: float
    """their share of the prefix's latents"""
    recovered_zero: float | None
    """cross-entropy recovered with this MLP alone replaced, against zeroing it; null where it was not measured"""
    increase: float | None
    """cross-entropy with this MLP alone replaced less that of the model as it is, nats per token; null likewise"""
    kl: float | None
    """KL divergence with this MLP alone replaced, nats per token; null likewise"""


class LayerMetrics(Record):
    """One layer of the set."""

    layer: int
    """from 0"""
    rows: int
    """held-out rows (or train rows: `provenance.split`) that were measured"""
    positions: int | None
    """tokens that were predicted for `increase`, `recovered_zero` and `kl`; null where they were not measured"""
    prefixes: list[LayerPrefix]
    """each prefix, coarsest first"""
    report: str
    """the layer's own page, relative to this file"""


class ChangedModel(Record):
    """The language model with some of its MLPs replaced."""

    cross_entropy: float
    """of the next token, nats per token"""
    kl: float
    """KL divergence of the next token's distribution from that of the model as it is, nats per token"""
    top1_agreement: float
    """share of the positions where the likeliest next token is the one of the model as it is"""


class ReplacedPrefix(ChangedModel):
    """All MLPs of the set replaced by one prefix of their transcoders; without error terms."""

    latents: int
    """of this prefix, all layers together"""
    l0: float
    """active latents per token, all layers together: the sum of the layers' own means"""
    increase: float
    """cross-entropy less that of the model as it is on the same tokens, nats per token"""
    recovered_zero: float | None
    """(CE_zero - CE) / (CE_zero - CE_clean), zero: all MLPs of the set zeroed; null where zeroing costs nothing"""
    recovered_mean: float | None
    """the same against every MLP's mean output"""


class CumulativeLine(ChangedModel):
    """The set's layers up to one replaced, the others the model's own; without error terms."""

    prefix: int
    """from 0"""
    layer: int
    """the last that is replaced"""
    increase: float
    """cross-entropy less that of the model as it is on the same tokens, nats per token"""


class ErrorTermsLine(ChangedModel):
    """All MLPs replaced, with error terms: the model itself, up to rounding; a check of the measurement."""

    prefix: int
    """from 0"""
    increase: float
    """cross-entropy less that of the model as it is on the same tokens, nats per token"""
    largest_difference: float
    """of a logit to the clean one's, absolute"""


class FirstContexts(Record):
    """What was measured on the first contexts alone, as it takes a pass for every layer."""

    contexts: int
    """of those of `replaced`, the first so many"""
    positions: int
    """tokens of them that were predicted"""
    clean: float
    """cross-entropy of the model as it is on them, nats per token"""
    cumulative: list[CumulativeLine]
    """from the first layer up, prefix by prefix, coarsest first"""
    with_error_terms: list[ErrorTermsLine]
    """each prefix, coarsest first"""


class ReplacedMetrics(Record):
    """The language model with all MLPs of the set replaced at once."""

    skipped: None
    """null: it was measured"""
    contexts: int
    """contexts of the split that were read"""
    positions: int
    """tokens of them that were predicted"""
    clean: float
    """cross-entropy of the model as it is, nats per token"""
    zero: ChangedModel
    """every MLP's output zeroed at the positions that have a row"""
    mean: ChangedModel
    """every MLP's output at its mean there"""
    prefixes: list[ReplacedPrefix]
    """each prefix, coarsest first"""
    first: FirstContexts
    """cumulatively, and with error terms"""


class Sufficient(Record):
    """Which prefix suffices for a loss."""

    limit: float
    """the increase of the cross-entropy stays below it, nats per token"""
    prefix: int | None
    """the coarsest with which it does where all MLPs of the set are replaced; null: none"""
    latents: int | None
    """of that prefix, all layers together; null: none"""
    l0: float | None
    """its active latents per token, all layers together; null: none"""
    layers_from_the_first: list[int]
    """of each prefix: so many of the set's layers, from the first up, can be replaced"""
    each_layer_alone: list[int] | None
    """layers for which each prefix is the coarsest that suffices where this MLP alone is replaced, and last those for
    which none does; null where a layer's cross-entropy was not measured"""


class SetProvenance(Record):
    """What was measured on what: files with the same one are the same."""

    run: str
    """name of the runs"""
    model: str
    """the language model, as the harvest called it"""
    model_sha256: str
    """digest of its weights"""
    n_layers: int
    """layers of the language model"""
    layers: list[int]
    """those of the set"""
    split: str
    """heldout or train"""
    contexts_of_layer: int
    """whose store's contexts were run through the model"""
    other_text: list[int]
    """layers whose store has other contexts in this split: harvested from another text, or more of it"""
    tokens: int
    """asked for with all MLPs replaced, 0: none"""
    weights_sha256: dict[str, str]
    """by layer: digest of transcoder.safetensors"""
    store_fingerprint: dict[str, str]
    """by layer: digest of what was harvested and how"""
    version: int
    """of what is measured; another one is measured again"""


class ModelMetrics(Record):
    """All of model.json."""

    provenance: SetProvenance
    """what was measured on what"""
    layers: list[LayerMetrics]
    """each layer of the set, from the first"""
    replaced: ReplacedMetrics | NotMeasured
    """all MLPs of the set replaced at once, or why that was not measured"""
    sufficient: list[Sufficient]
    """which prefix suffices for what loss; empty where that was not measured"""
    files: list[str]
    """the other files beside this one"""
