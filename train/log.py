"""Where a run's numbers go: metrics.jsonl, the progress bar, Weights & Biases."""

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common.errors import InputError
from common.progress import progress
from common.settings import Settings, Wandb


def check(wandb: Wandb) -> None:
    """Raise `InputError` when W&B is asked for and its package is not installed."""
    if wandb.mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb.mode: {wandb.mode} asked for, but the package wandb is not installed; "
            "run make install, or give --wandb.mode disabled"
        )


class Log:
    """One run's log. Only metrics.jsonl must succeed; a failing W&B is reported once and left alone."""

    def __init__(
        self, run_dir: Path, settings: Settings, config: Mapping[str, Any], *, rows: int, total: int
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = progress(settings.run, total, "rows", done=rows)
        self._name = f"{settings.model_slug}-layer_{settings.layer}-{settings.run}"
        self._online = settings.wandb.mode == "online"
        self._wandb = _start_wandb(run_dir, self._name, settings, config)

    def step(self, rows: int) -> None:
        """Move the bar on by the rows of a step."""
        self._bar.update(rows)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Log the values of a step; raises `OSError` naming metrics.jsonl when it cannot be written."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self._file.close()  # it would try to write the rest again, and fail again
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f} FVU {_text(values['fvu'])} L0 {values['l0_norm']:.1f} "
            f"dead {values['dead_features_percentage']:.1f}%",
            refresh=False,
        )
        self._to_wandb(lambda run: run.log(dict(values), step=values["step"]))

    def artifact(self, file: Path) -> None:
        """Keep the finished weights with the W&B run."""

        def upload(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{self._name}-weights", type="model")
            artifact.add_file(str(file))
            run.log_artifact(artifact)

        if self._online:
            self._to_wandb(upload)

    def close(self) -> None:
        """End the bar, the file and the W&B run."""
        self._bar.close()
        self._file.close()
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, send: Any) -> None:
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # a service of others must not end hours of training
            self._wandb = None
            tqdm.write(f"W&B failed, training goes on without it: {error}", file=sys.stderr)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _start_wandb(run_dir: Path, name: str, settings: Settings, config: Mapping[str, Any]) -> Any:
    """A W&B run below the run directory, or None; never asks for a key."""
    if settings.wandb.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        return wandb.init(
            project=settings.wandb.project,
            name=name,
            id=_wandb_id(run_dir),
            resume="allow",
            mode=settings.wandb.mode,
            dir=str(run_dir),
            reinit="create_new",  # a sweep logs several runs from one process
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", login_timeout=10, init_timeout=60),
        )
    except Exception as error:  # no key, no network, no disk: the run goes on
        tqdm.write(f"W&B did not start, training goes on without it: {error}", file=sys.stderr)
        return None


def _wandb_id(run_dir: Path) -> str:
    """The same id whenever this run goes on, so that W&B shows one run and not its pieces."""
    file = run_dir / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(6), encoding="utf-8")
    return file.read_text(encoding="utf-8")
