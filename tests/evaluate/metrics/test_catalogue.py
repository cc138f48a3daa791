"""Per-latent columns, group summaries and the page's compact data against direct computations."""

import base64
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from common.tokens import TokenText
from evaluate.metrics.catalogue import Catalogue, group_summaries, splitting
from evaluate.metrics.contexts import REACH, Samples
from evaluate.metrics.measure import measure
from evaluate.report import page_data
from evaluate.report.page_data import Stretches, Strings
from evaluate.run import evaluate
from evaluate.subject import read
from shards import Store
from shards.store import read_tokenizer
from tests.evaluate.report.test_page import large_catalogue
from tests.evaluate.runs import ENDS, make_run, settings_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    make_run(folder)
    evaluate(settings_of(folder), ce_tokens=0)
    return folder


def test_latents_safetensors_equals_dense_activations(root: Path) -> None:
    settings = settings_of(root)
    columns = load_file(settings.run_dir() / "evaluation" / "latents.safetensors")
    store = Store.open(settings.store_path(0))
    coder = read(settings.run_dir(), store)
    inputs, _ = store.heldout.rows(0, len(store.heldout))
    pre = coder.pre_activations(inputs).numpy()
    for g, end in enumerate(ENDS):
        fires = pre > np.maximum(coder.thresholds[g].item(), 0)
        assert columns["density"][g, :end].numpy() == pytest.approx(fires.mean(0)[:end], rel=1e-6)
        assert (columns["density"][g, end:] == 0).all()
    acts = np.where(pre > coder.thresholds[-1].item(), pre, 0).astype(np.float64)
    assert columns["group"].tolist() == [0] * 4 + [1] * 6 + [2] * 14
    assert columns["firings"].tolist() == (acts > 0).sum(0).tolist()
    assert columns["largest_activation"].numpy() == pytest.approx(acts.max(0), rel=1e-6)
    assert columns["energy_share"].numpy() == pytest.approx((acts**2).sum(0) / (acts**2).sum(), rel=1e-5)
    context, position = store.heldout.provenance(0, len(inputs))
    token = store.heldout.contexts[np.arange(len(store.heldout.contexts))][context, position]
    for f in np.flatnonzero((acts > 0).sum(0) <= 256)[:5]:
        weights = np.bincount(token, weights=acts[:, f])
        assert columns["top_token_share"][f] == pytest.approx(weights.max() / weights.sum(), rel=1e-5)
        assert columns["top_tokens"][f, 0] == weights.argmax()


def test_the_groups_add_up_to_the_full_dictionary(root: Path) -> None:
    settings = settings_of(root)
    store = Store.open(settings.store_path(0))
    coder = read(settings.run_dir(), store)
    full = measure(coder, store.heldout, 1500, None, lambda _: None).result()[-1]
    metrics, _ = evaluate(settings, ce_tokens=0)
    groups = metrics.latents.groups
    assert [(group.start, group.end) for group in groups] == [(0, 4), (4, 10), (10, 24)]
    assert sum(group.l0 for group in groups) == pytest.approx(full.l0)
    assert sum(group.energy_share for group in groups) == pytest.approx(1.0)


def small() -> Catalogue:
    return large_catalogue(64, n_contexts=9, length=50)


def test_a_group_without_living_latents_has_no_medians() -> None:
    catalogue = small()
    catalogue.firings[catalogue.group == 1] = 0
    dead = group_summaries(catalogue, [4, 12, 28, 64])[1]
    assert dead.alive == 0
    assert dead.dead_fraction == 1.0
    assert dead.median_entropy_bits is None


def test_splitting_names_each_pair_once_best_first() -> None:
    catalogue = small()
    catalogue.twins.latents[:, 0] = np.arange(64) ^ 1
    catalogue.twins.scores[:, 0] = np.repeat(np.linspace(0, 1, 32), 2)
    pairs = splitting(catalogue, n=10)
    assert pairs[0].written() == {"latents": [62, 63], "jaccard": 1.0}
    assert len({tuple(pair.latents) for pair in pairs}) == 10
    assert [pair.jaccard for pair in pairs] == sorted((pair.jaccard for pair in pairs), reverse=True)


