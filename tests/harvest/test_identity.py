"""Which model a harvest is of: its weights tell, whatever it is called; and tokens that it has no embedding for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import InputError
from common.identity import differs, directory_sha256
from common.settings import Model
from harvest.plan import plan_only
from harvest.run import harvest
from shards import Store
from shards.commit import read_commit
from tests.harvest.test_run import Make, change_weights, stopped_after
from tests.models import sentences, write_jsonl


def test_a_model_is_known_by_its_weights_not_by_its_name(
    llama: Path,
    settings_for: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Spelt another way, moved, linked, in several files: the same. Of the same name, or replaced in place: another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "a/checkpoint-1000")
    (path,) = harvest(settings_for(Path("a/checkpoint-1000")))
    for name in ("./a/checkpoint-1000", "a/checkpoint-1000/", str(tmp_path / "a/../a/checkpoint-1000")):
        settings = settings_for(Path("a"), "--model.name", name)
        assert harvest(settings) == [path]
        Store.of(settings)
    Path("a").rename("b")
    moved = settings_for(Path("b/checkpoint-1000"))
    assert harvest(moved) == [path]
    assert Store.of(moved).path == path
    assert Store.of(settings_for(Path("a/checkpoint-1000"))).path == path  # not here any more: by its name
    assert capsys.readouterr().out.count("is already harvested") == 4

    in_parts(Path("b/checkpoint-1000"))
    assert harvest(moved) == [path]
    other = settings_for(shutil.copytree(llama, Path("other/checkpoint-1000")))
    change_weights(Path("other/checkpoint-1000"))
    for refused in (harvest, Store.of, plan_only):
        with pytest.raises(
            InputError, match=r"model: there 'a/checkpoint-1000' with weights \w{12}\.\.\., asked 'other/"
        ):
            refused(other)
    change_weights(shutil.copytree("other/checkpoint-1000", Path("a/checkpoint-1000")))
    for refused in (harvest, Store.of):
        with pytest.raises(
            InputError, match=r"the weights in a/checkpoint-1000: there \w{12}\.\.\., now \w{12}"
        ):
            refused(settings_for(Path("a/checkpoint-1000")))


def test_a_store_of_another_layer_is_not_already_harvested(llama: Path, settings_for: Make) -> None:
    """A directory that was copied or renamed: its manifest says which layer it is of."""
    (path,) = harvest(settings_for(llama))
    shutil.copytree(path, path.with_name("layer_2.zarr"))
    for refused in (harvest, plan_only):
        with pytest.raises(
            InputError, match=r"layer_2\.zarr: holds another harvest \(layer: there 1, asked 2\)"
        ):
            refused(settings_for(llama, layer="2"))
    (begun,) = [path.rename(path.with_name("layer_0.zarr"))]
    (begun / "files.sha256").unlink()
    assert harvest(settings_for(llama, layer="0")) == [begun]
    assert Store.open(begun).manifest.source.layer == 0


def edit(path: Path, change: Callable[[dict[str, Any]], None], **layout: Any) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said, **layout))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda said: said.update(rms_norm_eps=0.1)),
        ("config.json", lambda said: said.update(hidden_act="gelu")),
        ("tokenizer.json", lambda said: said.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", lambda said: said["model"]["vocab"].update({"<other>": 0})),
        ("tokenizer_config.json", lambda said: said.update(bos_token="the")),
    ],
)
def test_a_changed_configuration_or_tokenizer_is_another_model(
    file: str, change: Callable[[dict[str, Any]], None], llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    settings = settings_for(model)
    harvest(settings)
    edit(model / file, change)
    for refused in (harvest, Store.of, plan_only):
        with pytest.raises(
            InputError, match=r"config.json or the tokenizer in .*model: there \w{12}\.\.\., now"
        ):
            refused(settings)


def test_older_models_name_their_special_tokens_in_a_file_of_their_own(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    """special_tokens_map.json goes before tokenizer_config.json, unless that one lists all tokens itself."""
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    settings = settings_for(model)
    (path,) = harvest(settings)
    write = (model / "special_tokens_map.json").write_text
    write(json.dumps({"bos_token": "<bos>"}))
    assert harvest(settings) == [path]
    write(json.dumps({"bos_token": {"content": "<pad>", "lstrip": False, "normalized": False}}))
    with pytest.raises(InputError, match=r"config.json or the tokenizer in .*model: there \w{12}\.\.\., now"):
        harvest(settings)
    (again,) = harvest(settings_for(model, "--harvest", "b"))
    assert [Store.open(each).manifest.source.bos_token_id for each in (path, again)] == [0, 2]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    assert harvest(settings) == [path]
    (third,) = harvest(settings_for(model, "--harvest", "c"))
    assert Store.open(third).manifest.source.bos_token_id == 0


def test_what_changes_no_activation_changes_no_model(
    llama: Path, settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another layout, a version, padding and truncation of the tokenizer's own, a model card."""
    model = shutil.copytree(llama, tmp_path / "model")
    harvest(settings_for(model))
    edit(
        model / "config.json",
        lambda said: said.update(transformers_version="4.0", dtype="bfloat16"),
        indent=7,
    )
    edit(model / "tokenizer.json", lambda said: said.update(truncation=None, padding=None), indent=1)
    (model / "README.md").write_text("a model")
    harvest(settings_for(model))
    assert "is already harvested" in capsys.readouterr().out


