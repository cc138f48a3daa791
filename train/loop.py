"""One training step, one run, and the loop over a store's batches.

Shapes: B rows, D_in, D_out, F latents, G prefixes.
"""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from common.device import pick_device
from common.errors import InputError, shown
from common.files import locked, remove_asides
from common.mesh import ONE, Mesh, mesh_of, row_shards
from common.processes import Processes, end_with_another, joined, world
from common.settings import Settings
from shards import Batch, Store
from train import checkpoint, log, record
from train.finish import finish, heldout_rows, raw_transcoder
from train.log import Log
from train.measure import PROBE_ROWS, measure, training_cut
from train.plan import memory
from train.recipe import Recipe, check_precision, initial
from train.state import State
from train.step.dense import DenseStep
from train.step.gradients import Step
from train.step.losses import Objective, StepValues, revival
from train.step.matrix import MatrixStep
from train.step.optimizer import apply
from train.step.sparse import Buffers, SparseStep
from transcoder import weights
from transcoder.entries import Entries
from transcoder.transcoder import Transcoder

RESTRAINT = 3.0
"""Steps of a bias that a latent of twice the limit's density loses beyond what its gradient gives, see `restrain`."""
DEAD_WARNED = 0.1
"""Share of dead latents after a quarter of a run above which it says so."""


def step_for(
    objective: Objective, device: torch.device, mesh: Mesh = ONE, buffers: Buffers | None = None
) -> Step:
    """The one place that decides between the steps; all give the same gradients, to their precision.

    `objective` is the run's; the step gets that of the latents which this process holds.
    """
    own = objective.of(mesh.part(objective.d_sae))
    if device.type == "cpu":
        dense = objective.dense and mesh.latents.world == 1
        return DenseStep(own, mesh) if dense else SparseStep(own, mesh, buffers)
    if objective.dense or objective.precision != "float32":
        return MatrixStep(own, mesh)
    return SparseStep(own, mesh, buffers)


@torch.no_grad()
def train_step(
    state: State, step: Step, recipe: Recipe, inputs: Tensor, outputs: Tensor, mesh: Mesh = ONE
) -> StepValues:
    """One optimizer step on raw inputs [B, D_in] and outputs [B, D_out]; changes `state` in place.

    B counts this process's rows, and `state` holds its latents; the step is that of the whole `mesh`. A loss that is
    not finite is noted in `state.failed`, and changes no parameter.
    """
    x, y = recipe.scaling.inputs(inputs), recipe.scaling.outputs(outputs)
    dead = state.dead(recipe.train.dead_after_rows)
    weights = recipe.typical.weights(outputs)
    values, gradients = step(state.parameters, x, y, dead, recipe.active_latents(state.step), weights)
    state.note_failure(values.loss)
    own = step.objective
    lr, gradients = recipe.learning_rate(state.step), gradients.over(mesh.rows, own.d_sae)
    if len(dead):
        gradients = gradients.plus(revival(dead, own.d_sae, y.shape[1]))
    apply(state.adam, gradients, lr, recipe.train.clip_norm, mesh.latents)
    if recipe.train.density_limit is not None:
        restrain(state, recipe.train.density_limit, lr)

    fired, rows = mesh.rows.total(values.fired), len(x) * mesh.rows.world
    state.n_dead = values.n_dead
    state.count(values.cut, fired, own.prefix_ends, rows, recipe.counting_from, mesh.latents)
    return values


def restrain(state: State, limit: float, lr: float) -> None:
    """Lower the biases of latents that fire on more than nine tenths of `limit` of the rows.

    In proportion to the excess: a bias settles where the reconstruction pulls up as strongly as this pulls down, near
    the limit, a little above it where the pull is strong.
    """
    excess = (state.density / (0.9 * limit) - 1).clamp_(0, 2).mul_(1 - state.adam.skip)
    state.parameters.b_enc.sub_(excess, alpha=RESTRAINT * lr * state.adam.rates["b_enc"])


