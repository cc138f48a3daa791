"""Where an MLP is read and written: names of hook points, and the two conventions of its input."""

import re
from typing import Literal

Convention = Literal["normalized", "mlp_in"]
"""Whether an MLP's input is without (normalized) or with (mlp_in) its norm's gain and bias."""
INPUT_HOOKS: dict[Convention, str] = {"normalized": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}
"""TransformerLens names of the MLP's input, within its block."""
BEFORE_NORM = "ln2.hook_in"
"""What the norm before the MLP reads: the residual stream, in the model's own precision."""
OUTPUT_HOOK = "hook_mlp_out"
"""The MLP's output as it is added to the residual stream: after Gemma-2's post-norm."""

OWN_OUTPUT = "mlp.hook_out"
"""What the MLP itself puts out, as other tools' transcoders may predict it: the same tensor, but where a norm follows,
before that norm. A store does not record whether one does; the model's name tells."""
NORM_FOLLOWS = re.compile(r"gemma(?![-_](?:1\.1[-_])?[27]b)|glm-?4", re.IGNORECASE)
"""Gemma from its second generation on (gemma-2b and gemma-7b are the first), GLM-4."""


def hooks_of(layer: int, kind: Convention) -> tuple[str, str]:
    """TransformerLens names of a layer's (input, output) tensors."""
    return f"blocks.{layer}.{INPUT_HOOKS[kind]}", f"blocks.{layer}.{OUTPUT_HOOK}"


def in_convention(hook: str, now: Convention, wanted: Convention) -> str:
    """The input hook of the same block in another convention.

    blocks.3.mlp.hook_in of blocks.3.ln2.hook_normalized.
    """
    return hook.removesuffix(INPUT_HOOKS[now]) + INPUT_HOOKS[wanted]


def layer_of(hook: str) -> int:
    """3 of blocks.3.ln2.hook_in."""
    return int(hook.split(".")[1])


def same_output(hook: str, other: str, model: str) -> bool:
    """Whether two output hooks of a model are one tensor.

    >>> own, added = "blocks.3.mlp.hook_out", "blocks.3.hook_mlp_out"
    >>> same_output(own, added, "Qwen/Qwen3-4B"), same_output(own, added, "google/gemma-3-4b-pt")
    (True, False)
    """
    if hook == other:
        return True
    (*block, name), (*there, added) = hook.split(".", 2), other.split(".", 2)
    return block == there and {name, added} == {OWN_OUTPUT, OUTPUT_HOOK} and not NORM_FOLLOWS.search(model)
