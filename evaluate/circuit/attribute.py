"""The direct effects on the logits of a text's last position, and on the latents that these hang on most.

The effect of a source s on a target t is a_s * W_dec_s . J . W_enc_t, with J the frozen map (frozen.py) from where s
is written to where t reads: a backward pass of t gives J . W_enc_t at every source at once. Dunefsky et al. 2024
(arXiv:2406.11944) for transcoders; Ameisen et al. 2025 (Circuit Tracing) for errors, norms and whole graphs.

Shapes: T positions, D model width, L layers, S sources, n targets, E active latents of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from evaluate.circuit.frozen import TOLERANCE, Frozen
from evaluate.circuit.graph import ERROR, LATENT, LOGIT, TOKEN, Graph, Nodes, influence, shares
from harvest.lm import LanguageModel
from transcoder import Transcoder

MASS, MOST_LOGITS = 0.95, 10
"""Probability that the target tokens have together, and how many there are at most."""
ROUND = 256
"""Latents followed between two looks at which have most influence."""
PULLED = 1 << 26
"""Numbers at once of what a backward pass gives, n * L * T * D: 0.25 GB."""
EFFECTS = 1 << 30
"""Effects of a graph at most, targets times sources: 4 GB."""


@dataclass(frozen=True)
class Text:
    """A context as the layer set's stores have it."""

    tokens: Tensor
    """[T] token ids."""
    kept: Tensor
    """[T]: positions with a row, where a transcoder stands in for the MLP; elsewhere the MLP's output is its own."""
    begins: bool
    """Whether the first token begins every text: what the MLPs write there is the same for all, and no node."""


class _Active(NamedTuple):
    """Active latents of a layer, by position and number."""

    positions: Tensor
    """[E]"""
    numbers: Tensor
    values: Tensor


class Rows(NamedTuple):
    """What reaches n targets."""

    effects: np.ndarray
    """[n, S] float32"""
    constants: np.ndarray
    """[n] what the biases add."""
    values: np.ndarray
    """[n] pre-activations in the model as it is: effects and constant summed."""


