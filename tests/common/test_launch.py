"""common.launch: how a stage in several processes is started, and ends."""

import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from common import launch
from common.errors import InputError
from common.layers import driver


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that torchrun was given; it starts nothing."""
    calls: list[list[str]] = []
    monkeypatch.setattr(launch.run, "main", calls.append)
    monkeypatch.setattr(driver, "launch", None)
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    return calls


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    launch.main()


def test_one_layer_and_a_harvest_start_in_all_processes(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["train", "--layer", "3", "--run", "a"], ["harvest", "--layer", "0-2"]):
        called(monkeypatch, "2", *words)
        assert started.pop() == ["--standalone", "--nproc-per-node", "2", "-m", "--", *words]


def test_a_wrong_word_is_told_once_before_anything_starts(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="unknown option --train\\.lrr"):
        called(monkeypatch, "2", "train", "--layer", "3", "--train.lrr", "1")
    assert not started


def test_a_signal_to_torchrun_is_an_interruption(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun has passed it on; it was a traceback and exit code 1."""

    def stopped(_: list[str]) -> None:
        raise SignalException("got signal: 15", sigval=15)  # type: ignore[arg-type]

    monkeypatch.setattr(launch.run, "main", stopped)
    with pytest.raises(KeyboardInterrupt):
        called(monkeypatch, "2", "harvest", "--layer", "3")


def test_layers_are_shared_or_follow_each_other(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its layer and the set's one run; of a single layer, one process works."""
    asked: list[tuple[dict[int, list[str]], int]] = []
    monkeypatch.setattr(
        driver.spread, "each", lambda commands, places: asked.append((commands, places)) or []
    )
    monkeypatch.setattr("train.finish.line_of", lambda _: {})
    monkeypatch.setattr("transcoder.weights.read_metadata", lambda _: {})
    typed = ["--layer", "0 2", "--train.lr", "1e-3"]
    own = ["--run=default-lr0.001", "--spread=rows"]
    called(monkeypatch, "3", "train", *typed)
    assert asked.pop() == (
        {n: ["common.launch", "3", "train", *typed, f"--layer={n}", *own] for n in (0, 2)},
        1,
    )
    layers = [*typed, "--spread", "layers"]
    called(monkeypatch, "3", "train", *layers)
    assert asked.pop() == ({n: ["train", *layers, f"--layer={n}", *own] for n in (0, 2)}, 3)
    called(monkeypatch, "3", "train", "--layer", "1", "--spread", "layers")
    assert [*asked.pop()[0]] == [1]
    assert not started
    # Without a layer: it was done with none, exit code 0.
    called(monkeypatch, "3", "train", "--spread", "layers")
    assert len(started) == 1
    assert not asked
