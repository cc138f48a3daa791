"""What others see of a run: the model's name instead of its place, and no path of this machine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from common.errors import InputError
from common.settings import Settings, validated
from harvest.embedded import MODELS
from tests.transcoder.test_formats import layers, tiny_transcoder
from transcoder import Transcoder
from transcoder.export import FORMATS, export, export_set
from transcoder.public import LOADED_AS, public_name, published

Make = Callable[..., Settings]


def model_in(folder: Path, name_or_path: object = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": name_or_path}))
    return folder


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("gpt2", "gpt2"),
        ("embedded/smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("{tmp}/secret/llama", "llama"),
        ("{tmp}/secret/llama/", "llama"),
        ("{tmp}/secret/../secret/llama", "llama"),
        ("{tmp}/secret/llama/.", "llama"),
        ("secret/llama", "llama"),
        ("./secret/llama", "llama"),
        ("secret/tuned", "meta-llama/Llama-3.2-1B"),
        ("secret/from_a_path", "from_a_path"),
        ("secret/from_a_checkpoint", "from_a_checkpoint"),
        ("secret/from_here", "from_here"),
        ("secret/from_nothing", "from_nothing"),
        ("secret/Bob's model", "Bob_s_model"),
        ("/gone/secret/llama", "llama"),
        ("~/secret/llama", "llama"),
        (r"C:\Users\alice\llama", "llama"),
        ("{tmp}/secret/Qwen3-0.6B.Q4.gguf", "Qwen3-0.6B.Q4"),
        ("secret/tiny.GGUF", "tiny"),
        ("{tmp}/hub/models--google--gemma-2-2b/snapshots/0a1b", "google/gemma-2-2b"),
    ],
)
def test_a_model_is_published_under_its_hub_name_or_its_last_part(
    model: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_in(tmp_path / "secret/llama")
    model_in(tmp_path / "secret/Bob's model")
    model_in(tmp_path / "secret/tuned", "meta-llama/Llama-3.2-1B")
    model_in(tmp_path / "secret/from_a_path", "/home/alice/llama")
    model_in(tmp_path / "secret/from_a_checkpoint", "expA/checkpoint-1000")
    model_in(tmp_path / "secret/from_here", "secret/llama")
    model_in(tmp_path / "secret/from_nothing", {"a": 1})
    model_in(tmp_path / "hub/models--google--gemma-2-2b/snapshots/0a1b")
    assert public_name(model.format(tmp=tmp_path)) == expected


def test_every_embedded_model_has_a_name_elsewhere() -> None:
    assert LOADED_AS.keys() == MODELS.keys()


def private(root: Path, **source: object) -> Transcoder:
    """A transcoder whose record is full of paths below `root`, given in every way."""
    model = root / "secret" / "llama"
    settings = Settings.model_validate(
        {
            "layers": (3,),
            "model": {"name": f"{model}/"},
            "data": {
                "files": (str(root / "patients" / "a.jsonl"), "secret/b.txt"),
                "dataset": str(root / "texts"),
            },
            "train": {"init_from": str(root / "checkpoints" / "first")},
            "paths": {"activations": str(root / "x"), "checkpoints": root / "y", "cache": root / "z"},
        }
    ).model_dump(mode="json")
    named = {
        "model": str(model),
        "dataset": str(root / "texts"),
        "files": {"secret/b.txt": "0" * 64},
        **source,
    }
    own = tiny_transcoder(**named)
    own.metadata["source"].setdefault("gain", [1.0] * own.d_in)
    return replace(
        own, metadata=own.metadata | {"settings": settings, "imported": {"from": str(root / "theirs")}}
    )


def test_nothing_of_this_machine_is_left(tmp_path: Path) -> None:
    own = private(tmp_path)
    seen = published(own.metadata)
    text = json.dumps(seen)
    for word in (str(tmp_path), tmp_path.name, "secret", "patients"):
        assert word not in text
    assert seen["source"]["model"] == seen["settings"]["model"]["name"] == "llama"
    assert seen["source"]["files"] == {"b.txt": "0" * 64}
    assert seen["settings"]["data"]["files"] == ["a.jsonl", "b.txt"]
    assert seen["settings"]["train"]["init_from"] == "first"
    assert "paths" not in seen["settings"]
    assert seen["source"]["output_hook"] == "blocks.3.hook_mlp_out"
    assert own.metadata["source"]["model"] == str(tmp_path / "secret" / "llama")
    validated(seen["settings"], "what was published")


def test_what_is_public_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.model_validate({"train": {"init_from": "hf://me/first"}}).model_dump(mode="json")
    metadata = tiny_transcoder().metadata | {"settings": settings, "git_commit": "abc+"}
    seen = published(metadata)
    del settings["paths"]
    assert seen == metadata | {
        "settings": settings | {"model": settings["model"] | {"name": "tests/tiny"}}
    } | {"public_name": "tests/tiny"}


def test_a_name_that_was_given_is_the_name(tmp_path: Path) -> None:
    metadata = private(tmp_path).metadata
    assert published(metadata, "me/mine")["source"]["model"] == "me/mine"
    metadata["settings"]["model"]["public_name"] = "me/saved"
    assert published(metadata)["source"]["model"] == "me/saved"
    assert (
        published(tiny_transcoder().metadata | {"public_name": "as trained"})["source"]["model"]
        == "as trained"
    )
    with pytest.raises(
        InputError, match=r"model\.public_name: expected a name or owner/name, .* found '/home/me/x'"
    ):
        validated({"model": {"public_name": "/home/me/x"}}, "command line")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("public_name", [None, "me/mine"])
def test_no_byte_of_an_export_names_a_path(
    make_settings: Make, tmp_path: Path, to: str, public_name: str | None
) -> None:
    named = {"model__public_name": public_name} if public_name else {}
    settings = make_settings(model__name=f"{tmp_path / 'secret' / 'llama'}/", **named)
    if to == "circuit_tracer":
        model = settings.paths.checkpoints / "transcoder" / settings.model_slug
        for layer, each in enumerate(layers(0, 1, 2, 3, 4)):
            source = each.metadata["source"]
            private(tmp_path, **{key: source[key] for key in ("layer", "input_hook", "output_hook")}).save(
                model / f"layer_{layer}" / settings.run
            )
        folder = export_set(settings.model_copy(update={"layers": ()}))
    else:
        private(tmp_path).save(settings.run_dir())
        folder = export(settings.run_dir(), to, name=settings.model.public_name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    everything = b"".join(path.read_bytes() for path in files)
    for word in (str(tmp_path), tmp_path.name, "secret", "patients", f"{Path.home()}/"):
        assert word.encode() not in everything
    if to != "gemma_scope":
        assert (public_name or "llama").encode() in everything
    if to == "circuit_tracer":
        with safe_open(folder / "layer_2.safetensors", "pt") as file:
            assert file.metadata()["model"] == (public_name or "llama")
