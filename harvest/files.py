"""Local files of text: which there are, and the requested column of every row.

Of a row only its column is looked at, and its type is ours: whatever else a file holds, and wherever, is no matter.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.identity import POINTER
from common.settings import Data
from harvest.embedded import text_files

KINDS = ".jsonl, .json, .csv, .txt (these also as .gz or .zst) or .parquet"
ESCAPES = range(0xDC80, 0xDD00)
"""What Python reads a byte as that is not UTF-8 (surrogateescape): 0xDC00 + the byte."""
BATCH_ROWS = 256
"""Rows of a .parquet at once: 10 MB of documents of 40 kB."""


class Files(NamedTuple):
    """What data.files names."""

    read: list[Path]
    """In the order in which they are read; none for a dataset of the hub."""
    left_out: list[Path]
    """Of another kind, in a directory or among a pattern's."""


class Bad(NamedTuple):
    """What stands where a text should."""

    why: str


class Row(NamedTuple):
    place: str
    """Within its file: "line 3", counted from 1; "row 2" of a .parquet, from 0."""
    value: object
    """Of the requested column, or `Bad`."""


# -- which files ---------------------------------------------------------------------------------------


def found_files(data: Data) -> Files:
    """The local files that the text comes from. Raises `InputError` naming a bad one.

    A name that exists is that file or directory, whatever characters it has; any other is a pattern. The files of a
    directory, of all directories below it, and of a pattern are in the order of their paths.
    """
    if not data.files and data.dataset.startswith("embedded/"):
        return Files(list(text_files(data.dataset)), [])
    if not data.files and Path(data.dataset).exists():
        raise InputError(
            f"data.dataset: {data.dataset} is on this disk, but expected a dataset of the hub; "
            f"give it as data.files (--data.files {data.dataset})"
        )
    named = [_named(name) for name in data.files]
    return Files([path for each in named for path in each.read], [p for each in named for p in each.left_out])


def _named(name: str) -> Files:
    path = Path(name)
    if not name.strip():
        raise InputError("data.files: a name is empty; expected files, directories or patterns")
    if path.is_file():
        if kind_of(path) is None:
            ending = repr("".join(path.suffixes[-2:])) if path.suffix else "no ending"
            raise InputError(f"data.files: {path}: expected {KINDS}, found {ending}")
        return Files([path], [])
    if path.is_dir():
        files = sorted(_below(path, set()))
        if (path / "state.json").is_file() and any(each.suffix == ".arrow" for each in files):
            raise InputError(
                f"data.files: {path} was written by save_to_disk(); write it with to_parquet() instead"
            )
    elif os.path.lexists(path):
        raise InputError(
            f"data.files: {path} is not a regular file (or a link to one); copy its text into a regular file"
        )
    else:
        matches = glob.glob(name, recursive=True) if glob.has_magic(name) else []  # noqa: PTH207 - Path's takes no root
        files = sorted(Path(match) for match in matches if not Path(match).is_dir())
        if not files:
            pattern = ", and as a pattern it matches none" if glob.has_magic(name) else ""
            raise InputError(f"data.files: no such file {name}{pattern}{_not_expanded(name)}")
    once = {
        each.resolve(): each for each in reversed(files)
    }  # links may lead to a file twice, or in a circle
    files = sorted(once.values())
    read = [each for each in files if kind_of(each)]
    if not read:
        none = f"none of its {len(files)} files has one of the types {KINDS}" if files else "holds no files"
        raise InputError(f"data.files: {path}: {none}")
    if broken := [each for each in read if not each.is_file()]:
        raise InputError(f"data.files: {broken[0]} is not a regular file (or a link to one)")
    return Files(read, [each for each in files if not kind_of(each)])


def _not_expanded(name: str) -> str:
    """What to say of a name that a shell or a browser would have made another of."""
    if "://" in name:
        return "; addresses are not read: download it first"
    return "; ~ and $ are not expanded here: give the whole path" if name[:1] in ("~", "$") else ""


