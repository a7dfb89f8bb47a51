"""FedBuff: the server steps for every so many updates, however old (arXiv 2106.06639)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientUpdate
from fedasr.federated.extras import Extras, Versions
from fedasr.federated.local import LocalStore


def FedBuff(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    versions: float = 16,
    power: float = 0.5,
) -> FedAvg:
    """Federated averaging over the updates in a buffer, each from the model of its user's start.

    An update of staleness a (steps of the server since the start) counts (1 + a)^-power, at most 1,
    so that it moves the sum by no more than the clip norm. Who hands in when is for the sampler to
    say (`fedasr.privacy.sampling.AsynchronousSampler`), which bounds every user's participations.

    Args:
      client_update, server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: of nothing: users remember nothing here.
      versions: of the model that the server keeps, this one included; updates from older ones are
        thrown away. Each takes the memory of the trained variables.
      power: at least 0.

    Raises:
      UserError: for numbers out of range.
    """
    if versions != int(versions) or versions < 1:
        raise UserError(
            f"algorithm_options: versions={versions} of 'fedbuff' must be a whole number from 1"
        )
    if not power >= 0:
        raise UserError(f"algorithm_options: power={power} of 'fedbuff' must be at least 0")
    earlier = max(1, int(versions) - 1)  # an array without numbers is kept by no checkpoint

    def train(params, broadcast, memory, *args):
        return *client_update(params, *args), memory

    def init(variables):
        # Where the first rounds move bounds alone (`fedasr.privacy.adaptive.hold`), so it stays.
        past = jax.tree.map(lambda x: jnp.broadcast_to(x, (earlier, *x.shape)), variables)
        return server_optimizer.init(variables), Versions(past)

    def update(mean, state, params=None):
        updates, opt_state = server_optimizer.update(mean, state[0], params)
        past = jax.tree.map(
            lambda old, x: jnp.concatenate([x[None], old])[:earlier], state[1].past, params
        )
        return updates, (opt_state, Versions(past))

    return FedAvg(
        client_update,
        optax.GradientTransformation(init, update),
        trained=trained,
        store=store,
        extras=Extras(train, discount=lambda a: (1.0 + a) ** -power, versions=int(versions)),
    )
