"""What the language model loses when all MLPs of a layer set are replaced at once, and how that adds up by layer.

Each replaced MLP reads what the changed pass gives it, not what the clean one did: an error of layer 0 reaches layer 1.
Positions without a row in the store keep the MLP's own output in that pass, as in evaluate/metrics/splice.py.
With error terms, a replaced MLP writes R(x) + (y - R(x0)): R is the transcoder, x its input in the changed pass, x0
and y the MLP's input and output in the clean one. It is added up as y + (R(x) - R(x0)), so that without an
intervention it is y to the last bit, and the model's own logits come out.
Shapes: b contexts, T positions, D model width, V vocabulary, n rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evaluate.kept.losses import agree
from evaluate.metrics.splice import Clean, Loss, Replacement, batches, continued
from evaluate.model.layer_set import LayerSet
from harvest.lm import LanguageModel
from shards.layout import kept_mask
from shards.manifest import Source
from transcoder import Transcoder

CLEAN, ZERO, MEAN = "clean", "zero", "mean"


@dataclass
class Measured:
    """Sums over the positions of all contexts, and of the first ones on which the slow parts are measured."""

    whole: dict[str, Loss] = field(default_factory=dict)
    """clean, zero and mean, and each prefix by its number: all MLPs of the set replaced."""
    part_clean: Loss = field(default_factory=Loss)
    """The model as it is, on the first contexts."""
    cumulative: dict[tuple[int, int], Loss] = field(default_factory=dict)
    """(prefix, layer): the set's layers up to this one replaced, on the first contexts."""
    with_errors: dict[int, Loss] = field(default_factory=dict)
    """By prefix: all replaced, with error terms, on the first contexts."""
    largest_difference: dict[int, float] = field(default_factory=dict)
    """By prefix: of a logit of theirs to the clean one's."""


@torch.inference_mode()
def measure(
    model: LanguageModel,
    layer_set: LayerSet,
    means: Mapping[int, Tensor],
    contexts: np.ndarray,
    n_part: int,
    tick: Callable[[int], object],
    kept: Mapping[str, Loss] | None = None,
) -> Measured:
    """All figures of `contexts` [n, T] token ids; cumulative and with error terms on the first `n_part` of them.

    `means`: the mean output [D] of each layer. `tick` is called with the tokens of each pass, of one that starts
    further up with the share of them that it costs; they add up to `passes`. `kept`: the model's own losses on these
    contexts, measured before; they are measured again if the first batch's are others.
    """
    names = [CLEAN, ZERO, MEAN, *map(str, range(layer_set.n_prefixes))]
    found = Measured({name: Loss() for name in names})
    for number, block in _parts(model, contexts, n_part):
        step = _Step(model, layer_set, block, found, tick)
        if number == 0 and kept and not agree(kept[CLEAN], found.whole[CLEAN]):
            kept = None
        if not kept:
            step.ablations(means)
        for g in range(layer_set.n_prefixes):
            step.prefix(g, whole=number < n_part)
    if kept:
        found.whole |= {name: kept[name] for name in (ZERO, MEAN)}
    return found


def passes(
    model: LanguageModel, layer_set: LayerSet, n: int, n_part: int, length: int, kept: bool = False
) -> int:
    """Tokens that `measure` runs through the model, counting a pass that starts further up by its share."""
    above = sum(_share(model, layer + 1) for layer in layer_set.layers[:-1])
    whole, part = 1 + 2 * (not kept) + layer_set.n_prefixes, layer_set.n_prefixes * (1 + above)
    return round(length * (n * whole + n_part * part))


def _parts(model: LanguageModel, contexts: np.ndarray, n_part: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of its first context, batch); no batch holds contexts of both kinds."""
    for first, some in ((0, contexts[:n_part]), (n_part, contexts[n_part:])):
        start = first
        for block in batches(model, some):
            yield start, block
            start += len(block)


def _share(model: LanguageModel, start: int) -> float:
    """What a pass from block `start` on costs of a whole one: parameters that it multiplies by."""
    config = model.bridge.cfg
    head = config.d_vocab * config.d_model
    blocks = max(0, sum(each.numel() for each in model.bridge.original_model.parameters()) - head)
    return (head + blocks * (1 - start / model.n_layers)) / (head + blocks)


class Mlps:
    """The MLPs of some layers on one batch of contexts, and what a forward pass is with others in their places."""

    def __init__(self, model: LanguageModel, sources: Mapping[int, Source], block: np.ndarray) -> None:
        self.model, self.sources = model, sources
        self.tokens = torch.from_numpy(block.astype(np.int64)).to(model.device)
        dropped = {layer: frozenset(source.dropped_token_ids) for layer, source in sources.items()}
        masks = {ids: torch.from_numpy(kept_mask(block, ids)).to(model.device) for ids in {*dropped.values()}}
        self.kept = {layer: masks[ids] for layer, ids in dropped.items()}
        """By layer, [b, T]: positions where the MLP is replaced."""

    def clean(self) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Logits [b, T, V] of the model as it is, and each MLP's inputs and outputs [n, D] at the kept positions."""
        ends = {layer: (each.input_hook, each.output_hook) for layer, each in self.sources.items()}
        with self.model.capturing([name for both in ends.values() for name in both]) as caught:
            logits = self.model.bridge(self.tokens, return_type="logits")
        kept = self.kept
        rows = {layer: (caught[i][kept[layer]], caught[o][kept[layer]]) for layer, (i, o) in ends.items()}
        return logits, rows

    def replaced(
        self, functions: Mapping[int, Replacement], catch: Mapping[str, list[Tensor]] | None = None
    ) -> Tensor:
        """Logits [b, T, V] with each layer's function in its MLP's place; tensors at the hooks `catch` are appended."""
        hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
        for layer, function in functions.items():
            source = self.sources[layer]
            swap = _Swap(function, self.kept[layer])
            hooks += [(source.input_hook, swap.read), (source.output_hook, swap.write)]
        hooks += [(name, _appending(place)) for name, place in (catch or {}).items()]
        with self.model.bridge.hooks(fwd_hooks=hooks):
            return self.model.bridge(self.tokens, return_type="logits")


