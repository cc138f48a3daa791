"""An evaluation in several processes gives what one gives: each reads a part of the rows."""

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.processes import ALONE, Processes
from common.settings import ROOT, Settings
from common.tokens import TokenText
from evaluate.metrics import rows as rows_of
from evaluate.metrics.baselines import Baselines, fit_ridge
from evaluate.metrics.language import language_model, measure_language
from evaluate.metrics.measure import training_selection
from evaluate.metrics.passes import First, first_pass
from evaluate.metrics.splice import Loss
from evaluate.run import evaluate_with
from harvest.run import harvest
from shards import Store
from shards.store import read_tokenizer
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import D_IN, D_OUT, ENDS, K, make_run, settings_of
from tests.train.threads import meshes, together

BLOCK = 50
UNEVEN, FEW = 1370, 70
"""28 blocks, the last a short one; two blocks."""
CLOSE = 1e-12
VOCABULARY = [f"w{n}" for n in range(40)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is done in parts has several here."""
    monkeypatch.setattr(rows_of, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(rows_of, "MEET", 4)
    for name, value in {
        "metrics.contexts.BUFFER": 900,
        "metrics.coactivation.SAMPLE_ROWS": 400,
        "metrics.coactivation.CELLS": 100,
        "metrics.coactivation.MIN_FIRINGS": 4,
        "metrics.redundancy.BLOCK": 5,
        "labels.choose.TOGETHER": 300,
        "labels.effects.BLOCK": 4,
    }.items():
        monkeypatch.setattr(f"evaluate.{name}", value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_run(folder, vocabulary=VOCABULARY)
    return folder


def in_threads(world: int, body: Callable[[Processes], Any]) -> list[Any]:
    """What each rank gives."""
    return together(meshes(world, 1), lambda mesh: body(mesh.everyone))


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Whole numbers, texts and float32 arrays equal, float64 to rounding; of objects what has no underscore."""
    if isinstance(expected, torch.Tensor):
        found, expected = found.cpu().numpy(), expected.cpu().numpy()
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        exact = expected.dtype != np.float64
        np.testing.assert_allclose(found, expected, rtol=0 if exact else CLOSE, atol=0, err_msg=where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=CLOSE, abs=0, nan_ok=True), where
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{n}]")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif hasattr(expected, "__dict__"):
        for name in vars(expected):
            if not (name.startswith("_") or callable(getattr(expected, name))):
                assert_same(getattr(found, name), getattr(expected, name), f"{where}.{name}")
    else:
        assert found == expected, where


def first_of(root: Path, n_rows: int) -> Callable[[Processes], First]:
    store = Store.of(settings_of(root))
    coder, moments = random_coder(D_IN, D_OUT, ENDS), store.manifest.splits["heldout"].outputs
    assert moments is not None
    text, select = TokenText(read_tokenizer(store.tokenizer_path)), training_selection("batch_topk", K)

    def run(peers: Processes) -> First:
        baselines = Baselines(fit_ridge(store.train, peers=peers))
        tick = lambda _: None  # noqa: E731
        return first_pass(coder, store.heldout, n_rows, select, baselines, moments, text.size, tick, peers)

    return run


@pytest.mark.parametrize(("world", "n_rows"), [(2, UNEVEN), (3, UNEVEN), (3, FEW)])
def test_every_accumulator_of_the_first_pass_is_one_processs(world: int, n_rows: int, root: Path) -> None:
    """Whatever it holds. A new number that `merge` does not add up differs here."""
    run = first_of(root, n_rows)
    expected = run(ALONE)
    twins, parents = expected.coactivation.partners(ENDS)
    assert (twins.latents >= 0).any()
    assert (parents.latents >= 0).any()

    def one(peers: Processes) -> tuple[First, Any]:
        first = run(peers)
        return first, first.coactivation.partners(ENDS, peers=peers)

    for first, partners in in_threads(world, one):
        assert len(fields(first)) > 5
        assert_same(first, expected)
        assert_same(partners, (twins, parents))


