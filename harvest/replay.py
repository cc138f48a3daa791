"""The text of a store read again: which document each of its tokens is of, from which file, with which label.

No language model is needed, and of the text only the documents of the split are tokenised.
Shapes: C contexts of T tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.errors import InputError
from common.files import sha256
from common.settings import Data
from harvest.files import Bad, file_rows, found_files
from harvest.text import DOCUMENTS_AT_ONCE, Document, Packer, is_heldout, labelled_documents
from shards.manifest import Source
from shards.text.tokens import ContextTable


class Origins(NamedTuple):
    """Where the tokens of a split come from."""

    document: np.ndarray
    """[C, T] int32 number of each token's document among those of the split, from 0; of an inserted first token that of
    the next one"""
    documents: list[Document]
    """Without their texts."""
    files: list[Path]
    """The local files; none for a dataset of the hub."""


def replay(
    data: Data,
    source: Source,
    split: str,
    contexts: ContextTable,
    tokenizer: Tokenizer,
    chats: PreTrainedTokenizerFast | None = None,
) -> Origins:
    """Read the text of `data` as the store of `source` was harvested from it, up to the split's last context.

    `tokenizer` is the store's, as harvested; `chats` the model's, where the text holds chats. Raises `InputError` where
    it is another text: other files, or other contexts than the store's.
    """
    files = found_files(data).read
    _refuse_other_files(source, [sha256(path) for path in files])
    concat = source.pack == "concat"
    separator = source.separator_token_id if concat else None
    parsed = source.special_tokens == "parse"
    packer = Packer(source.context_length, source.bos_token_id, separator, parsed)
    first = 0 if source.bos_token_id is None else 1
    document, documents, done = np.zeros(contexts.shape, np.int32), list[Document](), 0
    carried = np.empty(0, np.int32)
    for number, (each, tokens) in enumerate(_tokenised(data, source, split, tokenizer, chats)):
        if done == len(contexts):
            break
        documents.append(each._replace(text=""))
        stream = np.concatenate([carried, np.full(len(tokens) + concat, number, np.int32)])
        for context in packer.add(tokens):
            if done < len(contexts):
                _refuse_other_tokens(contexts, done, context, split)
                document[done, first:] = stream[packer.at : packer.at + source.context_length - first]
                done += 1
        carried = stream[len(stream) - packer.carried :]
    if done < len(contexts):
        raise _another_text(f"split {split}: {len(contexts):,} contexts there, {done:,} in this text")
    document[:, :first] = document[:, first : 2 * first]
    return Origins(document, documents, files)


def lacks_column(files: Sequence[Path], column: str) -> str:
    """For an error: which columns the first file has that is without this one; nothing if there is none."""
    for path in files:
        first = next(file_rows(path, column), None)
        if first is not None and isinstance(first.value, Bad):
            return f" ({path}: {first.place}: {first.value.why})".replace("text_column", "label_column")
    return ""


def _tokenised(
    data: Data, source: Source, split: str, tokenizer: Tokenizer, chats: PreTrainedTokenizerFast | None
) -> Iterator[tuple[Document, list[int]]]:
    """The split's documents with their tokens."""
    heldout = split == "heldout"
    texts = labelled_documents(data, chats)
    own = (each for each in texts if is_heldout(each.text, source.heldout_fraction, source.seed) == heldout)
    while block := list(itertools.islice(own, DOCUMENTS_AT_ONCE)):
        encodings = tokenizer.encode_batch_fast([each.text for each in block], add_special_tokens=False)
        yield from zip(block, (encoding.ids for encoding in encodings), strict=True)


def _refuse_other_files(source: Source, digests: list[str]) -> None:
    there = source.files
    same = sorted(there.values()) == sorted(digests) if isinstance(there, dict) else there == digests
    if not same:
        known = [*there.values()] if isinstance(there, dict) else there
        others = sum(each not in known for each in digests)
        raise _another_text(f"files: there {len(known)}, given {len(digests)}, {others} of these are others")


def _refuse_other_tokens(contexts: ContextTable, number: int, context: np.ndarray, split: str) -> None:
    if not np.array_equal(contexts[np.array([number])][0], context):
        raise _another_text(f"context {number:,} of split {split} has other tokens")


def _another_text(why: str) -> InputError:
    return InputError(
        f"data.files: is another text than the store was harvested from ({why}); give the settings of data and the "
        "files of the harvest"
    )
