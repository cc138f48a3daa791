"""A transcoder in several files, written by rows by several processes, read whole and by slice."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import dictionary
from common import files
from common.errors import InputError
from common.files import sha256
from common.settings import ROOT
from tests.transcoder.test_transcoder import tiny_transcoder
from transcoder import Transcoder, tensor_files, weights
from transcoder.entries import decode
from transcoder.export import FORMATS

FIRST, SECOND = "transcoder-00001-of-00002.safetensors", "transcoder-00002-of-00002.safetensors"
INDEX = "transcoder.safetensors.index.json"
ALL = sorted([FIRST, SECOND, INDEX, "transcoder.safetensors"])


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most 360 bytes of tensors: W_enc (220) and W_dec (132) are large, the others are not."""
    monkeypatch.setattr(weights, "MAX_FILE", 360)
    monkeypatch.setattr(weights, "LARGE", 3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of 150 MB, exported in every format: imports are measured on it."""
    folder = tmp_path_factory.mktemp("large")
    dictionary.write(folder, 150e6)
    for to in FORMATS:
        dictionary.export(folder, to)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: Transcoder, other: Transcoder) -> bool:
    pairs = zip(one.saved()[0].items(), other.saved()[0].items(), strict=True)
    return one.metadata == other.metadata and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("metadata", [None, {}, {"a": 'é"\\\n\x7f/\x01 '}])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Of one key: several are in no order there."""
    tensors = {
        "W": torch.randn(50, 7),
        "b": torch.randn(7),
        "a": torch.randn(3, 2, 2),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    tensor_files.save(tmp_path / "ours.safetensors", tensors, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("block", [1, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_views_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK", block)
    w = torch.randn(7, 50).to(dtype)
    views = {
        "turned": w.T,
        "rows": w[2:5],
        "columns": w[:, ::3],
        "part": w.T[3:9],
        "one": w[:1].T,
        "vector": w[0, ::2],
    }
    tensor_files.save(tmp_path / "views.safetensors", views)
    stored = load_file(tmp_path / "views.safetensors")
    assert all(torch.equal(stored[name], view.float()) for name, view in views.items())
    mapped, _ = tensor_files.mapped(tmp_path / "views.safetensors")
    assert all(torch.equal(mapped[name], tensor) for name, tensor in stored.items())


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2", reason="this kernel counts every map"
)
def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """Twice as large, and empty but for one row; safetensors' own map of it is refused."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n, file = 2 * memory // 4 // 4096, tmp_path / "large.safetensors"
    tensor_files.create(file, {"W": (n, 4096)})
    tensor_files.put(file, "W", n - 1, torch.ones(1, 4096))
    mapped = tensor_files.mapped(file)[0]["W"]
    assert mapped[n - 2 :].sum(1).tolist() == [0, 4096]


def test_what_is_changed_in_a_map_stays_in_memory(tmp_path: Path) -> None:
    own = tiny_transcoder()
    own.save(tmp_path)
    Transcoder.load(tmp_path).W_enc.zero_()
    assert same(Transcoder.load(tmp_path), own)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("skip", [False, True])
def test_a_large_one_is_in_several_files_with_an_index(tmp_path: Path, skip: bool) -> None:
    own = tiny_transcoder(skip)
    own.save(tmp_path)
    assert names(tmp_path) == ALL
    stored = {name: load_file(tmp_path / name) for name in (FIRST, SECOND, "transcoder.safetensors")}
    assert [[*stored[name]] for name in (FIRST, SECOND)] == [["W_dec"], ["W_enc"]]
    index = json.loads((tmp_path / INDEX).read_text())
    where = {name: file for file, tensors in stored.items() for name in tensors}
    assert index["weight_map"] == where
    assert index["metadata"] == {"total_size": sum(4 * each.numel() for each in own.saved()[0].values())}
    header = tensor_files.contents(tmp_path / "transcoder.safetensors")[2]
    assert json.loads(header["parts"]) == {name: sha256(tmp_path / name) for name in (FIRST, SECOND)}
    assert all(same(Transcoder.load(tmp_path / name), own) for name in ("", "transcoder.safetensors"))


PUT = """
import sys, torch
from pathlib import Path
from transcoder import weights
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
a, b = ((0, 7), (7, 11))[rank]
for name in ("W_enc", "b_enc", "W_dec"):
    weights.put(folder, name, a, torch.load(folder / "whole.pt")[name][a:b])
"""


@pytest.mark.parametrize("limit", [360, 10**9])
def test_processes_that_put_their_rows_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(weights, "MAX_FILE", limit)
    monkeypatch.setattr(weights, "LARGE", 3)
    own, run = tiny_transcoder(), tmp_path / "run"
    tensors, metadata = own.saved()
    own.save(tmp_path / "one")
    weights.begin(run, tensor_files.shapes_of(tensors), metadata)
    torch.save(tensors, run / "whole.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", PUT, str(rank), str(run)], cwd=ROOT) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for name in ("b_dec", "thresholds"):
        weights.put(run, name, 0, tensors[name])
    (run / "whole.pt").unlink()
    assert not (run / "transcoder.safetensors").exists()
    weights.commit(run)
    assert names(run) == (ALL if limit == 360 else ["transcoder.safetensors"])
    assert all((run / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names(run))
    with pytest.raises(FileNotFoundError):
        weights.put(run, "b_dec", 0, tensors["b_dec"])


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights.begin(tmp_path, {"W_enc": (11, 5), "b_enc": (11,)}, {})
    for name, start, rows in (
        ("W_enc", 10, (2, 5)),
        ("W_enc", -1, (1, 5)),
        ("W_enc", 0, (1, 4)),
        ("b_enc", 11, (1,)),
    ):
        with pytest.raises(ValueError, match="does not fit at row"):
            weights.put(tmp_path, name, start, torch.zeros(rows))
    with pytest.raises(ValueError, match="no tensor W_dec was begun"):
        weights.put(tmp_path, "W_dec", 0, torch.zeros(1, 5))


@pytest.mark.parametrize("limit", [360, 10**9])
@pytest.mark.parametrize("each", [False, True])
def test_slices_of_latents_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, each: bool
) -> None:
    """Every prefix of it: what the slices' latents put out adds up, b_dec and the skip connection once."""
    monkeypatch.setattr(weights, "MAX_FILE", limit)
    own = tiny_transcoder(skip=True)
    own = replace(own, thresholds=torch.linspace(0, 0.3, 33).view(3, 11)) if each else own
    own.save(tmp_path)
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    parts = [Transcoder.load(tmp_path, latents=slice(a, b)) for a, b in ((0, 4), (4, 5), (5, 11))]
    assert [part.prefix_ends for part in parts] == [(2, 4, 4), (0, 1, 1), (0, 0, 6)]
    assert torch.equal(torch.cat([part.W_enc for part in parts]), own.W_enc)
    for g in range(3):
        made = [
            decode(part.entries(part.pre_activations(x), g), part.W_dec, torch.zeros(40, 3)) for part in parts
        ]
        whole = decode(own.entries(own.pre_activations(x), g), own.W_dec, own.base_output(x))
        torch.testing.assert_close(torch.stack(made).sum(0) + parts[1].base_output(x), whole)
    assert same(Transcoder.load(tmp_path, latents=slice(None)), own)


def test_only_a_slice_is_checked_for_finite_numbers(tmp_path: Path) -> None:
    own = tiny_transcoder()
    own.W_dec[7, 1] = float("inf")
    own.save(tmp_path)
    assert Transcoder.load(tmp_path, latents=slice(0, 7)).d_sae == 7
    with pytest.raises(InputError, match="tensor W_dec: expected finite numbers"):
        Transcoder.load(tmp_path, latents=slice(7, 8))


@pytest.mark.parametrize("limits", [(360, 200), (200, 360), (360, 360), (10**9, 360), (360, 10**9)])
@pytest.mark.parametrize("dies", [1, 2, 3, 4, 5])
def test_one_that_takes_the_place_of_another_and_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], dies: int
) -> None:
    """Before any rename: the old one, or none; never the two mixed. The next one leaves nothing of either."""
    monkeypatch.setattr(weights, "LARGE", 3)
    old = tiny_transcoder(skip=True)
    new = replace(
        old, parameters=old.parameters.map(lambda each: each + 1), metadata={"harvest_fingerprint": "g"}
    )
    monkeypatch.setattr(weights, "MAX_FILE", limits[0])
    old.save(tmp_path)
    monkeypatch.setattr(weights, "MAX_FILE", limits[1])
    calls = []

    def publish(aside: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == dies:
            raise KeyboardInterrupt
        files.publish(aside, path)

    monkeypatch.setattr(weights, "publish", publish)
    killed = False
    try:
        new.save(tmp_path)
    except KeyboardInterrupt:
        killed = True
        if (tmp_path / "transcoder.safetensors").exists():
            assert same(Transcoder.load(tmp_path), old)
        else:
            with pytest.raises(InputError, match="no transcoder here"):
                Transcoder.load(tmp_path)
    monkeypatch.setattr(weights, "publish", files.publish)
    new.save(tmp_path)
    assert killed == (dies <= len(calls))
    assert same(Transcoder.load(tmp_path), new)
    fresh = tmp_path / "fresh"
    new.save(fresh)
    assert {*names(tmp_path)} - {"fresh"} == {*names(fresh)}


@pytest.mark.usefixtures("split")
def test_what_a_killed_process_was_writing_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny_transcoder()
    tensors, metadata = own.saved()
    weights.begin(tmp_path, tensor_files.shapes_of(tensors), metadata)
    assert len(names(tmp_path)) == 3
    monkeypatch.setattr(weights, "MAX_FILE", 10**9)
    own.save(tmp_path)
    assert names(tmp_path) == ["transcoder.safetensors"]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda run: (run / FIRST).unlink(),
            f"{FIRST}: not found; it is one of the 3 files of .*: copy all of them",
        ),
        (lambda run: os.truncate(run / SECOND, 250), f"{SECOND}: not a readable safetensors file"),
        (
            lambda run: shutil.copy(run / "other" / FIRST, run / FIRST),
            f"{FIRST}: belongs to another transcoder than .*",
        ),
        (lambda run: (run / SECOND).rename(run / FIRST), f"{SECOND}: not found"),
        (lambda run: shutil.copy(run / SECOND, run / FIRST), "tensor W_dec: expected shape .*, found none"),
        (
            lambda run: save_file({"a": torch.zeros(1)}, run / FIRST),
            f"{FIRST}: belongs to another transcoder",
        ),
    ],
)
def test_a_part_that_is_missing_short_or_foreign(tmp_path: Path, mistake, message: str) -> None:
    tiny_transcoder().save(tmp_path)
    replace(tiny_transcoder(), metadata={"harvest_fingerprint": "g"}).save(tmp_path / "other")
    mistake(tmp_path)
    with pytest.raises(InputError, match=message):
        Transcoder.load(tmp_path)


