"""An OpenAI-compatible endpoint: who it is, requests to it side by side, what its replies hold. Imports no torch."""

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from common.errors import InputError, shown
from common.tokens import printable

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

OPENAI = "https://api.openai.com/v1"
FIRST_FAILURES, FAILURES = 5, 20
"""Requests that fail in a row, while none was ever answered and later: then the stage stops, others would fail too."""
OWN_STATUS = (400, 413, 422)
"""HTTP statuses of a request that a server will not have, as content filters do; others may be answered."""
FIRST_RETRIES = 2
"""Tries again, at most, of a request before one was answered: an address that is wrong is told soon."""
LONGEST_WAIT = 120
"""Seconds that a server may ask to be left alone for (Retry-After): the client's own limit."""
NO_ANSWER = "no text in the answer"


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how they are made."""

    model: str
    base_url: str
    key: str = field(repr=False)
    timeout: float
    """Seconds without an answer."""
    retries: int
    temperature: float | None
    """None: the server's own."""
    max_tokens: int | None
    """Of an answer; None: no limit of ours."""

    @property
    def local(self) -> bool:
        """Whether what is sent stays on this machine, as far as the address says."""
        return urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")

    def without_key(self, text: str) -> str:
        """What a server said, without the key: some repeat it in an error, and everything said is kept in a file."""
        clean = text.encode("utf-8", "replace").decode()
        return clean.replace(self.key, "[key]") if len(self.key) >= LEAST_KEY else clean


LEAST_KEY = 8
"""Characters from which on a key is no word of a text."""


class Answer(NamedTuple):
    """What came of one request."""

    text: str | None
    error: str | None
    finish: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    own: bool = False
    """Whether it failed for what was asked (a filter, a limit), and not because the server cannot answer."""


def _text_of(content: Any) -> Any:
    """Of parts, as some servers have it, those that are text: others are what a model thought before."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


class _Message(BaseModel):
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: Any = None


class _Completion(BaseModel):
    """The part of a chat completion that is read. What is beside the text decides nothing, so it may be anything."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None

    def counted(self) -> tuple[str | None, int | None, int | None]:
        """Why the model stopped; tokens in and out. None for what the server does not say as it should."""
        finish, usage = self.choices[0].finish_reason, self.usage if isinstance(self.usage, dict) else {}
        counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
        tokens_in, tokens_out = (n if type(n) is int and 0 <= n < 1 << 53 else None for n in counts)
        return finish if isinstance(finish, str) else None, tokens_in, tokens_out


def endpoint_of(
    model: str | None,
    base_url: str | None,
    key_variable: str,
    timeout: float,
    retries: int,
    temperature: float | None,
    max_tokens: int | None,
    sends: bool = True,
) -> Endpoint:
    """From options, else from OPENAI_MODEL and OPENAI_BASE_URL; the key from the variable of that name.

    `sends`: whether anything is to be asked. Raises `InputError` where there is no model, no address, or then no key
    for OpenAI's own endpoint.
    """
    model = model or os.environ.get("OPENAI_MODEL", "")
    if not model.strip():
        raise InputError(
            "model: expected the language model that explains, found none; give MODEL=... (--model)"
        )
    if not model.strip().isprintable():
        raise InputError(f"model: expected a name of printable characters, found {shown(model)}")
    address = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not address.isprintable():
        raise InputError(
            f"base_url: expected an address such as http://localhost:8000/v1, found {_safe(address)}; give --base-url "
            "or OPENAI_BASE_URL"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"base_url: {parts.scheme}://{host}: is written beside the explanations, so it must hold no user, password "
            f"or query; give the key in the environment ({key_variable})"
        )
    key = os.environ.get(key_variable, "").strip()
    if sends and not key and host == urlsplit(OPENAI).hostname:
        raise InputError(
            f"{key_variable}: not set; give OpenAI's key in the environment, or the address of another endpoint "
            "(--base-url)"
        )
    if not key.isprintable() or not key.isascii():
        raise InputError(f"{key_variable}: expected a key of printable ASCII characters")
    return Endpoint(model.strip(), address, key or "none", timeout, retries, temperature, max_tokens)


def _safe(address: str) -> str:
    """For an error: without what may be a password."""
    return shown(re.sub(r"//[^/]*@", "//", address.partition("?")[0]))


def ask_all(
    endpoint: Endpoint,
    prompts: Sequence[str],
    concurrency: int,
    take: Callable[[int, Answer], None],
    known: bool = False,
) -> None:
    """Send the prompts, `concurrency` at a time, and hand each answer to `take` with the prompt's number.

    `known`: whether the endpoint has answered before; if not, the first ones go alone until one is answered. Raises
    `InputError` where going on makes no sense: no connection, a key that is refused, an unknown model, or many failures
    in a row. An endpoint that has answered is not stopped by prompts that it will not have, however many.
    """
    if prompts:
        asyncio.run(_Asking(endpoint, take, known).all(prompts, concurrency))


