"""Endpoints that fail, limit, hang and answer nonsense: what is counted, what stops, and in what words."""

import socket
import time

import pytest

from common.errors import InputError
from evaluate.explain.endpoint import Answer, Endpoint, ask_all, endpoint_of
from tests.evaluate.explain.server import Answers, Said, Server, completion, running

AGAIN = {"retry-after-ms": "5"}
BUSY = Said(b'{"error": {"message": "slow down"}}', 429, AGAIN)
BROKEN = Said(b"oops", 500, AGAIN)
FINE = completion("fine")


def asked(
    server: Server, answers: Answers, n: int = 4, concurrency: int = 2, retries: int = 2, timeout: float = 5
) -> list[Answer]:
    """The answers to `n` prompts, by number."""
    server.answers = answers
    found: dict[int, Answer] = {}
    endpoint = Endpoint("m", server.url, "none", timeout, retries, 0, 50)
    ask_all(endpoint, [f"prompt {i}" for i in range(n)], concurrency, found.__setitem__)
    return [found[i] for i in range(n)]


def number_of(prompt: str) -> int:
    return int(prompt.split()[1])


def second(bad: Said) -> Answers:
    """Prompt 1 is answered badly, every time."""
    return lambda prompt, _: bad if number_of(prompt) == 1 else FINE


def test_what_is_sent(server: Server) -> None:
    (answer,) = asked(server, lambda *_: FINE, 1)
    assert answer == Answer("fine", None, "stop", 100, 10)
    message = {"role": "user", "content": "prompt 0"}
    assert server.asked == [{"model": "m", "messages": [message], "temperature": 0, "max_tokens": 50}]
    endpoint = Endpoint("m", server.url, "none", 5, 0, None, None)
    ask_all(endpoint, ["prompt"], 1, lambda *_: None)
    assert server.asked[1].keys() == {"model", "messages"}  # `none`: a server may refuse them


