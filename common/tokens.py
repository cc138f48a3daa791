"""Token ids as text, through the tokenizer that made them; right for bytes and split characters.

Not `tokenizers.decoders.DecodeStream`: it gives bytes that never become a character to the token after them, and
raises an error where a sentencepiece character is cut.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import NotRequired, TypedDict

from tokenizers import Tokenizer


def _byte_level_table() -> dict[str, int]:
    """The printable stand-ins of byte-level pieces: visible Latin-1 stays, the rest is moved above 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_level_table()
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PART = "·"
"""Shown for a token without text of its own: a part of the character that follows."""


def printable(text: str) -> str:
    """The text in one line, escapes for what a terminal would obey: text of the web may hold its commands.

    >>> printable("a\\tb\\x1b[2J é")
    'a\\\\tb\\\\x1b[2J é'
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class TokenText:
    """The text of tokens. What a piece means is read off the tokenizer's decoder, not off its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spec = json.loads(self._tokenizer.to_str())
        self._added = {token["id"]: token["content"] for token in spec.get("added_tokens") or ()}
        self._to_bytes = _piece_decoder(_decoder_types(spec.get("decoder")))
        self._known: dict[int, bytes] = {}
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes that the token adds to a text; possibly a part of a character only."""
        data = self._known.get(token)
        if data is None:
            data = self._known[token] = self._look_up(token)
        return data

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        return f"<unknown token {token}>".encode() if piece is None else self._to_bytes(piece)

    def label(self, token: int) -> str:
        """The token alone: its text, or its bytes in hexadecimal where they are no whole characters."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in data)

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Text of each token of a running text. A character split over tokens is given to the one that
        completes it, and the others are empty; bytes that never become a character are U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.bytes_of(token)) for token in tokens]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts


class _Decoder(TypedDict):
    """The decoder in a tokenizer.json, as far as it is read."""

    type: str
    decoders: NotRequired[list["_Decoder"]]


def _decoder_types(decoder: _Decoder | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", ())))


def _piece_decoder(types: set[str]) -> Callable[[str], bytes]:
    if "ByteLevel" in types:
        return lambda piece: b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in piece)
    if "WordPiece" in types:
        return lambda piece: piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()
    if types & {"Metaspace", "ByteFallback", "Replace"}:
        return _sentencepiece
    return lambda piece: b" " + piece.encode()  # no decoder: tokens are words


def _sentencepiece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