class _Asking:
    def __init__(self, endpoint: Endpoint, take: Callable[[int, Answer], None], known: bool) -> None:
        self.endpoint, self.take, self.known = endpoint, take, known
        self.answered, self.failed_in_a_row = 0, 0

    async def all(self, prompts: Sequence[str], concurrency: int) -> None:
        from openai import AsyncOpenAI  # 1 s

        endpoint, waiting = self.endpoint, iter(enumerate(prompts))
        async with AsyncOpenAI(
            api_key=endpoint.key,
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=min(endpoint.retries, FIRST_RETRIES),
        ) as client:
            for number, prompt in waiting:
                await self._one(client, number, prompt)
                if self.answered or self.known:
                    break
            patient = client.with_options(max_retries=endpoint.retries)
            least = min(concurrency, len(prompts))
            workers = [asyncio.create_task(self._work(patient, waiting)) for _ in range(least)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: "AsyncOpenAI", waiting: Iterator[tuple[int, str]]) -> None:
        for number, prompt in waiting:
            await self._one(client, number, prompt)

    async def _one(self, client: "AsyncOpenAI", number: int, prompt: str) -> None:
        answer = await self._answer(client, prompt)
        self.take(number, answer)
        if answer.text is not None:
            self.answered, self.failed_in_a_row = self.answered + 1, 0
            return
        answers = self.known or self.answered > 0
        if answers and answer.own:
            return
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= (FAILURES if answers else FIRST_FAILURES):
            raise InputError(
                f"{self.endpoint.base_url}: {self.failed_in_a_row} requests in a row failed, the last one: "
                f"{answer.error}; what was answered is kept, the same command continues"
            )

    async def _answer(self, client: "AsyncOpenAI", prompt: str) -> Answer:
        """One request with its retries; raises `InputError` for what every other request would meet too."""
        import openai

        own = self.endpoint
        extra = {"temperature": own.temperature, "max_tokens": own.max_tokens}
        try:
            # The client's own limit is between two bytes: a server that sends one now and then would be waited for.
            async with asyncio.timeout((client.max_retries + 1) * (own.timeout + LONGEST_WAIT)):
                raw = await client.chat.completions.with_raw_response.create(
                    model=own.model,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body={name: value for name, value in extra.items() if value is not None},
                )
        except (openai.APITimeoutError, TimeoutError):
            return Answer(None, f"no answer within {own.timeout:g} s")
        except openai.APIConnectionError as error:
            why = own.without_key(_cause(error))
            if not self.answered:
                raise InputError(
                    f"{own.base_url}: cannot be reached ({why}); start the server, or give another address "
                    "(--base-url, OPENAI_BASE_URL)"
                ) from error
            return Answer(None, f"no connection: {why}")
        except openai.APIStatusError as error:
            said = own.without_key(_said(error))
            if error.status_code in (401, 403):
                raise InputError(
                    f"{own.base_url}: refuses the key (HTTP {error.status_code}: {said}); set it in the environment "
                    "(OPENAI_API_KEY, or --key-variable NAME)"
                ) from error
            if error.status_code == 404:
                raise InputError(
                    f"{own.base_url}: does not know model {shown(own.model)} or is no address of an API (HTTP 404: "
                    f"{said}); give MODEL=... as the server lists it, and an address that ends before /chat/completions"
                ) from error
            return Answer(None, f"HTTP {error.status_code}: {said}", own=error.status_code in OWN_STATUS)
        return self._read(raw.text)

    def _read(self, body: str) -> Answer:
        try:
            completion = _Completion.model_validate(json.loads(body.removeprefix("\ufeff")))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            return Answer(None, f"no chat completion: {where}: {first['msg'][0].lower()}{first['msg'][1:]}")
        except (ValueError, RecursionError):
            return Answer(None, f"not JSON: {shown(self.endpoint.without_key(body[:60]))}")
        choice, counted = completion.choices[0], completion.counted()
        if choice.message.content and choice.message.content.strip():
            return Answer(self.endpoint.without_key(choice.message.content), None, *counted)
        why = NO_ANSWER
        if choice.message.refusal:
            why = f"refused: {self.endpoint.without_key(' '.join(choice.message.refusal.split())[:200])}"
        elif choice.finish_reason == "length":
            why = "cut off before any text: a model that reasons first needs more (--max-tokens)"
        return Answer(None, why, *counted, own=True)


def _cause(error: BaseException) -> str:
    """What the innermost error says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def _said(error: "APIStatusError") -> str:
    """The server's own message of a refusal, in one line; its body's beginning where it has none."""
    body = error.body
    told = [body, *(body.get(key) for key in ("message", "detail"))] if isinstance(body, dict) else [body]
    text = next((each for each in told if isinstance(each, str) and each), error.response.text)
    return " ".join(printable(text[:1000]).split())[:300] or "no more is said"
