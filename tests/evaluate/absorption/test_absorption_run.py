"""make absorption on a store whose words, inputs, outputs and transcoder are planted."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.terminal.table import console
from evaluate.absorption import FILE
from evaluate.absorption.__main__ import main
from evaluate.absorption.directions import classes
from evaluate.absorption.records import Absorption, Estimate
from evaluate.absorption.run import absorption, show
from evaluate.absorption.sample import ENDINGS, PER_WORD, UNSEEN, endings, sample
from shards import Store
from tests.evaluate.absorption.planted import (
    ABSORBED,
    LETTERS,
    ROWS,
    VOCABULARY,
    WORDS,
    coder,
    duplicated,
    plant,
    planted,
    stand_in,
    tokens_of,
)
from tests.evaluate.runs import arguments, make_run, settings_of
from tests.fixtures import make_store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("absorption")
    plant(root)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Absorption:
    return absorption(settings_of(root), ["plain", "split"])[0]


def test_the_probes_see_other_words_than_they_are_measured_on(root: Path) -> None:
    store = Store.of(settings_of(root))
    rows = sample(store, ROWS["heldout"])
    assert not set(rows.word[rows.apart]) & set(rows.word[~rows.apart])
    assert (
        max(np.unique(rows.word[side], return_counts=True)[1].max() for side in (rows.apart, ~rows.apart))
        == PER_WORD
    )
    unseen = {zlib.crc32(word.encode()) for word in WORDS if zlib.crc32(word.encode()) % UNSEEN == 0}
    assert set(rows.word[rows.apart].tolist()) == unseen
    for split, side in ((store.train, ~rows.apart), (store.heldout, rows.apart)):
        inputs, outputs = split.rows(0, len(split))
        place = torch.from_numpy(rows.place[side])
        assert torch.equal(rows.inputs[torch.from_numpy(side)], inputs[place])
        assert torch.equal(rows.outputs[torch.from_numpy(side)], outputs[place])


def test_a_planted_absorption_has_its_rate(found: Absorption) -> None:
    """Every word of a that is absorbed, and no other: the share of them among the measured rows."""
    tokens = tokens_of(ROWS["heldout"])
    unseen = np.array([zlib.crc32(word.encode()) % UNSEEN == 0 for word in WORDS])[tokens - 2]
    rows = {letter: unseen & ((tokens - 2) // 40 == n) for n, letter in enumerate(LETTERS)}
    # as many rows of each word are measured, so shares of words are shares of rows
    words = {letter: len(np.unique(tokens[own])) for letter, own in rows.items()}
    absorbed = np.unique(tokens[rows["a"] & np.isin(tokens - 2, ABSORBED)]) - 2
    rate = len(absorbed) / words["a"]
    assert 0.1 < rate < 0.6
    by_letter = {each.name: each for each in found.transcoders[0].prefixes[-1].classes}
    assert [*by_letter] == ["a", "b", "c"]
    assert by_letter["a"].latents == [0]
    assert by_letter["a"].absorbed.value == pytest.approx(rate, abs=1e-9)
    assert by_letter["a"].silent.value == pytest.approx(rate, abs=1e-9)
    assert by_letter["a"].fraction == pytest.approx(rate, abs=0.02)
    latents = {each.latent: each.rows for each in by_letter["a"].absorbers}
    assert latents == dict.fromkeys([4 + ABSORBED.index(word) for word in absorbed.tolist()], PER_WORD)
    assert sorted(by_letter["b"].latents) == [1, 3]
    assert by_letter["b"].absorbed.value == by_letter["b"].silent.value == 0
    assert by_letter["c"].latents == [2]
    full = found.transcoders[0].prefixes[-1]
    assert full.absorbed is not None
    assert full.absorbed.value == pytest.approx(rate / 3)
    assert full.absorbed.error == pytest.approx(np.std([rate, 0, 0], ddof=1) / 3**0.5)
    assert full.latents is not None
    assert (full.latents.value, full.latents.error) == pytest.approx((4 / 3, 1 / 3))


def test_the_coarse_prefix_has_no_latent_that_could_absorb(found: Absorption) -> None:
    """The main latent is as silent there, and nothing stands in for it."""
    coarse, full = found.transcoders[0].prefixes
    assert coarse.absorbed is not None
    assert coarse.absorbed.value == 0
    assert coarse.classes[0].silent.value == full.classes[0].silent.value > 0
    assert [each.latents for each in coarse.classes] == [[0], [1], [2]]
    assert coarse.fvu is not None
    assert full.fvu is not None
    assert coarse.fvu > full.fvu


def test_differences_are_paired(found: Absorption) -> None:
    """Between runs that absorb one class of three, and none."""
    plain, split = found.differences
    own = found.transcoders[0].prefixes[-1].absorbed
    assert own is not None
    for each in (plain, split):
        assert each.absorbed is not None
        assert each.absorbed.value == pytest.approx(-own.value)
        assert each.absorbed.error == pytest.approx(own.error)
    assert plain.latents is not None
    assert plain.latents.value == pytest.approx(-1 / 3)
    assert split.latents is not None
    assert split.latents.value == 0


def test_stability_of_each_group(found: Absorption) -> None:
    """Beside the run that neither absorbs nor is split: c is the same, a fires on 26 words of 40, b on two fifths.

    The latent on the other words of b has a partner too, with three fifths; those of single words have none.
    """
    plain, split = found.stability
    assert [(group.group, group.firing) for group in plain.groups] == [(0, 3), (1, 15)]
    assert [_value(group.partnered) for group in plain.groups] == pytest.approx([2 / 3, 1 / 15])
    assert _value(plain.partnered) == pytest.approx(3 / 18)
    assert [_value(group.partnered) for group in split.groups] == pytest.approx([1, 1 / 15])
    assert plain.rows == ROWS["heldout"]


def _value(each: Estimate | None) -> float:
    assert each is not None
    return each.value


def test_planted_variants(root: Path) -> None:
    """One latent for all of the words is a split, whatever it writes; none is silence alone; a duplicate is no split.

    Its part of the fraction: m of the row's effect e is the main latent's, as much the duplicate's, which counts up to
    what is missing, and not below 0.4 e.
    """
    settings = settings_of(root)
    made = {"all": stand_in(1), "other": stand_in(0), "none": stand_in(None)}
    made |= {"twice": duplicated(1), "halves": duplicated(0.5)}
    for name, own in made.items():
        folder = settings.run_dir().with_name(name)
        folder.mkdir()
        own.save(folder)
    found, _ = absorption(settings, list(made))
    rate = found.transcoders[0].prefixes[-1].classes[0].silent.value
    full = {line.transcoder: line.prefixes[-1].classes for line in found.transcoders}
    for name, n in {"all": 2, "other": 2, "none": 1}.items():
        a = full[name][0]
        assert (len(a.latents), a.absorbed.value, a.fraction) == (n, 0, 0)
        assert a.f1 == pytest.approx([2 * (1 - rate) / (2 - rate), 1][:n])
        assert a.silent.value == (rate if n == 1 else 0)
    for name, part in {"twice": 1.0, "halves": 0.5}.items():
        c = full[name][2]
        assert (len(c.latents), c.f1, c.absorbed.value, c.silent.value) == (1, [1.0], 0, 0)
        m = _share_of_c(root, part)
        assert c.fraction == pytest.approx(min(m, 1 - m) / (min(m, 1 - m) + m) if m >= 0.4 else 0, abs=0.02)


def _share_of_c(root: Path, part: float) -> float:
    """Of the effect of a row of c, that of a latent which writes so much of it: the rest is that a and b are absent."""
    rows = sample(Store.of(settings_of(root)), ROWS["heldout"])
    c = next(each for each in classes(rows) if each.task.name == "c")
    return float(np.mean(part * 2 * c.direction[2] / c.effect))


def test_what_the_probes_cannot_tell_does_not_count(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outputs that say nothing of the words: no class is left, and the table says so."""
    settings = settings_of(root, "--model.name", "tests/dumb")
    train, heldout = (
        (inputs, np.random.default_rng(3).standard_normal(outputs.shape).astype(np.float32))
        for inputs, outputs in (planted(n) for n in ROWS.values())
    )
    make_store(settings.store_path(0), train, heldout, vocabulary=VOCABULARY, model="tests/dumb")
    settings.run_dir().mkdir(parents=True)
    coder(True, True).save(settings.run_dir())
    found, file = absorption(settings, [])
    assert [each.used for each in found.classes] == [False] * 3
    assert all(each.inputs.value == 1 and each.outputs.value < 0.8 for each in found.classes)
    prefix = found.transcoders[0].prefixes[-1]
    assert (prefix.absorbed, prefix.latents, prefix.classes) == (None, None, [])
    show(found, file, console())
    assert (
        "classes that count (both probes are right on at least 80% of rows on unseen words): none"
        in capsys.readouterr().out
    )


