"""The worked examples in docstrings, run."""

import doctest
import importlib

import pytest

HARD = {
    "train.step.sparse": {
        *("Bags", "Bags.by_latent", "_decode", "_blocks", "_bounds"),
        *("_totals", "_pre_activations", "_products", "_strongest", "_sums"),
    },
    "transcoder.selection": {"_above", "_entries", "_stride", "candidates", "select_batch", "select_rows"},
    "transcoder.entries": {"decode", "strongest"},
    "evaluate.metrics.contexts": {
        "Best", "Shader", "_distinct_contexts", "_evenly_spaced", "_nth_of_its_latent", "lottery", "strength",
        "token_weights",
    },
    "evaluate.metrics.coactivation": {"_best", "_overlaps"},
    "evaluate.report.page_data": {"Stretches.around", "_first_half"},
    "train.activation_samples": {"_newest"},
    "shards.order": {"chunk_groups", "permutation"},
}  # fmt: skip
"""Functions whose index arithmetic needs numbers to be understood, by module."""


@pytest.mark.parametrize("name", HARD)
def test_examples_are_right(name: str) -> None:
    """And there, for what is hard to read without."""
    module = importlib.import_module(name)
    shown = {
        test.name.removeprefix(f"{name}.") for test in doctest.DocTestFinder().find(module) if test.examples
    }
    assert shown >= HARD[name]
    assert doctest.testmod(module).failed == 0, "see the difference above (pytest -s shows it when it passes)"
