"""The processes of a training as a mesh, rows x latents: each has some of the rows and some of the latents.

Row r of the mesh are the processes that see the same rows; together they hold all latents. Ranks count along the
latents first, so that these processes, which exchange the most in a step, are on one machine where one is large enough.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import init_device_mesh

from common.errors import InputError
from common.processes import ALONE, Processes


@dataclass(frozen=True)
class Mesh:
    """This process's place in the mesh. Alone it is all three."""

    everyone: Processes = ALONE
    rows: Processes = ALONE
    """Those that hold this process's latents: each sees other rows."""
    latents: Processes = ALONE
    """Those that see this process's rows: each holds other latents."""

    def part(self, d_sae: int) -> slice:
        """The latents that this process holds of `d_sae`."""
        n, i = self.latents.world, self.latents.rank
        return slice(d_sae * i // n, d_sae * (i + 1) // n)


ONE = Mesh()


def row_shards(world: int, latent_shards: int) -> int:
    """How many processes share the rows. Raises `InputError` where the processes do not make a mesh."""
    if world % latent_shards:
        raise InputError(
            f"train.latent_shards: expected a divisor of the number of processes, which is {world}, found "
            f"{latent_shards}; give NPROC={latent_shards} or a multiple of it"
        )
    return world // latent_shards


def mesh_of(everyone: Processes, latent_shards: int) -> Mesh:
    """The mesh of these processes, called by all of them. Raises `InputError` as `row_shards` does."""
    shape = row_shards(everyone.world, latent_shards), latent_shards
    if latent_shards == 1:
        return Mesh(everyone, everyone)
    grid = init_device_mesh(everyone.device.type, shape, mesh_dim_names=("rows", "latents"))
    rows, latents = (
        Processes(grid.get_local_rank(name), size, everyone.device, grid.get_group(name))
        for name, size in zip(("rows", "latents"), shape, strict=True)
    )
    return Mesh(everyone, rows, latents)
