"""Rows whose outputs lie far from all others: told by a sample, and of less weight in the loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.settings import Settings
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import sparse_rows, tiny_settings
from train.loop import train
from train.recipe import Recipe
from transcoder import heavy
from transcoder.heavy import HEAVY, Typical, typical_rows


def test_typical_rows_by_hand(tmp_path: Path) -> None:
    """Eight rows at a distance of 1 from their mean, one at 1,000, which moves the mean of all by 111."""
    outputs = np.full((9, 3), 5.0, dtype=np.float32)
    outputs[:8] += np.concatenate([np.eye(3), -np.eye(3), np.eye(3)[:1], -np.eye(3)[:1]])
    outputs[8] = [5, 5, 1005]
    store = make_store(tmp_path / "layer_0.zarr", (outputs, outputs), (outputs, outputs))
    moments = store.manifest.splits["train"].outputs
    assert moments is not None
    typical = typical_rows(store.train, moments)
    assert typical.mean.tolist() == pytest.approx([5.0] * 3)
    assert typical.limit == pytest.approx(HEAVY)
    assert typical.variance == pytest.approx((8 + HEAVY) / 9)
    weights = typical.weights(torch.tensor(outputs))
    assert weights is not None
    assert weights.tolist() == pytest.approx([1.0] * 8 + [HEAVY / 1e6])
    assert typical.weights(torch.tensor(outputs[:8])) is None


def test_rows_that_are_mostly_the_same_have_no_limit(tmp_path: Path) -> None:
    outputs = np.full((10, 3), 5.0, dtype=np.float32)
    outputs[0] = 1000
    store = make_store(tmp_path / "layer_0.zarr", (outputs, outputs), (outputs, outputs))
    moments = store.manifest.splits["train"].outputs
    assert moments is not None
    typical = typical_rows(store.train, moments)
    assert typical.limit == np.inf
    assert typical.weights(torch.tensor(outputs)) is None


def test_the_sample_is_spread_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 rows 16 in 8 places, the first and the last of the stored order among them."""
    monkeypatch.setattr(heavy, "SAMPLE", 16)
    outputs = np.arange(100, dtype=np.float32)[:, None].repeat(2, 1)
    store = make_store(tmp_path / "layer_0.zarr", (outputs, outputs), (outputs, outputs))
    stored = store.train.rows(0, 100)[1]
    numbers = [0, 1, 14, 15, 28, 29, 42, 43, 56, 57, 70, 71, 84, 85, 98, 99]
    assert torch.equal(heavy._sample(store.train), stored[numbers])


@pytest.mark.parametrize("times", [50.0, 1e4])
def test_a_few_heavy_rows_change_little_of_what_is_learned_of_the_others(
    store: Store, store_root: Path, make_settings: Callable[..., Settings], tmp_path: Path, times: float
) -> None:
    """One row in 500, `times` as far from the mean."""
    train_rows, heldout = sparse_rows(4096, 2), sparse_rows(1024, 3)
    for _, outputs in (train_rows, heldout):
        mean = outputs.mean(0)
        outputs[250::500] = mean + times * (outputs[250::500] - mean)
    root = tmp_path / "heavy"
    with_heavy = make_store(root / "tiny" / "layer_0.zarr", train_rows, heldout)
    plain = train(make_settings(), store).metadata["heldout"]
    settings = tiny_settings(root, tmp_path / "runs")
    trained = train(settings, with_heavy).metadata
    assert trained["heldout"]["heavy_rows"] == 2
    assert plain["heavy_rows"] == 0
    assert plain["fvu_typical"] == plain["fvu"]
    assert trained["heldout"]["fvu_typical"][-1] < 1.1 * plain["fvu"][-1]
    assert trained["used"]["output_scale"] == pytest.approx(
        Recipe.of(make_settings(), store).scaling.scale_out, rel=0.2
    )


def test_without_heavy_rows_the_scale_is_that_of_the_moments(
    store: Store, make_settings: Callable[..., Settings]
) -> None:
    outputs = store.manifest.splits["train"].outputs
    assert outputs is not None
    recipe = Recipe.of(make_settings(), store)
    assert recipe.scaling.scale_out == pytest.approx(float(outputs.variance.mean()) ** 0.5, rel=1e-12)
    assert recipe.variance == pytest.approx(len(outputs.mean), rel=1e-6)
    rows = store.train.rows(0, 64)[1]
    assert recipe.typical.weights(rows) is None


def test_on_a_gpu_the_weights_are_never_none() -> None:
    """All are 1 there: the host does not wait to know."""
    typical = Typical(torch.zeros(2, device="meta"), 9.0, 1.0)
    weights = typical.weights(torch.zeros(4, 2, device="meta"))
    assert weights is not None
    assert weights.shape == (4,)
