"""Cross-entropy of one run: loads the language model, splices every prefix, and says why when it cannot."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluate.sparse import Coder, base_output, decode, entries_above
from pipeline import InputError, Settings
from shards import Store
from shards.manifest import Source


def cross_entropy(
    settings: Settings, store: Store, split: Any, coder: Coder, n_tokens: int, prefixes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Losses of the model as it is and with both ablations; fills "cross_entropy" of every prefix.

    The first `n_tokens` tokens of the split's contexts are used (whole contexts, at least one).
    `skipped` says in words why nothing was measured, or is None.
    """
    if n_tokens == 0:
        return {"skipped": "it was not asked for"}
    try:
        model = _language_model(settings, store.manifest.source)
    except InputError as error:
        return {"skipped": str(error)}
    from evaluate.splice import splice, summary  # imports transformers, which takes seconds

    source = store.manifest.source
    moments = store.manifest.splits[settings.evaluate.split].outputs
    assert moments is not None, "a split with rows has moments"
    mean = torch.tensor(moments.mean, dtype=torch.float32, device=model.device)
    coder = coder.to(model.device)
    replacements = {
        "zero": lambda inputs: torch.zeros(len(inputs), len(mean), device=inputs.device),
        "mean": lambda inputs: mean.expand(len(inputs), -1),
        **{str(g): PrefixOf(coder, g) for g in range(len(prefixes))},
    }
    n_contexts = min(len(split.contexts), max(1, n_tokens // source.context_length))
    contexts = split.contexts[np.arange(n_contexts)]
    with tqdm(total=n_contexts, desc="cross-entropy", unit=" contexts", dynamic_ncols=True) as bar:
        losses = splice(model, source, contexts, replacements, bar.update)
    for g, prefix in enumerate(prefixes):
        prefix["cross_entropy"] = summary(losses, str(g))
    made: dict[str, Any] = {"skipped": None, "contexts": n_contexts, "positions": losses["clean"].positions}
    return made | {name: summary(losses, name)["cross_entropy"] for name in ("clean", "zero", "mean")}


class PrefixOf:
    """Prefix g of a coder as a function of raw inputs."""

    def __init__(self, coder: Coder, g: int) -> None:
        self.coder, self.g = coder, g

    def __call__(self, inputs: Tensor) -> Tensor:
        coder, end = self.coder, self.coder.prefix_ends[self.g]
        entries = entries_above(coder.pre_activations(inputs), coder.thresholds[self.g])
        return decode(entries.keep(entries.latents < end), coder.W_dec, base_output(coder, inputs))


def _language_model(settings: Settings, source: Source) -> Any:
    """The store's own language model; `InputError` when it cannot be had, or is another one."""
    from harvest import lm

    where = lm.locate(settings.model)
    model = lm.load(settings.model, where, lm.load_tokenizer(where, settings.model.revision))
    found = model.weights_sha256()
    if found != source.weights_sha256:
        raise InputError(
            f"model {settings.model.name}: expected weights {source.weights_sha256[:12]}... as harvested, "
            f"found {found[:12]}..."
        )
    return model
