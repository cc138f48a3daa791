"""The training step in its simplest form, with autograd: the reference for the sparse one.

Shapes: B rows, D_in, D_out, F latents, G groups.
"""

import torch
from torch import Tensor

from common.mesh import ONE, Mesh
from train.step.gradients import Block, Gradients
from train.step.losses import Objective, StepValues, aux_loss, nested_loss, weighted
from transcoder.selection import SELECT
from transcoder.transcoder import Parameters


class DenseStep:
    """Forward and backward over all latents of all rows. The process has all latents: `mesh` is of rows alone."""

    def __init__(self, objective: Objective, mesh: Mesh = ONE) -> None:
        assert mesh.latents.world == 1
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
        objective, peers = self.objective, self.mesh.rows
        with torch.enable_grad():
            leaves = parameters.map(lambda tensor: tensor.detach().requires_grad_())
            pre = torch.addmm(leaves.b_enc, x, leaves.W_enc.T)
            entries, cut = SELECT[objective.selection](pre.detach(), k, mesh=self.mesh)
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept[entries.rows, entries.latents] = True
            acts = torch.relu(pre) * kept

            y_hat = leaves.b_dec if leaves.W_skip is None else leaves.b_dec + x @ leaves.W_skip.T
            parts, start = [], 0
            for end in objective.prefix_ends:
                y_hat = y_hat + acts[:, start:end] @ leaves.W_dec[start:end]
                parts.append(weighted((y_hat - y).square(), weights).sum(dtype=torch.float64))
                start = end
            squared_errors = torch.stack(parts)
            l2 = nested_loss(squared_errors, objective.prefix_weights, y.numel() * peers.world)
            aux = l2.new_zeros(())
            if len(dead) and objective.aux_k and objective.aux_coefficient:
                aux = aux_loss(
                    x,
                    (y - y_hat).detach(),
                    leaves.W_enc[dead],
                    leaves.b_enc[dead],
                    leaves.W_dec[dead],
                    aux_k=objective.aux_k,
                    coefficient=objective.aux_coefficient,
                    weights=weights,
                    peers=peers,
                )
            named = leaves.named()
            gradients = dict(zip(named, torch.autograd.grad(l2 + aux, list(named.values())), strict=True))
        d_enc, d_bias, d_dec = (gradients.pop(name) for name in ("W_enc", "b_enc", "W_dec"))
        block = Block(0, d_enc, d_bias, d_dec, (d_dec * parameters.W_dec).sum(1))
        errors, l2, aux = (peers.total(part.detach()) for part in (squared_errors, l2, aux))
        values = StepValues(errors, l2, aux, kept.sum(0), lambda: entries, cut, len(dead))
        return values, Gradients(gradients, lambda: iter([block.copy()]))