def unpack(packed: dict) -> np.ndarray:
    types = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "i32": "<i4", "f32": "<f4"}
    values = np.frombuffer(base64.b64decode(packed["data"]), types[packed["type"]])
    return values.reshape(-1, packed["width"]) if packed["width"] > 1 else values


@pytest.mark.parametrize("reading", [1, 1000])
def test_every_sample_finds_its_own_text(root: Path, reading: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "READ", reading)
    catalogue, length = small(), 50
    contexts = np.random.default_rng(0).integers(2, 90, (9, length)).astype(np.int32)
    text = TokenText(read_tokenizer(Store.open(settings_of(root).store_path(0)).tokenizer_path))
    data = page_data.page_data(catalogue, contexts, text)
    columns = {name: unpack(values) for name, values in data["columns"].items()}
    samples = catalogue.samples
    assert columns["sampleBounds"].tolist() == np.searchsorted(samples.latents, np.arange(65)).tolist()
    for s, place in enumerate(samples.places):
        context, position = divmod(int(place), length)
        first = max(position - REACH, 0)
        window = contexts[context, first : position + REACH + 1]
        pool = columns["pool"][columns["sampleAt"][s] :][: columns["sampleLength"][s]]
        assert [data["strings"][i] for i in pool] == text.pieces(window.tolist())
        assert columns["sampleFocus"][s] == position - first
        shades = slice(*columns["shadeBounds"][s : s + 2])
        at, expected = columns["shadeAt"][shades], samples.shades[s]
        inside = expected[REACH - (position - first) :][: len(window)]
        assert at[at < len(window)].tolist() == np.flatnonzero(inside).tolist()


def test_merged_stretches_cover_each_place_once() -> None:
    places = np.array([3, 10, 49, 50, 51, 99])
    samples = Samples(np.zeros(6, np.int32), places, np.ones(6), np.ones(6), np.zeros((6, 33), np.float16))
    stretches = Stretches.around(samples, np.arange(6), context_length=50)
    covered = [
        range(start, start + length)
        for start, length in zip(stretches.starts, stretches.lengths, strict=True)
    ]
    flat = [place for stretch in covered for place in stretch]
    assert flat == sorted(set(flat))
    assert set(places.tolist()) <= set(flat)
    assert all(stretch[0] // 50 == stretch[-1] // 50 for stretch in covered)
    flat_at = [
        flat[at + focus] for at, focus in zip(stretches.sample_at, stretches.sample_focus, strict=True)
    ]
    assert flat_at == places.tolist()


@pytest.mark.parametrize(("limit", "shown"), [(10**6, 18), (2500, 2), (1, 1)])
def test_a_page_that_would_be_too_large_shows_fewer_samples(
    limit: int, shown: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_data, "POOL_TOKENS", limit)
    catalogue = large_catalogue(64, n_contexts=90, length=50)
    text = TokenText(read_tokenizer(Store.open(settings_of(root).store_path(0)).tokenizer_path))
    data = page_data.page_data(catalogue, np.full((90, 50), 5, np.int32), text)
    columns = {name: unpack(each) for name, each in data["columns"].items()}
    assert set(np.diff(columns["sampleBounds"].astype(int)).tolist()) == {shown}
    assert len(columns["pool"]) <= limit or shown == 1


def test_strings_are_kept_once(root: Path) -> None:
    strings = Strings(TokenText(read_tokenizer(Store.open(settings_of(root).store_path(0)).tokenizer_path)))
    numbers = strings.labels(np.array([[5, 6], [5, -1]], np.int32))
    assert numbers.tolist() == [[0, 1], [0, -1]]
    assert strings.texts == [" word3", " word4"]


def test_shapes_survive_packing() -> None:
    for values in (np.arange(6, dtype=np.uint16).reshape(3, 2), np.array([1.5, np.nan], np.float32)):
        assert np.array_equal(unpack(page_data.pack(values)), values, equal_nan=values.dtype.kind == "f")
