"""TensorStore and zarrs read the same values as zarr-python and we do."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.fixtures import make_store
from tests.shards.test_store import STORAGES, random_rows


@pytest.mark.parametrize("compressor", ["zstd-3", "blosc-zstd-3-shuffle", "blosc-lz4-5-bitshuffle", "none"])
@pytest.mark.parametrize("storage", STORAGES)
def test_tensorstore_and_zarr_read_the_same_values(storage: str, compressor: str, tmp_path: Path) -> None:
    import tensorstore

    store = make_store(tmp_path / "s.zarr", random_rows(34_000), random_rows(1030), storage, compressor)
    for split, opened in (("train", store.train), ("heldout", store.heldout)):
        for name, reader in opened.readers.items():
            path = store.path / split / name
            expected = np.asarray(zarr.open_array(path, mode="r")[:])
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            assert (tensorstore.open(spec).result().read().result() == expected).all()
            with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
                assert (np.asarray(zarr.open_array(path, mode="r")[:]) == expected).all()
            chunk = reader.array.chunk[0]
            last = reader.array.chunks - 1
            assert (reader.chunk(last)[: len(expected) - last * chunk] == expected[last * chunk :]).all()
