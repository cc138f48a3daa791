"""An OpenAI-compatible endpoint on loopback, and what may answer behind it."""

# ruff: noqa: N802 - http.server gives the names

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.evaluate.explain.planted import class_of
from tests.servers import Handler, Loopback, serving


class Said(NamedTuple):
    """A response as it goes over the wire."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    seconds: float = 0
    """Before it."""


def completion(text: str | None, finish: str = "stop", **message: Any) -> Said:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }
    return Said(json.dumps(body).encode())


def passages_of(prompt: str) -> list[str]:
    return re.findall(r"^\d+: (.*)$", prompt, re.MULTILINE)


def words_of(text: str) -> list[str]:
    return re.sub(r"<<|>>", " ", text).split()


def kind_of(prompt: str) -> str:
    if "EXPLANATION:" in prompt:
        return "explanation"
    return "fuzzing" if "marked with <<" in prompt else "detection"


def oracle(prompt: str) -> str:
    """Knows which latent is which word: it tells from the marked words, and judges by the words themselves."""
    kind = kind_of(prompt)
    marked = [words_of(" ".join(re.findall(r"<<(.*?)>>", each))) for each in passages_of(prompt)]
    if kind == "explanation":
        (latent,) = {class_of(word) for words in marked for word in words}
        return f"They are alike.\n**EXPLANATION:** words of class {latent}"
    latent = int(re.findall(r"words of class (\d+)", prompt)[0])
    if kind == "fuzzing":
        right = [bool(words) and all(class_of(word) == latent for word in words) for words in marked]
    else:
        right = [latent in map(class_of, words_of(each)) for each in passages_of(prompt)]
    return json.dumps([int(each) for each in right])


def guesser(prompt: str) -> str:
    """Explains nothing, and tosses a coin for each passage."""
    if kind_of(prompt) == "explanation":
        return "EXPLANATION: something"
    tossed = [hashlib.sha256(each.encode()).digest()[0] & 1 for each in passages_of(prompt)]
    return f"I guess: {tossed}"


def yes(prompt: str) -> str:
    return (
        "EXPLANATION: any text" if kind_of(prompt) == "explanation" else str([1] * len(passages_of(prompt)))
    )


Answers = Callable[[str, int], Said]
"""Prompt and number of the request, from 0 -> response."""


def by(answers: Callable[[str], str]) -> Answers:
    return lambda prompt, _: completion(answers(prompt))


class Server(Loopback):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: Answers = by(oracle)
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = Lock()
        self.at_once, self.most_at_once = 0, 0

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    @property
    def prompts(self) -> list[str]:
        return [each["messages"][0]["content"] for each in self.asked]

    def handle_error(self, *_: Any) -> None:
        """A client that went away."""


class _Handler(Handler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            found = self.path == "/v1/chat/completions"
            said = self.server.answers(body["messages"][0]["content"], number) if found else Said(b"{}", 404)
            time.sleep(said.seconds)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        self.send(said.status, said.body, {"Content-Type": "application/json"} | dict(said.headers))


def running() -> AbstractContextManager[Server]:
    return serving(Server())
