"""Standard normal draws whose tails go as far as a privacy claim needs them to.

A float32 normal made from one word of 32 random bits ends: JAX's at 5.42 standard deviations. Where
a user moves the sum, outcomes beyond that end give the user away, with a probability that no
epsilon accounts for. Here a pair of draws is a point in the plane (Box and Muller, 1958): half its
squared radius is an exponential variable -log(u), from 40 random bits, and where all of the first
32 are zero it goes on from fresh bits behind them, since the exponential law has no memory. So the
tail is the normal law's own as far as `reach`: what 8 further bits leave open is less than half a
percent of a probability of 2^-32, and of less probable radii alike. Two words of random bits make
two draws, as many as JAX's own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr import stacks

_LEADING = 32  # bits of u that a draw resolves before it asks for more
_STEP = _LEADING * math.log(2.0)  # so much exponential they stand for
_MOST_DRAWS = 2**31 - 2
# A reach so far beyond the shift makes the rest of the tail smaller than any delta in use.
_MARGIN = 16.0
_BLOCK = 1 << 18  # draws made together: what is between words and draws stays in a cache
_AT_ONCE = 16  # so many of them on accelerators


def _draws(reach: float) -> int:
    """So many exponential draws, one behind the other, reach that far."""
    return min(max(1, math.ceil(min(reach, 1e9) ** 2 / 2 / _STEP)), _MOST_DRAWS)


def reached(reach: float) -> float:
    """How far `standard_normal` goes when asked for `reach`, in standard deviations."""
    return math.sqrt(2 * _STEP * _draws(reach))


def reach_for(shift: float) -> float:
    """The reach with which noise hides whoever moves it by `shift` standard deviations."""
    return shift + _MARGIN


def released_reach(noise_multiplier: float) -> float:
    """The reach of noise on what is published about all users, whose neighbours are not known yet.

    Replacing a user moves it by up to twice as much as removing one.
    """
    return reach_for(2 / noise_multiplier)


def exponential(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Standard exponential variables -log(u), of u uniform in (0, 1) with 40 bits.

    Args:
      words: uint32 [2, n], random; of the second the first 8 bits are used.

    Returns:
      float32 [n], at most 32 log 2; and bool [n], whether the first 32 bits of u are zero: then
      32 log 2 is returned, to which an independent exponential variable has to be added.
    """
    high, low = words
    small = high >> 31 == 0  # u below 1/2: near 0 and near 1 the small one of u, 1 - u is resolved
    leading = high & 0x7FFFFFFF
    rest = (low >> 24).astype(jnp.float32) + 0.5
    fraction = leading.astype(jnp.float32) * 2.0**-32 + rest * 2.0**-40
    more = small & (leading == 0)
    of_small = jnp.where(more, jnp.float32(_STEP), -jnp.log(fraction))
    return jnp.where(small, of_small, -jnp.log1p(-fraction)), more


def pairs(
    first: jax.Array, more: jax.Array, angle: jax.Array, key: jax.Array, draws: int
) -> tuple[jax.Array, jax.Array]:
    """Normal draws from exponentials and angles.

    Args:
      first, more: from `exponential`, [n].
      angle: uint32 [n], of which the last 24 bits are random.
      key: for what the tail needs besides; its children 0, 1, ... are used.
      draws: exponential draws one behind the other, at most, counting the first.

    Returns:
      Two float32 [n]: independent standard normal variables.
    """

    def unfinished(state):
        number, _, more = state
        return jnp.any(more) & (number < draws)

    def go_on(state):
        number, sums, more = state
        bits = jax.random.bits(jax.random.fold_in(key, number), (2, *sums.shape), jnp.uint32)
        further, again = exponential(bits)
        return number + 1, jnp.where(more, sums + further, sums), more & again

    _, half_square, _ = jax.lax.while_loop(unfinished, go_on, (jnp.int32(1), first, more))
    radius = jnp.sqrt(2 * half_square)
    # Two bits choose the quarter, 22 the angle in [-pi/4, pi/4), at the middle of its step.
    steps = jax.lax.bitcast_convert_type(angle << 8, jnp.int32) >> 10
    cos, sin = _cos_sin((steps.astype(jnp.float32) + 0.5) * np.float32(math.pi / 4 * 2.0**-21))
    cos, sin = radius * cos, radius * sin
    swapped, opposite = angle & 1 == 1, angle & 2 == 2
    x, y = jnp.where(swapped, -sin, cos), jnp.where(swapped, cos, sin)
    return jnp.where(opposite, -x, x), jnp.where(opposite, -y, y)


