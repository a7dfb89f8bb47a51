"""FedDyn: dynamic regularisation of what clients minimise (arXiv 2111.04263)."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Extras, zeros_like
from fedasr.federated.local import LocalStore


def memory(variables: Any) -> Any:
    """A client's g_i, its gradient where it last came to, like the trained variables."""
    return zeros_like(variables)


def FedDyn(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    share: float,
    alpha: float = 0.1,
) -> FedAvg:
    """Clients minimise f_i(y) - <g_i, y> + alpha / 2 |y - x|^2; the server corrects by mean g_i.

    With delta the difference x - y, g_i grows by alpha * delta, and the server's h by
    alpha * share * mean(delta); the server's optimiser sees mean(delta) + h / alpha, with which
    `optax.sgd(1.0)` is the paper's step. Nothing is sent beside the delta.

    Args:
      client_update: takes corrections (`fedasr.federated.client.local_training`).
      server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: of the g_i.
      share: expected cohort over population.
      alpha: of the regularisation, above 0.

    Raises:
      UserError: alpha out of range, no store, or local training that takes no corrections.
    """
    checks.has_memory(store, "feddyn")
    checks.takes_corrections(client_update, "feddyn")
    if not alpha > 0:
        raise UserError(f"algorithm_options: alpha={alpha} of 'feddyn' must be above 0")

    def train(params, broadcast, own, batches, num_steps, key, max_steps=None, round=0):
        def corrected(grads, start, params=None):
            step = jax.tree.map(
                lambda g, g_i, y, x: g - g_i + alpha * (y - x), grads, own, params, start
            )
            return step, start

        correction: Any = optax.GradientTransformation(lambda start: start, corrected)
        delta, metrics, _ = client_update(
            params, batches, num_steps, key, max_steps, round, correction=correction
        )
        return delta, metrics, jax.tree.map(lambda g_i, d: g_i + alpha * d, own, delta)

    def init(variables):
        return server_optimizer.init(variables), zeros_like(variables)

    def update(mean, state, params=None):
        h = jax.tree.map(lambda h, d: h + alpha * share * d, state[1], mean)
        gradient = jax.tree.map(lambda d, h: d + h / alpha, mean, h)
        updates, opt_state = server_optimizer.update(gradient, state[0], params)
        return updates, (opt_state, h)

    return FedAvg(
        client_update,
        optax.GradientTransformation(init, update),
        trained=trained,
        store=store,
        extras=Extras(train),
    )
