"""SCAFFOLD: control variates against the drift of clients (arXiv 1910.06378, option II)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Broadcast, Extras, Sent, zeros_like
from fedasr.federated.local import LocalStore


def memory(variables: Any) -> Any:
    """A client's control variate c_i, like the trained variables."""
    return zeros_like(variables)


def Scaffold(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    share: float,
    unit: float = 1.0,
) -> FedAvg:
    """Every step goes along g - c_i + c; then c_i becomes the mean of the g.

    That mean is the paper's c_i - c + (x - y_i) / (K eta) for plain SGD, and needs no learning
    rate. With privacy it is DP-SCAFFOLD: the delta and the change of c_i are clipped as one vector,
    so that a user moves the sum by the clip norm (a user-level variant of arXiv 2111.09278).

    Args:
      client_update: takes corrections (`fedasr.federated.client.local_training`).
      server_optimizer: sees the mean of the deltas.
      trained: see `fedasr.federated.algorithms.Algorithm`.
      store: of the c_i.
      share: expected cohort over population: how fast c follows the cohort's changes.
      unit: changes of c_i are sent times this; only with clipping does it matter.

    Raises:
      UserError: without a store, or for local training that takes no corrections.
    """
    checks.has_memory(store, "scaffold")
    checks.takes_corrections(client_update, "scaffold")

    def train(params, control, own, batches, num_steps, key, max_steps=None, round=0):
        def corrected(grads, total, params=None):
            step = jax.tree.map(lambda g, c, c_i: g - c_i + c, grads, control, own)
            return step, jax.tree.map(jnp.add, total, grads)

        correction: Any = optax.GradientTransformation(zeros_like, corrected)
        delta, metrics, total = client_update(
            params, batches, num_steps, key, max_steps, round, correction=correction
        )
        new = jax.tree.map(lambda g: g / jnp.maximum(num_steps, 1), total)
        change = jax.tree.map(lambda n, o: unit * (n - o), new, own)
        return Sent(delta, change), metrics, new

    def init(variables):
        return server_optimizer.init(variables), Broadcast(zeros_like(variables))

    def update(mean, state, params=None):
        updates, opt_state = server_optimizer.update(mean.model, state[0], params)
        control = jax.tree.map(lambda c, d: c + share / unit * d, state[1].value, mean.extra)
        return updates, (opt_state, Broadcast(control))

    return FedAvg(
        client_update,
        optax.GradientTransformation(init, update),
        trained=trained,
        store=store,
        extras=Extras(train, message=zeros_like, broadcast=True),
    )
