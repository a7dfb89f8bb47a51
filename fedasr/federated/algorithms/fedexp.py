"""FedExP: the server's step grows with the disagreement of clients (arXiv 2301.09604)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientUpdate
from fedasr.federated.extras import Extras, Sent
from fedasr.federated.local import LocalStore


def FedExP(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    eps: float = 1e-3,
) -> FedAvg:
    """The mean is multiplied by max(1, mean |delta|^2 / (2 (|mean delta|^2 + eps))).

    Args:
      client_update, trained: see `fedasr.federated.algorithms.Algorithm`.
      server_optimizer: sees the mean times that; `optax.sgd(1.0)` is the paper's.
      store: not used.
      eps: as above, above 0.

    Raises:
      UserError: eps out of range.
    """
    if not eps > 0:
        raise UserError(f"algorithm_options: eps={eps} of 'fedexp' must be above 0")

    def train(params, broadcast, memory, *args):
        delta, metrics = client_update(params, *args)
        return Sent(delta, {"square": _square(delta)}), metrics, memory

    def update(mean, state, params=None):
        step = jnp.maximum(1.0, mean.extra["square"] / (2 * (_square(mean.model) + eps)))
        scaled = jax.tree.map(lambda d: step * d, mean.model)
        return server_optimizer.update(scaled, state, params)

    return FedAvg(
        client_update,
        optax.GradientTransformation(server_optimizer.init, update),
        trained=trained,
        extras=Extras(
            train,
            lambda variables: {"square": jnp.float32(0)},
            unaccounted="fedexp steps by squared norms of updates, and noise would make most of "
            "them: without privacy only, or choose another algorithm",
        ),
    )


def _square(tree):
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))
