"""prompt.json: every field and its unit. Imports no torch."""

from evaluate.records import Record

VERSION = 1
"""Raised with every change of the records below."""


class PromptToken(Record):
    """One token of the text."""

    text: str
    """its characters; one that is split over tokens stands at the token that completes it"""
    context: int
    """number of the context that holds it"""
    row: bool
    """whether it gives a row: the first token of a context and special tokens do not"""


class NamedLatent(Record):
    """What the layer's evaluation says of a latent that fires on the text."""

    group: int
    """nesting level"""
    density: float | None = None
    """share of the evaluated rows on which it fires; left out where the layer was not evaluated"""
    label: tuple[str, ...] = ()
    """words that say best where it fires; empty where the layer was not evaluated"""


class ActiveLatent(Record):
    """One latent on one token."""

    latent: int
    value: float
    """activation"""


class PromptLayer(Record):
    """One layer's transcoder on the text. n: tokens that give a row."""

    layer: int
    run: str
    """name of the run"""
    prefix_ends: list[int]
    """latents of each prefix"""
    error_share: list[list[float | None]]
    """of each prefix, of each row: squared error over squared distance of the output to the mean output"""
    active: list[list[ActiveLatent]]
    """of each row, strongest first"""
    latents: dict[int, NamedLatent]
    """those that fire anywhere on the text, by number"""


class Prompt(Record):
    """A text through one or more layers' transcoders."""

    version: int
    """of this file's layout"""
    model: str
    text: str
    """as it was given"""
    tokens: list[PromptToken]
    layers: list[PromptLayer]
