"""What a simulation runs on."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.cohort import AXIS, client_mesh
from fedasr.kernels.devices import kind_of
from fedasr.kernels.trial import refuse_kernels, try_kernels


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices, and how clients are laid over them; no result depends on it beyond float order.

    Attributes:
      devices: None for all devices, of all processes (see `fedasr.federated.hosts`); each works on
        a part of every chunk.
      model_devices: so many neighbouring devices train a client together, for models that do not
        fit on one: each holds a part of every matrix that has an axis to divide, and of what the
        server and the sum keep of it. Above 1 in one process only.
      chunk: clients vmapped together on a device; 0 for the whole cohort. On a CPU 1 is fastest.
      stacked_blocks: whether programs hold the parameters of like blocks as one array each where
        nothing asks for them singly (see `fedasr.stacks`). The algorithm's loss must take either,
        and optimisers that look at the norm of an array must be of
        `fedasr.federated.server.make_optimizer`, or of `by_block` there.

    Raises:
      UserError: for numbers out of range, or devices that cannot be grouped so.
    """

    devices: Sequence[jax.Device] | None = None
    model_devices: int = 1
    chunk: int = 1
    stacked_blocks: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise UserError(f"chunk must be at least 1, or 0 for all (got {self.chunk})")
        if self.model_devices < 1:
            raise UserError(f"model_devices must be at least 1 (got {self.model_devices})")
        if self.devices is not None:
            self.mesh()
        if self.model_devices > 1 and jax.process_count() > 1:
            raise UserError("model_devices above 1 needs all devices in one process")

    def mesh(self) -> Mesh:
        """The devices by client; see `fedasr.federated.cohort.client_mesh`."""
        return client_mesh(self.devices, self.model_devices)

    def tried_mesh(self) -> Mesh:
        """`mesh`, of devices whose own kernels were tried: see `fedasr.kernels.trial`."""
        mesh, here = self.mesh(), set(jax.local_devices())
        own = [device for device in mesh.devices.flat if device in here]
        if own and kind_of(own[0]):
            reason = try_kernels(own[0])
            if hosts.any_process(bool(reason)):  # all have the same program
                refuse_kernels(own[0], reason or "it fails or differs in another process")
        return mesh

    def clients_at_once(self, mesh: Mesh, slots: int) -> int:
        """Clients of a chunk on each group of devices.

        Args:
          mesh: from `mesh`. slots: places for clients in a round.
        """
        return self.chunk or -(-slots // mesh.shape[AXIS])
