"""What a latent's explanation is made from and scored on: fixed by the store, the weights and the options alone.

The passages that are scored: of those where the latent fires, every third has its marks moved for fuzzing, to tokens on
which it is silent. As many more, on which it is silent: those of other latents, with their marks, and random ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluate.explain.passages import SCORED, SHOWN, Passage, Text, near, spread
from evaluate.explain.prompts import explain_prompt, marked, plain, strengths

LEAST_SHOWN, LEAST_SCORED = 4, 6
"""Passages of either side in which a latent must fire."""
PER_PROMPT = 5
"""Passages in a prompt, as in Paulo et al."""
FROM_EACH = 2
"""Passages of another latent at most, until all others have given theirs."""

What = Literal["fires", "moved", "other", "random"]


@dataclass(frozen=True)
class Example:
    """A passage to be judged."""

    text: str
    true: bool
    what: What
    """The latent fires there; its marks are moved; another latent fires there, this one not; any text without it."""


@dataclass(frozen=True)
class Task:
    """A latent that is explained."""

    latent: int
    group: int
    firings: int
    shown: int
    """Passages in the explanation's prompt."""
    prompt: str
    detection: list[list[Example]]
    """A prompt each."""
    fuzzing: list[list[Example]]


@dataclass(frozen=True)
class Kin:
    """[F, .] other latents that are near each, nearest first; [F] bool which latents fire at all."""

    nearest: np.ndarray
    twins: np.ndarray
    alive: np.ndarray


def task(text: Text, latent: int, group: int, kin: Kin, n_shown: int, n_scored: int, seed: int) -> Task | str:
    """The task of a latent, or why there is none."""
    fired = int(text.fired[latent])
    if not fired:
        return "never fires"
    shown, scored = text.firing(latent, SHOWN), text.firing(latent, SCORED)
    if len(shown) < LEAST_SHOWN or len(scored) < LEAST_SCORED:
        return "fires in too few documents"
    rng = np.random.default_rng([seed, latent])
    own, values = text.of(latent)
    first = text.passages(shown[spread(len(shown), n_shown)], latent)
    pool = text.passages(scored[spread(len(scored), n_scored + n_scored // 2)], latent)
    moved, true = pool[1::3], [each for n, each in enumerate(pool) if n % 3 != 1]
    others = _others(text, latent, kin, len(true) // 2, own, rng)
    places = text.silent(own, SCORED, len(true), rng)
    random = text.passages(places[: len(true) - len(others)], latent)
    if len(others) + len(random) < len(true):
        return "fires in nearly every passage"
    largest = float(values.max())
    told = [(marked(p.pieces, p.activations > 0), strengths(p.pieces, p.activations, largest)) for p in first]
    detection = [Example(plain(p.pieces), True, "fires") for p in true]
    detection += [Example(plain(p.pieces), False, "other") for p in others]
    detection += [Example(plain(p.pieces), False, "random") for p in random]
    fuzzing = [Example(marked(p.pieces, p.activations > 0), True, "fires") for p in true]
    told_wrong = (_moved(p, rng) for p in moved)
    fuzzing += [Example(each, False, "moved") for each in told_wrong if each is not None]
    fuzzing += [Example(marked(p.pieces, p.activations > 0), False, "other") for p in others]
    fuzzing = _balanced(fuzzing, len(true))
    return Task(
        latent,
        group,
        fired,
        len(first),
        explain_prompt(told),
        _batches(detection, rng),
        _batches(fuzzing, rng),
    )


def _others(
    text: Text, latent: int, kin: Kin, n: int, own: np.ndarray, rng: np.random.Generator
) -> list[Passage]:
    """Up to `n` passages in which another latent fires and this one does not: the nearest latents' first."""
    found: list[Passage] = []
    seen: set[tuple[int, int]] = set()
    for other in near(latent, kin.nearest, kin.twins, alive=kin.alive, rng=rng):
        places = text.firing(other, SCORED, silent=own)
        for each in text.passages(places[spread(len(places), min(FROM_EACH, n - len(found)))], other):
            where = each.document, each.place // text.length
            if where not in seen:
                seen.add(where)
                found.append(each)
        if len(found) >= n:
            break
    return found[:n]


def _moved(passage: Passage, rng: np.random.Generator) -> str | None:
    """The passage with as many marks, on tokens where the latent is silent; None where there are too few of those."""
    fires = passage.activations > 0
    silent = np.flatnonzero(~fires & np.array([bool(piece.strip()) for piece in passage.pieces]))
    n = int(fires.sum())
    if n > len(silent):
        return None
    marks = np.zeros(len(fires), bool)
    marks[rng.choice(silent, n, replace=False)] = True
    return marked(passage.pieces, marks)


def _balanced(examples: Sequence[Example], n: int) -> list[Example]:
    """As many true as false ones, at most `n` of each; evenly spaced where there are more."""
    both = [[each for each in examples if each.true == true] for true in (True, False)]
    fewer = min(n, *map(len, both))
    return [some[i] for some in both for i in spread(len(some), fewer)]


def _batches(examples: list[Example], rng: np.random.Generator) -> list[list[Example]]:
    """In random order, in prompts of nearly equal length."""
    order = [examples[n] for n in rng.permutation(len(examples))]
    return [order[i :: -(-len(order) // PER_PROMPT)] for i in range(-(-len(order) // PER_PROMPT))]


def sampled(groups: np.ndarray, alive: np.ndarray, seed: int) -> Iterator[list[int]]:
    """Of each group its living latents in random order, to be taken from until its share is full."""
    rng = np.random.default_rng(seed)
    for group in range(int(groups.max()) + 1):
        yield rng.permutation(np.flatnonzero((groups == group) & alive)).tolist()
