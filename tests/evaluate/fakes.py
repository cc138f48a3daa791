"""Random transcoders, and a split that lives in memory."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transcoder import Transcoder
from transcoder.transcoder import Parameters


@dataclass
class Rows:
    inputs: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop], self.outputs[start:stop]


def random_coder(
    d_in: int,
    d_out: int,
    ends: tuple[int, ...],
    seed: int = 0,
    skip: bool = False,
    per_latent: bool = False,
    layer: int = 0,
) -> Transcoder:
    draw = torch.Generator().manual_seed(seed)
    n_latents = ends[-1]
    decoder = torch.randn(n_latents, d_out, generator=draw)
    shape = (len(ends), n_latents) if per_latent else (len(ends),)
    parameters = Parameters(
        W_enc=torch.randn(n_latents, d_in, generator=draw) / d_in**0.5,
        b_enc=0.1 * torch.randn(n_latents, generator=draw),
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=torch.randn(d_out, generator=draw),
    )
    thresholds = 0.3 + 0.5 * torch.rand(*shape, generator=draw)
    if skip:
        parameters = replace(parameters, W_skip=torch.randn(d_out, d_in, generator=draw) / d_in)
    return Transcoder(parameters, thresholds, ends, {"source": {"input": "normalized", "layer": layer}})


def random_rows(n: int, d_in: int, d_out: int, seed: int = 1) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(n, d_in, generator=draw), torch.randn(n, d_out, generator=draw) + 3)
