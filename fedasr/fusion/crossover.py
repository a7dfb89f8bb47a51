"""Merging two models: spherical interpolation with a split point, over any pytree.

A model is a pytree of arrays. Its leaves by depth (`leaf_order`) make one vector; a *chromosome* is
a group of leaves that is merged on its own, with its own angle, mixing ratio and split point (by
default all leaves are one). Up to the split point the child is SLERP_w(a, b), from there on
SLERP_{1-w} (arXiv 2508.16204).

JAX counts in 32 bits. Where a chromosome has 2**31 parameters or more its split point is counted in
blocks of `split_unit` parameters, and the blocks of a leaf's rows in NumPy's 64 bits.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

PyTree = Any
# Below this sine of the angle (parallel or opposite vectors) the interpolation is linear.
SMALLEST_SINE = 1e-6
_COUNT = 2**32  # that 32 bits can


def leaf_chromosomes(
    params: PyTree, chromosome: Callable[[str], str] | None = None
) -> tuple[int, ...]:
    """The chromosome of every leaf, numbered from 0 in the order of first appearance.

    Args:
      params: a model, or its shapes.
      chromosome: from a leaf's path ("encoder/block_0/kernel") to the name of its chromosome; None
        puts all leaves in one.
    """
    numbers: dict[str, int] = {}
    found = []
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append(numbers.setdefault(chromosome(name) if chromosome else "", len(numbers)))
    return tuple(found)


def leaf_order(params: PyTree) -> tuple[int, ...]:
    """The leaves by depth: their numbers in JAX's order, in the order in which they make a vector.

    JAX sorts a dict's keys by their characters, which puts block_10 before block_2: here digits in
    a row count as a number. Whatever else holds leaves (named tuples, lists) is in JAX's order.

    Args:
      params: a model, or its shapes.
    """
    first: dict[Any, int] = {}
    places = []
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        place: list[tuple[Any, int]] = []
        for depth, entry in enumerate(path):
            name = getattr(entry, "key", None)
            if isinstance(entry, jax.tree_util.DictKey) and isinstance(name, str):
                place.append((_natural(name), 0))
            else:
                place.append(((), first.setdefault(path[: depth + 1], i)))
        places.append(place)
    return tuple(sorted(range(len(places)), key=places.__getitem__))


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts as `name` does, but for digits in a row, which are a number."""
    digit = ord("0")
    parts = re.findall("[0-9]+|[^0-9]", name)
    places = [(digit, int(x)) if "0" <= x[0] <= "9" else (ord(x), 0) for x in parts]
    return (*places, (-1, 0)), name