def _cos_sin(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of angles in [-pi/4, pi/4], to float32's precision, by their series."""
    y = x * x
    cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y / 40320)))
    sin = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
    return cos, sin


def standard_normal(key: jax.Array, size: int, reach: float) -> jax.Array:
    """Independent standard normal draws, float32 [size].

    Args:
      key: a JAX random key, used for nothing else.
      size: how many.
      reach: in standard deviations, how far the tails have to go at least (see `reach_for`).
    """
    draws = _draws(reach)

    def block(number, size):
        block_key = jax.random.fold_in(key, number)
        half = -(-size // 2)
        words = jax.random.bits(jax.random.fold_in(block_key, 0), (2, half), jnp.uint32)
        first, more = exponential(words)
        drawn = pairs(first, more, words[1], jax.random.fold_in(block_key, 1), draws)
        return jnp.concatenate(drawn)[:size]

    whole, rest = divmod(size, _BLOCK)
    if whole == 0:
        return block(0, size)

    def blocks(at_once):
        numbers = jnp.arange(-(-whole // at_once) * at_once).reshape(-1, at_once)
        drawn = jax.lax.map(jax.vmap(lambda i: block(i, _BLOCK)), numbers)
        return drawn.reshape(-1)[: whole * _BLOCK]

    # The same draws. An accelerator launches some hundred operations for whatever is made together.
    found = jax.lax.platform_dependent(
        cpu=lambda: blocks(1), default=lambda: blocks(min(_AT_ONCE, whole))
    )
    return jnp.concatenate([found, block(whole, rest)]) if rest else found


def normal_like(key: jax.Array, tree: Any, reach: float) -> Any:
    """Independent standard normal draws in float32, shaped like the arrays of `tree`.

    They are made as one vector: one program however many arrays there are. Where blocks are stacked
    (`fedasr.stacks`) each of them has the draws that it would have by itself.
    """
    drawn = standard_normal(key, _size(tree), reach)
    if not stacks.is_stacked(tree):
        return _cut(drawn, tree)
    blocks, count = tree[stacks.STACK], stacks.len_of(tree)
    # Trees are in the order of their names, so that all blocks lie together, 10 before 2.
    before = {name: x for name, x in tree.items() if name < stacks.BLOCK}
    after = {name: x for name, x in tree.items() if name not in before and name != stacks.STACK}
    begin, end = _size(before), _size(before) + _size(blocks)
    row = np.argsort(np.argsort([str(i) for i in range(count)]))
    rows = drawn[begin:end].reshape(count, -1)[row]
    return (
        _cut(drawn[:begin], before) | _cut(drawn[end:], after) | {stacks.STACK: _cut(rows, blocks)}
    )


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _cut(drawn: jax.Array, tree: Any) -> Any:
    """Draws [n], or of stacked blocks [blocks, n], in the shapes of a tree's arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = math.prod(drawn.shape[:-1])
    sizes = [math.prod(x.shape) // rows for x in leaves]
    parts = [
        drawn[..., end - size : end].reshape(x.shape)
        for x, size, end in zip(leaves, sizes, np.cumsum(sizes), strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def tail_delta(shift: float, reach: float, *, rounds: int, turns: float, coordinates: int) -> float:
    """What the end of the tails adds to delta, at most.

    Let R be where the noise ends, and a user move the noise by a vector of norm s. Inside the
    discs of radius R the draws have the normal law; outside lies what only the user can explain,
    with a probability of at most the sum over pairs of coordinates of exp(-(R - s_i)^2 / 2), s_i
    being the part of s in a pair. Since the s_i add up to at most s sqrt(pairs), in whatever
    direction the user moves the sum, that is at most

        pairs exp(-R^2 / 2) + sqrt(pairs) s R exp(-(R - s)^2 / 2),

    and as much again as the first term for the mass that is kept at R. Over rounds it adds up.

    Args:
      shift: s, in standard deviations of the noise.
      reach: as `standard_normal` was asked for.
      rounds: in which noise is drawn.
      turns: expected number of rounds in which the user takes part, at most.
      coordinates: numbers that get noise.

    Returns:
      A probability, 1 where the bound says nothing.
    """
    end, discs = reached(reach), max(1, -(-coordinates // 2))
    if shift >= end:
        return 1.0
    if rounds == 0:
        return 0.0
    logs = [math.log(2 * rounds * discs) - end**2 / 2]
    if shift > 0 and turns > 0:
        logs.append(
            math.log(turns) + math.log(discs) / 2 + math.log(shift * end) - (end - shift) ** 2 / 2
        )
    most = max(logs)
    total = most + math.log(sum(math.exp(value - most) for value in logs))
    return math.exp(total) if total < 0 else 1.0
