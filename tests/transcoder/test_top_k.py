"""Transcoders that keep the k largest of each row, wherever one encodes; and where others' belong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from common.hooks import same_output
from common.settings import Settings
from evaluate.compare import compare
from evaluate.metrics.measure import prefix_entries
from evaluate.run import evaluate
from evaluate.subject import read
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store
from tests.hub import Hub, Run
from tests.train.runs import sparse_rows
from tests.transcoder.others import D, sparse_coder, write_set
from tests.transcoder.test_other_tools import plainly
from train import loop
from train.normalisation import fold
from train.recipe import Recipe, initial
from transcoder import Transcoder
from transcoder.export import FORMATS, export, export_set
from transcoder.gain import bind, convert
from transcoder.import_ import bring

Make = Callable[..., Settings]
ENDS, K = (4, 10, 24), 3


def top_k(skip: bool = False) -> Transcoder:
    return replace(random_coder(6, 5, ENDS, skip=skip), thresholds=torch.zeros(3), k=K)


def test_every_way_to_encode_is_one(tmp_path: Path) -> None:
    own, x = top_k(skip=True), torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    rows = x.view(60, 6)
    pre = own.pre_activations(rows)
    for g, end in enumerate(ENDS):
        narrow = own.prefix(g)
        kept = torch.zeros(60, end).scatter_(1, pre[:, :end].topk(K).indices, 1)
        expected = pre[:, :end].relu() * kept
        torch.testing.assert_close(narrow.encode(rows), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(narrow.encode(x).view(60, end), expected, rtol=1e-5, atol=1e-6)
        for entries in (own.entries(pre, g), prefix_entries(rows, own)[0][g]):
            assert torch.equal(expected.nonzero().T, torch.stack([entries.rows, entries.latents]))
            assert torch.equal(entries.values, expected[expected > 0])
        assert own.W_skip is not None
        outputs = narrow.decode(expected) + rows @ own.W_skip.T
        torch.testing.assert_close(narrow(rows), outputs, rtol=1e-5, atol=1e-5)
    own.save(tmp_path)
    for read_back in (Transcoder.load(tmp_path), own.to("cpu")):
        assert torch.equal(read_back.encode(rows), own.encode(rows))
    with_gain = convert(own, "mlp_in", {"gain": [2.0] * 6}, "own")
    torch.testing.assert_close(with_gain.encode(2 * rows), own.encode(rows))
    assert own.encode(rows[:0]).shape == (0, 24)


def test_equal_activations_do_not_make_it_more_than_k() -> None:
    own = top_k()
    alike = replace(own, parameters=own.parameters.map(torch.ones_like))
    assert (alike.encode(torch.ones(7, 6)) > 0).sum(1).tolist() == [K] * 7
    assert len(alike.entries(alike.pre_activations(torch.ones(7, 6))).values) == 7 * K


def test_a_file_of_one_has_no_thresholds_to_be_taken_for_its_gate(tmp_path: Path) -> None:
    top_k().save(tmp_path)
    assert load_file(tmp_path / "transcoder.safetensors").keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    own = top_k()
    for selection, k in (("topk", 0), ("topk", 2.5), ("topk", None), ("batch_topk", 3), (None, 3)):
        wrong = {"selection": selection, "k": k}
        replace(own, k=None, metadata=own.metadata | wrong).save(tmp_path)
        with pytest.raises(InputError, match="selection: expected 'topk' with a k of at least 1, found"):
            Transcoder.load(tmp_path)


@pytest.mark.parametrize("to", FORMATS)
def test_no_format_that_gates_by_thresholds_is_written(make_settings: Make, to: str) -> None:
    settings = make_settings()
    top_k().save(settings.run_dir())
    with pytest.raises(InputError, match=r"keeps the 3 largest activations of each row, which no format"):
        export_set(settings) if to == "circuit_tracer" else export(settings.run_dir(), to)
    assert [path.name for path in settings.run_dir().iterdir()] == ["transcoder.safetensors"]


def square_store(settings: Settings, **source: object) -> Store:
    inputs, outputs = sparse_rows(2048, 2)
    rows = inputs[:, :D], outputs[:, :D]
    where = settings.store_path(0)
    gain = [0.5, 2.0, 1.0, -1.0, 3.0]
    return make_store(where, rows, (rows[0][:1024], rows[1][:1024]), gain=gain, n_layers=2, **source)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsifys_directories_are_compared_imported_and_evaluated(
    make_settings: Make, tmp_path: Path, skip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store has inputs without the gain, sparsify's read them with it; numbers as computed plainly."""
    settings = make_settings(paths__activations=str(tmp_path / "activations"))
    store = square_store(settings)
    theirs = sparse_coder(tmp_path / "run" / "layers.0.mlp", skip_connection=skip)
    sparse_coder(tmp_path / "run" / "layers.1.mlp")
    random_coder(D, D, (8, 20)).save(settings.run_dir())
    x, y = store.heldout.rows(0, 1024)
    acts, outputs = plainly(theirs, x * torch.tensor(store.manifest.source.gain), K)
    fvu = float((outputs - y).double().square().sum() / (y - y.mean(0)).double().square().sum())
    word = tmp_path / "run" / ("layers.0.mlp" if skip else "")
    line = compare(settings, [str(word)])[0].lines[-1]
    assert line.fvu == pytest.approx(fvu, rel=1e-5)
    assert line.l0 == pytest.approx(float((acts > 0).sum(1).double().mean()))
    assert "predicts the MLP's output (blocks.0.mlp.hook_out), the store has" in capsys.readouterr().err
    imported = make_settings(run="theirs", paths__activations=str(tmp_path / "activations"))
    bring(str(tmp_path / "run"), imported)
    kept = Transcoder.load(imported.run_dir())
    assert (kept.k, kept.metadata["source"]["output_hook"]) == (K, "blocks.0.hook_mlp_out")
    capsys.readouterr()
    if not skip:
        return
    metrics, _ = evaluate(imported, ce_tokens=0)
    assert "predicts the MLP's output" not in capsys.readouterr().err
    assert metrics.prefixes[0].fvu == pytest.approx(fvu, rel=1e-5)
    assert metrics.prefixes[0].l0 == line.l0
    assert metrics.prefixes[0].training_selection is None
    with pytest.raises(InputError, match="holds a transcoder that was not trained here"):
        loop.train(imported, store)


