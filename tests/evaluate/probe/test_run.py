"""make probe on a tiny run: what it writes, when it measures again, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate.probe.__main__ as command
from common.errors import InputError
from common.files import sha256
from common.settings import Settings
from evaluate.probe import fit, measure, run
from evaluate.probe.console import lines
from evaluate.probe.documents import documents_of
from evaluate.probe.page import show_probes
from evaluate.probe.records import LeftOutClass, Probes
from evaluate.probe.run import probe
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import arguments, make_run, settings_of
from tests.models import WORDS

VOCABULARY = ["<s>", "</s>", *(f"{a}{b}" for a in ("word", "Word") for b in "abcdefghijklmnopqrstuvwxy")]


@pytest.fixture(autouse=True)
def two_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits take the time: of k = 1 and 5, twice at random, with one penalty."""
    monkeypatch.setattr(measure, "KS", (1, 5))
    monkeypatch.setattr(measure, "DRAWS", 2)
    monkeypatch.setattr(fit, "INVERSE_PENALTIES", (0.01,))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Contexts of one document each; every token is a word, half of them with a capital."""
    make_run(tmp_path, vocabulary=VOCABULARY, pack="document", separator_token_id=None)
    return tmp_path


def test_probes_are_written_beside_the_evaluation_once(tiny: Path) -> None:
    settings = settings_of(tiny)
    probes, path, fresh = probe(settings)
    assert fresh
    assert path == settings.run_dir() / "evaluation" / "probes.json"
    assert json.loads(path.read_text()) == probes.written()
    assert [each.family for each in probes.families] == ["capitalised"]
    (family,), of = probes.families, probes.provenance
    assert [prefix.end for prefix in family.prefixes] == [4, 10, 24]
    assert abs(family.outputs.accuracy - 0.5) < 4 * family.outputs.error  # tokens and rows are random
    assert (of.documents, of.rows, of.split, of.labels_sha256) == ("stretches", 1500, "heldout", None)
    before = path.stat().st_mtime_ns
    assert probe(settings)[2] is False
    assert path.stat().st_mtime_ns == before
    path.write_text(path.read_text().replace('"probes_version": 1', '"probes_version": 0'))
    assert probe(settings)[2] is True


def test_in_the_terminal(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command.show(*probe(settings_of(tiny)), command.console())
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if line[0] in "┏┃┡│└") <= 80
    assert "1,500 held-out rows, tested on 15 documents: accuracy in %" in shown
    assert "within 5 points of the raw outputs in 1 of 1 questions, 1 of 1 classes" in shown
    assert "found by cutting the text into stretches, as it does not say where they end" in shown
    assert "too few rows: " in shown


def test_a_text_of_one_document_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, vocabulary=VOCABULARY)  # joined, and no separator among its tokens
    with pytest.raises(
        InputError, match=r"^probes: expected rows of at least 10 documents, .* found 1; harvest more"
    ):
        probe(settings_of(tmp_path))
    assert not (settings_of(tmp_path).run_dir() / "evaluation").exists()


def test_labels_of_another_text_are_refused(tiny: Path) -> None:
    (tiny / "a.jsonl").write_text('{"text": "a", "topic": "x"}\n')
    with pytest.raises(InputError, match=r"^data\.files: is another text than the store was harvested from"):
        probe(settings_of(tiny, "--data.files", str(tiny / "a.jsonl"), "--data.label_column", "topic"))


@pytest.fixture
def labelled(settings_for: Callable[..., Settings], llama: Path, tmp_path: Path) -> Settings:
    """Two files of texts harvested from a real model: of label 1 with half of the words, of 2 with the rest."""
    rng, half = np.random.default_rng(0), len(WORDS) // 2
    for name in ("a.jsonl", "b.jsonl"):
        with (tmp_path / name).open("w", encoding="utf-8") as file:
            for number in range(150):
                label = number % 2
                words = " ".join(rng.choice(WORDS[half * label :][:half], 30))
                line = (
                    {"text": words, "meta": {"topic": label + 1}} if number % 10 else {"text": f"x {words}"}
                )
                file.write(json.dumps(line) + "\n")
    files = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    options = (
        "--data.files",
        files,
        "--data.label_column",
        "meta.topic",
        "--harvest.heldout_fraction",
        "0.5",
    )
    settings = settings_for(llama, *options, rows=3000)
    harvest(settings)
    store = Store.of(settings)
    coder = random_coder(store.train.d_in, store.train.d_out, (16, 48), layer=1)
    coder.save(settings.run_dir())
    return settings


def test_labels_and_files_of_a_harvested_text(labelled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that its documents, read again, are those between the separating tokens."""
    monkeypatch.setattr(run, "token_tasks", lambda *_: [])
    probes, _, _ = probe(labelled)
    families = {each.family: each for each in probes.families}
    assert families["label"].inputs.accuracy > 0.95  # its words tell a text's label
    assert abs(families["source"].inputs.accuracy - 0.5) < 4 * families["source"].inputs.error
    assert [(each.family, each.name) for each in probes.classes] == [("source", "a.jsonl"), ("label", "1")]
    assert (probes.provenance.documents, probes.provenance.label_column) == ("text", "meta.topic")
    store = Store.of(labelled)
    again = documents_of(labelled, store, store.heldout, "heldout")
    unread = labelled.model_copy(
        update={"data": labelled.data.model_copy(update={"files": (), "label_column": None})}
    )
    between = documents_of(unread, store, store.heldout, "heldout")
    assert (again.how, between.how) == ("text", "separators")
    assert (again.of == between.of).all()
    assert between.sources_unknown
    assert between.sources_unknown.startswith("data.files: is another text than the store was harvested from")


