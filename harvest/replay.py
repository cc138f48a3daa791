"""The text of a store read again: which document each of its tokens is of, from which file, with which label.

No language model is needed, and of the text only the documents of the split are tokenised.
Shapes: C contexts of T tokens.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.errors import InputError
from common.files import sha256
from common.settings import Data
from harvest.files import found_files
from harvest.text import DOCUMENTS_AT_ONCE, Document, Packer, is_heldout, labelled_documents
from shards.manifest import Source
from shards.text.tokens import ContextTable


class Origins(NamedTuple):
    """Where the tokens of a split come from."""

    document: np.ndarray
    """[C, T] int32 number of each token's document among those of the split, from 0; of an inserted first token that of
    the next one"""
    files: list[str]
    """Names of the files, or the dataset's."""
    file: np.ndarray
    """[documents] int32, by number in `files`"""
    label: list[str | None]
    """Of each document; None where it has none, or no column was asked for."""


def replay(
    data: Data,
    source: Source,
    split: str,
    contexts: ContextTable,
    tokenizer: Tokenizer,
    chats: PreTrainedTokenizerFast | None = None,
) -> Origins:
    """Read the text of `data` as the store of `source` was harvested from it, up to the split's last context.

    `tokenizer` is the store's own, `chats` the model's where the text holds chats. Raises `InputError` where it is
    another text: other files, or other contexts than the store's.
    """
    paths = found_files(data).read
    _refuse_other_files(source, [sha256(path) for path in paths])
    packer = Packer(
        source.context_length, source.bos_token_id, source.separator_token_id, source.special_tokens == "parse"
    )
    document = np.zeros(contexts.shape, np.int32)
    file, labels, done = list[int](), list[str | None](), 0
    for number, (each, tokens) in enumerate(_tokenised(data, source, split, tokenizer, chats)):
        file.append(each.file)
        labels.append(each.label)
        before = packer.carried
        for context, carried in packer.cut(tokens):
            if done == len(contexts):
                break
            if not np.array_equal(contexts[np.array([done])][0], context):
                raise InputError(_another_text(f"context {done} of split {split} holds other tokens"))
            first = source.context_length - len(context[source.bos_token_id is not None :])
            raise NotImplementedError(first, before, carried, number)
    return Origins(document, [path.name for path in paths], np.asarray(file), labels)