def test_where_a_norm_follows_the_mlp_its_own_output_is_another_tensor(tmp_path: Path) -> None:
    rows = sparse_rows(64, 2)
    store = make_store(tmp_path / "a.zarr", rows, rows, model="google/gemma-3-1b-pt")
    own = random_coder(12, 10, (8,))
    hooked = own.metadata["source"] | {"output_hook": "blocks.0.mlp.hook_out"}
    with pytest.raises(
        InputError,
        match=r"it predicts blocks\.0\.mlp\.hook_out, there blocks\.0\.hook_mlp_out; between the two lies the norm",
    ):
        bind(replace(own, metadata={"source": hooked}), store)


@pytest.mark.parametrize(
    ("model", "same"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("embedded/smollm2-135m", True),
        ("google/gemma-2b", True),
        ("google/gemma-1.1-7b-it", True),
        ("google/gemma-2-2b", False),
        ("google/gemma-2-27b-it", False),
        ("models/tiny-gemma3", False),
        ("google/medgemma-4b-pt", False),
        ("zai-org/GLM-4-9B-0414", False),
    ],
)
def test_families_with_a_norm_after_the_mlp(model: str, same: bool) -> None:
    assert same_output("blocks.3.mlp.hook_out", "blocks.3.hook_mlp_out", model) is same
    assert not same_output("blocks.3.mlp.hook_out", "blocks.4.hook_mlp_out", model)
    assert not same_output("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", model)


