"""python -m evaluate.export and transcoder.import_: from a run to other tools' folders, and from theirs to a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.files import locked, whole_folder
from common.settings import ROOT, Settings
from tests.evaluate.fakes import random_coder
from tests.transcoder.test_formats import layers, tiny_transcoder
from train import loop
from transcoder import Transcoder
from transcoder.export import FORMATS, export, export_set
from transcoder.formats import gemma_scope
from transcoder.import_ import bring

Make = Callable[..., Settings]
OTHERS = ("saelens", "gemma_scope")
"""Those that read inputs without the gain."""


def save_run(settings: Settings, transcoder: Transcoder) -> Path:
    transcoder.save(settings.run_dir())
    return settings.run_dir()


@pytest.mark.parametrize("to", OTHERS)
def test_a_run_trained_with_the_gain_is_exported_without_it(make_settings: Make, to: str) -> None:
    gain = [0.5, -2.0, 3.0, 0.0, 0.1]
    own = tiny_transcoder(input="mlp_in", input_hook="blocks.3.mlp.hook_in", gain=gain)
    exported = Transcoder.load(export(save_run(make_settings(), own), to))
    normalized = torch.randn(40, 5)
    torch.testing.assert_close(exported(normalized), own(normalized * torch.tensor(gain)))
    assert exported.metadata["source"]["input"] == "normalized"
    if to == "saelens":
        assert exported.metadata["source"]["input_hook"] == "blocks.3.ln2.hook_normalized"


@pytest.mark.parametrize("to", OTHERS)
def test_a_threshold_below_zero_is_exported_as_the_zero_that_it_acts_as(make_settings: Make, to: str) -> None:
    """Our own file may hold one, of a transcoder that was made elsewhere."""
    own = replace(tiny_transcoder(), thresholds=torch.tensor([0.1, 0.2, -0.3]))
    exported, x = Transcoder.load(export(save_run(make_settings(), own), to)), torch.randn(40, 5)
    assert not exported.thresholds[-1].any()
    assert torch.equal(exported.encode(x), own.encode(x))


@pytest.mark.parametrize("to", OTHERS)
def test_a_prefix_is_exported_beside_the_whole_and_again_replaces_it(make_settings: Make, to: str) -> None:
    run_dir = save_run(make_settings(), tiny_transcoder())
    for _ in range(2):
        whole, narrow = export(run_dir, to), export(run_dir, to, prefix=0)
        assert Transcoder.load(whole).d_sae == 11
        assert Transcoder.load(narrow).d_sae == 2
    save_run(make_settings(), tiny_transcoder().prefix(1))
    assert Transcoder.load(export(run_dir, to)).d_sae == 5
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == [to, f"{to}_prefix_0"]
    assert len(list((run_dir / "export" / to).rglob("*.npz"))) == (to == "gemma_scope")


def test_a_prefix_that_does_not_exist(make_settings: Make) -> None:
    with pytest.raises(InputError, match="has prefixes 0 to 2, found 3"):
        export(save_run(make_settings(), tiny_transcoder()), "saelens", prefix=3)


def test_nothing_half_written_takes_the_place_of_an_export(tmp_path: Path) -> None:
    def fill(name: str, fails: bool) -> None:
        with whole_folder(tmp_path / "saelens") as aside:
            (aside / name).touch()
            if fails:
                raise RuntimeError

    fill("old", fails=False)
    with pytest.raises(RuntimeError):
        fill("new", fails=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "saelens",
        "saelens/old",
    ]


def test_an_export_that_another_process_writes_is_refused(make_settings: Make) -> None:
    run_dir = save_run(make_settings(), tiny_transcoder())
    refusal = (
        rf"gemma_scope: another make export is writing it \(process {os.getpid()}\); wait for it or stop it"
    )
    held = locked(run_dir / "export" / ".gemma_scope.lock", "held")
    with held, pytest.raises(InputError, match=refusal):
        export(run_dir, "gemma_scope")
    assert export(run_dir, "gemma_scope").is_dir()


def test_circuit_tracers_set_is_every_layer_that_has_the_run(make_settings: Make) -> None:
    settings = make_settings().model_copy(update={"layers": ()})
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    with pytest.raises(InputError, match="no layer of those asked for has a finished run a"):
        export_set(settings)
    for number, transcoder in enumerate(layers(0, 1, 2, 3, 4)):
        if number != 2:
            transcoder.save(model / f"layer_{number}" / "a")
    with pytest.raises(InputError, match="every layer from 0 to 4, one width; missing 2;"):
        export_set(settings)
    assert not list(model.glob("export/*/*"))
    layers(2)[0].save(model / "layer_2" / "a")
    layers(2)[0].prefix(0).save(model / "layer_2_old" / "a")  # put aside: it took the place of layer 2
    folder = export_set(settings, prefix=1)
    assert folder == model / "export" / "circuit_tracer" / "a_prefix_1"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        *(f"layer_{n}.safetensors" for n in range(5)),
    }
    some = settings.model_copy(update={"layers": (0, 1)})
    assert len(list(export_set(some, partial=True).iterdir())) == 3


@pytest.mark.parametrize("to", OTHERS)
def test_the_commands_there_and_back(make_settings: Make, to: str) -> None:
    settings = make_settings().model_copy(update={"layers": (3,)})
    save_run(settings, tiny_transcoder())
    options = ["--layer", "3", "--model.name", settings.model.name]
    options += ["--paths.checkpoints", str(settings.paths.checkpoints)]

    def run(module: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *options, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    process = run("evaluate.export", "--run", settings.run, "--format", to, "--prefix", "2")
    assert process.returncode == 0, process.stderr
    folder = process.stdout.strip()
    process = run("transcoder.import_", "--run", "theirs", "--from", folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("5 -> 11 latents -> 3\n")
    assert "layer_3.zarr: not harvested yet" in process.stdout
    imported = Transcoder.load(settings.run_dir().with_name("theirs"))
    assert torch.equal(imported.W_enc, tiny_transcoder().W_enc)
    assert imported.metadata["imported"]["from"] == folder
    process = run("transcoder.import_", "--run", "theirs", "--from", folder)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "there already" in process.stderr
    process = run("evaluate.export", "--run", "absent", "--format", to)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    process = run("evaluate.export", "--run", settings.run, "--format", "ae.pt")
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)


def test_training_leaves_an_imported_transcoder_alone(make_settings: Make, store, tmp_path: Path) -> None:
    settings = make_settings()
    random_coder(12, 10, (11,)).save(tmp_path / "theirs.safetensors")
    bring(str(tmp_path / "theirs.safetensors"), settings)
    with pytest.raises(InputError, match="holds a transcoder that was not trained here"):
        loop.train(settings, store)
    assert Transcoder.load(settings.run_dir()).d_sae == 11


def test_an_import_of_another_layer_or_store_is_refused(make_settings: Make, store, tmp_path: Path) -> None:
    """By the file's word where nothing is harvested, by the store's where it is; on purpose it is brought."""
    settings = make_settings()
    theirs = save_run(make_settings(run="theirs"), random_coder(12, 10, (11,)))
    other = make_settings().model_copy(update={"layers": (1,)})
    with pytest.raises(InputError, match=r"it is of layer 0, asked for layer 1; give --layer 0"):
        bring(str(theirs), other)
    assert not other.run_dir().exists()
    own = Transcoder.load(theirs)
    hooked = {"source": own.metadata["source"] | {"output_hook": "blocks.0.hook_resid_mid"}}
    replace(own, metadata=hooked).save(theirs)
    with pytest.raises(
        InputError, match=r"it predicts blocks\.0\.hook_resid_mid, there blocks\.0\.hook_mlp_out"
    ):
        bring(str(theirs), settings)
    random_coder(12, 9, (11,)).save(theirs)
    with pytest.raises(InputError, match="expected widths 12 -> 10"):
        bring(str(theirs), settings)
    assert not settings.run_dir().exists()
    random_coder(12, 10, (11,)).save(theirs)
    on_purpose = other.model_copy(
        update={"evaluate": other.evaluate.model_copy(update={"allow_mismatch": True})}
    )
    assert bring(str(theirs), on_purpose).d_sae == 11


@pytest.mark.parametrize("to", FORMATS)
def test_what_was_imported_is_exported_where_its_layer_is_harvested(
    make_settings: Make, store, tmp_path: Path, to: str
) -> None:
    """Gemma Scope's file knows no model and SAELens' no gain; the store does. Without it the export says what lacks."""
    settings = make_settings()
    theirs = gemma_scope.write(tmp_path / "theirs", *random_coder(12, 10, (11,)).saved())
    bring(str(theirs), settings)
    if to == "circuit_tracer":
        made_folder = export_set(settings)
    else:
        made_folder = export(settings.run_dir(), to)
        own, exported = Transcoder.load(settings.run_dir()), Transcoder.load(made_folder)
        assert torch.equal(exported.W_enc, own.W_enc)
    assert any(made_folder.iterdir())
    bare = make_settings(run="bare")
    gated = {"source": {"input": "mlp_in", "layer": 0}}
    replace(random_coder(12, 10, (11,)), metadata=gated).save(bare.run_dir())
    lacks, then = ("model", "gain") if to == "gemma_scope_2" else ("gain", "model")
    with pytest.raises(InputError, match=rf"bare: source\.{lacks} is not known of this imported transcoder"):
        export_set(bare) if to == "circuit_tracer" else export(bare.run_dir(), to)
    if to != "gemma_scope":
        random_coder(12, 10, (11,)).save(bare.run_dir())
        with pytest.raises(InputError, match=rf"bare: source\.{then} is not known"):
            export_set(bare) if to == "circuit_tracer" else export(bare.run_dir(), to)


def test_a_finished_run_has_all_that_an_export_needs(make_settings: Make, store) -> None:
    settings = make_settings(train__rows=64 * 8)
    loop.train(settings, store)
    own = Transcoder.load(settings.run_dir())
    inputs, _ = store.heldout.rows(0, 256)
    for to in OTHERS:
        exported = Transcoder.load(export(settings.run_dir(), to))
        assert torch.equal(exported(inputs), own(inputs))
    assert exported.prefix_ends == (64,)
    assert (export_set(settings) / "layer_0.safetensors").is_file()
