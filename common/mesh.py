"""The processes of a training as a mesh, rows x latents: each process has some of the rows and some of the latents.

The processes in one row of the mesh see the same rows of the batch; together they hold all latents. They exchange the
most in a step. So ranks count along the latents first, which puts these processes on one machine where it has enough.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import init_device_mesh

from common.errors import InputError
from common.processes import ALONE, Processes


@dataclass(frozen=True)
class Mesh:
    """This process's place in the mesh. A single process is alone in all three."""

    everyone: Processes = ALONE
    rows: Processes = ALONE
    """The processes that hold the same latents as this one; each sees different rows."""
    latents: Processes = ALONE
    """The processes that see the same rows as this one; each holds different latents. Elsewhere: the `holders`."""

    def part(self, d_sae: int) -> slice:
        """The slice of the `d_sae` latents that this process holds."""
        n, i = self.latents.world, self.latents.rank
        return slice(d_sae * i // n, d_sae * (i + 1) // n)


ONE = Mesh()


def row_shards(world: int, latent_shards: int) -> int:
    """The number of processes that share the rows. Raises `InputError` if `latent_shards` does not divide `world`."""
    if world % latent_shards:
        raise InputError(
            f"train.latent_shards: expected a divisor of the number of processes ({world}), found "
            f"{latent_shards}; give NPROC={latent_shards} or a multiple of it"
        )
    return world // latent_shards


def mesh_of(everyone: Processes, latent_shards: int) -> Mesh:
    """The mesh of these processes; all of them call it. Raises `InputError` as `row_shards` does."""
    shape = row_shards(everyone.world, latent_shards), latent_shards
    if latent_shards == 1:
        return Mesh(everyone, everyone)
    grid = init_device_mesh(everyone.device.type, shape, mesh_dim_names=("rows", "latents"))
    rows, latents = (
        Processes(grid.get_local_rank(name), size, everyone.device, grid.get_group(name))
        for name, size in zip(("rows", "latents"), shape, strict=True)
    )
    return Mesh(everyone, rows, latents)
