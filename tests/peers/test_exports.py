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
from evaluate.metrics.baselines import Baselines
from evaluate.metrics.side_by_side import side_by_side
from evaluate.metrics.splice import splice
from shards import Store
from shards.layout import kept_mask
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store
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
from transcoder.gain import bind
from transcoder.heavy import typical_rows

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


def random_run(folder: Path, skip: bool) -> Path:
    """A run of three prefixes that reads inputs without the gain, as training leaves one."""
    coder = random_coder(32, 32, (24, 48, 96), skip=skip)
    metadata = named_layers(1, n_layers=3, gain=(torch.arange(32) / 8 - 1.9).tolist())[0].metadata
    replace(coder, metadata=metadata).save(folder)
    return folder


@pytest.mark.parametrize("prefix", [None, 1])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracers_reader_of_gemma_scope_2_computes_the_same(
    peer: Peer, skip: bool, prefix: int | None, tmp_path: Path
) -> None:
    """On inputs with the gain, which the run reads without; our own reader gives the same back."""
    run_dir = random_run(tmp_path / "run", skip)
    normalized = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    x = normalized * torch.tensor(Transcoder.load(run_dir).metadata["source"]["gain"])
    folder = export(run_dir, "gemma_scope_2", prefix)
    theirs = peer("gemma_scope_2", folder / "params.safetensors", {"inputs": x})
    agree(exported(run_dir, prefix, reads="mlp_in"), x, theirs)
    plain = exported(run_dir, prefix)
    torch.testing.assert_close(theirs["pre"], plain.pre_activations(normalized), rtol=1e-4, atol=1e-4)
    read_back = Transcoder.load(folder)
    agree(read_back, x, theirs)
    assert read_back.metadata["source"]["input_hook"] == "blocks.1.mlp.hook_in"


@pytest.mark.parametrize("skip", [False, True])
def test_saelens_keeps_our_prefixes(peer: Peer, skip: bool, tmp_path: Path) -> None:
    """Loaded and saved again by SAELens: prefixes, their thresholds and the store's fingerprint come back."""
    run_dir = random_run(tmp_path / "run", skip)
    folder = export(run_dir, "saelens")
    peer("again", folder, tmp_path / "again")
    own, read_back = exported(run_dir, None), Transcoder.load(tmp_path / "again")
    assert read_back.prefix_ends == own.prefix_ends == (24, 48, 96)
    assert torch.equal(read_back.thresholds, own.thresholds)
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    for g in range(3):
        assert torch.equal(read_back.prefix(g)(x), own.prefix(g)(x))
    kept, written = (
        json.loads((each / "cfg.json").read_text())["metadata"] for each in (tmp_path / "again", folder)
    )
    known = {"sae_lens_version": kept["sae_lens_version"]}
    assert {key: kept.get(key) for key in written} == written | known
    assert read_back.metadata["harvest_fingerprint"] == "f" * 64


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "skip"])
def test_what_circuit_tracer_saves_we_read(kind: str, peer: Peer, tmp_path: Path) -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    theirs = peer("make_set", tmp_path / "set", kind, {"inputs": x})
    for layer in range(2):
        own = Transcoder.load(tmp_path / "set" / f"layer_{layer}.safetensors")
        agree(own, x, {name: theirs[f"{name}_{layer}"] for name in ("pre", "acts", "outputs")})
        assert own.metadata["source"]["input"] == "mlp_in"


@pytest.mark.parametrize("kind", ["plain", "skip"])
def test_what_sparsify_saves_we_read_and_compare(kind: str, peer: Peer, tmp_path: Path) -> None:
    """The same activations and outputs to 1e-5, and its FVU is ours on the same rows."""
    inputs, outputs = (torch.randn(300, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    theirs = peer("sparsify", tmp_path / "layers.0.mlp", kind, {"inputs": inputs, "outputs": outputs})
    own = Transcoder.load(tmp_path / "layers.0.mlp")
    assert own.k == 4
    for name, values in (("acts", own.encode(inputs)), ("outputs", own(inputs))):
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-5)
    rows = (inputs.numpy(), outputs.numpy())
    hooks = {"input": "mlp_in", "input_hook": "blocks.0.mlp.hook_in"}
    store = make_store(tmp_path / "layer_0.zarr", rows, rows, **hooks)
    moments = store.manifest.splits["heldout"].outputs
    assert moments is not None
    typical = typical_rows(store.heldout, moments)
    measured = side_by_side({"theirs": bind(own, store)}, store.heldout, 300, Baselines(None), typical)[0]
    assert measured[0].metrics.fvu == pytest.approx(float(theirs["fvu"]), rel=1e-5)
