"""Selection of the active latents: batch top-k and per-row top-k, both exact.

Batch top-k: Bussmann et al. 2024 (arXiv:2412.06410). Per-row top-k: Gao et al. 2024 (arXiv:2406.04093).
Shapes: B rows, F latents, E selected entries, n = B*F values. A position is row * F + latent.
"""

import math
from collections.abc import Callable
from itertools import count

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.mesh import ONE, Mesh
from common.processes import ALONE, Processes
from transcoder.entries import Entries

SAMPLE = 1 << 16
"""Values sampled to guess the cut: 65,536 of 19 M pre-activations. A full torch.topk costs 1.0 s."""
LANES = 8
"""Values that `_above` compares at a time."""
WIDTH_FACTORS = 2 * 3 * 5 * 7
"""Primes that divide usual widths."""


def kth_largest(values: Float[Tensor, " n"], k: int) -> Tensor:
    """The k-th largest of `values`, 1 <= k <= n, as a tensor without dimensions.

    >>> kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.)
    """
    if not values.is_cpu:  # kthvalue runs on one multiprocessor: 128,000 values 0.52 ms, sorted 0.08 (H100)
        return values.sort(descending=True).values[k - 1]
    return values.kthvalue(len(values) - k + 1).values


def candidates(values: Float[Tensor, " n"], k: int, peers: Processes = ALONE) -> Int[Tensor, " m"]:
    """Ascending positions of positive values, among them all that are at least the k-th largest positive one.

    A strided sample guesses a cut that about 1.25 k values exceed. If fewer than k do, a quarter of the guess is
    tried, then zero. So the result is right for any sample. k counts over all `peers`, which guess from all their
    samples together: a process that holds the latents of a coarse group has more of the large values than others.

    Here the sample is all four values, fewer than the 1.25 k + 8 that the guess needs. So the cut is 0:

    >>> candidates(torch.tensor([0.2, -1.0, 0.9, 0.5]), k=2).tolist()
    [0, 2, 3]
    """
    stride = _stride(len(values))
    sample = values[::stride]
    rank = math.ceil(1.25 * k / stride) + 8
    if peers.world > 1:
        sample = peers.gathered(sample.topk(min(rank, len(sample)), sorted=False).values.float())
    elif rank >= len(sample):
        return _above(values, values.new_zeros(()))
    guess = kth_largest(sample, min(rank, len(sample))).clamp_min(0)
    positions = _above(values, guess)
    for cut in (guess / 4, torch.zeros_like(guess)):
        if peers.count(len(positions)) >= k:  # sync: all processes must decide the same
            break
        positions = _above(values, cut)
    return positions


def _above(values: Tensor, cut: Tensor) -> Tensor:
    """Ascending positions of the values above `cut`.

    The values are viewed as LANES rows, so that column c holds positions c, c + width, c + 2 width, ... . The largest
    of each column is compared first; only columns with a large value are searched. 19 M values, 0.6 % of them above:
    28 ms against 33 for (values > cut).nonzero(), on two threads 16 against 28, because nonzero() runs on one.

    18 values are 8 lanes of width 2 and a rest of 2. Only column 1 (positions 1, 3, ..., 15) has a value above 0.5:

    >>> values = torch.zeros(18)
    >>> values[torch.tensor([3, 9, 17])] = 1.0
    >>> _above(values, torch.tensor(0.5))
    tensor([ 3,  9, 17])
    """
    if not values.is_cpu:
        return (values > cut).nonzero().squeeze(1)  # sync: how many values
    width = len(values) // LANES
    lanes, rest = values[: LANES * width].view(LANES, width), values[LANES * width :]
    empty = lanes.new_zeros(0, dtype=torch.int64)
    columns = (lanes.amax(0) > cut).nonzero().squeeze(1) if width else empty  # sync: how many columns
    lane, column = (lanes[:, columns] > cut).nonzero(as_tuple=True)  # sync: how many values
    last = (rest > cut).nonzero().squeeze(1)  # sync: how many values
    return torch.cat([lane * width + columns[column], last + LANES * width])


def _stride(n: int) -> int:
    """A step that shares no factor with usual widths, so that the sample covers all columns.

    19 M values of width 18,432 and 65,536 samples: a step of 288 = 2^5 * 9 would meet only the 64 columns it divides.

    >>> _stride(1024 * 18432), _stride(1000)
    (289, 1)
    """
    step = n // SAMPLE
    return 1 if step < 2 else next(s for s in count(step) if math.gcd(s, WIDTH_FACTORS) == 1)


Values = Callable[[Tensor], Tensor]
"""Positions -> their pre-activations, computed again in float32."""


