"""Evaluation on a device that is no CPU (tests/pretend.py): the CPU's results, and how seldom the host waits."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.tokens import TokenText
from evaluate.labels.choose import choose
from evaluate.labels.effects import LogitEffects, logit_effects
from evaluate.labels.measured import Measured
from evaluate.labels.words import Words
from evaluate.metrics import rows as rows_of
from evaluate.metrics.baselines import Baselines, fit_ridge
from evaluate.metrics.catalogue import Catalogue, catalogue, tensors
from evaluate.metrics.measure import training_selection
from evaluate.metrics.passes import First, first_pass, second_pass
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.metrics.side_by_side import side_by_side
from evaluate.metrics.splice import Clean, Loss, splice, writer
from evaluate.run import evaluate
from shards import Store
from shards.store import read_tokenizer
from tests.evaluate.fakes import random_coder
from tests.evaluate.metrics.test_splice import contexts, language_model, source_of
from tests.evaluate.runs import D_IN, D_OUT, ENDS, K, make_run, settings_of
from tests.models import save_model
from tests.pretend import DEVICE, counted, pretend_device
from transcoder import Transcoder
from transcoder.heavy import typical_rows

CPU = torch.device("cpu")
ROWS, BLOCK = 300, 50
COUNTS = DEVICE.type == "pretend"
CLOSE = 1e-6 if COUNTS else 1e-4
"""Relative: a GPU's products round differently."""
WAITS = {"first pass": 11, "second pass": 5}
"""A block. First: entries above the lowest threshold; of all prefixes, and of each; candidates and entries of the
training selection, and its prefixes' two; coactivation's share; strongest rows; the even sample; numbers of rows.
Second: entries; those around samples, and their copy; entries on measured rows, and those where the label holds."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_run(tmp_path_factory.mktemp("device"))


def evaluated(store: Store, coder: Transcoder, device: torch.device, n_rows: int) -> tuple[First, Catalogue]:
    """Both passes and what is known of each latent."""
    split, moments = store.heldout, store.manifest.splits["heldout"].outputs
    assert moments is not None
    coder, text = coder.to(device), TokenText(read_tokenizer(store.tokenizer_path))
    select, tick = training_selection("batch_topk", K), lambda _: None
    baselines = Baselines(fit_ridge(store.train, n_rows=500, device=device))
    first = first_pass(coder, split, n_rows, select, baselines, moments, text.size, tick)
    words = Words(text, split.contexts)
    firings = first.measurement.prefixes[-1].firing.firings.cpu().numpy()
    labels = choose(first.sampled, firings, split, n_rows, words)
    measured = Measured(labels, split.contexts, words, device)
    samples = second_pass(coder, split, n_rows, first, measured, tick)
    neighbours = decoder_similarity(coder.W_dec, coder.prefix_ends)[1]
    effects = LogitEffects.none(coder.d_sae)
    return first, catalogue(
        first, samples, neighbours, effects, ENDS, measured, first.coactivation.partners(ENDS)
    )


@pytest.mark.parametrize("per_latent", [False, True])
def test_the_passes_give_the_cpus_numbers(
    store: Store, per_latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr("evaluate.metrics.contexts.BUFFER", 500)
    monkeypatch.setattr("evaluate.metrics.coactivation.SAMPLE_ROWS", ROWS // 2)
    coder = random_coder(D_IN, D_OUT, ENDS, skip=True, per_latent=per_latent)
    first, known = evaluated(store, coder, CPU, ROWS)
    with pretend_device():
        second, on_device = evaluated(store, coder, DEVICE, ROWS)
        pairs = list(zip(first.measurement.result(), second.measurement.result(), strict=True))
        errors = [each.errors(str).written() for each in (first, second)]
        deviation = first.measurement.deviation.total
        baselines = [each.baselines.result(deviation).written() for each in (first, second)]
    for expected, computed in pairs:
        assert_close(computed.written(), expected.written())
    assert_close(errors[1], errors[0])
    assert_close(baselines[1], baselines[0])
    assert pairs[-1][0].l0 > 1
    found = tensors(on_device)
    for name, tensor in tensors(known).items():
        torch.testing.assert_close(found[name], tensor, rtol=CLOSE, atol=CLOSE, equal_nan=True, msg=name)
    for name in ("latents", "places", "values", "quantiles", "shades"):
        assert np.array_equal(
            getattr(on_device.samples, name), getattr(known.samples, name), equal_nan=name == "quantiles"
        )


def assert_close(computed: Any, expected: Any) -> None:
    """Whole numbers and texts equal, others to rounding."""
    if isinstance(expected, dict):
        assert computed.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(computed[key], value)
    elif isinstance(expected, list):
        for one, other in zip(computed, expected, strict=True):
            assert_close(one, other)
    else:
        assert computed == (pytest.approx(expected, rel=CLOSE) if isinstance(expected, float) else expected)


@counted
def test_the_host_waits_seldom(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass over eight blocks counts and one over six does not, whatever the number of prefixes."""
    monkeypatch.setattr(rows_of, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr("evaluate.metrics.coactivation.SAMPLE_ROWS", 100)
    for ends in ((24,), ENDS, (2, 4, 8, 12, 16, 24)):
        counts = [waits(store, random_coder(D_IN, D_OUT, ends), blocks * BLOCK) for blocks in (6, 8)]
        for name, most in WAITS.items():
            assert 0 < counts[1][name] - counts[0][name] <= 2 * most, (ends, name, counts)


def waits(store: Store, coder: Transcoder, n_rows: int) -> dict[str, int]:
    """Of each pass, and no more bytes to the host than a few numbers a row."""
    split, moments = store.heldout, store.manifest.splits["heldout"].outputs
    assert moments is not None
    text, found = TokenText(read_tokenizer(store.tokenizer_path)), {}
    with pretend_device() as counts:
        coder, select, tick = coder.to(DEVICE), training_selection("batch_topk", K), lambda _: None
        linear = fit_ridge(store.train, n_rows=100, device=DEVICE)
        before = Counter(counts)
        first = first_pass(coder, split, n_rows, select, Baselines(linear), moments, text.size, tick)
        found["first pass"] = counts["waits"] - before["waits"]
        words = Words(text, split.contexts)
        firings = first.measurement.prefixes[-1].firing.firings.cpu().numpy()
        labels = choose(first.sampled, firings, split, n_rows, words)
        measured = Measured(labels, split.contexts, words, DEVICE)
        before = Counter(counts)
        second_pass(coder, split, n_rows, first, measured, tick)
        found["second pass"] = counts["waits"] - before["waits"]
    return found


def test_blocks_are_decoded_ahead_and_a_readers_error_is_raised(store: Store) -> None:
    bounds = [(0, 7), (7, 30), (30, 31)]
    with pretend_device():
        blocks = list(rows_of.batches(store.heldout, bounds, DEVICE))
        assert [(start, stop) for start, stop, *_ in blocks] == bounds
        for start, stop, inputs, outputs in blocks:
            expected = store.heldout.rows(start, stop)
            assert torch.equal(inputs.cpu(), expected[0])
            assert torch.equal(outputs.cpu(), expected[1])
        with pytest.raises(IndexError):
            list(rows_of.batches(_Broken(), bounds, DEVICE))


class _Broken:
    def __len__(self) -> int:
        return 100

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        raise IndexError(start)


def test_redundancy_and_side_by_side_give_the_cpus_numbers(store: Store) -> None:
    coders = {name: random_coder(D_IN, D_OUT, ENDS, seed) for seed, name in enumerate(("one", "other"))}
    coders["other"].W_dec[3] = coders["other"].W_dec[20]
    moments = store.manifest.splits["heldout"].outputs
    assert moments is not None
    typical = typical_rows(store.heldout, moments)

    def measured(device: torch.device) -> Any:
        moved = {name: coder.to(device) for name, coder in coders.items()}
        baselines = Baselines(fit_ridge(store.train, n_rows=500, device=device))
        lines, linear, heavy = side_by_side(moved, store.heldout, ROWS, baselines, typical)
        redundancy, neighbours = decoder_similarity(moved["other"].W_dec, ENDS)
        numbers = [[*line.metrics.written().values(), line.redundancy, line.typical] for line in lines]
        return [*numbers, [linear, heavy], redundancy.written(), neighbours.latents.tolist()]

    expected = measured(CPU)
    assert expected[-2]["close_pairs"] >= 1
    with pretend_device() as counts:
        assert_close(measured(DEVICE), expected)
        before = Counter(counts)
        decoder_similarity(coders["one"].to(DEVICE).W_dec, ENDS)
    assert (counts - before)["waits"] <= 3 + len(
        coders["one"].parameters.named()
    ) + 1  # results; the coder's move


def test_losses_give_the_cpus_numbers_and_one_wait_a_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 3, 6, 11, generator=draw)
    tokens = torch.randint(11, (3, 6), generator=draw)

    def losses(device: torch.device) -> list[Loss]:
        found = [Loss(), Loss()]
        clean = Clean(logits.to(device))
        for loss, said in zip(found, (logits, other), strict=True):
            loss.add(clean, said.to(device), tokens.to(device))
        return found

    expected = losses(CPU)
    assert expected[1].divergence > 0.1
    with pretend_device() as counts:
        computed = losses(DEVICE)
        assert counts["waits"] == (7 if COUNTS else 0)  # five copies to the device; one a batch
    assert [each.agreed for each in computed] == [each.agreed for each in expected]
    for one, two in zip(computed, expected, strict=True):
        assert one.divergence == pytest.approx(two.divergence, rel=CLOSE, abs=CLOSE)
        np.testing.assert_allclose(one.contexts, two.contexts, rtol=CLOSE)


