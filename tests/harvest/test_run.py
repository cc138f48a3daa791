"""Whole harvests of tiny models: what lands in the store, and what survives being stopped."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import harvest.run as run
from common.errors import InputError
from common.files import sha256
from common.identity import directory_sha256
from common.settings import Settings
from evaluate import stores
from harvest.plan import plan_only
from harvest.run import harvest
from shards import Store
from shards.commit import read_commit
from shards.layout import WORK
from shards.plan import human
from shards.writer import StoreWriter
from tests.models import by_hugging_face, save_model, sentences, write_jsonl

ROOT = Path(__file__).parent.parent.parent
Make = Callable[..., Settings]


@pytest.mark.parametrize("layer", [1, 2])
def test_a_store_holds_hugging_faces_tensors(layer: int, model_directory: Path, settings_for: Make) -> None:
    options = ("--harvest.storage", "float32", "--harvest.input", "mlp_in")
    (path,) = harvest(settings_for(model_directory, *options, layer=str(layer)))
    store = Store.open(path)
    assert len(store.train) == 2000
    assert len(store.heldout) > 50
    for split in (store.train, store.heldout):
        context, position = split.provenance(0, len(split))
        tokens = split.contexts[:]
        assert not np.isin(tokens[context, position], [0, 1, 2]).any()
        assert (position > 0).all()
        assert (tokens[:, 0] == 0).all()
        places = context.astype(np.int64) * tokens.shape[1] + position
        assert len(np.unique(places)) == len(split)
        expected = by_hugging_face(model_directory, layer, torch.from_numpy(tokens).long())
        inputs, outputs = split.rows(0, len(split))
        assert torch.allclose(inputs, expected["mlp_in"][context, position], rtol=0, atol=1e-5)
        assert torch.allclose(outputs, expected["added"][context, position], rtol=0, atol=1e-5)


def test_normalised_input_times_the_manifests_gain_is_the_mlps_input(
    model_directory: Path, settings_for: Make
) -> None:
    """And plus the manifest's bias, where the norm is a LayerNorm."""
    options = ("--harvest.storage", "float32")
    plain = Store.open(harvest(settings_for(model_directory, *options))[0])
    gained = Store.open(
        harvest(settings_for(model_directory, *options, "--harvest.input", "mlp_in", "--harvest", "gain"))[0]
    )
    source = plain.manifest.source
    assert (source.gain_bias is not None) == ("gpt2" in model_directory.name)
    bias = torch.tensor(source.gain_bias or [0.0])
    expected = plain.train.rows(0, 2000)[0] * torch.tensor(source.gain) + bias
    assert torch.allclose(expected, gained.train.rows(0, 2000)[0], atol=1e-5)


def test_the_manifest_says_what_was_harvested(gemma: Path, corpus: Path, settings_for: Make) -> None:
    manifest = Store.open(harvest(settings_for(gemma))[0]).manifest
    source = manifest.source
    assert source.model == str(gemma)
    assert (source.layer, source.n_layers, source.dtype, source.input) == (1, 3, "float32", "normalized")
    assert source.input_hook == "blocks.1.ln2.hook_normalized"
    assert source.output_hook == "blocks.1.hook_mlp_out"
    assert source.files == [sha256(corpus)]
    assert (source.bos_token_id, source.separator_token_id, source.dropped_token_ids) == (0, 1, [0, 1, 2])
    assert len(source.gain) == source.d_in == source.d_out == 32
    for split in manifest.splits.values():
        assert split.inputs
        assert 0 < split.inputs.quantisation_fvu < 2e-4


