"""The cohort's sum: clients of a chunk vmapped or in turns, chunks streamed, devices side by side.

The result is the same, up to the order of float additions, whatever the chunk size, the number of
devices, the order of the clients and the padding: a client's randomness comes from (round key,
user) alone and empty slots add exact zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedasr import stacks
from fedasr.data.batching import Chunk, Resident
from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate, Params, view_of_client
from fedasr.federated.local import LocalUpdate
from fedasr.kernels import devices
from fedasr.streams import Stream, fold

AXIS, MODEL = "clients", "model"  # of a mesh
_TOGETHER_BYTES = 1 << 20  # of an array, at most, to be summed over devices with others


class CohortSum(NamedTuple):
    """Sums over the clients of a round; the leaves of an accumulator have a leading device axis.

    delta: weighted sum of the clipped client updates, float32, shaped like the parameters; or the
      sum modulo 2^32 of what clients sent, int32 [n], where they encode.
    weight: float32, sum of the weights of valid clients.
    clients, steps, invalid: int32 scalars: clients that took part, their optimiser steps, and the
      clients whose update or weight was not finite (they contribute zero to `delta`).
    loss: float32, sum over valid clients of their mean training loss.
    norms, clipped: float32 [layers], sums over valid clients of the update norm before clipping
      and of the indicator that it was clipped.
    aux: sums of the loss's own scalars over all the steps of valid clients.
    """

    delta: Params
    weight: jax.Array
    clients: jax.Array
    steps: jax.Array
    invalid: jax.Array
    loss: jax.Array
    norms: jax.Array
    clipped: jax.Array
    aux: Any


@runtime_checkable
class Weigh(Protocol):
    """How much one client's update counts, decided on the device after clipping."""

    def __call__(self, params: Params, delta: Params, batches: Any, key: jax.Array) -> jax.Array:
        """The client's weight.

        It may look at nothing of the other clients: then a user still moves the sum of updates
        clipped to C by at most C.

        Args:
          params: the server's, as the client got them.
          delta: the clipped update, old minus new.
          batches: the client's own, see `fedasr.federated.client.ClientUpdate`.
          key: the client's own of this round, used for nothing else.

        Returns:
          A float scalar. It is clipped to [0, 1] before it multiplies the update; where it is not
          finite the client counts as invalid.
        """


@runtime_checkable
class Encode(Protocol):
    """From a client's clipped and weighted update to what it sends, noise included."""

    def __call__(self, delta: Params, rotation: jax.Array, key: jax.Array) -> jax.Array:
        """Integers whose sum modulo 2^32 the server can decode.

        Args:
          delta: float32, zeros of a client that is not valid.
          rotation: public key of the round. key: the client's own, used for nothing else.

        Returns:
          int32 [n].
        """


def rotation_key(round_key: jax.Array) -> jax.Array:
    """The public key of a round that clients and the server rotate updates with."""
    return fold(round_key, Stream.ROTATION)


def client_mesh(devices: Sequence[jax.Device] | None = None, model_devices: int = 1) -> Mesh:
    """A mesh over `devices` (default: those of all processes), by client.

    Args:
      devices: side by side, or in groups.
      model_devices: so many neighbours train a client together, each of which holds a part of
        every large array that is shaped like a parameter (`model_sharding`).

    Raises:
      UserError: the devices cannot be grouped so.
    """
    every = np.asarray(devices if devices is not None else jax.devices())
    if model_devices == 1:
        return Mesh(every, (AXIS,))
    if model_devices < 1 or every.size % model_devices:
        raise UserError(f"{every.size} devices cannot be grouped by model_devices={model_devices}")
    return Mesh(every.reshape(-1, model_devices), (AXIS, MODEL))


