"""A harvest whose rows are quantised on the model's device: the host's bytes, and the model's thread does not wait.

The model itself runs on the CPU here; what its hooks give is put on the fake device.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from common.settings import Settings
from harvest import windows
from harvest.activations import Intake
from harvest.lm import LanguageModel
from harvest.run import harvest
from shards import Store
from shards.commit import read_commit
from shards.device.column import device_bytes
from tests.models import save_model
from tests.pretend import DEVICE, pretend_device
from tests.shards.device.late import LateCopies

Make = Callable[..., Settings]
pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """While open, models give tensors of the fake device, which has room for 1 GB; yields its counts."""
    take, decide = Intake.take, windows.on_the_device

    def takes(self: Intake, name: str, tensor: torch.Tensor) -> None:
        take(self, name, tensor.to(DEVICE, non_blocking=True))

    def decides(model: LanguageModel, *rest: Any) -> Any:
        there: Any = SimpleNamespace(device=DEVICE, dtype=model.dtype)
        return decide(there, *rest)

    @contextmanager
    def opened() -> Iterator[Any]:
        with monkeypatch.context() as patch, pretend_device() as counts:
            patch.setattr(Intake, "take", takes)
            patch.setattr(windows, "on_the_device", decides)
            yield counts

    monkeypatch.setattr(windows, "free", lambda device: 10**9)
    return opened


def arrays_of(path: Path) -> dict[str, str]:
    """Digests of everything but the manifest, whose float64 sums are added in another order."""
    return {name: digest for name, digest in read_commit(path).items() if name != "zarr.json"}


@pytest.mark.parametrize(
    ("family", "dtype", "layer"),
    [("llama", "float32", "0 1"), ("gemma2", "bfloat16", "1"), ("gpt2", "float16", "2")],
)
def test_the_bytes_are_those_of_the_host(
    family: str,
    dtype: str,
    layer: str,
    settings_for: Make,
    tmp_path: Path,
    on_device: Callable[[], AbstractContextManager[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four windows of train and one of held-out rows, also with copies as late as they may be."""
    model = save_model(tmp_path / family, family, dtype=getattr(torch, dtype))
    settings = settings_for(model, "--model.dtype", dtype, layer=layer)
    here = harvest(settings)
    for name in ("there", "late"):
        again = settings.model_copy(
            update={"paths": settings.paths.model_copy(update={"activations": str(tmp_path / name)})}
        )
        if name == "late":
            monkeypatch.setattr(windows, "Copies", LateCopies)
        with on_device() as counts:
            there = harvest(again)
            assert counts["index_copy_"] > 0
            assert counts["waits"] == 0
        for ours, theirs in zip(there, here, strict=True):
            assert arrays_of(ours) == arrays_of(theirs)
            for split, expected in Store.open(theirs).manifest.splits.items():
                found = Store.open(ours).manifest.splits[split]
                for side in ("inputs", "outputs"):
                    one, other = getattr(found, side), getattr(expected, side)
                    assert one.mean == pytest.approx(other.mean, rel=1e-9, abs=1e-12)
                    assert one.second_moment == pytest.approx(other.second_moment, rel=1e-9)
                    assert one.quantisation_fvu == pytest.approx(other.quantisation_fvu, rel=1e-9)


def test_int8_and_scales_are_what_comes_to_the_host(
    llama: Path, settings_for: Make, on_device: Callable[[], AbstractContextManager[Any]]
) -> None:
    with on_device() as counts:
        (path,) = harvest(settings_for(llama))
    store = Store.open(path)
    width, rows = store.train.d_in + store.train.d_out, len(store.train) + len(store.heldout)
    chunks = store.train.readers["input_scales"].array.shape[0]
    chunks += store.heldout.readers["input_scales"].array.shape[0]
    values, scales = rows * width, 2 * 4 * rows + 2 * 4 * chunks * width
    sums = 3 * 8 * chunks * width + 2 * rows
    assert counts["bytes to host"] == values + scales + sums


def test_layers_that_do_not_fit_are_quantised_on_the_host_and_named(
    llama: Path,
    settings_for: Make,
    tmp_path: Path,
    on_device: Callable[[], AbstractContextManager[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_for(llama, layer="0 1 2")
    here = harvest(settings)
    again = settings_for(llama, "--paths.activations", str(tmp_path / "there"), layer="0 1 2")
    monkeypatch.setattr(windows, "free", lambda device: 2 * (2 * 2 * device_bytes(32, 4)) + 1)
    assert "quantised on the CPU" not in capsys.readouterr().err
    with on_device():
        there = harvest(again)
    assert re.search(
        r"harvest: layer 2: quantised on the CPU, as windows of 3 layers do not fit into half of the GPU's free "
        r"memory \([\d.,]+ [kMG]B\)",
        capsys.readouterr().err,
    )
    assert [arrays_of(path) for path in there] == [arrays_of(path) for path in here]


def test_what_is_not_finite_is_told_as_on_the_host(
    llama: Path, settings_for: Make, tmp_path: Path, on_device: Callable[[], AbstractContextManager[Any]]
) -> None:
    """The first position of all; the other layers are harvested."""
    model = shutil.copytree(llama, tmp_path / "tiny-llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    said = []
    for place, where in (("here", nullcontext), ("there", on_device)):
        settings = settings_for(model, "--paths.activations", str(tmp_path / place), layer="1 2")
        with (
            where(),
            pytest.raises(InputError, match="NaN or infinity in context 0 position 1 ") as stopped,
        ):
            harvest(settings)
        said.append(str(stopped.value).replace(f"/{place}/", "/"))
        assert len(Store.open(settings.store_path(1)).train) == 2000
        with pytest.raises(InputError, match="unfinished"):
            Store.open(settings.store_path(2))
    assert said[0] == said[1]


def test_other_formats_go_through_the_host(
    llama: Path, settings_for: Make, tmp_path: Path, on_device: Callable[[], AbstractContextManager[Any]]
) -> None:
    (here,) = harvest(settings_for(llama, "--harvest.storage", "bfloat16"))
    again = settings_for(
        llama, "--harvest.storage", "bfloat16", "--paths.activations", str(tmp_path / "there")
    )
    with on_device() as counts:
        (there,) = harvest(again)
    assert counts["index_copy_"] == 0
    assert read_commit(there) == read_commit(here)
