"""The last file of a store: files.sha256 lists every other with its digest, and commits the store."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.files import inside
from shards.layout import COMMIT


def store_files(root: Path) -> list[str]:
    """Every file of a store but the commit and the unfinished harvest's, in byte order of the path.

    Hidden files are none of it: .DS_Store, ._zarr.json and .nfs0001 come and go with who looks at a directory.
    """
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(
        str(path)
        for path in paths
        if str(path) != COMMIT and path.suffix != ".tmp" and not any(part[0] == "." for part in path.parts)
    )


REMOVED = "# removed "
"""Before the line of a file that was removed after training; a comment for sha256sum."""


def commit_text(digests: dict[str, str], removed: Mapping[str, str] | None = None) -> bytes:
    """`files.sha256` for these {path: sha256}, and those of removed files; the last line digests the lines above."""
    there = [f"{digests[path]}  {path}\n" for path in sorted(digests)]
    gone = [f"{REMOVED}{digest}  {path}\n" for path, digest in sorted((removed or {}).items())]
    lines = "".join([*there, *gone]).encode()
    return lines + f"# {hashlib.sha256(lines).hexdigest()}\n".encode()


class Commit(NamedTuple):
    """What `files.sha256` says: {path: sha256}."""

    there: dict[str, str]
    removed: dict[str, str]
    """Of train rows that were removed after training; empty for most stores."""


def rows_removed(where: str | Path) -> InputError:
    """What to say where the train rows are asked for that are no longer there."""
    return InputError(
        f"{where}: its train rows were removed after training (harvest.keep layer); harvest them again (make harvest "
        "ARGS=--refill)"
    )


def read_commit(root: Path) -> dict[str, str]:
    """{path: sha256} of a complete store's files, as `commit_of` reads them."""
    return commit_of(root).there


def commit_of(root: Path) -> Commit:
    """The list of a complete store; raises `InputError` when it is unfinished or the list damaged."""
    path = root / COMMIT
    if not root.is_dir():
        others = sorted(
            str(path.relative_to(root.parent.parent)) for path in root.parent.parent.glob("*/*.zarr")
        )
        there = (
            f"; there are {', '.join(others[:9])}: see PROFILE, LAYER, HARVEST, --model.name"
            if others
            else ""
        )
        raise InputError(f"{root}: no such store; make harvest writes it{there}")
    if not path.is_file():
        raise InputError(
            f"{root}: unfinished harvest ({COMMIT} is missing); the same make harvest continues it"
        )
    return commit_in(path.read_bytes(), root, path)


def digests_itself(data: bytes) -> bool:
    """Whether the last line of a list is the digest of the lines above."""
    body, _, last = data.rstrip(b"\n").rpartition(b"\n")
    lines = body + b"\n"
    return last == f"# {hashlib.sha256(lines).hexdigest()}".encode()


def commit_in(data: bytes, root: Path, path: str | Path) -> Commit:
    """The list that `data` is, of the store at `root`; raises `InputError` when it is damaged. `path` names it."""
    if not digests_itself(data):
        raise InputError(
            f"{path}: damaged: its last line does not digest the lines above; make verify tells more"
        )
    commit = Commit({}, {})
    body, _, _ = data.rstrip(b"\n").rpartition(b"\n")
    for line in body.decode(errors="replace").split("\n"):
        pair = re.fullmatch(r"([0-9a-f]{64})  (.+)", line.removeprefix(REMOVED))
        if not pair:
            raise InputError(f"{path}: damaged: expected lines of <sha256>  <path>")
        inside(root, pair[2])
        (commit.removed if line.startswith(REMOVED) else commit.there)[pair[2]] = pair[1]
    return commit
