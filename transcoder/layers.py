"""For LAYER=all: what a stage's command line asks of the runs, without torch before it is asked."""

from common.settings import Settings


def n_layers(settings: Settings) -> int:
    """`transcoder.weights.n_layers`; importing torch takes seconds, which --help and a typo need not wait for."""
    from transcoder.weights import n_layers

    return n_layers(settings)


def chosen_run(settings: Settings, named: str | None) -> Settings:
    """`transcoder.weights.chosen_run`, likewise."""
    from transcoder.weights import chosen_run

    return chosen_run(settings, named)
