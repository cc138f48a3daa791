import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.settings import Data
from harvest.lm import load_tokenizer
from harvest.text import Packed, Packer, Special, documents, is_heldout, pack_splits
from shards.layout import kept_mask
from tests.models import save_tokenizer, sentences, write_jsonl


def pack(packer: Packer, *token_lists: list[int]) -> list[list[int]]:
    return [context.tolist() for tokens in token_lists for context in packer.add(tokens)]


def test_document_packing_drops_remainders() -> None:
    packed = pack(Packer(4, bos=0, separator=None), [5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15])
    assert packed == [[0, 5, 6, 7], [0, 10, 11, 12], [0, 13, 14, 15]]


def test_concat_packing_joins_with_the_separator() -> None:
    packed = pack(Packer(4, bos=0, separator=1), [5, 6, 7, 8], [], [9, 10])
    assert packed == [[0, 5, 6, 7], [0, 8, 1, 1], [0, 9, 10, 1]]


def test_a_texts_own_bos_gives_way_to_the_contexts() -> None:
    """Where a context begins with it; elsewhere it is a token of the text (SmolLM2's begins every turn of a chat)."""
    documents = ([0, 5, 0, 6], [0, 7, 8])
    assert pack(Packer(3, 0, separator=1, parsed=True), *documents) == [[0, 5, 0], [0, 6, 1], [0, 7, 8]]
    assert pack(Packer(3, 0, separator=1), *documents) == [[0, 0, 5], [0, 0, 6], [0, 1, 0], [0, 7, 8]]
    assert pack(Packer(3, 0, separator=None, parsed=True), *documents) == [[0, 5, 0], [0, 7, 8]]


def test_without_a_bos_token() -> None:
    assert pack(Packer(3, bos=None, separator=None), [5, 6, 7, 8, 9, 10, 11]) == [[5, 6, 7], [8, 9, 10]]


def test_kept_positions() -> None:
    contexts = np.array([[0, 5, 1, 6], [7, 7, 2, 0]], np.int32)
    assert kept_mask(contexts, [0, 1, 2]).tolist() == [
        [False, True, False, True],
        [False, True, False, False],
    ]


def test_the_split_is_the_documents_own() -> None:
    texts = sentences(4000)
    heldout = [is_heldout(text, 0.1, seed=0) for text in texts]
    assert 0.08 < np.mean(heldout) < 0.12
    assert heldout == [is_heldout(text, 0.1, seed=0) for text in texts]
    assert heldout != [is_heldout(text, 0.1, seed=1) for text in texts]


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    ids = tokenizer.backend_tokenizer.encode("red <eos> blue <bos>", add_special_tokens=False).ids
    assert not {0, 1, 2} & set(ids)
    special = Special.of(tokenizer, "concat")
    assert (special.bos, special.separator, special.dropped) == (0, 1, [0, 1, 2])


def test_no_document_is_in_both_splits(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    texts = [f"{text} " * 5 for text in sentences(100)]
    splits: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    kept = {"train": 0, "heldout": 0}

    def emit(split: str, context: np.ndarray, count: int) -> None:
        splits[split].append(context)
        kept[split] += count

    def heldout(text: str) -> bool:
        return is_heldout(text, 0.3, 0)

    rows = pack_splits(texts, tokenizer, Special.of(tokenizer, "concat"), 32, 4000, heldout, emit).rows
    assert rows["train"] == 4000 <= kept["train"] < 4000 + 31
    assert rows["heldout"] == kept["heldout"] > 0
    backend = tokenizer.backend_tokenizer
    numbers = {
        split: {
            int(word[:-1])
            for word in backend.decode(np.concatenate(contexts).tolist()).split()
            if word[:-1].isdigit()
        }
        for split, contexts in splits.items()
    }
    allowed = {
        split: {i for i, text in enumerate(texts) if heldout(text) == (split == "heldout")}
        for split in splits
    }
    whole = {split: {n for n in numbers[split] if n >= 10} for split in splits}  # a cut may shorten a number
    assert whole["train"] <= allowed["train"]
    assert whole["heldout"] <= allowed["heldout"]
    assert whole["train"]


def test_too_little_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    with pytest.raises(
        InputError, match=r"harvest\.rows: 99,999 requested, but the text gives only [\d,]+ train rows"
    ):
        pack_splits(
            sentences(5),
            tokenizer,
            Special.of(tokenizer, "concat"),
            32,
            99_999,
            lambda text: False,
            lambda *a: None,
        )


def test_documents_shorter_than_a_context_are_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    texts = ["a", *["the red river sings " * 9] * 3, "a b"]

    def packed(pack: str) -> Packed:
        return pack_splits(
            texts, tokenizer, Special.of(tokenizer, pack), 8, 70, lambda _: False, lambda *_: None
        )

    assert packed("document") == ({"train": 70, "heldout": 0}, 3, 1)
    assert packed("concat").unused == 0


def test_documents_in_order(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "b.jsonl", ["one", "two", ""])
    second = tmp_path / "a.txt"
    second.write_text("three\nfour\n", encoding="utf-8")
    assert list(documents(Data(files=(str(first), str(second))))) == ["one", "two", "", "three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": \n',
            "a.jsonl: line 2: not valid JSON: Expecting value at character 10",
        ),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "a.jsonl: line 1: no column 'text'; expected data.text_column among body",
        ),
        ("a.jsonl", json.dumps({"text": 3}) + "\n", "a.jsonl: line 1: column 'text' is not text but 3"),
        (
            "a.tsv",
            "text\nx\n",
            "a.tsv: expected .jsonl, .json, .csv, .txt (these also as .gz or .zst) or .parquet, found",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, line: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as stopped:
        list(documents(Data(files=(str(tmp_path / name),))))
    assert line in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_missing_files_and_datasets() -> None:
    with pytest.raises(InputError, match=r"data\.files: no such file /nowhere\.jsonl"):
        list(documents(Data(files=("/nowhere.jsonl",))))
    with pytest.raises(InputError, match=r"data\.dataset nobody/nothing: cannot be read"):
        list(documents(Data(dataset="nobody/nothing")))