def in_parts(model: Path) -> None:
    """The same weights in two files and an index, as large models come, beside a copy that transformers passes over."""
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, model / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "consolidated.safetensors")


def test_a_link_to_weights_that_have_gone_is_named(llama: Path, tmp_path: Path) -> None:
    """As in a cache of the hub that was moved or cleaned; what an index names and is not there says so."""
    model = shutil.copytree(llama, tmp_path / "model")
    in_parts(model)
    (model / "two.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"two\.safetensors: no such file, though model\.safetensors\.index\.json"
    ):
        directory_sha256(model)
    (model / "two.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"two\.safetensors: a link to a file that has gone; download the model"
    ):
        directory_sha256(model)


def test_an_unfinished_harvest_goes_on_with_the_moved_model(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    whole = harvest(settings_for(llama, "--paths.activations", str(tmp_path / "whole")))[0]
    with stopped_after(1):
        harvest(settings_for(llama))
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / llama.name)
    (path,) = harvest(settings_for(moved))
    assert read_commit(path) == read_commit(whole)


def test_another_revision_is_another_model() -> None:
    source = {"model": "EleutherAI/pythia-70m", "revision": "step1000", "model_sha256": "0" * 64}
    assert differs(Model(name="EleutherAI/pythia-70m", revision="step1000"), source) is None
    said = "model.revision: there 'step1000', asked 'step2000'"
    assert differs(Model(name="EleutherAI/pythia-70m", revision="step2000"), source) == said
    assert differs(Model(name="other/pythia-70m", revision="step1000"), source) is not None


# -- tokens without an embedding -----------------------------------------------------------------------


def with_token(llama: Path, directory: Path, **token: Any) -> Path:
    """A model whose tokenizer has one token more than its embedding."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shutil.copytree(llama, directory))
    tokenizer.add_special_tokens(token) if "bos_token" in token else tokenizer.add_tokens(token["words"])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("token", [{"bos_token": "<s>"}, {"words": ["<tool>"]}], ids=str)
def test_a_token_without_an_embedding_and_mended(
    token: dict[str, Any], llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    """As the beginning of every context, or as a word of the text."""
    directory = with_token(llama, tmp_path / "added", **token)
    text = write_jsonl(tmp_path / "text.jsonl", [f"{text} <tool>" for text in sentences(200)])
    settings = settings_for(directory, "--data.files", str(text))
    with pytest.raises(
        InputError, match=r"its embedding has 320 rows and none for token 320 \('(<s>|<tool>)'\)"
    ):
        harvest(settings)
    assert not Path(settings.store_path(1)).exists()
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(321)
    model.save_pretrained(directory)
    assert len(Store.open(harvest(settings)[0]).train) == 2000


def test_a_padding_token_without_an_embedding_is_never_fed(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    harvest(settings_for(with_token(llama, tmp_path / "padded", words=["neverwritten"])))