def test_the_command_writes_and_prints(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.absorption", *arguments(root, "--with", "plain")])
    main()
    said = capsys.readouterr().out
    assert "first letter a, first letter b, first letter c" in said
    file = settings_of(root).run_dir() / FILE
    assert f"written {file}" in said
    values = json.loads(file.read_text())
    assert values["version"] == 1
    assert [each["transcoder"] for each in values["transcoders"]] == ["tiny", "plain"]
    assert set(values["provenance"]["weights_sha256"]) == {"tiny", "plain"}


def test_a_table_of_fewer_transcoders_does_not_take_the_place_of_an_earlier_one(root: Path) -> None:
    settings = settings_of(root)
    whole, file = absorption(settings, ["plain", "split"])
    absorption(settings, ["plain"])
    kept = [json.loads(each.read_text()) for each in file.parent.glob("earlier/*/absorption.json")]
    assert whole.written() in kept
    n = len(kept)
    absorption(settings, ["split", "plain"])  # says all that the one of `plain` does
    assert len([*file.parent.glob("earlier/*/absorption.json")]) == n


def test_a_store_with_too_few_rows_of_every_class_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    show(*absorption(settings_of(tmp_path), []), console())
    said = capsys.readouterr().out
    assert "no class has enough rows: 50 to fit probes on, and 20 held-out ones on 8 other words" in said


def test_train_rows_as_the_measured_ones_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.split: expected heldout"):
        absorption(settings_of(root, "--evaluate.split", "train"), [])


def test_endings() -> None:
    """The longest counts; short tokens, and those that are no ASCII letters, are not asked."""
    words = ["running", " thing", "ping", "ring2", "unity", "classes", "kindness", "Nations", "naïve", "tree"]

    class Labels:
        def label(self, token: int) -> str:
            return words[token]

    said = endings(Labels(), np.arange(len(words)))  # pyright: ignore[reportArgumentType]
    names = [*ENDINGS, "none"]
    expected = ["ing", "ing", "ing", None, "ity", "s", "ness", "s", None, "none"]
    assert [None if each < 0 else names[each] for each in said.tolist()] == expected
