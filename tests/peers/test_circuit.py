"""make circuit against circuit-tracer: the same direct effects on the same text, and a graph file of its schema."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.tokens import TokenText
from evaluate.circuit.attribute import Effects, attribute
from evaluate.circuit.graph import ERROR, LATENT, LOGIT, TOKEN, pruned
from evaluate.circuit.labels import labels
from evaluate.circuit.write import About, write
from harvest import lm
from tests.evaluate.circuit.small import TOKENS, coders_of, text
from tests.models import save_model
from tests.peers.conftest import Peer, as_transformers_4_reads_it, language_model
from tests.transcoder.test_formats import layers as named_layers
from transcoder.formats import circuit_tracer

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("skip", [False, True])
def test_its_graph_has_our_effects(peer: Peer, tmp_path: Path, skip: bool) -> None:
    """Every edge of the whole graph, and the same nodes: latents, errors, tokens, logits.

    But for one source: it passes the skip connection at the first position too, where ours keeps the MLP's own output,
    as no row of a store is from there; so the first token's effects differ where there is a skip connection.
    """
    model = save_model(tmp_path / "llama", "llama")
    ours = language_model(model)
    coders = coders_of(ours, skip)
    named = named_layers(0, n_layers=3)[0].metadata
    saved = [
        (coder.saved()[0], coder.saved()[1] | named | {"source": named["source"] | {"layer": layer}})
        for layer, coder in enumerate(coders)
    ]
    circuit_tracer.write(tmp_path / "set", saved, "tiny/random")
    old = as_transformers_4_reads_it(model, tmp_path / "old")
    theirs = peer("attribute", tmp_path / "set", old, {"tokens": TOKENS})
    effects = Effects(ours, coders, text())
    nodes = effects.nodes
    latents = np.flatnonzero(nodes.kind == LATENT)
    place = np.stack([nodes.layer, nodes.position, nodes.number], 1)[latents]
    assert place.tolist() == theirs["active"].tolist()
    np.testing.assert_allclose(nodes.value[latents], theirs["values"], rtol=1e-4, atol=1e-5)
    logits = np.flatnonzero(nodes.kind == LOGIT)
    assert nodes.number[logits].tolist() == theirs["logits"].tolist()
    np.testing.assert_allclose(nodes.value[logits], theirs["probabilities"], rtol=1e-4)
    found = effects.of(np.concatenate([latents, logits])).effects
    rows = [*range(len(latents)), *range(effects.n_sources, len(nodes))]
    expected = theirs["effects"].numpy()[rows, : effects.n_sources]
    for kind in (LATENT, ERROR, TOKEN):
        own = np.flatnonzero(nodes.kind[: effects.n_sources] == kind)
        own = own[1:] if skip and kind == TOKEN else own
        largest = np.abs(expected[:, own]).max()
        assert largest > 0
        np.testing.assert_allclose(found[:, own], expected[:, own], rtol=1e-3, atol=1e-4 * largest)


def test_its_schema_takes_our_graph(llama: Path, peer: Peer, tmp_path: Path) -> None:
    model = language_model(llama)
    coders = coders_of(model)
    circuit = pruned(attribute(Effects(model, coders, text()), 200), 0.8, 0.98)
    tokens = TokenText(lm.load_tokenizer(str(llama), None).backend_tokenizer)
    pieces = tokens.pieces(TOKENS.tolist())
    about = About("tiny-llama", "a", 1, 3, "a text", pieces, 200, {0: "0" * 64})
    named = labels(circuit.nodes, model, coders, tokens, pieces, {}, None)
    write(tmp_path / "out", about, circuit, named, {}, {})
    read = peer("graph", tmp_path / "out" / "graph.json")
    assert (int(read["nodes"]), int(read["links"])) == (len(circuit.nodes), len(circuit.source))
    assert torch.tensor(circuit.source).numel() > 100
