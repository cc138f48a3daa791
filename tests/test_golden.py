"""Golden bytes: files written once and kept, read by the present code, and written again from the same values.

A change that the writer and the reader make together passes every round trip; here it is noticed. If a test fails, old
stores and weights no longer read as they did, or new ones are no longer the same: undo the change, or raise
FORMAT_VERSION (shards/manifest.py, transcoder/weights.py), keep reading the old version, and add new golden files.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import Store
from shards.commit import read_commit
from shards.layout import SHARD_ROWS
from shards.manifest import read_manifest
from shards.remote import LocalFiles
from shards.storage import STORAGES, Encoded
from shards.text.contexts import ContextWriter
from shards.verify import verify
from tests.golden.write import (
    COMPRESSORS,
    EXPECTED,
    GOLDEN,
    contents,
    decoded,
    golden_transcoder,
    rows,
    write_store,
)
from transcoder.transcoder import Transcoder
from transcoder.weights import FILE_NAME

TOLERANCE = {"int8": 0.02, "bfloat16": 0.004, "float32": 0.0}
"""Largest error of a value, relative to the largest of its row."""
WRITTEN = json.loads(EXPECTED.read_text())
FILE = GOLDEN / FILE_NAME


def arrays_of(path: Path) -> dict[str, bytes]:
    """The files of a store's arrays, data and metadata; the group's records are compared by value."""
    return {name: (path / name).read_bytes() for name in read_commit(path) if name.count("/") >= 2}


def test_every_storage_has_a_golden_store_and_all_are_small() -> None:
    stores = {path.stem for path in GOLDEN.glob("*.zarr")}
    assert stores == set(STORAGES) == set(WRITTEN["stores"]), (
        "name it in tests/golden/write.py, then run python -m tests.golden.write"
    )
    automatic = {compressor for storage in STORAGES.values() for compressor in storage.compressors}
    assert set(COMPRESSORS.values()) == automatic
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < 130_000


@pytest.mark.parametrize("storage", STORAGES)
def test_a_golden_store_decodes_to_the_committed_values(storage: str) -> None:
    store = Store.open(GOLDEN / f"{storage}.zarr")
    contents_of = decoded(store)
    assert {name: split["shown"] for name, split in contents_of.items()} == {
        name: split["shown"] for name, split in WRITTEN["stores"][storage].items()
    }
    assert contents_of == WRITTEN["stores"][storage]
    context, position = store.train.provenance(0, 1030)
    kept = context.astype(int) * 15 + position - 1
    for values, written in zip(store.train.rows(0, 1030), rows(1030), strict=True):
        tolerance = TOLERANCE[storage] * np.abs(written[kept]).max(axis=1, keepdims=True)
        assert (np.abs(values.numpy() - written[kept]) <= tolerance).all()
    assert len(store.train) == 1030 < SHARD_ROWS
    assert verify(LocalFiles(store.path)) == []


@pytest.mark.parametrize("storage", STORAGES)
def test_the_writer_gives_the_golden_bytes(storage: str, tmp_path: Path) -> None:
    """Contexts are compared from their own tokens: the generator that drew them is numpy's to change."""
    golden = Store.open(GOLDEN / f"{storage}.zarr")
    again = write_store(tmp_path / "again.zarr", storage)
    expected, written = arrays_of(golden.path), arrays_of(again.path)
    assert written.keys() == expected.keys()
    differing = [name for name in expected if written[name] != expected[name] and "/contexts/c/" not in name]
    assert differing == [], "other bytes than the committed ones; has numcodecs' version changed?"
    splits = read_manifest(golden.path).splits
    for name, split in (("train", golden.train), ("heldout", golden.heldout)):
        writer = ContextWriter(tmp_path / "contexts", name, split.contexts.shape[1])
        for context in split.contexts[:]:
            writer.append(context)
        assert writer.finish() == splits[name].contexts_sha256
    for name in [name for name in expected if "/contexts/c/" in name]:
        assert (tmp_path / "contexts" / name).read_bytes() == expected[name]
    assert read_manifest(again.path).splits["train"] == splits["train"].model_copy(
        update={"contexts_sha256": read_manifest(again.path).splits["train"].contexts_sha256}
    )


def test_a_change_that_writer_and_reader_make_together_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 values stored with their sign turned round: they come back as they were, and yet old stores are lost."""
    turned = replace(
        STORAGES["float32"],
        encode=lambda chunk: Encoded(-chunk),
        widen=lambda stored: -stored.astype(np.float32),
    )
    monkeypatch.setitem(STORAGES, "float32", turned)
    golden, expected = GOLDEN / "float32.zarr", WRITTEN["stores"]["float32"]["train"]
    again = write_store(tmp_path / "again.zarr", "float32")
    assert decoded(again)["train"]["shown"]["0"]["inputs"] == expected["shown"]["0"]["inputs"]
    assert decoded(Store.open(golden))["train"]["shown"]["0"]["inputs"] != expected["shown"]["0"]["inputs"]
    assert arrays_of(again.path)["train/inputs/c/0/0"] != arrays_of(golden)["train/inputs/c/0/0"]


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, whose metadata safetensors writes in any order, and its tensors' bytes."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_the_golden_weights_decode_to_the_committed_values() -> None:
    values = contents(Transcoder.load(FILE))
    expected = WRITTEN["transcoder"]
    for exact in ("tensors", "metadata"):
        assert values[exact] == expected[exact]
    for computed in ("activations", "outputs", "outputs_of_prefix_0"):
        assert values[computed] == [pytest.approx(row, abs=1e-6) for row in expected[computed]]


def test_the_weights_are_written_as_the_golden_ones(tmp_path: Path) -> None:
    golden_transcoder().save(tmp_path)
    assert header_and_data(tmp_path / FILE.name) == header_and_data(FILE)