def test_a_limit_and_an_error_are_waited_out(server: Server) -> None:
    """Every prompt is first told to come back, then that the server is broken, then answered."""
    seen: dict[str, int] = {}

    def answers(prompt: str, _: int) -> Said:
        seen[prompt] = seen.get(prompt, 0) + 1
        return [BUSY, BROKEN, FINE][seen[prompt] - 1]

    assert [each.text for each in asked(server, answers)] == ["fine"] * 4
    assert set(seen.values()) == {3}
    limit = Said(b"{}", 429, {"Retry-After": "0.3"})  # in seconds
    started = time.monotonic()
    asked(server, lambda _, number: limit if number == 12 else FINE, 1)
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (BROKEN, "HTTP 500: oops"),
        (Said(b"<html>\nno\x1b[2J", 405), "HTTP 405: <html>\\nno\\x1b[2J"),
        (Said(b'{"detail": "Not Found"}', 405), "HTTP 405: Not Found"),
        (Said(b'{"error": "pay"}', 402), "HTTP 402: pay"),
        (Said(b"", 405), "HTTP 405: no more is said"),
        (BUSY, "HTTP 429: slow down"),
        (Said(b'{"error": {"message": "the prompt is too long"}}', 400), "HTTP 400: the prompt is too long"),
        (Said(b"<html>hello"), "not JSON: '<html>hello'"),
        (Said(b""), "not JSON: ''"),
        (Said(b"[" * 100_000), "not JSON: "),
        (Said(b"[]"), "no chat completion: the whole: input should be a valid dictionary"),
        (Said(b'{"choices": "a"}'), "no chat completion: choices: input should be a valid list"),
        (Said(b'{"choices": []}'), "no chat completion: choices: list should have at least 1 item"),
        (Said(b'{"choices": [{"text": "a"}]}'), "no chat completion: choices.0.message: field required"),
        (
            Said(b'{"choices": [{"message": {"content": [1]}}]}'),
            "choices.0.message.content: input should be a valid",
        ),
        (Said(b'{"object": "error", "message": "x"}'), "no chat completion: choices: field required"),
        (completion(None), "no text in the answer"),
        (completion(" \n"), "no text in the answer"),
        (
            completion(None, "length"),
            "cut off before any text: a model that reasons first needs more (--max-tokens)",
        ),
        (completion(None, refusal="I cannot"), "refused: I cannot"),
        (FINE._replace(seconds=1), "no answer within 0.2 s"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_one_bad_answer_is_counted_and_the_others_are_kept(server: Server, bad: Said, said: str) -> None:
    found = asked(server, second(bad), retries=0, timeout=0.2 if bad.seconds else 5)
    assert [each.text for each in found] == ["fine", None, "fine", "fine"]
    assert said in (found[1].error or "")
    assert "\n" not in (found[1].error or "")


@pytest.mark.parametrize(
    ("old", "new", "counted"),
    [
        (b'"prompt_tokens": 100', b'"prompt_tokens": "many"', (None, 10)),
        (b'"prompt_tokens": 100', b'"prompt_tokens": 1.5', (None, 10)),
        (b'"usage": {', b'"usage": [1], "x": {', (None, None)),
        (b'"stop"', b"3", (100, 10)),
        (b'{"id"', b'\xef\xbb\xbf{"id"', (100, 10)),
        (b'"fine"', b'[{"type": "thinking", "thinking": []}, {"type": "text", "text": "fine"}]', (100, 10)),
    ],
    ids=["words", "fraction", "list", "finish", "mark", "parts"],
)
def test_what_is_beside_the_text_decides_nothing(
    server: Server, old: bytes, new: bytes, counted: tuple[int | None, int | None]
) -> None:
    """And a server may begin with a byte order mark, and tell its text in parts."""
    assert old in FINE.body
    (answer,) = asked(server, lambda *_: Said(FINE.body.replace(old, new)), 1)
    assert (answer.text, answer.error) == ("fine", None)
    assert (answer.tokens_in, answer.tokens_out) == counted


def test_no_more_requests_are_made_ready_than_there_are(server: Server) -> None:
    """A concurrency of many millions took all memory."""
    assert [each.text for each in asked(server, lambda *_: FINE, 3, concurrency=10**12)] == ["fine"] * 3


def test_half_of_a_surrogate_pair_can_be_written(server: Server) -> None:
    body = FINE.body.replace(b"fine", b"a\\ud800b")
    (answer,) = asked(server, lambda *_: Said(body), 1)
    assert answer.text == "a?b"


@pytest.mark.parametrize(
    ("bad", "requests", "said"),
    [
        (
            Said(b'{"error": {"message": "no such key"}}', 401),
            1,
            "refuses the key (HTTP 401: no such key); set it in",
        ),
        (Said(b"", 403), 1, "refuses the key (HTTP 403: "),
        (
            Said(b'{"message": "no m"}', 404),
            1,
            "does not know model 'm' or is no address of an API (HTTP 404: no m)",
        ),
        (BROKEN, 5, "5 requests in a row failed, the last one: HTTP 500: "),
        (Said(b"<html>"), 5, "5 requests in a row failed, the last one: not JSON: '<html>'"),
        (Said(b'{"error": {"message": "no temperature"}}', 400), 5, "the last one: HTTP 400: no temperature"),
    ],
    ids=["401", "403", "404", "500", "html", "400"],
)
def test_an_endpoint_that_answers_nothing_stops_it(
    server: Server, bad: Said, requests: int, said: str
) -> None:
    with pytest.raises(InputError) as stopped:
        asked(server, lambda *_: bad, 30, retries=0)
    assert str(stopped.value).startswith(f"{server.url}: ")
    assert said in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(server.asked) == requests


def test_a_key_that_is_refused_later_and_a_server_that_breaks_stop_it_too(server: Server) -> None:
    """Of what is answered before nothing is lost: `take` has it."""
    refused = Said(b"{}", 401)
    with pytest.raises(InputError, match="refuses the key"):
        asked(server, lambda prompt, _: refused if number_of(prompt) >= 3 else FINE, 99)
    assert len(server.asked) < 10
    with pytest.raises(InputError, match="20 requests in a row failed"):
        asked(server, lambda prompt, _: BROKEN if number_of(prompt) >= 3 else FINE, 99, retries=0)


@pytest.mark.parametrize(
    "bad",
    [
        Said(b"{}", 400),
        Said(b"{}", 413),
        Said(b"{}", 422),
        completion(None),
        completion(None, refusal="no"),
        completion(None, "length"),
    ],
    ids=["400", "413", "422", "empty", "refused", "cut off"],
)
def test_prompts_that_it_will_not_have_do_not_stop_an_endpoint_that_answers(
    server: Server, bad: Said
) -> None:
    found = asked(server, lambda prompt, _: bad if number_of(prompt) >= 2 else FINE, 30)
    assert [each.text for each in found] == ["fine"] * 2 + [None] * 28


def test_an_endpoint_that_answered_in_an_earlier_run(server: Server) -> None:
    """Prompts that it will not have are all asked, and others follow; if it breaks, 20 in a row stop it, not 5."""
    endpoint = Endpoint("m", server.url, "none", 5, 0, 0, 50)
    prompts = [f"prompt {i}" for i in range(30)]
    found: dict[int, Answer] = {}
    server.answers = lambda prompt, _: FINE if number_of(prompt) == 29 else Said(b"{}", 400)
    ask_all(endpoint, prompts, 2, found.__setitem__, known=True)
    assert [i for i in range(30) if found[i].text == "fine"] == [29]
    server.answers = lambda *_: BROKEN
    with pytest.raises(InputError, match="20 requests in a row failed"):
        ask_all(endpoint, prompts, 1, found.__setitem__, known=True)


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=r"cannot be reached .*; start the server, or give another address"):
        ask_all(Endpoint("m", url, "none", 5, 0, 0, None), ["a"], 2, lambda *_: None)


