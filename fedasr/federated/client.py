"""What one simulated device does in a round: a few optimiser steps on its own data.

A *client update* is a pure function of one client,

    delta, metrics = update(params, batches, num_steps, key, max_steps, round)

and `fedasr.federated.cohort` maps it over many. Write your own with this signature to change the
local algorithm.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from fedasr.data.batching import Store
from fedasr.kernels import devices

Params = Any
Batch = Mapping[str, jax.Array]
# loss(params, batch, key) -> (mean loss over the valid examples, {name: scalar to be summed}). The
# scalar "utterances", if there, is the number of valid examples: else all of the mask's are.
Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]


class ClientMetrics(NamedTuple):
    """Scalars that one client reports (a luxury of simulation: no noise covers them).

    loss: float32, mean over the client's steps. aux: the loss's own scalars, summed over steps.
    """

    loss: jax.Array
    aux: Mapping[str, jax.Array]


@runtime_checkable
class ClientUpdate(Protocol):
    """Signature of a client's local training."""

    def __call__(
        self,
        params: Params,
        batches: Batch | Store,
        num_steps: jax.Array,
        key: jax.Array,
        max_steps: jax.Array | int | None = None,
        round: jax.Array | int = 0,
    ) -> tuple[Params, ClientMetrics]:
        """Train on one client's batches.

        Args:
          params: the server's parameters theta.
          batches: named arrays [steps, batch, ...], those from `num_steps` on padding; or a
            `Store` of examples. `batch_gradient` and `take_batch` read either; a `Store` may hold
            examples of other clients, too, which they never reach.
          num_steps: int32 scalar, how many of the batches are real; 0 for an empty slot.
          key: the client's own key of this round.
          max_steps: bound of the loop, >= num_steps. Clients that are vmapped together share the
            largest of theirs, so that the loop's condition stays a scalar. Default: num_steps.
          round: int32 scalar, rounds done so far, for schedules.

        Returns:
          `delta = theta - theta_local`, old minus new so that it acts as a gradient on the
          server, in the parameters' dtypes (exactly zero for an empty slot), and metrics.
        """


# A `ClientUpdate` with one more argument by keyword: see what `local_training` returns.
CorrectedUpdate = Callable[..., Any]


def take_batch(batches: Batch | Store, step: jax.Array | int) -> dict[str, jax.Array]:
    """Batch number `step` of one client, with all of its parts where it has several.

    Args:
      batches: arrays [steps, batch, ...], or a `fedasr.data.batching.Store`.
      step: int32 scalar.

    Returns:
      {name: [batch, ...]}, "<name>_length" for ragged arrays and "mask"; zeros where padded.
    """
    if not isinstance(batches, Store):
        return jax.tree.map(lambda x: x[step], dict(batches))
    spans = batches.spans
    longest = {name: max(span[name].shape[0] for span in spans) for name in spans[0]}
    return _gather(batches, batches.index[step].reshape(-1), longest)


def view_of_client(batches: Batch | Store, client: jax.Array | int) -> Batch | Store:
    """One client's batches out of a chunk's, without a copy of the examples in a `Store`.

    Args:
      batches: as in a `Chunk`, with a leading client axis.
      client: int32 scalar, a row of it.

    Returns:
      What `take_batch` reads as that client's; a `Store` still holds the examples of all.
    """
    if not isinstance(batches, Store):
        return jax.tree.map(lambda x: x[client], batches)
    rows = batches.index.shape[0]
    of_examples = next(iter((batches.offsets or batches.arrays).values()), None)
    room = 0 if of_examples is None else of_examples.shape[1]
    index = batches.index[client]

    def first(name):  # a client's frames in what is laid end to end
        return batches.arrays[name].shape[1] * jnp.arange(rows, dtype=jnp.int32)[:, None]

    return Store(
        index=jnp.where(index >= 0, index + client * room, -1),
        arrays={name: x.reshape(-1, *x.shape[2:]) for name, x in batches.arrays.items()},
        offsets={name: (x + first(name)).ravel() for name, x in batches.offsets.items()},
        lengths={name: x.ravel() for name, x in batches.lengths.items()},
        spans=jax.tree.map(lambda x: x[client], batches.spans),
        kinds=batches.kinds[client],
        parts=batches.parts[client],
    )


