"""One training step, one run, and the loop over a store's batches.

Shapes: B rows, D_in, D_out, F latents, G prefixes.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import InputError, Settings
from pipeline import Train as TrainSettings
from shards import Batch, Store
from train import checkpoint, record
from train.dense import DenseStep
from train.gradients import Gradients
from train.log import Log
from train.losses import Objective, StepValues
from train.measure import (
    CALIBRATION_ROWS,
    MEASURED_ROWS,
    PROBE_ROWS,
    Measured,
    calibrate,
    measure,
    training_cut,
)
from train.optimizer import apply
from train.schedule import learning_rate
from train.sparse import SparseStep
from train.state import THRESHOLD_AVERAGE, State
from train.transcoder import Parameters, Transcoder, initialise

Step = Callable[[Parameters, Tensor, Tensor, Tensor], tuple[StepValues, Gradients]]

DENSE_SHARE = 1 / 8
"""Share of active latents above which the dense step is the faster one."""


@dataclass(frozen=True)
class Recipe:
    """What stays the same over a run: settings, and what the store's moments make of them."""

    objective: Objective
    train: TrainSettings
    scale_in: float
    scale_out: float
    variance: float
    """Sum over dimensions of the outputs' variance, in normalised space."""

    @classmethod
    def of(cls, settings: Settings, store: Store) -> "Recipe":
        source, moments = store.manifest.source, store.manifest.splits["train"]
        if moments.inputs is None or moments.outputs is None or len(store.train) < settings.train.batch_size:
            raise InputError(
                f"{store.path}: has {len(store.train)} train rows, expected at least one batch of "
                f"{settings.train.batch_size}; lower train.batch_size or harvest more rows"
            )
        _, groups = settings.transcoder.resolve(source.d_in)
        objective = Objective(
            prefix_ends=tuple(accumulate(groups)),
            prefix_weights=(1 / len(groups),) * len(groups),
            k=settings.transcoder.k,
            selection=settings.transcoder.selection,
            aux_k=settings.train.aux_k,
            aux_coefficient=settings.train.aux_coefficient,
            precision=settings.train.precision,
        )
        variance = float(moments.outputs.variance.sum()) / moments.outputs.scale**2
        return cls(objective, settings.train, moments.inputs.scale, moments.outputs.scale, variance)

    @property
    def steps(self) -> int:
        return self.train.rows // self.train.batch_size

    @property
    def counting_from(self) -> int:
        """First step of the last tenth, over which kept activations are counted."""
        return self.steps - max(1, self.steps // 10)

    def learning_rate(self, step: int) -> float:
        train = self.train
        return learning_rate(
            step,
            self.steps,
            peak=train.lr,
            final=train.min_lr,
            warmup=min(train.warmup_steps, self.steps // 2),
        )


class NonFiniteLossError(ArithmeticError):
    """The loss is infinite or not a number; the state has not been changed."""

    def __init__(self, prefix: int | None) -> None:
        self.prefix = prefix
        super().__init__("auxiliary loss" if prefix is None else f"prefix {prefix}")


def step_for(objective: Objective) -> Step:
    """The one place that decides between the dense and the sparse step; both give the same gradients."""
    dense = objective.k > DENSE_SHARE * objective.d_sae
    return DenseStep(objective) if dense else SparseStep(objective)


@torch.no_grad()
def train_step(state: State, step: Step, recipe: Recipe, inputs: Tensor, outputs: Tensor) -> StepValues:
    """One optimizer step on raw inputs [B, D_in] and outputs [B, D_out]; changes `state` in place."""
    x, y = inputs / recipe.scale_in, outputs / recipe.scale_out
    values, gradients = step(state.parameters, x, y, state.dead(recipe.train.dead_after_rows))
    if not torch.isfinite(values.loss):
        bad = (~torch.isfinite(values.squared_errors)).nonzero()
        raise NonFiniteLossError(int(bad[0]) if len(bad) else None)
    apply(state.adam, gradients, recipe.learning_rate(state.step), recipe.train.clip_norm)

    cut, rows = values.cut.item(), len(x)
    state.threshold = (
        cut if state.threshold is None else state.threshold + THRESHOLD_AVERAGE * (cut - state.threshold)
    )
    if state.step == recipe.counting_from:
        state.kept.zero_()
        state.kept_rows = 0
    if state.step >= recipe.counting_from:
        state.kept += kept_below(values.entries.latents, recipe.objective.prefix_ends)
        state.kept_rows += rows
    state.step += 1
    state.rows += rows
    state.last_fired.index_fill_(0, values.entries.latents, state.rows)
    return values


def kept_below(latents: Tensor, prefix_ends: tuple[int, ...]) -> Tensor:
    """[G] float64: how many of `latents` lie below each prefix end."""
    return torch.tensor([float((latents < end).sum()) for end in prefix_ends], dtype=torch.float64)


class Run:
    """One run being trained: its directory, state, step, log."""

    def __init__(self, settings: Settings, store: Store, device: str) -> None:
        self.settings, self.store = settings, store
        self.dir = settings.run_dir()
        source = store.manifest.source
        self.recipe = Recipe.of(settings, store)
        record.claim(self.dir, settings, source.d_in, store.manifest.fingerprint)
        self.step = step_for(self.recipe.objective)
        self.state = State.start(
            _initial(settings, self.recipe, store, device), len(self.recipe.objective.prefix_ends)
        )
        checkpoint.restore(self.dir, self.state)
        checkpoint.cut_metrics(self.dir, self.state.step)
        self._probe = [rows.to(device) for rows in store.heldout.rows(0, min(PROBE_ROWS, len(store.heldout)))]
        config = settings.model_dump(mode="json") | {"harvest_fingerprint": store.manifest.fingerprint}
        total = self.recipe.steps * settings.train.batch_size
        self.log = Log(self.dir, settings, config, rows=self.state.rows, total=total)
        self._clock, self._waited, self._logged_rows = time.perf_counter(), 0.0, self.state.rows

    @property
    def done(self) -> bool:
        return self.state.step >= self.recipe.steps

    def feed(self, batch: Batch, batches_per_epoch: int, waited: float) -> None:
        """Train on one batch; log and checkpoint when their step has come."""
        state, train = self.state, self.settings.train
        dead = len(state.dead(train.dead_after_rows))
        try:
            values = train_step(state, self.step, self.recipe, batch.inputs, batch.outputs)
        except NonFiniteLossError as error:
            chunk = int(batch.rows[0]) // self.store.manifest.source.chunk_rows
            raise InputError(
                f"{self.dir}: loss is not finite at step {state.step + 1} ({error}; rows from chunk {chunk} of "
                "train); lower train.lr, or check the store with make verify"
            ) from error
        over = batch.index + 1 == batches_per_epoch
        state.epoch, state.batch = (batch.epoch + 1, 0) if over else (batch.epoch, batch.index + 1)
        self._waited += waited
        self.log.step(len(batch.rows))
        probes = state.step % train.heldout_every == 0
        if state.step % train.log_every == 0 or probes or self.done:
            self.log.metrics(
                self._metrics(values, dead, batch.epoch) | (self._probed() if probes or self.done else {})
            )
        if state.step % train.checkpoint_every == 0 or self.done:
            checkpoint.save(self.dir, state)

    def _metrics(self, values: StepValues, dead: int, epoch: int) -> dict[str, Any]:
        state, recipe = self.state, self.recipe
        rows = recipe.train.batch_size
        variation = rows * recipe.variance
        fvu = [error / variation if variation else None for error in values.squared_errors.tolist()]
        now = time.perf_counter()
        speed = (state.rows - self._logged_rows) / (now - self._clock)
        waited, self._waited, self._clock, self._logged_rows = self._waited, 0.0, now, state.rows
        return {
            "step": state.step,
            "rows": state.rows,
            "epoch": epoch,
            "loss": values.loss.item(),
            "l2_loss": values.l2_loss.item(),
            "aux_loss": values.aux_loss.item(),
            "l0_norm": len(values.entries.rows) / rows,
            "fvu": fvu[-1],
            **{f"fvu/prefix_{g}": value for g, value in enumerate(fvu)},
            "dead_features_percentage": 100 * dead / recipe.objective.d_sae,
            "learning_rate": recipe.learning_rate(state.step - 1),
            "threshold": (state.threshold or 0.0) * recipe.scale_out,
            "rows_per_second": round(speed, 1),
            "data_wait_seconds": round(waited, 4),
        }

    @torch.no_grad()
    def _probed(self) -> dict[str, float | None]:
        objective = self.recipe.objective
        pairs = zip(*(rows.split(self.settings.train.batch_size) for rows in self._probe), strict=True)
        cuts = training_cut(objective.k, objective.selection, len(objective.prefix_ends))
        found = measure(self.transcoder(), pairs, cuts)
        return {f"heldout_fvu/prefix_{g}": fvu for g, fvu in enumerate(found.fvu)}

    def transcoder(self) -> Transcoder:
        """The present state on raw activations, thresholds not yet calibrated."""
        ends = self.recipe.objective.prefix_ends
        folded = self.state.parameters.folded(self.recipe.scale_in, self.recipe.scale_out)
        return Transcoder(folded, torch.zeros(len(ends)), ends)

    @torch.no_grad()
    def finish(self) -> tuple[Transcoder, Measured]:
        """Calibrate, measure on held-out rows, write transcoder.safetensors."""
        state, train, device = self.state, self.settings.train, self.state.last_fired.device
        raw = self.transcoder()
        kept_per_row = (state.kept / state.kept_rows).tolist()

        def inputs() -> Iterator[Tensor]:
            rows = 0
            with self.store.train.loader(
                train.batch_size, train.order_seed, epochs=1, device=str(device)
            ) as loader:
                for x, _ in loader:
                    yield x[: CALIBRATION_ROWS - rows]
                    rows += len(x)
                    if rows >= CALIBRATION_ROWS:
                        return

        thresholds = calibrate(raw, inputs, kept_per_row)
        found = measure(raw, _split_rows(self.store, device), lambda _: thresholds)
        transcoder = Transcoder(
            raw.parameters, thresholds, raw.prefix_ends, self._metadata(kept_per_row, found)
        )
        transcoder.save(self.dir)
        self.log.artifact(
            self.dir / "transcoder.safetensors", f"{self.settings.model_slug}-layer_{self.settings.layer}"
        )
        self.log.close()
        return transcoder, found

    def _metadata(self, kept_per_row: list[float], found: Measured) -> dict[str, Any]:
        manifest = self.store.manifest
        return {
            "settings": self.settings.model_dump(mode="json"),
            "harvest_fingerprint": manifest.fingerprint,
            "source": manifest.source.model_dump(mode="json"),
            "scales": {"input": self.recipe.scale_in, "output": self.recipe.scale_out},
            "training": {"rows": self.state.rows, "steps": self.state.step, "l0": kept_per_row},
            "heldout": {"rows": found.rows, "fvu": found.fvu, "l0": found.l0, "dead": found.dead},
            "versions": record.versions(),
            "git_commit": record.git_commit(),
        }


def _initial(settings: Settings, recipe: Recipe, store: Store, device: str) -> Parameters:
    """Parameters before the first step, in normalised space: fresh, or another run's."""
    source, objective, skip = store.manifest.source, recipe.objective, settings.transcoder.skip
    if settings.train.init_from is None:
        outputs = store.manifest.splits["train"].outputs
        assert outputs is not None  # Recipe.of refuses an empty split
        mean = torch.tensor(outputs.mean, dtype=torch.float64) / recipe.scale_out
        fresh = initialise(source.d_in, objective.d_sae, mean, skip=skip, seed=settings.train.seed)
        return fresh.map(lambda tensor: tensor.to(device))
    other = Transcoder.load(Path(settings.train.init_from))
    expected = {
        "d_in": source.d_in,
        "d_out": source.d_out,
        "prefix_ends": objective.prefix_ends,
        "skip": skip,
    }
    found = {
        "d_in": other.d_in,
        "d_out": other.d_out,
        "prefix_ends": other.prefix_ends,
        "skip": other.W_skip is not None,
    }
    wrong = [
        f"{key} expected {expected[key]}, found {found[key]}"
        for key in expected
        if expected[key] != found[key]
    ]
    if wrong:
        raise InputError(f"train.init_from: {settings.train.init_from}: {'; '.join(wrong)}")
    unfolded = other.parameters.unfolded(recipe.scale_in, recipe.scale_out)
    return unfolded.map(lambda tensor: tensor.to(device))


def _split_rows(store: Store, device: torch.device, block: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
    n = min(MEASURED_ROWS, len(store.heldout))
    for start in range(0, n, block):
        inputs, outputs = store.heldout.rows(start, min(start + block, n))
        yield inputs.to(device), outputs.to(device)


def device_of(settings: Settings) -> str:
    asked = settings.model.device
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def train(settings: Settings, store: Store) -> tuple[Transcoder, Measured]:
    """Train one run to its end, from wherever it stands."""
    run = Run(settings, store, device_of(settings))
    return train_together([run])[0]


def train_together(runs: list[Run]) -> list[tuple[Transcoder, Measured]]:
    """Give each batch of the store to every run, in one pass; each run goes on from where it stands."""
    first = min(runs, key=lambda run: run.state.step)
    train, state = first.settings.train, first.state
    try:
        with (
            first.store.train.loader(
                train.batch_size,
                train.order_seed,
                epoch=state.epoch,
                batch=state.batch,
                epochs=None,
                device=str(state.last_fired.device),
            ) as loader,
            interruptions() as interrupted,
        ):
            per_epoch, batches, step = len(loader), loader.batches(), state.step
            while not all(run.done for run in runs):
                begun = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begun
                for run in runs:
                    if run.state.step == step:  # a run that was checkpointed later waits for the others
                        run.feed(batch, per_epoch, waited)
                step += 1
                if interrupted():
                    for run in runs:
                        checkpoint.save(run.dir, run.state)
                    raise KeyboardInterrupt(f"step {step} is saved; the same command continues")
    except BaseException:
        for run in runs:
            run.log.close(exit_code=1)
        raise
    return [run.finish() for run in runs]


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of the step, so that the state that is saved is whole."""
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set
        return

    def remember(number: int, frame: Any) -> None:
        if caught.is_set():
            raise KeyboardInterrupt("stopped at once; the same command continues from the last checkpoint")
        caught.set()

    old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
