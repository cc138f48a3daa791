"""Where a run's numbers go: metrics.jsonl, the progress bar, Weights & Biases."""

import hashlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from tqdm.auto import tqdm

from common.errors import InputError
from common.files import write_whole
from common.numbers import number_or_dash
from common.progress import progress
from common.settings import Settings, Wandb, first_mistake

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""WANDB_MODE, with its older words -> wandb.mode."""
PROJECT = "matryoshka-transcoder"
ARTIFACT_NAME = 128
"""Longest name that W&B takes."""

LogLine = dict[str, float | None]
"""The values of a line of metrics.jsonl."""
LINE = TypeAdapter(LogLine)


def log_lines(file: Path) -> list[tuple[str, LogLine]]:
    """The lines of metrics.jsonl, each as written and its values; none if there is no file.

    A last line that a kill cut short is left out. Raises `InputError` naming any other line that is damaged.
    """
    texts = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    lines: list[tuple[str, LogLine]] = []
    for number, text in enumerate(texts, 1):
        try:
            values = LINE.validate_python(json.loads(text))
            if values.get("step") is None:
                raise ValueError("no step")
            lines.append((text, values))
        except ValueError as error:
            if text.endswith("\n"):
                why = first_mistake(error) if isinstance(error, ValidationError) else error
                raise InputError(f"{file}: line {number} is damaged ({why}); remove that line") from error
    return lines


def mode_of(wandb: Wandb) -> Mode:
    """online, offline or disabled: what settings ask for, else what WANDB_DISABLED or WANDB_MODE do, else offline.

    Raises `InputError` for a WANDB_MODE that W&B does not have.
    """
    if wandb.mode != "auto":
        return wandb.mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on", "y", "t"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "").strip().lower() or "offline"
    if mode not in MODES:
        raise InputError(
            f"WANDB_MODE: expected {', '.join(MODES)}, found {mode!r}; unset it, or give --wandb.mode"
        )
    return MODES[mode]


def project_of(wandb: Wandb) -> str:
    """The project of the settings, else WANDB_PROJECT, else ours."""
    return wandb.project or os.environ.get("WANDB_PROJECT", "").strip() or PROJECT


def check(wandb: Wandb) -> None:
    """Raise `InputError` when W&B is asked for and its package is not installed, or it would refuse the project."""
    mode = mode_of(wandb)
    if mode == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb.mode: {mode} requested, but the package wandb is not installed; "
            "run make install, or give --wandb.mode disabled"
        )
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", project := project_of(wandb)):
        raise InputError(
            f"wandb.project: {project!r} is no name of a project; W&B takes up to 128 characters without / \\ # ? % :"
        )


class Log:
    """One run's log. Only metrics.jsonl must succeed; a failing W&B is reported once and left alone."""

    def __init__(
        self, run_dir: Path, settings: Settings, config: Mapping[str, Any], *, rows: int, total: int
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = progress(settings.run, total, "rows", initial=rows)
        self._wandb = WandbRun(run_dir, settings, config)

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
            f"loss {values['loss']:.4f} FVU {number_or_dash(values['fvu'], '.4f')} L0 {values['l0_norm']:.1f} "
            f"dead {values['dead_features_percentage']:.1f}%",
            refresh=False,
        )
        self._wandb.send(lambda run: run.log(dict(values), step=values["step"]))

    def artifact(self, files: Sequence[Path]) -> None:
        """Keep the finished weights with the W&B run."""
        self._wandb.artifact(files)

    def close(self) -> None:
        """End the bar, the file and the W&B run."""
        self._bar.close()
        self._file.close()
        self._wandb.close()


