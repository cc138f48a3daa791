"""Runs the language model once and writes what a layer's MLP reads and writes to an activation store."""

import common  # noqa: F401 - it answers Ctrl-C while the rest is imported
