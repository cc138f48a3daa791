"""The training step as products of whole matrices: the same gradients as train/step/dense.py, for a GPU's tensor cores.

On an H100 five products over all latents in bfloat16 take less time than the gathers of the active ones
(docs/gpu.md), and nothing but the number of candidates and of dead latents comes back to the host.

Shapes: B rows, D_in, D_out, F latents, G groups, N dead latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from common.mesh import ONE, Mesh
from train.step.gradients import Block, Gradients
from train.step.losses import Objective, StepValues, nested_loss
from train.step.sparse import aux_gradients
from transcoder.entries import Entries
from transcoder.selection import CUTS
from transcoder.transcoder import Parameters


class MatrixStep:
    """Forward and backward with dense products, in float32, TF32 or bfloat16; sums are float32."""

    def __init__(self, objective: Objective, mesh: Mesh = ONE) -> None:
        self.objective, self.mesh = objective, mesh

    def __call__(
        self,
        parameters: Parameters,
        x: Tensor,
        y: Tensor,
        dead: Tensor,
        k: int,
        weights: Tensor | None = None,
    ) -> tuple[StepValues, Gradients]:
        """See `Step`."""
        with tensor_cores(self.objective.precision):
            return self._step(parameters, x, y, dead, k, weights)

    def _step(
        self, parameters: Parameters, x: Tensor, y: Tensor, dead: Tensor, k: int, weights: Tensor | None
    ) -> tuple[StepValues, Gradients]:
        objective, mesh = self.objective, self.mesh
        x_low, W_dec_low = self._low(x), self._low(parameters.W_dec)
        pre = _product(x_low, self._low(parameters.W_enc).T).add_(parameters.b_enc)
        n_dead = mesh.latents.count(len(dead))  # sync: of all processes
        wants_aux = n_dead > 0 and objective.aux_k > 0 and objective.aux_coefficient > 0
        dead_pre = pre[:, dead] if wants_aux else None
        cut, kept = self._kept(pre, k)
        acts = pre.mul_(kept)
        acts_low = self._low(acts)

        base = parameters.b_dec - y
        if parameters.W_skip is not None:
            base.addmm_(x, parameters.W_skip.T)
        groups = self._groups()
        residuals = self._residuals(base, acts_low, W_dec_low, groups)
        of_rows = torch.stack([torch.linalg.vector_norm(r, dim=1) for r in residuals]).double().square()
        squared_errors = mesh.rows.total(of_rows.sum(1) if weights is None else of_rows @ weights.double())
        n_values = y.numel() * mesh.rows.world
        l2 = nested_loss(squared_errors, objective.prefix_weights, n_values)

        # S[g] = 2 / (B D_out) * sum over h >= g of w_h r[h]: the loss's gradient by group g's part of y_hat
        S, above = [], torch.zeros_like(y)
        for weight, r in zip(reversed(objective.prefix_weights), reversed(residuals), strict=True):
            scale = 2 * weight / n_values
            if weights is None:
                above = torch.add(above, r, alpha=scale)
            else:
                above = torch.addcmul(above, r, weights[:, None], value=scale)
            S.insert(0, above)
        aux, extras = l2.new_zeros(()), None
        if dead_pre is not None:
            aux, extras = aux_gradients(
                parameters, dead_pre, x, -residuals[-1], dead, objective, n_dead, mesh, weights
            )
        S_low = [self._low(s) for s in S]

        def blocks() -> Iterator[Block]:
            with tensor_cores(objective.precision):
                block = self._block(parameters, x_low, W_dec_low, acts_low, kept, S_low, groups)
            for gradient, extra in zip(block[1:], extras or (), strict=False):
                gradient.index_add_(0, dead, extra)
            yield block

        shared = {"b_dec": S[0].sum(0)}
        if parameters.W_skip is not None:
            shared["W_skip"] = S[0].T @ x
        fired = kept.sum(0)
        values = StepValues(squared_errors, l2, aux, fired, lambda: _entries(acts), cut, n_dead)
        return values, Gradients(shared, blocks)

    def _low(self, matrix: Tensor) -> Tensor:
        """The matrix in the precision of the products' inputs."""
        return matrix.bfloat16() if self.objective.precision == "bfloat16" else matrix

    def _groups(self) -> list[slice]:
        ends = self.objective.prefix_ends
        return [slice(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]

    def _residuals(
        self, base: Tensor, acts_low: Tensor, W_dec_low: Tensor, groups: list[slice]
    ) -> list[Tensor]:
        """[B, D_out] y_g - y of each prefix: a running sum over groups, which starts at `base` = b_dec + skip - y.

        Where several processes hold the latents, each adds what its own give to each group, and one the base: one sum
        of [G, B, D_out] over them.
        """
        parts = (_product(acts_low[:, group], W_dec_low[group]) for group in groups)
        holders = self.mesh.latents
        if holders.world == 1:
            return list(accumulate(parts, initial=base))[1:]
        stacked = torch.stack(list(parts))
        if holders.leads:
            stacked[0] += base
        return list(accumulate(holders.total(stacked)))

    def _kept(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(the smallest activation that the selection keeps, [B, F] which ones it keeps)."""
        tiny = torch.finfo(pre.dtype).smallest_normal  # zero is no activation
        cuts = CUTS[self.objective.selection](pre, k, self.mesh)
        kept = pre >= cuts.clamp_min(tiny)
        if cuts.dim() == 0:
            return cuts, kept
        lowest = torch.where(kept, pre, torch.inf).amin()
        lowest = self.mesh.everyone.gathered(lowest[None]).amin()
        return torch.where(lowest.isinf(), 0.0, lowest), kept

    def _block(
        self,
        parameters: Parameters,
        x_low: Tensor,
        W_dec_low: Tensor,
        acts_low: Tensor,
        kept: Tensor,
        S_low: list[Tensor],
        groups: list[slice],
    ) -> Block:
        """d_acts = S W_dec^T where an activation is kept, dW_dec = acts^T S, dW_enc = d_acts^T x."""
        d_acts_low = torch.empty_like(acts_low)
        d_dec = torch.empty_like(parameters.W_dec)
        for group, s in zip(groups, S_low, strict=True):
            torch.mul(s @ W_dec_low[group].T, kept[:, group], out=d_acts_low[:, group])
            _product(acts_low[:, group].T, s, out=d_dec[group])
        along = torch.linalg.vecdot(d_dec, parameters.W_dec)
        return Block(0, _product(d_acts_low.T, x_low), d_acts_low.sum(0, dtype=d_dec.dtype), d_dec, along)


def _entries(acts: Tensor) -> Entries:
    rows, latents = acts.nonzero(as_tuple=True)  # sync: only where the loop collects samples
    return Entries(rows, latents, acts[rows, latents], len(acts))


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, summed and returned in float32 where they are bfloat16 (float64 where they are float64)."""
    if left.dtype != torch.bfloat16:
        return torch.mm(left, right, out=out)
    if left.is_cpu:
        return torch.mm(left.float(), right.float(), out=out)  # products of bfloat16 are exact in float32
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


@contextmanager
def tensor_cores(precision: str) -> Iterator[None]:
    """Float32 products in TF32 while this lasts, if less than float32 is asked for; on a CPU they stay float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
