"""A language model on one text with all that is not linear held fixed: attention patterns and the norms' scales.

What an MLP writes is taken from outside. What is left, residual connections, values and outputs of attention, gains
and unembedding, is a linear map (plus a constant) from the embeddings and the MLPs' outputs to the MLPs' inputs and
to the logits before a soft cap. Where a transcoder has a skip connection, W_skip at the MLP's place belongs to the map.

Shapes: T positions, D model width, L layers, n targets, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.errors import InputError, first_line
from common.hooks import hooks_of
from harvest.lm import LanguageModel
from transcoder import Transcoder

EMBEDDING, FINAL = "blocks.0.hook_in", "unembed.hook_in"
HELD = ("hook_pattern", "hook_scale")
"""Last parts of the names of hook points whose tensors are held fixed."""
TOLERANCE = 1e-4
"""Relative to the largest: float32 rounds 100 times finer."""


class Reads(NamedTuple):
    """What is read of the residual stream: by the MLPs, and by the unembedding."""

    inputs: list[Tensor]
    """L of [T, D]: each MLP's input without the norm's gain."""
    final: Tensor
    """[T, D]: what the unembedding reads."""

    def at(self, layer: int) -> Tensor:
        """Layer L is the unembedding."""
        return self.final if layer == len(self.inputs) else self.inputs[layer]


class Frozen:
    """The linear map, and the values of the model as it is that it was made from.

    `coders`: of every layer from 0 on, each reading inputs without the norm's gain; of these only W_skip is used, at
    the positions `kept` [T]. Raises `InputError` where a part of the model cannot be held fixed, so that the map does
    not give the model's own values back.
    """

    def __init__(
        self, model: LanguageModel, coders: Sequence[Transcoder], context: Tensor, kept: Tensor
    ) -> None:
        self.model, self.context = model, context[None].to(model.device)
        self.skips = [coder.W_skip for coder in coders]
        self._kept = kept.to(model.device)[:, None]
        hooks = [hooks_of(layer, "normalized") for layer in range(model.n_layers)]
        self._reads = [*(name for name, _ in hooks), FINAL]
        self._writes = [name for _, name in hooks]
        held = [name for name in model.bridge.hook_dict if name.rpartition(".")[2] in HELD]
        names = [EMBEDDING, *self._reads, *self._writes, *held]
        with torch.no_grad(), model.capturing(names) as caught:
            logits = model.bridge(self.context, return_type="logits")
        self._held = {name: caught[name] for name in held if name in caught}
        if absent := [name for name in names if name not in caught and name not in held]:
            raise InputError(f"{model.name}: hook point {absent[0]} was not reached; {self._cannot}")
        self.reads = Reads([caught[name][0] for name in self._reads[:-1]], caught[FINAL][0])
        self.embedding = caught[EMBEDDING][0]
        self.outputs = [caught[name][0] for name in self._writes]
        self.logits = logits[0, -1].float()
        """[V], of the last position, after a soft cap."""
        model.bridge.requires_grad_(False)
        self._check()
        self._leaves = [each.clone().requires_grad_() for each in (self.embedding, *self.written)]
        self.linear = self.run(self._leaves[0], self._leaves[1:])

    @property
    def _cannot(self) -> str:
        return "circuits of this family cannot be traced"

    def _check(self) -> None:
        """The map must give the model's own values back.

        Without skip connections, which are the transcoders' and not the family's: W_skip acts on inputs that the
        norms' scales have multiplied, so it can pass the rounding of one layer on to the next many times enlarged.
        """
        try:
            with torch.no_grad():
                reads = self.run(self.embedding, self.outputs, skips=False)
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
            raise InputError(  # OLMo: its norm has no gain, which TransformerLens expects where a hook sets the scale
                f"{self.model.name}: TransformerLens cannot hold its norms and attention patterns fixed: "
                f"{first_line(error)}; {self._cannot}"
            ) from error
        for layer in range(self.model.n_layers + 1):
            found, expected = reads.at(layer), self.reads.at(layer)
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE:  # NaN too
                where = "the unembedding" if layer == self.model.n_layers else f"the MLP of layer {layer}"
                raise InputError(
                    f"{self.model.name}: with attention patterns and norms held fixed, {where} reads other values "
                    f"than in the model as it is (deviation {error:.2g}, expected at most {TOLERANCE:g}); "
                    f"{self._cannot}"
                )

    @property
    def written(self) -> list[Tensor]:
        """L of [T, D]: what each MLP writes besides what a skip connection passes on."""
        return [
            output - self._skipped(layer, self.reads.inputs[layer])
            for layer, output in enumerate(self.outputs)
        ]

    def _skipped(self, layer: int, inputs: Tensor) -> Tensor:
        """[T, D] that the skip connection of a layer makes of its inputs."""
        matrix = self.skips[layer]
        if matrix is None:
            return torch.zeros_like(inputs)
        return torch.where(self._kept, linear(inputs, matrix.to(inputs)), 0)

    def run(self, embedding: Tensor, written: Sequence[Tensor], skips: bool = True) -> Reads:
        """What is read when these [T, D] are the embeddings and what each MLP writes: see `written`.

        Without `skips`, `written` is all that an MLP writes.
        """
        read: dict[str, Tensor] = {}

        def fixed(value: Tensor) -> Callable[..., Tensor]:
            return lambda tensor, hook: value

        def keep(name: str) -> Callable[..., None]:
            return lambda tensor, hook: read.__setitem__(name, tensor[0])

        def write(layer: int) -> Callable[..., Tensor]:
            def written_at(tensor: Tensor, hook: Any) -> Tensor:
                passed = self._skipped(layer, read[self._reads[layer]]) if skips else 0
                return (written[layer] + passed)[None].clone()

            return written_at

        hooks: list[tuple[str, Callable[..., Any]]] = [
            (EMBEDDING, fixed(embedding[None].clone())),
            *((name, fixed(value)) for name, value in self._held.items()),
            *((name, keep(name)) for name in self._reads),
            *((name, write(layer)) for layer, name in enumerate(self._writes)),
        ]
        with warnings.catch_warnings(), self.model.bridge.hooks(fwd_hooks=hooks):
            warnings.simplefilter(
                "ignore"
            )  # one of each norm that a hook changed its scale, which is what it is for
            self.model.bridge(self.context, return_type="logits")
        return Reads([read[name] for name in self._reads[:-1]], read[FINAL])

    def pulled(self, layer: int, positions: Tensor, directions: Tensor) -> list[Tensor]:
        """What each source's vector is multiplied by, for n targets that read `directions` [n, D] at `positions` [n].

        [n, T, D] of the embeddings, then of what each MLP below `layer` writes.
        """
        reads = self.linear.at(layer)
        wanted = torch.zeros(len(positions), *reads.shape, device=reads.device)
        wanted[torch.arange(len(positions), device=reads.device), positions] = directions.to(reads)
        found = torch.autograd.grad(
            reads,
            self._leaves[: layer + 1],
            wanted,
            retain_graph=True,
            is_grads_batched=True,
        )
        return list(found)

    def unembedding(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Directions [n, D] and biases [n] of the logits of `tokens` [n] less the mean over the vocabulary.

        Raises `InputError` where the model's logits are not those of its unembedding, but for a soft cap.
        """
        own = self.model.unembedding(tokens, self.reads.final[-1], self.logits)
        if not own.error <= TOLERANCE:
            raise InputError(
                f"{self.model.name}: its logits are not its unembedding times its final norm's output (deviation "
                f"{own.error:.2g}, expected at most {TOLERANCE:g}); {self._cannot}"
            )
        return own.directions, own.biases
