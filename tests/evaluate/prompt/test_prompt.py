"""make read on a tiny model: two layers, long texts, interventions, what is printed; prompt.json and prompt.html."""

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import evaluate.read
from common.errors import InputError
from common.settings import Settings
from evaluate.files import METRICS_VERSION
from evaluate.metrics.language import language_model
from evaluate.prompt.asked import Asked, of_layers, parse
from evaluate.prompt.console import show
from evaluate.prompt.next_token import directions
from evaluate.prompt.records import Prompt
from evaluate.read import Reader, read_text
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from transcoder import Transcoder

LAYERS = (1, 2)
TEXT = "the red river sings and the old stone sleeps"


@pytest.fixture(scope="module")
def harvested(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from common.cli import load, parser

    root = tmp_path_factory.mktemp("prompts")
    argv = f"""--layer {",".join(map(str, LAYERS))} --model.name {llama} --model.device cpu --data.files {corpus}
        --harvest.rows 500 --harvest.context_length 16 --harvest.heldout_fraction 0.1 --run a
        --paths.activations {root}/activations --paths.checkpoints {root}/checkpoints""".split()
    harvest(load(parser("harvest", ""), argv)[0])
    (root / "argv").write_text("\n".join(argv))
    return root


@pytest.fixture(scope="module")
def loaded() -> Iterator[None]:
    """The language model of this module's stores, which is one, is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.metrics.language.language_model", cache_of(language_model))
        yield


def cache_of(load: Callable[..., Any]) -> Callable[..., Any]:
    held: dict[str, Any] = {}
    return lambda wanted, source: held.setdefault(wanted.name, held.get(wanted.name) or load(wanted, source))


@pytest.fixture
def settings(loaded: None, harvested: Path, tmp_path: Path) -> Settings:
    """Of both layers, with random transcoders in a folder of the test's own."""
    from common.cli import load, parser

    argv = (harvested / "argv").read_text().split("\n")
    own = load(parser("evaluate.read", ""), [*argv, "--paths.checkpoints", str(tmp_path)])[0]
    for layer in LAYERS:
        random_coder(32, 32, (4, 16), seed=layer, layer=layer).save(own.of_layer(layer).run_dir())
    return own


def reader_of(settings: Settings, layer: int) -> Reader:
    own = settings.of_layer(layer)
    return Reader(Store.of(own), Transcoder.load(own.run_dir()), "cpu")


def asked(layers: tuple[int, ...] = LAYERS, /, **typed: str) -> list[Asked]:
    return of_layers([each for how, text in typed.items() for each in parse(how, text)], layers)  # pyright: ignore


def test_every_number_of_two_layers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are `encode`'s, effects are activation * W_dec . direction; one transcoder is in memory at a time."""
    alive: list[weakref.ref[Transcoder]] = []
    load = Transcoder.load

    def watched(path: Path) -> Transcoder:
        gc.collect()
        assert not [each for each in alive if each() is not None], "another transcoder is still in memory"
        coder = load(path)
        alive.append(weakref.ref(coder))
        return coder

    monkeypatch.setattr(Transcoder, "load", watched)
    prompt, folder = read_text(settings, TEXT)
    monkeypatch.undo()
    assert len(alive) == 2
    assert prompt.effects_skipped is None
    assert [layer.layer for layer in prompt.layers] == list(LAYERS)
    for layer in prompt.layers:
        reader = reader_of(settings, layer.layer)
        sentence, hf = reader(TEXT), reader.model.bridge.original_model
        assert [token.text for token in prompt.tokens if token.row] == sentence.tokens
        with torch.inference_mode(), reader.model.capturing(["ln_final.hook_in"]) as caught:
            logits = reader.model.bridge(reader.contexts(TEXT)[0], return_type="logits")[0]
        ids = [*reader.contexts(TEXT)[0][0, 1:].tolist(), int(logits[-1].argmax())]
        W_U, residual = hf.lm_head.weight.detach(), caught["ln_final.hook_in"][0]
        scale = (residual.square().mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt()
        towards = (hf.model.norm.weight.detach() * (W_U[ids] - W_U.mean(0)) / scale)[1:]
        expected = sentence.acts * (towards @ reader.transcoder.W_dec.T)
        for row, active in enumerate(layer.active):
            assert {each.latent: each.value for each in active} == {
                f: float(sentence.acts[row, f]) for f in sentence.acts[row].nonzero().flatten().tolist()
            }
            for each in active:
                assert each.effect == pytest.approx(float(expected[row, each.latent]), rel=1e-3, abs=1e-5)
        whole = (sentence.outputs * towards).sum(-1).tolist()
        assert layer.output_effect == pytest.approx(whole, rel=1e-3, abs=1e-5)
        given = [reader.token_text.label(token) for token in ids]
        assert [token.next for token in prompt.tokens] == given
        p = logits.softmax(-1)[range(len(ids)), ids].tolist()
        assert [token.next_probability for token in prompt.tokens] == pytest.approx(p, rel=1e-4)
    assert [token.next_given for token in prompt.tokens] == [True] * (len(prompt.tokens) - 1) + [False]
    written = Prompt.model_validate(json.loads((folder / "prompt.json").read_text()))
    assert written == prompt
    assert "intervention" not in json.loads((folder / "prompt.json").read_text())


def test_a_long_text_is_the_same_in_blocks_of_one_context(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts as in a harvest; a character that is split over two of them is shown, and its token has a next one."""
    text = f"{TEXT} 🙂🙂🙂🙂 {TEXT}"
    whole = read_text(settings, text)[0]
    monkeypatch.setattr("evaluate.prompt.measure.HELD", 1)
    assert read_text(settings, text)[0] == whole
    contexts = reader_of(settings, 1).contexts(text)
    assert len(contexts) > 3
    assert "".join(token.text for token in whole.tokens if token.row) == text
    assert "\ufffd" not in "".join(token.text for token in whole.tokens)
    ids = torch.cat([context[0, 1:] for context in contexts]).tolist()
    label = reader_of(settings, 1).token_text.label
    rows = [token for token in whole.tokens if token.row]
    assert [token.next for token in rows[:-1]] == [label(token) for token in ids[1:]]
    assert [token.next_given for token in rows[:-1]] == [True] * (len(rows) - 1)


def test_a_change_is_the_readers(settings: Settings) -> None:
    """One layer: what `Reader.run` gives, token by token; the error term stays."""
    own = settings.of_layer(1)
    reader = reader_of(settings, 1)
    sentence = reader(TEXT)
    latent = int(sentence.acts.sum(0).argmax())
    prompt, folder = read_text(own, TEXT, asked((1,), set=f"{latent}=4.5"), 3)
    found = reader.run(TEXT, set={latent: 4.5}, new_tokens=3)
    change = prompt.intervention
    assert change is not None
    assert [shift.kl for shift in change.tokens] == pytest.approx(found.kl.tolist(), rel=1e-3, abs=1e-6)
    assert change.continuation == found.continuation
    (listed,) = change.changes
    assert (listed.rows, listed.how, listed.value, listed.token) == (len(sentence.acts), "set", 4.5, None)
    largest = found.changes[found.changes.abs().argmax()]
    assert listed.largest == pytest.approx(float(largest), rel=1e-5)
    for at, shift in enumerate(change.tokens):
        logits = [float(each[at].max()) for each in (found.before, found.after)]
        p = [float(each[at].softmax(-1).max()) for each in (found.before, found.after)]
        assert shift.likeliest[0].logit[0] == pytest.approx(logits[0], rel=1e-4)
        assert max(each.logit[1] for each in shift.likeliest) == pytest.approx(logits[1], rel=1e-4)
        assert max(each.probability[1] for each in shift.likeliest) == pytest.approx(p[1], rel=1e-4)
    assert folder != read_text(own, TEXT)[1], "the text as it is has a folder of its own"
    reconstructed = reader.transcoder.decode(sentence.acts)
    moved = sentence.acts.clone()
    moved[:, latent] = 4.5
    error = sentence.outputs - reconstructed
    expected = reader.transcoder.decode(moved) + error  # the output with the changed reconstruction
    added = found.changes @ reader.transcoder.W_dec[[latent]]
    torch.testing.assert_close(sentence.outputs + added, expected, rtol=1e-4, atol=1e-4)


def test_two_layers_are_changed_together_at_chosen_tokens(settings: Settings) -> None:
    """By hand: layer 2's activation before is that of the model whose layer 1 is changed."""
    first, second = (reader_of(settings, layer) for layer in LAYERS)
    latent = int(second(TEXT).acts[3].argmax())
    changes = asked(set="1/3@2=6", ablate=f"2/{latent}@4")
    prompt = read_text(settings, TEXT, changes, 0)[0]
    seen: dict[str, torch.Tensor] = {}
    below = first(TEXT).acts[1, 3]  # token 2 is row 1

    def lower(output: torch.Tensor, **_: object) -> torch.Tensor:
        output = output.clone()
        output[0, 2] += (6 - below) * first.transcoder.W_dec[3]
        return output

    def reads(tensor: torch.Tensor, **_: object) -> None:
        seen["inputs"] = tensor[0]

    def upper(output: torch.Tensor, **_: object) -> torch.Tensor:
        act = second.transcoder.encode(seen["inputs"])[4, latent]
        seen["act"] = act
        output = output.clone()
        output[0, 4] -= act * second.transcoder.W_dec[latent]
        return output

    hooks = [(first.source.output_hook, lower), (second.source.input_hook, reads)]
    hooks.append((second.source.output_hook, upper))
    bridge, context = first.model.bridge, first.contexts(TEXT)[0]
    with torch.inference_mode():
        before = bridge(context, return_type="logits")[0].log_softmax(-1)
        with bridge.hooks(fwd_hooks=hooks):
            after = bridge(context, return_type="logits")[0].log_softmax(-1)
    change = prompt.intervention
    assert change is not None
    kl = (before.exp() * (before - after)).sum(-1)
    assert [shift.kl for shift in change.tokens] == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-6)
    assert [shift.kl < 1e-6 for shift in change.tokens[:3]] == [True, True, False]
    assert change.changes[1].largest == pytest.approx(-float(seen["act"]), rel=1e-4)


def test_a_change_in_a_later_context_leaves_the_earlier_ones(settings: Settings) -> None:
    text = f"{TEXT} {TEXT} {TEXT}"
    own = settings.of_layer(1)
    plain = read_text(own, text)[0]
    at = next(i for i, token in enumerate(plain.tokens) if token.context == 1 and token.row)
    change = read_text(own, text, asked((1,), set=f"1/2@{at}=9"), 2)[0].intervention
    assert change is not None
    moved = [
        token.context for token, shift in zip(plain.tokens, change.tokens, strict=True) if shift.kl > 1e-6
    ]
    assert set(moved) == {1}
    assert change.changes[0].rows == 1
    assert change.continuation[0] == change.continuation[1]


def test_a_planted_latent_is_seen_in_its_effect_and_in_what_the_model_writes(settings: Settings) -> None:
    """Its decoder row is the word's unembedding through the norm: its effect is largest, scaled up it is written."""
    own = settings.of_layer(2)
    reader = reader_of(settings, 2)
    hf = reader.model.bridge.original_model
    W_U, gain = hf.lm_head.weight.detach(), hf.model.norm.weight.detach()
    word = reader.contexts(TEXT)[0][0, 4]
    towards = gain * (W_U[word] - W_U.mean(0))
    coder = reader.transcoder
    W_dec = coder.W_dec.clone()
    W_dec[5] = towards / towards.norm()
    b_enc = coder.b_enc.clone()
    b_enc[5] = 50.0  # it fires everywhere
    replace(coder, parameters=replace(coder.parameters, W_dec=W_dec, b_enc=b_enc)).save(own.run_dir())
    prompt = read_text(own, TEXT, asked((2,), scale="5=400"), 3)[0]
    strongest = max(
        prompt.layers[0].active[2], key=lambda each: each.effect or 0
    )  # of the token before the word
    assert strongest.latent == 5
    change = prompt.intervention
    assert change is not None
    assert change.continuation[1] == reader.tokenizer.decode([int(word)] * 3)
    assert max(
        change.tokens[-1].likeliest, key=lambda each: each.probability[1]
    ).token == reader.token_text.label(int(word))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ({"set": "1/16=1"}, "SET: 1/16: layer 1's run has latents 0 to 15"),
        ({"set": "2/3=1", "ablate": "2/3@4"}, "layer 2: latent 3: changed twice"),
        ({"ablate": "2/3@99"}, "ABLATE: 2/3@99: the text has tokens 0 to .*, found 99"),
        ({"ablate": "2/3@0"}, "ABLATE: 2/3@0: token 0, '<bos>', gives no row: no transcoder reads it"),
        (
            {"set": "1/3=1e19"},
            "the changed activations are too large for the model's numbers",
        ),  # squares overflow
    ],
)
def test_changes_that_cannot_be_made(settings: Settings, typed: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        read_text(settings, TEXT, asked(**typed))
    assert not list(settings.paths.checkpoints.rglob("prompts")), "nothing is written"


def test_the_terminal_has_80_columns(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{TEXT} \x1b[2Javerylongwordthatdoesnotend 🙂 日本語 [bold]x[/bold]\n\tend"
    prompt, folder = read_text(settings, text, asked(set="1/3=1234.5 2/7@3=1", ablate="1/4"), 4)
    show(prompt, folder, Console(markup=False, emoji=False, width=80))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    tables = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏", "├", "└"))]
    assert max(cell_len(line) for line in tables) <= 80
    assert "…\n" not in "".join(line.rstrip(" │") for line in tables if "┃" in line), "no heading is cut"
    rows = sum(token.row for token in prompt.tokens)
    assert sum(line.startswith("│") for line in tables) == 2 * rows + 11 + len(
        prompt.intervention.tokens[-1].likeliest  # pyright: ignore[reportOptionalMemberAccess]
    ), "a line for each token of two layers, for ten changed ones and the last, and for each likeliest token"
    assert "1/3 set to 1234.5 at every token" in printed
    assert "latents as number:activation" in printed
    assert "no labels: this layer's run has no evaluation" in printed


def test_a_note_and_no_link_where_other_weights_were_evaluated(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, _ = read_text(settings.of_layer(1), TEXT)
    listed = Counter(each.latent for row in prompt.layers[0].active for each in row[:3])
    ((latent, _),) = listed.most_common(1)
    run_dir = settings.of_layer(1).run_dir()
    (run_dir / "notes.csv").write_text(f"layer,latent,label\n1,{latent},my own word\n")
    of = {"weights_sha256": "0" * 64, "metrics_version": METRICS_VERSION}
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/metrics.json").write_text(json.dumps({"provenance": of, "files": ["report.html"]}))
    for name in ("report.html", "latents.safetensors"):
        (run_dir / "evaluation" / name).touch()
    prompt, folder = read_text(settings.of_layer(1), TEXT)
    show(prompt, folder, Console(markup=False, emoji=False, width=80))
    printed = capsys.readouterr().out
    assert "my own word" in printed
    assert "no labels: this layer's run has no evaluation" in printed
    assert '"reports":{}' in (folder / "prompt.html").read_text()


def test_the_command_line(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate.read", "--layer", "1", "--text", TEXT, *more])
        with pytest.raises(InputError) as error:
            evaluate.read.main()
        return str(error.value)

    assert said("--new-tokens", "3").startswith("--new-tokens: nothing is changed; give SET, SCALE or ABLATE")
    assert "expected a whole number from 0, found '-3'" in said("--ablate", "1/3", "--new-tokens=-3")
    assert said("--set", "1/3").startswith("SET: expected layer/latent")
    assert said("--ablate", "2/3") == ('ABLATE: 2/3: layer 2 is not read, only layer 1; give LAYER="1 2"')


def test_a_family_without_direct_effects_says_why(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def refuses(*given: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == 2:  # of one context: then there are none of the others either
            raise InputError("granite: its logits are not its unembedding times its final norm's output")
        return directions(*given)

    monkeypatch.setattr("evaluate.prompt.measure.directions", refuses)
    prompt, folder = read_text(settings.of_layer(1), f"{TEXT} {TEXT} {TEXT}")
    assert len(done) > 2
    assert (
        prompt.effects_skipped == "granite: its logits are not its unembedding times its final norm's output"
    )
    assert prompt.layers[0].output_effect == []
    assert all(each.effect is None for active in prompt.layers[0].active for each in active)
    assert '"effect"' not in (folder / "prompt.json").read_text()
    show(prompt, folder, Console(markup=False, emoji=False, width=80))
    assert "no direct effects: granite: its logits" in capsys.readouterr().out