class WandbRun:
    """A W&B run that goes on wherever this project's run does; nothing where W&B is disabled or has failed."""

    def __init__(self, run_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self._name = f"{settings.model_slug}-layer_{settings.layer}-{settings.run}"
        self._mode = mode_of(settings.wandb)
        self._run = _start(run_dir, self._name, self._mode, project_of(settings.wandb), config)

    def send(self, what: Any) -> None:
        """Call `what` with W&B's run, if there is one."""
        if self._run is None:
            return
        try:
            what(self._run)
        except Exception as error:  # a service of others must not end hours of training
            self._run = None
            tqdm.write(f"W&B failed, the work goes on without it: {error}", file=sys.stderr)

    def artifact(self, files: Sequence[Path]) -> None:
        """Upload the files of the weights, where W&B is online."""

        def upload(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(artifact_name(f"{self._name}-weights"), type="model")
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)

        if self._mode == "online":
            self.send(upload)

    def close(self) -> None:
        """End the run."""
        self.send(lambda run: run.finish())


def artifact_name(name: str) -> str:
    """`name` where W&B takes it; else with _ for what it refuses, and a digest that keeps two names apart."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if plain == name and len(name) <= ARTIFACT_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: ARTIFACT_NAME - 9]}-{digest}"


def _start(run_dir: Path, name: str, mode: Mode, project: str, config: Mapping[str, Any]) -> Any:
    """W&B's run, below the run directory where WANDB_DIR says nothing else, or None; never asks for a key."""
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        run = wandb.init(
            project=project,
            name=name[:ARTIFACT_NAME],
            group=os.environ.get("WANDB_RUN_GROUP") or None,  # a sweep's, or the user's own
            id=_wandb_id(run_dir),
            resume="allow",
            mode=mode,
            dir=str(_directory(run_dir)),
            reinit="create_new",  # a sweep logs several runs from one process
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", login_timeout=10, init_timeout=60),
        )
        if url := getattr(run, "url", None):  # none offline; W&B itself is silent
            tqdm.write(f"W&B   {url}", file=sys.stderr)
        return run
    except Exception as error:  # no key, no network, no disk: the run goes on
        what = " ".join(str(error).split())  # a setting that W&B refuses takes several lines
        tqdm.write(f"W&B did not start, the work goes on without it: {what:.400}", file=sys.stderr)
        return None


def _directory(run_dir: Path) -> Path:
    return Path(os.environ.get("WANDB_DIR") or run_dir)


def _wandb_id(run_dir: Path) -> str:
    """The same id whenever this run goes on, so that W&B shows one run and not its pieces."""
    file = run_dir / "wandb" / "id"
    if not file.exists() or not file.read_text(encoding="utf-8").strip():
        write_whole(file, secrets.token_hex(6).encode())
    return file.read_text(encoding="utf-8")


def log_evaluation(
    run_dir: Path, settings: Settings, metrics: Mapping[str, Any], size: tuple[int, int] | None = None
) -> None:
    """Give an evaluation's numbers to the W&B run of the training, as evaluation/<split>/... of its summary.

    `size`: see `evaluation_numbers`.
    """
    wandb_run = WandbRun(run_dir, settings, {})
    wandb_run.send(lambda run: run.summary.update(evaluation_numbers(metrics, size)))
    wandb_run.close()


def evaluation_numbers(
    metrics: Mapping[str, Any], size: tuple[int, int] | None = None
) -> dict[str, int | float]:
    """Every number of every prefix, by a flat name; of another harvest or a checkpoint under its own, so that all stay.

    `size`: rows, and tokens of the cross-entropy, of an evaluation beside a larger one of the same rows' store: these
    are in its name too.
    """
    of = metrics["provenance"]
    split = of["split"]
    if of.get("trained_on_this_store") is False:
        split = f"{of['dataset']}-{of['store_fingerprint'][:8]}/{split}"
    if at := of.get("checkpoint"):
        split += f"/at_step_{at['step']}"
    if size is not None:
        split += f"/{size[0]}_rows-{size[1]}_tokens"
    scalars: dict[str, int | float] = {f"evaluation/{split}/rows": metrics["rows"]}
    for g, prefix in enumerate(metrics["prefixes"]):
        language = prefix.get("cross_entropy") or {}
        numbers = prefix | {f"cross_entropy/{key}": value for key, value in language.items()}
        scalars |= {
            f"evaluation/{split}/{key}/prefix_{g}": value
            for key, value in numbers.items()
            if isinstance(value, int | float)
        }
    return scalars


def where(*run_dirs: Path) -> list[str]:
    """For each of these runs that has an offline log, the line that says where it is, and how W&B gets it.

    A run that was interrupted has a piece for each time it went on, all of one id, and `wandb sync` sends them as
    one run, in the order in which they began.
    """
    python, lines = Path(sys.executable), []
    with suppress(ValueError):
        python = python.relative_to(Path.cwd())
    for run_dir in run_dirs:
        file = run_dir / "wandb" / "id"
        if not file.exists():
            continue
        pieces, pattern = _directory(run_dir) / "wandb", f"offline-run-*-{file.read_text(encoding='utf-8')}"
        if next(pieces.glob(pattern), None):
            path = f"{shlex.quote(str(pieces))}/{pattern}"
            lines.append(f"W&B   {shlex.quote(str(python))} -m wandb sync {path}")
    return lines