def test_labels_that_are_not_there_are_told_with_the_columns_that_are(labelled: Settings) -> None:
    def refused(column: str) -> str:
        data = labelled.data.model_copy(update={"label_column": column})
        with pytest.raises(InputError) as stopped:
            probe(labelled.model_copy(update={"data": data}))
        return str(stopped.value)

    said = refused("topic")
    assert "expected at least two labels among the " in said
    assert "found none (" in said
    assert said.endswith("line 1: no column 'topic'; expected data.label_column among text)")


def test_other_rows_do_not_take_the_place_of_earlier_probes(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do they of labels that they are without; what says all of it does, and nothing is kept twice."""
    _, path, _ = probe(settings_of(tiny))
    whole = path.read_bytes()
    probe(settings_of(tiny, "--evaluate.rows", "1400"))
    (kept,) = path.parent.glob("earlier/*/probes.json")
    assert kept.read_bytes() == whole
    assert f"the table that was here is kept: {kept.parent}" in capsys.readouterr().err
    assert run.written(settings_of(tiny, "--evaluate.rows", "1400")).provenance.rows == 1400
    of = Probes.model_validate_json(whole).provenance
    labelled = of.model_copy(update={"label_column": "topic", "labels_sha256": "x"})
    assert run.answers_all(of, labelled)
    assert not run.answers_all(labelled, of)
    assert run.answers_all(of.model_copy(update={"weights_sha256": "x"}), of)


def test_several_layers_are_read_once_each(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their table at the end is made of what was written."""
    make_run(tiny, vocabulary=VOCABULARY, pack="document", separator_token_id=None, layer=1)
    read = list[int]()

    def counted(settings: Settings, *others: Any) -> Any:
        read.append(settings.layer)
        return documents_of(settings, *others)

    monkeypatch.setattr(run, "documents_of", counted)
    monkeypatch.setattr("sys.argv", ["evaluate.probe", *arguments(tiny, "--layer", "0 1")])
    command.main()
    assert read == [0, 1]
    assert "│     1 │ capitalised │" in capsys.readouterr().out


def test_a_label_of_each_document_is_not_told_whole(tiny: Path) -> None:
    probes, _, _ = probe(settings_of(tiny))
    left_out = [LeftOutClass(family="label", name=f"{n}\x1b[2J" + "y" * 5000, why="few") for n in range(300)]
    *_, line = lines(probes.model_copy(update={"left_out": left_out}))
    assert len(line) < 1200
    assert line.startswith("left out, too few rows: label 0\\x1b[2Jyyy")
    assert line.endswith("… and 274 more")


def test_in_the_page_of_the_evaluation_on_the_same_rows(tiny: Path) -> None:
    """Put there, replaced, and taken away where the page is of other weights; a page without a place stays."""
    settings = settings_of(tiny)
    folder = settings.run_dir() / "evaluation"
    folder.mkdir()
    digest = sha256(settings.run_dir() / "transcoder.safetensors")
    of = {"weights_sha256": digest, "split": "heldout", "rows": 1500}
    of["store_fingerprint"] = Store.of(settings).manifest.fingerprint
    (folder / "metrics.json").write_text(json.dumps({"provenance": of, "files": ["report.html"]}))
    bare = b"<p>before</p><!-- sides --><!-- /sides --><p>after</p>"
    (folder / "report.html").write_bytes(bare)
    probes, path, _ = probe(settings)
    assert path.parent == folder
    page = (folder / "report.html").read_text()
    assert page.startswith(
        "<p>before</p><!-- sides --><!-- /sides --><!-- probes -->\n  <h2>What a few latents tell</h2>"
    )
    assert page.endswith("<!-- /probes --><p>after</p>")
    assert page.count('<th scope="row">capitalised </th>') == 1
    for latent in probes.classes[0].prefixes[-1].sparse[1].latents:
        assert f'<a href="#latent={latent}">{latent}</a>' in page
    show_probes(folder)
    assert (folder / "report.html").read_text() == page
    (folder / "metrics.json").write_text(
        json.dumps({"provenance": of | {"weights_sha256": "x"}, "files": []})
    )
    show_probes(folder)
    assert (folder / "report.html").read_bytes() == bare
    (folder / "report.html").write_bytes(b"<p>of long ago</p>")
    show_probes(folder)
    assert (folder / "report.html").read_bytes() == b"<p>of long ago</p>"
