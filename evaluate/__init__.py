"""Measures a transcoder on held-out rows of a store, and writes metrics.json, plots and report.html."""

import common  # noqa: F401 - it answers Ctrl-C while the rest is imported

CROSS_ENTROPY_TOKENS = 8192
"""On which the language model runs with its MLP replaced, unless told otherwise."""
