"""What is constant over a run, and its initial parameters."""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.errors import InputError
from common.settings import Settings
from common.settings import Train as TrainSettings
from shards import Store
from train.normalisation import NORMALISATION, Scaling, unfold
from train.step.losses import Objective, prefix_weights
from train.step.schedule import active_latents, learning_rate, peak_rate
from transcoder.formats import fetched
from transcoder.gain import bind
from transcoder.heavy import Typical, typical_rows
from transcoder.transcoder import Parameters, Transcoder

ENCODER_SCALE = 0.1
"""Scale of the initial encoder. FVU after 800 steps: 0.424 with 0.1, 0.453 with 1, 0.456 Kaiming-uniform."""

BLOCK = 4096
"""Latents whose initial values are drawn at a time, a multiple of 16."""


@dataclass(frozen=True)
class Recipe:
    """What is constant over a run: the settings, and the numbers that follow from them and the store's moments."""

    objective: Objective
    train: TrainSettings
    lr: float
    """Peak learning rate."""
    min_lr: float
    scaling: Scaling
    typical: Typical
    """Mean, limit and variance of the raw train outputs; rows beyond the limit are heavy and weigh less in the loss."""
    variance: float
    """Variance of the normalised outputs, summed over dimensions; a heavy row counts like one at the limit."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        store: Store,
        device: torch.device | str = "cpu",
        typical: Typical | None = None,
    ) -> "Recipe":
        """The recipe of these settings on this store; `typical`: of its train rows, where they were sampled before.

        Raises `InputError` if they do not fit: a store without train rows, sizes that d_in does not allow.
        """
        source, moments = store.manifest.source, store.manifest.splits["train"]
        if moments.inputs is None or moments.outputs is None:
            raise InputError(f"{store.path}: has no train rows; harvest more")
        objective = objective_of(settings, source.d_in, torch.device(device))
        typical = (typical or typical_rows(store.train, moments.outputs)).to(device)
        scaling = Scaling.of(moments.inputs, typical.variance, source.d_out, device)
        variance = typical.variance / scaling.scale_out**2
        steps = settings.train.rows // settings.train.batch_size
        try:
            lr, min_lr = settings.train.rates(peak_rate(source.d_in, objective.d_sae, steps))
        except ValueError as error:  # the rule's rate depends on d_in
            raise InputError(f"train: {error}") from error
        return cls(objective, settings.train, lr, min_lr, scaling, typical, variance)

    def used(self) -> dict[str, Any]:
        """The values that the run really uses where settings say "auto" or nothing, as plain JSON values."""
        return {
            "lr": self.lr,
            "min_lr": self.min_lr,
            "warmup_steps": self.warmup,
            "precision": self.objective.precision,
            "normalisation": NORMALISATION,
            "input_scale_min": float(self.scaling.scale_in.min()),
            "input_scale_max": float(self.scaling.scale_in.max()),
            "output_scale": self.scaling.scale_out,
            "heavy_distance": self.typical.limit**0.5 if self.typical.limit < torch.inf else None,
        }

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.train.rows // self.train.batch_size

    @property
    def counting_from(self) -> int:
        """First step of the last tenth of the run, in which kept activations are counted."""
        return self.steps - max(1, self.steps // 10)

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up, at most half of the run."""
        return min(self.train.warmup_steps, self.steps // 2)

    def active_latents(self, step: int) -> int:
        """Active latents per row of `step`, counted from 0."""
        return active_latents(step, self.steps, self.objective.k, self.objective.d_sae)

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        return learning_rate(step, self.steps, peak=self.lr, final=self.min_lr, warmup=self.warmup)


def objective_of(settings: Settings, d_in: int, device: torch.device) -> Objective:
    """What a run of these settings minimises, on inputs of width `d_in`; `InputError` for sizes that do not fit it."""
    try:
        _, groups = settings.transcoder.resolve(d_in)
    except ValueError as error:  # sizes given as multiples: only now d_in is known
        raise InputError(f"transcoder: {error}") from error
    return Objective(
        prefix_ends=tuple(accumulate(groups)),
        prefix_weights=prefix_weights(len(groups)),
        k=settings.transcoder.k,
        selection=settings.transcoder.selection,
        aux_k=settings.train.aux_k,
        aux_coefficient=settings.train.aux_coefficient,
        precision=precision_on(device, settings.train.precision),
    )


def has_tf32(device: torch.device) -> bool:
    """Whether products on this device can be in TF32 (10 bits of mantissa): GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def precision_on(device: torch.device, name: str) -> str:
    """The precision of the products that `train.precision` means on this device."""
    if name == "auto":
        return "tfloat32" if has_tf32(device) else "float32"
    return name


def check_precision(device: torch.device, name: str) -> None:
    """Raise `InputError` where a run in TF32 is asked for and the device does not have it."""
    if name == "tfloat32" and not has_tf32(device):
        raise InputError(
            f"train.precision: tfloat32 needs a GPU that has it (Ampere or later), found {device}; use auto or float32"
        )


def initial(
    settings: Settings, recipe: Recipe, store: Store, device: torch.device, latents: slice | None = None
) -> Parameters:
    """Parameters before the first step, in normalised space: random, or those of the run `train.init_from`.

    Of these `latents`, or of all.
    """
    source, objective, skip = store.manifest.source, recipe.objective, settings.transcoder.skip
    if settings.train.init_from is None:
        mean = recipe.typical.mean.double().cpu() / recipe.scaling.scale_out
        fresh = initialise(
            source.d_in, objective.d_sae, mean, skip=skip, seed=settings.train.seed, latents=latents
        )
        return fresh.map(lambda tensor: tensor.to(device))
    try:
        other = Transcoder.load(fetched(settings.train.init_from, settings.layer))
    except InputError as error:
        raise InputError(f"train.init_from: {error}") from error
    expected = {
        "d_in": source.d_in,
        "d_out": source.d_out,
        "prefix ends": objective.prefix_ends,
        "skip": skip,
    }
    actual = (other.d_in, other.d_out, other.prefix_ends, other.W_skip is not None)
    pairs = zip(expected.items(), actual, strict=True)
    errors = [f"{key}: expected {ours}, found {theirs}" for (key, ours), theirs in pairs if ours != theirs]
    if errors:
        raise InputError(f"train.init_from: {settings.train.init_from}: {'; '.join(errors)}")
    name, option = f"train.init_from: {settings.train.init_from}", "--train.init_mismatch true"
    # a copy: what was loaded is a map of its file, and training changes it
    own = other.parameters.of(latents or slice(None)).map(lambda tensor: tensor.to(device, copy=True))
    fed = bind(replace(other, parameters=own), store, name, settings.train.init_mismatch, option)
    return unfold(fed.parameters, recipe.scaling)


def initialise(
    d_in: int,
    d_sae: int,
    mean_output: Float[Tensor, " D_out"],
    *,
    skip: bool,
    seed: int,
    latents: slice | None = None,
) -> Parameters:
    """Random parameters, in normalised space, on the CPU; of these `latents` of d_sae, or of all.

    b_dec is the mean output. W_dec has random unit rows. W_enc is normal with standard deviation
    ENCODER_SCALE / sqrt(d_in). b_enc and W_skip are zero.
    """
    generator, own = torch.Generator().manual_seed(seed), latents or slice(0, d_sae)
    W_enc = _normal_rows(d_sae, d_in, own, generator).mul_(ENCODER_SCALE / d_in**0.5)
    W_dec = _normal_rows(d_sae, len(mean_output), own, generator)
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return Parameters(
        W_enc=W_enc,
        b_enc=torch.zeros(len(W_enc)),
        W_dec=W_dec,
        b_dec=mean_output.to(torch.float32).clone(),
        W_skip=torch.zeros(len(mean_output), d_in) if skip else None,
    )


def _normal_rows(
    n: int, width: int, kept: slice, generator: torch.Generator
) -> Float[Tensor, "rows {width}"]:
    """Rows `kept` of torch.randn(n, width): the same numbers, however few are kept.

    PyTorch draws them 16 at a time, and the last 16 of a tensor anew where its size is no multiple of 16: so blocks of
    a multiple of 16 rows, and the rest with the last of them, give what one call would.
    """
    blocks = max(1, n // BLOCK)
    ends = [BLOCK * (i + 1) for i in range(blocks - 1)] + [n]
    rows = []
    for start, end in zip((0, *ends), ends, strict=False):
        block = torch.randn(end - start, width, generator=generator)
        rows.append(block[max(0, kept.start - start) : max(0, kept.stop - start)])
    return torch.cat(rows)
