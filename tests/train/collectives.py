"""python -m tests.train.collectives OUT <train's options>: train, and note what each step asks of torch.distributed.

The first process writes OUT: for every step, (operator, type, bytes) of each collective.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from common.cli import run_stage
from common.processes import rank
from train.__main__ import main
from train.loop import Run


def noting(out: Path) -> None:
    """Train as `python -m train` does."""
    steps: list[list[tuple[str, str, int]]] = []
    now: list[tuple[str, str, int]] = []
    feed = Run.feed

    def note(name: str) -> None:
        original = getattr(dist, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            tensor = next(each for each in reversed(args) if isinstance(each, Tensor))
            now.append((name, str(tensor.dtype), tensor.numel() * tensor.element_size()))
            return original(*args, **kwargs)

        setattr(dist, name, noted)

    def fed(self: Run, *args: Any) -> None:
        now.clear()
        feed(self, *args)
        steps.append(list(now))

    for name in ("all_reduce", "all_gather", "barrier"):
        note(name)
    setattr(Run, "feed", fed)  # noqa: B010 - it takes any arguments
    main()
    if rank() == 0:
        out.write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    own = Path(sys.argv.pop(1))
    run_stage(lambda: noting(own))
