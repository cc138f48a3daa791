"""Dataset -> documents -> token contexts of both splits. Comes before the model, runs once per harvest.

Shapes: C contexts, T tokens of a context.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.errors import ENVIRONMENT, InputError, first_line
from common.settings import Data
from harvest.files import Bad, Row, file_rows, found_files, kind_of, not_unicode, pick
from shards.layout import kept_mask
from shards.manifest import SPLITS

DOCUMENTS_AT_ONCE = 256
TODAY = datetime(2024, 7, 26)
"""What a chat template that asks gets for today's date (Llama's own default): a harvest does not depend on its day."""
DATES = ("-d", "-m", "-I", "-H", *"aAbBcdFHIjmMpSTuUVwWxXyYzZ")
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in DATES)
    + " }}{% endmacro +%}"
)
"""Before a template: strftime_now is a function of its own then, in place of transformers' (which takes no other)."""


# -- documents -----------------------------------------------------------------------------------------


@dataclass
class RowCounts:
    """Rows of the text that were not simply text."""

    chats: int = 0
    """Made text by the chat template."""
    skipped: int = 0
    """That gave no text, under data.on_bad_row skip."""
    first_skipped: str = ""
    """Where the first of these was, and what was wrong with it."""


class Document(NamedTuple):
    text: str
    file: int
    """Number of its file, in the order of reading; 0 for a dataset of the hub."""
    label: str | None
    """What data.label_column has of it; None: nothing, or no such column was asked for."""


def documents(
    data: Data, tokenizer: PreTrainedTokenizerFast | None = None, counts: RowCounts | None = None
) -> Iterator[str]:
    """Texts in the dataset's own order; a line of a .txt file is a document. Chats and bad rows are counted.

    Raises `InputError` when the dataset cannot be opened or read, or has no such column: another dataset is
    never a silent fallback. So does a bad row, where data.on_bad_row is stop or where a file has no other.
    """
    unlabelled = data.model_copy(update={"label_column": None})  # a harvest needs no labels
    return (each.text for each in labelled_documents(unlabelled, tokenizer, counts))


def labelled_documents(
    data: Data, tokenizer: PreTrainedTokenizerFast | None = None, counts: RowCounts | None = None
) -> Iterator[Document]:
    """What `documents` gives, with file and label; raises what that does, and for a label that is no plain value."""
    counts = counts or RowCounts()
    files = found_files(data).read
    none = True
    for number, source in enumerate(files or [None]):
        where = f"data.files {source}" if source else f"data.dataset {data.dataset}"
        kind = kind_of(source) if source else None
        rows, good = 0, False
        labels = _labels(data, source, where)
        for rows, row in enumerate(_read_rows(data, source, where), 1):  # noqa: B007
            text, label = _text(row.value, kind, data, tokenizer, counts), next(labels, None)
            if not isinstance(text, Bad):
                none, good = False, True
                yield Document(text, number, label)
                continue
            why = f"{where}: {row.place}: {text.why}"
            if data.on_bad_row == "stop":
                raise InputError(f"{why}; data.on_bad_row skip leaves such rows out" if good else why)
            counts.skipped, counts.first_skipped = counts.skipped + 1, counts.first_skipped or why
        if rows and not good:
            raise InputError(f"all {rows:,} rows are bad; the first: {counts.first_skipped}")
        if not rows and (not source or str(source) in map(str, map(Path, data.files))):
            raise InputError(f"{where}: is empty")
    if none:
        raise InputError(f"data.files {', '.join(data.files)}: all files are empty")


def _labels(data: Data, file: Path | None, where: str) -> Iterator[str | None]:
    """The label of every row of a file, beside its text: the file is read twice at once."""
    if data.label_column is None:
        return
    if file and kind_of(file) == ".txt":
        raise InputError(
            f"data.label_column: {file} has no columns; give .jsonl, .json, .csv or .parquet files"
        )
    column = data.model_copy(update={"text_column": data.label_column})
    rows = _read_rows(column, file, where)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except InputError as error:
            raise InputError(str(error).replace("data.text_column", "data.label_column")) from error
        yield _label(row, data.label_column, where)


def _label(row: Row, column: str, where: str) -> str | None:
    """A row without the column, or with nothing in it (NaN, in a table with gaps), has no label.

    A whole number is one label however it is written: tables with gaps make 1.0 of 1.
    """
    value = row.value.strip() if isinstance(row.value, str) else row.value
    if value is None or isinstance(value, Bad) or value == "" or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise InputError(
            f"{where}: {row.place}: data.label_column: expected text or a number in {column!r}, found {value!r:.60}"
        )
    return str(value)


def _text(
    value: object, kind: str | None, data: Data, tokenizer: PreTrainedTokenizerFast | None, counts: RowCounts
) -> str | Bad:
    """A row's text; of a chat, what the model's template makes of it. `kind` of file: a .txt has no columns."""
    if isinstance(value, Bad):
        return value
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        value = _chat(value, data, tokenizer)
        if isinstance(value, Bad):
            return value
        counts.chats += 1
    if not isinstance(value, str):
        chat = ", nor a chat of role and content," if isinstance(value, list) and value != [] else ""
        return Bad(
            f"column {data.text_column!r} is not text{chat} but {'null' if value is None else f'{value!r:.60}'}"
        )
    if why := not_unicode(value, kind):
        return Bad(why if kind == ".txt" else f"column {data.text_column!r}: {why}")
    return value


