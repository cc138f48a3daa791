"""A text of one's own through the model: the same rows as a harvest of that text."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate.read
from common.errors import InputError
from common.settings import ROOT, Settings
from evaluate.read import Reader
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.models import write_jsonl

Make = Callable[..., Settings]
TEXT = (
    "the red river sings and the old stone sleeps while a green bird counts the small hours of a long night"
)


@pytest.fixture
def settings(llama: Path, settings_for: Make, tmp_path: Path) -> Settings:
    """Every document is the same one; its first 31 tokens are its one context."""
    files = write_jsonl(tmp_path / "same.jsonl", [TEXT + " " + TEXT] * 40)
    chosen = settings_for(llama, "--data.files", str(files), "--data.pack", "document", rows=500)
    chosen = chosen.model_copy(update={"paths": chosen.paths.model_copy(update={"checkpoints": tmp_path})})
    harvest(chosen)
    return chosen


def test_the_rows_of_a_harvest(settings: Settings) -> None:
    store, transcoder = Store.of(settings), random_coder(32, 32, (4, 16), layer=1)
    sentence = Reader(store, transcoder, "cpu")(TEXT + " " + TEXT)
    context, position = store.train.provenance(0, len(store.train))
    first = np.flatnonzero(context == 0)[np.argsort(position[context == 0])]
    inputs, outputs = store.train.rows(0, len(store.train))
    assert len(sentence.tokens) == len(first) == 31
    torch.testing.assert_close(sentence.inputs, inputs[first], atol=0.03, rtol=0.03)  # stored as int8
    torch.testing.assert_close(sentence.outputs, outputs[first], atol=0.03, rtol=0.03)
    assert torch.equal(sentence.acts, transcoder.encode(sentence.inputs))
    assert "".join(sentence.tokens).replace(" ", "").startswith("theredriversings")


def test_the_examples_of_the_docs(settings: Settings) -> None:
    page = (ROOT / "docs/python.md").read_text()
    read, changed = (
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Reader(" in code
    )
    names = {"store": Store.of(settings), "transcoder": random_coder(32, 32, (4, 16), layer=1)}
    exec(read, names)
    assert names["values"].shape == names["latents"].shape == (len(names["sentence"].tokens), 3)
    exec(changed, names)
    assert len(names["changed"].kl) == len(names["changed"].tokens)


def test_special_tokens_are_text_nothing_is_refused_and_a_long_text_is_cut(settings: Settings) -> None:
    reader = Reader(Store.of(settings), random_coder(32, 32, (4, 16), layer=1), "cpu")
    assert (
        len(reader("</s>").tokens) == len(reader.tokenizer.encode("</s>", add_special_tokens=False).ids) > 0
    )
    with pytest.raises(InputError, match="text: nothing to read"):
        reader("")
    with pytest.raises(InputError, match="text: not UTF-8, or half of a surrogate pair, at its character 4"):
        reader("caf\udce9")
    length = len(reader.tokenizer.encode(TEXT * 9, add_special_tokens=False).ids)
    long = reader(TEXT * 9)
    assert (len(long.tokens), long.left_out) == (31, length - 31)


def test_a_split_character_stands_at_the_token_that_completes_it(settings: Settings) -> None:
    reader = Reader(Store.of(settings), random_coder(32, 32, (4, 16), layer=1), "cpu")
    ids = reader.tokenizer.encode("a🙂b", add_special_tokens=False).ids
    assert len(ids) > 3, "the emoji is one token: nothing is split"
    tokens = reader("a🙂b").tokens
    assert len(tokens) == len(ids)
    assert "".join(tokens).strip() == "a🙂b"
    assert tokens[-2:] == ["🙂", "b"]


def test_a_model_that_has_moved(settings: Settings, tmp_path: Path) -> None:
    store, coder = Store.of(settings), random_coder(32, 32, (4, 16), layer=1)
    here, there = Path(settings.model.name), tmp_path / "elsewhere" / "tiny"
    shutil.copytree(here, there)
    before, after = Reader(store, coder, "cpu")(TEXT), Reader(store, coder, "cpu", str(there))(TEXT)
    assert torch.equal(before.acts, after.acts)
    with pytest.raises(InputError, match="no such directory"):
        Reader(store, coder, "cpu", str(tmp_path / "nowhere"))


def test_a_transcoder_is_bound_to_the_store(settings: Settings) -> None:
    """One with the gain reads as its conversion does; one of another layer is refused, and reads on purpose."""
    store, own = Store.of(settings), random_coder(32, 32, (4, 16), layer=1)
    gain = torch.tensor(store.manifest.source.gain)
    fed = replace(own.parameters, W_enc=own.W_enc / gain)
    with_gain = replace(own, parameters=fed, metadata={"source": {"input": "mlp_in", "layer": 1}})
    expected = Reader(store, own, "cpu")(TEXT).acts
    torch.testing.assert_close(Reader(store, with_gain, "cpu")(TEXT).acts, expected, rtol=1e-4, atol=1e-4)
    other = random_coder(32, 32, (4, 16), layer=0)
    with pytest.raises(InputError, match=r"it is of layer 0, there 1; .*mismatch=True"):
        Reader(store, other, "cpu")
    assert torch.equal(Reader(store, other, "cpu", mismatch=True)(TEXT).acts, expected)
    with pytest.raises(InputError, match="expected widths 32 -> 32"):
        Reader(store, random_coder(16, 32, (4, 16), layer=1), "cpu", mismatch=True)


def options_of(settings: Settings) -> list[str]:
    places = ("--paths.activations", settings.paths.activations, "--paths.checkpoints")
    model = ("--model.name", settings.model.name, "--model.device", "cpu")
    return ["--layer", "1", *model, *places, str(settings.paths.checkpoints)]


def test_the_command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_coder(32, 32, (4, 16), layer=1).save(settings.run_dir())
    options = options_of(settings)
    monkeypatch.setattr("sys.argv", ["evaluate.read", *options, "--text", "the red [bold]river"])
    evaluate.read.main()
    out = capsys.readouterr().out
    assert "river" in out
    assert "latents as number:activation" in out
    monkeypatch.setattr("sys.argv", ["evaluate.read", *options, "--text", "a", "--run", "absent"])
    with pytest.raises(InputError, match="not found; train this run first"):
        evaluate.read.main()


def test_a_long_file_is_read_whole_and_every_number_is_the_transcoders(
    settings: Settings, tmp_path: Path
) -> None:
    """Three contexts; activations are `encode`'s, and the error is |y - y_hat|^2 / |y - mean|^2 of each row."""
    coder, store = random_coder(32, 32, (4, 16), layer=1), Store.of(settings)
    coder.save(settings.run_dir())
    file = tmp_path / "long.txt"
    file.write_text(f"\ufeff{TEXT}\n{TEXT}\n", encoding="utf-8")
    text = evaluate.read.text_of(None, str(file))
    assert text == f"{TEXT}\n{TEXT}\n"
    prompt, folder = evaluate.read.read_text(settings, text)
    reader = Reader(store, coder, "cpu")
    ids = reader.tokenizer.encode(text, add_special_tokens=False).ids
    assert sum(token.row for token in prompt.tokens) == len(ids)
    assert max(token.context for token in prompt.tokens) == (len(ids) - 1) // 31
    (layer,) = prompt.layers
    sentence = reader(text)  # the first context
    moments = store.manifest.splits["train"].outputs
    assert moments is not None
    mean = torch.tensor(moments.mean, dtype=torch.float32)
    for g, ends in enumerate((4, 16)):
        error = (sentence.outputs - coder.prefix(g)(sentence.inputs)).square().sum(-1)
        expected = error / (sentence.outputs - mean).square().sum(-1)
        torch.testing.assert_close(torch.tensor(layer.error_share[g][:31]), expected, rtol=1e-5, atol=1e-6)
        assert layer.prefix_ends[g] == ends
    for acts, active in zip(sentence.acts, layer.active[:31], strict=True):
        assert {each.latent: each.value for each in active} == {
            f: float(acts[f]) for f in acts.nonzero().flatten().tolist()
        }
        assert [each.value for each in active] == sorted((each.value for each in active), reverse=True)
    assert {latent: known.group for latent, known in layer.latents.items()} == {
        each.latent: int(each.latent >= 4) for active in layer.active for each in active
    }
    assert json.loads((folder / "prompt.json").read_text())["layers"][0]["layer"] == 1
    page = (folder / "prompt.html").read_text()
    assert "<script>window" not in page
    assert len(prompt.tokens) > 62


