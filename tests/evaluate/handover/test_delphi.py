"""delphi's cache against dense activations, and its bytes."""

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.errors import InputError
from common.settings import Settings
from evaluate.handover import delphi, splits
from evaluate.handover.delphi import export_delphi
from evaluate.handover.splits import Split
from shards import Store
from tests.evaluate.runs import D_IN, D_OUT, make_run, settings_of, tiny_transcoder
from tests.fixtures import make_store
from transcoder import Transcoder
from transcoder.transcoder import Parameters

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delphi")
    make_run(folder)
    return folder


def files(module: Path) -> dict[tuple[int, int], Arrays]:
    """(first, last) latent -> the file's arrays; together they are all latents, each once."""
    found = {}
    for path in module.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        found[first, last] = load_file(path)
    found = dict(sorted(found.items()))
    assert [first for first, _ in found] == [0, *(last + 1 for _, last in found)][:-1]
    assert len(list(module.iterdir())) == len(found) + 1
    return found


def cache(module: Path) -> dict[tuple[int, int, int], float]:
    """(context, position, latent) -> activation."""
    values: dict[tuple[int, int, int], float] = {}
    for (first, last), arrays in files(module).items():
        places = arrays["locations"].astype(int)
        assert places[:, 2].max(initial=0) <= last - first
        keys = [tuple(key) for key in (places + np.array([0, 0, first])).tolist()]
        assert keys == sorted(set(keys))  # delphi takes a latent's firings for sorted by context
        values |= dict(zip(keys, arrays["activations"].tolist(), strict=True))
    return values


def expected(
    settings: Settings, contexts: int, coder: Transcoder | None = None
) -> dict[tuple[int, int, int], float]:
    """The same from dense activations of the split's rows."""
    split = Store.of(settings).split(settings.evaluate.split)
    acts = (coder or Transcoder.load(settings.run_dir())).encode(split.rows(0, len(split))[0])
    context, position = split.provenance(0, len(split))
    return {
        (int(context[row]), int(position[row]), latent): float(acts[row, latent])
        for row, latent in acts.nonzero().tolist()
        if context[row] < contexts
    }


def same(found: dict[Any, float], wanted: dict[Any, float]) -> bool:
    assert found.keys() == wanted.keys()
    keys = sorted(wanted)
    return np.allclose([found[key] for key in keys], [wanted[key] for key in keys], rtol=2**-10)


def test_every_firing_is_in_the_cache_once(root: Path) -> None:
    """1,500 held-out rows are 100 contexts of 16, whose first position has no row; groups of 4, 6 and 14 latents."""
    folder = export_delphi(settings_of(root))
    assert folder == settings_of(root).run_dir() / "export" / "delphi"
    assert [path.name for path in folder.iterdir()] == ["layers.0.mlp"]  # delphi takes all there for modules
    module = folder / "layers.0.mlp"
    assert list(files(module)) == [(0, 3), (4, 8), (9, 13), (14, 18), (19, 23)]
    wanted = expected(settings_of(root), contexts=100)
    assert len(wanted) > 5000
    assert same(cache(module), wanted)
    tokens = Store.of(settings_of(root)).heldout.contexts[np.arange(100)]
    for arrays in files(module).values():
        assert np.array_equal(arrays["tokens"], tokens)
        assert arrays["locations"].dtype == np.uint16
        assert arrays["activations"].dtype == np.float16
    config = json.loads((module / "config.json").read_text())
    named = {"dataset_repo": "tests/tiny", "dataset_split": "", "dataset_name": "", "dataset_column": "text"}
    sizes = {"batch_size": 1, "cache_ctx_len": 16, "n_tokens": 1600, "n_splits": 5}
    assert config == {**named, **sizes, "model_name": "tests/tiny"}


