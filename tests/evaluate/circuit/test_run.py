"""From settings and a text to the two files, on a set of real stores; what is refused; labels."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import load, parser
from common.errors import InputError
from common.settings import Settings
from common.tokens import TokenText
from evaluate.circuit import __main__ as command
from evaluate.circuit.graph import ERROR, LATENT, LOGIT, TOKEN
from evaluate.circuit.run import trace
from evaluate.labels.effects import tokens_of
from evaluate.run import evaluate
from harvest.run import harvest
from shards import Store
from shards.store import read_tokenizer
from tests.evaluate.fakes import random_coder
from tests.models import save_model, sentences, write_jsonl

TEXT = "the red river sings"


def make_set(root: Path, model: Path, *more: str, skip: bool = False) -> Settings:
    """Stores of all three layers, and random transcoders named "a" in each."""
    corpus = write_jsonl(root / "corpus.jsonl", sentences(200))
    argv = ["--layer", "0 1 2", "--run", "a", "--model.name", str(model), "--model.device", "cpu"]
    argv += ["--data.files", str(corpus), "--data.pack", "concat", "--harvest.rows", "1000"]
    argv += ["--harvest.context_length", "16", "--harvest.heldout_fraction", "0.1"]
    argv += [
        "--paths.activations",
        str(root / "activations"),
        "--paths.checkpoints",
        str(root / "runs"),
        *more,
    ]
    settings = load(parser("harvest", ""), argv)[0]
    harvest(settings)
    for layer in settings.layers:
        one = settings.model_copy(update={"layers": (layer,)})
        source = Store.of(one).manifest.source.model_dump(mode="json")
        coder = random_coder(32, 32, (8, 40), seed=layer, skip=skip)
        one.run_dir().mkdir(parents=True)
        replace(coder, metadata={"source": source}).save(one.run_dir())
    return settings


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Settings:
    return make_set(tmp_path_factory.mktemp("set"), llama)


def of(settings: Settings, *layers: int) -> Settings:
    return settings.model_copy(update={"layers": layers})


def test_both_files(layers: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    traced = trace(of(layers), TEXT, None, 100)
    assert traced.folder.parent == layers.set_dir() / "circuits"
    assert traced.folder.name.startswith("the-red-river-sings-")
    assert "layers without an evaluation of these weights: 0 1 2" in capsys.readouterr().err
    assert sorted(path.name for path in traced.folder.iterdir()) == [
        "circuit.html",
        "graph-metadata.json",
        "graph.json",
    ]
    graph = json.loads((traced.folder / "graph.json").read_text())
    assert "".join(graph["metadata"]["prompt_tokens"]) == "<bos>" + TEXT
    nodes, circuit = {node["node_id"]: node for node in graph["nodes"]}, traced.circuit
    assert len(nodes) == len(graph["nodes"]) == len(circuit.nodes)
    assert len(graph["links"]) == len(circuit.source)
    for link, effect in zip(graph["links"], circuit.effect, strict=True):
        assert link["weight"] == pytest.approx(float(effect), rel=1e-5)
        assert nodes[link["source"]]["ctx_idx"] <= nodes[link["target"]]["ctx_idx"]
    latent = next(node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, number, position = map(int, latent["node_id"].split("_"))
    assert latent["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    which = (circuit.nodes.layer == layer) & (circuit.nodes.number == number)
    which &= (circuit.nodes.position == position) & (circuit.nodes.kind == LATENT)
    assert latent["activation"] == pytest.approx(float(circuit.nodes.value[which][0]))
    assert latent["clerp"].startswith("promotes '")
    alike = [label for label in traced.labels if label.like_random]
    assert alike
    assert all(label.text.endswith("(no more than a random direction might)") for label in alike)
    logits = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert [node["layer"] for node in logits] == ["4"] * 10
    assert sum(node["is_target_logit"] for node in logits) == 1
    kinds = [int((circuit.nodes.kind == kind).sum()) for kind in (LATENT, ERROR, TOKEN, LOGIT)]
    assert all(kinds), kinds


def test_promoted_tokens_are_of_the_stores_text(layers: Settings) -> None:
    """As in the report and in Python: tokens that the text does not have are not ranked."""
    traced, store = trace(of(layers), TEXT, None, 100), Store.of(of(layers, 0))
    tokens = TokenText(read_tokenizer(store.tokenizer_path))
    in_text = {tokens.label(int(token)) for token in np.flatnonzero(tokens_of(store, tokens.size))}
    assert len(in_text) < tokens.size / 2
    promoted = [label.promotes for label in traced.labels if label.promotes]
    assert len(promoted) == (traced.circuit.nodes.kind == LATENT).sum()
    assert set().union(*promoted) <= in_text


def test_the_same_again_and_other_texts_and_prefixes_beside_it(layers: Settings) -> None:
    first = trace(of(layers), TEXT, None, 100)
    before = (first.folder / "graph.json").read_bytes()
    again, coarse, other = (
        trace(of(layers), *rest, 100) for rest in ((TEXT, None), (TEXT, 0), (f"{TEXT} and", None))
    )
    assert again.folder == first.folder
    assert (first.folder / "graph.json").read_bytes() == before
    assert len({first.folder, coarse.folder, other.folder}) == 3
    assert coarse.circuit.nodes.number[coarse.circuit.nodes.kind == LATENT].max() < 8
    assert first.circuit.nodes.number[first.circuit.nodes.kind == LATENT].max() >= 8
    foreign = trace(of(layers), "日本語 🙂", None, 10)
    assert foreign.folder.name.startswith("text-")


def test_a_persons_label_stands_before_the_automatic_one(layers: Settings) -> None:
    traced = trace(of(layers), TEXT, None, 100)
    node = int(np.flatnonzero(traced.circuit.nodes.kind == LATENT)[0])
    layer, number = (int(each[node]) for each in (traced.circuit.nodes.layer, traced.circuit.nodes.number))
    said = of(layers, layer).run_dir() / "notes.csv"
    said.write_text(f"layer,latent,label\n{layer},{number},red rivers\n")
    try:
        again = trace(of(layers), TEXT, None, 100)
    finally:
        said.unlink()
    assert again.labels[node].text == f"red rivers; {traced.labels[node].text}"
    graph = json.loads((again.folder / "graph.json").read_text())
    clerps = {each["node_id"]: each["clerp"] for each in graph["nodes"]}
    assert {clerp.partition(";")[0] for clerp in clerps.values() if "rivers" in clerp} == {"red rivers"}
    assert '"red rivers; ' in (again.folder / "circuit.html").read_text()


def test_no_nodes_to_follow(layers: Settings) -> None:
    """What reaches the logits directly."""
    traced = trace(of(layers), TEXT, None, 0)
    assert LATENT not in traced.circuit.nodes.kind
    assert traced.circuit.ends.not_followed > 0.1
    assert sum(traced.circuit.ends) == pytest.approx(1)


def test_what_is_refused(layers: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run a: expected every layer from 0 to 2, missing 1; train them"):
        trace(of(layers, 0, 2), TEXT, None, 10)
    for prefix in (2, -1):
        with pytest.raises(InputError, match=f"prefix: run a has prefixes 0 to 1, found {prefix}"):
            trace(of(layers), TEXT, prefix, 10)
    with pytest.raises(InputError, match="text: nothing to read; give some words"):
        trace(of(layers), "", None, 10)
    with pytest.raises(InputError, match="text: not UTF-8"):
        trace(of(layers), "caf\udce9", None, 10)
    assert not list((layers.set_dir() / "circuits").glob(".*"))


def test_a_long_text_is_cut(layers: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    traced = trace(of(layers), f"{TEXT} " * 9, None, 10)
    assert (traced.circuit.nodes.kind == TOKEN).sum() == 16
    assert "tokens are left out: contexts of this set have 16" in capsys.readouterr().out


def test_the_command(
    layers: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["circuit", "--layer", "all", "--model.name", layers.model.name, "--model.device", "cpu"]
    argv += [
        "--paths.activations",
        layers.paths.activations,
        "--paths.checkpoints",
        str(layers.paths.checkpoints),
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--text", f"{TEXT}\x1b[2J"])
    monkeypatch.setenv("COLUMNS", "200")
    command.main()
    said = capsys.readouterr().out
    assert "embedding@" in said
    assert "\x1b" not in said
    assert "% from the tokens through latents and attention" in said
    page = Path(said.splitlines()[-1])
    assert page.name == "circuit.html"
    assert page.is_file()


def test_the_layer_of_a_profile_is_not_asked_for(layers: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """PROFILE=demo has one; all others were said to be missing."""
    asked: list[Settings] = []

    def traced(settings: Settings, *_: object) -> None:
        asked.append(settings)
        raise InputError("enough")

    monkeypatch.setattr("evaluate.circuit.run.trace", traced)
    argv = ["circuit", "--profile", "demo", "--run", "a", "--text", TEXT]
    for more, expected in (([], ()), (["--layer", "1"], (1,))):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        with pytest.raises(InputError, match="enough"):
            command.main()
        assert asked.pop().layers == expected


def test_labels_are_those_of_the_weights_evaluation(
    layers: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    one = of(layers, 1)
    evaluate(one, ce_tokens=0)
    traced = trace(of(layers), TEXT, None, 100)
    assert "layers without an evaluation of these weights: 0 2;" in capsys.readouterr().err
    own = np.flatnonzero((traced.circuit.nodes.kind == LATENT) & (traced.circuit.nodes.layer == 1))
    label = traced.labels[int(own[0])]
    assert label.fires
    promotes = "" if label.like_random else "; promotes " + " ".join(map(repr, label.promotes[:3]))
    assert label.text == "fires on " + " ".join(map(repr, label.fires[:3])) + promotes
    page = (traced.folder / "circuit.html").read_text()
    assert '"reports":{"1":"../../../../layer_1/a/evaluation/report.html"}' in page
    assert (traced.folder / "../../../../layer_1/a/evaluation/report.html").resolve().is_file()
    weights = one.run_dir() / "transcoder.safetensors"
    whole, metadata = weights.read_bytes(), {"source": Store.of(one).manifest.source.model_dump(mode="json")}
    try:
        replace(random_coder(32, 32, (8, 40), seed=9), metadata=metadata).save(one.run_dir())
        trace(of(layers), TEXT, None, 10)
        assert "layers without an evaluation of these weights: 0 1 2;" in capsys.readouterr().err
    finally:
        weights.write_bytes(whole)


def test_a_bfloat16_model_is_traced_in_float32(tmp_path: Path) -> None:
    """In bfloat16 effects would not sum to what a target has; inputs with the norm's gain, and skip connections."""
    model = save_model(tmp_path / "tiny", "gemma2", dtype=torch.bfloat16)
    settings = make_set(tmp_path, model, "--model.dtype", "bfloat16", "--harvest.input", "mlp_in", skip=True)
    traced = trace(of(settings), TEXT, None, 100)
    assert (traced.circuit.nodes.kind == LATENT).any()