def _below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Every file in a directory and those below it but hidden ones; links are followed, in no circle.

    Raises `OSError` for a directory that may not be read: its files would be missing without a word.
    """
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, seen)
        else:
            yield path


def kind_of(path: Path) -> str | None:
    """How a file is read, .jsonl for a.jsonl.gz; none of a file that is not read."""
    *_, first, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    packed = last in (".gz", ".zst")
    kind = first if packed else last
    return kind if kind in READERS and not (packed and kind == ".parquet") else None


def has_columns(files: Sequence[Path]) -> bool:
    """Whether data.text_column decides what is read: not of .txt files alone."""
    return not files or any(kind_of(path) != ".txt" for path in files)


# -- rows ----------------------------------------------------------------------------------------------


def file_rows(path: Path, column: str) -> Iterator[Row]:
    """The requested column of every row. Raises `ValueError` or `OSError` where the file cannot be read on."""
    kind = kind_of(path)
    assert kind, "found_files gives none of another kind"
    _refuse_another_kind(path)
    yield from READERS[kind](path, column)


def _open(path: Path) -> Any:
    """A binary file, unpacked as it is read."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".zst":
            import pyarrow  # comes with datasets; no zstandard of its own is needed

            return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


STARTS = {
    b"\x1f\x8b": "is compressed by gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; its name must end in .zst",
    POINTER: "is a pointer of Git LFS, not the file; fetch it (git lfs pull)",
    b"BZh": "is compressed by bzip2, which is not read; unpack it (bunzip2)",
    b"\xfd7zXZ\0": "is compressed by xz, which is not read; unpack it (unxz)",
    b"PK\x03\x04": "is a zip archive, which is not read; unpack it (unzip)",
    b"\xff\xfe": "is UTF-16; expected UTF-8, convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; expected UTF-8, convert it (iconv -f UTF-16 -t UTF-8)",
}


def _refuse_another_kind(path: Path) -> None:
    """Raise `ValueError` where the first bytes tell what the file is, and it is not what its name says."""
    with _open(path) as file:
        start = file.read(64)
    for sign, why in STARTS.items():
        if start.startswith(sign):
            raise ValueError(f"it {why}")
    if b"\0" in start and kind_of(path) != ".parquet":
        raise ValueError("it holds zero bytes; expected text in UTF-8")


@contextmanager
def _lines(path: Path, newline: str | None) -> Iterator[Iterator[str]]:
    """Lines that end as `newline` of open() says, without byte order marks, which joined files have in the middle too.

    What is not UTF-8 becomes `ESCAPES`: it matters in the requested column alone.
    """
    with io.TextIOWrapper(_open(path), "utf-8", "surrogateescape", newline) as lines:
        yield filter(
            None, (line.removeprefix("\ufeff") for line in lines)
        )  # a line has its end; a mark alone is none


def _txt(path: Path, _: str) -> Iterator[Row]:
    """Each line is a text: there are no columns to choose from."""
    with _lines(path, None) as lines:
        for number, line in enumerate(lines, 1):
            yield Row(f"line {number}", line.removesuffix("\n"))


def _integer(digits: str) -> float:
    """Python refuses to read integers of more than 4,300 digits, which may stand beside the text."""
    return int(digits) if len(digits) < 4000 else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def _jsonl(path: Path, column: str) -> Iterator[Row]:
    with _lines(path, "\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_row(f"line {number}", line, column)


def _json_row(place: str, line: str, column: str) -> Row:
    try:
        return Row(place, _of_object(DECODER.decode(line.rstrip("\r\n")), column))
    except json.JSONDecodeError as error:
        return Row(place, Bad(_not_json(error)))
    except RecursionError:
        return Row(place, Bad("its values are nested too deeply"))


def _not_json(error: json.JSONDecodeError) -> str:
    what = re.sub("( starting)? at$", "", error.msg)
    return f"not valid JSON: {what} at character {error.colno}"


def _of_object(value: object, column: str) -> object:
    if isinstance(value, dict):
        return pick(value, column)
    return Bad(f"expected a JSON object, found {json.dumps(value):.60}")


def _json(path: Path, column: str) -> Iterator[Row]:
    """Lines of objects, or else one list of objects, or objects one after the other, which is read as a whole."""
    with _lines(path, "\n") as lines:
        first = next((line for line in lines if line.strip()), "")
        try:
            as_lines = not first or isinstance(DECODER.decode(first), dict)
        except (ValueError, RecursionError):
            as_lines = False
    if as_lines:
        yield from _jsonl(path, column)
        return
    with _lines(path, "\n") as lines:
        text = "".join(lines)
    place, number = 0, 0
    while rest := text[place:].lstrip():
        start = len(text) - len(rest)
        try:
            value, place = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}: {_not_json(error)}") from error
        except RecursionError as error:
            raise ValueError("its values are nested too deeply") from error
        for each in value if isinstance(value, list) else [value]:
            yield Row(f"row {number}", _of_object(each, column))
            number += 1