def test_a_replacement_is_written_where_rows_are() -> None:
    output, kept = torch.zeros(2, 3, 4), torch.tensor([[False, True, True], [False, False, True]])
    expected = writer(kept.nonzero(as_tuple=True), torch.ones(3, 4))(output, hook=None)
    assert torch.equal(expected[..., 0], kept.float())
    with pretend_device():
        where = kept.to(DEVICE).nonzero(as_tuple=True)
        assert torch.equal(
            writer(where, torch.ones(3, 4).to(DEVICE))(output.to(DEVICE), hook=None).cpu(), expected
        )


def test_effects_give_the_cpus_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.labels.effects.BLOCK", 16)
    unembedding = torch.randn(D_OUT, 40, generator=torch.Generator().manual_seed(1))
    coder, ranked = random_coder(D_IN, D_OUT, ENDS), np.arange(40) % 5 > 0

    def effects(device: torch.device) -> LogitEffects:
        held = unembedding.to(device)

        def norm(rows: Tensor) -> Tensor:
            return rows / (1 + rows.norm(dim=-1, keepdim=True))

        bridge = SimpleNamespace(unembed=lambda rows: rows @ held, ln_final=norm)
        model: Any = SimpleNamespace(bridge=bridge, dtype=torch.float32)
        return logit_effects(model, coder.W_dec.to(device), ranked, n=3)

    expected = effects(CPU).arrays()
    with pretend_device():
        computed = effects(DEVICE).arrays()
    for name, array in expected.items():
        np.testing.assert_allclose(computed[name], array, rtol=10 * CLOSE, atol=CLOSE, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_splicing_a_tiny_model_gives_the_cpus_losses(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / family, family, initializer_range=0.2)
    coder, ids = random_coder(32, 32, (8, 20)), contexts()

    def losses(device: torch.device) -> dict[str, Loss]:
        model = language_model(directory)
        for module in model.bridge.modules():
            for table in (module._parameters, module._buffers):
                table |= {name: held.data.to(device) for name, held in table.items() if held is not None}
        model.device = device
        replacements = {"zero": torch.zeros_like, "0": coder.to(device)}
        return splice(model, source_of(1), ids, replacements, lambda _: None)

    expected = losses(CPU)
    with pretend_device():
        computed = losses(DEVICE)
    for name, loss in expected.items():
        assert computed[name].agreed == loss.agreed
        assert computed[name].cross_entropy == pytest.approx(loss.cross_entropy, rel=CLOSE)
        assert computed[name].divergence == pytest.approx(loss.divergence, rel=CLOSE, abs=100 * CLOSE)


def test_the_whole_stage_writes_the_cpus_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}
    monkeypatch.setattr("evaluate.run.draw", lambda *_: [])  # plots take seconds
    for device in (CPU, DEVICE):
        make_run(tmp_path / device.type)
        monkeypatch.setattr("evaluate.run.pick_device", lambda name, there=device: there)
        with pretend_device():
            metrics, _ = evaluate(settings_of(tmp_path / device.type), ce_tokens=0)
        written[device] = metrics.written() | {"provenance": None}
    assert_close(written[DEVICE], written[CPU])
