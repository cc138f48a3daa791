"""make push of several layers: three tools' forms and one card, in one commit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from common.settings import Settings
from evaluate.model.push import write_forms
from tests.evaluate.model.sets import LAYERS, arguments, make_set, one, save_evaluation, settings_at
from tests.hub import Hub, Run
from transcoder import Transcoder


def _fvu(metrics: dict[str, Any], g: int) -> str:
    """As the card tells it: without heavy rows, and marked, where there are some."""
    if metrics["errors"]["heavy"] is None:
        return f"{metrics['prefixes'][g]['fvu']:.3g}"
    return f"{metrics['errors']['typical']['fvu'][g]:.3g}†"


@pytest.fixture(scope="module")
def trained(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A set whose runs know their training."""
    root = tmp_path_factory.mktemp("pushed")
    settings = make_set(root, llama, corpus)
    for layer in LAYERS:
        own = one(settings, layer)
        coder = Transcoder.load(own.run_dir())
        record = {
            "settings": own.model_dump(mode="json"),
            "training": {"rows": 4096, "steps": 64, "l0": [1.0, 2.0]},
            "git_commit": None,
        }
        replace(coder, metadata=coder.metadata | record).save(own.run_dir())
        save_evaluation(settings, layer)
    return settings


def test_every_tools_form_and_one_card(trained: Settings, tmp_path: Path) -> None:
    message = write_forms(trained, tmp_path, "hf://me/sets/tiny")
    assert message == "Transcoders tiny, 3 layers"
    for layer in LAYERS:
        own = Transcoder.load(one(trained, layer).run_dir())
        for form in ("matryoshka", "saelens"):
            again = Transcoder.load(tmp_path / form / f"layer_{layer}")
            torch.testing.assert_close(again.W_dec, own.W_dec)
            assert again.prefix_ends == own.prefix_ends
        assert (tmp_path / f"layer_{layer}.safetensors").is_file()
    assert "scan" not in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "features").exists(), "they quote the text"
    card = (tmp_path / "README.md").read_text()
    assert 'ReplacementModel.from_pretrained("tiny-llama", transcoders="me/sets/tiny")' in card
    assert 'release="me/sets", sae_id="tiny/saelens/layer_0"' in card
    assert 'Transcoder.load("hf://me/sets/tiny/matryoshka/layer_0")' in card
    assert card.index("circuit_tracer import") < card.index("sae_lens import") < card.index("## By layer")
    for layer in LAYERS:
        metrics = json.loads((one(trained, layer).run_dir() / "evaluation" / "metrics.json").read_text())
        first, last = (_fvu(metrics, g) for g in (0, 1))
        assert f"| {layer} | 9 | {first} | {last} |" in card
    assert str(trained.paths.checkpoints.parent) not in card
    assert "{{" not in card
    assert "{%" not in card


def test_a_part_of_the_layers_has_no_circuit_tracer_form(trained: Settings, tmp_path: Path) -> None:
    write_forms(trained.model_copy(update={"layers": (0, 2)}), tmp_path, "hf://me/part")
    assert not (tmp_path / "config.yaml").exists()
    card = (tmp_path / "README.md").read_text()
    assert "ReplacementModel" not in card
    assert "Layers without a transcoder: 1." in card


def test_one_command_one_commit_and_nothing_where_a_layer_is_not_evaluated(
    trained: Settings, llama: Path, hub: Hub, at_hub: Run
) -> None:
    root = trained.paths.checkpoints.parent
    killed = trained.set_dir() / ".push-killed"  # as kill -9 leaves it
    killed.mkdir(parents=True)
    words = ["-m", "evaluate.push", "--layer", "all", *arguments(root, llama)]
    process = at_hub(*words, "--repo", "me/whole")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "hf://me/whole"
    assert hub.commits["models/me/whole"] == ["Transcoders tiny, 3 layers"]
    assert "config.yaml" in hub.repos["models/me/whole"]
    assert not list(trained.set_dir().glob(".push-*"))


def test_a_layer_that_is_not_evaluated_as_it_is_now(trained: Settings, tmp_path: Path, llama: Path) -> None:
    file = one(trained, 2).run_dir() / "evaluation" / "metrics.json"
    before = file.read_text()
    file.unlink()
    try:
        with pytest.raises(InputError, match=r"layer_2/tiny: the card needs the evaluation"):
            write_forms(settings_at(trained.paths.checkpoints.parent, llama), tmp_path, "hf://me/x")
    finally:
        file.write_text(before)
