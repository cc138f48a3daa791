"""python -m shards info | verify: what a store holds, and whether every byte of it is there."""

from pathlib import Path

from pipeline import InputError, load, parser, run_stage


def main() -> None:
    options = parser("shards", "Look at activation stores.")
    options.add_argument("action", choices=["info", "verify"], help="print the manifest; check every byte")
    options.add_argument("stores", nargs="*", type=Path, help="store directories [the ones of --layer]")
    options.add_argument("--repair", action="store_true", help="verify: un-commit the damaged windows")
    settings, given = load(options)
    paths = given.stores or [settings.store_path(layer) for layer in settings.layers]
    if not paths:
        raise InputError("shards: no store named; give LAYER=17 (--layer 17) or a path")
    if given.action == "info":
        for path in paths:
            _info(path)
        return
    whole = [_verify(path, given.repair) for path in paths]
    if not all(whole):
        raise InputError("damaged; --repair (make verify ARGS=--repair) un-commits the damaged windows")


def _info(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from shards.store import Store

    manifest = Store.open(path).manifest
    table = Table("key", "value", title=str(path), title_justify="left")
    for key, value in manifest.source.model_dump().items():
        table.add_row(key, f"{len(value)} values" if key == "gain" else str(value))
    for name, split in manifest.splits.items():
        table.add_row(f"{name} rows / contexts", f"{split.rows:,} / {split.contexts:,}")
        for side, moments in (("inputs", split.inputs), ("outputs", split.outputs)):
            if moments:
                cost = f"scale {moments.scale:.4g}, storing costs FVU {moments.quantisation_fvu:.2g}"
                table.add_row(f"{name} {side}", cost)
    table.add_row("fingerprint", manifest.fingerprint)
    Console().print(table)


def _verify(path: Path, repair: bool) -> bool:
    """Whether the store is whole, or was un-committed so that a harvest can mend it."""
    from shards import verify as check

    damages = check.verify(path)
    for damage in damages:
        print(f"damaged: {damage}")
    if not damages:
        print(f"{path}: every byte is as it was committed")
    elif repair:
        lost = check.repair(path, damages)
        listed = ", ".join(f"{split} {window}" for split, window in lost)
        print(f"{path}: un-committed {len(lost)} window(s) ({listed}); the same make harvest refills them")
    return not damages or repair


if __name__ == "__main__":
    run_stage(main)
