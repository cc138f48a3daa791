"""Selection against a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder import selection
from transcoder.selection import CUTS, SELECT, kth_largest, select_batch, select_rows


def brute_batch(pre: torch.Tensor, n: int) -> tuple[torch.Tensor, float]:
    positive = pre[pre > 0].sort(descending=True).values
    cut = float(positive[n - 1]) if len(positive) >= n else 0.0
    return ((pre >= cut) & (pre > 0)).nonzero(), cut


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_batch_topk_is_exact_and_keeps_ties(seed: int, rows: int, width: int, k: int, ties: bool) -> None:
    pre = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    pre = pre.mul(2).round() if ties else pre
    k = min(k, width)
    entries, cut = select_batch(pre, k)
    expected, expected_cut = brute_batch(pre, k * rows)
    assert torch.equal(torch.stack(entries[:2], 1), expected)
    assert torch.equal(entries.values, pre[expected[:, 0], expected[:, 1]])
    assert float(cut) == pytest.approx(expected_cut)


@pytest.mark.parametrize("shape", ["normal", "one row has all", "one column has all", "a few outliers"])
def test_the_guessed_cut_never_decides(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 64 values guesses badly, above all when the large values lie together."""
    monkeypatch.setattr(selection, "SAMPLE", 64)
    pre = torch.randn(50, 310, generator=torch.Generator().manual_seed(3))
    if shape == "one row has all":
        pre[7] += 100
    elif shape == "one column has all":
        pre[:, 62] += 100
    elif shape == "a few outliers":
        pre[::9, ::31] = 1e6
    entries, cut = select_batch(pre, 4)
    expected, expected_cut = brute_batch(pre, 200)
    assert torch.equal(torch.stack(entries[:2], 1), expected)
    assert float(cut) == pytest.approx(expected_cut)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_per_row_topk_is_exact_and_keeps_ties(seed: int, rows: int, width: int, k: int, ties: bool) -> None:
    pre = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    pre = pre.mul(2).round() if ties else pre
    k = min(k, width)
    entries, cut = select_rows(pre, k)
    per_row = [brute_batch(row[None], k)[0][:, 1].tolist() for row in pre]
    assert [entries.latents[entries.rows == i].tolist() for i in range(rows)] == per_row
    assert float(cut) == (float(entries.values.min()) if len(entries.values) else 0.0)


def test_kth_largest_counts_equal_values() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert [float(kth_largest(values, k)) for k in (1, 2, 3, 4)] == [3, 2, 2, 1]


def test_every_rule_has_its_cuts() -> None:
    """train/step/matrix.py takes the cuts; a rule without them would train on a CPU only."""
    assert CUTS.keys() == SELECT.keys()
    pre = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    for name, select in SELECT.items():
        kept = (pre >= CUTS[name](pre, 3)) & (pre > 0)
        assert torch.equal(kept.nonzero()[:, 1], select(pre, 3)[0].latents), name
