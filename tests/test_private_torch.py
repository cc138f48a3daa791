"""What we use of PyTorch that is private: the form it has today, and what to do when a new version changes it."""

import ast
import re
from pathlib import Path

import pytest
import torch

from common.settings import ROOT
from evaluate.metrics.splice import skipped

PACKAGES = ("common", "harvest", "shards", "transcoder", "train", "evaluate")
INSTEAD = {
    "torch._fused_adamw_": (
        "train/step/optimizer.py, Adam._step: torch.optim.AdamW(fused=True) calls the same function on whole tensors. "
        "Look at torch/optim/adamw.py, _fused_adamw, for its new arguments; if it is gone, write the update out with "
        "lerp_, addcmul_ and addcdiv_: tests/train/step/test_optimizer.py compares either with torch.optim.AdamW"
    ),
    "torch.ops.aten._embedding_bag_per_sample_weights_backward": (
        "train/step/sparse.py, _products: it is the gradient of embedding_bag by per_sample_weights. Look at "
        "derivatives.yaml, _embedding_bag, for its new arguments; if it is gone, use torch.sparse.sampled_addmm (1.4 "
        "times as slow) or, in blocks, (left[rows] * right[columns]).sum(1): tests/train/step/test_steps.py compares "
        "either with autograd"
    ),
    'vars(block)["forward"]': (
        "evaluate/metrics/splice.py, skipped: a module calls the `forward` in its own dict before its class's, which "
        "nn.Module does not promise. If it no longer does, leave skipped out: start_at_layer alone gives the same "
        "numbers, at layer 12 of 30 in 1.5 times the time"
    ),
}
"""By name: where it is used, and what to do."""


def private_names(source: str) -> set[str]:
    """Dotted names below torch with a part that begins with one underscore, or that are operators by name."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    private = {name for name in names if re.match(r"torch\.(ops\.|.*\b_[a-z])", name)}
    private = {name for name in private if not any(other.startswith(f"{name}.") for other in private)}
    return private | set(re.findall(r'vars\(\w+\)\["\w+"\]', source))


def test_every_private_use_is_guarded_here() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    uses = {name for file in files for name in private_names(Path(file).read_text())}
    assert uses == set(INSTEAD), "add what to do when it changes, and a test of its form"


def test_fused_adamw() -> None:
    """One step of size lr from zero moments: m / (1 - b1) = g and v / (1 - b2) = g^2, so the step is lr * sign(g)."""
    hint = INSTEAD["torch._fused_adamw_"]
    assert hasattr(torch, "_fused_adam_"), hint
    parameter, gradient = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, -0.1])
    mean, square, steps = torch.zeros(3), torch.zeros(3), torch.ones(())
    try:
        torch._fused_adamw_(  # type: ignore[attr-defined]
            [parameter[1:]], [gradient], [mean[1:]], [square[1:]], [], [steps], lr=0.5, beta1=0.9, beta2=0.99,
            weight_decay=0.0, eps=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
    except (TypeError, RuntimeError) as error:
        pytest.fail(f"{error}\n{hint}")
    assert parameter.tolist() == pytest.approx([1.0, 1.5, 3.5]), hint
    assert mean.tolist() == pytest.approx([0.0, 0.5, -0.01]), hint
    assert square.tolist() == pytest.approx([0.0, 0.25, 0.0001]), hint
    assert steps.item() == 1, f"it counts the steps itself now; {hint}"


def test_sampled_products() -> None:
    hint = INSTEAD["torch.ops.aten._embedding_bag_per_sample_weights_backward"]
    operator = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    assert operator is not None, hint
    arguments = [argument.name for argument in operator.default._schema.arguments]
    form = ["grad", "weight", "indices", "offsets", "offset2bag", "mode", "padding_idx"]
    assert arguments == form, hint
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 3, generator=draw), torch.randn(5, 3, generator=draw)
    rows, columns = torch.tensor([0, 0, 2, 3]).int(), torch.tensor([4, 1, 0, 4]).int()
    offsets = torch.zeros(4, dtype=torch.int32)  # wrong on purpose: not read when rows are given
    products = operator(left, right, columns, offsets, rows, 0)
    torch.testing.assert_close(
        products, (left[rows] * right[columns]).sum(1), msg=lambda text: f"{text}\n{hint}"
    )


def test_a_modules_own_forward_comes_first() -> None:
    hint = INSTEAD['vars(block)["forward"]']
    block = torch.nn.Linear(2, 2)
    hidden = torch.ones(1, 2)
    with skipped([block]):
        assert block(hidden) is hidden, hint
    assert "forward" not in vars(block)
    assert torch.equal(block(hidden), hidden @ block.weight.T + block.bias)
