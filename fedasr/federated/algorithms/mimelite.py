"""MimeLite: clients step with the server's momentum, which stays as it is (arXiv 2008.03606)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Broadcast, Extras, Sent, zeros_like
from fedasr.federated.local import LocalStore


def MimeLite(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    momentum: float = 0.9,
    unit: float = 1.0,
) -> FedAvg:
    """Every local step goes along (1 - momentum) g + momentum m; m is the server's.

    The server then moves m to (1 - momentum) G + momentum m, where G is the mean of the clients'
    whole gradients at the model that they were sent: a second pass over their batches. (`mime`
    corrects steps by G, too, for which clients have to be asked before they train.)

    Args:
      client_update: takes corrections, and moves nowhere for gradients of zero: plain SGD.
      server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: not used.
      momentum: in [0, 1); 0 is federated averaging.
      unit: gradients are sent times this; only with clipping does it matter.

    Raises:
      UserError: momentum out of range, or local training that takes no corrections.
    """
    checks.takes_corrections(client_update, "mimelite")
    if not 0 <= momentum < 1:
        raise UserError(
            f"algorithm_options: momentum={momentum} of 'mimelite' must be at least 0 and below 1"
        )

    def mixed(grads, m):
        return jax.tree.map(lambda g, m: (1 - momentum) * g + momentum * m, grads, m)

    def train(params, m, memory, batches, num_steps, key, max_steps=None, round=0):
        def along(grads, state, params=None):
            return mixed(grads, m), state

        def stay(grads, total, params=None):
            return zeros_like(grads), jax.tree.map(jnp.add, total, grads)

        def run(correction: Any):
            args = (params, batches, num_steps, key, max_steps, round)
            return client_update(*args, correction=correction)

        delta, metrics, _ = run(optax.GradientTransformation(lambda p: (), along))
        _, _, total = run(optax.GradientTransformation(zeros_like, stay))
        gradient = jax.tree.map(lambda g: unit * g / jnp.maximum(num_steps, 1), total)
        return Sent(delta, gradient), metrics, memory

    def init(variables):
        return server_optimizer.init(variables), Broadcast(zeros_like(variables))

    def update(mean, state, params=None):
        updates, opt_state = server_optimizer.update(mean.model, state[0], params)
        gradient = jax.tree.map(lambda g: g / unit, mean.extra)
        return updates, (opt_state, Broadcast(mixed(gradient, state[1].value)))

    return FedAvg(
        client_update,
        optax.GradientTransformation(init, update),
        trained=trained,
        extras=Extras(train, message=zeros_like, broadcast=True),
    )