@pytest.mark.usefixtures("split")
def test_a_part_is_no_transcoder_and_names_no_other_place(tmp_path: Path) -> None:
    tiny_transcoder().save(tmp_path / "run")
    with pytest.raises(InputError, match="a part of a transcoder; give its directory"):
        Transcoder.load(tmp_path / "run" / FIRST)
    file = tmp_path / "run" / "transcoder.safetensors"
    texts = tensor_files.contents(file)[2]
    (tmp_path / "run" / FIRST).rename(tmp_path / "elsewhere")
    save_file(load_file(file), file, texts | {"parts": json.dumps({"../elsewhere": "", SECOND: ""})})
    with pytest.raises(InputError, match="is not the name of a file in it"):
        Transcoder.load(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"export {to}" for to in FORMATS] + [f"import {to}" for to in FORMATS])
def test_memory_of_exports_and_imports(large: Path, name: str) -> None:
    """A dictionary of 150 MB in blocks of 4 MB. What takes W_enc or all of it once says so here."""
    whole = {"export gemma_scope_2": 75, "import saelens": 75, "import gemma_scope_2": 75}
    whole["import gemma_scope"] = 150
    assert dictionary.of(name, large, 150e6, 4_000_000)["own"] < (whole.get(name, 0) + 40) * 1e6