def _csv(path: Path, column: str) -> Iterator[Row]:
    """The first line names the columns. Of a broken quote the end is not known: skipped is what is one line."""
    csv.field_size_limit(sys.maxsize)
    with _lines(path, "") as lines:
        table = csv.reader(lines, strict=True)
        names = next(table, [])
        at = _index(names, column) if names else 0
        while True:
            before = table.line_num
            place = f"line {before + 1}"
            try:
                fields = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                if table.line_num > before + 1:
                    raise ValueError(f"{place}: a quote that begins here has no end ({error})") from error
                yield Row(place, Bad(str(error)))
                continue
            if len(fields) == len(names):
                yield Row(place, fields[at])
            elif fields:
                yield Row(
                    place, Bad(f"{len(fields)} fields, expected {len(names)}; a text with commas is quoted")
                )


def _index(names: list[str], column: str) -> int:
    if names.count(column) != 1:
        raise ValueError(
            f"column {column!r} is there twice" if column in names else _no_column(column, names)
        )
    return names.index(column)


def _parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        tops = file.schema_arrow.names
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        if not any(f"{leaf}.".startswith(f"{column}.") for leaf in leaves):
            raise ValueError(
                _no_column(column, list(dict.fromkeys(leaf.split(".list.")[0] for leaf in leaves)))
            )
        top = column if column in tops else column.split(".")[0]
        _index(tops, top)
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
            for value in batch.column(top):
                try:
                    content = value.as_py()
                except UnicodeDecodeError as error:
                    content = Bad(f"column {column!r} is not UTF-8: {error.reason}")
                nested = top != column and not isinstance(content, Bad)
                yield Row(f"row {number}", pick({top: content}, column) if nested else content)
                number += 1


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
    ".parquet": _parquet,
}


# -- values --------------------------------------------------------------------------------------------


def pick(row: Mapping[str, object], column: str) -> object:
    """A row's value of `column`, a name or a path of names (meta.text); `Bad` where there is none."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return Bad(_no_column(column, list(islice(_names(row), 13))))
        value = value[part]
    return value


def _names(row: Mapping[str, object], before: str = "") -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _no_column(column: str, names: list[str]) -> str:
    plain = [name.isprintable() and name == name.strip() for name in names[:12]]
    shown = [
        f"{name:.40}" if is_plain else f"{name!r:.40}" for name, is_plain in zip(names, plain, strict=False)
    ]
    more = ", ..." if len(names) > 12 else ""
    return f"no column {column!r}; expected data.text_column among {', '.join(shown) or 'none'}{more}"


def not_unicode(text: str, kind: str | None) -> str | None:
    """Why a text is none: it holds a byte that is not UTF-8, or half of a surrogate pair (a cut emoji), which only
    JSON can write; `kind` of its file.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, at = ord(text[error.start]), f"at character {error.start + 1}"
        surrogate = f"a lone surrogate \\u{code:04x}"
        if code not in ESCAPES:
            return f"{surrogate} {at}"
        also = "" if kind in (".txt", ".csv") else f", or {surrogate}"
        return f"byte 0x{code - 0xDC00:02x} {at} is not UTF-8{also}"
    return None
