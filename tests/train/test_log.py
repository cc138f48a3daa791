"""metrics.jsonl always; W&B when it works."""

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from common.settings import Settings, Wandb
from train.log import (
    Log,
    artifact_name,
    check,
    evaluation_numbers,
    log_evaluation,
    mode_of,
    project_of,
    where,
)

LINE = {"step": 1, "loss": 0.5, "fvu": None, "l0_norm": 3.0, "dead_features_percentage": 0.0}


class FakeWandb(types.ModuleType):
    """Stands in for wandb: records what it is given, fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.arguments, self.logged, self.summary, self.artifacts = fails, {}, [], {}, []
        self.Settings = dict

    def init(self, **arguments: Any) -> "FakeWandb":
        self.arguments = arguments
        self._may_fail("init")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._may_fail("finish")

    def Artifact(self, name: str, **_: str) -> Any:  # noqa: N802
        return types.SimpleNamespace(name=name, add_file=lambda path: None)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact.name)

    def _may_fail(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError(f"{what} failed")


@pytest.fixture
def logged(
    tmp_path: Path, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[[FakeWandb], list[dict]]:
    def run(fake: FakeWandb, mode: str = "offline") -> list[dict]:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        log = Log(tmp_path / "run", make_settings(wandb__mode=mode), {"a": 1}, rows=0, total=10)
        log.step(5)
        log.metrics(LINE)
        log.metrics(LINE | {"step": 2})
        log.close()
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("fails", ["", "init", "log", "finish"])
def test_a_failing_wandb_stops_nothing(
    fails: str, logged: Callable[..., list[dict]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert [line["step"] for line in logged(FakeWandb(fails))] == [1, 2]
    error = capfd.readouterr().err
    assert ("goes on without it" in error) == bool(fails)
    assert error.count("goes on without it") == bool(fails)


def test_wandb_gets_metrics_config_and_one_id(logged: Callable[..., list[dict]], tmp_path: Path) -> None:
    first, second = FakeWandb(), FakeWandb()
    logged(first)
    logged(second)
    assert [step for step, _ in first.logged] == [1, 2]
    assert first.arguments["config"] == {"a": 1}
    assert first.arguments["mode"] == "offline"
    assert first.arguments["dir"] == str(tmp_path / "run")
    assert first.arguments["id"] == second.arguments["id"]


def test_disabled_means_wandb_is_not_touched(logged: Callable[..., list[dict]]) -> None:
    fake = FakeWandb()
    logged(fake, "disabled")
    assert fake.arguments == {}


@pytest.mark.parametrize(
    ("setting", "around", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "Online"}, "online"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": ""}, "offline"),
        ("auto", {"WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ("auto", {"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, "online"),
        ("offline", {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "offline"),
    ],
)
def test_the_environment_decides_where_settings_ask_nothing(
    setting: str, around: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    assert mode_of(Wandb.model_validate({"mode": setting})) == mode


def test_names_that_wandb_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no")
    with pytest.raises(
        InputError, match="WANDB_MODE: expected online, run, offline, dryrun, disabled, found 'no'"
    ):
        mode_of(Wandb())
    monkeypatch.setenv("WANDB_PROJECT", "a:b")
    assert project_of(Wandb()) == "a:b"
    assert project_of(Wandb(project="mine")) == "mine"
    with pytest.raises(InputError, match=r"wandb\.project: 'a:b' is no name of a project"):
        check(Wandb(mode="offline"))


def test_an_artifact_has_a_name_that_wandb_takes() -> None:
    """Whatever the run is called; what W&B itself says of the names is asked."""
    from wandb import Artifact

    names = [
        "gpt2-layer_0-a-weights",
        "gpt2-layer_0-lr=3e-4-weights",
        "gpt2-layer_0-lr+3e-4-weights",
        "m'y x" + "y" * 200,
    ]
    artifacts = [artifact_name(name) for name in names]
    assert artifacts[0] == names[0]
    assert len(set(artifacts)) == 4
    assert [Artifact(name, type="model").name for name in artifacts] == artifacts
    with pytest.raises(ValueError, match="Invalid name"):
        Artifact(names[1], type="model")


def test_the_weights_of_any_run_are_uploaded(
    tmp_path: Path, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    log = Log(tmp_path, make_settings(run="lr=3e-4", wandb__mode="online"), {}, rows=0, total=1)
    log.artifact([tmp_path / "transcoder.safetensors"])
    log.close()
    assert fake.artifacts == [artifact_name("tiny-layer_0-lr=3e-4-weights")]


def test_evaluation_adds_its_numbers_to_the_run_that_trained(
    logged: Callable[..., list[dict]],
    tmp_path: Path,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = FakeWandb(), FakeWandb()
    logged(first)
    monkeypatch.setitem(sys.modules, "wandb", second)
    prefix = {
        "fvu": 0.5,
        "l0_histogram": [1],
        "over_10_percent_verdict": "good",
        "cross_entropy": {"kl": 0.1},
    }
    metrics = {
        "rows": 7,
        "provenance": {"split": "heldout"},
        "prefixes": [prefix, {"fvu": 0.25, "cross_entropy": None}],
    }
    log_evaluation(tmp_path / "run", make_settings(wandb__mode="offline"), metrics)
    assert second.arguments["id"] == first.arguments["id"]
    assert (
        second.summary
        == evaluation_numbers(metrics)
        == {
            "evaluation/heldout/rows": 7,
            "evaluation/heldout/fvu/prefix_0": 0.5,
            "evaluation/heldout/cross_entropy/kl/prefix_0": 0.1,
            "evaluation/heldout/fvu/prefix_1": 0.25,
        }
    )
    of = {"split": "train", "dataset": "news", "trained_on_this_store": False, "store_fingerprint": "7" * 64}
    assert evaluation_numbers(metrics | {"provenance": of})["evaluation/news-77777777/train/rows"] == 7
    smaller = evaluation_numbers(metrics, (7, 256))
    assert smaller.keys().isdisjoint(evaluation_numbers(metrics))
    assert smaller["evaluation/heldout/7_rows-256_tokens/fvu/prefix_0"] == 0.5


def test_a_resumed_offline_run_is_one_run_of_several_pieces_and_the_line_names_them(
    tmp_path: Path, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With W&B itself, which writes a piece each time; what `wandb sync` would send is asked of it."""
    run_dir = tmp_path / "a run"
    assert where(run_dir) == []
    for _ in range(2):
        log = Log(run_dir, make_settings(wandb__mode="offline"), {"a": 1}, rows=0, total=10)
        log.metrics(LINE)
        log.close()
        time.sleep(1)  # a piece is named after its second
    (line,) = where(run_dir)
    command = line.removeprefix("W&B   ").strip()
    process = subprocess.run(["sh", "-c", f"{command} --dry-run"], capture_output=True, text=True, check=True)
    assert "Would sync 2 run(s)" in process.stdout + process.stderr
    run_id = (run_dir / "wandb" / "id").read_text()
    pieces = sorted(run_dir.glob("wandb/offline-run-*"))
    assert [path.name.rsplit("-", 1)[1] for path in pieces] == [run_id, run_id]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    assert where(run_dir) == []
