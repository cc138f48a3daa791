"""metrics.json as records: each filled once by its owner, written and read in evaluate/files.py.

A field's docstring says what it is, in which unit, and is its line in docs/outputs.md. A field that has a default is
left out of the file where it is not given; every other one is written, null where there is no number. Imports no torch.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen part of a file; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    def written(self) -> dict[str, object]:
        """The JSON object that stands for it in a file, in the order of the fields."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class ReconstructionMetrics(Record):
    """How well one reconstruction y_hat of the outputs y does."""

    fvu: float | None
    """fraction of variance unexplained: sum of (y - y_hat)^2 over sum of (y - mean(y))^2; null for constant outputs"""
    mse: float
    """mean of (y - y_hat)^2 over rows and dimensions, squared units of the activations"""
    mae: float
    """mean of abs(y - y_hat), units of the activations"""
    cosine: float
    """mean over the rows of the cosine of y and y_hat, 0 for a row where either is zero"""
    relative_bias: float | None
    """mean of y_hat^2 over mean of y y_hat: below 1 the reconstruction shrinks; null where the latter is not above 0"""


class SparsityMetrics(Record):
    """How many latents are active on a row."""

    l0: float
    """active latents per row, mean"""
    l0_median: float
    """active latents per row, median"""
    l0_std: float
    """active latents per row, standard deviation"""
    l0_histogram: list[int]
    """rows with 0, 1, 2, ... active latents"""
    l1: float
    """summed activations of a row, mean, units of the activations"""


class TrainingSelection(ReconstructionMetrics):
    """The same rows with training's selection (batch top-k or top-k) instead of the threshold."""

    l0: float
    """active latents per row, mean"""
    l1: float
    """summed activations of a row, mean, units of the activations"""


class LanguageMetrics(Record):
    """The language model with the MLP's output replaced by a prefix's."""

    cross_entropy: float
    """of the next token, nats per token"""
    increase: float | None = None
    """cross-entropy minus that of the original model on the same tokens, nats per token; left out before version 3"""
    increase_error: float | None = None
    """standard error of `increase` over contexts: standard deviation of each context's mean increase, over the root of
    their number; null for a single context, left out before version 3"""
    kl: float
    """KL divergence of the next-token distribution from that of the original model, nats per token"""
    recovered_zero: float | None
    """(CE_zero - CE) / (CE_zero - CE_clean): 1 costs nothing, 0 is as bad as none; null where zeroing costs nothing"""
    recovered_mean: float | None
    """the same against the mean output"""


class PrefixEnd(Record):
    """Which prefix."""

    end: int
    """latents of the prefix"""


class FrequencyMetrics(Record):
    """How often a prefix's latents fire."""

    threshold: float
    """activation above which a latent is active, units of the activations; the mean where each latent has its own"""
    dead_fraction: float
    """share of the prefix's latents that fired on none of the rows"""
    over_1_percent: int
    """latents that fire on more than 1 % of the rows"""
    over_10_percent: int
    """latents that fire on more than 10 % of the rows"""
    over_10_percent_fraction: float
    """their share of the prefix's latents"""


class PrefixMetrics(FrequencyMetrics, SparsityMetrics, ReconstructionMetrics, PrefixEnd):
    """One prefix, gated by its own threshold."""

    over_10_percent_verdict: Literal["good", "moderate", "poor"]
    """good to 1 %, moderate to 5 %"""
    training_selection: TrainingSelection | None
    """the same rows with training's selection; null for an imported transcoder"""
    cross_entropy: LanguageMetrics | None
    """null where it was not measured"""


class FiringMetrics(Record):
    """How often and how strongly the latents of the full dictionary fire."""

    rows: int
    """rows that were measured"""
    n: int
    """latents"""
    dead: int
    """latents that fired on none of the rows"""
    alive: int
    """the others"""
    over_1_percent: int
    """latents that fire on more than 1 % of the rows"""
    over_10_percent: int
    """latents that fire on more than 10 % of the rows"""
    median_density: float | None
    """share of the rows on which the median living latent fires"""
    largest_activation: float
    """over all latents and rows, units of the activations"""
    mean_activation: float | None
    """over all firings, units of the activations"""
    log10_density_edges: list[float]
    """edges of the histogram's bins, log10 of the share of rows; the lowest bin takes what is rarer too"""
    log10_density_histogram: list[int]
    """living latents in each bin"""


