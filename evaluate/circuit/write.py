"""A circuit's two files: graph.json in circuit-tracer's schema, and circuit.html, which opens from disk."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from common.files import locked, text_slug, whole_folder
from evaluate.circuit.attribute import MASS, MOST_LOGITS
from evaluate.circuit.graph import ERROR, KINDS, LATENT, LOGIT, TOKEN, Circuit, Route
from evaluate.circuit.labels import Label
from evaluate.report.page_data import script_json
from evaluate.report.templates import html

NODE_SHARE, EDGE_SHARE = 0.8, 0.98
"""Of the influence that is kept when a graph is pruned; circuit-tracer's own values."""


@dataclass(frozen=True)
class About:
    """What a circuit is of."""

    model: str
    run: str
    prefix: int
    n_layers: int
    prompt: str
    pieces: list[str]
    """The text's tokens."""
    n_nodes: int
    """Latents that may be followed."""
    weights: Mapping[int, str]
    """Digest of each layer's transcoder."""

    @property
    def slug(self) -> str:
        """Name of the folder: the text's first words, and a digest of what the circuit is of."""
        return text_slug(self.prompt, of=str(self.prefix))


def write(
    folder: Path,
    about: About,
    circuit: Circuit,
    labels: Sequence[Label],
    routes: Mapping[int, Sequence[Route]],
    evaluations: Mapping[int, Path],
) -> None:
    """Both files, and the list of graphs that circuit-tracer's server reads, in a folder that appears whole."""
    graph = graph_json(about, circuit, labels)
    listed = {"graphs": [graph["metadata"]]}
    reports = {
        layer: quote(os.path.relpath(place / "report.html", folder), safe="/")
        for layer, place in evaluations.items()
    }
    held = locked(folder.with_name(f".{folder.name}.lock"), f"{folder}: another make circuit is writing it")
    with held, whole_folder(folder) as aside:
        for name, values in (("graph.json", graph), ("graph-metadata.json", listed)):
            text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            (aside / name).write_text(text + "\n", encoding="utf-8")
        page = circuit_page(about, circuit, labels, routes, reports)
        (aside / "circuit.html").write_text(page, encoding="utf-8")


def graph_json(about: About, circuit: Circuit, labels: Sequence[Label]) -> dict[str, Any]:
    """The graph as circuit-tracer (frontend/graph_models.py) has it.

    `scan` begins with ./, or the tool's page would look for latents on the hub in a namespace of this name. An error
    node's id begins with `error_`: the tool's own 0_layer_position is also the id of a latent of layer 0.
    """
    ids = _ids(about, circuit)
    return {
        "metadata": {
            "slug": "graph",  # the tool's server takes it for the file's name
            "scan": f"./{about.model}/{about.run}",
            "transcoder_list": [],
            "prompt_tokens": about.pieces,
            "prompt": "".join(about.pieces),
            "node_threshold": NODE_SHARE,
            "schema_version": 1,
            "info": {
                "model": about.model,
                "run": about.run,
                "prefix": about.prefix,
                "weights_sha256": {str(layer): digest for layer, digest in about.weights.items()},
                "influence": circuit.ends._asdict(),
            },
            "generation_settings": {
                "max_n_logits": MOST_LOGITS,
                "desired_logit_prob": MASS,
                "max_feature_nodes": about.n_nodes,
            },
            "pruning_settings": {"node_threshold": NODE_SHARE, "edge_threshold": EDGE_SHARE},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(circuit, node, ids[node], labels[node], about) for node in range(len(ids))],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": float(f"{effect:.6g}")}
            for source, target, effect in zip(
                circuit.source.tolist(), circuit.target.tolist(), circuit.effect.tolist(), strict=True
            )
        ],
    }


def _ids(about: About, circuit: Circuit) -> list[str]:
    nodes = circuit.nodes
    layer, number, position = nodes.layer.tolist(), nodes.number.tolist(), nodes.position.tolist()
    form = {
        LATENT: "{0}_{1}_{2}",
        ERROR: "error_{0}_{2}",
        TOKEN: "E_{1}_{2}",
        LOGIT: f"{about.n_layers + 1}_{{1}}_{{2}}",
    }
    return [
        form[kind].format(*each)
        for kind, *each in zip(nodes.kind.tolist(), layer, number, position, strict=True)
    ]


