"""How a training step's random bits are made from its key: `GENERATORS` by name.

A step's key comes from the registry of streams, by threefry. What a model draws below it (for each
utterance, block and place: dropout, layer drop, masks, shifts, noise) may come from a cheaper
generator. JAX's threefry takes about 60 operations a word and is a good part of what compilers have
to do; nothing that privacy rests on is drawn there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

GENERATORS = ("threefry", "hashed")
# Wherever a key is folded or split, so that neither meets the other or what is drawn.
_FOLDED, _SPLIT = (0x9E3779B9, 0xBB67AE85), (0xC2B2AE35, 0xA54FF53A)


@dataclass(frozen=True)
class DrawingConfig:
    """generator: of what is drawn below a training step's key, see `fedasr.generators`."""

    generator: str = "threefry"

    def check_generator(self) -> None:
        """Raises UserError for a generator that there is not."""
        if self.generator not in GENERATORS:
            raise UserError(
                f"the model's generator must be one of {GENERATORS}: {self.generator!r}"
            )


def drawing(key: jax.Array, config: Any) -> jax.Array:
    """The key from which a model draws, of a step's key: its children and bits are hashes.

    Args:
      key: typed, scalar or an array of keys, of two words.
      config: of a model; "threefry", or no field `generator`, leaves the key as it is.
    """
    if getattr(config, "generator", "threefry") == "threefry":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=HASHED)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words, each bit of which depends on all bits of x.

    The finaliser of MurmurHash3 with other constants, found by search for the least bias (C.
    Wellons, "Prospecting for hash functions", 2018, and its successors).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _word(index: jax.Array, first: Any, second: Any) -> jax.Array:
    """Random words, uint32; for two fixed words no index gives the same as another."""
    return _mixed(_mixed(index ^ first) + second)


def _child(key: jax.Array, data: Any, constants: tuple[int, int]) -> jax.Array:
    """Keys uint32 [..., 2] by data [...]: two rounds of a Feistel network.

    No two data of a key, and no two keys with the same data, have the same child.
    """
    return jnp.stack(_child_words(key[0], key[1], data, constants), axis=-1)


def _child_words(first: Any, second: Any, data: Any, constants: tuple[int, int]) -> tuple[Any, Any]:
    new = first ^ _word(data, second, np.uint32(constants[0]))
    return new, second ^ _word(data, new, np.uint32(constants[1]))


def is_hashed(key: jax.Array) -> bool:
    """Whether what is drawn from a typed key are hashes, which kernels know how to draw."""
    return str(jax.random.key_impl(key)) == str(HASHED)


def folded_words(first: Any, second: Any, data: Any) -> tuple[Any, Any]:
    """Within a kernel: the two words of `jax.random.fold_in(key, data)` of a hashed key's.

    Args:
      first, second, data: uint32, of shapes that broadcast.
    """
    return _child_words(first, second, data, _FOLDED)


def kept_words(first: Any, second: Any, index: Any, rate: float) -> Any:
    """Within a kernel: `jax.random.bernoulli(key, 1 - rate, shape)` of a hashed key.

    Args:
      first, second: uint32, words of the key. index: uint32, of an element in row-major order.
      rate: probability of False.
    """
    # A uniform float has 23 random bits; below 2^23 words compare alike with signs and without.
    # The 1 - rate of float32, as it is compared there.
    most = math.ceil(float(np.float32(1.0 - rate)) * 2**23)
    return (_word(index, first, second) >> 9).astype(jnp.int32) < most


def _indices(shape: Sequence[int]) -> jax.Array:
    """Each element's place in an array, uint32: the leading axis may grow at its end."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        if size > 1:
            index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    return index


def _bits(key: jax.Array, bit_width: int, shape: Sequence[int]) -> jax.Array:
    """Random bits by hashes of (element, key), for arrays of less than 2**31 elements."""
    if bit_width == 64:
        words = _bits(key, 32, (*shape, 2)).astype(jnp.uint64)
        return words[..., 0] << 32 | words[..., 1]
    words = _word(_indices(shape), key[0], key[1])
    return (words >> (32 - bit_width)).astype(f"uint{bit_width}")


def _split(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _child(key, _indices(shape), _SPLIT)


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    return _child(key, data, _FOLDED)


def _seed(seed: jax.Array) -> jax.Array:
    return jax.extend.random.threefry_prng_impl.seed(seed)


HASHED = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="hashed",
    tag="hsh",
)
