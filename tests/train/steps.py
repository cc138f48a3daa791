"""Random problems for the training step, odd in every size."""

from typing import NamedTuple

import torch
from torch import Tensor

from train.step.losses import Objective
from transcoder.transcoder import Parameters


class Problem(NamedTuple):
    parameters: Parameters
    x: Tensor
    y: Tensor
    dead: Tensor
    objective: Objective
    weights: Tensor | None


def problem(
    seed: int = 0,
    rows: int = 7,
    d_in: int = 5,
    d_out: int = 3,
    prefix_ends: tuple[int, ...] = (2, 5, 11),
    k: int = 2,
    n_dead: int = 0,
    skip: bool = False,
    selection: str = "batch_topk",
    aux_k: int = 4,
    bias: float = 0.0,
    weighted: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d_sae = prefix_ends[-1]
    W_dec = normal(d_sae, d_out)
    parameters = Parameters(
        W_enc=normal(d_sae, d_in),
        b_enc=normal(d_sae) + bias,
        W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
        b_dec=normal(d_out),
        W_skip=normal(d_out, d_in) if skip else None,
    )
    dead = torch.randperm(d_sae, generator=generator)[:n_dead].sort().values
    groups = len(prefix_ends)
    weights = tuple((g + 1) / sum(range(groups + 1)) for g in range(groups))
    objective = Objective(prefix_ends, weights, k, selection, aux_k, aux_coefficient=0.7)
    x, y = normal(rows, d_in), normal(rows, d_out)
    of_rows = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype) if weighted else None
    return Problem(parameters, x, y, dead, objective, of_rows)