def split_unit(size: int) -> int:
    """Parameters that a split point counts as one: 1 below 2**31, else so that 31 bits suffice.

    Args:
      size: parameters of the chromosome.
    """
    unit = 1
    while -(-size // unit) >= 2**31:
        unit *= 2
    return unit


def split_points(size: int) -> int:
    """The split points that a chromosome has, the number of its blocks: below 2**31.

    Args:
      size: parameters of the chromosome.
    """
    return -(-size // split_unit(size))


def chromosome_sizes(params: PyTree, chromosomes: Sequence[int]) -> tuple[int, ...]:
    """Number of parameters of every chromosome.

    Args:
      params: a model, or its shapes.
      chromosomes: from `leaf_chromosomes`.
    """
    sizes = [0] * (max(chromosomes) + 1)
    for leaf, number in zip(jax.tree.leaves(params), chromosomes, strict=True):
        sizes[number] += leaf.size
    return tuple(sizes)


def slerp_weights(
    a: Sequence[jax.Array], b: Sequence[jax.Array], ratio: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights (of a, of b) of the spherical interpolation of two vectors, each cut into arrays.

    sin((1 - w) angle) / sin(angle) and sin(w angle) / sin(angle); (1 - w, w) where the sine is
    below `SMALLEST_SINE` or a vector is zero.

    Args:
      a, b: the parts of the two vectors.
      ratio: w in [0, 1], float32 of any shape; 0 gives a, 1 gives b.

    Returns:
      float32, the shape of `ratio` each.
    """

    def norm(parts):
        return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in parts))

    a, b = ([x.astype(jnp.float32) for x in parts] for parts in (a, b))
    length_a, length_b = norm(a), norm(b)
    zero = (length_a == 0) | (length_b == 0)
    scale_a = 1 / jnp.where(zero, 1.0, length_a)
    scale_b = 1 / jnp.where(zero, 1.0, length_b)
    pairs = [(x * scale_a, y * scale_b) for x, y in zip(a, b, strict=True)]
    # Half the angle by its tangent: the arc cosine of a dot product loses half of the digits where
    # vectors are nearly parallel or opposite.
    apart, along = norm([x - y for x, y in pairs]), norm([x + y for x, y in pairs])
    angle = 2 * jnp.arctan2(apart, along)
    sine = 2 * apart * along / jnp.maximum(jnp.square(apart) + jnp.square(along), 1e-30)
    linear = zero | (sine < SMALLEST_SINE)
    sine = jnp.where(linear, 1.0, sine)
    weight_a = jnp.where(linear, 1 - ratio, jnp.sin((1 - ratio) * angle) / sine)
    weight_b = jnp.where(linear, ratio, jnp.sin(ratio * angle) / sine)
    return weight_a, weight_b


def slerp(a: PyTree, b: PyTree, ratio: jax.Array | float) -> PyTree:
    """Spherical interpolation of two models as whole vectors.

    Args:
      a, b: models of one structure.
      ratio: 0 gives a, 1 gives b.
    """
    chromosomes = leaf_chromosomes(a)
    ratio = jnp.full(1, ratio, jnp.float32)
    whole = [split_points(size) for size in chromosome_sizes(a, chromosomes)]
    return crossover(a, b, ratio, jnp.array(whole, jnp.int32), chromosomes)


def crossover(
    a: PyTree,
    b: PyTree,
    ratio: jax.Array,
    split: jax.Array,
    chromosomes: Sequence[int],
) -> PyTree:
    """The child of two models: SLERP_w before the split point of a chromosome, SLERP_{1-w} after.

    Args:
      a, b: models of one structure. Leaves that are not floating point are a's.
      ratio: w in [0, 1] of every chromosome, float32 [chromosomes].
      split: number of parameters before the split point, int32 [chromosomes], in units of
        `split_unit` of the chromosome's size; `split_points` makes it SLERP_w as a whole.
      chromosomes: of every leaf, from `leaf_chromosomes`.

    Returns:
      The child, in the dtypes of a; computed in float32.

    Raises:
      UserError: a dimension of 2**32 or more.
    """
    leaves_a, structure = jax.tree.flatten(a)
    leaves_b = jax.tree.leaves(b)
    order, sizes = leaf_order(a), chromosome_sizes(a, chromosomes)
    children = list(leaves_a)
    for number in range(max(chromosomes) + 1):
        members = [
            i
            for i, group in enumerate(chromosomes)
            if group == number and jnp.issubdtype(leaves_a[i].dtype, jnp.inexact)
        ]
        if not members:
            continue
        own = [leaves_a[i] for i in members], [leaves_b[i] for i in members]
        both = jnp.stack([ratio[number], 1 - ratio[number]])
        weight_a, weight_b = slerp_weights(*own, both)
        begin, unit = 0, split_unit(sizes[number])
        for i in order:
            if chromosomes[i] != number:
                continue
            x, y = leaves_a[i], leaves_b[i]
            if i in members:
                before = _before(x.shape, begin, split[number], unit)
                merged = jnp.where(before, weight_a[0], weight_a[1]) * x.astype(jnp.float32)
                merged += jnp.where(before, weight_b[0], weight_b[1]) * y.astype(jnp.float32)
                children[i] = merged.astype(x.dtype)
            begin += x.size
    return jax.tree.unflatten(structure, children)


def _before(shape: tuple[int, ...], begin: int, split: jax.Array, unit: int) -> jax.Array:
    """Which parameters of a leaf lie before the split point: bool of its shape.

    Args:
      begin: parameters before the leaf. split: int32, in units of `unit` parameters.
    """
    if unit == 1:
        place = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        return place < split - begin
    rows, width = _rows(shape, unit)
    starts = begin + np.arange(rows, dtype=np.int64) * width
    block = jnp.asarray(starts // unit, jnp.int32)[:, None]
    rest = jnp.asarray(starts % unit, jnp.uint32)[:, None]
    within = (rest + jax.lax.iota(jnp.uint32, width)) // np.uint32(unit)
    return (block + within.astype(jnp.int32) < split).reshape(shape)


def _rows(shape: tuple[int, ...], spare: int) -> tuple[int, int]:
    """A leaf as (rows, parameters of a row), a row as long as 32 bits can count with some to spare.

    Raises:
      UserError: a dimension is longer than that.
    """
    for axis in range(max(1, len(shape))):
        if (width := math.prod(shape[axis:])) <= _COUNT - spare:
            return math.prod(shape[:axis]), width
    raise UserError(f"a tensor of shape {shape} has a dimension that 32 bits cannot count")


def mutate(params: PyTree, key: jax.Array, std: float) -> PyTree:
    """Adds N(0, std^2) to every floating-point parameter; the others stay.

    Args:
      params: a model.
      key: of this mutation.
      std: standard deviation; 0 returns `params`.
    """
    if not std:
        return params
    leaves, structure = jax.tree.flatten(params)
    begin, mutated = 0, []
    for x in leaves:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            noise = std * _normal(key, begin, x.shape)
            mutated.append((x.astype(jnp.float32) + noise).astype(x.dtype))
        else:
            mutated.append(x)
        begin += x.size
    return jax.tree.unflatten(structure, mutated)


def _normal(key: jax.Array, begin: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32, up to 5.3 in size: a hash of the key and a parameter's number.

    jax.random's generator takes half as long as scoring a model of the digits on a CPU; these few
    operations are fused into the merge. The key itself comes from jax.random.
    """
    words = jax.random.key_data(key)
    size = math.prod(shape)
    if begin + size <= 2**32:
        number = np.uint32(begin % 2**32) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
        bits = _mix(_mix(number ^ words[0]) + words[-1])
    else:
        rows, width = _rows(shape, 0)
        starts = begin + np.arange(rows, dtype=np.int64) * width
        low = jnp.asarray(starts % 2**32, jnp.uint32)[:, None]
        number = low + jax.lax.iota(jnp.uint32, width)
        high = jnp.asarray(starts >> 32, jnp.uint32)[:, None] + (number < low)
        # _mix(0) is 0: below 2**32 parameters these are the bits of above.
        bits = (_mix(_mix(number ^ words[0]) + words[-1] + _mix(high))).reshape(shape)
    # 23 bits and a half: symmetrical, exact, never -1 or 1.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1
    return math.sqrt(2) * jax.lax.erf_inv(uniform)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every input bit flips half of the output bits (lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
