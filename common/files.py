"""Files that appear whole or not at all, the digests that prove it, and the lock of who writes them."""

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from common.errors import InputError


def write_whole(path: Path, data: bytes) -> str:
    """Write aside, flush to disk, rename. Returns the sha256 of `data`; a kill leaves the old file or none."""
    with whole(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def make_folder(folder: Path) -> None:
    """The directory and those above it, where they are not there.

    Raises `InputError` for a link to a place that has gone, which would be "File exists".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        for each in (folder, *folder.parents):
            if each.is_symlink() and not each.exists():
                raise InputError(
                    f"{each}: a link to {each.readlink()}, which is not there; mount its disk, or remove the link"
                ) from None
        raise


def text_slug(text: str, of: str = "") -> str:
    """A folder's name for results on a text: its first words, and a digest of the whole text and of `of`.

    >>> text_slug("Où est le 1er chat ?"), text_slug("日本")
    ('ou-est-le-1er-chat-3819673c', 'text-cf2abf0c')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall(r"[a-z0-9]+", plain))[:40].strip("-") or "text"
    whole = f"{of} {text}" if of else text
    return f"{words}-{hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends without an error, and is gone after one."""
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
        publish(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # write() does not name its file
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def aside_of(folder: Path) -> Path:
    """Where `whole_folder` has the new `folder` until it is whole: other processes may add to it until then."""
    return folder.with_name(f".{folder.name}.new.tmp")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `folder` when the block ends without an error, and is gone after one.

    Of one process at a time: the caller holds the lock, or does not share the folder. A kill leaves the old folder,
    the new one, or, between two renames, none; then the next call brings the old one back first.
    """
    aside, old = aside_of(folder), folder.with_name(f".{folder.name}.old.tmp")
    if old.is_dir() and not folder.exists():
        old.replace(folder)
    for left_over in (aside, old):
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            flush(path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # write() does not name its file
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    if folder.exists():
        folder.replace(old)
    publish(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def publish(aside: Path, path: Path) -> None:
    """Flush the finished file or directory `aside` to disk and rename it to `path`."""
    flush(aside)
    aside.replace(path)
    flush(path.parent)  # the rename itself survives a power cut


def flush(path: Path) -> None:
    """Have the file or directory on disk before going on.

    A file system that cannot flush (mounts of object stores and network shares: directories, some of them files too)
    is told on standard error, once, and trusted.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        _say_cannot_flush(os.fstat(descriptor).st_dev, f"{path.parent}: {error.strerror}")
    finally:
        os.close(descriptor)


def _say_cannot_flush(disk: int, why: str) -> None:
    if disk not in _cannot_flush:
        _cannot_flush.add(disk)
        print(f"{why} (fsync); what is written survives a kill, perhaps not a power cut", file=sys.stderr)


_cannot_flush: set[int] = set()
"""Disks of which it was said."""


def obey_umask(path: Path) -> None:
    """Make a file as readable as the umask lets a new one be: safetensors makes its own for the owner alone."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    if path.stat().st_mode != mode:  # never so on disks without modes, some of which refuse chmod
        path.chmod(stat.S_IMODE(mode))


def remove_asides(*folders: Path) -> None:
    """Remove what killed processes left half-written in these folders; the caller holds their lock."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def size_of(folder: Path) -> int:
    """Bytes of all files below, however many hard links one has; symbolic links count as what they are themselves.

    Half-written files (.tmp) are left out: they go, or become what they are for.
    """
    sizes: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".tmp"):
                continue
            with suppress(FileNotFoundError):  # a file that another process was writing
                status = Path(root, name).lstat()
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


@contextmanager
def locked(path: Path, refusal: str | None) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards. The kernel frees a dead holder's lock.

    When it is held, raises `InputError` with `refusal` and the holder's process number; without a refusal, says so on
    standard error and waits. A file system without locks is told there and trusted.
    """
    make_folder(path.parent)
    # No soft lock where flock is missing: it outlives a killed holder.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        _acquire(lock, path, refusal)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise OSError(error.errno, error.strerror, str(path)) from error  # flock() does not name its file
        print(f"{path}: cannot be locked here; start no second process on it", file=sys.stderr)
    try:
        if lock.is_locked:
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        # Before the release: a waiter sees that its file has gone, and opens the next.
        path.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, path: Path, refusal: str | None) -> None:
    """Take the lock, or say who has it."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = f"process {_holder(path)}"
        if refusal:
            raise InputError(f"{refusal} ({holder}); wait for it or stop it") from None
        print(f"{path}: waiting for {holder}", file=sys.stderr, flush=True)
        lock.acquire()


def _holder(path: Path) -> str:
    """The process number in a lock file, which may go at any instant."""
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, name: str) -> Path:
    """`root` / `name`, which comes from a file that somebody else may have written.

    Raises `InputError` where the name, or a symbolic link on its way, leads out of `root`; the hub's cache links to its
    own blobs.
    """
    if re.search(r"[\\\x00-\x1f\x7f]", name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise InputError(f"{root}: {name!r} is not the name of a file in it; do not use what came with it")
    path = root / name
    places = (root.resolve(), *_blobs(root))
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise InputError(
            f"{path}: a link that leads out of {root}, to {path.resolve()}; copy it with links followed (cp -rL)"
        )
    return path


def _blobs(root: Path) -> Iterator[Path]:
    """Where huggingface_hub's cache keeps the files that a directory of its snapshots links to."""
    for parent in root.absolute().parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            yield (parent.parent / "blobs").resolve()
