"""Token text of the four families of tokenizers, built in the process."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import InputError
from common.tokens import TokenText
from shards.store import read_tokenizer

TEXT = "Größe naïve 日本語 🙂🙃 <script>alert(1)</script> it's\n\tdone العربية"


def byte_level(merges_from: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(merges_from, trainer)
    return tokenizer


def test_byte_level_text_comes_back_whole() -> None:
    tokenizer = byte_level(["it is done it is"])
    text = TokenText(tokenizer)
    ids = tokenizer.encode(TEXT).ids
    pieces = text.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXT
    assert "" in pieces
    assert b"".join(text.bytes_of(token) for token in ids) == TEXT.encode()
    assert text.size == tokenizer.get_vocab_size()


def test_a_split_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = byte_level(["a"])
    text = TokenText(tokenizer)
    ids = tokenizer.encode("a🙂b").ids
    assert text.pieces(ids) == ["a", "", "", "", "🙂", "b"]
    assert text.pieces(ids[:3]) == ["a", "", "\ufffd"]
    assert text.pieces(ids[3:])[-1] == "b"
    assert [text.label(token) for token in ids[:3]] == ["a", "<F0>", "<9F>"]
    assert text.pieces([]) == []


def test_added_tokens_are_their_own_text() -> None:
    tokenizer = byte_level(["a"])
    tokenizer.add_special_tokens(["<|ünd|>"])
    text = TokenText(tokenizer)
    assert text.label(tokenizer.token_to_id("<|ünd|>")) == "<|ünd|>"
    assert text.label(tokenizer.token_to_id("<s>")) == "<s>"
    assert text.label(10**6) == "<unknown token 1000000>"


def test_sentencepiece_spaces_and_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "▁it": 1, "s": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "▁": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    text = TokenText(tokenizer)
    assert text.pieces([1, 2, 6, 3, 4, 5]) == [" it", "s", " ", "", "", "€"]
    assert text.label(4) == "<82>"


def test_wordpiece_and_plain_words() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    assert TokenText(wordpiece).pieces([1, 2]) == [" play", "ing"]
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert TokenText(words).pieces([1, 0]) == [" b", " a"]


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer") as error:
        read_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)