def test_several_layers_in_one_pass_equal_separate_passes(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    together = harvest(settings_for(llama, layer="0 2"))
    elsewhere = ("--paths.activations", str(tmp_path / "elsewhere"))
    apart = [harvest(settings_for(llama, *elsewhere, layer=layer))[0] for layer in ("0", "2")]
    assert [read_commit(path) for path in together] == [read_commit(path) for path in apart]


def test_layers_of_two_texts_are_not_harvested_in_one_pass(llama: Path, settings_for: Make) -> None:
    """A data set of the hub may change between a layer and the next: the rows of both would be of the first's text."""
    (path,) = harvest(settings_for(llama, layer="0"))
    StoreWriter(path).uncommit([("train", 0)])
    plan = path / WORK / "plan.json"
    begun = json.loads(plan.read_text())
    begun["text"]["contexts_sha256"]["train"] = "0" * 64
    plan.write_text(json.dumps(begun))
    with pytest.raises(
        InputError, match=r"layer_2.zarr: holds another text than .*layer_0.zarr, as the data set"
    ):
        harvest(settings_for(llama, layer="0 2"))


def test_a_store_without_heldout_rows_is_announced(
    llama: Path, settings_for: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = harvest(settings_for(llama, "--harvest.heldout_fraction", "1e-9"))
    assert len(Store.open(path).heldout) == 0
    assert "layer 1: NO held-out rows: " in capsys.readouterr().err


def test_asking_again_is_a_no_op(llama: Path, settings_for: Make, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = harvest(settings_for(llama))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert harvest(settings_for(llama)) == [path]
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    assert "is already harvested, nothing to do" in capsys.readouterr().out


def test_another_harvest_under_the_same_name_is_refused(llama: Path, settings_for: Make) -> None:
    harvest(settings_for(llama))
    with pytest.raises(InputError) as stopped:
        harvest(settings_for(llama, "--harvest.seed", "7", rows=1500))
    assert "holds another harvest (rows: there 2000, asked 1500; seed: there 0, asked 7)" in str(
        stopped.value
    )
    harvest(settings_for(llama, "--harvest.seed", "7", "--harvest", "second", rows=1500))


def test_batch_size_does_not_change_a_row_beyond_rounding(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    a = Store.open(harvest(settings_for(llama, "--harvest.storage", "float32"))[0])
    other = (
        "--paths.activations",
        str(tmp_path / "b"),
        "--harvest.batch_size",
        "3",
        "--harvest.storage",
        "float32",
    )
    b = Store.open(harvest(settings_for(llama, *other))[0])
    assert a.manifest.fingerprint == b.manifest.fingerprint
    assert torch.allclose(a.train.rows(0, 2000)[1], b.train.rows(0, 2000)[1], atol=1e-5)


# -- stopped and continued -----------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("when", [0, 2, 4])
@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError, MemoryError])
def test_stopped_at_any_window_and_continued(
    llama: Path, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, what: type
) -> None:
    whole = harvest(settings_for(llama, "--paths.activations", str(tmp_path / "whole")))[0]
    write, calls = StoreWriter.write_window, []

    def fails(self: StoreWriter, *args: Any) -> None:
        calls.append(args[:2])
        if len(calls) > when:
            raise what("stopped by the test")
        write(self, *args)

    monkeypatch.setattr(StoreWriter, "write_window", fails)
    with pytest.raises((what, InputError)):
        harvest(settings_for(llama))
    path = Path(settings_for(llama).store_path(1))
    with pytest.raises(InputError, match="unfinished harvest"):
        Store.open(path)
    monkeypatch.setattr(StoreWriter, "write_window", write)
    monkeypatch.setattr(run, "documents", None)  # the dataset is never opened again
    assert harvest(settings_for(llama)) == [path]
    assert read_commit(path) == read_commit(whole)
    assert not (path / ".harvest").exists()


def test_stopped_in_the_text_pass_and_continued(
    llama: Path, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harvest(settings_for(llama, "--paths.activations", str(tmp_path / "whole")))[0]

    def stops(*_: Any) -> Any:
        yield from sentences(20)
        raise InputError("data.files x: cannot be read: gone")

    monkeypatch.setattr(run, "documents", stops)
    with pytest.raises(InputError, match="gone"):
        harvest(settings_for(llama))
    assert not Path(settings_for(llama).store_path(1)).exists()
    monkeypatch.undo()
    (path,) = harvest(settings_for(llama))
    assert read_commit(path) == read_commit(whole)


@pytest.mark.usefixtures("small_windows")
def test_a_partial_store_of_another_harvest_is_refused(llama: Path, settings_for: Make) -> None:
    with stopped_after(1):
        harvest(settings_for(llama))
    with pytest.raises(InputError, match="holds another harvest"):
        harvest(settings_for(llama, rows=1500))
    with pytest.raises(
        InputError, match=r"begun with dtype 'float32', now 'bfloat16'; .* or give HARVEST=name"
    ):
        harvest(settings_for(llama, "--model.dtype", "bfloat16"))


def change_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@contextlib.contextmanager
def stopped_after(windows: int) -> Iterator[None]:
    """Ctrl-C when so many windows are written."""
    write, calls = StoreWriter.write_window, []

    def stops(self: StoreWriter, *args: Any) -> None:
        calls.append(args[:2])
        if len(calls) > windows:
            raise KeyboardInterrupt
        write(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_window", stops)
        with contextlib.suppress(KeyboardInterrupt):
            yield
    assert len(calls) > windows


@pytest.mark.parametrize(
    "then",
    [
        ("--model.dtype", "bfloat16"),
        ("--harvest.storage", "float32"),
        ("--harvest.rows", "1500"),
        ("--harvest.seed", "7"),
        ("--data.pack", "document"),
        ("--harvest.input", "mlp_in"),
        ("--harvest.context_length", "16"),
    ],
    ids=lambda then: then[0],
)
def test_begun_without_a_window_and_asked_for_otherwise(
    then: tuple[str, str], llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    """What a line advises works as it is typed: nothing was harvested yet, so it is begun anew."""
    with stopped_after(0):
        harvest(settings_for(llama))
    (path,) = harvest(settings_for(llama, *then))
    (whole,) = harvest(settings_for(llama, *then, "--paths.activations", str(tmp_path / "whole")))
    assert read_commit(path) == read_commit(whole)


def test_begun_without_a_window_with_weights_that_were_mended(
    llama: Path, settings_for: Make, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "mine")
    with stopped_after(0):
        harvest(settings_for(model))
    change_weights(model)
    (path,) = harvest(settings_for(model))
    assert Store.open(path).manifest.source.model_sha256 == directory_sha256(model)


def test_a_store_to_be_repaired_is_not_begun_anew(llama: Path, settings_for: Make) -> None:
    (path,) = harvest(settings_for(llama))
    before = read_commit(path)
    StoreWriter(path).uncommit([("train", 0)])
    with pytest.raises(InputError, match="holds another harvest"):
        harvest(settings_for(llama, rows=1500))
    assert harvest(settings_for(llama)) == [path]
    assert read_commit(path) == before


def test_a_second_harvest_into_one_store_is_refused(llama: Path, settings_for: Make) -> None:
    settings = settings_for(llama)
    with StoreWriter(Path(settings.store_path(1))).lock(), pytest.raises(InputError) as stopped:
        harvest(settings)
    assert f"another harvest is writing it (process {os.getpid()})" in str(stopped.value)
    harvest(settings)  # the lock of whoever is gone is no obstacle


def command_of(settings: Settings, processes: int = 1) -> list[str]:
    """The command line that harvests what `settings_for` made."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*python, "-m", "harvest", "--layer", "1", "--model.name", settings.model.name]
    command += [
        "--data.files",
        ",".join(settings.data.files),
        "--data.pack",
        "concat",
        "--model.device",
        "cpu",
    ]
    command += ["--harvest.rows", str(settings.harvest.rows), "--harvest.context_length", "32"]
    command += ["--harvest.heldout_fraction", "0.1", "--paths.activations", str(settings.paths.activations)]
    return command


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(llama: Path, settings_for: Make, tmp_path: Path) -> None:
    whole = harvest(settings_for(llama, "--paths.activations", str(tmp_path / "whole")))[0]
    settings = settings_for(llama)
    process = subprocess.run(command_of(settings, 2), cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert read_commit(Path(settings.store_path(1))) == read_commit(whole)


def test_killed_and_continued(llama: Path, settings_for: Make, tmp_path: Path) -> None:
    """kill -9 of the real command at three moments; the finished store is byte-identical."""
    whole = harvest(settings_for(llama, "--paths.activations", str(tmp_path / "whole")))[0]
    command = command_of(settings_for(llama))
    path = Path(settings_for(llama).store_path(1))
    for sign in ("train/contexts", ".harvest/plan.json", ".harvest/records"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (path / sign).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert read_commit(path) == read_commit(whole)


# -- refused -------------------------------------------------------------------------------------------


def test_storage_that_costs_too_much_is_refused(llama: Path, settings_for: Make) -> None:
    with pytest.raises(InputError) as stopped:
        harvest(settings_for(llama, "--harvest.max_quantisation_fvu", "1e-9"))
    assert "storing the inputs as int8 costs FVU" in str(stopped.value)
    assert "give another harvest.storage, or raise the limit" in str(stopped.value)


def test_activations_that_are_not_finite_are_refused(llama: Path, settings_for: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    import shutil

    broken = shutil.copytree(llama, tmp_path / "broken")
    model.save_pretrained(broken)
    with pytest.raises(
        InputError, match=r"layer 1, blocks\.1\.hook_mlp_out: NaN or infinity in context 0 position 1"
    ):
        harvest(settings_for(broken))


def test_a_layer_that_does_not_exist(llama: Path, settings_for: Make) -> None:
    settings = settings_for(llama, layer="99")
    with pytest.raises(InputError, match=r"layer: 99 requested, but .* has layers 0 to 2"):
        harvest(settings)
    assert not Path(settings.store_path(99)).exists()


@pytest.mark.parametrize(
    ("family", "lacks"), [("olmo2", "ln2.hook_normalized"), ("phi", "ln2.hook_normalized")]
)
def test_a_model_without_the_hook_points(family: str, lacks: str, settings_for: Make, tmp_path: Path) -> None:
    """Norms only after the MLP (OLMo 2), or one norm for attention and MLP (Phi): the line says what there is."""
    settings = settings_for(save_model(tmp_path / family, family))
    with pytest.raises(InputError) as stopped:
        harvest(settings)
    line = str(stopped.value)
    assert f"no hook point blocks.1.{lacks}; " in line
    assert "this one has attn.hook_" in line
    assert "mlp.hook_in, mlp.hook_out" in line
    assert "\n" not in line
    assert not Path(settings.store_path(1)).exists()


def test_a_model_whose_blocks_lose_the_contexts(settings_for: Make, tmp_path: Path) -> None:
    opt = save_model(tmp_path / "opt", "opt", word_embed_proj_dim=32, ffn_dim=64)
    with pytest.raises(InputError, match=r"expected one shape at .*, found \(32, 32\) and \(2, 16, 32\)"):
        harvest(settings_for(opt))


def test_no_layer(llama: Path, settings_for: Make) -> None:
    with pytest.raises(InputError, match="layer: none given; for example LAYER=17"):
        harvest(settings_for(llama, layer=""))


def test_a_disk_that_is_too_small(llama: Path, settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"the harvest needs .* 5 B are free; lower harvest\.rows"):
        harvest(settings_for(llama))
    harvest(settings_for(llama), force=True)


def test_after_its_first_window_the_plan_is_right_within_5_percent(
    llama: Path, settings_for: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "long.jsonl", sentences(1200, words=50))
    (path,) = harvest(settings_for(llama, "--data.files", str(text), rows=40_000))
    match = re.search(r"bytes a row \(measured\), ([\d.]+) MB on disk", capsys.readouterr().out)
    assert match
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert float(match[1]) * 1e6 == pytest.approx(size, rel=0.05)


def test_plan_harvest_and_the_list_of_stores_say_the_same_rows_and_size(
    llama: Path, settings_for: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Held-out rows are "about" so many until the text was read; after that the plan has the harvest's own numbers."""
    text = write_jsonl(tmp_path / "long.jsonl", sentences(1200, words=50))
    settings = settings_for(llama, "--data.files", str(text), rows=40_000)
    plan_only(settings)
    assert "layer 1: 40,000 train + about 4,444 held-out rows, " in capsys.readouterr().out
    with stopped_after(1):
        harvest(settings)
    rows = re.findall(r"plan: layer 1: (40,000 train \+ [\d,]+ held-out rows), ", capsys.readouterr().out)
    plan_only(settings)
    assert f"layer 1: {rows[-1]}, " in (planned := capsys.readouterr().out)
    assert "(measured)" in planned
    other = settings_for(llama, "--data.files", str(text), "--harvest.seed", "1", rows=40_000)
    with pytest.raises(InputError, match="holds another harvest"):
        plan_only(other)  # a window is written
    (path,) = harvest(settings)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"layer 1: {path}, {rows[-1]}, ")
    size = stores.line_of(path, 1, "")["size"]
    assert f" held-out rows, {size}, storing costs" in said
    assert size == human(sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()))


@pytest.mark.slow
def test_a_local_gemma_with_local_text_from_the_command_line(wide_gemma: Path, tmp_path: Path) -> None:
    """`make harvest LAYER=1 ARGS="--model.name <gemma-2 directory> --data.files <jsonl>"`, at real widths."""
    text = write_jsonl(tmp_path / "text.jsonl", sentences(60, words=80))
    command = [sys.executable, "-m", "harvest", "--layer", "1", "--model.name", str(wide_gemma)]
    command += ["--data.files", str(text), "--harvest.rows", "1100", "--harvest.context_length", "64"]
    command += [
        "--harvest.heldout_fraction",
        "0.1",
        "--paths.activations",
        str(tmp_path),
        "--model.device",
        "cpu",
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    store = Store.open(tmp_path / "wide-gemma" / "layer_1.zarr")
    assert (store.manifest.source.d_in, len(store.train)) == (2304, 1100)
    assert store.manifest.splits["train"].outputs
    assert store.manifest.splits["train"].outputs.quantisation_fvu < 2e-4


def test_gemma_2_without_a_network_ends_in_seconds_with_one_line(tmp_path: Path) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-m", "harvest", "--layer", "17", "--paths.activations", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith(
        "error: model google/gemma-2-2b: the Hugging Face hub could not be reached ("
    )
    assert "give --model.name <local directory>; make demo needs no hub" in process.stderr
    assert process.stderr.count("\n") == 1
    assert time.monotonic() - begun < 60  # trying the hub again takes minutes
    assert not list(tmp_path.iterdir())
