"""Explanations of delphi and Neuronpedia, in the forms that they write, and one line for what is neither."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluate.notes import notes_of, read_notes
from tests.evaluate.explain.planted import N, planted_transcoder, settings_of

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run that was not evaluated: its weights are enough."""
    run_dir = settings_of(tmp_path).run_dir()
    run_dir.mkdir(parents=True)
    planted_transcoder().save(run_dir)
    return tmp_path


def delphi(folder: Path) -> Path:
    """As delphi's process writes its results: orjson, a file for each latent, a list of ClassifierOutput."""
    module = "layers.0.mlp"
    texts = {f"{module}_latent3": "words of class 3", f"{module}_latent7": "Explanation could not be parsed."}
    texts |= {f"{module}_latent4": "not scored", "layers.10.mlp_latent3": "of another layer"}
    (folder / "explanations").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "explanations" / f"{name}.txt").write_text(json.dumps(text))
    judged = {
        "detection": [(True, True), (True, True), (False, False), (False, True), (False, None)],
        "fuzz": [(True, True), (False, False)],
    }
    for scorer, pairs in judged.items():
        (folder / "scores" / scorer).mkdir(parents=True)
        examples = [
            {
                "str_tokens": ["a"],
                "activations": [1.0],
                "distance": 1,
                "activating": truth,
                "prediction": said,
            }
            for truth, said in pairs
        ]
        (folder / "scores" / scorer / f"{module}_latent3.txt").write_text(json.dumps(examples))
    (folder / "run_config.json").write_text(json.dumps({"explainer_model": "llama", "max_latents": 8}))
    return folder


def test_delphis_results(bare: Path, call: Call) -> None:
    """Detection 1 and 1/2, fuzzing 1: 0.875 is their mean; an example without a prediction was not judged."""
    code, out, err = call(bare, "--from", str(delphi(bare / "results")))
    assert code == 0, err
    said = notes_of(settings_of(bare).run_dir(), 0, N)
    assert {latent: note.text for latent, note in said.items()} == {
        3: "words of class 3 (llama, score 0.875)",
        4: "not scored (llama)",
    }
    assert "2 explanations, 1 of them with a score" in out
    assert "left out: 1 of other layers\n" in err
    assert "left out: 1 without text\n" in err


def test_two_modules_of_one_layer_are_not_mixed(bare: Path, call: Call) -> None:
    folder = delphi(bare / "results")
    (folder / "explanations" / "layers.0.attn_latent3.txt").write_text('"of the attention"')
    code, _, err = call(bare, "--from", str(folder))
    assert (code, "one module of layer 0, found layers.0.attn, layers.0.mlp; give a" in err) == (2, True)


def explanation(index: Any, description: str, layer: str = "0-planted", **more: Any) -> dict[str, Any]:
    return {"modelId": "tiny", "layer": layer, "index": str(index), "description": description} | more


