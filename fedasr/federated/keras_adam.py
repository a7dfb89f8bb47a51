"""Adam as Keras computes it, whose epsilon is outside of the bias correction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class KerasAdamState(NamedTuple):
    """steps: int32, done. mu, nu: moments shaped like the parameters, without correction."""

    steps: jax.Array
    mu: Any
    nu: Any


def keras_adam(
    learning_rate: float | optax.Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam with epsilon added to the root of the second moment as it is.

        x <- x - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    That is the end of section 2 of Kingma and Ba (arXiv 1412.6980), with its "epsilon hat", which
    is optax's eps times sqrt(1 - b2^t). Where eps is large, as the 0.1 of the published neural
    decoders, first steps are smaller by that factor, 1/31 for the first.

    Args:
      learning_rate: or a schedule of it. b1, b2: decay rates of the moments. eps: see above.
    """

    def init(params: optax.Params) -> KerasAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return KerasAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, KerasAdamState]:
        del params
        count = state.steps + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        t = count.astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        moves = jax.tree.map(lambda m, v: (scale * m / (jnp.sqrt(v) + eps)).astype(m.dtype), mu, nu)
        return moves, KerasAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
