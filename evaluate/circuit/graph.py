"""The graph of direct effects: which nodes and edges the logits hang on, and the paths that carry most.

Shapes: N nodes, of which the first S are sources and the others the target logits; R targets with a row of effects.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["latent", "error", "embedding", "logit"]
KINDS: tuple[Kind, ...] = ("latent", "error", "embedding", "logit")
LATENT, ERROR, TOKEN, LOGIT = range(4)
BLOCK = 64
"""Targets whose rows are multiplied together."""


@dataclass(frozen=True)
class Nodes:
    """[N] each."""

    kind: np.ndarray
    """uint8, index in KINDS."""
    layer: np.ndarray
    """int32; -1: embedding, the model's number of layers: logit."""
    position: np.ndarray
    number: np.ndarray
    """int64: of the latent, or the token's id; -1: error."""
    value: np.ndarray
    """float32: activation, or the probability of a logit; 0: error, embedding."""

    def __len__(self) -> int:
        return len(self.kind)

    def only(self, which: np.ndarray) -> "Nodes":
        """The nodes that `which` selects."""
        return Nodes(**{name: values[which] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Graph:
    """Effects as far as they were followed: a latent without a row is known as a source only."""

    nodes: Nodes
    targets: np.ndarray
    """[R] node of each row: every logit, and the latents that were followed."""
    effects: np.ndarray
    """[R, S] float32 direct effect of each source."""
    constants: np.ndarray
    """[R] what the biases add."""

    @property
    def n_sources(self) -> int:
        return self.effects.shape[1]


class Ends(NamedTuple):
    """Where the influence on the logits comes from, as shares that sum to 1."""

    tokens: float
    """Ends of paths that lead through latents and attention alone to the embeddings."""
    errors: float
    """What no latent reconstructs."""
    not_followed: float
    """Latents beyond the number of nodes."""


@dataclass(frozen=True)
class Circuit:
    """What is left of a graph after pruning: K nodes, E edges."""

    nodes: Nodes
    """By layer, position, kind, number."""
    share: np.ndarray
    """[K] a node's influence, as a share of that of all nodes before pruning; of a logit its probability."""
    cumulative: np.ndarray
    """[K] the share of all nodes that have at least this one's influence; of a logit 0."""
    source: np.ndarray
    """[E] index in `nodes`."""
    target: np.ndarray
    effect: np.ndarray
    """[E] direct effect of source on target."""
    weight: np.ndarray
    """[E] its size as a share of those of all sources of the target, before pruning."""
    ends: Ends
    lost: int
    """Latents that were not followed, but have so much influence that they would be kept."""


class Route(NamedTuple):
    """Nodes from an embedding to a logit."""

    nodes: tuple[int, ...]
    weight: float
    """Product of the edges' weights; negative where an odd number of effects is."""


def shares(effects: np.ndarray) -> np.ndarray:
    """Each row's effects by size, as shares of their sum.

    >>> shares(np.array([[3.0, -1.0], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    sizes = np.abs(effects)
    sizes /= np.maximum(sizes.sum(1, keepdims=True), 1e-30)
    return sizes


def influence(graph: Graph, rows: np.ndarray, sources: np.ndarray | None = None) -> np.ndarray:
    """[N] influence of each node on the logits, and of a logit its probability; `rows` are the shares of the effects,
    of all sources or of some.

    The sum over all paths to a logit of the product of the shares on it, times the logit's probability: the vector
    p A + p A^2 + ..., which is p ((I - A)^-1 - I). Sources lie below their targets, so one sweep from the top is
    the whole sum.
    """
    nodes, columns = graph.nodes, slice(graph.n_sources) if sources is None else sources
    found = np.where(nodes.kind == LOGIT, nodes.value, 0).astype(np.float64)
    layers = nodes.layer[graph.targets]
    for layer in sorted({*layers.tolist()}, reverse=True):
        own = np.flatnonzero(layers == layer)
        weights = found[graph.targets[own]]
        for start in range(0, len(own), BLOCK):  # a product has its rows in float64
            part = slice(start, start + BLOCK)
            found[columns] += weights[part] @ rows[own[part]]
    return found


def pruned(graph: Graph, node_share: float, edge_share: float) -> Circuit:
    """The nodes that make up `node_share` of the influence, and of the edges between them those that make `edge_share`.

    As Ameisen et al. 2025 (Circuit Tracing) and their tool: embeddings and logits always stay; then a latent or error
    without an edge out goes, and a latent without one in.
    """
    nodes, n_sources = graph.nodes, graph.n_sources
    rows = shares(graph.effects)
    total = influence(graph, rows)
    sources = total[:n_sources]
    order = np.argsort(-sources, kind="stable")
    cumulative = np.zeros(len(nodes))
    cumulative[order] = np.cumsum(sources[order]) / max(sources.sum(), 1e-30)
    before = cumulative[:n_sources] - sources / max(sources.sum(), 1e-30)
    kept = np.ones(len(nodes), bool)
    kept[:n_sources] = before < node_share
    row_of = np.full(len(nodes), -1)
    row_of[graph.targets] = np.arange(len(graph.targets))
    followed = (nodes.kind != LATENT) | (row_of >= 0)
    lost = int((kept & ~followed).sum())
    kept = (kept & followed) | (nodes.kind == TOKEN)
    kept, edges = _edges(graph, kept, row_of, edge_share)
    chosen = np.flatnonzero(kept)
    order = np.lexsort([each[chosen] for each in (nodes.number, nodes.kind, nodes.position, nodes.layer)])
    chosen = chosen[order]
    place = np.full(len(nodes), -1)
    place[chosen] = np.arange(len(chosen))
    row, source = np.nonzero(edges)
    influential = np.where(nodes.kind == LOGIT, total, total / max(sources.sum(), 1e-30))
    return Circuit(
        nodes=nodes.only(chosen),
        share=influential[chosen],
        cumulative=cumulative[chosen],
        source=place[source],
        target=place[graph.targets[row]],
        effect=graph.effects[row, source],
        weight=rows[row, source],
        ends=_ends(graph, rows, total, row_of),
        lost=lost,
    )


def _edges(
    graph: Graph, kept: np.ndarray, row_of: np.ndarray, edge_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes [N] and edges [R, S] that are left, as masks."""
    nodes, n_sources = graph.nodes, graph.n_sources
    sources = np.flatnonzero(kept[:n_sources])
    rows = shares(np.where(kept[graph.targets][:, None], graph.effects[:, sources], 0))
    scores = influence(graph, rows, sources)[graph.targets][:, None] * rows
    row, source = np.nonzero(scores)
    sizes, source = scores[row, source], sources[source]
    order = np.argsort(-sizes, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = order[before < edge_share * sizes.sum()]
    edges = np.zeros(graph.effects.shape, bool)
    edges[row[chosen], source[chosen]] = True
    always = nodes.kind >= TOKEN
    while True:
        leads = always.copy()
        leads[:n_sources] |= edges.any(0)
        fed = (nodes.kind != LATENT) | (row_of >= 0)
        fed[graph.targets] &= always[graph.targets] | edges.any(1)
        left = kept & leads & fed
        edges &= left[graph.targets][:, None] & left[:n_sources]
        if (left == kept).all():
            return kept, edges
        kept = left


def _ends(graph: Graph, rows: np.ndarray, total: np.ndarray, row_of: np.ndarray) -> Ends:
    nodes = graph.nodes
    own = {
        "tokens": nodes.kind == TOKEN,
        "errors": nodes.kind == ERROR,
        "not_followed": (nodes.kind == LATENT) & (row_of < 0),
    }
    ends = {name: float(total[mask].sum()) for name, mask in own.items()}
    whole = max(sum(ends.values()), 1e-30)
    return Ends(**{name: value / whole for name, value in ends.items()})


def paths(circuit: Circuit, logit: int, n: int) -> list[Route]:
    """The n strongest paths from embeddings to the node `logit`, by the product of the weights of their edges."""
    signed = circuit.weight * np.sign(circuit.effect)
    into: dict[int, list[tuple[int, float]]] = {}
    for source, target, weight in zip(
        circuit.source.tolist(), circuit.target.tolist(), signed.tolist(), strict=True
    ):
        into.setdefault(target, []).append((source, weight))
    best: dict[int, list[Route]] = {logit: [Route((logit,), 1.0)]}
    # Nodes are by layer: when a node's turn comes, all that it leads to have handed on theirs.
    for node in range(logit, -1, -1):
        if node in best:
            for source, weight in into.get(node, ()):
                new = [Route((source, *path.nodes), path.weight * weight) for path in best[node]]
                every = best.get(source, []) + new
                best[source] = sorted(every, key=lambda path: -abs(path.weight))[:n]
    found = [
        path for node in np.flatnonzero(circuit.nodes.kind == TOKEN).tolist() for path in best.get(node, ())
    ]
    return sorted(found, key=lambda path: -abs(path.weight))[:n]
