"""Activation samples against a plain loop, and their files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from common.tokens import TokenText
from shards import Store
from tests.common.test_tokens import byte_level
from train import samples_page
from train.activation_samples import PER_LATENT, Samples, _texts
from train.loop import train
from transcoder.entries import Entries


def batch(generator: torch.Generator, n_rows: int, d_sae: int) -> tuple[Entries, torch.Tensor]:
    active = torch.rand(n_rows, d_sae, generator=generator) < 0.4
    rows, latents = active.nonzero(as_tuple=True)
    values = torch.rand(len(rows), generator=generator) + 0.01
    return Entries(rows, latents, values, n_rows), torch.randperm(60, generator=generator)[:n_rows]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 6))
def test_collect_equals_a_loop_over_latents(seed: int, n_rows: int, d_sae: int) -> None:
    """Several batches over 60 rows, so that rows come again."""
    generator = torch.Generator().manual_seed(seed)
    kept, expected = Samples(d_sae, torch.device("cpu")), [dict[int, float]() for _ in range(d_sae)]
    for _ in range(4):
        entries, numbers = batch(generator, n_rows, d_sae)
        kept.collect(entries, numbers)
        for f in range(d_sae):
            mine = entries.latents == f
            new = dict(zip(numbers[entries.rows[mine]].tolist(), entries.values[mine].tolist(), strict=True))
            newest = sorted(new.items(), key=lambda item: -item[1])[:PER_LATENT]
            both = expected[f] | dict(newest)
            expected[f] = dict(sorted(both.items(), key=lambda item: -item[1])[:PER_LATENT])
    for f in range(d_sae):
        collected = {int(r): float(v) for r, v in zip(kept.rows[f], kept.values[f], strict=True) if r >= 0}
        assert collected == expected[f]
        assert kept.values[f].tolist() == sorted(kept.values[f].tolist(), reverse=True)


@pytest.fixture(scope="module")
def sampled(store: Store, store_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train.runs import tiny_settings

    chosen = tiny_settings(store_root, tmp_path_factory.mktemp("sampled"))
    train(chosen, store)
    return chosen.run_dir()


def test_samples_point_at_their_rows(sampled: Path, store: Store) -> None:
    lines = list(samples_page.read(sampled))
    assert [line["latent"] for line in lines] == list(range(64))
    assert [line["group"] for line in lines] == [0] * 8 + [1] * 16 + [2] * 40
    samples = [sample for line in lines for sample in line["samples"]]
    assert len(samples) > 200
    context, position = store.train.provenance(0, len(store.train))
    for sample in samples[::7]:
        row = sample["row"]
        assert (sample["context"], sample["position"]) == (context[row], position[row])
        token = int(store.train.contexts[int(context[row])][position[row]])
        assert sample["token"] == f" word{token - 2}"
        assert sample["before"].startswith(" <s>")


def test_a_split_character_stands_at_the_token_that_completes_it() -> None:
    tokenizer = byte_level(["a"])
    ids = np.array([tokenizer.encode("a🙂b").ids])
    three, four, five = _texts(TokenText(tokenizer), ids, np.zeros(3, np.int64), np.array([3, 4, 5]))
    assert three == {"before": "a", "token": "", "after": "🙂b"}
    assert four == {"before": "a", "token": "🙂", "after": "b"}
    assert five == {"before": "a🙂", "token": "b", "after": ""}


def test_the_page_shows_text_and_runs_nothing(sampled: Path) -> None:
    line = next(samples_page.read(sampled))
    evil = {"value": 1.0, "context": 0, "position": 1, "before": "<script>", "token": "&", "after": "</p>"}
    part = evil | {"token": ""}
    page = samples_page.render([line | {"samples": [evil, part]}, line | {"samples": []}])
    assert "<script" not in page
    assert "&lt;script&gt;<mark>&amp;</mark>&lt;/p&gt;" in page
    assert "<mark>·</mark>" in page
    assert "never active" in page


def test_the_command_prints_and_renders(
    sampled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((sampled / "settings.json").read_text())["settings"]
    options = ["--layer", "0", "--run", "a", "--model.name", "tests/tiny"]
    options += ["--paths.checkpoints", recorded["paths"]["checkpoints"]]
    monkeypatch.setattr("sys.argv", ["train.samples_page", *options])
    samples_page.main()
    printed = capsys.readouterr().out
    assert "latent 0 (group 0)" in printed
    assert "64 of 64 latents in" in printed
    assert (sampled / "activation_samples" / "samples.html").is_file()
    monkeypatch.setattr("sys.argv", ["train.samples_page", *options, "--latents", "64"])
    with pytest.raises(InputError, match="64: expected numbers from 0, below 64"):
        samples_page.main()
    monkeypatch.setattr("sys.argv", ["train.samples_page", *options, "--latents", "56,12", "3"])
    samples_page.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^latent (\d+) \(group \d\)$", printed, re.MULTILINE) == ["56", "12", "3"]
    page = (sampled / "activation_samples" / "samples.html").read_text()
    assert re.findall(r"<h2>latent (\d+)", page) == ["56", "12", "3"]


def test_text_cannot_command_the_terminal() -> None:
    assert samples_page.printable("a\nb\x1b[2J\x9b\u202e é 🙂") == "a\\nb\\x1b[2J\\x9b\\u202e é 🙂"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["56,12"], [56, 12]),
        (["56,", "12"], [56, 12]),
        (["56", "12"], [56, 12]),
        (["56 12"], [56, 12]),
        (["0"], [0]),
        (["5,5,1,"], [5, 1]),
    ],
)
def test_latents_are_given_with_commas_or_spaces(words: list[str], expected: list[int]) -> None:
    assert samples_page.numbers(words) == expected


@pytest.mark.parametrize("word", ["5-8", "five", ",", "1.5", "0x1"])
def test_what_is_no_latent_is_named(word: str) -> None:
    with pytest.raises(InputError, match=f"latents: '{word}': expected numbers, for example --latents 56,12"):
        samples_page.numbers([word])


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no samples; train with train.sample_every above 0"):
        next(samples_page.read(tmp_path))
