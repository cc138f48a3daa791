"""Explanations from the command line: scores that are known, replies that are kept, and where they are shown."""

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluate.explain.replies import Reply
from evaluate.notes import notes_of
from tests.evaluate.explain.planted import DEAD, N, settings_of
from tests.evaluate.explain.server import (
    Said,
    Server,
    by,
    completion,
    guesser,
    kind_of,
    oracle,
    passages_of,
    yes,
)

Call = Callable[..., tuple[int, str, str]]


def asking(server: Server, *more: str, model: str = "oracle") -> list[str]:
    return ["--model", model, "--base-url", server.url, "--shown", "8", "--scored", "4", *more]


def every(server: Server, *more: str, model: str = "oracle") -> list[str]:
    return asking(server, "--sample", "99", *more, model=model)


def few(server: Server, *more: str) -> list[str]:
    return asking(server, "--latents", "0,1,3,5", *more)


def folder_of(root: Path, model: str = "oracle") -> Path:
    return settings_of(root).run_dir() / "explanations" / model


def summary_of(root: Path, model: str = "oracle") -> dict:
    return json.loads((folder_of(root, model) / "summary.json").read_text())


def replies_of(root: Path, model: str = "oracle") -> list[Reply]:
    lines = (folder_of(root, model) / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [Reply.model_validate_json(line) for line in lines]


def test_an_oracle_scores_one(root: Path, server: Server, call: Call) -> None:
    code, out, err = call(root, *every(server))
    assert code == 0, err
    summary = summary_of(root)
    assert [each["latent"] for each in summary["latents"]] == [*range(DEAD)]
    for each in summary["latents"]:
        assert each["explanation"] == f"words of class {each['latent']}"
        assert each["score"] == each["detection"]["score"] == each["fuzzing"]["score"] == 1.0
        for judged in (each["detection"], each["fuzzing"]):
            assert judged["positives"] == judged["negatives"] >= 4
            assert (judged["error"], judged["not_judged"]) == (0.0, 0)
    groups = {each["group"]: each for each in summary["groups"]}
    assert {group: each["latents"] for group, each in groups.items()} == {None: DEAD, 0: 3, 1: 3, 2: 5}
    assert groups[2]["score"] == {"mean": 1.0, "error": 0.0, "latents": 5}
    assert "1.000 ± 0.000" in out
    assert summary["requests"]["sent"] == len(server.asked) == len(replies_of(root))
    assert summary["requests"]["tokens_in"] == 100 * len(server.asked)
    truths = {"detection": Counter[str](), "fuzzing": Counter[str]()}
    for reply in replies_of(root):
        if reply.kind != "explanation":
            truths[reply.kind].update(reply.passages)
            assert reply.truth == tuple(what == "fires" for what in reply.passages)
    for kind, others in {"detection": ("other", "random"), "fuzzing": ("other", "moved")}.items():
        n = truths[kind]["fires"]
        assert truths[kind] == {"fires": n, others[0]: n / 2, others[1]: n / 2}
    assert server.keys == {"Bearer none"}


def test_guessers_score_a_half(root: Path, server: Server, call: Call) -> None:
    """Whoever says yes to all has exactly a half, a coin within its standard error, which is of the right size."""
    server.answers = by(yes)
    assert call(root, *every(server, model="yes"))[0] == 0
    all_yes = summary_of(root, "yes")["groups"][0]
    assert all_yes["detection"] == all_yes["fuzzing"] == {"mean": 0.5, "error": 0.0, "latents": DEAD}
    server.answers = by(guesser)
    assert call(root, *every(server, model="coin"))[0] == 0
    coin = summary_of(root, "coin")
    for name in ("detection", "fuzzing"):
        score = coin["groups"][0][name]
        assert abs(score["mean"] - 0.5) < 2 * score["error"]
        # each rate is a mean of n coins, 1 / (4 n); a score is half their sum, and the group's the mean of DEAD scores
        n = sum(each[name]["positives"] for each in coin["latents"]) / DEAD
        assert score["error"] == pytest.approx((1 / (8 * n * DEAD)) ** 0.5, rel=0.5)


def test_nothing_is_asked_twice_and_a_torn_line_is_mended(root: Path, server: Server, call: Call) -> None:
    assert call(root, *few(server))[0] == 0
    first, said = len(server.asked), replies_of(root)
    run_dir = settings_of(root).run_dir()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    code, out, _ = call(root, *few(server))
    assert (code, len(server.asked)) == (0, first)
    assert f"{first:,} answered before" in out
    changed = [path.name for path, data in before.items() if path.read_bytes() != data]
    assert changed == ["summary.json"]  # which says that nothing was sent
    assert summary_of(root)["requests"]["kept"] == first
    file = folder_of(root) / "replies.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])  # a kill while the last line was written
    assert call(root, *few(server))[0] == 0
    assert len(server.asked) == first + 1
    assert file.read_bytes() == whole
    assert replies_of(root) == said
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0][:-20] + b"\n", *lines[1:]]))
    code, _, err = call(root, *few(server))
    assert (code, f"{file}: line 1 is damaged (" in err) == (2, True)


