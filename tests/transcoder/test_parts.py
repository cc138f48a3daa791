"""A transcoder in several files, written by rows by several processes, read whole and by slice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import sha256
from common.settings import ROOT
from tests.transcoder.test_transcoder import tiny_transcoder
from transcoder import Transcoder, tensor_files, weights

FIRST, SECOND = "transcoder-00001-of-00002.safetensors", "transcoder-00002-of-00002.safetensors"
INDEX = "transcoder.safetensors.index.json"
ALL = sorted([FIRST, SECOND, INDEX, "transcoder.safetensors"])


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most 360 bytes of tensors: W_enc (220) and W_dec (132) are large, the others are not."""
    monkeypatch.setattr(weights, "MAX_FILE", 360)
    monkeypatch.setattr(weights, "LARGE", 3)


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
    view = {"W": torch.randn(7, 50).T}
    tensor_files.save(tmp_path / "ours.safetensors", view)
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["W"], view["W"])


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