def test_what_a_file_does_not_say_is_asked_for(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings(paths__activations=str(tmp_path / "activations"))
    store = square_store(settings)
    sparse_coder(tmp_path / "mine")
    with pytest.raises(InputError, match=r"say it in importing it: make import ARGS='--input mlp_in'"):
        read(tmp_path / "mine", store)
    brought = bring(str(tmp_path / "mine"), settings, "mlp_in")
    source = brought.metadata["source"]
    assert (source["layer"], source["input"], source["input_hook"]) == (0, "mlp_in", "blocks.0.mlp.hook_in")
    assert read(settings.run_dir(), store).k == K
    sparse_coder(tmp_path / "layers.0.mlp")
    with pytest.raises(InputError, match="input: its file says mlp_in, asked normalized; leave --input out"):
        bring(str(tmp_path / "layers.0.mlp"), make_settings(run="b"), "normalized")


def test_a_layer_of_a_set_is_taken_by_its_number(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings(paths__activations=str(tmp_path / "activations"))
    folder = tmp_path / "set"
    write_set(folder, 0, 1)
    assert bring(str(folder), settings).metadata["source"]["layer"] == 0
    second = make_settings(run="b").model_copy(update={"layers": (1,)})
    assert bring(str(folder / "config.yaml"), second).metadata["source"]["layer"] == 1
    with pytest.raises(InputError, match=r"set: no layer_7\.safetensors in this set; it has layers 0 1"):
        bring(str(folder), second.model_copy(update={"layers": (7,)}))
    with pytest.raises(
        InputError, match=r"a set of layers; give the file of one, as .*set/layer_0\.safetensors"
    ):
        Transcoder.load(folder)
    for path in folder.glob("layer_*"):
        path.unlink()
    with pytest.raises(InputError, match="a set without a layer"):
        bring(str(folder), make_settings(run="c"))
    elsewhere = "[hf://google/scope/layer_0/params.npz, 'hf://google/scope/layer_1/params.npz?revision=main']"
    write_set(tmp_path / "elsewhere", transcoders=elsewhere)
    at = r"2 layers lie elsewhere; bring in that file itself, 'hf://google/scope@main/layer_1/params\.npz'"
    with pytest.raises(InputError, match=at):
        bring(str(tmp_path / "elsewhere"), make_settings(run="c").model_copy(update={"layers": (1,)}))


def test_training_starts_from_a_layer_of_a_set(make_settings: Make, store: Store, tmp_path: Path) -> None:
    own = random_coder(12, 10, (64,))
    config = {"feature_input_hook": "ln2.hook_normalized"}
    write_set(tmp_path / "set", 0, tensors=own.parameters.named(), **config)
    options = {"transcoder__group_sizes": (64,), "train__init_from": str(tmp_path / "set")}
    settings = make_settings(**options)
    recipe = Recipe.of(settings, store, torch.device("cpu"))
    folded = fold(initial(settings, recipe, store, torch.device("cpu")), recipe.scaling)
    torch.testing.assert_close(folded.W_enc, own.W_enc, rtol=1e-4, atol=1e-4)


def test_sets_on_the_hub_are_fetched_a_layer_at_a_time(hub: Hub, at_hub: Run, tmp_path: Path) -> None:
    write_set(tmp_path / "set", 0, 1, 2)
    for layer in range(3):
        sparse_coder(tmp_path / "run" / f"layers.{layer}.mlp")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "a/b"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "run" / "layers.1.mlp" / "optimizer.safetensors")
    for name in ("set", "run"):
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        hub.repos[f"models/me/{name}"] = {
            str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files
        }
        hub.commits[f"models/me/{name}"].append("made")
    script = (
        "import sys\nfrom transcoder import Transcoder\nfrom transcoder.formats import fetched\n"
        "for url, layer in (('hf://me/set', 1), ('hf://me/run', 1), ('hf://me/run/layers.1.mlp', None),\n"
        "                   ('hf://me/set/layer_1.safetensors', None)):\n"
        "    source = Transcoder.load(fetched(url, layer)).metadata['source']\n"
        "    print(source['layer'], source['input'], source['model'])\n"
    )
    process = at_hub("-c", script)
    assert process.stdout.split("\n")[:-1] == [
        "1 mlp_in Qwen/Qwen3-0.6B",
        "1 mlp_in a/b",
        "1 mlp_in a/b",
        "1 mlp_in Qwen/Qwen3-0.6B",
    ], process.stderr
    there = {path.name for path in (tmp_path / "hf").rglob("*") if path.is_symlink() or path.suffix}
    assert not there & {"layer_0.safetensors", "layer_2.safetensors", "optimizer.safetensors"}
    assert not list((tmp_path / "hf").rglob("layers.0.mlp"))