class GroupMetrics(Record):
    """One nesting level under the full dictionary's threshold; medians are over its living latents."""

    start: int
    """first latent"""
    end: int
    """latent after the last"""
    alive: int
    """latents that fired"""
    dead_fraction: float
    """share of the group's latents that fired on none of the rows"""
    l0: float
    """active latents of the group per row, mean"""
    energy_share: float
    """its part of the summed squared activations"""
    median_density: float | None
    """share of the rows on which a latent fires"""
    median_entropy_bits: float | None
    """entropy of the tokens that a latent fires on, bits"""
    median_top_token_share: float | None
    """share of a latent's activation that one token holds"""
    median_mean_activation: float | None
    """over the rows on which a latent fires, units of the activations"""
    median_nearest_cosine: float | None
    """cosine of a latent's decoder row to the nearest other one"""
    with_parent_fraction: float | None
    """share of the living latents with a parent whose lift is above 0.5; null for group 0, which has no coarser one"""


class SplitPair(Record):
    """Two latents whose firings overlap: candidates of one feature split in two."""

    latents: list[int]
    """the two, smaller number first"""
    jaccard: float
    """rows of both over rows of either"""


class LabelMetrics(Record):
    """How well the latents' labels tell where they fire; of single latents: latents.safetensors."""

    rows: int
    """rows that the labels were measured on: none of those that they were chosen on"""
    measured: int
    """living latents whose label was measured; the others fire on too few rows"""
    median_precision: float | None
    """share of the label's rows on which the latent fires, median of the measured ones"""
    median_recall: float | None
    """share of the latent's firings that are on the label's rows, median of the measured ones"""
    median_activation_recall: float | None
    """the same share of its summed activation"""
    rare: int
    """living latents whose label rests on fewer than 256 firings"""


class EffectMetrics(Record):
    """Effects of the latents' decoder rows alone on the logits; of single latents: latents.safetensors."""

    promoted_in_text: float | None
    """share of the promoted tokens that occur in the evaluated split's text"""
    left_out: int
    """tokens of the vocabulary that do not occur in the store's text: none of them is listed as promoted"""
    like_random: int
    """living latents whose peak (mean of the ten largest effects, each over its standard deviation over random
    directions) is not above `limit`"""
    limit: float
    """99th percentile of the peaks of random directions"""
    false_positives: float
    """share of other random directions whose peak is above `limit`"""


class LatentMetrics(FiringMetrics):
    """The full dictionary's latents together; each alone: latents.safetensors."""

    labels: LabelMetrics
    """how well the labels tell where latents fire"""
    effects: EffectMetrics | None
    """effects of decoder rows on the logits; null if the language model was not run"""
    groups: list[GroupMetrics]
    """each nesting level, coarsest first"""
    splitting: list[SplitPair]
    """the pairs that overlap most, at most 50"""
    coactivation_rows: int
    """rows on which twins, parents and these pairs were counted"""


class FittedMetrics(ReconstructionMetrics):
    """The mean output, or a linear map, on the same rows."""

    fit_rows: int
    """train rows that it was fitted on"""


class LinearMetrics(FittedMetrics):
    """The best linear map from input to output (ridge regression)."""

    penalty: float
    """ridge penalty relative to the mean squared input, chosen on train rows that were not fitted"""


class OneGroupMetrics(ReconstructionMetrics, PrefixEnd):
    """A sibling run of the same settings without nesting: the numbers of its one prefix."""

    l0: float
    """active latents per row, mean"""
    l0_median: float
    """active latents per row, median"""
    l0_std: float
    """active latents per row, standard deviation"""
    l1: float
    """summed activations of a row, mean, units of the activations"""
    threshold: float
    """activation above which a latent is active, units of the activations"""
    dead_fraction: float
    """share of its latents that fired on none of the rows"""
    over_1_percent: int
    """latents that fire on more than 1 % of the rows"""
    over_10_percent: int
    """latents that fire on more than 10 % of the rows"""
    over_10_percent_fraction: float
    """their share of its latents"""
    training_selection: None = None
    """null where the sibling's is null, otherwise left out"""
    cross_entropy: None = None
    """null where the sibling's was not measured, otherwise left out"""
    run: str
    """the sibling's name"""
    weights_sha256: str
    """digest of its transcoder.safetensors"""


class BaselineMetrics(Record):
    """What the transcoder must beat, on the same rows."""

    mean: FittedMetrics | None
    """the mean output of the train rows; null if they were removed and no run was evaluated on these rows before"""
    linear: LinearMetrics | None
    """the best linear map from input to output, fitted on the train rows; null in the same case"""
    one_group: OneGroupMetrics | None = None
    """a sibling run without nesting; left out where none is trained and evaluated"""


class ErrorClass(Record):
    """The error on one class of rows, or of output dimensions."""

    class_: int = Field(validation_alias="class", serialization_alias="class")
    """number of the bin, output dimension or token id"""
    rows: int
    """rows of the class; 1 for a dimension"""
    error_share: float | None
    """its part of the full transcoder's squared error; null if there is no error"""
    fvu: list[float | None]
    """of each prefix, within the class: squared error over squared distance from the split's mean output"""


