"""The training step written plainly, with autograd: the reference for the sparse one.

Shapes: B rows, D_in, D_out, F latents, G groups.
"""

import torch
from torch import Tensor

from train.gradients import Block, Gradients
from train.losses import Objective, StepValues, aux_loss, nested_loss
from train.topk import select_batch, select_rows
from train.transcoder import Parameters


class DenseStep:
    """Forward and backward over all latents of all rows."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(
        self, parameters: Parameters, x: Tensor, y: Tensor, dead: Tensor
    ) -> tuple[StepValues, Gradients]:
        """Values and gradients on rows x [B, D_in], y [B, D_out]; `dead` holds the dead latents' indices."""
        objective = self.objective
        with torch.enable_grad():
            leaves = parameters.map(lambda tensor: tensor.detach().requires_grad_())
            pre = torch.addmm(leaves.b_enc, x, leaves.W_enc.T)
            select = select_batch if objective.selection == "batch_topk" else select_rows
            entries, cut = select(pre.detach(), objective.k)
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept[entries.rows, entries.latents] = True
            acts = torch.relu(pre) * kept

            y_hat = leaves.b_dec if leaves.W_skip is None else leaves.b_dec + x @ leaves.W_skip.T
            errors, start = [], 0
            for end in objective.prefix_ends:
                y_hat = y_hat + acts[:, start:end] @ leaves.W_dec[start:end]
                errors.append((y_hat - y).square().sum(dtype=torch.float64))
                start = end
            squared_errors = torch.stack(errors)
            l2 = nested_loss(squared_errors, objective.prefix_weights, y.numel())
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
                )
            named = leaves.named()
            gradients = dict(zip(named, torch.autograd.grad(l2 + aux, list(named.values())), strict=True))
        d_enc, d_bias, d_dec = (gradients.pop(name) for name in ("W_enc", "b_enc", "W_dec"))
        block = Block(0, d_enc, d_bias, d_dec, (d_dec * parameters.W_dec).sum(1))
        values = StepValues(squared_errors.detach(), l2.detach(), aux.detach(), entries, cut)
        return values, Gradients(gradients, lambda: iter([block]))
