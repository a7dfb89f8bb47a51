"""A matrix with a change of low rank, of which the sum need not be made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + scale * down @ up, for `fedasr.kernels.dense.product` to multiply by.

    Where clients are vmapped, each with factors of its own, the base stays one for all of them: the
    sum would be one matrix a client. What knows arrays alone gets that sum (`array`), by JAX's
    protocol for array-likes.

    Attributes:
      base: [f, g]. down: [f, r]. up: [r, g]. scale: a constant.
    """

    base: jax.Array
    down: jax.Array
    up: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sum."""
        return jnp.shape(self.base)

    @property
    def ndim(self) -> int:
        """Of the sum: 2."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the sum."""
        return jnp.result_type(self.base, self.down, self.up)

    def astype(self, dtype: Any) -> LowRank:
        """The same, of parts in another dtype."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def array(self) -> jax.Array:
        """The sum, [f, g]."""
        return self.base.astype(self.dtype) + self.scale * (self.down @ self.up)

    def __jax_array__(self) -> jax.Array:
        return self.array()


jax.tree_util.register_dataclass(LowRank, ["base", "down", "up"], ["scale"])


def plain(x: Any) -> Any:
    """An array of what may be a `LowRank`."""
    return x.array() if isinstance(x, LowRank) else x
