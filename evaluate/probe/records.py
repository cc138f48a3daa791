"""probes.json: every field and its unit."""

from typing import Literal

from pydantic import Field

from evaluate.records import PrefixEnd, Record

PROBES_VERSION = 1
"""Raised with every change of what is measured: probes of another version are measured again."""


class ProbeAccuracy(Record):
    """Of a probe on test rows, as many of the class as of the others."""

    accuracy: float
    """share of right answers; 0.5 is chance"""
    error: float
    """its standard error over documents"""


class SparseProbe(ProbeAccuracy):
    """Of k latents of a prefix."""

    k: int
    """latents that the probe reads; fewer where fewer fire"""
    below_outputs: float
    """accuracy of the dense probe on raw outputs minus this one's"""
    below_outputs_error: float
    """its standard error over documents, on the same rows"""
    random: float
    """mean accuracy of probes on as many random latents that fire"""
    random_error: float
    """its standard error over documents and draws"""


class LatentProbe(SparseProbe):
    """Of a class."""

    latents: list[int]
    """the latents, best first"""


class ProbedPrefix(PrefixEnd):
    """Sparse probes of one prefix, gated by its own threshold."""

    sparse: list[LatentProbe]
    """for each k"""


class ClassProbes(Record):
    """A class of rows against others."""

    family: str
    """the question: capitalised, digit, punctuation, word start, first letter, script, source, label"""
    name: str
    """the class; empty where the family is one question"""
    train_rows: int
    """rows of either class that probes are fitted on"""
    test_rows: int
    """rows of either class that they are tested on"""
    test_documents: int
    """documents that the latter are of"""
    inputs: ProbeAccuracy
    """dense probe on the raw inputs"""
    outputs: ProbeAccuracy
    """dense probe on the raw outputs"""
    prefixes: list[ProbedPrefix]
    """coarsest first; the last is the full dictionary"""


class FamilyPrefix(PrefixEnd):
    """Means over the classes of a family."""

    sparse: list[SparseProbe]
    """for each k; each class counts alike"""


class FamilyProbes(Record):
    """Means over the classes of a family, each counting alike."""

    family: str
    """as in `classes`"""
    classes: int
    """that had enough rows"""
    inputs: ProbeAccuracy
    """dense probes on the raw inputs"""
    outputs: ProbeAccuracy
    """dense probes on the raw outputs"""
    prefixes: list[FamilyPrefix]
    """coarsest first"""


class LeftOutClass(Record):
    """A class that was not probed."""

    family: str
    """as in `classes`"""
    name: str
    """as in `classes`; empty: the whole family"""
    why: str
    """the reason"""


class ProbesProvenance(Record):
    """What was measured on what."""

    run: str
    """name of the run"""
    model: str
    """name of the language model"""
    layer: int
    """from 0"""
    dataset: str
    """the harvested text"""
    split: str
    """heldout or train"""
    rows: int
    """rows that were looked at, from the first"""
    store_fingerprint: str
    """digest of what was harvested and how"""
    trained_on_this_store: bool | None
    """null where the transcoder does not say what it was trained on"""
    weights_sha256: str
    """digest of transcoder.safetensors"""
    documents: Literal["text", "separators", "stretches"]
    """how documents were told apart: by reading the text again; by the token between them; not at all, so stretches of
    the text stand for them"""
    label_column: str | None
    """data.label_column"""
    labels_sha256: str | None
    """digest of the documents' labels; null without any"""
    probes_version: int
    """of what is measured; another one is measured again"""
    mismatch: list[str] = Field(default_factory=list)
    """what differs where that was allowed (evaluate.allow_mismatch); otherwise left out"""


class Probes(Record):
    """All of probes.json."""

    train_documents: int
    """documents that probes are fitted on"""
    test_documents: int
    """other ones that they are tested on"""
    families: list[FamilyProbes]
    """the questions"""
    classes: list[ClassProbes]
    """every class of every question"""
    left_out: list[LeftOutClass]
    """what was not asked, and why"""
    provenance: ProbesProvenance
    """what was measured on what"""