def test_a_server_that_goes_away_is_counted() -> None:
    """Then the address was right: no error of the command line."""
    found: dict[int, Answer] = {}
    with running() as server:
        server.answers = lambda *_: Said(FINE.body, headers={"Connection": "close"})

        def take(number: int, answer: Answer) -> None:
            found[number] = answer
            if number == 0:
                server.shutdown()
                server.server_close()

        ask_all(Endpoint("m", server.url, "none", 5, 0, 0, None), ["a", "b"], 1, take)
    assert found[0].text == "fine"
    assert (found[1].error or "").startswith("no connection: ")


def endpoint(**changes: object) -> Endpoint:
    values = {"model": "m", "base_url": None, "key_variable": "OPENAI_API_KEY", "timeout": 1.0, "retries": 0}
    return endpoint_of(**(values | {"temperature": None, "max_tokens": None} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": None},
            "model: expected the language model that explains, found none; give MODEL=... (--model)",
        ),
        ({"model": " "}, "model: expected the language model"),
        ({"model": "a\nb"}, "model: expected a name of printable characters, found 'a\\nb'"),
        ({"model": "a\udcff"}, "model: expected a name of printable characters"),
        ({"base_url": "http://a\nb/v1"}, "base_url: expected an address"),
        ({"base_url": "http://a\udcff/v1"}, "base_url: expected an address"),
        ({}, "OPENAI_API_KEY: not set; give OpenAI's key in the environment"),
        ({"key_variable": "MINE"}, "MINE: not set"),
        (
            {"base_url": "localhost:8000"},
            "base_url: expected an address such as http://localhost:8000/v1, found",
        ),
        ({"base_url": "http://[::1"}, "base_url: expected an address"),
        ({"base_url": "http://a:port/v1"}, "base_url: expected an address"),
        (
            {"base_url": "https://me:passw0rd@host/v1"},
            "base_url: https://host: is written beside the explanations",
        ),
        (
            {"base_url": "https://host/v1?key=passw0rd"},
            "must hold no user, password or query; give the key in",
        ),
        ({"base_url": "x://me:passw0rd@host/v1?key=passw0rd"}, "base_url: expected an address"),
    ],
)
def test_a_command_line_that_names_no_endpoint(
    changes: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError) as stopped:
        endpoint(**changes)
    assert said in str(stopped.value)
    assert "passw0rd" not in str(stopped.value)


def test_model_address_and_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "theirs")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", " secret-of-mine\n")
    found = endpoint(model=None)
    assert (found.model, found.base_url, found.key) == ("theirs", "http://localhost:1/v1", "secret-of-mine")
    assert "secret" not in repr(found)
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    with pytest.raises(InputError, match="printable ASCII"):
        endpoint()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert endpoint(base_url="http://localhost:1/v1").key == "none"
    assert endpoint(base_url="https://api.openai.com/v1", sends=False).key == "none"
