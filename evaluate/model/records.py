"""model.json as records: what a layer set loses, layer by layer and all MLPs at once. See evaluate/records.py."""

from evaluate.records import NotMeasured, PrefixEnd, Record


class LayerPrefix(PrefixEnd):
    """One prefix of one layer's transcoder, from the layer's own metrics.json."""

    fvu: float | None
    """fraction of variance unexplained; null for constant outputs"""
    fvu_typical: float | None = None
    """the same without heavy rows (`errors.typical` in metrics.json); null where the layer has none"""
    l0: float
    """active latents per row, mean"""
    dead_fraction: float
    """share of the prefix's latents that fired on none of the rows"""
    over_10_percent: int
    """latents that fire on more than 10 % of the rows"""
    over_10_percent_fraction: float
    """their share of the prefix's latents"""
    recovered_zero: float | None
    """cross-entropy recovered with only this MLP replaced, relative to zeroing it; null if not measured"""
    increase: float | None
    """cross-entropy with only this MLP replaced minus that of the original model, nats per token; null if not
    measured"""
    increase_error: float | None = None
    """standard error of `increase` over contexts; null for a single context, or if not measured"""
    recovered_zero_error: float | None = None
    """standard error of `recovered_zero`: that of `increase`, over what zeroing costs, which is taken as exact"""
    kl: float | None
    """KL divergence with only this MLP replaced, nats per token; null if not measured"""


class LayerMetrics(Record):
    """One layer of the set."""

    layer: int
    """from 0"""
    rows: int
    """rows that were measured, held-out or train (`provenance.split`)"""
    positions: int | None
    """predicted tokens in `increase`, `recovered_zero` and `kl`; null if not measured"""
    heavy_rows: int = 0
    """rows whose outputs lie far from all others"""
    heavy_variance: float | None = None
    """their share of the outputs' variance; null where there are none"""
    prefixes: list[LayerPrefix]
    """each prefix, coarsest first"""
    report: str
    """path of the layer's own report, relative to this file"""


class ChangedModel(Record):
    """The language model with some of its MLPs replaced."""

    cross_entropy: float
    """of the next token, nats per token"""
    kl: float
    """KL divergence of the next-token distribution from that of the original model, nats per token"""
    top1_agreement: float
    """share of the positions where the most likely next token is that of the original model"""


class ReplacedPrefix(ChangedModel):
    """All MLPs of the set replaced by one prefix of their transcoders, without error terms."""

    latents: int
    """latents of this prefix, summed over layers"""
    l0: float
    """active latents per token, summed over layers; from the layers' own evaluations"""
    increase: float
    """cross-entropy minus that of the original model on the same tokens, nats per token"""
    recovered_zero: float | None
    """(CE_zero - CE) / (CE_zero - CE_clean), where zero: all MLPs of the set zeroed; null if zeroing costs nothing"""
    recovered_mean: float | None
    """the same, with every MLP at its mean output in place of zero"""


class CumulativeLine(ChangedModel):
    """The layers of the set up to one layer replaced, the others unchanged, without error terms."""

    prefix: int
    """from 0"""
    layer: int
    """the last layer that is replaced"""
    increase: float
    """cross-entropy minus that of the original model on the same tokens, nats per token"""


class ErrorTermsLine(ChangedModel):
    """All MLPs replaced, with error terms. This is the original model up to rounding: a check of the measurement."""

    prefix: int
    """from 0"""
    increase: float
    """cross-entropy minus that of the original model on the same tokens, nats per token"""
    largest_difference: float
    """largest absolute difference of a logit from that of the original model"""


class FirstContexts(Record):
    """What was measured on the first contexts only, because it takes a pass for every layer."""

    contexts: int
    """number of contexts: the first of those in `replaced`"""
    positions: int
    """predicted tokens in them"""
    clean: float
    """cross-entropy of the original model on them, nats per token"""
    cumulative: list[CumulativeLine]
    """layers replaced cumulatively from the first, for each prefix, coarsest first"""
    with_error_terms: list[ErrorTermsLine]
    """all MLPs replaced, with error terms, for each prefix, coarsest first"""


class ReplacedMetrics(Record):
    """The language model with all MLPs of the set replaced at once."""

    skipped: None
    """null, because it was measured"""
    contexts: int
    """number of contexts of the split that the language model ran on"""
    positions: int
    """predicted tokens in them"""
    clean: float
    """cross-entropy of the original model, nats per token"""
    zero: ChangedModel
    """every MLP's output set to zero at the positions that have a row"""
    mean: ChangedModel
    """every MLP's output set, at these positions, to its mean over the store's rows"""
    prefixes: list[ReplacedPrefix]
    """each prefix, coarsest first"""
    first: FirstContexts
    """the cumulative numbers, and those with error terms"""


class Sufficient(Record):
    """The coarsest prefix that keeps the cross-entropy within a limit."""

    limit: float
    """limit on the increase of the cross-entropy, nats per token"""
    prefix: int | None
    """coarsest prefix below the limit with all MLPs of the set replaced; null: none"""
    latents: int | None
    """latents of that prefix, summed over layers; null: none"""
    l0: float | None
    """active latents per token of that prefix, summed over layers; null: none"""
    layers_from_the_first: list[int]
    """for each prefix: how many layers of the set, counted from the first, can be replaced at once below the limit"""
    each_layer_alone: list[int] | None
    """for each prefix: number of layers for which it is the coarsest whose increase and its standard error together
    are below the limit with only that MLP replaced; the last entry: number of layers for which no prefix is; null if a
    layer's cross-entropy was not measured"""


class SetProvenance(Record):
    """What was measured, and on what. If it is unchanged, nothing is measured again."""

    run: str
    """name of the runs in the set"""
    model: str
    """the language model, by the name that the harvest used"""
    model_sha256: str
    """digest of its weights"""
    n_layers: int
    """number of layers of the language model"""
    layers: list[int]
    """layers of the set"""
    split: str
    """heldout or train"""
    contexts_of_layer: int
    """layer from whose store the contexts were taken"""
    other_text: list[int]
    """layers whose store has other contexts in this split: they were harvested from another text, or more of it"""
    tokens: int
    """`--tokens`: tokens on which all MLPs are replaced; 0: none"""
    weights_sha256: dict[str, str]
    """by layer: digest of transcoder.safetensors"""
    store_fingerprint: dict[str, str]
    """by layer: digest of what was harvested and how"""
    version: int
    """version of the measurement; files of another version are measured again"""


class ModelMetrics(Record):
    """All of model.json."""

    provenance: SetProvenance
    """what was measured, and on what"""
    layers: list[LayerMetrics]
    """each layer of the set, in rising order"""
    replaced: ReplacedMetrics | NotMeasured
    """all MLPs of the set replaced at once, or why that was not measured"""
    sufficient: list[Sufficient]
    """the coarsest prefix for each limit on the loss; empty if not measured"""
    files: list[str]
    """names of the page and the plots beside this file"""