def test_a_plan_asks_nothing_and_writes_nothing(root: Path, server: Server, call: Call) -> None:
    run_dir = settings_of(root).run_dir()
    before = sorted(run_dir.rglob("*"))
    code, out, _ = call(root, *few(server, "--plan"))
    assert (code, server.asked, sorted(run_dir.rglob("*"))) == (0, [], before)
    planned = re.findall(r"([\d,]+) requests", out)
    assert call(root, *few(server))[0] == 0
    assert planned == [str(len(server.asked))] * 2  # in all, and to send
    assert "to send: 0 requests" in call(root, *few(server, "--plan"))[1]


def test_shown_and_scored_passages_are_of_different_documents(root: Path, server: Server, call: Call) -> None:
    """Random words: three in a row are hardly ever twice in the text, so they tell which document they are of."""
    code, _, err = call(root, "--model", "oracle", "--base-url", server.url, "--latents", "4")
    assert code == 0, err
    triples: dict[str, set[tuple[str, ...]]] = {"explanation": set(), "detection": set(), "fuzzing": set()}
    for prompt in server.prompts:
        for passage in passages_of(prompt):
            words = passage.replace("<<", "").replace(">>", "").split()
            assert "<end>" not in words  # of one document
            triples[kind_of(prompt)].update(zip(words, words[1:], words[2:], strict=False))
    assert not triples["explanation"] & (triples["detection"] | triples["fuzzing"])
    assert min(map(len, triples.values())) > 100
    shown = next(prompt for prompt in server.prompts if kind_of(prompt) == "explanation")
    strengths = [int(each) for each in re.findall(r'" ?c4[ab]": (\d+)', shown)]
    assert max(strengths) == 10
    assert min(strengths) <= 3  # the whole range, not only the top


