"""delphi's cache as delphi itself has it: its loader, its writer, two of its scorers. Train rows of two layers.

delphi is eai-delphi 0.1.3. Its scorers' package imports vllm, whose place tools.py fills with an empty module: no
language model runs here, an oracle answers.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.settings import Settings
from evaluate.handover.delphi import export_delphi
from evaluate.metrics.rows import blocks
from shards import Store
from shards.layout import kept_mask
from tests.peers.conftest import LAYERS, Peer
from transcoder import Transcoder

pytestmark = pytest.mark.peers
EXAMPLE = 32


@pytest.fixture(scope="module")
def both(runs: dict[str, Settings]) -> Settings:
    settings = runs["demo_1"]
    of_train = settings.evaluate.model_copy(update={"split": "train"})
    return settings.model_copy(update={"layers": LAYERS, "evaluate": of_train})


@pytest.fixture(scope="module")
def folder(both: Settings) -> Path:
    return export_delphi(both)


def dense(settings: Settings) -> tuple[Tensor, Tensor]:
    """(activations [C, T, F], tokens [C, T]) of the contexts of which every position has its row."""
    store, coder = Store.of(settings), Transcoder.load(settings.run_dir())
    train, dropped = store.train, store.manifest.source.dropped_token_ids
    context, position = (each.astype(int) for each in train.provenance(0, len(train)))
    tokens = train.contexts[: context.max() + 1]
    whole = int((np.bincount(context) == kept_mask(tokens, dropped).sum(1)).sum())
    assert whole == context.max()  # 4,096 rows end within a context
    acts = torch.zeros(*tokens.shape, coder.d_sae)
    for start, stop in blocks(len(train)):  # as the export computes them: equal bit by bit
        acts[context[start:stop], position[start:stop]] = coder.encode(train.inputs(start, stop))
    return acts[:whole], torch.from_numpy(tokens[:whole].astype(int))


def windows(settings: Settings) -> tuple[Tensor, Tensor]:
    """The same cut as delphi cuts: [W, 32, F], [W, 32]."""
    acts, tokens = dense(settings)
    return acts.reshape(-1, EXAMPLE, acts.shape[2]), tokens.reshape(-1, EXAMPLE)


def by_tokens(tokens: Tensor) -> Tensor:
    """The windows in an order of their own: delphi's is by the largest activation."""
    return torch.from_numpy(np.lexsort(tokens.numpy().T))


def tokenizer(both: Settings) -> Path:
    return Store.of(both.of_layer(1)).tokenizer_path


def test_its_loader_finds_every_firing(both: Settings, folder: Path, peer: Peer, tmp_path: Path) -> None:
    theirs = peer("delphi", folder, tokenizer(both))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["modules"]) == ["layers.0.mlp", "layers.1.mlp"]
    compared = 0
    for layer in LAYERS:
        acts, tokens = windows(both.of_layer(layer))
        fires = (acts > 0).any(1)
        for latent in range(acts.shape[2]):
            name, own = f"layers.{layer}.mlp {latent}", fires[:, latent]
            if own.sum() < 20:  # min_examples in tools.py
                assert f"tokens {name}" not in theirs
                continue
            found, wanted = theirs[f"tokens {name}"], tokens[own]
            by, order = by_tokens(found), by_tokens(wanted)
            assert torch.equal(found[by], wanted[order])
            values = theirs[f"activations {name}"][by]
            assert torch.equal(values, acts[own, :, latent].half()[order])
            frequency = (acts[:, :, latent] > 0).double().mean()
            assert theirs[f"frequency {name}"] == pytest.approx(float(frequency), rel=1e-5)
            compared += 1
    assert compared > 100


def test_its_own_writer_makes_the_same_files(
    both: Settings, folder: Path, peer: Peer, tmp_path: Path
) -> None:
    """The same arrays, types and order of firings, where delphi has collected the same activations in memory."""
    acts, tokens = dense(both.of_layer(1))
    peer("delphi_writes", tmp_path / "theirs", {"acts": acts, "tokens": tokens})
    files = sorted(path.name for path in (folder / "layers.1.mlp").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "theirs" / "layers.1.mlp").iterdir())
    assert len(files) == 5
    for name in files:
        own = load_file(folder / "layers.1.mlp" / name)
        theirs = load_file(tmp_path / "theirs" / "layers.1.mlp" / name)
        assert own["locations"].dtype == theirs["locations"].dtype == torch.uint16
        for tensor in ("locations", "activations"):
            assert torch.equal(own[tensor], theirs[tensor])
        assert torch.equal(own["tokens"].long(), theirs["tokens"])


def test_its_scorers_give_an_oracle_one_and_a_guess_a_half(both: Settings, folder: Path, peer: Peer) -> None:
    """The oracle knows the windows in which a latent fires from our own activations, not from the cache."""
    active = {}
    for layer in LAYERS:
        acts, tokens = windows(both.of_layer(layer))
        fires = (acts > 0).any(1)
        middling = ((fires.sum(0) >= 30) & (fires.sum(0) <= len(tokens) - 30)).nonzero().flatten()
        assert len(middling) >= 3
        for latent in middling[:3].tolist():
            active[f"layers.{layer}.mlp {latent}"] = tokens[fires[:, latent]]
    theirs = peer("delphi_scores", folder, tokenizer(both), active)
    assert len(theirs) == 4 * len(active)
    for name in active:
        for scorer in ("detection", "fuzz"):
            oracle, guess = (theirs[f"{scorer} {who} {name}"] for who in ("oracle", "all"))
            assert len(oracle) == len(guess) == 40  # 20 that fire, 20 that do not
            assert oracle.all()
            assert guess.float().mean() == 0.5
