"""Windows of 512 rows (32 chunks of 16), so that small harvests have several; run as a module it is harvest."""

import sys
from collections.abc import Callable
from types import ModuleType


def shrink(change: Callable[[ModuleType, str, int], object]) -> None:
    """Have `change` set the sizes wherever they are read."""
    import harvest.run as run
    import shards.layout

    for module in (
        shards.layout,
        sys.modules["shards.writer"],
        sys.modules["shards.loader"],
        sys.modules["shards.store"],
        sys.modules["shards.device.column"],
    ):
        if hasattr(module, "CHUNK_ROWS"):
            change(module, "CHUNK_ROWS", 16)
    change(shards.layout, "SHARD_ROWS", 512)
    change(run, "CHUNK_ROWS", 16)
    change(run, "SHARD_ROWS", 512)


if __name__ == "__main__":
    from common.cli import run_stage
    from harvest.__main__ import main

    shrink(setattr)
    run_stage(main)
