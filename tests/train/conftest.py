"""Shapes and types of train's signatures are checked while its tests run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("train", "beartype.beartype")

from common.settings import Settings  # noqa: E402
from shards import Store  # noqa: E402
from tests.fixtures import make_store  # noqa: E402
from tests.train.runs import sparse_rows, tiny_settings  # noqa: E402
from train.loop import train  # noqa: E402


@pytest.fixture(scope="session")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of activations that holds tiny/layer_0.zarr: 4,096 train and 1,024 held-out rows."""
    root = tmp_path_factory.mktemp("activations")
    make_store(root / "tiny" / "layer_0.zarr", sparse_rows(4096, 2), sparse_rows(1024, 3))
    return root


@pytest.fixture(scope="session")
def store(store_root: Path) -> Store:
    return Store.open(store_root / "tiny" / "layer_0.zarr")


@pytest.fixture
def make_settings(store_root: Path, tmp_path: Path) -> Callable[..., Settings]:
    """`tiny_settings` with this test's own checkpoints."""
    return partial(tiny_settings, store_root, tmp_path / "checkpoints")


@pytest.fixture(scope="session")
def finished(store: Store, store_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the uninterrupted run of `tiny_settings`."""
    settings = tiny_settings(store_root, tmp_path_factory.mktemp("finished"))
    train(settings, store)
    return settings.run_dir()
