"""Reptile: a start from which users learn fast, by steps that shrink (arXiv 1803.02999)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientUpdate
from fedasr.federated.local import LocalStore


def Reptile(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    anneal: float = 0.0,
) -> FedAvg:
    """Federated averaging whose mean is multiplied by max(0, 1 - round / anneal).

    With `optax.sgd(epsilon)` on the server it is the paper's batched update with epsilon annealed
    linearly to 0; without annealing it is federated averaging, whose users are the tasks.

    Args:
      client_update, server_optimizer, trained, store: see `fedasr.federated.algorithms.Algorithm`.
      anneal: rounds until the step is 0; 0 for a constant one.

    Raises:
      UserError: anneal out of range.
    """
    if not anneal >= 0:
        raise UserError(f"algorithm_options: anneal={anneal} of 'reptile' must be at least 0")
    if not anneal:
        return FedAvg(client_update, server_optimizer, trained=trained, store=store)

    def init(variables):
        return server_optimizer.init(variables), jnp.int32(0)

    def update(mean, state, params=None):
        factor = jnp.maximum(0.0, 1 - state[1] / anneal)
        mean = jax.tree.map(lambda d: factor * d, mean)
        updates, opt_state = server_optimizer.update(mean, state[0], params)
        return updates, (opt_state, state[1] + 1)

    annealed = optax.GradientTransformation(init, update)
    return FedAvg(client_update, annealed, trained=trained, store=store)
