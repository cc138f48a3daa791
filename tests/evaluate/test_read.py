"""A text of one's own through the model: the same rows as a harvest of that text."""

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


def test_the_example_of_the_docs(settings: Settings) -> None:
    page = (ROOT / "docs/python.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Reader(" in block)
    names = {"store": Store.of(settings), "transcoder": random_coder(32, 32, (4, 16), layer=1)}
    exec(code, names)
    assert names["values"].shape == names["latents"].shape == (len(names["sentence"].tokens), 3)


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


def test_the_command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_coder(32, 32, (4, 16), layer=1).save(settings.run_dir())
    options = [
        "--layer",
        "1",
        "--model.name",
        settings.model.name,
        "--paths.activations",
        settings.paths.activations,
    ]
    options += ["--paths.checkpoints", str(settings.paths.checkpoints), "--model.device", "cpu"]
    monkeypatch.setattr("sys.argv", ["evaluate.read", *options, "--text", "the red [bold]river"])
    evaluate.read.main()
    out = capsys.readouterr().out
    assert "river" in out
    assert "strongest latents" in out
    monkeypatch.setattr("sys.argv", ["evaluate.read", *options, "--text", "a", "--run", "absent"])
    with pytest.raises(InputError, match="not found; train this run first"):
        evaluate.read.main()