class TokenError(ErrorClass):
    """The error on the rows that stand on one token."""

    token: str
    """its text"""


class ErrorMetrics(Record):
    """Where the reconstruction error is."""

    typical: ErrorClass
    """rows whose output is at most ten times as far from the mean as the median row's; FVU around their own mean"""
    heavy: ErrorClass | None
    """the others; null where there are none"""
    heavy_variance: float | None
    """their share of the outputs' summed squared distance from the mean: of the denominator of FVU"""
    by_token: list[TokenError]
    """the 40 tokens with most of it, largest first"""
    by_position: list[ErrorClass]
    """by position in the context"""
    position_edges: list[int]
    """tokens; bin i holds the positions from edge i to before edge i + 1"""
    by_size: list[ErrorClass]
    """by the output's distance from the mean"""
    size_edges: list[float]
    """log2 of the distance, in root mean squares of it"""
    by_dimension: list[ErrorClass]
    """the 20 output dimensions with most of it, largest first"""


class PairShare(Record):
    """How many decoder rows of a prefix point the same way."""

    pairs: int
    """pairs of latents"""
    close_pairs: int
    """those whose decoder rows have an absolute cosine beyond `limit`"""
    share: float | None
    """close_pairs over pairs; null for a single latent"""


class RedundancyMetrics(PairShare):
    """Decoder rows that point the same way: of the full dictionary, and of each prefix."""

    limit: float
    """absolute cosine beyond which a pair is close"""
    prefixes: list[PairShare]
    """each prefix, coarsest first"""
    nearest_cosine_edges: list[float]
    """edges of the histogram's bins, cosine"""
    nearest_cosine_histogram: list[int]
    """latents in each bin, by the cosine to the nearest other decoder row"""


class AblationLosses(Record):
    """The original language model, and the model with the MLP ablated."""

    skipped: None
    """null: it was measured"""
    contexts: int
    """contexts of the split that were read"""
    positions: int
    """tokens of them that were predicted"""
    clean: float
    """cross-entropy of the original model, nats per token"""
    zero: float
    """with the MLP's output zeroed, nats per token"""
    mean: float
    """with the MLP's output replaced by its mean, nats per token"""


class NotMeasured(Record):
    """The cross-entropy was not measured."""

    skipped: str
    """why not; it stands alone then"""


class Checkpoint(Record):
    """Which checkpoint."""

    step: int
    """steps that were trained"""
    of: int
    """steps of the whole run"""


class Provenance(Record):
    """What was measured on what: evaluations with the same one are the same."""

    run: str
    """the run's name"""
    model: str
    """the language model, as the harvest called it"""
    layer: int
    """from 0"""
    input_hook: str
    """TransformerLens name of the inputs"""
    output_hook: str
    """TransformerLens name of the outputs"""
    dataset: str
    """the harvested text"""
    split: str
    """heldout or train"""
    rows: int
    """rows that were measured, from the first"""
    cross_entropy_tokens: int
    """tokens requested for the cross-entropy; 0: not requested"""
    store_fingerprint: str
    """digest of what was harvested and how"""
    trained_on_this_store: bool | None
    """null where the transcoder does not say what it was trained on"""
    weights_sha256: str
    """digest of transcoder.safetensors"""
    metrics_version: int
    """of what is measured; another one is measured again"""
    mismatch: list[str] = []
    """what differs where that was allowed (evaluate.allow_mismatch); otherwise left out"""
    checkpoint: Checkpoint | None = None
    """the checkpoint that was evaluated; left out for a finished run"""
    learning_rate: float | None = None
    """peak learning rate of the training; left out for an imported transcoder"""
    normalisation: str | None = None
    """of the training, in words; left out for an imported transcoder"""
    one_group_sha256: str | None = None
    """digest of the weights of the run without nesting in `baselines`; null if there is none"""


class Results(Record):
    """What was measured: all of metrics.json but its files."""

    rows: int
    """rows that were measured"""
    prefixes: list[PrefixMetrics]
    """each prefix, coarsest first; the last is the full dictionary"""
    latents: LatentMetrics
    """the full dictionary's latents"""
    baselines: BaselineMetrics
    """what it must beat"""
    errors: ErrorMetrics
    """where the error is"""
    redundancy: RedundancyMetrics
    """decoder rows that point the same way"""
    provenance: Provenance
    """what was measured on what"""
    cross_entropy: AblationLosses | NotMeasured
    """the language model with the MLP ablated, or why that was not measured"""


class Metrics(Results):
    """All of metrics.json."""

    files: list[str]
    """the other files of the evaluation"""
