"""What stock zarr-python reads is what we read; what is damaged is refused."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ENVIRONMENT, InputError
from common.files import sha256
from shards import Store
from shards.commit import commit_text, read_commit
from shards.encode import encode_rows
from shards.layout import CHUNK_ROWS, SHARD_ROWS, split_arrays
from shards.reader import MappedArray, ZarrArray, open_array, read_lines
from shards.remote import LocalFiles
from shards.storage import STORAGES, from_bfloat16
from tests.fixtures import Rows, make_store

COMPRESSORS = ("none", "zstd-3", "blosc-zstd-3-shuffle", "blosc-lz4-5-bitshuffle")


def random_rows(n: int, d_in: int = 6, d_out: int = 5, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(n, 1)) * 3)  # row norms that vary by orders of magnitude
    inputs, outputs = rng.normal(size=(n, d_in)) * scale, rng.normal(size=(n, d_out)) * scale
    return inputs.astype(np.float32), outputs.astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "layer_0.zarr"
    return make_store(path, random_rows(SHARD_ROWS + 3000), random_rows(1500, seed=1), storage="int8")


@given(
    storage=st.sampled_from([*STORAGES]),
    compressor=st.sampled_from(COMPRESSORS),
    rows=st.sampled_from(
        [1, 5, 1023, 1024, 1025, SHARD_ROWS - 1, SHARD_ROWS, SHARD_ROWS + 1, 2 * SHARD_ROWS + 1030]
    ),
    heldout=st.sampled_from([0, 1, 2000]),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_zarr_python_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    storage: str,
    compressor: str,
    rows: int,
    heldout: int,
    widths: tuple[int, int],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("property") / "s.zarr"
    store = make_store(
        path, random_rows(rows, *widths, seed), random_rows(heldout, *widths, seed + 1), storage, compressor
    )
    group = zarr.open_group(path, mode="r")
    for name, split in (("train", store.train), ("heldout", store.heldout)):
        theirs = {key: np.asarray(array[:]) for key, array in group[name].arrays()}
        assert theirs.keys() == split.readers.keys()
        for key, values in theirs.items():
            assert (read_lines(split.readers[key], range(len(values))) == values).all()
        assert (split.contexts[:] == theirs["contexts"]).all()
        assert torch.equal(split.rows(0, len(split))[1], torch.from_numpy(decoded(theirs, "output", storage)))
    shutil.rmtree(path)


def decoded(arrays: dict[str, np.ndarray], side: str, storage: str) -> np.ndarray:
    """FORMAT.md's values table, written plainly."""
    stored = arrays[f"{side}s"]
    if storage == "bfloat16":
        return from_bfloat16(stored)
    if not STORAGES[storage].scaled:
        return stored.astype(np.float32)
    scales, row_scales, offsets = (arrays[f"{side}_{name}"] for name in ("scales", "row_scales", "offsets"))
    chunks = [slice(i, i + 1024) for i in range(0, len(stored), 1024)]
    parts = [
        stored[c].astype(np.float32) * scales[i] * row_scales[c, None] + offsets[i]
        for i, c in enumerate(chunks)
    ]
    return np.concatenate(parts) if parts else np.zeros(stored.shape, np.float32)


TOLERANCE = {"int8": 0.02, "bfloat16": 0.004, "float32": 0.0}
"""Largest error of a value, relative to the largest of its row."""


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_come_back_where_their_provenance_says(tmp_path: Path, storage: str) -> None:
    inputs, outputs = random_rows(SHARD_ROWS + 500)
    store = make_store(tmp_path / "s.zarr", (inputs, outputs), random_rows(10), storage)
    context, position = store.train.provenance(0, len(store.train))
    kept = context.astype(int) * 15 + position - 1
    assert (np.sort(kept) == np.arange(len(inputs))).all()
    assert (kept[:SHARD_ROWS].max(), kept[SHARD_ROWS:].min()) == (SHARD_ROWS - 1, SHARD_ROWS)
    assert (kept[:SHARD_ROWS] != np.arange(SHARD_ROWS)).mean() > 0.99
    ours, theirs = store.train.rows(0, len(store.train))
    tolerance = TOLERANCE[storage]
    for actual, expected in ((ours, inputs), (theirs, outputs)):
        largest = np.abs(expected[kept]).max(axis=1, keepdims=True)
        assert (np.abs(actual.numpy() - expected[kept]) <= tolerance * largest).all()


