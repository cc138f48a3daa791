"""absorption.json as records, as those of evaluate/records.py: every field and its unit. Imports no torch."""

from evaluate.comparison.records import ComparisonProvenance
from evaluate.records import Record


class Estimate(Record):
    """A mean over classes, or a share of rows or latents."""

    value: float
    """the mean or the share"""
    error: float | None
    """standard error: over classes for a mean of classes, over documents for a share of rows; null for a single one"""


class ToldClass(Record):
    """A class of tokens, and whether probes can tell it from the activations."""

    family: str
    """what the class belongs to: first letter, ending, capitalised, ..."""
    name: str
    """the class: a letter, an ending; empty where the family is the class"""
    rows: int
    """held-out rows of the class"""
    words: int
    """distinct words that they stand on, none of which the probes were fitted on"""
    inputs: Estimate
    """accuracy of the probe on the inputs, on as many held-out rows of the class as of the others: chance is 0.5"""
    outputs: Estimate
    """the same of the probe on the outputs"""
    used: bool
    """whether both are at least 0.8: the class counts, for all transcoders alike"""
    found: int
    """held-out rows of the class that both probes find: those that may be absorbed"""


class Absorber(Record):
    """A latent that absorbs."""

    latent: int
    """its number"""
    rows: int
    """rows of the class that it absorbs"""


class AbsorbedClass(Record):
    """One class of those that are used, in one prefix."""

    family: str
    """as in `classes`"""
    name: str
    """as in `classes`"""
    absorbed: Estimate
    """share of the found rows that one latent absorbs: no main latent fires, another's effect is the greatest and at
    least 0.4 of the row's"""
    fraction: float
    """mean over the found rows of the part that up to three other latents have of their and the main latents' effect"""
    silent: Estimate
    """share of the found rows on which no main latent fires, absorbed or not"""
    latents: list[int]
    """main latents, best first: their number is what the class is split over"""
    f1: list[float]
    """F1 of the probe on the first 1, 2, ... of them, held-out rows of all classes"""
    absorbers: list[Absorber]
    """the latents that absorb most rows, at most five"""


class AbsorbedPrefix(Record):
    """One prefix of one transcoder. Means over the used classes, null where there is none."""

    end: int
    """latents of the prefix"""
    fvu: float | None
    """fraction of variance unexplained, all held-out rows"""
    l0: float
    """active latents per row, mean"""
    absorbed: Estimate | None
    """of `classes[].absorbed`: the absorption rate"""
    fraction: Estimate | None
    """of `classes[].fraction`: the absorption fraction"""
    silent: Estimate | None
    """of `classes[].silent`"""
    latents: Estimate | None
    """latents that a class is split over"""
    f1: Estimate | None
    """F1 of the probe on all main latents of a class"""
    classes: list[AbsorbedClass]
    """each used class"""


class StableGroup(Record):
    """Latents of one nesting level of the run, beside those of another transcoder."""

    group: int
    """nesting level, from 0"""
    firing: int
    """its latents that fire on the rows"""
    partnered: Estimate | None
    """share of them that have a partner: decoder rows' cosine above 0.7, and firing rows' Jaccard index above 0.5;
    null if none fires"""


class Stability(Record):
    """The run's latents that are found in another transcoder too, for example a run with another seed."""

    other: str
    """the transcoder"""
    rows: int
    """rows on which firings are compared"""
    groups: list[StableGroup]
    """each nesting level"""
    partnered: Estimate | None
    """of all latents that fire"""


class AbsorbedTranscoder(Record):
    """One transcoder."""

    transcoder: str
    """shortest end of its path that tells it from the others"""
    prefixes: list[AbsorbedPrefix]
    """each prefix, the coarsest first"""


class AbsorptionDifference(Record):
    """The full dictionary of another transcoder less that of the run; errors are those of the paired classes."""

    other: str
    """the transcoder"""
    fvu: float | None
    """of `fvu`"""
    absorbed: Estimate | None
    """of `absorbed`"""
    fraction: Estimate | None
    """of `fraction`"""
    silent: Estimate | None
    """of `silent`"""
    latents: Estimate | None
    """of `latents`"""
    f1: Estimate | None
    """of `f1`"""


class Absorption(Record):
    """All of absorption.json."""

    version: int
    """of what is measured"""
    rows: int
    """held-out rows that FVU and L0 are of; classes have a sample of them"""
    classes: list[ToldClass]
    """each class that has enough rows"""
    transcoders: list[AbsorbedTranscoder]
    """each transcoder; the run that the command names comes first"""
    differences: list[AbsorptionDifference]
    """each other transcoder beside the run"""
    stability: list[Stability]
    """the run beside each other transcoder"""
    provenance: ComparisonProvenance
    """what was measured on what"""