def _gather(store: Store, index: jax.Array, frames: Mapping[str, int]) -> dict[str, jax.Array]:
    """Examples of a store, ragged arrays padded to so many frames; zeros where index is -1."""
    mask = index >= 0
    row = jnp.maximum(index, 0)
    batch = {"mask": mask}
    for name, values in store.arrays.items():
        if name in store.offsets:
            within = jnp.arange(frames[name])
            length = jnp.where(mask, store.lengths[name][row], 0)
            batch[f"{name}_length"] = length
            inside = within < length[:, None]
            picked = values[jnp.where(inside, store.offsets[name][row][:, None] + within, 0)]
        else:
            inside, picked = mask, values[row]
        inside = inside.reshape(inside.shape + (1,) * (picked.ndim - inside.ndim))
        batch[name] = jnp.where(inside, picked, jnp.zeros_like(picked))
    # What is computed with a batch must not be compiled together with where it comes from: how long
    # the array with everybody's examples is would then change how a client's update is rounded.
    return jax.lax.optimization_barrier(batch)


def batch_gradient(
    loss: Loss, batch_keys: bool = False
) -> Callable[..., tuple[tuple[jax.Array, Any], Params]]:
    """`jax.value_and_grad(loss, has_aux=True)` of a client's batch, part by part.

    Args:
      loss: see `Loss`.
      batch_keys: whether a part of a batch also holds "batch_key", the key of the whole batch, for
        what its parts have to draw alike.

    Returns:
      gradient(params, batches, step, key) -> ((loss, aux), gradients) of batch number `step`. The
      parts' losses and gradients are weighted by their numbers of examples: those that the loss
      counts as "utterances" in aux, or else those of the mask. Aux is summed. Each part draws from
      a key of its own.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradient(params, batches, step, key):
        whole = not isinstance(batches, Store) or (
            len(batches.spans) == batches.index.shape[1] == 1
        )
        if whole:
            return value_and_grad(params, take_batch(batches, step), key)

        def one_part(kind, part):
            frames = {name: x.shape[0] for name, x in batches.spans[kind].items()}
            index = batches.index[step, part, : frames[""]]
            batch = _gather(batches, index, frames)
            more = {"batch_key": key} if batch_keys else {}
            (value, aux), grads = value_and_grad(
                params, batch | more, jax.random.fold_in(key, part)
            )
            count = jnp.float32(aux.get("utterances", jnp.sum(batch["mask"])))
            (value, grads) = jax.tree.map(lambda x: (x * count).astype(x.dtype), (value, grads))
            return count, value, aux, grads

        branches = [functools.partial(one_part, kind) for kind in range(len(batches.spans))]

        def add(part, sums):
            new = jax.lax.switch(batches.kinds[step, part], branches, part)
            return jax.tree.map(jnp.add, sums, new)

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(branches[0], jnp.int32(0))
        )
        count, value, aux, grads = jax.lax.fori_loop(0, batches.parts[step], add, zeros)
        share = 1.0 / jnp.maximum(count, 1.0)
        value, grads = jax.tree.map(lambda x: (x * share).astype(x.dtype), (value, grads))
        return (value, aux), grads

    return gradient


def local_training(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    grad_clip: float | None = 1.0,
    proximal: float = 0.0,
    schedule: optax.Schedule | None = None,
    batch_keys: bool = False,
) -> ClientUpdate:
    """Local minibatch training with any optax optimiser, started afresh every round.

    With `optax.sgd` this is the local training of FedAvg (McMahan et al., 2017, Algorithm 1); with
    a single step of `optax.sgd(1.0)` the delta is the client's clipped gradient, that is FedSGD.

    Args:
      loss: see `Loss`.
      optimizer: applied after the gradient clip.
      grad_clip: each minibatch gradient's largest global L2 norm (C_loc of arXiv 2310.00098), or
        None.
      proximal: FedProx's mu (Li et al., 2020): adds mu/2 ||theta_local - theta||^2 to the loss.
      schedule: rounds done -> factor of every local update of that round, that is of the learning
        rate; None for 1. (A schedule within a round belongs to `optimizer`.)
      batch_keys: see `batch_gradient`.

    Returns:
      A client update that takes one more argument, `correction`: a transformation of the clipped
      gradients of one client's steps, which may hold arrays of that client. With it the update
      returns the transformation's last state, too: (delta, metrics, state). One that takes more
      arguments (`optax.GradientTransformationExtraArgs`) gets `start_gradient`, a function without
      arguments: the clipped gradient of the step's batch where local training began.
    """
    clip = None if grad_clip is None else _clip_by_global_norm(grad_clip)
    gradient = batch_gradient(loss, batch_keys)

    def update(params, batches, num_steps, key, max_steps=None, round=0, *, correction=None):
        local_optimizer = _chained(clip, correction, optimizer)
        factor = None if schedule is None else schedule(round)
        first = jax.eval_shape(take_batch, batches, 0)
        aux_shape = jax.eval_shape(loss, params, first, key)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux_shape)

        def extra(i):
            def start_gradient():
                _, grads = gradient(params, batches, i, jax.random.fold_in(key, i))
                return grads if clip is None else clip.update(grads, clip.init(params))[0]

            asked = isinstance(correction, optax.GradientTransformationExtraArgs)
            return {"start_gradient": start_gradient} if asked else {}

        def step(i, carry):
            local, opt_state, loss_sum, aux_sum = carry
            (value, aux), grads = gradient(local, batches, i, jax.random.fold_in(key, i))
            if proximal:
                grads = jax.tree.map(lambda g, a, b: g + proximal * (a - b), grads, local, params)
            updates, new_opt_state = local_optimizer.update(grads, opt_state, local, **extra(i))
            if factor is not None:
                updates = jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)
            new = (
                optax.apply_updates(local, updates),
                new_opt_state,
                loss_sum + value.astype(jnp.float32),
                jax.tree.map(jnp.add, aux_sum, aux),
            )
            if max_steps is None:
                return new
            active = i < num_steps
            return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, carry)

        start = (params, local_optimizer.init(params), jnp.float32(0), zeros)
        bound = num_steps if max_steps is None else max_steps
        local, opt_state, loss_sum, aux = jax.lax.fori_loop(0, bound, step, start)
        delta = jax.tree.map(jnp.subtract, params, local)
        metrics = ClientMetrics(loss_sum / jnp.maximum(num_steps, 1), aux)
        if correction is None:
            return delta, metrics
        return delta, metrics, opt_state[-2]

    return update


_SMALL = 1 << 14  # numbers of an array, at most, to be summed with others


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`; on accelerators by few launches.

    Small arrays are summed together, and large ones row by row, all rows of all of them together.
    """
    usual = optax.clip_by_global_norm(most)

    def update(updates, state, params=None):
        if not devices.platform():
            return usual.update(updates, state, params)
        squares = []
        for x in jax.tree.leaves(updates):
            square = jnp.square(x.astype(jnp.float32))
            squares.append((jnp.sum(square, axis=-1) if x.size > _SMALL else square).ravel())
        norm = jnp.sqrt(jnp.sum(jnp.concatenate(squares)))

        def clipped(x):
            return jnp.where(norm < most, x, x / norm.astype(x.dtype) * most)

        return jax.tree.map(clipped, updates), state

    return optax.GradientTransformation(usual.init, update)


def _chained(
    clip: optax.GradientTransformation | None,
    correction: optax.GradientTransformation | None,
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """What a step does to a gradient; the correction's state is the last but one."""
    steps = [step for step in (clip, correction, optimizer) if step is not None]
    return optax.with_extra_args_support(steps[0] if len(steps) == 1 else optax.chain(*steps))


def takes_correction(client_update: Callable[..., Any]) -> bool:
    """Whether a client update lets an algorithm correct its gradients (see `local_training`)."""
    parameters = inspect.signature(client_update).parameters.values()
    return any(p.name == "correction" or p.kind is p.VAR_KEYWORD for p in parameters)