def _chat(messages: list[dict[str, Any]], data: Data, tokenizer: PreTrainedTokenizerFast | None) -> str | Bad:
    column = f"column {data.text_column!r}"
    if data.special_tokens != "parse":
        raise InputError(
            f"data.text_column: {data.text_column} holds chats, whose template writes special tokens; "
            'give data.special_tokens = "parse"'
        )
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            f"data.text_column: {data.text_column} holds chats, but this model's tokenizer has no chat template; "
            "give another column, or a model that is trained on chats"
        )
    # A .parquet gives every message the keys of all, None where it has none of its own; templates ask for the key.
    chat = [{key: value for key, value in each.items() if value is not None} for each in messages]
    if empty := [each for each in chat if not each.keys() & {"content", "tool_calls"}]:
        return Bad(f"{column}: a message of role {empty[0]['role']!r:.20} has no content")
    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        return Bad(f"{column}: the chat template refuses it: {first_line(error)}")
    return str(text)


def _read_rows(data: Data, file: Path | None, where: str) -> Iterator[Row]:
    try:
        yield from file_rows(file, data.text_column) if file else _hub_rows(data)
    except InputError:
        raise
    except Exception as error:  # readers and the HTTP library raise whatever a bad file makes them
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise
        cause = error if file else error.__cause__ or error
        if isinstance(cause, StopIteration):
            raise InputError(f"{where}: is empty") from error
        message = first_line(cause)
        if "BuilderConfig" in message:
            message += f" (data.name is {data.name!r}; give --data.name)"
        if "too much memory for decoding" in message:
            message += "; unpack it before (zstd -d --long=31)"
        if "cast" in message.lower():
            message += (
                "; download its files and give them as data.files: of these only data.text_column is read"
            )
        raise InputError(f"{where}: cannot be read: {message}") from error


def _hub_rows(data: Data) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    opened = datasets.load_dataset(
        data.dataset, name=data.name, revision=data.revision, split=data.split, streaming=True
    )
    for name in (data.text_column, data.text_column.split(".")[0]):
        if name in (opened.column_names or []):
            opened = opened.select_columns([name])
            break
    for number, row in enumerate(opened):
        value = pick(row, data.text_column)
        if number == 0 and isinstance(value, Bad):
            raise InputError(f"data.dataset {data.dataset}: {value.why}")
        yield Row(f"row {number}", value)


class SpecialStrings:
    """Documents that hold, as plain characters, what the tokenizer has a special token for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        words = sorted({*tokenizer.all_special_tokens, *_special(tokenizer).values()})
        self._names = re.compile("|".join(re.escape(word) for word in words if word) or "(?!)")
        self.read, self.documents = 0, 0
        self.first = ""

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts, counted as they pass."""
        for self.read, text in enumerate(texts, 1):
            if match := self._names.search(text):
                self.documents, self.first = self.documents + 1, self.first or match[0]
            yield text


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Every token that a tokenizer marks as special; more than transformers' list, which has the named ones."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


# -- contexts ------------------------------------------------------------------------------------------


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
    parsed: bool = False
    """A text may have a BOS of its own, as chat templates write it: no context begins with two."""
    at: int = 0
    """Where the last context begins in what was carried over and the document's own tokens after it."""
    _carry: list[int] = field(default_factory=list)

    @property
    def carried(self) -> int:
        """Tokens that are left for the next document's context."""
        return len(self._carry)

    def add(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """The contexts, [T] int32 each, that a document's tokens complete."""
        body = self.length - (self.bos is not None)
        stream = tokens if self.separator is None else [*self._carry, *tokens, self.separator]
        start = 0
        while start + body <= len(stream):
            if self.parsed and stream[start] == self.bos:
                start += 1
                continue
            head = [] if self.bos is None else [self.bos]
            self.at = start
            yield np.array(head + stream[start : start + body], np.int32)
            start += body
        self._carry = [] if self.separator is None else stream[start:]


@dataclass(frozen=True)
class Special:
    """The tokens that the packer inserts and the harvest drops."""

    bos: int | None
    separator: int | None
    dropped: list[int]
    parsed: bool = False
    """Whether special tokens in the text are tokens."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, pack: str, parsed: bool = False) -> "Special":
        """A tokenizer's own; raises `InputError` when `pack` is concat and no token can separate documents.

        `parsed`: special tokens are parsed in the text, and all that can occur there are dropped.
        """
        bos = _id(tokenizer, tokenizer.bos_token)
        separator = None
        if pack == "concat":
            separator = eos if (eos := _id(tokenizer, tokenizer.eos_token)) is not None else bos
            if separator is None:
                raise InputError(
                    'data.pack: this tokenizer has no separator token; use data.pack = "document"'
                )
        dropped = {*tokenizer.all_special_ids, *(_special(tokenizer) if parsed else ())}
        return cls(bos, separator, sorted(dropped), parsed)


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
    packers = {s: Packer(length, special.bos, special.separator, special.parsed) for s in SPLITS}
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
        f"harvest.rows: {rows:,} requested, but the text gives only {kept['train']:,} train rows; "
        f"lower harvest.rows or give more text{joined}"
    )