def select_batch(
    pre: Float[Tensor, "B F"], k: int, exact: Values | None = None, mesh: Mesh = ONE
) -> tuple[Entries, Tensor]:
    """Batch top-k (Bussmann et al. 2024): every positive pre-activation at least as large as the (k*B)-th largest.

    All ties at the cut stay (on a GPU only the first ones). Also returns the cut, 0 when there are fewer positive
    values.
    With `exact`, `pre` only proposes candidates; they are ranked by their exact values.
    `pre` has the rows and latents of this process; the other processes of the `mesh` have the rest of the batch.

    k = 1 and two rows: the two largest of all, which here lie in one row.

    >>> entries, cut = select_batch(torch.tensor([[0.9, 0.1, 0.8], [0.2, -1.0, 0.3]]), k=1)
    >>> entries.rows.tolist(), entries.latents.tolist(), float(cut)
    ([0, 0], [0, 2], 0.800000011920929)
    """
    if pre.is_cpu or mesh.everyone.world > 1 or exact is not None:
        positions, values, cut = _ranked(pre, k, exact, mesh)
        kept = ((values >= cut) & (values > 0)).nonzero().squeeze(1)  # sync: how many values
    else:  # the first n of the ranking: to count the values above the cut, the host would wait
        n = k * len(pre)
        positions = candidates(pre.view(-1), n)
        values = pre.view(-1)[positions]
        ranked = values.sort(descending=True, stable=True)
        kept = ranked.indices[:n].sort().values
        cut = ranked.values[n - 1] if len(values) >= n else values.new_zeros(())
    return _entries(positions[kept], values[kept], pre), cut


def batch_cut(pre: Float[Tensor, "B F"], k: int, mesh: Mesh = ONE) -> Float[Tensor, ""]:
    """The cut of `select_batch` alone; without the entries the host waits once less."""
    return _ranked(pre, k, None, mesh)[2]


def _ranked(pre: Tensor, k: int, exact: Values | None, mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """(positions of the candidates, their values, the (k*B)-th largest value over the whole mesh or 0)."""
    n = k * len(pre) * mesh.rows.world
    positions = candidates(pre.view(-1), n, mesh.everyone)
    values = pre.view(-1)[positions] if exact is None else exact(positions)
    everyones = mesh.everyone.gathered(values)
    cut = kth_largest(everyones, n).clamp_min(0) if len(everyones) >= n else values.new_zeros(())
    return positions, values, cut


def select_rows(
    pre: Float[Tensor, "B F"], k: int, exact: Values | None = None, mesh: Mesh = ONE
) -> tuple[Entries, Tensor]:
    """Per-row top-k (Gao et al. 2024): in each row every positive value at least as large as its k-th largest.

    Ties stay. The returned cut is the smallest value kept, 0 when nothing is.
    With `exact`, `pre` selects, and the values are exact.

    >>> entries, cut = select_rows(torch.tensor([[0.9, 0.1, 0.8], [0.25, -1.0, -2.0]]), k=1)
    >>> entries.rows.tolist(), entries.latents.tolist(), float(cut)
    ([0, 1], [0, 0], 0.25)
    """
    cut = row_cuts(pre, k, mesh)
    positions = ((pre >= cut) & (pre > 0)).view(-1).nonzero().squeeze(1)  # sync: how many values
    values = pre.view(-1)[positions] if exact is None else exact(positions)
    if exact is not None:
        kept = (values > 0).nonzero().squeeze(1)  # sync: how many values
        positions, values = positions[kept], values[kept]
    entries = _entries(positions, values, pre)
    everyones = mesh.everyone.gathered(entries.values)
    return entries, everyones.min() if len(everyones) else values.new_zeros(())


def row_cuts(pre: Float[Tensor, "B F"], k: int, mesh: Mesh = ONE) -> Float[Tensor, "B 1"]:
    """The k-th largest value of each row, over all latents of the `mesh`; the smallest if there are fewer than k."""
    top = pre.topk(min(k, pre.shape[1]), dim=1).values
    if mesh.latents.world > 1:
        padded = torch.nn.functional.pad(top, (0, k - top.shape[1]), value=-torch.inf)
        top = mesh.latents.stacked(padded).transpose(0, 1).flatten(1).topk(k, dim=1).values
    return top[:, -1:]


SELECT = {"batch_topk": select_batch, "topk": select_rows}
CUTS = {"batch_topk": batch_cut, "topk": row_cuts}
"""The cuts of the same rules, one for all rows [] or one per row [B, 1], for the step that keeps whole matrices."""


def _entries(positions: Tensor, values: Tensor, pre: Tensor) -> Entries:
    """The entries at some positions of [B, F].

    >>> _entries(torch.tensor([0, 5]), torch.tensor([0.9, 0.3]), pre=torch.ones(2, 3))  # position 5 = 1 * 3 + 2
    Entries(rows=tensor([0, 1]), latents=tensor([0, 2]), values=tensor([0.9000, 0.3000]), n_rows=2)
    """
    n_rows, width = pre.shape
    rows = positions.div(width, rounding_mode="floor")
    return Entries(rows, positions.sub(rows, alpha=width), values, n_rows)