class Run:
    """One run being trained: its directory, state, step, log."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        device: torch.device,
        mesh: Mesh = ONE,
        buffers: Buffers | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.settings, self.store, self.mesh, peers = settings, store, mesh, mesh.everyone
        self.dir = settings.run_dir()
        self.recipe = recipe or Recipe.of(settings, store, device)
        record.refuse_another(self.dir, settings, store.manifest.fingerprint)
        self.step = step_for(self.recipe.objective, device, mesh, buffers)
        d_sae, ends = self.recipe.objective.d_sae, self.recipe.objective.prefix_ends
        self.latents = mesh.part(d_sae)
        parameters = initial(settings, self.recipe, store, device, self.latents)
        sampled = settings.train.sample_every > 0
        self.state = State.start(parameters, ends, sampled, self.latents)
        continued, used = checkpoint.restore(self.dir, self.state, self.latents, d_sae), self.recipe.used()
        if continued and peers.leads:
            before, now = record.read(self.dir).used.get("precision"), used["precision"]
            if before not in (None, now):
                line = f"note: {self.dir}: begun with products in {before}, goes on in {now}"
                tqdm.write(line, file=sys.stderr)
        if peers.leads:  # nothing is written before all that was given is known to be usable
            checkpoint.cut_metrics(self.dir, self.state.step)
            record.claim(self.dir, settings, store.manifest, used)
        config = record.trained_with(settings, store.manifest.source) | {
            "harvest_fingerprint": store.manifest.fingerprint,
            "used": used,
        }
        total = self.recipe.steps * settings.train.batch_size
        self.log = Log(self.dir, settings, config, rows=self.state.rows, total=total) if peers.leads else None
        self._unchecked: list[tuple[int, int, Tensor, Tensor]] = []
        """(step, its first row, squared errors, auxiliary loss) of the steps since the last check for a failure."""
        self._clock, self._waited, self._logged_rows = time.perf_counter(), 0.0, self.state.rows

    @property
    def done(self) -> bool:
        """Whether every step is made."""
        return self.state.step >= self.recipe.steps

    def feed(self, batch: Batch, batches_per_epoch: int, waited: float) -> None:
        """Train on one batch; log and checkpoint when their step has come."""
        state, train = self.state, self.settings.train
        values = train_step(state, self.step, self.recipe, batch.inputs, batch.outputs, self.mesh)
        self._unchecked.append((state.step, int(batch.rows[0]), values.squared_errors, values.aux_loss))
        probes = state.step % train.heldout_every == 0 or self.done
        logs = state.step % train.log_every == 0 or probes
        saves = state.step % train.checkpoint_every == 0 or self.done
        if logs or state.failed.is_cpu:  # where it saves, `save` looks
            self._check()
        over = batch.index + 1 == batches_per_epoch
        state.epoch, state.batch = (batch.epoch + 1, 0) if over else (batch.epoch, batch.index + 1)
        self._waited += waited
        if self.log is not None and state.step == max(1, self.recipe.steps // 4):
            self._warn(values)
        if state.samples is not None and train.sample_every and state.step % train.sample_every == 0:
            state.samples.collect(*_everyones(values.entries, batch, self.mesh.rows))
        probed = self._probed() if probes and self.mesh.rows.leads else {}
        if self.log is not None:
            self.log.step(train.batch_size)
            if logs:
                self.log.metrics(self._metrics(values, batch.epoch) | probed)
        if saves:
            self.save()

    def _check(self) -> None:
        """Raise `InputError` if the loss of a step since the last look was not finite. On a GPU the host waits here."""
        if math.isnan(self.state.failed.item()):
            step, row, what = next(self._failures())
            chunk = row // self.store.manifest.source.chunk_rows
            raise InputError(
                f"{self.dir}: loss is not finite at step {step} ({what}; rows from chunk {chunk} "
                "of train on); lower train.lr, or check the store with make verify"
            )
        self._unchecked.clear()

    def _failures(self) -> Iterator[tuple[int, int, str]]:
        """(step, its first row, which loss) of the losses since the last look that are not finite."""
        for step, row, errors, aux in self._unchecked:
            losses = {f"prefix {g}": error for g, error in enumerate(errors.tolist())}
            losses["auxiliary loss"] = aux.item()
            yield from ((step, row, name) for name, loss in losses.items() if not math.isfinite(loss))

    def _warn(self, values: StepValues) -> None:
        """One line when a quarter of the run shows that its end will be poor."""
        share = self.state.n_dead / self.recipe.objective.d_sae
        variation = self.settings.train.batch_size * self.recipe.variance
        fvu = values.squared_errors[-1].item() / variation if variation else 0.0
        lower = f"a lower train.lr (it is {self.recipe.lr:.3g})"
        if fvu > 1:
            self._say(f"FVU {fvu:.2f}: worse than the mean output", lower)
        elif share > DEAD_WARNED:
            self._say(
                f"{100 * share:.0f} % of the latents are dead", f"{lower} or fewer latents (transcoder.d_sae)"
            )

    def _say(self, what: str, remedy: str) -> None:
        line = f"warning: {self.dir}: after a quarter of the run {what}; stop it and train with {remedy}"
        tqdm.write(line, file=sys.stderr)

    def save(self) -> None:
        """Write a checkpoint; every process has the same state. Raises `InputError` after a failed step."""
        self._check()
        checkpoint.save(self.dir, self.state, self.latents, self.mesh)
        self.mesh.everyone.wait()

    def _metrics(self, values: StepValues, epoch: int) -> dict[str, Any]:
        state, recipe = self.state, self.recipe
        rows = recipe.train.batch_size
        variation = rows * recipe.variance
        fvu = [error / variation if variation else None for error in values.squared_errors.tolist()]
        now = time.perf_counter()
        speed = (state.rows - self._logged_rows) / max(now - self._clock, 1e-9)
        waited, self._waited, self._clock, self._logged_rows = self._waited, 0.0, now, state.rows
        return {
            "step": state.step,
            "rows": state.rows,
            "epoch": epoch,
            "loss": values.loss.item(),
            "l2_loss": values.l2_loss.item(),
            "aux_loss": values.aux_loss.item(),
            "l0_norm": None if state.newest is None else float(state.newest[0][-1]) / state.newest[1],
            "fvu": fvu[-1],
            **{f"fvu/prefix_{g}": value for g, value in enumerate(fvu)},
            "dead_features_percentage": 100 * state.n_dead / recipe.objective.d_sae,
            "learning_rate": recipe.learning_rate(state.step - 1),
            "threshold": float(state.threshold or 0.0) * recipe.scaling.scale_out,
            "rows_per_second": round(speed, 1),
            "data_wait_seconds": round(waited, 4),
            "peak_memory_bytes": memory.peak(state.last_fired.device),
        }

    @torch.no_grad()
    def _probed(self) -> dict[str, float | None]:
        holders, own = self.mesh.latents, self.step.objective
        cuts = training_cut(own.k, len(own.prefix_ends), holders)
        pairs = heldout_rows(self.store, PROBE_ROWS, self.state.last_fired.device)
        raw = raw_transcoder(self.state, self.recipe, own.prefix_ends)
        heldout = measure(raw, pairs, cuts, self.recipe.typical, holders)
        return {f"heldout_fvu/prefix_{g}": fvu for g, fvu in enumerate(heldout.fvu)}

    def finish(self) -> None:
        """Write the finished weights, and give them to W&B."""
        if self.mesh.rows.leads:
            finish(self.settings, self.store, self.recipe, self.state, self.latents, self.mesh.latents)
        if self.log is not None:
            self.log.artifact(weights.files_of(self.dir))
        self.mesh.everyone.wait()


def _everyones(entries: Entries, batch: Batch, peers: Processes) -> tuple[Entries, Tensor]:
    """The active entries of all processes, and the stored row number of each of their rows."""
    numbers = torch.from_numpy(batch.rows).to(entries.rows.device)
    rows = entries.rows + peers.rank * len(numbers)
    parts = (rows, entries.latents, entries.values)
    return Entries(*map(peers.gathered, parts), n_rows=len(numbers) * peers.world), peers.gathered(numbers)


def train(settings: Settings, store: Store) -> Transcoder:
    """Train one run to its end, from wherever it stands."""
    train_together([settings], store)
    return Transcoder.load(settings.run_dir())


def train_together(wanted: list[Settings], store: Store) -> None:
    """Give each batch of the store to every run, in one pass; each run goes on from where it stands.

    What decides the batches (rows, batch size, order seed) is the same for all of them.
    """
    device = pick_device(wanted[0].model.device)
    _check_store(wanted[0], store)
    for settings in wanted:
        check_precision(device, settings.train.precision)
    first = Recipe.of(wanted[0], store, device)  # it reads 8,192 rows of the store
    recipes = [first, *(Recipe.of(settings, store, device, first.typical) for settings in wanted[1:])]
    _check_shards(recipes, wanted)
    _check_memory(recipes, wanted, store, device)
    log.check(wanted[0].wandb)
    with joined(device) as peers, ExitStack() as locks:
        _check_alike(wanted, store, peers)
        mesh = mesh_of(peers, wanted[0].train.latent_shards)
        for folder in [settings.run_dir() for settings in wanted] if peers.leads else ():
            locks.enter_context(locked(folder / ".lock", f"{folder}: another training is writing it"))
            remove_asides(folder, folder / "state", folder / "activation_samples")
        runs: list[Run] = []
        try:
            buffers = Buffers()
            pairs = zip(wanted, recipes, strict=True)
            runs += [Run(settings, store, device, mesh, buffers, recipe) for settings, recipe in pairs]
            _agree(runs, peers)
            _feed_all(runs, store, mesh)
            for run in runs:
                run.finish()
        finally:
            for run in runs:
                if run.log is not None:
                    run.log.close()


def _check_alike(wanted: list[Settings], store: Store, peers: Processes) -> None:
    """Refuse a process that was asked for something else than the first: they would wait for each other for ever.

    torchrun's nodes meet by their command; srun and PyTorchJob start any, and each node has its own pipeline.toml.
    """
    if peers.world == 1:
        return
    asked: dict[str, Any] = {"runs": len(wanted)}
    for settings in wanted:
        each = {"layer": settings.layer, "run": settings.run, "harvest": shown(store.manifest.fingerprint)}
        for section in ("transcoder", "train"):
            values = getattr(settings, section).model_dump(mode="json")
            each |= {f"{section}.{key}": value for key, value in values.items()}
        asked |= {
            f"{key} of {settings.run}" if len(wanted) > 1 else key: value for key, value in each.items()
        }
    everyones = peers.said(json.dumps(asked))
    first = json.loads(everyones[0])
    for key in first | asked:
        if first.get(key) != asked.get(key):
            raise InputError(
                f"{key}: expected {first.get(key)}, as rank 0 has it, found {asked.get(key)}; start all processes with "
                "the same command and the same pipeline.toml (docs/nodes.md)"
            )
    if len(set(everyones)) > 1:
        end_with_another()


def _agree(runs: list[Run], peers: Processes) -> None:
    """Refuse a process that goes on from elsewhere than the first, as its node has another disk at the run's place."""
    peers.wait()
    for run in runs:
        peers.see(run.dir / record.FILE_NAME)
        steps = peers.gathered(torch.tensor([run.state.step], device=peers.device)).tolist()
        if steps[peers.rank] != steps[0]:
            raise InputError(
                f"{run.dir}: holds a checkpoint of step {steps[peers.rank]} here, of step {steps[0]} for rank 0; all "
                "nodes need the same disk at this path (docs/nodes.md)"
            )