class _Swap:
    """The two hooks of one replaced MLP."""

    def __init__(self, function: Replacement, kept: Tensor) -> None:
        self.function, self.kept = function, kept
        self.rows: Tensor | None = None

    def read(self, tensor: Tensor, hook: object) -> None:
        self.rows = tensor[self.kept].float()

    def write(self, output: Tensor, hook: object) -> Tensor:
        assert self.rows is not None, "an MLP's input comes before its output"
        changed = output.clone()
        changed[self.kept] = self.function(self.rows).to(output.dtype)
        self.rows = None
        return changed


def _appending(place: list[Tensor]) -> Callable[..., None]:
    return lambda tensor, hook: place.append(tensor)


class _Step:
    """One batch: the clean pass, and every other one beside it."""

    def __init__(
        self,
        model: LanguageModel,
        layer_set: LayerSet,
        block: np.ndarray,
        found: Measured,
        tick: Callable[[int], object],
    ) -> None:
        self.model, self.set, self.found, self.tick = model, layer_set, found, tick
        sources = {layer: store.manifest.source for layer, store in layer_set.stores.items()}
        self.mlps = Mlps(model, sources, block)
        self.logits, self.rows = self.mlps.clean()
        self.clean = Clean(self.logits)
        self._add(found.whole[CLEAN], self.logits)

    def _add(self, loss: Loss, logits: Tensor, share: float = 1.0) -> None:
        loss.add(self.clean, logits, self.mlps.tokens)
        self.tick(round(share * self.mlps.tokens.numel()))

    def ablations(self, means: Mapping[int, Tensor]) -> None:
        """All MLPs of the set zeroed, and each at its mean."""
        constants = {ZERO: {layer: torch.zeros_like(mean) for layer, mean in means.items()}, MEAN: means}
        for name, values in constants.items():
            functions = {layer: _constant(value) for layer, value in values.items()}
            self._add(self.found.whole[name], self.mlps.replaced(functions))

    def prefix(self, g: int, whole: bool) -> None:
        """All MLPs replaced by prefix `g`; `whole`: cumulatively and with error terms too."""
        coders = {layer: coder.prefix(g) for layer, coder in self.set.coders.items()}
        above = {layer: f"blocks.{layer + 1}.hook_in" for layer in self.set.layers[:-1] if whole}
        residuals: dict[str, list[Tensor]] = {name: [] for name in above.values()}
        logits = self.mlps.replaced(coders, residuals)
        self._add(self.found.whole[str(g)], logits)
        if not whole:
            return
        self.found.cumulative.setdefault((g, self.set.layers[-1]), Loss()).add(
            self.clean, logits, self.mlps.tokens
        )
        if g == 0:
            self.found.part_clean.add(self.clean, self.logits, self.mlps.tokens)
        for layer, name in above.items():
            loss = self.found.cumulative.setdefault((g, layer), Loss())
            share = _share(self.model, layer + 1)
            self._add(loss, continued(self.model, residuals[name][0], layer + 1), share)
        self._with_errors(g, coders)

    def _with_errors(self, g: int, coders: Mapping[int, Transcoder]) -> None:
        functions = {layer: with_error(coder, *self.rows[layer]) for layer, coder in coders.items()}
        logits = self.mlps.replaced(functions)
        self._add(self.found.with_errors.setdefault(g, Loss()), logits)
        difference = float((logits - self.logits).abs().max())
        worst = self.found.largest_difference
        worst[g] = max(worst.get(g, 0.0), difference)


def _constant(value: Tensor) -> Replacement:
    return lambda inputs: value.expand(len(inputs), -1)


def with_error(coder: Replacement, inputs: Tensor, outputs: Tensor) -> Replacement:
    """The transcoder's reconstruction plus its error on the clean pass's `inputs` and `outputs` [n, D]."""
    clean = coder(inputs.float())
    return lambda changed: outputs.float() + (coder(changed) - clean)