def test_what_is_read_is_given_once(tmp_path: Path) -> None:
    for asked in ((None, None), ("a", "b")):
        with pytest.raises(InputError, match=r"expected either TEXT=.* or FILE="):
            evaluate.read.text_of(*asked)
    with pytest.raises(InputError, match="absent: cannot be read: No such file"):
        evaluate.read.text_of(None, str(tmp_path / "absent"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="latin: not UTF-8 at byte 3"):
        evaluate.read.text_of(None, str(tmp_path / "latin"))


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # python -m evaluate.read --file - <&-
    with pytest.raises(InputError, match="-: standard input is closed"):
        evaluate.read.text_of(None, "-")


def test_an_intervention_adds_the_change_of_the_reconstruction(settings: Settings) -> None:
    """Equal to a hook that adds it by hand; a latent that does not fire changes nothing when it is ablated."""
    store, coder = Store.of(settings), random_coder(32, 32, (4, 16), layer=1)
    reader = Reader(store, coder, "cpu")
    acts = reader(TEXT).acts
    n, source = len(acts), store.manifest.source
    firing = int(acts.sum(0).argmax())
    found = reader.run(TEXT, set={firing: 2.5}, positions=[3])
    added = torch.zeros(n + 1, 32)
    added[4] = (2.5 - acts[3, firing]) * coder.W_dec[firing]  # the first token has no row
    own = reader.tokenizer.encode(TEXT, add_special_tokens=False).ids
    ids = torch.tensor([[source.bos_token_id, *own]])[:, : source.context_length]

    def by_hand(output: torch.Tensor, **_: object) -> torch.Tensor:
        return output + added

    bridge = reader.model.bridge
    with torch.inference_mode(), bridge.hooks(fwd_hooks=[(source.output_hook, by_hand)]):
        expected = bridge(ids, return_type="logits")[0]
    torch.testing.assert_close(found.after, expected, rtol=1e-5, atol=1e-5)
    assert (found.kl[:4] < 1e-6).all()
    assert found.kl[4] > 1e-6
    assert found.changes.flatten().nonzero().flatten().tolist() == [3]
    assert found.tokens[1:] == reader(TEXT).tokens
    torch.testing.assert_close(
        reader.run(TEXT, ablate=[firing]).after, reader.run(TEXT, set={firing: 0.0}).after
    )
    torch.testing.assert_close(
        reader.run(TEXT, scale={firing: 1.0}).after, reader.run(TEXT).before, rtol=0, atol=0
    )
    silent = replace(coder, thresholds=torch.full_like(coder.thresholds, 1e6))
    nothing = Reader(store, silent, "cpu").run(TEXT, ablate=range(16))
    assert torch.equal(nothing.before, nothing.after)


def test_a_planted_latent_makes_the_model_write_its_word(settings: Settings) -> None:
    """Its decoder row is the word's unembedding: set so high that it drowns all else, the word comes each time."""
    store, coder = Store.of(settings), random_coder(32, 32, (4, 16), layer=1)
    reader = Reader(store, coder, "cpu")
    unembedding = reader.model.bridge.original_model.get_output_embeddings().weight.detach().float()
    word = int(unembedding.norm(dim=1).argmax())  # no other word's is longer along it
    direction = unembedding[word]
    W_dec = coder.W_dec.clone()
    W_dec[5] = direction / direction.norm()
    planted = replace(coder, parameters=replace(coder.parameters, W_dec=W_dec))
    found = Reader(store, planted, "cpu").run("the old stone", set={5: 1e4}, new_tokens=3)
    assert found.after[1:].argmax(-1).eq(word).all()
    assert found.continuation[1] == reader.tokenizer.decode([word] * 3)
    assert found.continuation[0] != found.continuation[1]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"ablate": [1.5]}, "'float' object cannot be interpreted as an integer"),
        ({"set": {16: 1.0}}, "latent: expected 0 to 15, found 16"),
        ({"set": {3: 1.0}, "ablate": [3]}, "latent 3: changed twice"),
        ({"ablate": [1], "positions": [99]}, "positions: expected numbers of rows from 0 to .*, found 99"),
        ({"ablate": [1], "new_tokens": -1}, "new_tokens: expected 0 to .*, found -1"),
        ({"ablate": [1], "new_tokens": 10**6}, "new_tokens: expected 0 to .*, found 1000000"),
    ],
)
def test_an_intervention_that_cannot_be_done(settings: Settings, asked: dict, line: str) -> None:
    reader = Reader(Store.of(settings), random_coder(32, 32, (4, 16), layer=1), "cpu")
    with pytest.raises((InputError, TypeError), match=line):
        reader.run(TEXT, **asked)
