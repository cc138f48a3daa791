"""Exports and imports against the tools themselves, on real rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.hooks import hooks_of
from common.settings import Settings
from evaluate.metrics.splice import splice
from shards import Store
from shards.layout import kept_mask
from tests.evaluate.fakes import random_coder
from tests.models import save_model
from tests.peers.conftest import (
    LAYERS,
    Peer,
    agree,
    as_transformers_4_reads_it,
    heldout,
    language_model,
    tokens,
)
from tests.transcoder.test_formats import layers as named_layers
from transcoder import Transcoder
from transcoder.export import export, export_set, exported
from transcoder.formats import circuit_tracer

pytestmark = pytest.mark.peers
Runs = dict[str, Settings]


@pytest.mark.parametrize("prefix", [None, 0])
@pytest.mark.parametrize("run", ["demo_1", "skip", "gain"])
def test_saelens_computes_the_same(
    runs: Runs, peer: Peer, run: str, prefix: int | None, record_property: Callable[..., None]
) -> None:
    run_dir = runs[run].run_dir()
    own, x = exported(run_dir, prefix), heldout(runs["demo_1"])
    theirs = peer("saelens", export(run_dir, "saelens", prefix), {"inputs": x})
    record_property("rows at the jump", agree(own, x, theirs))


def test_with_the_gain_in_the_weights_the_run_is_the_same_function(runs: Runs, peer: Peer) -> None:
    """The run that was trained with the gain, on its own inputs, is its export on inputs without."""
    source = Store.of(runs["gain"]).manifest.source
    own, x = Transcoder.load(runs["gain"].run_dir()), heldout(runs["demo_1"])
    theirs = peer("saelens", export(runs["gain"].run_dir(), "saelens"), {"inputs": x})
    fed = x * torch.tensor(source.gain)
    torch.testing.assert_close(theirs["pre"], own.pre_activations(fed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [None, 1])
@pytest.mark.parametrize("run", ["demo_1", "gain"])
def test_gemma_scopes_reader_computes_the_same(runs: Runs, peer: Peer, run: str, prefix: int | None) -> None:
    run_dir = runs[run].run_dir()
    x = heldout(runs["demo_1"])
    folder = export(run_dir, "gemma_scope", prefix)
    agree(exported(run_dir, prefix), x, peer("gemma_scope", folder / "params.npz", {"inputs": x}))


def test_circuit_tracer_computes_the_same(runs: Runs, peer: Peer, tmp_path: Path) -> None:
    both = runs["demo_1"].model_copy(update={"layers": LAYERS})
    folder = export_set(both, partial=True)
    inputs = {f"inputs_{layer}": heldout(runs[f"demo_{layer}"]) for layer in LAYERS}
    theirs = peer("circuit_tracer", folder, inputs)
    for layer in LAYERS:
        own = exported(runs[f"demo_{layer}"].run_dir(), None)
        results = {name: theirs[f"{name}_{layer}"] for name in ("pre", "acts", "outputs")}
        agree(own, inputs[f"inputs_{layer}"], results)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["feature_input_hook"] == "ln2.hook_normalized"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_circuit_tracer_replaces_every_mlp_with_what_we_trained_on(
    family: str, peer: Peer, tmp_path: Path
) -> None:
    """Its hooks hold our inputs and outputs, and its replacement model's activations are ours on them."""
    model = save_model(tmp_path / family, family, initializer_range=0.2)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    own = [random_transcoder(layer) for layer in range(3)]
    circuit_tracer.write(tmp_path / "set", [transcoder.saved() for transcoder in own])
    old = as_transformers_4_reads_it(model, tmp_path / "old")
    theirs = peer("replace", tmp_path / "set", old, {"tokens": ids})
    torch.testing.assert_close(theirs["logits"], theirs["reference"], rtol=1e-3, atol=1e-3)
    ours = language_model(model)
    for layer, transcoder in enumerate(own):
        hooks = hooks_of(layer, "normalized")
        with ours.capturing([*hooks]) as caught:
            ours.run_blocks(ids, layer)
        for hook in hooks:
            torch.testing.assert_close(theirs[hook], caught[hook], rtol=1e-4, atol=1e-4)
        for row in range(len(ids)):
            acts = transcoder.encode(theirs[hooks[0]][row])
            acts[0] = 0  # it leaves the first position out
            torch.testing.assert_close(theirs[f"acts_{row}"][layer], acts, rtol=1e-4, atol=1e-4)
            assert 20 < int((acts > 0).sum()) < acts.numel() // 2


def random_transcoder(layer: int) -> Transcoder:
    metadata = named_layers(layer, n_layers=3)[0].metadata
    return replace(random_coder(32, 32, (64,), seed=layer), metadata=metadata)


def test_the_spliced_cross_entropy_is_ours(runs: Runs, model: Path, peer: Peer, tmp_path: Path) -> None:
    settings = runs["demo_1"]
    ids, own = tokens(settings, 4), exported(settings.run_dir(), None)
    source = Store.of(settings).manifest.source
    excluded = ~torch.from_numpy(kept_mask(ids.numpy(), source.dropped_token_ids))
    assert excluded[:, 0].all()
    old = as_transformers_4_reads_it(model, tmp_path / "old")
    theirs = peer("splice", export(settings.run_dir(), "saelens"), old, {"tokens": ids, "excluded": excluded})
    losses = splice(language_model(model), source, ids.numpy(), {"spliced": own}, lambda _: None)
    for name in ("clean", "spliced"):
        mean = losses[name].cross_entropy / losses[name].positions
        assert mean == pytest.approx(float(theirs[name]), abs=1e-4)
    assert theirs["spliced"] - theirs["clean"] > 0.01


@pytest.mark.parametrize(
    "kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_what_saelens_saves_we_read(kind: str, peer: Peer, tmp_path: Path) -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    theirs = peer("make", tmp_path / "theirs", kind, {"inputs": x})
    agree(Transcoder.load(tmp_path / "theirs"), x, theirs)
