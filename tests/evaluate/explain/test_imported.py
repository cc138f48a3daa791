"""Explanations of delphi and Neuronpedia, in the forms that they write, and one line for what is neither."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluate.notes import notes_of
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
        ("none.json", None, "none.json: not found; give delphi's results folder or a file of Neuronpedia's"),
        ("a.json", "{", "a.json: not JSON: "),
        ("a.jsonl", '{"layer": 1}\n{', "a.jsonl: line 1: no key index; expected Neuronpedia's explanations"),
        (
            "a.json",
            '[{"layer": 0, "latent": 3, "label": "x"}]',
            "no key index; expected Neuronpedia's explanations",
        ),
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
