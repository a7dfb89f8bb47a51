"""A public rotation that spreads an update evenly over its coordinates.

Signs at random, then an orthogonal matrix of flat entries: a Kronecker product of Hadamard
matrices, and of one of Hartley's where the (padded) dimension is no power of two.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_FACTOR = 16  # order of the Hadamard matrices that are multiplied out, at most


def padded(dimension: int) -> int:
    """The least m 2^k that is not below `dimension`, with m at most 16: at most an eighth more."""
    power = max(0, math.ceil(math.log2(dimension)) - 4)
    return -(-dimension // 2**power) * 2**power


def _factors(size: int) -> list[int]:
    """Orders of the orthogonal matrices whose Kronecker product is the rotation's."""
    power = size & -size
    factors = [] if size == power else [size // power]
    while power > 1:
        factors.append(min(power, _FACTOR))
        power //= factors[-1]
    return factors or [1]


def flatness(dimension: int) -> float:
    """Largest squared entry of the rotation's matrix, times its order."""
    size = padded(dimension)
    odd = size // (size & -size)
    return float(odd * np.max(_orthogonal(odd) ** 2))


def _orthogonal(order: int) -> np.ndarray:
    """A flat, symmetric matrix that is its own inverse, float64 [order, order].

    Hadamard's for powers of two, otherwise Hartley's, whose entries are up to sqrt(2) larger.
    """
    grid = np.outer(np.arange(order), np.arange(order))
    if order & (order - 1):
        angle = 2 * np.pi * (grid % order) / order
        return (np.cos(angle) + np.sin(angle)) / math.sqrt(order)
    bits = np.arange(order)[:, None] & np.arange(order)
    parity = np.array([[int(x).bit_count() % 2 for x in row] for row in bits]).reshape(order, order)
    return (1 - 2.0 * parity) / math.sqrt(order)


def _mix(x: jax.Array) -> jax.Array:
    """The rotation's matrix times x, float32 [size]; its own inverse."""
    for order in _factors(x.shape[0]):
        matrix = jnp.asarray(_orthogonal(order), jnp.float32)
        # Transposed, the next axis comes first; after the last factor all are where they were.
        x = jnp.matmul(matrix, x.reshape(order, -1), precision="highest").T.reshape(-1)
    return x


def rotate(x: jax.Array, key: jax.Array) -> jax.Array:
    """Random signs, then a Hadamard matrix: float32 [dimension] to [padded(dimension)].

    It keeps the L2 norm; every coordinate is sub-Gaussian with at most twice the mean square.

    Args:
      x: any dimension.
      key: public, the same for all clients of a round.
    """
    size = padded(x.shape[0])
    x = jnp.pad(x.astype(jnp.float32), (0, size - x.shape[0]))
    return _mix(x * _signs(key, size))


def unrotate(x: jax.Array, key: jax.Array, dimension: int) -> jax.Array:
    """The inverse of `rotate`: float32 [padded(dimension)] to [dimension]."""
    return (_mix(x.astype(jnp.float32)) * _signs(key, x.shape[0]))[:dimension]


def _signs(key: jax.Array, size: int) -> jax.Array:
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(-1)[:size].astype(jnp.float32)
