"""Mime: clients step with the server's momentum and a gradient of all (arXiv 2008.03606)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Broadcast, Extras, zeros_like
from fedasr.federated.local import LocalStore


def Mime(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
    momentum: float = 0.9,
    unit: float = 1.0,
) -> FedAvg:
    """A step of the server takes two rounds: one asks for gradients, the next one trains.

    In rounds 0, 2, ... clients send their whole gradient at the server's model x, whose mean is c;
    nothing moves. In rounds 1, 3, ... every local step on a batch goes along
    (1 - momentum) (g(y) - g(x) + c) + momentum m, where g are gradients of that batch; then the
    server steps, and m becomes (1 - momentum) c + momentum m. In the paper both rounds have the
    same users. Here each draws its own, so that either is a round as all are, to the sampler and to
    the accountant: c is of as many users, but of others than those who train.

    Args:
      client_update: takes corrections that ask for gradients elsewhere, see `local_training`; and
        moves nowhere for gradients of zero: plain SGD.
      server_optimizer: sees the mean of the deltas of every other round.
      trained: see `fedasr.federated.algorithms.Algorithm`.
      store: not used.
      momentum: in [0, 1).
      unit: gradients are sent times this, in the place of a delta; only with clipping does it
        matter.

    Raises:
      UserError: momentum out of range, or local training that takes no corrections.
    """
    checks.takes_corrections(client_update, "mime")
    if not 0 <= momentum < 1:
        raise UserError(
            f"algorithm_options: momentum={momentum} of 'mime' must be at least 0 and below 1"
        )

    def train(params, sent, memory, batches, num_steps, key, max_steps=None, round=0):
        c, m, asks = sent["gradient"], sent["momentum"], sent["trains"] == 0

        def step_along(g, at, c, m):
            return (1 - momentum) * (g - at + c) + momentum * m

        def corrected(grads, total, local=None, *, start_gradient, **extra):
            def along(grads):
                return jax.tree.map(step_along, grads, start_gradient(), c, m)

            def nowhere(grads):
                return jax.tree.map(jnp.zeros_like, grads)

            step = jax.lax.cond(asks, nowhere, along, grads)
            return step, jax.tree.map(jnp.add, total, grads)

        correction = optax.GradientTransformationExtraArgs(zeros_like, corrected)
        args = (params, batches, num_steps, key, max_steps, round)
        delta, metrics, total = client_update(*args, correction=correction)
        # Where nothing moved, all gradients were at the server's model.
        mean = jax.tree.map(lambda g: unit * g / jnp.maximum(num_steps, 1), total)
        answer = jax.tree.map(lambda g, d: jnp.where(asks, g.astype(d.dtype), d), mean, delta)
        return answer, metrics, memory

    def init(variables):
        nothing = {"gradient": zeros_like(variables), "momentum": zeros_like(variables)}
        return server_optimizer.init(variables), Broadcast(nothing | {"trains": jnp.float32(0)})

    def update(mean, state, params=None):
        opt_state, broadcast = state
        c, m = broadcast.value["gradient"], broadcast.value["momentum"]
        asks = broadcast.value["trains"] == 0
        updates, stepped = server_optimizer.update(mean, opt_state, params)
        moved = jax.tree.map(lambda c, m: (1 - momentum) * c + momentum * m, c, m)

        def chosen(one, other):
            return jax.tree.map(lambda a, b: jnp.where(asks, a, b), one, other)

        sent = {
            "gradient": chosen(jax.tree.map(lambda g: g / unit, mean), c),
            "momentum": chosen(m, moved),
            "trains": jnp.where(asks, jnp.float32(1), jnp.float32(0)),
        }
        still = jax.tree.map(jnp.zeros_like, updates)
        return chosen(still, updates), (chosen(opt_state, stepped), Broadcast(sent))

    server: Any = optax.GradientTransformation(init, update)
    return FedAvg(client_update, server, trained=trained, extras=Extras(train, broadcast=True))
