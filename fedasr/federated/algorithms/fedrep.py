"""FedRep: users' own variables are trained first, the shared ones after them (arXiv 2102.07078)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import MemoryLayout
from fedasr.federated.local import LocalStore


def FedRep(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
) -> FedAvg:
    """All the client's steps on its local parameters, then all of them on what is shared.

    Federated averaging with the same store (FedPer) trains both at once, in half the steps.

    Args:
      client_update: takes corrections, and moves nowhere for gradients of zero: plain SGD.
      server_optimizer: see `fedasr.federated.algorithms.Algorithm`.
      trained: None; clients train all variables.
      store: of the local parameters (`fedasr.federated.local.make_layout`).

    Raises:
      UserError: without local parameters, or for local training that takes no corrections.
    """
    checks.takes_corrections(client_update, "fedrep")
    if store is None or isinstance(store.layout, MemoryLayout):
        raise UserError("fedrep trains users' own variables apart: name them in local.patterns")
    if trained is not None:
        raise UserError("fedrep trains all variables: set partial.mode='all'")
    local = store.layout.local

    def update(params, batches, num_steps, key, max_steps=None, round=0):
        flags = jax.tree.unflatten(jax.tree.structure(params), local)

        def only(own: bool) -> Any:
            def kept(grads, state, params=None):
                return jax.tree.map(
                    lambda g, f: g if f == own else jnp.zeros_like(g), grads, flags
                ), state

            return optax.GradientTransformation(lambda p: (), kept)

        args = (batches, num_steps, key, max_steps, round)
        first, _, _ = client_update(params, *args, correction=only(True))
        start = jax.tree.map(jnp.subtract, params, first)
        second, metrics, _ = client_update(start, *args, correction=only(False))
        return jax.tree.map(jnp.add, first, second), metrics

    return FedAvg(update, server_optimizer, store=store)
