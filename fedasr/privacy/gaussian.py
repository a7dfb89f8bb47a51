"""Gaussian noise as a transformation of updates: fresh, or correlated from round to round."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.privacy.correlated import Correlation


class NoiseState(NamedTuple):
    """count: int32 scalar, updates noised so far. buffers: of correlated noise, else empty."""

    count: chex.Array
    buffers: Any = ()


def add_gaussian_noise(
    std: float,
    key: chex.PRNGKey,
    correlation: Correlation | None = None,
    reach: float = noise.reach_for(8.0),
) -> optax.GradientTransformation:
    """Adds Gaussian noise to every element, once per update, fresh for every update.

    The fresh noise of update t, N(0, std^2), is one vector over all leaves with key
    fold_in(key, t): it depends on nothing but the key and the state, so a run resumed from a saved
    state draws what it would have drawn. It is drawn and added in float32.

    Args:
      std: standard deviation of the fresh noise z; 0 adds nothing.
      key: a JAX random key, used for nothing else.
      correlation: None adds z itself, otherwise the rows of C^-1 z (see `Correlation`).
      reach: how far the tails of z go at least, in standard deviations (see `noise.reach_for`).

    Returns:
      A transformation whose state is `NoiseState`.
    """
    if not (math.isfinite(std) and std >= 0):
        raise UserError(f"The noise's standard deviation must be finite and >= 0, not {std}.")
    # One band is no correlation, and orbax does not save its empty buffers.
    correlated = correlation if correlation is None or correlation.bands != 1 else None
    inverse = correlated.inverse() if correlated is not None and std > 0 else None

    def init(params):
        buffers = ()
        if inverse is not None:
            like = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in jax.tree.leaves(params)]
            buffers = inverse.init_multiply(like)
        return NoiseState(jnp.zeros((), jnp.int32), buffers)

    def update(updates, state, params=None):
        del params
        buffers = state.buffers
        if std > 0:
            leaves, treedef = jax.tree.flatten(updates)
            drawn = noise.normal_like(jax.random.fold_in(key, state.count), updates, reach)
            drawn = [std * z for z in jax.tree.leaves(drawn)]
            if inverse is not None:
                # The accelerators' faster products are not exact enough to take noise back.
                with jax.default_matmul_precision("highest"):
                    drawn, buffers = inverse.multiply_next(drawn, buffers)
            updates = treedef.unflatten(
                [
                    (leaf.astype(jnp.float32) + z).astype(leaf.dtype)
                    for leaf, z in zip(leaves, drawn, strict=True)
                ]
            )
        return updates, NoiseState(optax.safe_increment(state.count), buffers)

    return optax.GradientTransformation(init, update)