def client_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the clients of a chunk."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def model_sharding(mesh: Mesh, tree: Any, by_device: bool = False) -> Any:
    """Shardings of parameters, of what is shaped like them, and of all that lies beside them.

    Where a client has one device everything is whole on each. Where it has several, arrays with at
    least two axes are split over them along the longest axis that can be.

    Args:
      mesh: from `client_mesh`. tree: of arrays or their shapes.
      by_device: whether arrays have an axis of the clients' devices before their own.

    Returns:
      A `NamedSharding`, or a tree of such.
    """
    lead = (AXIS,) if by_device else ()
    parts = mesh.shape.get(MODEL, 1)
    if parts == 1:
        return NamedSharding(mesh, PartitionSpec(*lead))

    def one(x):
        own = x.shape[len(lead) :]
        axes = [i for i, size in enumerate(own) if size % parts == 0]
        spec: list[str | None] = [None] * len(own)
        if len(own) > 1 and axes:
            spec[max(axes, key=lambda i: own[i])] = MODEL
        return NamedSharding(mesh, PartitionSpec(*lead, *spec))

    return jax.tree.map(one, tree)


def settled(mesh: Mesh, tree: Any, by_device: bool = False) -> Any:
    """Within a compiled function: what comes out lies as `model_sharding` says.

    Else the compiler might choose another place, and the next call would compile again.
    """
    return jax.lax.with_sharding_constraint(tree, model_sharding(mesh, tree, by_device))


def _with_examples(batches: Any, resident: Resident | None) -> Any:
    """A client's batches with the corpus's examples, where the batches are of a resident corpus."""
    return batches if resident is None else batches._replace(**resident._asdict())


