"""summary.json as records: how well the explanations predict, by latent and by group. See evaluate/records.py."""

from evaluate.records import Record

VERSION = 1
"""Of summary.json, and of what is asked: raised with every change of a prompt or a score."""


class ScoreMetrics(Record):
    """How well an explanation tells passages where its latent fires from others, on the passages that were judged."""

    score: float | None
    """balanced accuracy, the mean of the two rates below: 0.5 for a guess; null where either is"""
    error: float | None
    """its standard error over passages: half the root of the sum of r (1 - r) / n of both rates"""
    true_positive_rate: float | None
    """share of the passages that fit which were judged to"""
    true_negative_rate: float | None
    """share of the others which were judged not to"""
    positives: int
    """passages that fit and were judged"""
    negatives: int
    """others that were judged"""
    not_judged: int
    """passages of replies that failed or could not be read: in no rate"""


class LatentExplanation(Record):
    """One latent."""

    latent: int
    """its number"""
    group: int
    """its group"""
    firings: int
    """rows on which it fires"""
    shown: int
    """passages that the language model was shown"""
    explanation: str | None
    """what it wrote; null where the reply failed or could not be read"""
    score: float | None
    """mean of the detection and the fuzzing score; null where either is"""
    detection: ScoreMetrics | None
    """null without an explanation"""
    fuzzing: ScoreMetrics | None
    """null without an explanation"""


class MeanScore(Record):
    """A score over latents."""

    mean: float | None
    """over the latents that have it; null where none has"""
    error: float | None
    """standard error over latents: standard deviation over the root of their number; null for fewer than two"""
    latents: int
    """latents that have it"""


class GroupExplanations(Record):
    """The latents of one group, or all."""

    group: int | None
    """null: all groups"""
    latents: int
    """latents that were asked about"""
    explained: int
    """those with an explanation"""
    score: MeanScore
    """mean of the detection and the fuzzing score of each latent"""
    detection: MeanScore
    """does a passage fit the explanation"""
    fuzzing: MeanScore
    """are its marked tokens those on which the latent fires"""


class Passages(Record):
    """How the passages were chosen."""

    shown: int
    """most passages that an explanation is made from"""
    scored: int
    """most passages in which a latent fires that each score is measured on; as many others"""
    sample: int | None
    """latents asked for, drawn by lot in equal parts of all groups; null: a list of latents"""
    reach: int
    """tokens on either side of a firing"""
    split: str
    """"heldout" or "train" rows"""
    rows: int
    """rows that the passages were looked for on"""
    documents: bool
    """whether shown and scored passages are of different documents by the store's own separators; false: of different
    blocks of contexts"""


class Requests(Record):
    """What was asked and what came back."""

    sent: int
    """requests of this run of the command"""
    kept: int
    """requests that an earlier run had the answer to"""
    failed: dict[str, int]
    """requests without an answer, by reason; the same command asks them again"""
    unreadable: dict[str, int]
    """answers that could not be read, by kind of request; asked again, they would be the same"""
    tokens_in: int
    """of all answers, as the endpoint counts; 0 where it does not"""
    tokens_out: int
    """the same of the answers"""


class Summary(Record):
    """Explanations by one language model of one run's latents."""

    version: int
    """of this file and of the prompts"""
    model: str
    """language model that explains and judges"""
    endpoint: str
    """its address"""
    temperature: float | None
    """of its answers; null: the endpoint's own"""
    weights_sha256: str
    """of the transcoder"""
    store_fingerprint: str
    """of the harvest that the passages are from"""
    passages: Passages
    """how they were chosen"""
    requests: Requests
    """what came back"""
    groups: list[GroupExplanations]
    """all latents, then each group"""
    latents: list[LatentExplanation]
    """by number"""
    left_out: dict[str, list[int]]
    """latents without passages enough, by reason: those of the list, or those that were passed over while drawing"""
