"""Main latents, splitting, absorption and stability on activations whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix

from evaluate.absorption import stability
from evaluate.absorption.absorbed import NONE, absorbed
from evaluate.absorption.main_latents import f1_of, main_latents
from evaluate.absorption.stability import Fired, jaccard, partnered

N = 1000
CLASS = np.arange(N) % 5 == 0
"""Every fifth row."""


def chosen(acts: np.ndarray) -> tuple[list[int], list[float]]:
    """Main latents where rows for fitting and measured ones are the same."""
    return main_latents(csc_matrix(acts), CLASS, csc_matrix(acts), CLASS)


def noise(n: int = 6) -> np.ndarray:
    """Latents that fire on a fifth of the rows, whatever these are."""
    draw = np.random.default_rng(0)
    return (draw.random((N, n)) < 0.2) * draw.gamma(2.0, 1.0, (N, n))


def test_a_class_of_one_latent_is_not_split() -> None:
    """Nor is it by a second latent that says the same, or by one that fires wherever the class is not."""
    acts = np.column_stack([noise(), 2.0 * CLASS, 2.0 * CLASS, 3.0 * ~CLASS])
    latents, f1 = chosen(acts)
    assert latents in ([6], [7])
    assert f1 == [1.0]


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_class_that_is_split_has_so_many_latents(parts: int) -> None:
    """Each fires on its part of the class; F1 of the first k is 2 k / (k + parts)."""
    part = np.arange(N) // 5 % parts
    acts = np.column_stack([noise(), *(2.0 * (CLASS & (part == each)) for each in range(parts))])
    latents, f1 = chosen(acts)
    assert sorted(latents) == [*range(6, 6 + parts)]
    sizes = np.cumsum([(CLASS & (part == latent - 6)).sum() for latent in latents])
    assert f1 == pytest.approx([2 * size / (size + CLASS.sum()) for size in sizes])


def test_a_part_too_small_to_count_does_not_split() -> None:
    """Of 200 rows a second latent adds 10: F1 rises from 0.974 to 1, less than the least jump."""
    first = CLASS & (np.arange(N) >= 50)
    latents, f1 = chosen(np.column_stack([noise(), 2.0 * first, 2.0 * (CLASS & ~first)]))
    assert latents == [6]
    assert f1 == pytest.approx([2 * 190 / 390])


def test_no_latent_that_fires_rather_on_the_class() -> None:
    assert chosen(np.column_stack([3.0 * ~CLASS, np.zeros(N)])) == ([], [])


def test_f1_of_none() -> None:
    none = np.zeros(3, bool)
    assert f1_of(none, none) == 0
    assert f1_of(none, ~none) == 0


# Ten rows of a class. Latent 0 is its main latent, latents 1 and 2 may absorb it, latent 3 does something else, and
# latent 4 always fires. Directions and decoder rows are such that an activation of 1 has an effect of 1.
EFFECT = np.array([1.0, 1.0, 0.5, -1.0, 1.0])
COSINE = np.array([0.9, 0.3, 0.2, -0.3, 0.02])
USUAL = np.array([0.0, 0.0, 0.0, 0.0, 5.0])
TOTAL = np.full(10, 2.0)


def rows_of(**latents: list[float]) -> csr_matrix:
    """Activations [10, 5] of latents a to e, latent 4 at its usual 5."""
    columns = [latents.get(name, [0.0] * 10) for name in "abcd"]
    return csr_matrix(np.column_stack([*columns, np.full(10, 5.0)]))


def test_one_latent_absorbs_another_on_three_rows_of_ten() -> None:
    acts = rows_of(a=[2.0] * 7 + [0.0] * 3, b=[0.0] * 7 + [2.0] * 3)
    found = absorbed(acts, [0], EFFECT, COSINE, USUAL, TOTAL)
    assert found.absorbed.tolist() == found.silent.tolist() == [False] * 7 + [True] * 3
    assert found.by.tolist() == [NONE] * 7 + [1] * 3
    assert found.fraction.tolist() == [0.0] * 7 + [1.0] * 3


def test_what_is_silent_and_not_absorbed() -> None:
    """Row 0: another does too little; 1: just enough; 2: the greatest is not aligned; 3: none fires; 4: it lowers."""
    b = [0.79, 0.8, 0.9, 0.0, 0.0] + [0.0] * 5
    d = [0.0] * 4 + [3.0] + [0.0] * 5
    acts = rows_of(a=[0.0] * 5 + [2.0] * 5, b=b, d=d).toarray()
    acts[2, 4] = 6.0  # one more than usual: 1.0, the greatest
    found = absorbed(csr_matrix(acts), [0], EFFECT, COSINE, USUAL, TOTAL)
    assert found.silent.tolist() == [True] * 5 + [False] * 5
    assert found.absorbed.tolist() == [False, True] + [False] * 8


def test_the_outputs_must_move_towards_the_class() -> None:
    acts, total = rows_of(b=[2.0] * 10), TOTAL.copy()
    total[:4] = 0.0, -1.0, 5.1, 5.0
    found = absorbed(acts, [0], EFFECT, COSINE, USUAL, total)
    assert found.absorbed.tolist() == [False, False, False] + [True] * 7


def test_the_fraction_is_what_the_others_do_beside_the_main_latent() -> None:
    """Row 0: 0.5 of main, 1.5 of others; 1: others do more than is missing; 2: main does all; 3: others too little."""
    a, b = [0.5, 0.5, 2.0, 1.5, 0.5] + [2.0] * 5, [1.0, 4.0, 1.0, 0.5, 0.0] + [0.0] * 5
    c = [1.0, 0.0, 0.0, 0.0, 0.0] + [0.0] * 5
    found = absorbed(rows_of(a=a, b=b, c=c), [0], EFFECT, COSINE, USUAL, TOTAL)
    assert found.fraction.tolist() == [0.75, 0.75, 0.0, 0.0, 0.0] + [0.0] * 5
    assert not found.absorbed.any()


def test_three_latents_at_most_absorb_together() -> None:
    acts = csr_matrix(np.array([[0.5, 0.25, 0.25, 0.25, 0.25]]))
    cosine = np.full(5, 0.5)
    found = absorbed(acts, [0], np.ones(5), cosine, np.zeros(5), np.array([1.5]))
    assert found.fraction.tolist() == [0.75 / 1.25]


def test_a_main_latent_that_usually_fires_does_nothing_at_its_usual_value() -> None:
    usual = np.array([1.0, 0.0, 0.0, 0.0, 5.0])
    acts = rows_of(a=[1.0] * 10, b=[2.0] * 10)
    found = absorbed(acts, [0], EFFECT, COSINE, usual, TOTAL)
    assert found.fraction.tolist() == [1.0] * 10
    assert not found.absorbed.any()


def fired(acts: np.ndarray) -> Fired:
    """Of dense activations [n, F]."""
    rows, latents = np.nonzero(acts)
    return Fired.of(np.stack([latents, rows]), acts.shape[1])


@given(seed=st.integers(0, 99), together=st.sampled_from([1, 7, 1 << 22]))
def test_jaccard_is_its_definition(seed: int, together: int) -> None:
    draw = np.random.default_rng(seed)
    one, two = (draw.random((30, n)) < draw.random(n) for n in (5, 4))
    pairs = np.array([(i, j) for i in range(5) for j in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "TOGETHER", together)
        found = jaccard(fired(one), fired(two), *pairs.T)
    expected = [
        (one[:, i] & two[:, j]).sum() / max((one[:, i] | two[:, j]).sum(), 1) for i, j in pairs.tolist()
    ]
    assert found.tolist() == pytest.approx(expected)


def test_a_copy_in_another_order_is_stable_and_a_stranger_is_not() -> None:
    draw = np.random.default_rng(0)
    acts = draw.random((400, 8)) < 0.1
    W_dec = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    order = draw.permutation(8)
    assert partnered(fired(acts), W_dec, fired(acts[:, order]), 3 * W_dec[order]).all()
    assert not partnered(fired(acts), W_dec, fired(draw.random((400, 8)) < 0.1), W_dec).any()  # other firings
    assert not partnered(fired(acts), W_dec, fired(acts), torch.randn(8, 300)).any()  # other directions
    assert not partnered(fired(acts), W_dec, fired(acts), -W_dec).any()
    assert not partnered(fired(acts), W_dec, fired(acts[:, :0]), W_dec[:0]).any()


def test_partners_at_the_limits() -> None:
    """Cosine 0.8 and 0.6 at 2 shared rows of 3; cosine 1 at 1 of 2, and at 1 of 3."""
    acts = np.zeros((6, 4))
    acts[:2, :] = 1
    other = np.zeros((6, 4))
    other[:3, :2], other[:1, 2:] = 1, 1
    other[3:4, 3] = 1
    W_dec, theirs = torch.eye(4, 5), torch.eye(4, 5)
    theirs[0] = torch.tensor([0.8, 0.0, 0.0, 0.0, 0.6])
    theirs[1] = torch.tensor([0.0, 0.6, 0.0, 0.0, 0.8])
    assert partnered(fired(acts), W_dec, fired(other), theirs).tolist() == [True, False, False, False]
