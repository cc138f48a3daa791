"""metrics.jsonl always; W&B when it works."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.settings import Settings
from train.log import Log

LINE = {"step": 1, "loss": 0.5, "fvu": None, "l0_norm": 3.0, "dead_features_percentage": 0.0}


class FakeWandb(types.ModuleType):
    """Stands in for wandb: records what it is given, fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.given, self.logged = fails, {}, []
        self.Settings = dict

    def init(self, **given: Any) -> "FakeWandb":
        self.given = given
        self._may_fail("init")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._may_fail("finish")

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
    assert first.given["config"] == {"a": 1}
    assert first.given["mode"] == "offline"
    assert first.given["dir"] == str(tmp_path / "run")
    assert first.given["id"] == second.given["id"]


def test_disabled_means_wandb_is_not_touched(logged: Callable[..., list[dict]]) -> None:
    fake = FakeWandb()
    logged(fake, "disabled")
    assert fake.given == {}
