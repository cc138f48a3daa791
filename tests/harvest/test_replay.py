"""A store's text read again: documents, files and labels of its tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from common.errors import InputError
from common.files import sha256
from common.settings import Data
from harvest.replay import replay
from harvest.text import Packer
from shards.manifest import Source
from shards.store import as_harvested
from tests.fixtures import make_source

TEXTS = {"a.jsonl": ["u v w", "x", "u u u u u u"], "b.jsonl": ["v", "w x u v"]}
LABELS = {"a.jsonl": ["cat", 3, None], "b.jsonl": [True, ""]}
WORDS = ["<s>", "</s>", "u", "v", "w", "x"]


def harvested(
    folder: Path, heldout_fraction: float = 1e-9, **changes: object
) -> tuple[Data, Source, Tokenizer]:
    """Both files as a harvest would be asked for; of a tiny held-out fraction every document is a train document."""
    for name, texts in TEXTS.items():
        lines = ({"text": text, "label": label} for text, label in zip(texts, LABELS[name], strict=True))
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Data(files=tuple(str(folder / name) for name in TEXTS), label_column="label")
    digests = [sha256(folder / name) for name in TEXTS]
    settings = {"context_length": 4, "files": digests, "heldout_fraction": heldout_fraction} | changes
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    return data, make_source(2, 2, 10, **settings), as_harvested(tokenizer)


def packed(source: Source, tokenizer: Tokenizer) -> np.ndarray:
    separator = source.separator_token_id if source.pack == "concat" else None
    packer = Packer(source.context_length, source.bos_token_id, separator)
    texts = [text for texts in TEXTS.values() for text in texts]
    return np.stack(
        [c for text in texts for c in packer.add(tokenizer.encode(text, add_special_tokens=False).ids)]
    )


def test_joined_documents_are_told_apart_across_contexts(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat")
    contexts = packed(source, tokenizer)
    origins = replay(data, source, "train", contexts, tokenizer)
    # u v w | </s> x </s> | u u u | u u u | </s> v </s> | w x u | (v </s> is left)
    assert origins.document.tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [2, 2, 2, 2],
        [2, 2, 2, 2],
        [2, 2, 3, 3],
        [4, 4, 4, 4],
    ]
    assert [(each.file, each.label) for each in origins.documents] == [
        (0, "cat"),
        (0, "3"),
        (0, None),
        (1, "True"),
        (1, None),
    ]
    assert origins.files == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_packed_documents_have_contexts_of_their_own(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="document", separator_token_id=None)
    origins = replay(data, source, "train", packed(source, tokenizer), tokenizer)
    assert origins.document.tolist() == [[0] * 4, [2] * 4, [2] * 4, [4] * 4]


def test_without_a_first_token_every_position_has_its_document(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat", bos_token_id=None)
    origins = replay(data, source, "train", packed(source, tokenizer), tokenizer)
    assert origins.document.tolist() == [[0] * 4, [1, 1, 2, 2], [2] * 4, [2, 3, 3, 4], [4] * 4]


def test_only_the_splits_own_documents_count(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat", heldout_fraction=1 - 1e-9)
    assert len(replay(data, source, "heldout", packed(source, tokenizer), tokenizer).documents) == 5
    with pytest.raises(InputError, match="split train: 6 contexts there, 0 in this text"):
        replay(data, source, "train", packed(source, tokenizer), tokenizer)


def test_another_text_is_refused(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat")
    contexts = packed(source, tokenizer)
    other = contexts.copy()
    other[3, 2] = 5
    with pytest.raises(
        InputError, match=r"^data\.files: is another text .*context 3 of split train has other tok"
    ):
        replay(data, source, "train", other, tokenizer)
    (tmp_path / "b.jsonl").write_text('{"text": "v", "label": 1}\n')
    with pytest.raises(InputError, match=r"files: there 2, given 2, 1 of these are others"):
        replay(data, source, "train", contexts, tokenizer)


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (
            '["a"]',
            r"a\.jsonl: line 1: data\.label_column: expected text or a number in 'label', found \['a'\]",
        ),
        ('{"a": 1}', r"expected text or a number in 'label', found {'a': 1}"),
    ],
)
def test_a_label_is_one_value(tmp_path: Path, label: str, line: str) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat")
    contexts = packed(source, tokenizer)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "u v w", "label": {label}}}\n')
    source = source.model_copy(update={"files": [sha256(tmp_path / name) for name in TEXTS]})
    with pytest.raises(InputError, match=line):
        replay(data, source, "train", contexts, tokenizer)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("1.0", "1"),
        ("1", "1"),
        ("1.5", "1.5"),
        ("NaN", None),
        ('" \\t"', None),
        ('" a"', "a"),
        ("1e400", "inf"),
    ],
)
def test_a_label_is_the_same_however_it_is_written(tmp_path: Path, label: str, expected: str | None) -> None:
    """Programs write 1.0 for 1, and NaN for nothing, where a column has gaps."""
    data, source, tokenizer = harvested(tmp_path, pack="concat")
    contexts = packed(source, tokenizer)
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    lines[0] = f'{{"text": "u v w", "label": {label}}}\n'
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = source.model_copy(update={"files": [sha256(tmp_path / name) for name in TEXTS]})
    origins = replay(data, source, "train", contexts, tokenizer)
    assert origins.documents[0].label == expected


def test_lines_of_plain_text_have_no_labels(tmp_path: Path) -> None:
    data, source, tokenizer = harvested(tmp_path, pack="concat")
    (tmp_path / "a.txt").write_text("u v w\n")
    data = data.model_copy(update={"files": (str(tmp_path / "a.txt"),)})
    source = source.model_copy(update={"files": [sha256(tmp_path / "a.txt")]})
    with pytest.raises(InputError, match=r"^data\.label_column: .*a\.txt has no columns; give \.jsonl"):
        replay(data, source, "train", np.zeros((1, 4), np.int32), tokenizer)
