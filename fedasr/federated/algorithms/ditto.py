"""Ditto: every user has a model of their own, held close to the common one (arXiv 2012.04221)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Extras, zeros_like
from fedasr.federated.local import LocalStore
from fedasr.federated.subset import merge, select
from fedasr.streams import Stream, fold


def memory(variables: Any) -> Any:
    """A user's own values of the trained variables, and 1 once they have trained."""
    return {"met": jnp.float32(0), "model": zeros_like(variables)}


def personal(params: Any, memory: Any, trained: Sequence[bool] | None = None) -> Any:
    """A user's own model; the common one for who has none yet."""
    own = merge(memory["model"], params, trained)
    return jax.tree.map(
        lambda v, w: jnp.where(memory["met"] > 0, v.astype(w.dtype), w), own, params
    )


def Ditto(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    attraction: float = 0.1,
) -> FedAvg:
    """Federated averaging; beside it each user trains v to minimise f(v) + lambda / 2 |v - w|^2.

    w is the common model that the user was sent; v takes as many steps, on the same batches, and is
    never sent. So what is sent, its privacy and the common model are those of federated averaging.

    Args:
      client_update: takes corrections (`fedasr.federated.client.local_training`).
      server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: of the users' models.
      attraction: lambda, at least 0.

    Raises:
      UserError: attraction out of range, no store, or local training that takes no corrections.
    """
    checks.has_memory(store, "ditto")
    checks.takes_corrections(client_update, "ditto")
    if not attraction >= 0:
        raise UserError(f"algorithm_options: attraction={attraction} of 'ditto' must be at least 0")

    def train(params, broadcast, memory, batches, num_steps, key, max_steps=None, round=0):
        delta, metrics = client_update(params, batches, num_steps, key, max_steps, round)
        start, common = personal(params, memory, trained), select(params, trained)

        def pulled(grads, state, params=None):
            step = jax.tree.map(lambda g, v, w: g + attraction * (v - w), grads, params, common)
            return step, state

        correction: Any = optax.GradientTransformation(lambda v: (), pulled)
        key = fold(key, Stream.PERSONAL)
        change, _, _ = client_update(
            start, batches, num_steps, key, max_steps, round, correction=correction
        )
        model = jax.tree.map(jnp.subtract, select(start, trained), change)
        return delta, metrics, {"met": jnp.float32(1), "model": model}

    return FedAvg(
        client_update,
        server_optimizer,
        trained=trained,
        store=store,
        extras=Extras(train),
    )
