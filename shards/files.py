"""Files that appear whole or not at all, and the digests that prove it."""

import hashlib
import os
from pathlib import Path

from pipeline import InputError
from shards.layout import COMMIT, WORK


def write_whole(path: Path, data: bytes) -> str:
    """Write aside, flush to disk, rename. Returns the sha256 of `data`; a kill leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        publish(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # write() does not name its file
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return hashlib.sha256(data).hexdigest()


def publish(aside: Path, path: Path) -> None:
    """Flush the finished file or directory `aside` to disk and rename it to `path`."""
    flush(aside)
    aside.replace(path)
    flush(path.parent)  # the rename itself survives a power cut


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_files(root: Path) -> list[str]:
    """Every file of a store but the commit and the unfinished harvest's, in byte order of the path."""
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(
        str(path) for path in paths if path.parts[0] not in (COMMIT, WORK) and path.suffix != ".tmp"
    )


def commit_text(digests: dict[str, str]) -> bytes:
    """`files.sha256` for these {path: sha256}; the last line digests the lines above."""
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode()
    return lines + f"# {hashlib.sha256(lines).hexdigest()}\n".encode()


def read_commit(root: Path) -> dict[str, str]:
    """{path: sha256} of a complete store; raises `InputError` when it is unfinished or its list damaged."""
    path = root / COMMIT
    if not root.is_dir():
        raise InputError(f"{root}: no such store; make harvest writes it")
    if not path.is_file():
        raise InputError(
            f"{root}: unfinished harvest ({COMMIT} is missing); the same make harvest continues it"
        )
    data = path.read_bytes()
    body, _, last = data.rstrip(b"\n").rpartition(b"\n")
    lines = body + b"\n"
    if last != f"# {hashlib.sha256(lines).hexdigest()}".encode():
        raise InputError(
            f"{path}: damaged: its last line does not digest the lines above; make verify tells more"
        )
    pairs = (line.split("  ", 1) for line in body.decode().splitlines())
    return {name: hexdigest for hexdigest, name in pairs}
