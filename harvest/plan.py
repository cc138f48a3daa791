"""What the harvest of the layers asked for will take, and how many passes of the model harvest.keep layer would."""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from common.settings import Settings
from harvest import lm
from harvest.run import differences, requested, to_harvest
from shards.plan import Plan, expected_rows, human, on_disk, passes, plan_of, room, shortage
from shards.remote import is_url


def plan_only(settings: Settings) -> None:
    """Print what the harvest of every asked layer will take, without starting it."""
    plans, width = plans_of(settings)
    if not plans:
        return
    tqdm.write(f"width of the rows: {width:,}")
    for layer, plan in plans.items():
        tqdm.write(f"layer {layer}: {plan}")
    layers, missing = len(plans), shortage([*plans.values()])
    if layers > 1:
        rows = sum(sum(plan.rows.values()) for plan in plans.values())
        size, free = sum(plan.bytes for plan in plans.values()), next(iter(plans.values())).free_bytes
        tqdm.write(f"together: {layers} layers, {rows:,} rows, {human(size)}{on_disk(free)}")
    if missing:
        tqdm.write(f"it does NOT fit: the harvest {missing}")
    if (layers > 1 or settings.harvest.keep == "layer") and not is_url(
        settings.store_path(settings.layers[0])
    ):
        tqdm.write(_passes_in_words(settings, plans))


def plans_of(settings: Settings, refill: Sequence[int] = ()) -> tuple[dict[int, Plan], int]:
    """What each layer that is not harvested will take, and the width of inputs and outputs; `refill`: layers whose
    removed rows are asked for again.
    """
    request = requested(settings)
    if not (todo := to_harvest(settings, request, refill)):
        return {}, 0
    shape, options = lm.shape(lm.locate(settings.model), settings.model.revision), settings.harvest
    lm.check_layers(todo, shape.n_layers, settings.model.name)
    plans = {}
    for layer, writer in todo.items():
        begun = None if writer.complete else writer.request
        read = begun is not None and not differences(settings, request, begun)
        rows = None if read else expected_rows(options)
        plans[layer] = plan_of(writer, 2 * shape.width, options.storage, rows)
    return plans, shape.width


def _passes_in_words(settings: Settings, plans: dict[int, Plan]) -> str:
    """What harvest.keep layer would make of it."""
    most = room(settings.harvest.disk_bytes, [Path(settings.store_path(layer)) for layer in settings.layers])
    found = passes(plans, most)
    where = f"{human(most)} ({'free' if settings.harvest.disk_bytes is None else 'harvest.disk_bytes'})"
    if found.left:
        return f"harvest.keep layer: layer {' '.join(map(str, found.left))} would NOT fit into {where}"
    n = len(found.groups)
    return (
        f"harvest.keep layer: {n} pass{'es' * (n > 1)} of the model within {where}, of at most "
        f"{max(map(len, found.groups))} layers; {human(found.kept)} are kept at the end"
    )
