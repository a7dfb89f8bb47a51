"""pFedMe: the common model moves towards users' own, which are held close (arXiv 2006.08848)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms import ditto
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Extras
from fedasr.federated.local import LocalStore
from fedasr.federated.subset import select

memory, personal = ditto.memory, ditto.personal


def pFedMe(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    attraction: float = 1.0,
    rate: float = 1.0,
) -> FedAvg:
    """Each user minimises f(v) + lambda / 2 |v - w|^2 from w, and sends rate * lambda * (w - v).

    One outer step a round: all the client's steps are on v, which the user keeps. With a small
    lambda and rate = 1 / lambda it is federated averaging.

    Args:
      client_update: takes corrections (`fedasr.federated.client.local_training`).
      server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: of the users' models.
      attraction: lambda, above 0.
      rate: eta, above 0.

    Raises:
      UserError: a number out of range, no store, or local training that takes no corrections.
    """
    checks.has_memory(store, "pfedme")
    checks.takes_corrections(client_update, "pfedme")
    for name, value in (("attraction", attraction), ("rate", rate)):
        if not value > 0:
            raise UserError(f"algorithm_options: {name}={value} of 'pfedme' must be above 0")

    def train(params, broadcast, own, batches, num_steps, key, max_steps=None, round=0):
        common = select(params, trained)

        def pulled(grads, state, params=None):
            step = jax.tree.map(lambda g, v, w: g + attraction * (v - w), grads, params, common)
            return step, state

        correction: Any = optax.GradientTransformation(lambda v: (), pulled)
        change, metrics, _ = client_update(
            params, batches, num_steps, key, max_steps, round, correction=correction
        )
        model = jax.tree.map(jnp.subtract, common, change)
        delta = jax.tree.map(lambda d: rate * attraction * d, change)
        return delta, metrics, {"met": jnp.float32(1), "model": model}

    return FedAvg(
        client_update, server_optimizer, trained=trained, store=store, extras=Extras(train)
    )
