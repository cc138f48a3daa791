"""A slice of the latents at a time: the same entries, and never all pre-activations at once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evaluate.metrics.measure import measure, prefix_entries, training_selection
from tests.evaluate.fakes import random_coder, random_rows
from transcoder import Transcoder
from transcoder.entries import Entries

ENDS, K, ROWS = (5, 9, 40), 3, 30


def coders() -> list[Transcoder]:
    """With a threshold, with one for each latent, with the k largest of each row."""
    plain, each = random_coder(6, 7, ENDS), random_coder(6, 7, ENDS, per_latent=True)
    return [plain, each, replace(plain, thresholds=torch.zeros(len(ENDS)), k=K)]


def same(found: Entries, expected: Entries) -> None:
    assert found.n_rows == expected.n_rows
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.latents, expected.latents)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made meanwhile has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made._base is None:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("width", [1, 4, 5, 39, 40, 100])
@pytest.mark.parametrize("kind", range(3))
def test_every_prefix_has_the_entries_of_the_whole_matrix(
    kind: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder, inputs = coders()[kind], random_rows(ROWS, 6, 7).inputs
    pre = coder.pre_activations(inputs)
    expected = [coder.entries(pre, g) for g in range(len(ENDS))]
    assert len(expected[-1].rows) > ROWS
    monkeypatch.setattr("transcoder.transcoder.LATENTS", width)
    for g, (found, entries) in enumerate(zip(prefix_entries(inputs, coder)[0], expected, strict=True)):
        same(found, entries)
        same(coder.active(inputs, g), entries)
    for rule in ("batch_topk", "topk"):
        select = training_selection(rule, K)
        kept = prefix_entries(inputs, coder, select)[1]
        assert kept is not None
        same(kept, select(pre))


def test_a_measurement_never_holds_all_pre_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ends = random_rows(64, 6, 7), (50, 3000)
    for coder in (
        random_coder(6, 7, ends),
        replace(random_coder(6, 7, ends), thresholds=torch.zeros(2), k=K),
    ):
        coder = replace(coder, thresholds=coder.thresholds + 1.5)
        results = []
        for width in (5000, 100):
            monkeypatch.setattr("transcoder.transcoder.LATENTS", width)
            with Largest() as largest:
                found = measure(coder, rows, 64, training_selection("batch_topk", K), lambda _: None)
            results.append((largest.elements, [each.written() for each in found.result()]))
        (whole, expected), (sliced, found) = results
        assert whole >= 64 * 3000
        assert sliced < 64 * 3000 / 2
        for one, other in zip(found, expected, strict=True):
            assert one["l0_histogram"] == other["l0_histogram"]
            assert one["mse"] == pytest.approx(other["mse"], rel=1e-5)
            for key in ("l0", "mse"):
                assert one["training_selection"][key] == pytest.approx(
                    other["training_selection"][key], rel=1e-5
                )
