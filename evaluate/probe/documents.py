"""Which document each token of a split is of, what is known of it, and whether it is for fitting or for testing.

Shapes: C contexts of T tokens, D documents.
"""

import hashlib
import json
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.errors import InputError, shown
from common.settings import Settings
from evaluate.probe.classes import UNASKED
from evaluate.probe.rows import by_separator, by_stretch, separated
from shards import Store
from shards.store import StoreSplit, as_harvested, read_tokenizer

How = Literal["text", "separators", "stretches"]
LEAST = 10
"""Documents, for an accuracy to have an error."""
TEST = 0.3
"""Share of the documents that probes are tested on."""


class Documents(NamedTuple):
    """The documents of a split."""

    of: np.ndarray
    """[C, T] int32 number of each token's document"""
    how: How
    """How they were told apart: `ProbesProvenance.documents`."""
    sources: tuple[list[str], np.ndarray] | None
    """(names of files, [D] number of each document's file); None: one file, or not known."""
    labels: tuple[list[str], np.ndarray] | None
    """(labels in their order, [D] number of each document's label, UNASKED without one); None: none were asked for."""
    sources_unknown: str | None
    """Why it is not known which file a document is of, where there are several."""

    @property
    def labels_sha256(self) -> str | None:
        """Digest of the labels."""
        if self.labels is None:
            return None
        return hashlib.sha256(json.dumps([self.labels[0], self.labels[1].tolist()]).encode()).hexdigest()


def documents_of(settings: Settings, store: Store, split: StoreSplit, name: str) -> Documents:
    """By reading the text again where labels are asked for or it has several files; raises `InputError` where it is not
    there for labels. Otherwise, and where the files are not there any more, by the separating token, or by stretches.
    """
    source, why = store.manifest.source, None
    if (
        settings.data.label_column is not None
        or len(source.files) > 1
        or (source.files and not separated(source))
    ):
        try:
            return _read_again(settings, store, split, name)
        except InputError as error:
            if settings.data.label_column is not None:
                raise
            why = str(error)
    why = why if len(source.files) > 1 else None
    if not separated(source):
        return Documents(by_stretch(split.contexts.shape), "stretches", None, None, why)
    return Documents(by_separator(split.contexts, source), "separators", None, None, why)


def _read_again(settings: Settings, store: Store, split: StoreSplit, name: str) -> Documents:
    from harvest.replay import lacks_column, replay

    source, column = store.manifest.source, settings.data.label_column
    tokenizer = as_harvested(read_tokenizer(store.tokenizer_path), source.special_tokens)
    origins = replay(settings.data, source, name, split.contexts, tokenizer, _chats(settings, store))
    file = np.array([each.file for each in origins.documents])
    short = [path.name for path in origins.files]
    names = short if len(set(short)) == len(short) else [*map(str, origins.files)]
    sources = (names, file) if len(set(file.tolist())) > 1 else None
    if column is None:
        return Documents(origins.document, "text", sources, None, None)
    found = [each.label for each in origins.documents]
    labels = sorted({each for each in found if each is not None})
    if len(labels) < 2:
        told = shown(labels[0]) if labels else f"none{lacks_column(origins.files, column)}"
        raise InputError(
            f"data.label_column: {column}: expected at least two labels among the {len(found):,} documents of split "
            f"{name}, found {told}"
        )
    numbers = {each: number for number, each in enumerate(labels)}
    label = np.array([UNASKED if each is None else numbers[each] for each in found])
    return Documents(origins.document, "text", sources, (labels, label), None)


def _chats(settings: Settings, store: Store) -> PreTrainedTokenizerFast | None:
    """The model's tokenizer, whose template made texts of chats; none for a text without chats."""
    if store.manifest.source.chat_template_sha256 is None:
        return None
    from harvest import lm

    return lm.load_tokenizer(lm.locate(settings.model), settings.model.revision)


class Sides(NamedTuple):
    """[D] bool each; no document is on both."""

    train: np.ndarray
    test: np.ndarray


def sides(there: np.ndarray, how: How) -> Sides:
    """Which documents probes are fitted on, and tested on; `there` [D] bool: those that have rows.

    Documents are drawn. Of stretches the last ones are tested on, and the one before them is left out: a document may
    reach into the next stretch. Raises `InputError` for too few.
    """
    numbers = np.flatnonzero(there)
    if len(numbers) < LEAST:
        raise InputError(
            f"probes: expected rows of at least {LEAST} documents, some to fit on and others to test on, found "
            f"{len(numbers)}; harvest more text, or raise harvest.heldout_fraction"
        )
    n_test = round(TEST * len(numbers))
    if how == "stretches":
        test, train = numbers[-n_test:], numbers[: -n_test - 1]
    else:
        drawn = np.random.default_rng(0).permutation(numbers)
        test, train = drawn[:n_test], drawn[n_test:]
    found = Sides(*(np.zeros(len(there), bool) for _ in range(2)))
    found.train[train], found.test[test] = True, True
    return found
