"""Several processes that work as one, on one machine or on many: JAX's own distributed runtime.

Every process runs the same program on the same configuration and draws the same cohorts. It reads
the data of the clients on its own devices only; the sums over clients are the one thing that the
processes exchange. Process 0, the *leader*, writes the work directory, which all can read.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedasr.errors import UserError

# Seconds after which the others give up on a process that says nothing any more.
HEARTBEAT_SECONDS = 20
_JOIN_SECONDS = 300
NOT_FOUND = (
    f"the processes did not find each other within {_JOIN_SECONDS} s: start all of them, with the "
    "same coordinator, whose port every host can reach"
)
_WAIT_SECONDS = 24 * 3600  # while the leader prepares data


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes; to be called before anything uses a device.

    A process that dies takes the others with it, within `HEARTBEAT_SECONDS` or little more: the
    same commands again go on from the last checkpoint.

    Args:
      coordinator: "host:port" of process 0, free to listen on there; None where JAX finds out by
        itself (Cloud TPU, Slurm, Open MPI), and then for the others, too.
      processes: how many there are.
      process: which this is, from 0.

    Raises:
      UserError: for a number out of range, or if the processes do not find each other.
    """
    if coordinator is not None and not (processes and process is not None):
        raise UserError("a coordinator needs the number of processes and which this is")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: they are counted from 0")
    # It would take SIGTERM for itself, from `fedasr.training.interrupts` and from Python.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{NOT_FOUND} ({error})") from error


def is_leader() -> bool:
    """Whether this process writes the work directory."""
    return jax.process_index() == 0


def process_rows(mesh: Mesh, rows: int) -> slice:
    """Which of a chunk's rows are on this process's devices.

    Args:
      mesh: whose first axis is the clients'.
      rows: of a chunk, a multiple of that axis's size.

    Raises:
      UserError: this process has no device in the mesh, or its devices are not side by side.
    """
    me = jax.process_index()
    lanes = mesh.devices.reshape(len(mesh.devices), -1)
    own = [i for i, lane in enumerate(lanes) if lane[0].process_index == me]
    if not own or own != list(range(own[0], own[-1] + 1)):
        raise UserError(f"process {me} has the devices {own} of the mesh: it needs neighbours")
    each = rows // len(lanes)
    return slice(own[0] * each, (own[-1] + 1) * each)


def transfer(tree: Any, sharding: Any) -> Any:
    """Puts a pytree that every process holds whole, and alike, on the devices of all.

    Args:
      tree: of arrays. sharding: of all of them, or in one process a tree of shardings.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def transfer_rows(tree: Any, sharding: NamedSharding) -> Any:
    """Puts a pytree whose arrays hold this process's rows (see `process_rows`) on the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def transfer_key(key: Any, sharding: NamedSharding) -> Any:
    """Puts a JAX key, which every process has alike, on the devices of all."""
    if sharding.is_fully_addressable:
        return key
    return jax.random.wrap_key_data(transfer(jax.random.key_data(key), sharding))


def everybodys(rows: Any) -> np.ndarray:
    """The rows of all processes, in the order of a chunk; all must ask.

    Args:
      rows: of this process's part of a chunk; or a whole one's, divided over the devices of all.
    """
    if jax.process_count() == 1:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def on_host(tree: Any) -> Any:
    """Numpy copies of arrays that are replicated over the devices of all processes."""
    return jax.tree.map(np.asarray, tree)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def smallest(value: int) -> int:
    """The smallest of the processes' numbers; all must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(value, np.float64)).min())


def wait_for_all(name: str) -> None:
    """Returns when every process has got here; `name` must be the same in all."""
    if jax.process_count() > 1:
        # Not a collective of the devices: those give up on a process that is half a minute late.
        from jax._src import distributed

        milliseconds = 1000 * _WAIT_SECONDS
        client: Any = distributed.global_state.client  # there is one: processes are connected
        client.wait_at_barrier(f"fedasr {name}", milliseconds)


def connect() -> None:
    """Lets the devices of all processes find each other, while the processes are in step."""
    if jax.process_count() > 1:
        mesh = Mesh(np.asarray(jax.devices()), ("all",))
        ones = transfer(np.ones(mesh.size), NamedSharding(mesh, PartitionSpec("all")))
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        total(ones).block_until_ready()


def check_alike(what: str, value: str) -> None:
    """Raises UserError in every process unless all have the same string.

    Args:
      what: for the message. value: in this process.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        if (multihost_utils.process_allgather(digest) != digest).any():
            raise UserError(f"the processes differ in their {what}: give all the same command")


def leaders(tree: Any) -> Any:
    """The leader's values of a pytree of arrays, in every process."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)
