"""Which step and which precision a device gets, and what is said of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import InputError
from common.settings import Settings
from shards import Store
from tests.train.steps import problem
from train.loop import step_for, train
from train.recipe import precision_on
from train.step.dense import DenseStep
from train.step.losses import Objective
from train.step.matrix import MatrixStep
from train.step.sparse import SparseStep

Make = Callable[..., Settings]


def test_the_step_and_its_precision_follow_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sparse = Objective((64, 512), (0.5, 0.5), 8, "batch_topk", 0, 0.0)
    dense = replace(sparse, k=100)
    assert type(step_for(sparse, cpu)) is SparseStep
    assert type(step_for(dense, cpu)) is DenseStep
    assert type(step_for(sparse, gpu)) is SparseStep  # float32: the gathers are faster than float32 products
    for precision in ("tfloat32", "bfloat16"):
        assert type(step_for(replace(sparse, precision=precision), gpu)) is MatrixStep
    assert precision_on(cpu, "auto") == "float32"


def test_tf32_is_refused_where_there_is_none_and_a_change_of_precision_is_said(
    make_settings: Make, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"train\.precision: tfloat32 needs a GPU"):
        train(make_settings(train__precision="tfloat32"), store)
    settings = make_settings()
    train(settings, store)
    file = settings.run_dir() / "settings.json"
    file.write_text(file.read_text().replace('"precision": "float32"', '"precision": "tfloat32"'))
    assert "begun with" not in capsys.readouterr().err
    train(settings.model_copy(update={"train": settings.train.model_copy(update={"rows": 64 * 100})}), store)
    assert "begun with products in tfloat32, goes on in float32" in capsys.readouterr().err


class Products(TorchDispatchMode):
    """Notes for every product of matrices whether a GPU may take TF32 for it."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.tf32.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("step", "precision"),
    [(SparseStep, "float32"), (MatrixStep, "float32"), (MatrixStep, "tfloat32"), (MatrixStep, "bfloat16")],
)
def test_every_product_is_in_the_precision_that_was_asked_for(step: Any, precision: str) -> None:
    """float32 means float32: also with dead latents and a skip connection, and after a step in TF32."""
    case = problem(rows=40, n_dead=8, aux_k=2, skip=True, dtype=torch.float32)
    with torch.no_grad(), Products() as products:
        computed = step(replace(case.objective, precision=precision))
        _, gradients = computed(case.parameters, case.x, case.y, case.dead, case.objective.k)
        gradients.whole()
    assert len(products.tf32) >= 7
    assert set(products.tf32) == {precision != "float32"}
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "float32"), ((8, 0), "tfloat32"), ((9, 0), "tfloat32")]
)
def test_auto_precision_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_on(torch.device("cuda:1"), "auto") == expected
