"""Reads and checks every byte of a store; un-commits exactly the damaged windows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common.device import cores
from common.errors import InputError
from common.files import sha256
from common.progress import progress
from shards.commit import commit_of
from shards.layout import FILE_CHUNKS, Array, split_arrays
from shards.manifest import SPLITS, read_manifest
from shards.reader import DamagedChunkError, MappedArray
from shards.remote import Files, names_of
from shards.writer import StoreWriter

UNLISTED = "not listed in files.sha256: no file of the store"
LEFT_OVER = "left of train rows that were removed after training: the removal was interrupted"


@dataclass(frozen=True)
class Damage:
    """A damaged or missing file, or one damaged chunk of it."""

    file: str
    what: str
    array: str | None = None
    chunk: int | None = None
    """Number within the file; None: the whole file."""
    lines: range | None = None
    """Rows (or contexts) of the array that are lost."""

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        lines = "" if self.lines is None else f", {self.array}[{self.lines.start}:{self.lines.stop}]"
        return f"{self.file}{chunk}{lines}: {self.what}"


def verify(files: Files) -> list[Damage]:
    """Every damage of a complete store, by file; empty when every byte is as it was committed.

    Raises `InputError` when the store is unfinished or `files.sha256` itself is damaged.
    """
    digests, removed = commit_of(files.root)
    arrays = _data_files(files) if _metadata_is_whole(files, digests) else {}
    damages: list[Damage] = []
    with (
        ThreadPoolExecutor(cores()) as pool,
        progress("verify", len(digests), "files") as bar,
    ):
        checks = pool.map(lambda name: _is_whole(files, name, digests[name]), digests)
        for name, whole in zip(digests, checks, strict=True):
            bar.update()
            if not whole:
                damages += _locate(files, name, arrays.get(name))
    unlisted = (name for name in names_of(files) if name not in digests)
    return damages + [Damage(name, LEFT_OVER if name in removed else UNLISTED) for name in unlisted]


def _is_whole(files: Files, name: str, digest: str) -> bool:
    path = files.local(name)
    return path.is_file() and sha256(path) == digest


def _metadata_is_whole(files: Files, digests: dict[str, str]) -> bool:
    return all(_is_whole(files, name, digest) for name, digest in digests.items() if name.endswith(".json"))


def _data_files(files: Files) -> dict[str, tuple[Array, int]]:
    """File -> its array and number, for every file that holds chunks; the metadata must be whole."""
    manifest = read_manifest(files.root)
    arrays = {}
    for split in SPLITS:
        record = manifest.splits[split]
        for array in split_arrays(manifest.source, split, record.rows, record.contexts).values():
            for number in range(-(-array.chunks // FILE_CHUNKS)):
                arrays[array.file(number)] = array, number
    return arrays


def _locate(files: Files, name: str, place: tuple[Array, int] | None) -> Iterator[Damage]:
    """The damaged chunks of a file whose digest does not match."""
    what = "sha256 does not match" if files.local(name).is_file() else "missing"
    if place is None:
        yield Damage(name, what)
        return
    array, number = place
    reader = MappedArray(files, array)
    damaged = 0
    for inner in range(array.chunks_in_file(number)):
        first = (number * FILE_CHUNKS + inner) * array.chunk[0]
        lines = range(first, min(first + array.chunk[0], array.shape[0]))
        try:
            reader.chunk(number * FILE_CHUNKS + inner)
        except DamagedChunkError as error:
            damaged += 1
            yield Damage(name, error.what, array.path, inner, lines)
    if not damaged:
        yield Damage(name, f"{what}, though every chunk reads", array.path)


def repair(writer: StoreWriter, files: Files, damages: list[Damage]) -> list[tuple[str, int]]:
    """Un-commit the windows that hold damage, so that the same harvest refills exactly those; a removal that was
    interrupted is brought to its end first.

    `files`: of the same store. Returns the (split, window) pairs. Raises `InputError` when what is damaged is not a
    window's: the text, the tokenizer or the manifest, which a harvest cannot make again from the store alone; or a
    stranger's file.
    """
    if any(damage.what == LEFT_OVER for damage in damages):
        writer.remove_rows()
        damages = [damage for damage in damages if damage.what != LEFT_OVER]
    if not damages:
        return []
    if strange := next((damage.file for damage in damages if damage.what == UNLISTED), None):
        raise InputError(
            f"{files.where}/{strange}: is no file of the store; remove this file, the store is not harmed by it"
        )
    places = _data_files(files) if not any(damage.file.endswith(".json") for damage in damages) else {}
    beyond = [d.file for d in damages if d.file not in places or places[d.file][0].path.endswith("/contexts")]
    if beyond:
        raise InputError(
            f"{files.where}: {beyond[0]} cannot be refilled from the store alone; remove the store and harvest again"
        )
    lost = {(places[d.file][0].path.split("/")[0], places[d.file][1]) for d in damages}
    writer.uncommit(sorted(lost))
    return sorted(lost)