SCORED = {"explanationModelName": "gpt-4o-mini", "scores": [{"value": 0.75}, {"value": 0.25}]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "a.json",
            [explanation(3, "three", **SCORED), explanation(3, "3", layer="10-planted"), explanation(4, " ")],
        ),
        ("a.jsonl.gz", [explanation(3, "worse", scores=[{"value": 0.1}]), explanation(3, "three", **SCORED)]),
        (
            "features.jsonl",
            [
                {
                    "modelId": "tiny",
                    "layer": "0-planted",
                    "index": "3",
                    "explanations": [SCORED | {"description": "three"}],
                }
            ],
        ),
        ("a.json", explanation(3, "three", **SCORED)),
    ],
    ids=["array", "lines", "features", "one"],
)
def test_neuronpedias_explanations(bare: Path, call: Call, name: str, values: Any) -> None:
    lines = isinstance(values, list) and "jsonl" in name
    text = "\n".join(map(json.dumps, values)) + "\n" if lines else json.dumps(values)
    path = bare / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    code, _, err = call(bare, "--from", str(path))
    assert code == 0, err
    said = notes_of(settings_of(bare).run_dir(), 0, N)
    assert {latent: note.text for latent, note in said.items()} == {3: "three (gpt-4o-mini, score 0.5)"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.json", None, "none.json: not found; give delphi's results folder, a file of Neuronpedia's"),
        ("a.json", "{", "a.json: not JSON: "),
        ("a.jsonl", '{"layer": 1}\n{', "a.jsonl: line 1: no key index; expected Neuronpedia's explanations"),
        ("a.csv", "latent,label\n3,x\n", "a.csv: line 1: no column layer; expected layer, latent, label"),
        ("a.csv", "layer,latent,label\n3,3,x\n", "holds no explanation of layer 0 (1 of other layers)"),
        ("a.csv", "layer,latent,label\n0,99,x\n", "a.csv: line 2: latent: expected 0 to 11, found 99"),
        (
            "a.csv",
            "layer,latent,label,score\n0,3,x,nan\n",
            "score: expected a number or nothing, found 'nan'",
        ),
        ("a.csv", "", "a.csv: expected a first line with the columns layer, latent, label"),
        (
            "a.json",
            '[{"latent": 3, "label": "x"}]',
            "object 1: layer: expected a whole number from 0, found None",
        ),
        ("a.json", '[{"layer": 0, "latent": 3, "label": "a\\ud800"}]', "label: half of a surrogate pair"),
        ("a.json", "[3]", "object 1: expected an object, found 3"),
        (
            "a.json",
            json.dumps([explanation(12, "x")]),
            "expected latents 0 to 11, found 12; it is of another run",
        ),
        ("a.json", json.dumps([explanation("x", "x")]), "index: expected a number first, found 'x'"),
        (
            "a.json",
            json.dumps([explanation(1, "x", layer="planted")]),
            "layer: expected a number first, found 'planted'",
        ),
        (
            "a.json",
            json.dumps([explanation(1, "x", layer="3-x")]),
            "holds no explanation of layer 0 (1 of other layers)",
        ),
        ("a.json", "[]", "holds no explanation of layer 0 (none at all)"),
        ("a.json.gz", "[]", "a.json.gz: not a whole .gz file: "),
    ],
)
def test_what_is_no_file_of_explanations(
    bare: Path, call: Call, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (bare / name).write_text(text)
    code, _, err = call(bare, "--from", str(bare / name))
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (settings_of(bare).run_dir() / "explanations.csv").exists()


ROWS = [
    {"layer": 0, "latent": 3, "label": 'three, "four"', "score": 0.5, "source": "me"},
    {"layer": 0, "latent": 4, "label": "worse", "score": 0.1, "source": ""},
    {"layer": 0, "latent": 4, "label": "better", "score": 0.2, "source": ""},
    {"layer": 1, "latent": 99, "label": "elsewhere", "score": 0.5, "source": "me"},
    {"layer": 0, "latent": 5, "label": "stale", "score": 0.5, "source": "me", "weights": "0" * 12},
]


@pytest.mark.parametrize("name", ["a.csv", "semicolons.csv", "a.tsv", "a.json", "a.jsonl"])
def test_a_table_of_several_layers(bare: Path, call: Call, name: str) -> None:
    """Of any program, as spreadsheets write it too; latents of other layers are as many as those have."""
    path = bare / name
    if "json" in name:
        text = "\n".join(map(json.dumps, ROWS)) if name.endswith("l") else json.dumps(ROWS)
    else:
        delimiter = {"a.csv": ",", "a.tsv": "\t"}.get(name, ";")
        made = io.StringIO()
        writer = csv.DictWriter(
            made, ["layer", "latent", "label", "score", "source", "weights"], delimiter=delimiter
        )
        writer.writeheader()
        writer.writerows(ROWS)
        text = "\ufeff" + made.getvalue()
        text = text.replace("0.5", "0,5") if delimiter == ";" else text
    path.write_text(text, encoding="utf-8", newline="")
    code, out, err = call(bare, "--from", str(path))
    assert code == 0, err
    said = notes_of(settings_of(bare).run_dir(), 0, N)
    assert {latent: note.text for latent, note in said.items()} == {
        3: 'three, "four" (me, score 0.5)',
        4: f"better ({path.stem}, score 0.2)",
    }
    assert "2 explanations, 2 of them with a score" in out
    for why in ("1 second explanations of a latent", "1 of other layers", "1 of other weights"):
        assert f"left out: {why}\n" in err


def test_text_that_could_not_be_written_or_read_again(bare: Path, call: Call) -> None:
    """Half of a surrogate pair, what a terminal obeys, and names longer than a label may be."""
    path = bare / "a.json"
    values = [
        explanation(3, "a\ud800b \x1b[2J", explanationModelName="c\ud800\nd"),
        explanation(4, "x", explanationModelName="y" * 2000),
    ]
    path.write_text(json.dumps(values))
    assert call(bare, "--from", str(path))[0] == 0
    said = read_notes(settings_of(bare).run_dir() / "explanations.csv", 0, N)
    assert (said[3].label, said[3].source) == ("a\\ud800b \\x1b[2J", "c\\ud800 d")
    assert len(said[4].source) == 1000


def test_a_scorer_whose_predictions_are_no_verdicts(bare: Path, call: Call) -> None:
    """ "no" is not taken for a yes."""
    folder = delphi(bare / "results")
    judged = [{"activating": True, "prediction": "no"}, {"activating": False, "prediction": 0.2}]
    for scorer in ("detection", "fuzz"):
        (folder / "scores" / scorer / "layers.0.mlp_latent3.txt").write_text(json.dumps(judged))
    assert call(bare, "--from", str(folder))[0] == 0
    assert notes_of(settings_of(bare).run_dir(), 0, N)[3].text == "words of class 3 (llama)"


def test_a_folder_that_is_not_delphis(bare: Path, call: Call) -> None:
    (bare / "x").mkdir()
    code, _, err = call(bare, "--from", str(bare / "x"))
    assert (code, "expected delphi's files <module>_latent<N>.txt, found none" in err) == (2, True)
    (bare / "x" / "mlp_latent3.txt").write_text('"a"')
    code, _, err = call(bare, "--from", str(bare / "x"))
    assert (code, "expected a module with its layer's number, such as layers.12.mlp, found mlp" in err) == (
        2,
        True,
    )
    (bare / "x" / "mlp_latent3.txt").rename(bare / "x" / "layers.0.mlp_latent3.txt")
    (bare / "x" / "layers.0.mlp_latent3.txt").write_text("3")
    code, _, err = call(bare, "--from", str(bare / "x"))
    assert (code, "expected a JSON string, found 3" in err) == (2, True)


def test_a_second_file_of_explanations_is_refused(bare: Path, call: Call) -> None:
    """Two would not be read; and what is read as notes is no business of this command."""
    run_dir = settings_of(bare).run_dir()
    (run_dir / "explanations.json").write_text("[]")
    (run_dir / "notes.csv").write_text("layer,latent,label\n0,1,mine\n")
    code, _, err = call(bare, "--from", str(delphi(bare / "results")))
    assert (code, "explanations.json: explanations are written to explanations.csv beside it" in err) == (
        2,
        True,
    )
    assert [*notes_of(run_dir, 0, N)] == [1]
