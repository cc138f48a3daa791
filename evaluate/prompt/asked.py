"""Changes of latents as they are typed: SET="12/345=3.0", SCALE="12/345=2 12/7=0.5", ABLATE="12/345@5". No torch."""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from common.errors import InputError

How = Literal["set", "scale", "ablate"]
HOWS: tuple[How, ...] = ("set", "scale", "ablate")

TYPED = re.compile(r"(?:(\d{1,9})/)?(\d{1,9})(?:@(\d{1,9}))?(=.*)?", re.ASCII)
LARGEST = 3.4e38
"""Of float32."""


class Asked(NamedTuple):
    """One latent that is to be changed."""

    how: How
    layer: int | None
    """None: the one that is read."""
    latent: int
    token: int | None
    """Number of the text's token, from 0, where it is changed; none: at all that give a row."""
    value: float
    """What its activation becomes (set), or is multiplied by (scale, ablate)."""

    @property
    def place(self) -> str:
        """As it is typed, and as a circuit's page names it: 12/345@5."""
        at = "" if self.token is None else f"@{self.token}"
        return f"{'' if self.layer is None else f'{self.layer}/'}{self.latent}{at}"


def parse(how: How, text: str) -> list[Asked]:
    """The changes in a text, separated by spaces or commas; raises `InputError` that says how one is written.

    >>> [each.place for each in parse("set", "12/345=3.0, 7@4=-1e-2")]
    ['12/345', '7@4']
    """
    form = "12/345@5" if how == "ablate" else "12/345@5=3.0"
    what = "layer/latent, or layer/latent@token" + ("" if how == "ablate" else ", then = and a number")
    found = []
    for typed in text.replace(",", " ").split():
        match = TYPED.fullmatch(typed)
        if match is None or (match[4] is None) != (how == "ablate"):
            raise InputError(f"{how.upper()}: expected {what} ({form}), found {typed!r}")
        value = 0.0 if how == "ablate" else _number(how, typed, match[4][1:])
        layer, latent, token = (None if part is None else int(part) for part in match.group(1, 2, 3))
        assert latent is not None
        found.append(Asked(how, layer, latent, token, value))
    if not found:
        raise InputError(f"{how.upper()}: expected {what} ({form}), found nothing")
    return found


def _number(how: How, typed: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:  # NaN too
        raise InputError(
            f"{how.upper()}: {typed}: expected a finite number after =, such as 3.0, found {text!r}"
        )
    return value


def of_layers(changes: Sequence[Asked], layers: Sequence[int]) -> list[Asked]:
    """The same with their layers; raises `InputError` where one is not read, or is to be guessed."""
    found = []
    for each in changes:
        if each.layer is None and len(layers) > 1:
            example = each._replace(layer=layers[0]).place
            raise InputError(
                f"{each.how.upper()}: {each.place}: of which layer? {_listed(layers)} are read; give {example}"
            )
        own = each._replace(layer=layers[0] if each.layer is None else each.layer)
        if own.layer not in layers:
            raise InputError(
                f"{each.how.upper()}: {each.place}: layer {own.layer} is not read, only {_listed(layers)}; "
                f'give LAYER="{" ".join(map(str, (*layers, own.layer)))}"'
            )
        found.append(own)
    return found


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {' '.join(map(str, layers))}"
