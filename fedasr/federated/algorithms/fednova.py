"""FedNova: clients that take different numbers of steps count alike (arXiv 2007.07481)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientUpdate
from fedasr.federated.extras import Extras, Sent
from fedasr.federated.local import LocalStore


def FedNova(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    steps: float = 0.0,
) -> FedAvg:
    """Deltas are divided by the client's steps, and their mean multiplied by the mean of those.

    For plain SGD on the clients: with momentum another norm of the steps would be meant.

    Args:
      client_update, server_optimizer, trained, store: see `fedasr.federated.algorithms.Algorithm`.
      steps: what the mean is multiplied by, a public number; 0 for the mean of the cohort's steps,
        which clients then send beside the delta. With privacy it has to be given.

    Raises:
      UserError: steps out of range.
    """
    if not steps >= 0:
        raise UserError(f"algorithm_options: steps={steps} of 'fednova' must be at least 0")

    def train(params, broadcast, memory, batches, num_steps, key, max_steps=None, round=0):
        delta, metrics = client_update(params, batches, num_steps, key, max_steps, round)
        taken = jnp.maximum(num_steps, 1).astype(jnp.float32)
        delta = jax.tree.map(lambda d: (d / taken).astype(d.dtype), delta)
        if steps:
            return delta, metrics, memory
        return Sent(delta, {"clients": jnp.float32(1), "steps": taken}), metrics, memory

    def update(mean, state, params=None):
        factor = steps
        if not steps:
            factor = mean.extra["steps"] / jnp.maximum(mean.extra["clients"], 1e-6)
            mean = mean.model
        mean = jax.tree.map(lambda d: factor * d, mean)
        return server_optimizer.update(mean, state, params)

    def message(variables):
        return {"clients": jnp.float32(0), "steps": jnp.float32(0)}

    reason = (
        "fednova would clip and noise numbers of steps together with updates: with privacy set "
        "algorithm_options.steps to a public number"
    )
    return FedAvg(
        client_update,
        optax.GradientTransformation(server_optimizer.init, update),
        trained=trained,
        extras=Extras(train, None if steps else message, unaccounted="" if steps else reason),
    )
