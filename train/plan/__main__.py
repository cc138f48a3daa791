"""python -m train.plan --layer 17 [--nproc 8] [--nodes 4] [--memory 80e9] [--width 2304]: memory and traffic of a
training.
"""

import math
import re
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path

from pydantic import ByteSize, TypeAdapter

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.hub import is_hub
from common.nodes.environment import MOST
from common.settings import Settings
from transcoder.layers import n_layers

SMALLEST = 1e6
"""Bytes; whoever gives less means gigabytes."""


def main() -> None:
    options = parser(
        "train.plan",
        "What each process of a training holds and sends, by how its latents and rows are shared.",
    )
    options.add_argument(
        "--nproc", type=_whole, default=1, help="number of processes of the training, on each node [1]"
    )
    options.add_argument("--nodes", type=_whole, default=1, help="number of nodes (machines) [1]")
    memory = "memory of each GPU, such as 80e9 or 80GB [what is free of the device here]"
    options.add_argument("--memory", type=_bytes, help=memory)
    width = "width of the rows, the model's hidden size, if the store does not exist yet"
    options.add_argument("--width", type=_whole, help=width)
    asked = read(options)
    arguments = asked.arguments
    if (processes := arguments.nproc * arguments.nodes) >= MOST:
        raise InputError(
            f"--nproc, --nodes: expected fewer than {MOST:,} processes together, found {processes:,}"
        )
    layers = asked.layers(n_layers)
    if not layers:
        raise InputError("layer: expected at least one, found none; give LAYER=17 (--layer 17)")
    from common.terminal.table import console  # after the settings are checked: torch takes seconds to import
    from train.plan.splits import plan

    alike: dict[str, list[int]] = {}
    each = {layer: asked.settings((layer,)) for layer in layers}
    for layer, settings in each.items():
        alike.setdefault(f"{settings.transcoder!r} {settings.train!r}", []).append(layer)
    for same in alike.values():
        settings, names = each[same[0]], " ".join(map(str, same))
        width = arguments.width or next(filter(None, (_width(each[layer]) for layer in same)), None)
        if width is None:
            print(
                f"training of layer {names}: no store yet, so the width of its rows is not known; give it "
                "(WIDTH=2304 for Gemma-2-2B)"
            )
            continue
        of = f"training of layer {names}"
        console().print(plan(settings, width, arguments.nproc, arguments.memory, of, arguments.nodes))


def _bytes(text: str) -> float:
    """A size in bytes, written as 80e9, 80GB or 80GiB; less than a program takes is a mistake."""
    with suppress(ValueError):
        size = float(text)
        if SMALLEST <= size < math.inf:
            return size
    with suppress(ValueError):
        if (size := float(TypeAdapter(ByteSize).validate_python(text))) >= SMALLEST:
            return size
    raise ArgumentTypeError(f"expected bytes, for example 80e9 or 80GB, found {text!r}")


def _whole(text: str) -> int:
    if not (re.fullmatch(r"[0-9]{1,7}", text) and int(text)):
        raise ArgumentTypeError(f"expected a whole number, 1 or more, found {text!r}")
    return int(text)


def _width(settings: Settings) -> int | None:
    """The width of a layer's store; None if there is no store."""
    from shards import Store
    from shards.layout import COMMIT
    from shards.objects.client import SCHEMES, committed

    where = settings.store_path(settings.layer)
    there = (
        committed(where) if where.startswith(SCHEMES) else is_hub(where) or (Path(where) / COMMIT).exists()
    )
    if not there:
        return None
    return Store.of(settings).manifest.source.d_in


if __name__ == "__main__":
    run_stage(main)
