"""Latents that fire on many rows: the limit, and the verdict on how many there are. Imports no torch."""

from typing import Literal

FREQUENT = 0.1
"""A latent that fires on a larger share of the rows than this is frequent: it says little about a row."""
FREQUENT_GOOD, FREQUENT_MODERATE = 0.01, 0.05
"""Shares of a prefix's latents that may be frequent. Of this project; no other tool has a limit."""


def frequent_level(share: float) -> Literal["good", "moderate", "poor"]:
    """The verdict on a share of frequent latents."""
    if share <= FREQUENT_GOOD:
        return "good"
    return "moderate" if share <= FREQUENT_MODERATE else "poor"