def test_explanations_are_read_as_notes_beside_a_persons(root: Path, server: Server, call: Call) -> None:
    run_dir = settings_of(root).run_dir()
    (run_dir / "notes.csv").write_text("layer,latent,label,score,source\n0,3,mine,,page\n0,5,,1,page\n")
    assert call(root, *few(server))[0] == 0
    said = notes_of(run_dir, 0, N)
    assert said[0].text == "words of class 0 (oracle, score 1)"
    assert said[3].text == "mine; words of class 3 (oracle, score 1)"
    assert said[5].text == "★; words of class 5 (oracle, score 1)"
    page = (run_dir / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert '"0":{"label":"words of class 0","score":1.0,"source":"oracle","explained":true}' in page
    assert '"3":{"label":"mine","score":null,"source":"page","explained":{"label":"words of class 3"' in page
    # another model's explanation takes the place of the same latent's, and of no other's
    assert call(root, *asking(server, "--latents", "0", model="a/second:1"))[0] == 0
    assert folder_of(root, "a_second_1").is_dir()
    said = notes_of(run_dir, 0, N)
    assert (said[0].text, said[1].text) == (
        "words of class 0 (a/second:1, score 1)",
        "words of class 1 (oracle, score 1)",
    )


def test_explanations_of_other_weights_are_left_out(
    root: Path, server: Server, call: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = settings_of(root).run_dir()
    assert call(root, *asking(server, "--latents", "1"))[0] == 0
    assert [*notes_of(run_dir, 0, N)] == [1]
    weights = run_dir / "transcoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capfd.readouterr()
    assert notes_of(run_dir, 0, N) == {}
    assert "1 lines are of other weights than the run's: left out" in capfd.readouterr().err


def test_ctrl_c_keeps_all_that_was_answered(root: Path, server: Server, call: Call) -> None:
    def interrupted(prompt: str, number: int) -> Said:
        if number == 15:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return completion(oracle(prompt))._replace(seconds=0.3 * (number == 15))

    server.answers = interrupted
    code, _, err = call(root, *every(server, "--concurrency", "1"))
    assert (code, "interrupted: the same command continues" in err) == (130, True)
    kept = replies_of(root)
    assert len(kept) == 15
    assert len(summary_of(root)["latents"]) == DEAD
    server.answers = by(oracle)
    assert call(root, *every(server))[0] == 0
    assert summary_of(root)["requests"]["kept"] == 15
    assert summary_of(root)["groups"][0]["score"] == {"mean": 1.0, "error": 0.0, "latents": DEAD}


def test_answers_that_cannot_be_read_are_counted_and_not_scored(
    root: Path, server: Server, call: Call
) -> None:
    """Of latent 1 in words that are no explanation, of 2 cut off; detection of latent 3 has a verdict too many."""

    def answers(prompt: str, _: int) -> Said:
        text, kind = oracle(prompt), kind_of(prompt)
        if kind == "explanation" and text.endswith(" 1"):
            return completion("I'm sorry, but I can't help with that.")
        if kind == "detection" and "words of class 3\n" in prompt:
            return completion(text.replace("]", ", 1]"))
        return completion(text, "length" if kind == "explanation" and text.endswith(" 2") else "stop")

    server.answers = answers
    code, out, _ = call(root, *every(server))
    assert code == 0
    summary = summary_of(root)
    latents = {each["latent"]: each for each in summary["latents"]}
    assert [latent for latent, each in latents.items() if each["explanation"] is None] == [1, 2]
    assert latents[1]["score"] is latents[1]["detection"] is None
    assert latents[3]["score"] is latents[3]["detection"]["score"] is None
    assert latents[3]["fuzzing"]["score"] == 1.0
    prompts = [reply for reply in replies_of(root) if (reply.kind, reply.latent) == ("detection", 3)]
    assert latents[3]["detection"]["not_judged"] == sum(len(reply.truth) for reply in prompts)
    assert summary["requests"]["unreadable"] == {"explanation": 2, "detection": len(prompts)}
    group = summary["groups"][0]
    assert (group["latents"], group["explained"]) == (DEAD, DEAD - 2)
    assert group["detection"] == {"mean": 1.0, "error": 0.0, "latents": DEAD - 3}
    assert f"in no score: 2 of explanation, {len(prompts)} of detection" in out
    assert ",words of class 3,,oracle," in (settings_of(root).run_dir() / "explanations.csv").read_text()


def test_failures_are_told_at_the_end_and_asked_again(root: Path, server: Server, call: Call) -> None:
    bad = Said(b'{"error": {"message": "no"}}', 400)
    server.answers = lambda prompt, number: bad if number % 5 == 4 else completion(oracle(prompt))
    code, out, err = call(root, *few(server, "--concurrency", "1"))
    failed = summary_of(root)["requests"]["failed"]
    assert failed == {"HTTP 400": len(server.asked) // 5}
    assert (code, "explanations.csv" in out) == (2, True)
    assert (
        f"{failed['HTTP 400']} of {len(server.asked)} requests failed (HTTP 400: {failed['HTTP 400']}; see "
        "replies.jsonl); all others" in err
    )
    server.answers = by(oracle)
    assert call(root, *few(server))[0] == 0
    assert summary_of(root)["groups"][0]["score"] == {"mean": 1.0, "error": 0.0, "latents": 4}


def test_explanations_that_always_fail_do_not_keep_a_rerun_from_the_scores(
    root: Path, server: Server, call: Call
) -> None:
    """A filter refuses the prompts of more latents than stop an endpoint that answers nothing; then a Ctrl-C."""
    filtered = Said(b'{"error": {"message": "content filter"}}', 400)
    scores: list[str] = []
    refused: set[str] = set()

    def answers(prompt: str, _: int) -> Said:
        said = oracle(prompt)
        if kind_of(prompt) == "explanation":
            if int(said.split()[-1]) >= DEAD - 4:
                return completion(said)
            refused.add(prompt)
            return filtered
        scores.append(prompt)
        if len(scores) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return completion(said)._replace(seconds=0.3 * (len(scores) == 3))

    server.answers = by(oracle)
    assert call(root, *asking(server, "--latents", str(DEAD - 1)))[0] == 0  # so that it has answered
    server.answers = answers
    assert call(root, *every(server, "--concurrency", "1"))[0] == 130
    assert len(refused) == DEAD - 4 >= 5
    code, _, err = call(root, *every(server))
    assert (code, f"{DEAD - 4} of " in err, "in a row" in err) == (2, True, False)
    summary = summary_of(root)
    assert summary["requests"]["failed"] == {"HTTP 400": DEAD - 4}
    assert summary["groups"][0]["score"] == {"mean": 1.0, "error": 0.0, "latents": 4}


def test_a_run_stays_as_it_is_where_nobody_answers(root: Path, server: Server, call: Call) -> None:
    run_dir = settings_of(root).run_dir()
    before = sorted(run_dir.rglob("*"))
    server.answers = lambda *_: Said(b"{}", 401)
    code, _, err = call(root, *few(server))
    assert (code, f"error: {server.url}: refuses the key (HTTP 401" in err) == (2, True)
    assert sorted(run_dir.rglob("*")) == before


def test_few_requests_of_which_none_is_answered(root: Path, server: Server, call: Call) -> None:
    """Fewer than stop it by their number: the last one is told in full, and no table of explanations is written."""
    server.answers = lambda *_: Said(b"<html>hello")
    code, _, err = call(root, *asking(server, "--latents", "0,1"))
    said = f"error: {server.url}: none of 2 requests was answered, the last one: not JSON: '<html>hello'; the same"
    assert (code, said in err) == (2, True)
    assert not (settings_of(root).run_dir() / "explanations.csv").exists()


@pytest.mark.parametrize("name", ["explanations.csv", "notes.csv"])
def test_labels_that_cannot_be_read_are_told_before_anything_is_asked(
    root: Path, server: Server, call: Call, name: str
) -> None:
    file = settings_of(root).run_dir() / name
    file.write_text("nonsense\n")
    code, _, err = call(root, *few(server))
    assert (code, f"{file}: line 1: no column layer" in err, server.asked) == (2, True, [])


def test_names_of_models_in_any_alphabet(root: Path, server: Server, call: Call) -> None:
    for model in ("模型/一", "模型/二"):
        assert call(root, *asking(server, "--latents", "0", model=model))[0] == 0
    assert summary_of(root, "模型_一")["model"] == "模型/一"
    assert summary_of(root, "模型_二")["model"] == "模型/二"
    assert call(root, *asking(server, "--latents", "0", model="型" * 300))[0] == 0


def test_several_layers_without_a_run(root: Path, server: Server, call: Call) -> None:
    """The run is chosen for all of them: none has been named."""
    options = [*asking(server, "--latents", "0"), "--layer", "0 3", "--run", ""]
    code, out, err = call(root, *options)
    assert (code, "run planted, " in err, "layer 0 (1 of 2)" in out) == (2, True, True)
    assert "error: layer 3: " in err


def test_the_key_is_sent_and_written_nowhere(
    root: Path, server: Server, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server repeats it in a reply, in an error and in a body that is no JSON."""
    key = "sk-" + "q7Zp" * 8
    monkeypatch.setenv("MY_KEY", key)

    def repeating(prompt: str, number: int) -> Said:
        if number % 4 == 1:
            return Said(json.dumps({"error": {"message": f"bad {key}"}}).encode(), 400)
        if number % 4 == 2:
            return Said(f"<html>{key}".encode())
        return completion(f"[{key}]" if kind_of(prompt) != "explanation" else f"EXPLANATION: a {key} b")

    server.answers = repeating
    code, out, err = call(root, *few(server, "--key-variable", "MY_KEY"))
    assert code == 2
    assert server.keys == {f"Bearer {key}"}
    files = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in out + err
    assert ",a [key] b," in (settings_of(root).run_dir() / "explanations.csv").read_text()


def test_requests_are_made_side_by_side(root: Path, server: Server, call: Call) -> None:
    server.answers = lambda prompt, _: completion(oracle(prompt))._replace(seconds=0.01)
    assert call(root, *every(server, "--concurrency", "6"))[0] == 0
    assert 2 <= server.most_at_once <= 6


def test_a_sample_is_of_all_groups_and_what_cannot_be_explained_is_left_out(
    root: Path, server: Server, call: Call
) -> None:
    assert call(root, *asking(server, "--sample", "4"))[0] == 0
    assert [each["group"] for each in summary_of(root)["latents"]] == [0, 0, 1, 2]
    code, out, _ = call(root, *asking(server, "--latents", f"2,{DEAD}"))
    assert (code, f"left out: never fires: latent {DEAD}\n" in out) == (0, True)
    assert summary_of(root)["left_out"] == {"never fires": [DEAD]}
    code, _, err = call(root, *asking(server, "--latents", str(DEAD)))
    assert (code, f"no latent can be explained (never fires: latent {DEAD})" in err) == (2, True)