def _node(circuit: Circuit, node: int, own_id: str, label: Label, about: About) -> dict[str, Any]:
    nodes = circuit.nodes
    kind, layer, position, number = (
        int(each[node]) for each in (nodes.kind, nodes.layer, nodes.position, nodes.number)
    )
    common = {"node_id": own_id, "ctx_idx": position, "clerp": label.text, "run_idx": 0, "reverse_ctx_idx": 0}
    influence = {"influence": float(circuit.cumulative[node])}
    if kind == LATENT:
        return (
            common
            | influence
            | {
                "feature": (layer + number) * (layer + number + 1) // 2 + number,  # Cantor's pairing
                "layer": str(layer),
                "feature_type": "cross layer transcoder",  # its word for a latent, of one layer too
                "jsNodeId": f"{layer}_{number}-0",
                "activation": float(nodes.value[node]),
            }
        )
    if kind == ERROR:
        return (
            common
            | influence
            | {
                "feature": -1,
                "layer": str(layer),
                "feature_type": "mlp reconstruction error",
                "jsNodeId": f"{layer}_{position}-0",
            }
        )
    if kind == TOKEN:
        return (
            common
            | influence
            | {
                "feature": position,
                "layer": "E",
                "feature_type": "embedding",
                "jsNodeId": f"E_{number}-{position}",
            }
        )
    probability = float(nodes.value[node])
    likeliest = probability == float(nodes.value[nodes.kind == LOGIT].max())
    return (
        common
        | {
            "clerp": f'Output "{label.word}" (p={probability:.3f})',  # its page takes token and probability from this
            "feature": number,
            "layer": str(about.n_layers + 1),
            "feature_type": "logit",
            "jsNodeId": f"L_{number}-{position}",
            "token_prob": probability,
            "is_target_logit": likeliest,
        }
    )


def circuit_page(
    about: About,
    circuit: Circuit,
    labels: Sequence[Label],
    routes: Mapping[int, Sequence[Route]],
    reports: Mapping[int, str],
) -> str:
    """The page; `reports`: relative address of each layer's report, `routes`: the strongest paths to each logit."""
    nodes = circuit.nodes
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.number, nodes.value, circuit.share)
    data = {
        "layers": about.n_layers,
        "tokens": about.pieces,
        "prefix": about.prefix,
        "reports": reports,
        "nodes": [
            [*values, *label]
            for *values, label in zip(*(each.tolist() for each in columns), labels, strict=True)
        ],
        "edges": [
            [source, target, float(f"{effect:.4g}"), float(f"{weight:.4g}")]
            for source, target, effect, weight in zip(
                *(part.tolist() for part in (circuit.source, circuit.target, circuit.effect, circuit.weight)),
                strict=True,
            )
        ],
    }
    return html(
        "circuit.html",
        "circuit.js",
        about=about,
        ends=circuit.ends,
        counts={name: int((nodes.kind == kind).sum()) for kind, name in enumerate(KINDS)},
        n_edges=len(circuit.source),
        routes=[
            (labels[logit].text, [_told(route, circuit, labels) for route in some])
            for logit, some in routes.items()
        ],
        node_share=NODE_SHARE,
        edge_share=EDGE_SHARE,
        lost=circuit.lost,
        data=Markup(script_json(data)),
    )


def _told(
    route: Route, circuit: Circuit, labels: Sequence[Label]
) -> tuple[float, list[tuple[int, str, str]]]:
    """Weight and, of each node, its index, its place and its label."""
    return route.weight, [(node, place(circuit, node), labels[node].text) for node in route.nodes]


def place(circuit: Circuit, node: int) -> str:
    """Layer and latent of a latent, the kind of another node.

    17/2041@5 is latent 2041 of layer 17 at the text's token 5.
    """
    nodes = circuit.nodes
    kind, layer, position, number = (
        int(each[node]) for each in (nodes.kind, nodes.layer, nodes.position, nodes.number)
    )
    if kind == LATENT:
        return f"{layer}/{number}@{position}"
    return f"{KINDS[kind]}@{position}" if kind != ERROR else f"{layer}/error@{position}"
