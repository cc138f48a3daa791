"""python -m evaluate.stores [--layer 17]: every store below paths.activations, finished or begun, one line each."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from common.cli import MOST_LAYERS, load, parser, run_stage
from common.errors import InputError
from common.files import size_of
from common.numbers import MARK
from shards.commit import commit_of
from shards.layout import COMMIT, WORK
from shards.manifest import SPLITS, read_manifest
from shards.objects.client import WRITABLE, Client
from shards.plan import human
from shards.remote import is_url

COLUMNS: tuple[str, ...] = (
    "layer",
    "harvest",
    "rows",
    "held-out",
    "width",
    "storage",
    "input",
    "cost FVU",
    "state",
    "size",
)


def stores_of(activations: Path, layers: tuple[int, ...] = ()) -> list[tuple[Path, int, str]]:
    """(directory, layer, name of the harvest) of the stores of these layers (none: of all), by model, layer, name."""
    stores = []
    for path in activations.glob("*/layer_*.zarr"):
        match = re.fullmatch(r"layer_(\d+)(?:_(.+))?\.zarr", path.name)
        if match and path.is_dir() and (not layers or int(match[1]) in layers):
            stores.append((path, int(match[1]), match[2] or ""))
    return sorted(stores, key=lambda each: (each[0].parent.name, *each[1:]))


def metadata_of(address: str, folder: Path) -> dict[Path, int]:
    """Store below `folder` -> its bytes, of all stores at an address: there are their manifests, lists and records, as
    `stores_of` and `line_of` look for them, and nothing else.

    Raises `InputError` if the address cannot be listed (https://, hf://) or read.
    """
    if not address.startswith(WRITABLE):
        known = ", ".join(WRITABLE)
        raise InputError(
            f"paths.activations: {address}: expected a directory or an address that can be listed ({known})"
        )
    client, sizes = Client(address), dict[Path, int]()
    for name, size in client.names():
        place = re.match(r"([^/]+/layer_\d+[^/]*\.zarr)/(.+)", name)
        if not place:
            continue
        store = folder / place[1]
        store.mkdir(parents=True, exist_ok=True)
        sizes[store] = sizes.get(store, 0) + size
        inside = store / place[2]
        record = inside.parent == store / WORK / "records"
        if record or place[2] in (COMMIT, "zarr.json"):
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.write_bytes(b"" if record else client.get(name) or b"")
    return sizes


def line_of(path: Path, layer: int, harvest: str, size: int | None = None) -> dict[str, str]:
    """What the table says of a store; of one that cannot be read, why in the column of its state.

    `size`: its bytes, where they are elsewhere.
    """
    line = dict.fromkeys(COLUMNS, "-") | {
        "model": path.parent.name,
        "layer": str(layer),
        "harvest": harvest or "-",
    }
    line["size"] = human(size_of(path) if size is None else size)
    if not (path / COMMIT).is_file():
        windows = len([*(path / WORK / "records").glob("*.json")])
        return line | {"state": f"unfinished, {windows} windows of 32,768 rows"}
    try:
        manifest, removed = read_manifest(path), commit_of(path).removed
    except InputError as error:
        why = str(error).replace(f"{path}/", "").removeprefix("zarr.json: ").removeprefix("cannot be read: ")
        return line | {"state": f"cannot be read: {why}"}
    source, train = manifest.source, manifest.splits["train"]
    rows, heldout = (f"{manifest.splits[split].rows:,}" for split in SPLITS)
    line |= {"rows": rows, "held-out": heldout, "width": f"{source.d_in} -> {source.d_out}"}
    if train.inputs and train.outputs:
        line["cost FVU"] = f"{train.inputs.quantisation_fvu:.1e} / {train.outputs.quantisation_fvu:.1e}"
    return line | {
        "storage": source.storage,
        "input": source.input,
        "state": "train rows removed" if removed else "complete",
    }


def print_table(lines: list[dict[str, str]], columns: Sequence[str], nothing: str, caption: str = "") -> None:
    """The lines under `columns`, a table for each model, whose rows their first two columns tell apart; `nothing` if
    there are none. `caption`: below a table with marked numbers.
    """
    from common.terminal.table import Table, console

    if not lines:
        print(nothing)
    for model, own in groupby(lines, key=lambda line: line["model"]):
        table = Table(*columns, title=model, keys=2)
        for line in own:
            if any(cell.endswith(MARK) for cell in line.values()):
                table.caption = caption
            table.add_row(*(line[column] for column in columns))
        console().print(table)


def main() -> None:
    settings, arguments = load(parser("evaluate.stores", __doc__ or ""), n_layers=lambda _: MOST_LAYERS)
    where = settings.paths.activations
    with TemporaryDirectory() as folder:
        sizes = metadata_of(str(where), Path(folder)) if is_url(where) else {}
        root = Path(folder) if is_url(where) else Path(where)
        stores = stores_of(root, settings.layers if arguments.layer else ())
        lines = [line_of(*each, sizes.get(each[0])) for each in stores]
    print_table(lines, COLUMNS, f"no stores in {where}; harvest one (make harvest)")


if __name__ == "__main__":
    run_stage(main)