def _sums_over_devices(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums over the first axis. Small arrays go together: each sum is a meeting of all devices."""
    sums: list[Any] = [None] * len(leaves)
    small: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if x.nbytes > _TOGETHER_BYTES * x.shape[0]:
            sums[i] = jnp.sum(x, axis=0, dtype=x.dtype)
        else:
            small.setdefault(x.dtype, []).append(i)
    for places in small.values():
        flat = [leaves[i].reshape(leaves[i].shape[0], -1) for i in places]
        joined = jnp.sum(jnp.concatenate(flat, axis=1), axis=0, dtype=flat[0].dtype)
        ends = np.cumsum([x.shape[1] for x in flat])
        for i, part in zip(places, jnp.split(joined, ends[:-1]), strict=True):
            sums[i] = part.reshape(leaves[i].shape[1:])
    return sums


class Cohort(NamedTuple):
    """The jitted parts of a cohort's sum.

    zeros(params, chunk) -> accumulator; add(accumulator, params, chunk, round_key, round) ->
    accumulator (it is donated; one compilation per shape of chunk; `round`, an int32 scalar, is for
    schedules: all randomness comes from the key); total(accumulator) -> CohortSum without the
    device axis, its blocks stacked only if told `stacked=True`. With local parameters `add` returns
    (accumulator, float32 [clients, n], what the chunk's local parameters have become).
    ready(params) -> parameters for `zeros` and `add` as the program computes with them, once for
    all chunks; what is not ready they make so in each call.
    """

    zeros: Callable[[Params, Chunk], CohortSum]
    add: jax.stages.Wrapped
    total: Callable[..., CohortSum]
    ready: Callable[[Params], Params]


def make_cohort(
    client_update: ClientUpdate | LocalUpdate,
    clip: optax.GradientTransformation,
    mesh: Mesh,
    weigh: Weigh | None = None,
    local: bool = False,
    in_turns: bool = False,
    encode: Encode | None = None,
    stacked: bool = False,
) -> Cohort:
    """Builds the cohort's sum from a client update, the client-side clipping and the weights.

    A clipped update is multiplied by the client's `Chunk.weight` and by what `weigh` says. Both at
    most 1, no product exceeds the clip norm: multiplying by a factor up to 1 rounds to no larger
    float32.

    Args:
      client_update: see `fedasr.federated.client.ClientUpdate`.
      clip: its state after an update has the fields `norms` [layers], `clipped` [layers] and
        `finite` (see `fedasr.privacy.clipping.ClipState`).
      mesh: from `client_mesh`; a chunk's client axis must be a multiple of its clients' axis.
      weigh: see `Weigh`; None for 1.
      local: whether chunks hold local parameters and `client_update` is one that trains them. They
        are returned beside the sums and have no part in them. Those of empty slots and of clients
        that are not valid, or whose new ones are not finite, stay as they were.
      in_turns: each device trains its clients of a chunk one after another, not vmapped.
      encode: see `Encode`; None to send updates as they are.
      stacked: `client_update` and `clip` get parameters with stacked blocks where they can be
        (`fedasr.stacks`) but for `stacks.one_by_one`, and the accumulator has them; the total is as
        without. Not with local parameters, `weigh`, `encode` or several devices a client.
    """

    def one_client(
        params, batches, num_steps, weight, user, local_row, round_key, max_steps, round, view=None
    ):
        key = jax.random.fold_in(round_key, user)
        args = (batches if view is None else view, num_steps, key, max_steps, round)
        if local:
            delta, metrics, new = client_update(params, local_row, *args)
        else:
            delta, metrics = client_update(params, *args)
        delta, stats = clip.update(delta, clip.init(params))
        present, finite = num_steps > 0, stats.finite
        if weigh is not None:
            said = weigh(params, delta, batches, fold(key, Stream.WEIGHT))
            finite &= jnp.isfinite(said)
            weight = weight * jnp.clip(said.astype(jnp.float32), 0.0, 1.0)
        valid = present & finite

        def where_valid(x):
            return jnp.where(valid, x, jnp.zeros_like(x))

        delta = jax.tree.map(lambda d: where_valid(d.astype(jnp.float32) * weight), delta)
        if encode is not None:
            # Who is not valid sends nothing, with noise: it must not depend on what users have.
            sent = encode(delta, rotation_key(round_key), fold(key, Stream.SHARE))
            delta = jnp.where(present, sent, jnp.zeros_like(sent))
        sums = CohortSum(
            delta=delta,
            weight=where_valid(weight),
            clients=present.astype(jnp.int32),
            steps=num_steps,
            invalid=(present & ~finite).astype(jnp.int32),
            loss=where_valid(metrics.loss),
            norms=where_valid(stats.norms),
            clipped=where_valid(stats.clipped.astype(jnp.float32)),
            aux=jax.tree.map(where_valid, metrics.aux),
        )
        if local:
            local_row = jnp.where(valid & jnp.all(jnp.isfinite(new)), new, local_row)
        return sums, local_row

    def one_device(accumulator, params, chunk, round_key, round):
        params = _of_clients(_stacked(params, stacked))
        args = (chunk.batches, chunk.num_steps, chunk.weight, chunk.user, chunk.local)

        def with_examples(batches):
            return _with_examples(batches, chunk.resident)

        # A vmap of one would still turn every matrix product into a batched one. Without a common
        # bound of the loop no step has to be undone.
        def one_more(accumulator, row):
            batches, *client = jax.tree.map(lambda x: x[row], args)
            client = [with_examples(batches), *client]
            # Of the copy of the client's data that this makes, what is not used is left out.
            view = view_of_client(chunk.batches, row) if chunk.resident is None else None
            sums, local_row = one_client(params, *client, round_key, None, round, view)
            sums = _summed(sums, stacked)
            return jax.tree.map(lambda a, s: a + s[None], accumulator, sums), local_row

        if chunk.num_steps.shape[0] == 1:
            accumulator, local_row = one_more(accumulator, 0)
            local_row = jax.tree.map(lambda x: x[None], local_row)
        elif in_turns:

            def turn(i, carry):
                accumulator, local_row = carry
                accumulator, new = one_more(accumulator, i)
                return accumulator, jax.tree.map(lambda o, n: o.at[i].set(n), local_row, new)

            slots = 1 + jnp.arange(chunk.num_steps.shape[0])
            last = jnp.max(jnp.where(chunk.num_steps > 0, slots, 0))  # then come empty slots
            carry = (accumulator, chunk.local)
            accumulator, local_row = jax.lax.fori_loop(0, last, turn, carry)
        else:
            most = jnp.max(chunk.num_steps)

            def one(batches, *client):
                return one_client(params, with_examples(batches), *client, round_key, most, round)

            sums, local_row = jax.vmap(one)(*args)
            sums = _summed(jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype), sums), stacked)
            accumulator = jax.tree.map(lambda a, s: a + s[None], accumulator, sums)
        return (accumulator, local_row) if local else accumulator

    clients, whole = PartitionSpec(AXIS), PartitionSpec()
    of_chunk = Chunk._make([*[clients] * (len(Chunk._fields) - 1), whole])  # resident: whole
    # check_vma=False: a user's loss may hold loops whose carry it would want annotated. The
    # devices of one client, if there are several, are left to the compiler.
    sharded = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(clients, whole, of_chunk, whole, whole),
        out_specs=clients,
        check_vma=False,
        axis_names={AXIS},
    )

    return _jitted(one_client, sharded, mesh, local, stacked)


def _stacked(params: Params, wanted: bool, stack: Callable[..., Any] = stacks.stack) -> Params:
    return stack(params) if wanted and stacks.can_stack(params) else params


def _of_clients(params: Params) -> Params:
    """Parameters as clients compute with them on the device that is traced for."""
    if not stacks.is_stacked(params):
        return params
    single = stacks.one_by_one(devices.platform(), stacks.len_of(params))
    return stacks.unstack(params) if single else params


def _summed(sums: CohortSum, stacked: bool) -> CohortSum:
    """Sums over clients as an accumulator has them."""
    return sums._replace(delta=_stacked(sums.delta, stacked))


def _jitted(
    one_client: Callable[..., Any],
    sharded: Callable[..., Any],
    mesh: Mesh,
    local: bool,
    stacked: bool,
) -> Cohort:
    """The parts of a cohort's sum, compiled for where their arrays lie.

    Args:
      one_client: of which a client's sums are the shapes. sharded: adds a chunk's sums.
      mesh, local, stacked: see `make_cohort`.
    """

    def zeros(params, chunk):
        params = _stacked(params, stacked)
        alone = chunk._replace(resident=None)
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), alone)
        batches = _with_examples(first.batches, chunk.resident)
        args = (batches, first.num_steps, first.weight, first.user, first.local)
        shapes, _ = jax.eval_shape(one_client, params, *args, jax.random.key(0), 1, 0)
        lanes = mesh.shape[AXIS]
        return jax.tree.map(lambda s: jnp.zeros((lanes, *s.shape), s.dtype), shapes)

    def total(accumulator, stacked=False):
        if MODEL in mesh.shape or mesh.size == 1:
            found = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), accumulator)
        else:
            leaves, treedef = jax.tree.flatten(accumulator)
            found = jax.tree.unflatten(treedef, _sums_over_devices(leaves))
        if stacks.is_stacked(found.delta) and not stacked:
            found = found._replace(delta=stacks.unstack(found.delta))
        return found

    if MODEL not in mesh.shape:
        stack = jax.jit(stacks.stack, out_shardings=replicated(mesh))
        where, options = client_sharding(mesh), devices.compiler_options(mesh)
        return Cohort(
            zeros=jax.jit(zeros, out_shardings=where),
            # The accumulator must come out as `zeros` made it, or its second use compiles again.
            add=jax.jit(sharded, donate_argnums=0, out_shardings=where, compiler_options=options),
            total=jax.jit(total, static_argnames="stacked", out_shardings=replicated(mesh)),
            ready=lambda params: _stacked(params, stacked, stack),
        )

    def add(*args):
        out = sharded(*args)
        return (settled(mesh, out[0], True), out[1]) if local else settled(mesh, out, True)

    return Cohort(
        zeros=jax.jit(lambda *args: settled(mesh, zeros(*args), True)),
        add=jax.jit(add, donate_argnums=0),
        total=jax.jit(lambda accumulator: settled(mesh, total(accumulator))),
        ready=lambda params: params,
    )