def _check_store(settings: Settings, store: Store) -> None:
    """Refuse a store of another model or layer, or one that cannot give such batches to all processes."""
    store.check_asked(settings)
    store.train.loader(settings.train.batch_size, world=row_shards(world(), settings.train.latent_shards))


def _check_shards(recipes: list[Recipe], wanted: list[Settings]) -> None:
    for recipe, settings in zip(recipes, wanted, strict=True):
        if settings.train.latent_shards > recipe.objective.d_sae:
            raise InputError(
                f"train.latent_shards: expected at most as many as there are latents ({recipe.objective.d_sae}), found "
                f"{settings.train.latent_shards}; lower it"
            )


def _check_memory(recipes: list[Recipe], wanted: list[Settings], store: Store, device: torch.device) -> None:
    source = store.manifest.source
    widths = source.d_in, source.d_out
    state, on_top = 0, 0
    for recipe, settings in zip(recipes, wanted, strict=True):
        transcoder, train = settings.transcoder, settings.train
        shards, d_sae = train.latent_shards, recipe.objective.d_sae
        own = recipe.objective.of(slice(d_sae * (shards - 1) // shards, d_sae))  # none has more latents
        rows = row_shards(world(), shards)
        state += memory.kept(own, *widths, skip=transcoder.skip, samples=train.sample_every > 0)
        on_top = max(on_top, memory.passing(own, *widths, train.batch_size // rows, device, rows))
    memory.check(state, on_top, device)


def _feed_all(runs: list[Run], store: Store, mesh: Mesh) -> None:
    first = min(runs, key=lambda run: run.state.step)
    train, state = first.settings.train, first.state
    loader = store.train.loader(
        train.batch_size,
        train.order_seed,
        epoch=state.epoch,
        batch=state.batch,
        epochs=None,
        device=state.last_fired.device,
        rank=mesh.rows.rank,
        world=mesh.rows.world,
    )
    step = state.step
    with closing(loader.batches()) as batches, interruptions() as interrupted:
        while not all(run.done for run in runs):
            begun = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begun
            for run in runs:
                if run.state.step == step:  # a run whose checkpoint is later waits for the others
                    run.feed(batch, loader.batches_per_epoch, waited)
            step += 1
            if mesh.everyone.any(interrupted()):
                for run in runs:
                    run.save()
                raise KeyboardInterrupt(f"step {step} is saved; the same command continues")


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
