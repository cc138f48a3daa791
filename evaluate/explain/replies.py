"""Every prompt and reply, as JSON lines: appended and flushed to disk one by one, so that a kill loses none."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from common.errors import InputError
from common.files import flush, make_folder
from evaluate.explain.prompts import Kind
from evaluate.records import Record

FILE = "replies.jsonl"


class Reply(Record):
    """A line of replies.jsonl."""

    key: str
    """sha256 of what decides the reply: model, prompt, temperature and limit; the same request is not sent again"""
    kind: Kind
    """explanation, detection or fuzzing"""
    latent: int
    """its number"""
    prompt: str
    """what was sent"""
    truth: tuple[bool, ...] = ()
    """what is right for each passage of the prompt; empty for an explanation"""
    passages: tuple[str, ...] = ()
    """what each is: the latent "fires"; its marks were "moved"; an "other" latent fires; "random" text without it"""
    reply: str | None
    """text of the answer; null where there was none"""
    error: str | None
    """why there was none; the same command asks again"""
    finish: str | None
    """why the model stopped, as the endpoint says: stop, length, ..."""
    tokens_in: int | None
    """tokens of the prompt, as the endpoint counts them"""
    tokens_out: int | None
    """tokens of the answer"""
    endpoint: str
    """address that was asked"""


def key_of(model: str, prompt: str, temperature: float | None, max_tokens: int | None) -> str:
    """What the reply to a request is kept under."""
    asked = json.dumps([model, prompt, temperature, max_tokens])
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()


class Replies:
    """The replies in a file: those that are there, and new ones as they come."""

    def __init__(self, path: Path) -> None:
        """Read the file; a last line that a kill cut short is removed from it.

        Raises `InputError` naming any other line that is damaged.
        """
        self.path = path
        self._known: dict[str, Reply] = {}
        size = 0
        for number, line in enumerate(_lines(path), 1):
            if not line.endswith(b"\n"):
                with path.open("r+b") as file:
                    file.truncate(size)
                break
            size += len(line)
            try:
                reply = Reply.model_validate_json(line)
            except ValidationError as error:
                raise InputError(
                    f"{path}: line {number} is damaged ({error.errors()[0]['msg']}); remove that line"
                ) from error
            self._known[reply.key] = reply

    def __getitem__(self, key: str) -> Reply | None:
        """The answer to a request, if there is one; the newest where it was asked several times."""
        found = self._known.get(key)
        return found if found is not None and found.reply is not None else None

    def endpoints(self, keys: Iterator[str]) -> dict[str, int]:
        """How many of the answers to these requests are of which endpoint."""
        counts: dict[str, int] = {}
        for reply in filter(None, (self[key] for key in keys)):
            counts[reply.endpoint] = counts.get(reply.endpoint, 0) + 1
        return counts

    def answered(self, address: str) -> bool:
        """Whether this endpoint has answered any request, in this run or an earlier one."""
        return any(each.reply is not None and each.endpoint == address for each in self._known.values())

    def add(self, reply: Reply) -> None:
        """Keep a reply: it is on the disk when this returns."""
        make_folder(self.path.parent)
        with self.path.open("ab") as file:
            file.write((json.dumps(reply.written(), ensure_ascii=False) + "\n").encode())
        flush(self.path)
        self._known[reply.key] = reply


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file
