"""Selection of the active latents: batch top-k and per-row top-k, exact; and the inference threshold.

Shapes: B rows, F latents, E selected entries.
"""

import math
from collections.abc import Callable
from itertools import count

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.processes import ALONE, Peers
from transcoder.entries import Entries

SAMPLE = 1 << 16
"""Values looked at to guess the cut; 19 M pre-activations have their (K*B)-th largest among the
candidates above a guess made of 65,536 of them, and a full torch.topk costs 1.0 s."""
LANES = 8
WIDTH_FACTORS = 2 * 3 * 5 * 7


def kth_largest(values: Float[Tensor, " n"], k: int) -> Tensor:
    """The k-th largest of `values`, 1 <= k <= n, as a tensor without dimensions."""
    return values.kthvalue(len(values) - k + 1).values


def candidates(values: Float[Tensor, " n"], k: int, peers: Peers = ALONE) -> Int[Tensor, " m"]:
    """Positions of positive values, among them all that are at least the k-th largest positive.

    A strided sample guesses a cut that about 1.25 k values exceed; where the guess was too high, the
    next is far lower, and the last is zero. So the result is exact whatever the sample said.
    k counts over all `peers`, who use the same cut.
    """
    stride = _stride(len(values))
    sample = values[::stride]
    rank = min(len(sample), math.ceil(1.25 * k / stride / peers.world) + 8)
    guess = kth_largest(sample, rank).clamp_min(0) if rank < len(sample) else values.new_zeros(())
    guess = peers.total(guess.float() / peers.world).item()
    for cut in (guess, guess / 4, 0.0):
        found = _above(values, cut)
        count = (
            len(found)
            if peers.world == 1
            else int(peers.total(torch.tensor(len(found), device=values.device)))
        )
        if count >= k or cut == 0.0:
            break
    return found


def _above(values: Tensor, cut: float) -> Tensor:
    """Ascending positions of the values above `cut`: compares the largest of LANES far apart, then those columns.

    19 M values, 0.6 % of them above: 28 ms against 33 of values > cut at eight flags a time, and on two threads 16
    against 28, because nonzero() runs on one.
    """
    width = len(values) // LANES
    lanes, rest = values[: LANES * width].view(LANES, width), values[LANES * width :]
    columns = (lanes.amax(0) > cut).nonzero().squeeze(1) if width else lanes.new_zeros(0, dtype=torch.int64)
    lane, column = (lanes[:, columns] > cut).nonzero(as_tuple=True)
    return torch.cat([lane * width + columns[column], (rest > cut).nonzero().squeeze(1) + LANES * width])


def _stride(n: int) -> int:
    """A step that shares no factor with usual widths, so that the sample is not of a few columns only."""
    step = n // SAMPLE
    return 1 if step < 2 else next(s for s in count(step) if math.gcd(s, WIDTH_FACTORS) == 1)


Values = Callable[[Tensor], Tensor]
"""Positions in the flattened [B, F] -> their pre-activations, recomputed in float32."""


def select_batch(
    pre: Float[Tensor, "B F"], k: int, exact: Values | None = None, peers: Peers = ALONE
) -> tuple[Entries, Tensor]:
    """Batch top-k: every positive pre-activation at least as large as the (k*B)-th largest.

    Ties at the cut all stay. Also returns the cut, 0 when there are fewer positive values.
    With `exact`, `pre` only proposes candidates; they are ranked by their exact values.
    The batch is that of all `peers`.
    """
    n = k * len(pre) * peers.world
    positions = candidates(pre.view(-1), n, peers)
    values = pre.view(-1)[positions] if exact is None else exact(positions)
    everyones = peers.gathered(values)
    cut = kth_largest(everyones, n).clamp_min(0) if len(everyones) >= n else values.new_zeros(())
    return _entries(positions, values, (values >= cut) & (values > 0), pre), cut


def select_rows(
    pre: Float[Tensor, "B F"], k: int, exact: Values | None = None, peers: Peers = ALONE
) -> tuple[Entries, Tensor]:
    """Per-row top-k: in each row every positive value at least as large as the row's k-th largest.

    Ties stay. The returned cut is the smallest value kept, 0 when nothing is.
    With `exact`, the selection is by `pre`, the values are exact.
    """
    cut = pre.topk(min(k, pre.shape[1]), dim=1).values[:, -1:]
    positions = ((pre >= cut) & (pre > 0)).view(-1).nonzero().squeeze(1)
    values = pre.view(-1)[positions] if exact is None else exact(positions)
    entries = _entries(positions, values, values > 0, pre)
    everyones = peers.gathered(entries.values)
    return entries, everyones.min() if len(everyones) else values.new_zeros(())


SELECT = {"batch_topk": select_batch, "topk": select_rows}


def _entries(positions: Tensor, values: Tensor, kept: Tensor, pre: Tensor) -> Entries:
    """Entries of `pre` at those of the flattened positions that are kept, with their values."""
    kept = kept.nonzero().squeeze(1)
    positions = positions[kept]
    n_rows, width = pre.shape
    rows = positions.div(width, rounding_mode="floor")
    return Entries(rows, positions - rows * width, values[kept], n_rows)
