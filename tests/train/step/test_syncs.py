"""Every line of a training step on which the host waits for the device says so: `# sync`, on it or in the line above.

PyTorch queues work on a GPU and goes on. It waits where a result decides a shape or a branch. Such a line costs little
once, and much in a loop over blocks. A new one is either needed, and marked, or written without it.
"""

import ast
import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.settings import ROOT
from tests.pretend import WAITS
from tests.train.steps import problem
from train.state import State
from train.step import losses, optimizer
from train.step.matrix import MatrixStep
from train.step.sparse import SparseStep

SPELT = {"item", "tolist", "nonzero", "bincount"}
"""Methods and functions that always wait."""
STEP = sorted([*(ROOT / "train" / "step").glob("*.py"), ROOT / "transcoder" / "selection.py"])
PARTS = {
    ROOT / "train" / "loop.py": {"train_step", "restrain"},
    ROOT / "train" / "state.py": {"dead", "count", "note_failure"},
}
"""What runs in every step: whole files, and functions of others."""


def is_marked(file: str | Path, line: int) -> bool:
    above = linecache.getline(str(file), line - 1).strip()
    return "# sync" in linecache.getline(str(file), line) or above.startswith("# sync")


def unmarked(file: Path, tree: ast.AST) -> list[str]:
    """Calls that wait by their name alone and have no mark."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        copied = name == "tensor" and any(keyword.arg == "device" for keyword in node.keywords)
        if (name in SPELT or copied) and not is_marked(file, node.lineno):
            lines.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    return lines


@pytest.mark.parametrize("file", [*STEP, *PARTS], ids=lambda file: file.name)
def test_calls_that_wait_are_marked(file: Path) -> None:
    tree = ast.parse(file.read_text())
    if file in PARTS:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        parts = [node for node in functions if node.name in PARTS[file]]
        assert {node.name for node in parts} == PARTS[file]
        assert [line for part in parts for line in unmarked(file, part)] == []
    else:
        assert unmarked(file, tree) == []


def test_a_call_without_a_mark_is_seen() -> None:
    tree = ast.parse("a = b.item()\nc = torch.tensor(d, device=e)\nf = torch.tensor(1)\ng.sum()")
    assert [line.split(":")[1] for line in unmarked(Path("none.py"), tree)] == ["1", "2"]


class Recorder(TorchDispatchMode):
    """Notes the project's line that caused each waiting operator."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[tuple[str, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or masks:
            self.lines.add(self._place(sys._getframe()))
        return func(*args, **(kwargs or {}))

    def _place(self, frame: FrameType | None) -> tuple[str, int]:
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
                return str(path), frame.f_lineno
            frame = frame.f_back
        raise AssertionError("called from nowhere in the project")


@pytest.mark.parametrize("step", [SparseStep, MatrixStep])
@pytest.mark.parametrize("selection_rule", ["batch_topk", "topk"])
def test_operators_that_wait_are_called_from_marked_lines(
    selection_rule: str, step: type[SparseStep] | type[MatrixStep]
) -> None:
    case = problem(rows=40, n_dead=8, aux_k=2, skip=True, selection=selection_rule, dtype=torch.float32)
    running = State.start(case.parameters, case.objective.prefix_ends)
    with torch.no_grad(), Recorder() as recorder:
        values, computed = step(case.objective)(case.parameters, case.x, case.y, case.dead, case.objective.k)
        running.note_failure(values.loss)
        optimizer.apply(running.adam, computed.plus(losses.revival(case.dead, 11, 3)), 1e-3, clip_norm=0.1)
        running.count(values.cut, values.fired, case.objective.prefix_ends, 40, counting=0)
        running.dead(10)
    assert {Path(file).name for file, _ in recorder.lines} >= {
        *(["selection.py"] if step is SparseStep or selection_rule == "batch_topk" else []),
        "state.py",
    }
    assert [f"{file}:{line}" for file, line in recorder.lines if not is_marked(file, line)] == []
    assert len(values.entries.rows) > 0
