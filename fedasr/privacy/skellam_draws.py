"""Skellam noise, drawn exactly: the law as a table of whole numbers, and draws from it."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

_LEVELS = 4  # pairs of words that a probability has: 256 bits
_LEAST = 2.0 ** (-64 * _LEVELS)
MOST_VARIANCE = 2.0**28  # of a draw: its table then has 2^20 entries


class Table(NamedTuple):
    """An integer law for the alias method: all entries are equally likely, each for two values.

    own: uint32 [levels, 2^t, 2]: probability of the entry's own value, in units of 2^-(256 - t), as
      words from the highest down. other: uint32 [2^t]: the entry whose value it has otherwise.
    first: value of entry 0.
    """

    own: np.ndarray
    other: np.ndarray
    first: int


def skellam_pmf(variance: float, least: float = _LEAST) -> np.ndarray:
    """Probabilities of 0, 1, 2, ... under the symmetric Skellam law, as long as above `least`.

    By the ratios of Bessel functions I_{k+1} / I_k, downwards, which loses no digits.

    Args:
      variance: above 0. least: the probability at which the tail is left out.

    Returns:
      float64 [k]; the first and twice the others add up to 1.
    """
    if not (math.isfinite(variance) and variance > 0):
        raise UserError(f"The noise's variance must be finite and above 0, not {variance}.")
    # Where a Gaussian's tail ends, and a Poisson variable's where that is longer.
    deviations = math.sqrt(-2 * math.log(least))
    top = math.ceil(deviations * math.sqrt(variance) + deviations**2)
    ratios = np.empty(top)
    above = variance / (top + 1 + math.hypot(top + 1, variance))
    for k in range(top, 0, -1):
        above = 1 / (2 * k / variance + above)
        ratios[k - 1] = above
    with np.errstate(divide="ignore"):
        mass = np.exp(np.concatenate([[0.0], np.cumsum(np.log(ratios))]))
    mass /= mass[0] + 2 * mass[1:].sum()
    return mass[: max(2, int(np.searchsorted(-mass, -least)))]


@functools.lru_cache(maxsize=32)
def skellam_table(variance: float) -> Table:
    """The symmetric Skellam law of this variance: float64's probabilities, to 2^-256.

    Raises:
      UserError: for a variance whose table would be too large.
    """
    if variance > MOST_VARIANCE:
        raise UserError(f"A share of variance {variance:.3g} is too wide: use fewer bits.")
    half = skellam_pmf(variance)
    mass = np.concatenate([half[:0:-1], half])
    bits = max(1, math.ceil(math.log2(len(mass))))
    count, resolved = 1 << bits, 64 * _LEVELS
    whole = 1 << (resolved - bits)  # of an entry
    # In whole numbers, so that the law is that of the table to the last bit.
    fractions = (p.as_integer_ratio() for p in mass.tolist())
    units = [(n << resolved) // d for n, d in fractions] + [0] * (count - len(mass))
    units[len(half) - 1] += (1 << resolved) - sum(units)
    own, other = [0] * count, np.arange(count, dtype=np.uint32)
    small = [i for i, u in enumerate(units) if u < whole]
    large = [i for i, u in enumerate(units) if u >= whole]
    while small:
        i, j = small.pop(), large[-1]
        own[i], other[i] = units[i], j
        units[j] -= whole - units[i]
        if units[j] < whole:
            small.append(large.pop())
    for j in large:
        own[j] = whole
    data = b"".join(u.to_bytes(8 * _LEVELS, "big") for u in own)
    words = np.frombuffer(data, ">u4").astype(np.uint32).reshape(count, _LEVELS, 2)
    table = Table(np.ascontiguousarray(words.transpose(1, 0, 2)), other, 1 - len(half))
    table.own.setflags(write=False)
    table.other.setflags(write=False)
    return table


def draw(
    table: Table, key: jax.Array, size: int, bits: Callable[..., jax.Array] = jax.random.bits
) -> jax.Array:
    """Independent draws from a table's law: int32 [size].

    64 random bits decide nearly always; where they do not, 64 more do, and so on to 256.

    Args:
      table: the law. key: used for nothing else. size: how many.
      bits: makes random words.
    """
    entry_bits = (len(table.other) - 1).bit_length()

    def words(level):
        return bits(jax.random.fold_in(key, level), (2, size), jnp.uint32)

    high, low = words(0)
    index = high >> (32 - entry_bits)

    def compare(level, high, low):
        """Whether a number is below the entry's, and whether it may be."""
        entries = jnp.asarray(table.own)[level, index]
        equal = high == entries[:, 0]
        below = (high < entries[:, 0]) | (equal & (low < entries[:, 1]))
        return below, equal & (low == entries[:, 1])

    def undecided(state):
        level, _, tied = state
        return jnp.any(tied) & (level < _LEVELS)

    def decide(state):
        level, own, tied = state
        below, equal = compare(level, *words(level))
        return level + 1, own | (tied & below), tied & equal

    first = compare(0, high & np.uint32((1 << (32 - entry_bits)) - 1), low)
    _, own, _ = jax.lax.while_loop(undecided, decide, (jnp.int32(1), *first))
    chosen = jnp.where(own, index, jnp.asarray(table.other)[index])
    return chosen.astype(jnp.int32) + table.first
