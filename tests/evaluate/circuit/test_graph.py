"""Influence, pruning and paths on a graph small enough to be reckoned by hand."""

import numpy as np
import pytest

from evaluate.circuit.graph import (
    ERROR,
    LATENT,
    LOGIT,
    TOKEN,
    Circuit,
    Graph,
    Nodes,
    influence,
    paths,
    pruned,
    shares,
)

# Sources: latents a (layer 0), b and c (layer 1), an error of layer 0, a token; then two logits.
A, B, C, E, T, X, Y = range(7)
NODES = Nodes(
    kind=np.array([LATENT, LATENT, LATENT, ERROR, TOKEN, LOGIT, LOGIT], np.uint8),
    layer=np.array([0, 1, 1, 0, -1, 2, 2], np.int32),
    position=np.array([1, 1, 0, 1, 0, 1, 1], np.int32),
    number=np.array([7, 3, 5, -1, 42, 10, 11]),
    value=np.array([1.5, 2.0, 0.5, 0, 0, 0.75, 0.25], np.float32),
)
EFFECTS = np.array(
    [
        # a, b, c, error, token
        [1, -2, 0, 0, 1],  # x: 1/4, 1/2, 0, 0, 1/4
        [0, 1, 1, 0, 0],  # y: 0, 1/2, 1/2, 0, 0
        [0, 0, 0, 0, 5],  # a: all of it the token
        [3, 0, 0, -1, 0],  # b: 3/4, 0, 0, 1/4, 0
    ],
    np.float32,
)


def graph() -> Graph:
    """c was not followed."""
    return Graph(NODES, np.array([X, Y, A, B]), EFFECTS, np.zeros(4, np.float32))


def test_influence_is_the_sum_over_all_paths() -> None:
    found = influence(graph(), shares(EFFECTS))
    b = 0.75 / 2 + 0.25 / 2
    a = 0.75 / 4 + b * 3 / 4
    expected = [a, b, 0.25 / 2, b / 4, 0.75 / 4 + a, 0.75, 0.25]
    np.testing.assert_allclose(found, expected)
    whole = np.zeros((7, 7))
    whole[[X, Y, A, B], :5] = shares(EFFECTS)
    p = np.array([0, 0, 0, 0, 0, 0.75, 0.25])
    series = p @ (np.linalg.inv(np.eye(7) - whole) - np.eye(7))
    np.testing.assert_allclose(found[:5], series[:5], atol=1e-12)


def test_all_influence_comes_from_tokens_errors_and_what_was_not_followed() -> None:
    ends = pruned(graph(), 1.0, 1.0).ends
    assert ends == pytest.approx((0.75 / 4 + 0.75 / 4 + 0.375, 0.125, 0.125))
    assert sum(ends) == pytest.approx(1)


def test_everything_is_kept_but_what_was_not_followed() -> None:
    circuit = pruned(graph(), 1.0, 1.0)
    assert circuit.nodes.number.tolist() == [42, 7, -1, 3, 10, 11]  # by layer
    assert circuit.lost == 1
    by_name = {
        (int(circuit.nodes.number[s]), int(circuit.nodes.number[t])): (float(effect), float(weight))
        for s, t, effect, weight in zip(
            circuit.source, circuit.target, circuit.effect, circuit.weight, strict=True
        )
    }
    assert by_name == {
        (7, 10): (1, 0.25),
        (3, 10): (-2, 0.5),
        (42, 10): (1, 0.25),
        (3, 11): (1, 0.5),  # of all that reaches y, c included
        (42, 7): (5, 1),
        (7, 3): (3, 0.75),
        (-1, 3): (-1, 0.25),
    }
    total = 0.5625 + 0.5 + 0.125 + 0.125 + 0.75
    np.testing.assert_allclose(
        circuit.share, np.array([0.75, 0.5625, 0.125, 0.5, 0.75 * total, 0.25 * total]) / total
    )
    assert circuit.cumulative[0] == pytest.approx(0.75 / total)
    assert circuit.cumulative[2] == pytest.approx(1)


def test_a_node_goes_with_its_edges_and_then_what_only_led_to_it() -> None:
    """The error holds least; without it and below 98 % of the edges' scores, what is left is connected."""
    circuit = pruned(graph(), 0.85, 1.0)
    assert ERROR not in circuit.nodes.kind
    assert circuit.nodes.number.tolist() == [42, 7, 3, 10, 11]
    few = pruned(graph(), 1.0, 0.3)  # token -> a, the strongest edge, leads on to nothing that is kept
    assert few.nodes.kind.tolist() == [TOKEN, LOGIT, LOGIT]
    assert not len(few.source)


def test_paths_by_their_weights() -> None:
    circuit = pruned(graph(), 1.0, 1.0)
    number = circuit.nodes.number
    found = [(number[list(path.nodes)].tolist(), path.weight) for path in paths(circuit, 4, 5)]
    assert found[0] == ([42, 7, 3, 10], pytest.approx(-0.375))
    assert sorted(found[1:]) == [([42, 7, 10], pytest.approx(0.25)), ([42, 10], pytest.approx(0.25))]
    assert len(paths(circuit, 4, 1)) == 1
    assert [number[list(path.nodes)].tolist() for path in paths(circuit, 5, 5)] == [[42, 7, 3, 11]]


def brute_force(circuit: Circuit, logit: int) -> list[tuple[float, tuple[int, ...]]]:
    edges: dict[int, list[tuple[int, float]]] = {}
    for s, t, w, e in zip(circuit.source, circuit.target, circuit.weight, circuit.effect, strict=True):
        edges.setdefault(int(t), []).append((int(s), float(w) * np.sign(float(e))))

    def back(node: int, tail: tuple[int, ...], weight: float) -> list[tuple[float, tuple[int, ...]]]:
        own = [(weight, (node, *tail))] if circuit.nodes.kind[node] == TOKEN else []
        return own + [path for s, w in edges.get(node, ()) for path in back(s, (node, *tail), weight * w)]

    return sorted(back(logit, (), 1.0), key=lambda each: -abs(each[0]))


def test_the_strongest_paths_are_those_of_all_paths() -> None:
    draw = np.random.default_rng(0)
    layers = np.repeat(np.arange(4), 3)
    nodes = Nodes(
        kind=np.array([LATENT] * 12 + [TOKEN] * 2 + [LOGIT], np.uint8),
        layer=np.concatenate([layers, [-1, -1, 4]]).astype(np.int32),
        position=np.zeros(15, np.int32),
        number=np.arange(15),
        value=np.ones(15, np.float32),
    )
    targets = np.array([14, *range(12)])
    effects = draw.standard_normal((13, 14)).astype(np.float32)
    effects[nodes.layer[:14] >= nodes.layer[targets][:, None]] = 0
    circuit = pruned(Graph(nodes, targets, effects, np.zeros(13, np.float32)), 1.0, 1.0)
    expected = brute_force(circuit, 14)[:7]
    found = paths(circuit, 14, 7)
    assert [path.nodes for path in found] == [nodes for _, nodes in expected]
    assert [path.weight for path in found] == pytest.approx([weight for weight, _ in expected])