def test_any_range_of_rows_equals_a_slice_of_the_whole(store: Store) -> None:
    whole = store.train.rows(0, len(store.train))
    for start, stop in [
        (0, 0),
        (5, 6),
        (1000, 1050),
        (1023, 3000),
        (SHARD_ROWS - 1, SHARD_ROWS + 2),
        (35_000, 35_768),
    ]:
        part = store.train.rows(start, stop)
        assert torch.equal(part[0], whole[0][start:stop])
        assert torch.equal(part[1], whole[1][start:stop])
    with pytest.raises(InputError, match="expected 0 <= start <= stop <= 35768"):
        store.train.rows(0, 35_769)


def test_contexts_are_indexed_like_an_array(store: Store) -> None:
    contexts = store.train.contexts
    whole = contexts[:]
    assert whole.shape == contexts.shape
    assert (contexts[[700, 3, 3]] == whole[[700, 3, 3]]).all()
    assert (contexts[-1] == whole[-1]).all()
    assert (contexts[10:2:-3] == whole[10:2:-3]).all()
    with pytest.raises(IndexError):
        contexts[len(contexts)]


def test_moments_are_those_of_the_rows(tmp_path: Path) -> None:
    inputs, outputs = random_rows(SHARD_ROWS + 100)
    store = make_store(tmp_path / "s.zarr", (inputs, outputs), random_rows(0), "int8")
    moments = store.manifest.splits["train"].outputs
    assert moments is not None
    wide = outputs.astype(np.float64)
    assert moments.mean == pytest.approx(wide.mean(axis=0), rel=1e-9)
    assert moments.variance == pytest.approx(wide.var(axis=0), rel=1e-9)
    assert moments.scale == pytest.approx(np.sqrt(np.square(wide).mean()), rel=1e-9)
    context, position = store.train.provenance(0, len(outputs))
    kept = context.astype(int) * 15 + position - 1
    error = np.square(store.train.rows(0, len(outputs))[1].numpy().astype(np.float64) - wide[kept]).sum()
    assert moments.quantisation_fvu == pytest.approx(
        error / np.square(wide - wide.mean(axis=0)).sum(), rel=1e-6
    )
    assert store.manifest.splits["heldout"].inputs is None


def test_sha256sum_checks_a_store(store: Store) -> None:
    process = subprocess.run(
        ["sha256sum", "-c", "--quiet", "files.sha256"], cwd=store.path, capture_output=True, check=False
    )
    assert (process.returncode, process.stdout) == (0, b"")
    on_disk = {str(p.relative_to(store.path)) for p in store.path.rglob("*") if p.is_file()} - {
        "files.sha256"
    }
    assert set(read_commit(store.path)) == on_disk


def test_nothing_of_this_machine_is_in_a_store(store: Store) -> None:
    import os
    import socket

    for path in store.path.rglob("*.json"):
        text = path.read_text()
        assert socket.gethostname() not in text
        assert str(Path.cwd()) not in text
        assert f'"{os.getpid()}"' not in text