def test_a_latent_that_is_a_dimension_fires_where_it_is_large(tmp_path: Path) -> None:
    """Row i is 2 + i on dimension i % 6 and nothing else, and latent f is dimension f less 1 half."""
    inputs = np.zeros((30, D_IN), np.float32)
    inputs[np.arange(30), np.arange(30) % D_IN] = 2 + np.arange(30)
    zeros = torch.zeros(D_IN)
    parameters = Parameters(torch.eye(D_IN), zeros - 0.5, torch.zeros(D_IN, D_OUT), torch.zeros(D_OUT))
    coder = Transcoder(parameters, torch.tensor([1.0]), (D_IN,))
    make_run(tmp_path, coder)
    settings, outputs = settings_of(tmp_path), np.zeros((30, D_OUT), np.float32)
    store = Path(settings.store_path(0))
    shutil.rmtree(store)
    make_store(store, (inputs, outputs), (inputs, outputs))
    found = files(export_delphi(settings) / "layers.0.mlp")
    assert list(found) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 5)]  # six latents in five files
    for f, last in found:
        rows = [i for i in range(30) if i % D_IN in range(f, last + 1)]
        assert found[f, last]["locations"].tolist() == [[i // 15, i % 15 + 1, i % D_IN - f] for i in rows]
        assert found[f, last]["activations"].tolist() == [1.5 + i for i in rows]


def test_a_prefix_fires_by_its_own_threshold(root: Path) -> None:
    folder = export_delphi(settings_of(root), prefix=1)
    assert folder.name == "delphi_prefix_1"
    own = Transcoder.load(settings_of(root).run_dir()).prefix(1)
    assert list(files(folder / "layers.0.mlp"))[-1] == (8, 9)
    assert same(cache(folder / "layers.0.mlp"), expected(settings_of(root), 100, own))


def test_of_train_rows_the_context_that_they_end_in_is_left_out(root: Path) -> None:
    """2,000 rows are 133 contexts of 15 rows and five rows of the next: its other tokens fired nowhere."""
    settings = settings_of(root, "--evaluate.split", "train")
    module = export_delphi(settings) / "layers.0.mlp"
    assert module.parent.name == "delphi_train"
    assert files(module)[0, 3]["tokens"].shape == (133, 16)
    assert same(cache(module), expected(settings, contexts=133))


def test_rows_that_are_asked_for_are_the_first_of_the_text(root: Path) -> None:
    """100 rows hold six whole contexts; they are anywhere in a window, which is shuffled."""
    settings = settings_of(root, "--evaluate.rows", "100")
    module = export_delphi(settings) / "layers.0.mlp"
    assert files(module)[0, 3]["tokens"].shape == (6, 16)
    assert same(cache(module), expected(settings, contexts=6))
    with pytest.raises(InputError, match=r"no context of heldout of .* lies wholly in 14 rows; give more"):
        export_delphi(settings_of(root, "--evaluate.rows", "14"))


def test_several_windows_follow_each_other(tmp_path: Path) -> None:
    """33,000 rows: a context lies in the first window of 32,768 and in the second."""
    own = tiny_transcoder()
    make_run(
        tmp_path, replace(own, thresholds=own.thresholds + 2), heldout=33_000
    )  # few firings, compared one by one
    module = export_delphi(settings_of(tmp_path)) / "layers.0.mlp"
    assert files(module)[0, 3]["tokens"].shape == (2200, 16)
    assert same(cache(module), expected(settings_of(tmp_path), contexts=2200))
    module = export_delphi(settings_of(tmp_path, "--evaluate.rows", "32800")) / "layers.0.mlp"
    assert same(cache(module), expected(settings_of(tmp_path), contexts=2186))


def test_a_latent_that_never_fires_and_a_file_without_any_firing(tmp_path: Path) -> None:
    own = tiny_transcoder()
    b_enc = own.b_enc.clone()
    b_enc[9:14] = -50
    make_run(tmp_path, replace(own, parameters=replace(own.parameters, b_enc=b_enc)))
    found = files(export_delphi(settings_of(tmp_path)) / "layers.0.mlp")
    assert found[9, 13]["locations"].shape == (0, 3)
    assert found[9, 13]["activations"].shape == (0,)
    assert found[9, 13]["tokens"].shape == (100, 16)


def test_layers_go_into_one_folder_and_share_a_text(root: Path, tmp_path: Path) -> None:
    for layer in (0, 1):
        make_run(tmp_path, tiny_transcoder(layer), layer=layer, n_layers=3)
    make_run(tmp_path, layer=2, n_layers=3, heldout=1000)
    both = settings_of(tmp_path, "--layer", "0 1")
    folder = export_delphi(both)
    assert folder == tmp_path / "checkpoints/transcoder/tiny/export/delphi/tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["layers.0.mlp", "layers.1.mlp"]
    for layer in (0, 1):
        settings = both.of_layer(layer)
        assert same(cache(folder / f"layers.{layer}.mlp"), expected(settings, contexts=100))
    with pytest.raises(InputError, match="the stores of layers 0 and 2 have different texts"):
        export_delphi(settings_of(tmp_path).model_copy(update={"layers": ()}))  # all layers with this run


@pytest.mark.parametrize(("value", "kind"), [(65_504.0, "f2"), (65_520.0, "f4"), (7e-5, "f2"), (3e-5, "f4")])
def test_values_that_float16_does_not_hold_are_kept(tmp_path: Path, value: float, kind: str) -> None:
    """65,520 would become infinity, what is below 6.1e-5 would lose digits; delphi reads float32 as well."""
    with Split(tmp_path, 4, 9, contexts=2) as split:
        split.add(
            *(np.array([each], kind_) for each, kind_ in ((1, "u4"), (3, "u2"), (7, "i4"), (value, "f4")))
        )
        split.finish(np.arange(6, dtype=np.int32).reshape(2, 3), {})
    arrays = load_file(tmp_path / "4_9.safetensors")
    assert arrays["activations"].dtype == np.dtype(kind)
    assert arrays["activations"][0] == pytest.approx(value, rel=1e-3)
    assert arrays["locations"].tolist() == [[1, 3, 3]]
    assert arrays["tokens"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [path.name for path in tmp_path.iterdir()] == ["4_9.safetensors"]


def test_more_than_65536_contexts_are_counted_in_32_bits(tmp_path: Path) -> None:
    contexts = np.zeros((65_537, 1), np.int32)
    for n, kind in ((65_536, np.uint16), (65_537, np.uint32)):
        with Split(tmp_path, 0, 0, contexts=n) as split:
            split.add(np.array([n - 1]), np.array([0]), np.array([0]), np.array([1.0], np.float32))
            split.finish(contexts, {})
        arrays = load_file(tmp_path / "0_0.safetensors")
        assert arrays["locations"].dtype == kind
        assert arrays["locations"].tolist() == [[n - 1, 0, 0]]


def test_the_header_says_what_it_was_made_of_and_ends_at_a_multiple_of_eight(root: Path) -> None:
    path = export_delphi(settings_of(root)) / "layers.0.mlp" / "0_3.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    said = json.loads(data[8 : 8 + length])["__metadata__"]
    assert said["store_fingerprint"] == Store.of(settings_of(root)).manifest.fingerprint
    assert (said["split"], said["prefix"]) == ("heldout", "2")
    assert re.fullmatch("[0-9a-f]{64}", said["weights_sha256"])


def test_much_text_makes_more_files() -> None:
    assert len(delphi.ranges(18_432, 1.4e9)) == 84
    assert delphi.ranges(18_432, 1.4e9)[-1][1] == 18_431
    assert len(delphi.ranges(4_608, 13e6)) == 5


def test_an_export_that_is_interrupted_leaves_the_one_before_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_delphi(settings_of(root))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(splits.Split, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        export_delphi(settings_of(root))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(KeyboardInterrupt):
        export_delphi(settings_of(root), prefix=0)
    assert not (folder.parent / "delphi_prefix_0").exists()
    assert not [path for path in folder.parent.iterdir() if path.suffix in (".tmp", ".lock")]
