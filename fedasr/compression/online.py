"""Online Model Compression (arXiv 2205.03494): parameters in few bits, on the wire and at rest.

What is kept of a weight matrix V are the codes of Q(V) in a small float format and two numbers,

    V ~ scale * Q(V) + bias,

the least-squares fit of V on Q(V), which takes back what rounding changed in the mean and
the spread. Three things hold accuracy: that fit for every variable, leaving everything but weight
matrices alone, and compressing only a random share of the matrices (the paper's figure is about
90%), another subset for every client in every round.

With S1E3M7, 11 bits, on 90% of the matrices a client receives 0.409 of their float32 bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fedasr.compression.formats import FloatFormat, decode, encode
from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate
from fedasr.streams import Stream, fold

# select(path, leaf) -> whether this variable may be compressed; the path's keys joined by "/"
Select = Callable[[str, Any], bool]

# Aligned variables begin here at most: formats that reach higher are wide enough below it, and
# scales stay far from the ends of float32.
_MAX_TOP = 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed variable, a pytree: `scale * decode(codes, fmt) + bias`.

    Attributes:
      codes: unsigned integers of the variable's shape, `fmt.dtype`.
      scale, bias: float32 scalars.
      fmt: the format of the codes, static.
    """

    codes: chex.Array
    scale: chex.Array
    bias: chex.Array
    fmt: FloatFormat = dataclasses.field(metadata={"static": True})


def flags(params: Any, select: Select) -> list[bool]:
    """select(path, leaf) for each leaf of `params`, in order."""
    return jax.tree.leaves(_map_selected(lambda path, leaf, selected: selected, params, select))


def weight_matrices(path: str, leaf: Any) -> bool:
    """Whether a variable is a weight matrix: a floating-point array of two or more axes.

    Models that stack the biases of several layers or heads in one array need a `select` that looks
    at the path, too.
    """
    del path
    return len(jnp.shape(leaf)) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


# Jitted, so that variables of one shape are traced once and calls outside of jit are fast.
@functools.partial(jax.jit, static_argnames=("fmt", "align"))
def compress_variable(value: chex.Array, fmt: FloatFormat, *, align: bool = False) -> Compressed:
    """Compresses one variable: codes of Q(V), and the least-squares scale and bias.

    Args:
      value: float32, any shape. No gradient passes through.
      fmt: format of the codes.
      align: False for the paper's Q(V), the nearest numbers to the values themselves: those below
        `fmt.min_normal` (0.25 with S1E3M7) lose precision, those above `fmt.max` saturate. True
        for the nearest after a scaling by the power of two that brings the largest value to the
        top of the format, and that `scale` undoes: no more bits, and a precision that does
        not depend on how large the values are.

    Returns:
      `Compressed`. Where all codes are the same, the fit has scale 1 (or the power of two) and the
      bias makes up the mean, so constants and zeros come back exactly. Numbers of the format come
      back exactly, too. A variable with a NaN or an infinity comes back with no finite value.

    Raises:
      UserError: if `value` is not float32.
    """
    if value.dtype != jnp.float32:
        raise UserError(f"Only float32 variables can be compressed, not {value.dtype}.")
    value = jax.lax.stop_gradient(value)
    if value.size == 0:
        return Compressed(value.astype(fmt.dtype), jnp.float32(1), jnp.float32(0), fmt)
    unit = _power_of_two(jnp.max(jnp.abs(value)))
    unit_value = value / unit
    top = 2.0 ** min(math.frexp(fmt.max)[1] - 1, _MAX_TOP)
    codes = encode(unit_value * top if align else value, fmt)
    rounded = decode(codes, fmt)
    peak = jnp.max(jnp.abs(rounded))
    rounded_unit = jnp.where(peak > 0, _power_of_two(peak), unit)

    # Both are of order 1 here, which no square takes out of float32. What is fitted is the
    # remainder: where there is none, nothing at all changes.
    x = rounded / rounded_unit
    rest = unit_value - x
    x_mean, rest_mean = _mean(x), _mean(rest)
    x = x - x_mean
    spread = jnp.sum(x * x)
    flat = spread == 0
    slope = jnp.sum(x * (rest - rest_mean)) / jnp.where(flat, 1.0, spread)
    slope = jnp.where(flat, 0.0, slope)
    scale = (1 + slope) * (unit / rounded_unit)
    bias = (rest_mean - slope * x_mean) * unit
    return Compressed(codes, scale, bias, fmt)


@jax.jit
def decompress_variable(stored: Compressed) -> chex.Array:
    """`scale * decode(codes) + bias`, float32 of the codes' shape."""
    return stored.scale * decode(stored.codes, stored.fmt) + stored.bias