def test_unknown_layouts_are_read_through_zarr(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    array = store.train.readers["inputs"].array
    values = np.asarray(zarr.open_array(copy / array.path, mode="r")[:])
    shutil.rmtree(copy / array.path)
    other = zarr.create_array(copy / array.path, shape=array.shape, dtype=array.dtype, chunks=(500, 3))
    other[:] = values
    with pytest.warns(UserWarning, match="layout unknown to the fast reader, read through zarr-python"):
        reader = open_array(LocalFiles(copy), array)
    assert isinstance(reader, ZarrArray)
    for chunk in (0, 7, array.chunks - 1):
        assert (reader.chunk(chunk) == store.train.readers["inputs"].chunk(chunk)).all()


# -- refused -------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "line"),
    [
        (
            "files.sha256",
            Path.unlink,
            "unfinished harvest (files.sha256 is missing); the same make harvest continues it",
        ),
        ("files.sha256", cut, "damaged: its last line does not digest the lines above"),
        ("files.sha256", flip, "damaged: its last line does not digest the lines above"),
        ("zarr.json", flip, "zarr.json: sha256 expected"),
        ("tokenizer.json", Path.unlink, "tokenizer.json: missing, though files.sha256 lists it"),
        ("train/inputs/zarr.json", flip, "zarr.json: sha256 expected"),
    ],
)
def test_damaged_metadata_is_refused_at_once(
    store: Store, tmp_path: Path, name: str, damage: Callable[[Path], None], line: str
) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    damage(copy / name)
    with pytest.raises(InputError) as stopped:
        Store.open(copy)
    assert line in str(stopped.value)


@pytest.mark.parametrize(
    "array", ["inputs", "input_scales", "output_row_scales", "output_offsets", "outputs"]
)
@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (Path.unlink, "No such file or directory"),
        (cut, "the chunk index's checksum does not match"),
        (flip, "checksum mismatch"),
        (lambda path: path.write_bytes(b""), "expected at least 516 bytes, found 0"),
    ],
)
def test_damaged_chunks_are_never_handed_out(
    store: Store, tmp_path: Path, array: str, damage: Callable[[Path], None], line: str
) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    path = (
        next((copy / "train" / array / "c" / "0").rglob("0"))
        if (copy / "train" / array / "c" / "0").is_dir()
        else (copy / "train" / array / "c" / "0")
    )
    damage(path)
    damaged = Store.open(copy)
    with pytest.raises(InputError) as stopped:
        damaged.train.rows(0, SHARD_ROWS)
    assert line in str(stopped.value)
    assert str(path) in str(stopped.value)
    with pytest.raises(InputError):
        list(damaged.train.loader(64, seed=0))


def test_a_file_that_shrinks_while_it_is_mapped(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    opened = Store.open(copy)
    opened.train.rows(0, 10)
    path = copy / "train/inputs/c/0/0"
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match="the file's length changed from"):
        opened.train.rows(0, 20_000)


