"""python -m train.plan --layer 17 [--nproc 8] [--memory 80e9] [--width 2304]: memory and traffic of a training."""

from pathlib import Path

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.settings import Settings
from transcoder.layers import n_layers


def main() -> None:
    options = parser(
        "train.plan",
        "What each process of a training holds and sends, by how its latents and rows are shared.",
    )
    options.add_argument(
        "--nproc", type=int, default=1, help="number of processes of the training (NPROC) [1]"
    )
    options.add_argument("--memory", type=float, help="memory of each device in bytes [what is free here]")
    options.add_argument("--width", type=int, help="width of the rows, if the store does not exist yet")
    asked = read(options)
    arguments = asked.arguments
    for name in ("nproc", "memory", "width"):
        given = getattr(arguments, name)
        if given is not None and given <= 0:
            raise InputError(f"--{name}: expected a number above 0, found {given:g}")
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
        width = arguments.width or _width(settings)
        if width is None:
            print(
                f"training of layer {names}: no store yet, so the width is not known; give it, for example WIDTH=2304"
            )
            continue
        console().print(
            plan(settings, width, arguments.nproc, arguments.memory, f"training of layer {names}")
        )


def _width(settings: Settings) -> int | None:
    """The width of a layer's store; None if there is no store."""
    from shards import Store
    from shards.layout import COMMIT
    from shards.remote import is_url

    where = settings.store_path(settings.layer)
    if not is_url(where) and not (Path(where) / COMMIT).exists():
        return None
    return Store.of(settings).manifest.source.d_in


if __name__ == "__main__":
    run_stage(main)
