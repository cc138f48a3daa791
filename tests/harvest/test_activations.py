"""What a window holds of a forward pass: 16 bits where that loses nothing, and a layer that fails alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from common.settings import Settings
from harvest import activations, windows
from harvest.activations import _factors
from harvest.run import harvest
from harvest.windows import Room
from shards import Store
from shards.commit import read_commit
from shards.encode import Column

Make = Callable[..., Settings]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_normalised_row_is_16_bits_times_one_number(dtype: torch.dtype) -> None:
    before = (torch.randn(500, 96, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    before[7] = 0
    wide = before.float()
    factor = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)
    found = _factors(before, wide * factor)
    assert found is not None
    assert torch.equal(wide * found[:, None], wide * factor)
    centred = wide - wide.mean(1, keepdim=True)
    assert _factors(before, centred * factor) is None  # a LayerNorm's


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_are_those_of_float32_windows(
    family: str, dtype: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.models import save_model

    model = save_model(tmp_path / family, family, dtype=getattr(torch, dtype))
    options = ("--model.dtype", dtype, "--harvest.storage", "float32")
    held: list[str] = []
    put = Column.put

    def noted(self: Column, *args: object) -> None:
        put(self, *args)  # type: ignore[arg-type]
        held.append(str(args[1].dtype))  # type: ignore[union-attr]

    with monkeypatch.context() as patch:
        patch.setattr(Column, "put", noted)
        (path,) = harvest(settings_for(model, *options))
    short = "uint16" if dtype == "bfloat16" else "float16"
    assert set(held) == ({short} if family == "llama" else {short, "float32"})
    monkeypatch.setattr(activations, "_numpy", lambda rows: rows.float().numpy())
    monkeypatch.setattr(activations, "_factors", lambda before, rows: None)
    (wide,) = harvest(settings_for(model, *options, "--paths.activations", str(tmp_path / "wide")))
    assert read_commit(path) == read_commit(wide)


def test_a_layer_that_fails_does_not_stop_the_others(llama: Path, settings_for: Make, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "tiny-llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = settings_for(model, layer="0 1 2")
    with pytest.raises(
        InputError, match=r"^layer 2, blocks.2.hook_mlp_out: NaN .*; layer 2 failed, the others are"
    ):
        harvest(settings)
    for layer in (0, 1):
        assert len(Store.open(settings.store_path(layer)).train) == 2000
    with pytest.raises(InputError, match="unfinished"):
        Store.open(settings.store_path(2))


@pytest.mark.usefixtures("small_windows")
def test_both_windows_together_take_an_eighth_more_than_one(
    llama: Path, settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in memory, of all layers and both sides, never exceed what was allowed, and all come back."""
    least: list[int] = []
    rooms: list[Room] = []

    class Noted(Room):
        def __init__(self, rows: int) -> None:
            super().__init__(rows)
            rooms.append(self)

        def take(self, rows: int) -> None:
            super().take(rows)
            least.append(self._left)

    monkeypatch.setattr(windows, "SHARD_ROWS", 512)
    monkeypatch.setattr(windows, "Room", Noted)
    harvest(settings_for(llama, layer="0 1", rows=2000))
    assert len(least) > 4
    assert min(least) >= 0
    assert rooms[0]._left == int(2 * 2 * 512 * 1.125)