def test_another_format_version_is_refused(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    group = json.loads((copy / "zarr.json").read_text())
    group["attributes"]["manifest"]["format_version"] = 2
    (copy / "zarr.json").write_text(json.dumps(group))
    digests = read_commit(copy) | {"zarr.json": sha256(copy / "zarr.json")}
    (copy / "files.sha256").write_bytes(commit_text(digests))
    with pytest.raises(
        InputError, match=r"expected format matryoshka-activations version 1, found .* version 2"
    ):
        Store.open(copy)


def test_a_path_without_a_store_says_what_writes_one() -> None:
    with pytest.raises(InputError, match="no such store; make harvest writes it"):
        Store.open("/nowhere/layer_1.zarr")


def test_open_files_are_bounded(store: Store) -> None:
    reader = store.train.readers["inputs"]
    assert isinstance(reader, MappedArray)
    reader.chunk(0)
    reader.chunk(33)
    assert list(reader._opened) == [0, 1]


def test_a_store_without_offsets_is_read(tmp_path: Path) -> None:
    """Bytes that the version of 2026-11-25 wrote: 1,100 + 20 rows, int8 with scales by rows' plain size."""
    shutil.unpack_archive(Path(__file__).with_name("without_offsets.tar.xz"), tmp_path, filter="data")
    old = Store.open(tmp_path / "layer_0.zarr")
    assert not old.manifest.source.offsets
    moments = old.manifest.splits["train"].outputs
    assert moments is not None
    assert moments.worst_dimension_fvu is None
    inputs, outputs = old.train.rows(0, 1100)
    assert inputs[1099].tolist() == [-0.24091242253780365, 0.9820712208747864, -1.278151512145996]
    assert outputs[0].tolist() == [43.641639709472656, 51.90853500366211]
    assert float(outputs.double().sum()) == 110469.76231956482
    batch, _ = next(iter(old.train.loader(8, seed=0)))
    assert any(torch.equal(batch[0], row) for row in inputs)


def test_the_worst_dimension_is_reported_and_guarded(tmp_path: Path) -> None:
    """bfloat16 has 256 steps from 1024 to 2048 of 4 each: the last dimension, 1500 +- 1, is all but lost."""
    inputs, outputs = random_rows(2000)
    inputs[:, 5] = 1500 + np.random.default_rng(0).normal(size=2000)
    store = make_store(tmp_path / "a.zarr", (inputs, outputs), random_rows(0), "bfloat16")
    moments = store.manifest.splits["train"].inputs
    assert moments is not None
    assert moments.worst_dimension == 5
    stored = store.train.rows(0, 2000)[0][:, 5].double()
    context, position = store.train.provenance(0, 2000)
    true = torch.from_numpy(inputs[context.astype(int) * 15 + position - 1, 5]).double()
    loss = float((stored - true).square().sum() / (true - true.mean()).square().sum())
    assert moments.worst_dimension_fvu == pytest.approx(loss, rel=1e-6)
    assert loss > 0.5
    assert moments.quantisation_fvu < 1e-3
    line = r"storing the inputs as bfloat16 costs dimension 5 [\d.]+ of its own variance, above harvest.max_dimension"
    for limit, rows in ((0.05, 2000), (0.05, 255)):  # of few rows the variance may be small by chance
        part = inputs[:rows], outputs[:rows]
        if rows == 2000:
            with pytest.raises(InputError, match=line):
                make_store(tmp_path / "b.zarr", part, random_rows(0), "bfloat16", max_dimension_fvu=limit)
        else:
            make_store(tmp_path / "c.zarr", part, random_rows(0), "bfloat16", max_dimension_fvu=limit)
    inputs[:, 5] = 1501  # constant, and no value of bfloat16: nothing varies that could be lost
    store = make_store(
        tmp_path / "d.zarr", (inputs, outputs), random_rows(0), "bfloat16", max_dimension_fvu=0.05
    )
    assert store.manifest.splits["train"].inputs
    assert store.manifest.splits["train"].inputs.worst_dimension != 5


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("os.open", errno.EMFILE, "Too many open files"),
        ("os.open", errno.EACCES, "Permission denied"),
        (
            "mmap.mmap",
            errno.ENODEV,
            "cannot be mapped into memory (No such device); copy the store to another disk",
        ),
    ],
)
def test_what_the_system_refuses_is_no_damage(
    store: Store, call: str, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make verify ARGS=--repair` would harvest again what is whole."""
    opened = Store.open(store.path)

    def refuses(*where: object, **_: object) -> None:
        raise OSError(number, os.strerror(number), where[0] if call == "os.open" else None)

    monkeypatch.setattr(call, refuses)
    with pytest.raises(OSError, match=re.escape(said)) as stopped:
        opened.train.rows(0, 10)
    assert stopped.value.errno in ENVIRONMENT  # one line, exit code 2
    assert str(stopped.value.filename).startswith(str(store.path / "train"))


def test_threads_encode_the_same_bytes_and_sums(tmp_path: Path) -> None:
    """Two and a half chunks side by side, against one after the other."""
    rng = np.random.default_rng(0)
    n = 2 * CHUNK_ROWS + 512
    rows = rng.standard_normal((n, 24), dtype=np.float32)
    store = make_store(tmp_path / "m" / "layer_0.zarr", (rows, rows), (rows[:9], rows[:9]), storage="int8")
    arrays = split_arrays(store.manifest.source, "train", n, store.manifest.splits["train"].contexts)
    with ThreadPoolExecutor(4) as pool:
        threaded = encode_rows(rows, STORAGES["int8"], arrays, "input", pool.map)
    assert threaded == encode_rows(rows, STORAGES["int8"], arrays, "input")
    assert threaded[1]["n"] == n
