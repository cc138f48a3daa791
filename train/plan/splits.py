"""How processes can share the rows and latents of a training: what each then holds and sends, and what fits.

Shapes: B rows of a batch, D_in, D_out, F latents, G groups, K active per row.
"""

from dataclasses import dataclass

import torch

from common.device import pick_device
from common.errors import InputError
from common.mesh import Mesh
from common.processes import Processes
from common.settings import Settings
from common.terminal.table import Table
from shards.loader import GROUP_CHUNKS, group_size, shares_rows
from shards.plan import human
from train.plan import memory
from train.recipe import objective_of
from train.step.losses import Objective

SAMPLED = 1.25
"""Candidates of the global cut for each activation that is kept (transcoder/selection.py)."""


@dataclass(frozen=True)
class Split:
    """A mesh of `rows` x `latents` processes, and the bytes that the process with the most latents takes."""

    rows: int
    latents: int
    state: int
    """Weights, Adam's moments, counters, samples."""
    step: int
    """What a step takes beyond `state`."""
    sent_for_latents: int
    """Sent in a step to the processes with the same rows: at most [B, G, D_out], and the candidates of the cut."""
    sent_for_rows: int
    """Sent in a step to the processes with the same latents: gradients, and how often each latent fired."""
    program: int
    """Interpreter, PyTorch and loader, where they share the memory of the weights: on a CPU."""

    @property
    def together(self) -> int:
        """Bytes of the device's memory that a process takes."""
        return self.state + self.step + self.program

    @property
    def sent(self) -> int:
        """Bytes that a process sends in a step."""
        return self.sent_for_latents + self.sent_for_rows


def splits(
    objective: Objective,
    d_in: int,
    d_out: int,
    batch: int,
    processes: int,
    device: torch.device,
    skip: bool = False,
    samples: bool = True,
) -> list[Split]:
    """Every mesh of `processes` processes that can share these rows and latents."""
    shapes = [(processes // m, m) for m in _divisors(processes)]
    possible = [(r, m) for r, m in shapes if shares_rows(r, batch) and m <= objective.d_sae]
    return [_split(objective, (d_in, d_out), batch, r, m, device, skip, samples) for r, m in possible]


def _divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


def _split(
    objective: Objective,
    widths: tuple[int, int],
    batch: int,
    rows: int,
    shards: int,
    device: torch.device,
    skip: bool,
    samples: bool,
) -> Split:
    last = Mesh(latents=Processes(shards - 1, shards)).part(objective.d_sae)
    own, n, (d_in, d_out) = objective.of(last), batch // rows, widths
    cut = int(SAMPLED * objective.k * n) if rows * shards > 1 else 0
    shared = d_out + (d_in * d_out if skip else 0)
    return Split(
        rows,
        shards,
        state=memory.kept(own, d_in, d_out, skip=skip, samples=samples),
        step=memory.passing(own, d_in, d_out, n, device, rows),
        sent_for_latents=4 * (n * len(own.prefix_ends) * d_out * (shards > 1) + cut),
        sent_for_rows=4 * (own.d_sae * (d_in + d_out + 3) + shared) * (rows > 1),
        program=memory.PROGRAM + memory.LOADER if device.type == "cpu" else 0,
    )


def plan(
    settings: Settings, width: int, processes: int, memory_each: float | None, of: str, nodes: int = 1
) -> Table:
    """A table of the splits of a training, on rows of this width; `of` names the training.

    `memory_each`: bytes of each GPU; without a GPU here, one that has TF32 is planned for, unless model.device is cpu.
    None: for the device here and what is free of it, the GPU's memory or the machine's divided by the `processes` on
    each of the `nodes`. Raises `InputError` for sizes that do not fit the width,
    and where no split is possible.
    """
    planned, device = _device(settings, memory_each)
    group_size(GROUP_CHUNKS, settings.train.batch_size, 1)
    objective, train, n = objective_of(planned, width, device), planned.train, processes * nodes
    if memory_each is None:
        memory_each = (memory.available(device) or 0) / (processes if device.type == "cpu" else 1)
    found = splits(
        objective, width, width, train.batch_size, n, device,
        planned.transcoder.skip, train.sample_every > 0,
    )  # fmt: skip
    one, many = ("GPU", "GPUs") if device.type == "cuda" else ("process on a CPU", "processes on CPUs")
    if not found:
        raise InputError(
            f"{of}: {n:,} processes cannot share batches of {train.batch_size:,} rows and {objective.d_sae:,} latents; "
            "a number of them that divides the chunks of a batch must share the rows; give another NPROC"
        )
    where = f"one {one}, {human(memory_each)}" if n == 1 else f"{n} {many}, {human(memory_each)} each"
    sizes = f"{objective.d_sae:,} latents, width {width:,}, batches of {train.batch_size:,} rows, {objective.precision}"
    return table_of(found, memory_each, f"{of}: {sizes}; {where}", train.batch_size)


def _device(settings: Settings, memory_each: float | None) -> tuple[Settings, torch.device]:
    """The device that is planned for, and the settings with its precision where no such GPU is here to ask."""
    name = settings.model.device
    if memory_each is None or name == "cpu" or torch.cuda.is_available():
        return settings, pick_device(name)
    if settings.train.precision == "auto":
        train = settings.train.model_copy(update={"precision": "tfloat32"})
        settings = settings.model_copy(update={"train": train})
    return settings, torch.device("cuda")


def table_of(found: list[Split], memory_each: float, title: str, batch: int) -> Table:
    """A line for each split; below, which of those that fit into `memory_each` bytes sends the least, and which splits
    of the processes cannot share the rows of a `batch`.
    """
    program = max(split.program for split in found)
    columns = ("rows x latents", "weights and Adam", "one step")
    columns += ("program, loader",) * bool(program) + ("memory of each", "sent a step by each", "")
    fits = [split for split in found if split.together <= memory_each]
    best = min(fits, key=lambda split: split.sent, default=None)
    others = "fewer processes on a machine" if program > memory_each else "more processes"
    advice = f"none fits; use {others}, fewer latents, or smaller batches"
    if best is not None:
        mesh = f"{best.rows} x {best.latents}"
        advice = f"of the lines that fit, {mesh} sends the least: --train.latent_shards {best.latents}"
    n = found[0].rows * found[0].latents
    if uneven := [str(m) for m in _divisors(n) if not shares_rows(m, batch)]:
        advice += f"\nleft out: {batch:,} rows are not shared by {', '.join(uneven)} processes"
    table = Table(*columns, title=title, caption=advice)
    for split in found:
        sizes = (split.state, split.step, *(program,) * bool(program), split.together, split.sent)
        fit = "fits" if split in fits else "does not fit"
        table.add_row(f"{split.rows} x {split.latents}", *map(human, sizes), fit)
    return table