def compress_params(
    params: Any,
    fmt: FloatFormat,
    key: chex.PRNGKey,
    share: float = 0.9,
    select: Select = weight_matrices,
    *,
    align: bool = False,
) -> Any:
    """Parameters as a client finds them after transport: some variables rounded, the others whole.

    Args:
      params: any pytree of arrays.
      fmt: format of the codes.
      key: draws the subset; one per client and round.
      share: part of the selected variables that are compressed, in [0, 1]: see `choose`.
      select: which variables may be compressed; they must be float32.
      align: see `compress_variable`.

    Returns:
      A tree of the same shapes and dtypes. Compressed variables hold the float32 values
      scale * Q + bias, which no gradient passes through; all others are the same bit for bit.

    Raises:
      UserError: for a share out of range, or a selected variable that is not float32.
    """
    chosen = iter(choose(key, sum(flags(params, select)), share))

    def leaf(path, value, selected):
        if not selected:
            return value
        rounded = decompress_variable(_compress(path, value, fmt, align))
        return jnp.where(next(chosen), rounded, value)

    return _map_selected(leaf, params, select)


def choose(key: chex.PRNGKey, count: int, share: float) -> chex.Array:
    """A random subset of `count` variables, of size share * count.

    Where that is not a whole number, the size is one of its two neighbours, at random so that
    every variable is in the subset with probability `share`.

    Returns:
      bool [count].

    Raises:
      UserError: if the share is out of [0, 1].
    """
    check_share(share)
    whole = math.floor(share * count)
    draws = jax.random.uniform(key, (count + 1,))
    size = whole + (draws[count] < share * count - whole)
    # Ranks by comparison, equal draws by their position: compiled faster than sorting.
    a, b, position = draws[:count], draws[:count, None], jnp.arange(count)
    rank = jnp.sum((b < a) | ((b == a) & (position[:, None] < position)), axis=0)
    return rank < size


def as_client_update(
    client_update: ClientUpdate,
    fmt: FloatFormat | None,
    share: float = 0.9,
    select: Select = weight_matrices,
    *,
    align: bool = False,
    upload: FloatFormat | None = None,
) -> ClientUpdate:
    """The same local training, from compressed parameters.

    The delta is relative to the compressed parameters that the client received, not to the
    server's. So it holds what training did and nothing else, and is zero for a client that does
    not train. Relative to the server's parameters it would also hold the rounding of the download,
    which depends on no data and hardly differs between clients: no averaging would remove it, it
    would use up the clipping bound, adaptive server optimisers would take it for a gradient, and
    the server's own float32 parameters would be dragged to the format's numbers.

    Args:
      client_update: any `ClientUpdate`. It is given the client's own key as ever; the subset is
        drawn by that key with a constant folded in.
      fmt: format of what it receives, None for float32.
      share, select, align: see `compress_params`.
      upload: format for the delta's way back, None for float32. It is compressed with `align`,
        whatever the download does (deltas are far below most formats' numbers), and for the same
        subset. Clipping comes after it, so its bound holds; as it scales whole variables, what
        it returns still is scale * Q + bias.

    Returns:
      A `ClientUpdate` for `fedasr.federated.cohort.make_cohort`, with clipping as usual.

    Raises:
      UserError: for a share out of range; when first used, for selected variables that are not
        float32.
    """
    check_share(share)

    def update(params, batches, num_steps, key, max_steps=None, round=0):
        subset = fold(key, Stream.ROUNDED)
        start = params
        if fmt is not None:
            start = compress_params(params, fmt, subset, share, select, align=align)
        # One set of values: computed twice, in different loops, they could differ in the last bit.
        start = jax.lax.optimization_barrier(start)
        delta, metrics = client_update(start, batches, num_steps, key, max_steps, round)
        if upload is not None:
            delta = compress_params(delta, upload, subset, share, select, align=True)
        return delta, metrics

    return update


def check_share(share: float) -> None:
    """Raises UserError if the share is out of [0, 1]."""
    if not 0 <= share <= 1:
        raise UserError(f"share={share} must lie between 0 and 1.")


def _map_selected(function: Callable[[str, Any, bool], Any], params: Any, select: Select) -> Any:
    """function(path, leaf, selected) over the leaves of `params`."""

    def leaf(path, value):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        return function(path, value, bool(select(path, value)))

    return jax.tree_util.tree_map_with_path(leaf, params)


def _compress(path: str, value: chex.Array, fmt: FloatFormat, align: bool) -> Compressed:
    value = jnp.asarray(value)
    if value.dtype != jnp.float32:
        raise UserError(
            f"Only float32 can be compressed; {path!r} is {value.dtype}: change select."
        )
    return compress_variable(value, fmt, align=align)


def _power_of_two(x: chex.Array) -> chex.Array:
    """The power of two at or below x >= 0, float32; within the range whose inverses are normal."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000
    return jnp.clip(jax.lax.bitcast_convert_type(bits, jnp.float32), 2.0**-126, 2.0**126)


def _mean(x: chex.Array) -> chex.Array:
    """The mean, exact for constants."""
    pivot = x.ravel()[0]
    return pivot + jnp.mean(x - pivot)
