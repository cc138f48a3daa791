"""The training step on the active entries only: the same gradients as train/step/dense.py.

Shapes: B rows, D_in, D_out, F latents, G groups, E active entries (about K*B), N dead latents.
A bag is one (row, group) pair, numbered row * G + group. Entries are sorted by row, then latent,
so each bag's entries lie together. S [B*G, D_out] is the loss's gradient by each bag's part of
the reconstruction: S_g = 2 / (B D_out) * sum over h >= g of w_h (y_h - y).

The nested loss is that of Matryoshka SAEs (Bussmann et al. 2025, arXiv:2503.17547). Here the G
reconstructions are one running sum per row, not G decodes.

A line marked `sync` makes the host wait for the device, because its result decides a shape or a branch.
tests/train/step/test_syncs.py finds every such line of a step.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from common.device import constant
from common.mesh import ONE, Mesh
from common.processes import ALONE, Processes
from train.step.gradients import Block, Gradients
from train.step.losses import Objective, StepValues, nested_loss, weighted
from transcoder.entries import Entries
from transcoder.selection import SELECT, row_cuts
from transcoder.transcoder import Parameters

ROWS = 128
"""Rows decoded at a time on a CPU: at D_out 2,304 and 4 groups a block of S is 4.7 MB and stays in the cache."""
LATENTS = 512
"""Latents whose gradients are computed at a time on a CPU: 4.7 MB per matrix at width 2,304. A GPU takes all rows and
all latents at once: each block costs launches (H100, docs/gpu.md: 25 ms a step in such blocks, 9 in one)."""

DeadGradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Buffers:
    """Large tensors that outlive a step: a fresh one of [F, D] costs 0.1 s. The runs of a sweep share them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def get(
        self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor on the device of `like`. Its content is arbitrary."""
        key = (name, tuple(shape), dtype or like.dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty(shape, dtype=key[2], device=like.device)
        return self._kept[key]


class SparseStep:
    """Forward and backward with one dense product, the encoder's."""

    def __init__(self, objective: Objective, mesh: Mesh = ONE, buffers: Buffers | None = None) -> None:
        self.objective, self.mesh = objective, mesh
        self._buffers = buffers or Buffers()

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
        objective, mesh = self.objective, self.mesh
        pre = self._encode(parameters, x)
        entries, cut = self._select(parameters, x, pre, k)
        bags = Bags.of(entries, objective.prefix_ends, len(x))
        n_dead = mesh.latents.count(len(dead))  # sync: how many are dead
        wants_aux = n_dead > 0 and objective.aux_k > 0 and objective.aux_coefficient > 0
        residual = self._buffers.get("residual", y.shape, y) if wants_aux else None
        S = self._buffers.get("S", (len(x) * bags.groups, y.shape[1]), y)
        n_values = y.numel() * mesh.rows.world
        scale = [2 * weight / n_values for weight in objective.prefix_weights]
        errors = _decode(parameters, x, y, bags, scale, S, residual, weights, mesh.latents)
        squared_errors = mesh.rows.total(errors)
        l2 = nested_loss(squared_errors, objective.prefix_weights, n_values)

        aux, dead_gradients = l2.new_zeros(()), None
        if residual is not None:
            dead_pre = _dead(parameters, x, pre, dead)
            aux, dead_gradients = aux_gradients(
                parameters, dead_pre, x, residual, dead, objective, n_dead, mesh, weights
            )
        S_first = S.view(len(x), bags.groups, -1)[:, 0]
        shared = {"b_dec": S_first.sum(0)}
        if parameters.W_skip is not None:
            shared["W_skip"] = S_first.T @ x
        entries_of = bags.by_latent(objective.d_sae)
        blocks = partial(_blocks, entries_of, parameters.W_dec, x, S, dead, dead_gradients)
        fired = entries_of.offsets.diff()
        values = StepValues(squared_errors, l2, aux, fired, lambda: entries, cut, n_dead)
        return values, Gradients(shared, blocks)

    def _encode(self, parameters: Parameters, x: Tensor) -> Tensor:
        """[B, F] pre-activations: the one dense product, in the objective's precision."""
        W_enc, b_enc = parameters.W_enc, parameters.b_enc
        if self.objective.precision == "bfloat16":
            W_enc = self._buffers.get("W_enc", W_enc.shape, W_enc, torch.bfloat16).copy_(W_enc)
            b_enc, x = b_enc.bfloat16(), x.bfloat16()
        pre = self._buffers.get("pre", (len(x), self.objective.d_sae), W_enc, W_enc.dtype)
        return torch.addmm(b_enc, x, W_enc.T, out=pre)

    def _select(self, parameters: Parameters, x: Tensor, pre: Tensor, k: int) -> tuple[Entries, Tensor]:
        """The active entries, and the cut.

        In bfloat16 the product only proposes entries. Their values are computed again in float32, because
        bfloat16 ties (231 of 32,768 values were equal to the cut).
        """
        exact = None if pre.dtype == x.dtype else partial(_pre_activations, parameters, x)
        return SELECT[self.objective.selection](pre, k, exact, self.mesh)


def _dead(parameters: Parameters, x: Tensor, pre: Tensor, dead: Tensor) -> Tensor:
    """[B, N] pre-activations of the dead latents in the precision of `x`, taken from the dense product if it has it."""
    if pre.dtype == x.dtype:
        return pre[:, dead]
    return torch.addmm(parameters.b_enc[dead], x, parameters.W_enc[dead].T)


def _pre_activations(parameters: Parameters, x: Tensor, positions: Tensor) -> Tensor:
    """[E] pre-activations at ascending positions of the flattened [B, F].

    >>> W_enc, x = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[2.0], [3.0]])
    >>> parameters = Parameters(W_enc, torch.tensor([0.0, 0.5, 0.0]), torch.ones(3, 1), torch.zeros(1))
    >>> _pre_activations(parameters, x, torch.tensor([1, 5]))  # 1 = (row 0, latent 1), 5 = (row 1, latent 2)
    tensor([ 20.5000, 300.0000])
    """
    d_sae = len(parameters.b_enc)
    # row = position // F, latent = position % F
    rows = positions.div(d_sae, rounding_mode="floor")
    latents = (positions - rows * d_sae).int()
    return _products(x, parameters.W_enc, rows.int(), latents) + parameters.b_enc[latents]


class Bags(NamedTuple):
    """Active entries sorted by row, with the bag of each.

    Two rows, two groups (latents 0 to 1 and 2 to 4), three active entries:

    >>> entries = Entries(
    ...     torch.tensor([0, 0, 1]), torch.tensor([1, 4, 3]), torch.tensor([0.5, 0.2, 0.7]), n_rows=2
    ... )
    >>> bags = Bags.of(entries, prefix_ends=(2, 5), n_rows=2)
    >>> bags.bag.tolist()  # row * 2 + group
    [0, 1, 3]
    >>> bags.offsets.tolist()  # bag 2, the first group of row 1, is empty: entries [2, 2)
    [0, 1, 2, 2, 3]
    """

    latents: Tensor
    """[E] int32."""
    values: Tensor
    """[E] activations."""
    bag: Tensor
    """[E] int32, non-decreasing."""
    offsets: Tensor
    """[B*G + 1] int32: entries of bag i are [offsets[i], offsets[i + 1])."""
    groups: int

    @classmethod
    def of(cls, entries: Entries, prefix_ends: tuple[int, ...], n_rows: int) -> "Bags":
        """The bags of `n_rows` rows."""
        groups = len(prefix_ends)
        ends = constant(prefix_ends, torch.int64, entries.rows.device)
        # right=True: a latent equal to an end is the first of the next group
        bag = torch.bucketize(entries.latents, ends, right=True).add_(entries.rows, alpha=groups).int()
        first = torch.arange(n_rows * groups + 1, device=bag.device, dtype=torch.int32)
        offsets = torch.searchsorted(bag, first, out_int32=True)
        return cls(entries.latents.int(), entries.values, bag, offsets, groups)

    def by_latent(self, d_sae: int) -> "LatentEntries":
        """The same entries sorted by latent, then row.

        >>> bags = Bags(torch.tensor([1, 4, 3, 4]), torch.ones(4), torch.tensor([0, 1, 3, 3]), torch.zeros(5), 2)
        >>> entries = bags.by_latent(d_sae=5)
        >>> entries.latents.tolist(), entries.rows.tolist(), entries.bag.tolist()
        ([1, 3, 4, 4], [0, 1, 0, 1], [0, 3, 1, 3])
        >>> entries.offsets.tolist()  # latents 0 and 2 have no entry, latent 4 has [2, 4)
        [0, 0, 1, 1, 2, 4]
        """
        # stable: the entries of a latent stay sorted by row
        latents, order = self.latents.sort(stable=True)
        first = torch.arange(d_sae + 1, device=latents.device, dtype=torch.int32)
        offsets = torch.searchsorted(latents, first, out_int32=True)
        bag = self.bag[order]
        rows = bag.div(self.groups, rounding_mode="floor")
        return LatentEntries(latents, rows, bag, self.values[order], offsets)


class LatentEntries(NamedTuple):
    """Active entries sorted by latent, then row."""

    latents: Tensor
    rows: Tensor
    bag: Tensor
    values: Tensor
    offsets: Tensor
    """[F + 1] int32: entries of latent f are [offsets[f], offsets[f + 1])."""


def _decode(
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    bags: Bags,
    scale: list[float],
    S: Tensor,
    residual: Tensor | None,
    weights: Tensor | None = None,
    holders: Processes = ALONE,
) -> Tensor:
    """Reconstruct every prefix, ROWS rows at a time. Fills S, and `residual` = y - y_G unless it is None.

    `scale` [G] is each prefix's share of S: 2 w_g / (B D_out). Returns the squared error of each prefix [G] float64. A
    row's part of both is multiplied by its weight. If several `holders` share the latents, each decodes its own for
    every group, and one sum of [B, G, D_out] over the holders adds them up.

    One row, y = 10, no bias. Latent 0 (group 0) adds 3, latent 1 (group 1) adds 4:

    >>> parameters = Parameters(torch.ones(2, 1), torch.zeros(2), torch.ones(2, 1), torch.zeros(1))
    >>> entries = Entries(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3.0, 4.0]), n_rows=1)
    >>> x, y, S = torch.ones(1, 1), torch.tensor([[10.0]]), torch.empty(2, 1)
    >>> _decode(parameters, x, y, Bags.of(entries, (1, 2), 1), [1.0, 10.0], S, None)  # (3 - 10)^2, (7 - 10)^2
    tensor([49.,  9.], dtype=torch.float64)
    >>> S.tolist()  # S_1 = 10 * (7 - 10), S_0 = S_1 + 1 * (3 - 10)
    [[-37.0], [-30.0]]
    """
    (n, d_out), groups = y.shape, bags.groups
    target = y - parameters.b_dec
    if parameters.W_skip is not None:
        target.addmm_(x, parameters.W_skip.T, alpha=-1)
    squared_errors = torch.zeros(groups, dtype=torch.float64, device=y.device)
    by_row = S.view(n, groups, d_out)
    for rows, r in _by_group(parameters, target, bags, S, holders):
        s = by_row[rows]
        # r[:, g] becomes y_g - y: the running sum over groups, which starts at b_dec + skip - y
        for g in range(1, groups):
            r[:, g].add_(r[:, g - 1])
        if residual is not None:
            torch.neg(r[:, -1], out=residual[rows])
        errors = torch.linalg.vector_norm(r, dim=2).double().square()
        if weights is not None:
            errors *= weights[rows, None]
            r *= weights[rows, None, None]
        squared_errors += errors.sum(0)
        # S_g = scale_g (y_g - y) + S_(g + 1): a running sum from the last group down
        torch.mul(r[:, -1], scale[-1], out=s[:, -1])
        for g in range(groups - 2, -1, -1):
            torch.add(s[:, g + 1], r[:, g], alpha=scale[g], out=s[:, g])
    return squared_errors


def _by_group(
    parameters: Parameters, target: Tensor, bags: Bags, S: Tensor, holders: Processes
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which rows, [rows, G, D_out] what each group's latents add), ROWS rows at a time; the first group's is
    less `target`. With several holders this is the sum over them, which is made in S.
    """
    (n, d_out), groups = target.shape, bags.groups
    size = ROWS if target.is_cpu else n
    blocks = [slice(row, min(row + size, n)) for row in range(0, n, size)]
    # Block i has the entries [bounds[i], bounds[i + 1]): every size * groups-th offset begins one.
    bounds = _bounds(bags.offsets, size * groups, len(bags.values))
    by_row = S.view(n, groups, d_out)
    for i, rows in enumerate(blocks):
        entries = slice(bounds[i], bounds[i + 1])
        offsets = _from(bags.offsets[rows.start * groups : rows.stop * groups + 1], bounds[i])
        latents = bags.latents[entries]
        r = _sums(parameters.W_dec, latents, offsets, bags.values[entries]).view(-1, groups, d_out)
        if holders.leads:
            r[:, 0].sub_(target[rows])  # with -= Python would assign the slice to itself: a copy
        if holders.world == 1:
            yield rows, r
        else:
            by_row[rows] = r
    if holders.world > 1:
        holders.total(S)
        yield from ((rows, by_row[rows]) for rows in blocks)


def _bounds(offsets: Tensor, size: int, n_entries: int) -> list[int]:
    """First entry of every block of `size` bags, and the number of entries.

    >>> _bounds(torch.tensor([0, 2, 2, 5, 9]), size=2, n_entries=9)
    [0, 2, 9]
    """
    if len(offsets) - 1 <= size:
        return [0, n_entries]
    return [*offsets[:-1:size].tolist(), n_entries]  # sync: on a GPU there is one block


def _from(numbers: Tensor, start: int) -> Tensor:
    """The numbers counted from `start`; as they are where that is 0, which on a GPU is everywhere."""
    return numbers - start if start else numbers


def aux_gradients(
    parameters: Parameters,
    pre: Tensor,
    x: Tensor,
    residual: Tensor,
    dead: Tensor,
    objective: Objective,
    n_dead: int,
    mesh: Mesh = ONE,
    weights: Tensor | None = None,
) -> tuple[Tensor, DeadGradients]:
    """`aux_loss` (Gao et al. 2024) on the dead latents' pre-activations [B, N], and its gradients by their rows.

    `dead` are those of the `n_dead` dead latents that this process holds; the reconstruction is that of all `n_dead`.

    With z their activations, W their decoder rows and d = z W - residual: loss = c |d|^2, dW_dec = 2c z^T d,
    dz = 2c d W^T where z > 0, dW_enc = dz^T x. Four products instead of autograd's five: `pre` is known already.
    With weights of the rows, d and the residual are multiplied by their roots, and dz by the root again.
    """
    z, W_dec = _strongest(pre, objective.aux_k, n_dead, mesh), parameters.W_dec[dead]
    root = None if weights is None else weights.sqrt()
    # only one of the holders subtracts the residual
    difference = mesh.latents.total(torch.addmm(residual, z, W_dec, beta=-1 if mesh.latents.leads else 0))
    d = weighted(difference, root)
    size = mesh.rows.total(weighted(residual, root).square().sum())
    share = objective.aux_coefficient * min(1.0, n_dead / objective.aux_k)
    c = torch.where(size > 0, share / size, 0.0)
    loss = c * d.flatten().dot(d.flatten())  # vector_norm of so many is off by 1e-5
    twice, d = 2 * c, weighted(d, root)
    d_pre = (d @ W_dec.T).mul_(twice).masked_fill_(z == 0, 0.0)
    d_dec = (z.T @ d).mul_(twice)
    return mesh.rows.total(loss.double()), (d_pre.T @ x, d_pre.sum(0), d_dec, (d_dec * W_dec).sum(1))


def _strongest(pre: Tensor, k: int, n: int, mesh: Mesh = ONE) -> Tensor:
    """The k largest of each row of relu(pre) [B, N], zero elsewhere. Only rows with more than k positive
    values are searched. The largest are among `n` columns: this process has N of them, other processes of the `mesh`
    have the rest.

    >>> _strongest(torch.tensor([[3.0, -1.0, 5.0], [2.0, -4.0, -1.0]]), k=1, n=3)  # row 1 has one positive value
    tensor([[0., 0., 5.],
            [2., 0., 0.]])
    """
    z = torch.relu(pre)
    if mesh.latents.world > 1:
        return z if k >= n else z.masked_fill_(z < row_cuts(z, k, mesh), 0.0)
    if not z.is_cpu:  # all rows: to search costs less than to wait
        if k >= z.shape[1]:
            return z
        top = z.topk(k, dim=1)
        return torch.zeros_like(z).scatter_(1, top.indices, top.values)
    crowded = ((z > 0).sum(1) > k).nonzero().squeeze(1)  # sync: how many rows are searched
    if len(crowded):
        top = z[crowded].topk(k, dim=1)
        z[crowded] = torch.zeros_like(z[crowded]).scatter_(1, top.indices, top.values)
    return z


def _blocks(
    entries: LatentEntries,
    W_dec: Tensor,
    x: Tensor,
    S: Tensor,
    dead: Tensor,
    dead_gradients: DeadGradients | None,
) -> Iterator[Block]:
    """LATENTS latents at a time: d_acts = S W_dec^T at the entries, dW_dec = acts^T S, dW_enc = d_acts^T x.

    By latents, d_acts gathers from S; by rows it would gather from W_dec, which is larger (0.048 against 0.063 s).
    The auxiliary loss's gradients are added to those of the dead latents.

    Two latents, of which latent 0 has one entry: row 0, bag 0, activation 2. Its decoder row is 1, x is 5, S is 3:

    >>> zero, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    >>> entries = LatentEntries(zero, zero, zero, torch.tensor([2.0]), ends)
    >>> W_dec, x, S, none = torch.ones(2, 1), torch.tensor([[5.0]]), torch.tensor([[3.0]]), torch.zeros(0).long()
    >>> (block,) = _blocks(entries, W_dec, x, S, none, None)
    >>> block.b_enc.tolist(), block.W_enc.tolist(), block.W_dec.tolist()  # d_acts = 3 * 1; 3 * 5; 2 * 3
    ([3.0, 0.0], [[15.0], [0.0]], [[6.0], [0.0]])
    """
    d_sae = len(entries.offsets) - 1
    size = LATENTS if W_dec.is_cpu else d_sae
    starts = range(0, d_sae, size)
    # Block i has the entries [bounds[i], bounds[i + 1]) and the dead latents [dead_bounds[i], dead_bounds[i + 1]).
    bounds = _bounds(entries.offsets, size, len(entries.rows))
    dead_bounds = [0] * (len(starts) + 1)
    if dead_gradients is not None:
        edges = constant((*starts, d_sae), torch.int64, dead.device)
        dead_bounds = _bounds(torch.searchsorted(dead, edges), 1, len(dead))
    for i, start in enumerate(starts):
        stop, part = min(start + size, d_sae), slice(bounds[i], bounds[i + 1])
        offsets = _from(entries.offsets[start : stop + 1], bounds[i])
        latents, bag, values = _from(entries.latents[part], start), entries.bag[part], entries.values[part]
        d_acts = _products(W_dec[start:stop], S, latents, bag)
        block = Block(
            start,
            W_enc=_sums(x, entries.rows[part], offsets, d_acts),
            b_enc=_totals(d_acts, offsets),
            W_dec=_sums(S, bag, offsets, values),
            along=_totals(values * d_acts, offsets),
        )
        revived = slice(dead_bounds[i], dead_bounds[i + 1])
        if dead_gradients is not None and revived.start < revived.stop:
            for gradient, extra in zip(block[1:], dead_gradients, strict=True):
                gradient.index_add_(0, _from(dead[revived], start), extra[revived])
        yield block
        del block, d_acts  # the next block then takes the same memory: 0.99 against 1.03 s a step


def _sums(table: Tensor, index: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """[len(offsets) - 1, D]: sum over each bag's entries of factor * table[index].

    >>> table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    >>> _sums(table, torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3]), torch.tensor([1.0, 1.0, 5.0]))
    tensor([[  4.,  40.],
            [ 10., 100.]])
    """
    return embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
    )


def _totals(values: Tensor, offsets: Tensor) -> Tensor:
    """[len(offsets) - 1] sum of each bag's values, always in the same order: atomic additions would not be.

    >>> _totals(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 4.])
    """
    return torch.segment_reduce(values, "sum", offsets=offsets)


def _products(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[E] left[rows[i]] . right[columns[i]]: a sampled dense-dense product; indices int32, rows ascending.

    Autograd calls this private function for the per-sample weights of embedding_bag. torch.sparse.sampled_addmm takes
    1.4 times as long (98,304 products of width 2,304: 0.088 against 0.063 s on one thread). tests/test_private_torch.py
    says what to do when PyTorch changes it.

    >>> left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 0.0], [1.0, 1.0]])
    >>> rows, columns = torch.tensor([0, 1]).int(), torch.tensor([1, 0]).int()
    >>> _products(left, right, rows, columns)  # (1, 2).(1, 1) and (3, 4).(10, 0)
    tensor([ 3., 30.])
    """
    unused = rows.new_zeros(len(left))  # offsets: read only when rows are absent
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, columns, unused, rows, 0)
