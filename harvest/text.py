"""Dataset -> documents -> token contexts of both splits. Comes before the model, runs once per harvest.

Shapes: C contexts, T tokens of a context.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.errors import InputError, first_line
from common.settings import Data
from harvest.embedded import text_files
from shards.layout import kept_mask
from shards.manifest import SPLITS

DOCUMENTS_AT_ONCE = 256
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def local_files(data: Data) -> list[Path]:
    """The local files the text comes from; empty for a hub dataset. Raises `InputError` naming a bad one."""
    if not data.files and data.dataset.startswith("embedded/"):
        return list(text_files(data.dataset))
    paths = [Path(name) for name in data.files]
    for path in paths:
        if path.is_dir():
            raise InputError(f"data.files: {path} is a directory; name the files in it, separated by commas")
        if not path.is_file():
            raise InputError(f"data.files: no such file {path}")
        if path.suffix not in READERS:
            raise InputError(
                f"data.files: {path}: expected one of {', '.join(READERS)}, found {path.suffix!r}"
            )
    return paths


def documents(data: Data) -> Iterator[str]:
    """Texts in the dataset's own order; a line of a .txt file is a document.

    Raises `InputError` when the dataset cannot be opened or read, or has no such column: another dataset is
    never a silent fallback.
    """
    files = local_files(data)
    column = data.text_column
    for source in files or [None]:
        where = f"data.files {source}" if source else f"data.dataset {data.dataset}"
        for number, row in enumerate(_rows(data, source, where)):
            if column not in row:
                raise InputError(
                    f"{where}: no column {column!r}; expected data.text_column among {', '.join(row)}"
                )
            text = row[column]
            if not isinstance(text, str):
                raise InputError(f"{where}: row {number}: column {column!r} is not text but {text!r:.60}")
            yield text


def _rows(data: Data, file: Path | None, where: str) -> Iterator[dict[str, object]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if file:
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is said below
            opened = datasets.load_dataset(
                READERS[file.suffix], data_files=str(file), split="train", streaming=True
            )
        else:
            opened = datasets.load_dataset(
                data.dataset, name=data.name, revision=data.revision, split=data.split, streaming=True
            )
        if data.text_column in (opened.column_names or []):
            opened = opened.select_columns([data.text_column])
        yield from opened
    except InputError:
        raise
    except Exception as error:  # datasets raises what its readers and its HTTP library raise
        cause = error.__cause__ or error
        message = "it is empty" if isinstance(cause, StopIteration) else first_line(cause)
        if "BuilderConfig" in message:
            message += f" (data.name is {data.name!r}; give --data.name)"
        raise InputError(f"{where}: cannot be read: {(file and _bad_line(file)) or message}") from error


def _bad_line(file: Path) -> str | None:
    """Number of the first line that is no UTF-8, or no JSON object where it should be, and why; none of a .parquet."""
    if READERS[file.suffix] == "parquet":
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                if file.suffix == ".jsonl" and line.strip() and not isinstance(json.loads(text), dict):
                    return f"line {number}: expected a JSON object, found {text.strip()!r:.60}"
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: {error.msg}"
            except UnicodeDecodeError as error:
                return f"line {number}: {error}"
    return None


def is_heldout(text: str, fraction: float, seed: int) -> bool:
    """Decided by the document's own hash, so that a document is in one split whatever else there is."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass
class Packer:
    """Token lists -> contexts [BOS] + T-1 tokens.

    document: each context comes from one document, a remainder shorter than T-1 is dropped.
    concat: documents are joined by the separator token and cut anywhere.
    """

    length: int
    bos: int | None
    separator: int | None
    """None: documents are packed one by one."""
    _carry: list[int] = field(default_factory=list)

    def add(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """The contexts, [T] int32 each, that a document's tokens complete."""
        body = self.length - (self.bos is not None)
        stream = tokens if self.separator is None else [*self._carry, *tokens, self.separator]
        start = 0
        while start + body <= len(stream):
            head = [] if self.bos is None else [self.bos]
            yield np.array(head + stream[start : start + body], np.int32)
            start += body
        self._carry = [] if self.separator is None else stream[start:]


@dataclass(frozen=True)
class Special:
    """The tokens that the packer inserts and the harvest drops."""

    bos: int | None
    separator: int | None
    dropped: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pack: str) -> "Special":
        """A tokenizer's own; raises `InputError` when `pack` is concat and no token can separate documents."""
        bos = _id(tokenizer, tokenizer.bos_token)
        separator = None
        if pack == "concat":
            separator = eos if (eos := _id(tokenizer, tokenizer.eos_token)) is not None else bos
            if separator is None:
                raise InputError(
                    'data.pack: this tokenizer has no separator token; use data.pack = "document"'
                )
        return cls(bos, separator, sorted(set(tokenizer.all_special_ids)))


def _id(tokenizer: PreTrainedTokenizerFast, token: object) -> int | None:
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


class Packed(NamedTuple):
    """What the text pass made of the text."""

    rows: dict[str, int]
    """Split -> kept positions."""
    documents: int
    """Documents read."""
    unused: int
    """Of these, shorter than a context and dropped (data.pack document)."""


def pack_splits(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    special: Special,
    length: int,
    rows: int,
    heldout: Callable[[str], bool],
    emit: Callable[[str, np.ndarray, int], None],
) -> Packed:
    """Tokenise and pack until the train split has `rows` kept positions; `emit(split, context, kept)` each context.

    Train's rows are cut to `rows`. Raises `InputError` when the text ends before.
    """
    packers = {split: Packer(length, special.bos, special.separator) for split in SPLITS}
    kept, documents, unused = dict.fromkeys(SPLITS, 0), 0, 0
    stream = iter(texts)
    while block := list(itertools.islice(stream, DOCUMENTS_AT_ONCE)):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(block, add_special_tokens=False)
        for text, encoding in zip(block, encodings, strict=True):
            split, documents = SPLITS[heldout(text)], documents + 1
            contexts = list(packers[split].add(encoding.ids))
            for context in contexts:
                count = int(kept_mask(context[None], special.dropped).sum())
                kept[split] += count
                emit(split, context, count)
                if kept["train"] >= rows:
                    return Packed({**kept, "train": rows}, documents, unused)
            unused += special.separator is None and not contexts
    joined = "" if special.separator is not None else ", or join short documents (data.pack concat)"
    raise InputError(
        f"harvest.rows: {rows:,} asked for, but the text gives only {kept['train']:,} train rows; "
        f"lower harvest.rows or give more text{joined}"
    )
