"""compare.json as records, as those of evaluate/records.py: every field and its unit. Imports no torch."""

from pydantic import Field, JsonValue

from evaluate.records import AblationLosses, Checkpoint, PrefixMetrics, Record


class Differences(Record):
    """A prefix's numbers minus those of another one; null if either has none."""

    fvu: float | None
    """of `fvu`"""
    fvu_typical: float | None = None
    """of `fvu_typical`"""
    l0: float | None
    """of `l0`, latents per row"""
    cosine: float | None
    """of `cosine`"""
    mse: float | None
    """of `mse`, squared units of the activations"""
    relative_bias: float | None
    """of `relative_bias`"""
    dead_fraction: float | None
    """of `dead_fraction`"""
    redundancy: float | None
    """of `redundancy`"""
    recovered_zero: float | None
    """of `cross_entropy.recovered_zero`; null too where the two were measured on different tokens"""
    kl: float | None
    """of `cross_entropy.kl`, nats per token; the same"""


class Compared(Record):
    """Which transcoder."""

    transcoder: str
    """shortest end of its path that tells it from the others"""
    prefix: int
    """nesting level, from 0"""


class ComparedPrefix(PrefixMetrics, Compared):
    """One prefix of one transcoder: everything that `prefixes` of metrics.json has, and this.

    `cross_entropy` is from the transcoder's own evaluation: see `transcoders`.
    """

    fvu_typical: float | None = None
    """`fvu` without heavy rows, whose outputs lie far from all others; null where there are none"""
    redundancy: float | None
    """share of the pairs of its latents whose decoder rows have an absolute cosine beyond 0.9; null for one latent"""
    difference: Differences
    """to the full dictionary of the run that the command names"""
    equal_latents: Differences | None
    """to the run's prefix with as many latents; null where it has none, and for the run's own prefixes"""


class EqualL0(Compared):
    """The FVU of the run that the command names and of another transcoder, both at the L0 of one of their prefixes.

    That prefix has its own FVU; the other transcoder's is interpolated linearly in log L0 between its neighbouring
    prefixes a and b: FVU_a + (FVU_b - FVU_a) (log l0 - log L0_a) / (log L0_b - log L0_a). The first and the last
    segment are extended by up to 5 % of L0. Where the rows have heavy ones, FVU is `fvu_typical` here.
    """

    other: str
    """the transcoder that the run is compared with; `transcoder` and `prefix`: whose L0 it is, the run's or its own"""
    l0: float
    """active latents per row, mean"""
    run_fvu: float
    """of the run"""
    fvu: float
    """of the other transcoder"""
    difference: float
    """`fvu` less `run_fvu`: below 0 the other transcoder is better"""


class ComparedTranscoder(Record):
    """What is known of a transcoder besides what was measured here."""

    transcoder: str
    """its name in `lines`"""
    report: str | None
    """path from this file to the report of these weights' evaluation; null where there is none"""
    cross_entropy: AblationLosses | None
    """losses of the original and the ablated model, from the evaluation that its lines' `cross_entropy` is from"""
    known_settings: bool
    """whether its file says how it was trained"""


class ComparisonProvenance(Record):
    """What was compared on what."""

    model: str
    """the language model, as the harvest called it"""
    layer: int
    """from 0"""
    input_hook: str
    """TransformerLens name of the inputs"""
    output_hook: str
    """TransformerLens name of the outputs"""
    split: str
    """heldout or train"""
    store_fingerprint: str
    """digest of what was harvested and how"""
    metrics_version: int
    """of what is measured"""
    checkpoint: Checkpoint | None = None
    """the checkpoint of the run that was compared; left out for a finished run"""
    mismatch: list[str] = Field(default_factory=list)
    """what differs between the run and the store where that was allowed; otherwise left out"""
    weights_sha256: dict[str, str]
    """digest of each transcoder's weights, by its name"""


class Comparison(Record):
    """All of compare.json."""

    rows: int
    """rows that were measured, the same for all"""
    lines: list[ComparedPrefix]
    """each prefix of each transcoder; the run that the command names comes first"""
    equal_l0: list[EqualL0]
    """the run and each other transcoder at equal L0, by L0; none for one whose range of L0 does not meet the run's"""
    transcoders: list[ComparedTranscoder]
    """each transcoder, in the order of `lines`"""
    differing_settings: dict[str, dict[str, JsonValue]]
    """setting -> transcoder -> value, of the settings that are not the same for all whose files say them"""
    linear_map_fvu: float | None
    """FVU of the best linear map from input to output, on all rows"""
    heavy_rows: int = 0
    """rows whose outputs lie far from all others"""
    provenance: ComparisonProvenance
    """what was compared on what"""
