"""python -m shards info | verify | upload: what a store holds, whether every byte is there, and a copy of it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.layers.driver import over_layers
from common.settings import Paths, Settings

if TYPE_CHECKING:
    from shards.remote import Files


def main() -> None:
    options = parser("shards", "Look at activation stores.")
    options.add_argument(
        "action",
        choices=["info", "verify", "upload"],
        help="print the manifest; check every byte; copy a complete store to an object store",
    )
    options.add_argument("stores", nargs="*", help="directories or addresses [the stores of --layer]")
    options.add_argument("--repair", action="store_true", help="verify: un-commit the damaged windows")
    options.add_argument(
        "--to", help="upload: address to put <model>/<store> below, for example s3://bucket/activations"
    )
    asked = read(options)
    arguments = asked.arguments

    def work(wheres: list[str], paths: Paths) -> None:
        if not wheres:
            raise InputError("shards: no store named; give LAYER=17 (--layer 17) or a path")
        if arguments.action == "info":
            for where in wheres:
                _info(where, paths)
        elif arguments.action == "upload":
            for where in wheres:
                _upload(where, arguments.to)
        else:
            damaged = [where for where in wheres if not _verify(where, paths, arguments.repair)]
            if damaged:
                raise InputError(
                    f"{', '.join(damaged)}: damaged as listed; "
                    "--repair (make verify ARGS=--repair) un-commits the damaged windows"
                )

    def one(settings: Settings, _: bool) -> None:
        work([settings.store_path(layer) for layer in settings.layers], settings.paths)

    def n_layers(settings: Settings) -> int:
        from shards.store import n_layers

        return n_layers(settings)

    if arguments.stores:
        work(arguments.stores, asked.settings(asked.layers(lambda _: 0)).paths)
    else:
        over_layers(asked, one, n_layers=n_layers)


def _info(where: str, paths: Paths) -> None:
    from common.terminal.table import Table, console
    from shards.store import Store

    store = Store.open(where, paths.cache, paths.cache_bytes)
    manifest = store.manifest
    table = Table("key", "value", title=where)
    for key, value in manifest.source.model_dump().items():
        table.add_row(key, f"{len(value)} values" if key.startswith("gain") and value else str(value))
    for name, split in manifest.splits.items():
        gone = " (removed after training)" if getattr(store, name).removed else ""
        table.add_row(f"{name} rows / contexts", f"{split.rows:,}{gone} / {split.contexts:,}")
        for side, moments in (("inputs", split.inputs), ("outputs", split.outputs)):
            if moments:
                cost = f"scale {moments.scale:.4g}, storing costs FVU {moments.cost}"
                table.add_row(f"{name} {side}", cost)
    table.add_row("fingerprint", manifest.fingerprint)
    console().print(table)


def _verify(where: str, paths: Paths, repair: bool) -> bool:
    """Whether the store is whole, or was un-committed so that a harvest can mend it."""
    from common.hub import is_hub
    from shards.remote import as_they_are, files_of, is_url

    if not is_url(where) or is_hub(where):
        return _verified(where, files_of(where, paths.cache, paths.cache_bytes), paths, repair)
    paths.cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="verify-", dir=paths.cache) as scratch:
        return _verified(where, as_they_are(where, Path(scratch), paths.cache_bytes), paths, repair)


def _verified(where: str, files: "Files", paths: Paths, repair: bool) -> bool:
    from common.hub import is_hub
    from shards import verify as check
    from shards.objects.scratch import Scratch
    from shards.objects.writer import writer_of

    damages = check.verify(files)
    for damage in damages:
        print(f"damaged: {damage}")
    if not damages:
        print(f"{where}: every byte is as it was committed{_gone(where, paths)}")
    elif repair and is_hub(where):
        raise InputError(f"{where}: repair the local store and upload it again")
    elif repair:
        scratch = Scratch(paths.cache / "scratch", paths.scratch_bytes)
        lost = check.repair(writer_of(where, scratch), files, damages)
        if not lost:
            print(f"{where}: what was left of its train rows is removed")
            return True
        listed = ", ".join(f"{split} {window}" for split, window in lost)
        print(f"{where}: un-committed {len(lost)} window(s) ({listed}); the same make harvest refills them")
    return not damages or repair


def _gone(where: str, paths: Paths) -> str:
    """What to say of train rows that were removed after training."""
    from shards.commit import commit_of
    from shards.manifest import read_manifest
    from shards.remote import files_of

    root = files_of(where, paths.cache, paths.cache_bytes).root
    if not commit_of(root).removed:
        return ""
    return f"; its {read_manifest(root).splits['train'].rows:,} train rows were removed after training"


def _upload(where: str, to: str | None) -> None:
    from shards.manifest import read_manifest
    from shards.remote import upload

    if not to:
        raise InputError("upload: no address; give --to s3://bucket/activations (make upload TO=...)")
    target = "/".join([to.rstrip("/"), *Path(where).parts[-2:]])
    upload(Path(where), target)
    source = read_manifest(Path(where)).source
    names = ", ".join(map(str, [source.model, *source.files]))
    print(f"{where} -> {target}\nits manifest is there too, and says: {names}")


if __name__ == "__main__":
    run_stage(main)