@pytest.mark.parametrize(("world", "n_rows"), [(2, UNEVEN), (3, UNEVEN), (3, FEW)])
def test_every_file_is_one_processs(
    world: int, n_rows: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.json, what is known of each latent, and the contexts that are shown of it."""
    monkeypatch.setattr("evaluate.run.draw", lambda *_: [])  # plots take seconds

    settings, found = settings_of(root, "--evaluate.rows", str(n_rows)), []
    where = settings.run_dir() / "evaluation"
    for several in (1, world):
        shutil.rmtree(where, ignore_errors=True)
        results = in_threads(several, lambda peers: evaluate_with(peers, settings, 0))
        assert all(each == results[0] for each in results)
        assert results[0][1]
        metrics = json.loads((where / "metrics.json").read_text())
        tables = [load_file(where / f"{name}.safetensors") for name in ("latents", "contexts")]
        found.append((metrics, *tables))
        again = in_threads(several, lambda peers: evaluate_with(peers, settings, 0))
        assert again == [(results[0][0], False)] * several
    assert_same(found[1], found[0])
    assert found[0][0]["rows"] == n_rows


def test_the_language_model_says_the_same(
    llama: Path, settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(llama, rows=4000)
    harvest(settings)
    store, coder = Store.open(settings.store_path(settings.layer)), random_coder(32, 32, ends=(4, 9))
    vocabulary = len(read_tokenizer(store.tokenizer_path).get_vocab())
    monkeypatch.setattr("evaluate.metrics.splice.LOGITS", 2 * 32 * (vocabulary + 9))

    source, wanted = store.manifest.source, settings.model
    models = [language_model(wanted, source)]  # the libraries load none in several threads at once
    monkeypatch.setattr("evaluate.metrics.language.language_model", lambda *_: models.pop())

    def ask(peers: Processes) -> Any:
        return measure_language(settings, store, store.heldout, coder, 320, peers)

    expected = ask(ALONE)
    assert expected.cross_entropy.contexts == 10
    for world in (2, 3):
        models += [language_model(wanted, source) for _ in range(world)]
        if world == 3:  # else the losses of the model alone are those that were kept
            shutil.rmtree(store.path.with_suffix(".losses"))
        for said in in_threads(world, ask):
            assert_same(said.cross_entropy.written(), expected.cross_entropy.written())
            assert_same(
                [each.written() for each in said.prefixes], [each.written() for each in expected.prefixes]
            )
            assert_same(said.effects.arrays(), expected.effects.arrays())
            assert_same(dict(said.by_context), dict(expected.by_context))


def test_losses_of_each_ranks_contexts_are_those_of_all() -> None:
    """In order; a rank may have none."""
    nats = np.random.default_rng(0).random((5, 7)).astype(np.float32)

    def loss(contexts: range) -> Loss:
        whole = Loss(divergence=float(sum(contexts)), agreed=10 * len(contexts))
        for each in contexts:
            whole.add_context(nats[each])
        return whole

    def one(peers: Processes) -> Loss:
        own = loss((range(2), range(0), range(2, 5))[peers.rank])
        own.merge(peers)
        return own

    for merged in in_threads(3, one):
        assert_same(merged, loss(range(5)))


def test_what_adds_blocks_can_be_merged() -> None:
    """A metric's author who forgets it reads here that it is needed: docs/architecture.md, "to add a metric"."""
    files = [
        *(ROOT / "evaluate/metrics").glob("*.py"),
        ROOT / "evaluate/labels/measured.py",
        ROOT / "transcoder/fvu.py",
    ]
    adding = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                if "add" in methods:
                    adding.add(node.name)
                    assert "merge" in methods, (
                        f"{file.name}: {node.name} adds blocks, and has no merge(peers)"
                    )
    assert {"Reconstruction", "Best", "Coactivation", "ErrorMap", "Loss", "Measured", "Deviation"} <= adding
