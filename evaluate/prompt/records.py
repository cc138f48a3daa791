"""prompt.json: every field and its unit. Imports no torch.

A direct effect on the next token: evaluate/prompt/next_token.py defines it.
"""

from typing import Literal

from evaluate.records import Record

VERSION = 2
"""Raised with every change of the records below."""


class PromptToken(Record):
    """One token of the text."""

    text: str
    """its characters; one that is split over tokens stands at the token that completes it"""
    context: int
    """number of the context that holds it"""
    row: bool
    """whether it gives a row: the first token of a context and special tokens do not"""
    next: str
    """the token after it in the text; at the end of the text, the model's likeliest next token"""
    next_given: bool
    """whether `next` is from the text"""
    next_probability: float
    """probability that the model gives `next`"""


class NamedLatent(Record):
    """What the layer's evaluation says of a latent that fires on the text."""

    group: int
    """nesting level"""
    density: float | None = None
    """share of the evaluated rows on which it fires; left out where the layer was not evaluated"""
    note: str = ""
    """a person's label, from the run's notes.csv; left out if there is none"""
    label: tuple[str, ...] = ()
    """words that best tell where it fires; empty if the layer was not evaluated"""


class ActiveLatent(Record):
    """One latent on one token."""

    latent: int
    """its number"""
    value: float
    """activation"""
    effect: float | None = None
    """direct effect on the next token's logit; left out with `effects_skipped`"""


class PromptLayer(Record):
    """One layer's transcoder on the text. n: tokens that give a row."""

    layer: int
    """from 0"""
    run: str
    """name of the run"""
    prefix_ends: list[int]
    """latents of each prefix"""
    error_share: list[list[float | None]]
    """of each prefix, of each of the n rows: squared error over squared distance of the output to the mean output"""
    active: list[list[ActiveLatent]]
    """of each row the latents of the full dictionary that fire, strongest first"""
    output_effect: list[float]
    """of each row: direct effect of the MLP's whole output on the next token's logit; empty with `effects_skipped`"""
    latents: dict[int, NamedLatent]
    """those that fire anywhere on the text, by number"""


class ChangedLatent(Record):
    """One change that was asked for, and its size."""

    layer: int
    """from 0"""
    latent: int
    """its number"""
    how: Literal["set", "scale", "ablate"]
    """the activation becomes `value`, is multiplied by it, or becomes 0"""
    value: float | None
    """null for ablate"""
    token: int | None
    """number of the token in `tokens` at which it is changed; null: every token that has a row"""
    rows: int
    """rows where the activation differs from what it was"""
    largest: float
    """largest change of the activation, with its sign; 0 where it changed nowhere"""


class Candidate(Record):
    """A token that may follow, before and after the change."""

    token: str
    """its text"""
    logit: tuple[float, float]
    """before and after"""
    probability: tuple[float, float]
    """before and after"""


class Shift(Record):
    """What the change does to the prediction at one token."""

    kl: float
    """KL(before || after) of the next-token distribution, nats"""
    next: Candidate
    """the token's `next`"""
    likeliest: list[Candidate]
    """the tokens that are among the five likeliest before or after, likeliest before the change first"""


class PromptChange(Record):
    """The model with the activations of some latents changed, beside the unchanged model."""

    changes: list[ChangedLatent]
    """as they were asked for"""
    tokens: list[Shift]
    """one for each of `tokens`"""
    continuation: tuple[str, str]
    """greedy continuation of the last context, before and after the change"""


class Prompt(Record):
    """A text through one or more layers' transcoders."""

    version: int
    """of this file's layout"""
    model: str
    """the language model, as the harvest called it"""
    text: str
    """as it was given"""
    effects_skipped: str | None
    """why there are no direct effects; null if there are"""
    tokens: list[PromptToken]
    """in the order of the text; every context begins with its first token"""
    layers: list[PromptLayer]
    """in the order of the layers"""
    intervention: PromptChange | None = None
    """left out where no change was asked for"""