class Effects:
    """A text's nodes, sources first, and the effects of all sources on any target.

    `coders`: of every layer from 0 on, each reading inputs without the norm's gain.
    """

    def __init__(self, model: LanguageModel, coders: Sequence[Transcoder], text: Text) -> None:
        self.model = model
        self.coders = [coder.to(model.device) for coder in coders]
        self.frozen = Frozen(model, self.coders, text.tokens, text.kept)
        kept = text.kept.to(model.device)[:, None]
        first = torch.zeros_like(kept)
        first[0] = text.begins
        self.active: list[_Active] = []
        self.errors: list[Tensor] = []
        """L of [T, D]: what the latents, the bias and the skip connection leave of an MLP's output."""
        self.base: list[Tensor] = []
        """L of [T, D]: what is written whatever the text says."""
        for layer, (coder, written) in enumerate(zip(self.coders, self.frozen.written, strict=True)):
            acts = coder.encode(self.frozen.reads.inputs[layer]) * kept
            positions, numbers = acts.nonzero(as_tuple=True)
            self.active.append(_Active(positions, numbers, acts[positions, numbers]))
            self.base.append(torch.where(kept, coder.b_dec, 0) + torch.where(first, written, 0))
            self.errors.append(written - self.base[-1] - acts @ coder.W_dec)
        with torch.no_grad():
            self._constant = self.frozen.run(torch.zeros_like(self.frozen.embedding), self.base)
        self._logits, probabilities = _likely(self.frozen.logits)
        self._directions, self._biases = self.frozen.unembedding(self._logits)
        self.nodes = self._nodes(text.tokens, probabilities)

    @property
    def n_sources(self) -> int:
        return len(self.nodes) - len(self._logits)

    def _nodes(self, tokens: Tensor, probabilities: Tensor) -> Nodes:
        """Latents by layer, position and number; errors by layer and position; embeddings; logits, likeliest first."""
        n_layers, length, n_logits = len(self.coders), len(tokens), len(self._logits)
        counts = [len(each.numbers) for each in self.active]
        places = np.arange(length)
        last = np.full(n_logits, length - 1)

        def of_latents(part: Callable[[_Active], Tensor]) -> np.ndarray:
            return torch.cat([part(each) for each in self.active]).cpu().numpy()

        layers = [np.repeat(np.arange(n_layers), counts), np.repeat(np.arange(n_layers), length)]
        layers += [np.full(length, -1), np.full(n_logits, n_layers)]
        positions = [of_latents(lambda each: each.positions), np.tile(places, n_layers), places, last]
        numbers = [of_latents(lambda each: each.numbers), np.full(n_layers * length, -1)]
        numbers += [tokens.cpu().numpy(), self._logits.cpu().numpy()]
        values = [of_latents(lambda each: each.values), np.zeros((n_layers + 1) * length)]
        values += [probabilities.cpu().numpy()]
        sizes = [sum(counts), n_layers * length, length, n_logits]
        return Nodes(
            kind=np.repeat([LATENT, ERROR, TOKEN, LOGIT], sizes).astype(np.uint8),
            layer=np.concatenate(layers).astype(np.int32),
            position=np.concatenate(positions).astype(np.int32),
            number=np.concatenate(numbers).astype(np.int64),
            value=np.concatenate(values).astype(np.float32),
        )

    def of(self, targets: np.ndarray, tick: Callable[[int], object] = lambda done: None) -> Rows:
        """All sources' effects on these nodes, which are latents or logits; `tick` is told of those done.

        Raises `InputError` where the effects on one do not sum to what the model has there.
        """
        rows = Rows(
            np.zeros((len(targets), self.n_sources), np.float32),
            np.zeros(len(targets), np.float32),
            np.zeros(len(targets), np.float32),
        )
        layers = self.nodes.layer[targets]
        for layer in np.unique(layers).tolist():
            own = np.flatnonzero(layers == layer)
            size = max(1, PULLED // ((layer + 1) * self.frozen.embedding.numel()))
            for part in (own[start : start + size] for start in range(0, len(own), size)):
                for whole, some in zip(rows, self._of_layer(layer, targets[part]), strict=True):
                    whole[part] = some
                self._check(layer, *(whole[part] for whole in rows))
                tick(len(part))
        return rows

    def _of_layer(self, layer: int, targets: np.ndarray) -> Rows:
        """Effects on targets of one layer."""
        device = self.model.device
        positions = torch.from_numpy(self.nodes.position[targets]).to(device).long()
        if layer == len(self.coders):
            which = torch.from_numpy(targets - self.n_sources).to(device)
            directions, biases = self._directions[which], self._biases[which]
        else:
            which = torch.from_numpy(self.nodes.number[targets]).to(device)
            directions, biases = self.coders[layer].W_enc[which], self.coders[layer].b_enc[which]
        embedding, *pulled = self.frozen.pulled(layer, positions, directions)
        length, at = self.frozen.embedding.shape[0], 0
        effects = torch.zeros(len(targets), self.n_sources, device=device)
        errors = self.n_sources - (len(self.coders) + 1) * length
        for below, (active, gradient) in enumerate(zip(self.active, pulled, strict=False)):
            effects[:, at : at + len(active.numbers)] = self._of_latents(below, active, gradient)
            at += len(active.numbers)
            place = errors + below * length
            effects[:, place : place + length] = (gradient * self.errors[below]).sum(-1)
        effects[:, -length:] = (embedding * self.frozen.embedding).sum(-1)

        def read(reads: Tensor) -> np.ndarray:
            return (torch.linalg.vecdot(reads[positions], directions) + biases).cpu().numpy()

        constants, values = (read(each.at(layer)) for each in (self._constant, self.frozen.reads))
        return Rows(effects.cpu().numpy(), constants, values)

    def _of_latents(self, layer: int, active: _Active, gradient: Tensor) -> Tensor:
        """[n, E] effects of a layer's latents, from what comes back [n, T, D] to where they write."""
        effects = torch.empty(len(gradient), len(active.numbers), device=gradient.device)
        bounds = torch.bincount(active.positions, minlength=gradient.shape[1]).cumsum(0).tolist()
        for position, (start, stop) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True)):
            if start < stop:
                rows = self.coders[layer].W_dec[active.numbers[start:stop]]
                effects[:, start:stop] = (gradient[:, position] @ rows.T) * active.values[start:stop]
        return effects

    def _check(self, layer: int, effects: np.ndarray, constants: np.ndarray, values: np.ndarray) -> None:
        """What reaches a target must be what it has: all that is not linear is frozen, and nothing is left out."""
        found = effects.sum(1, dtype=np.float64) + constants
        size = np.maximum(np.abs(effects).max(1, initial=0), np.maximum(np.abs(constants), np.abs(values)))
        error = float((np.abs(found - values) / np.maximum(size, 1e-30)).max(initial=0))
        if not error <= TOLERANCE:
            what = "a logit" if layer == len(self.coders) else f"a latent of layer {layer}"
            raise InputError(
                f"{self.model.name}: the direct effects on {what} sum to another value than it has (deviation "
                f"{error:.2g}, expected at most {TOLERANCE:g}); circuits of this family cannot be traced"
            )


def _likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, up to MASS of the probability, and their probabilities."""
    probabilities, tokens = logits.softmax(-1).topk(min(MOST_LOGITS, len(logits)))
    n = int((probabilities.cumsum(0) < MASS).sum()) + 1
    return tokens[:n], probabilities[:n]


def attribute(effects: Effects, n_nodes: int, tick: Callable[[int], object] = lambda done: None) -> Graph:
    """The graph of the logits and of the `n_nodes` latents that have most influence on them, as found on the way.

    Raises `InputError` where it would not fit in memory.
    """
    nodes, n_sources = effects.nodes, effects.n_sources
    logits = np.arange(n_sources, len(nodes))
    n_rows = len(logits) + min(n_nodes, int((nodes.kind == LATENT).sum()))
    if n_rows * n_sources > EFFECTS:
        raise InputError(
            f"text: its {n_sources:,} active latents and errors on {n_rows:,} targets are more than {EFFECTS:,} "
            "effects (4 GB); give a shorter text, fewer --nodes, or a coarser PREFIX"
        )
    table, targets = np.zeros((n_rows, n_sources), np.float32), np.zeros(n_rows, np.int64)
    constants = np.zeros(n_rows, np.float32)
    done, chosen = 0, logits
    while len(chosen):
        found = effects.of(chosen, tick)
        part = slice(done, done + len(chosen))
        table[part], targets[part], constants[part] = found.effects, chosen, found.constants
        done = part.stop
        graph = Graph(nodes, targets[:done], table[:done], constants[:done])
        waiting = influence(graph, shares(graph.effects))
        waiting[nodes.kind != LATENT] = 0
        waiting[targets[:done]] = 0
        best = np.argsort(-waiting, kind="stable")[: min(ROUND, n_rows - done)]
        chosen = best[waiting[best] > 0]
    return Graph(nodes, targets[:done], table[:done], constants[:done])
