"""Floating-point formats SxEyMz of any small width, simulated exactly on float32 arrays.

A format has 1 sign bit, y exponent bits and z mantissa bits (the notation of arXiv 2205.03494): a
code with exponent field e and mantissa field m stands for

    (-1)^sign * 2^(e - bias) * (1 + m / 2^z)    for e > 0,
    (-1)^sign * 2^(1 - bias) * m / 2^z          for e = 0 (subnormal numbers and the two zeros),

with IEEE 754's bias 2^(y-1) - 1. What else has to be chosen:

* By default the top exponent code is used for numbers like any other: with few exponent bits
  it is too much to give up, and model parameters need neither infinities nor NaN. Whatever is
  too large, infinity included, becomes the largest number. A NaN has no code: `quantise` leaves it
  NaN, so that a diverged model does not look healthy, and `encode` makes it a zero.
* With `ieee=True` the top exponent code holds infinities and NaN as in IEEE 754. S1E5M10 is then
  half precision and S1E8M7 bfloat16, bit for bit. With `saturate=False`, as in both of them,
  overflow gives infinity; with `saturate=True` the largest number, also for infinities. A NaN
  becomes a quiet NaN with its sign and without its payload.
* With 8 exponent bits the top code would lie beyond float32: no number uses it in either case.

Rounding is to the nearest number of the format, from a tie to the even code. Results that round to
zero keep their sign. All of it is integer arithmetic on the bits of float32: the result does not
depend on whether the compiler or the device flushes subnormal float32 numbers to zero.
"""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

# float32 itself.
_MANTISSA, _BIAS = 23, 127
_SIZE, _INFINITY, _QUIET_NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000
_WORD = 32  # bits of the integers that packed codes are kept in


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A format of 1 sign bit, exponent bits and mantissa bits; see the module's docstring.

    Attributes:
      exponent_bits: 1 to 8.
      mantissa_bits: 0 to 23. With 0 there are no subnormal numbers but zero.
      ieee: whether the top exponent code stands for infinity and NaN; needs 2 exponent bits and 1
        mantissa bit.
      saturate: whether overflow gives the largest number; always so without `ieee`.

    Raises:
      UserError: for a width out of range, or options that do not go together.
    """

    exponent_bits: int
    mantissa_bits: int
    ieee: bool = False
    saturate: bool = True

    def __post_init__(self):
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= _MANTISSA):
            raise UserError(f"{self}: a format has 1 to 8 exponent and 0 to 23 mantissa bits.")
        if self.ieee and not (self.exponent_bits >= 2 and self.mantissa_bits >= 1):
            raise UserError(f"{self}: ieee=True needs 2 exponent bits and 1 mantissa bit.")
        if not (self.ieee or self.saturate):
            raise UserError(f"{self}: overflow to infinity (saturate=False) needs ieee=True.")

    @classmethod
    def parse(cls, name: str, *, ieee: bool = False, saturate: bool = True) -> "FloatFormat":
        """The format called `name`: such as "S1E3M7", or "float16" or "bfloat16" (IEEE's).

        Raises:
          UserError: if it is no such name, or the format is out of range.
        """
        if name in _NAMED:
            return _NAMED[name]
        match = re.fullmatch(r"S1E(\d+)M(\d+)", name)
        if match is None:
            raise UserError(
                f"{name!r} is no float format: write S1E<exponent>M<mantissa bits>, "
                "float16 or bfloat16."
            )
        return cls(int(match[1]), int(match[2]), ieee, saturate)

    def __str__(self) -> str:
        return f"S1E{self.exponent_bits}M{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What the exponent code of 1 has."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest number."""
        exponent, mantissa = divmod(self._max_code, 2**self.mantissa_bits)
        implicit = 2**self.mantissa_bits if exponent else 0
        return math.ldexp(implicit + mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    @property
    def min_normal(self) -> float:
        """The least positive number of full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """The least positive number; the spacing of numbers below `min_normal`."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    @property
    def dtype(self) -> jnp.dtype:
        """The smallest unsigned type that holds a code: uint8, uint16 or uint32."""
        widths = ((8, jnp.uint8), (16, jnp.uint16), (32, jnp.uint32))
        return jnp.dtype(next(dtype for width, dtype in widths if self.bits <= width))

    @property
    def _top_code(self) -> int:
        """Exponent bits all ones, mantissa zero: infinity where that is what it means."""
        return (2**self.exponent_bits - 1) << self.mantissa_bits

    @property
    def _max_code(self) -> int:
        reserved = self.ieee or self.exponent_bits == 8
        return self._top_code - 1 if reserved else 2 ** (self.bits - 1) - 1


HALF = FloatFormat(5, 10, ieee=True, saturate=False)
BFLOAT16 = FloatFormat(8, 7, ieee=True, saturate=False)
_NAMED = {"float16": HALF, "bfloat16": BFLOAT16}


def packed_bytes(count: int, fmt: FloatFormat) -> int:
    """Bytes of `count` codes laid bit to bit (arrays of codes take `fmt.dtype` for each)."""
    return -(-count * fmt.bits // 8)


def pack(codes: chex.Array, fmt: FloatFormat) -> chex.Array:
    """Codes laid bit to bit, as a device keeps and sends them.

    Args:
      codes: unsigned integers of any shape, from `encode`.
      fmt: their format.

    Returns:
      uint32 [fmt.bits, ceil(codes / 32)]: column g holds the codes g, g + columns, ... of the
      flattened array, so that packing is a few operations on whole rows.
    """
    columns = -(-codes.size // _WORD)
    flat = jnp.pad(codes.reshape(-1).astype(jnp.uint32), (0, columns * _WORD - codes.size))
    rows = flat.reshape(_WORD, columns)
    word, shift, rest = _places(fmt)
    words = jnp.zeros((fmt.bits + 1, columns), jnp.uint32).at[word].add(rows << shift)
    # What does not fit goes on in the next word; in two shifts, for one by all 32 is undefined.
    words = words.at[word + 1].add(rows >> rest >> 1)
    return words[: fmt.bits]


def unpack(words: chex.Array, fmt: FloatFormat, shape: tuple[int, ...]) -> chex.Array:
    """The codes that `pack` was given: `fmt.dtype`, of the given shape."""
    word, shift, rest = _places(fmt)
    following = jnp.minimum(word + 1, fmt.bits - 1)  # the last code has no bits beyond
    rows = (words[word] >> shift) | (words[following] << rest << 1)
    codes = (rows & jnp.uint32(2**fmt.bits - 1)).astype(fmt.dtype)
    return codes.reshape(-1)[: math.prod(shape)].reshape(shape)


def _places(fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the 32 codes of a column: the word where each begins [32], and shifts [32, 1].

    The second shift is one less than what remains of that word.
    """
    word, shift = np.divmod(np.arange(_WORD) * fmt.bits, _WORD)
    shift = shift[:, None].astype(np.uint32)
    return word, shift, (_WORD - 1 - shift).astype(np.uint32)


@functools.partial(jax.jit, static_argnames="fmt")
def quantise(x: chex.Array, fmt: FloatFormat) -> chex.Array:
    """The nearest numbers of a format, ties to even.

    Works under `jit` and `vmap`. Its derivative is zero, like that of `jnp.round`: a
    straight-through gradient is the caller's choice, `x + stop_gradient(quantise(x, fmt) - x)`.

    Args:
      x: float32, any shape.
      fmt: see `FloatFormat`.

    Returns:
      float32 of the same shape, `decode(encode(x, fmt), fmt)` but for NaN, which stays NaN.

    Raises:
      UserError: if `x` is not float32.
    """
    bits = _bits(x)
    out = _decode_bits(encode(x, fmt), fmt)
    out = jnp.where((bits & _SIZE) > _INFINITY, (bits & ~jnp.uint32(_SIZE)) | _QUIET_NAN, out)
    return jax.lax.bitcast_convert_type(out, jnp.float32)


@functools.partial(jax.jit, static_argnames="fmt")
def encode(x: chex.Array, fmt: FloatFormat) -> chex.Array:
    """The codes of the nearest numbers of a format: sign, exponent, mantissa bits, in this order.

    Args:
      x: float32, any shape.
      fmt: see `FloatFormat`; what has no code is in the module's docstring.

    Returns:
      `fmt.dtype` (unsigned) of the same shape, in the lowest `fmt.bits` bits.

    Raises:
      UserError: if `x` is not float32.
    """
    bits = _bits(x)
    size = bits & _SIZE
    drop, offset = _MANTISSA - fmt.mantissa_bits, _BIAS - fmt.bias
    # Codes of normal numbers are float32's own with another bias and fewer bits. Below them the
    # code counts multiples of min_subnormal in the significand, which loses a bit for every binade.
    exponent = jnp.maximum(size >> _MANTISSA, 1)
    normal = exponent > offset
    significand = (size & ((1 << _MANTISSA) - 1)) | (1 << _MANTISSA)
    value = jnp.where(normal, size - jnp.uint32(offset << _MANTISSA), significand)
    shift = drop + jnp.where(normal, 0, offset + 1 - exponent)
    # Dropping 25 bits leaves zero, and more could be too much for a shift. (float32's own subnormal
    # numbers are normal here under 8 exponent bits, whose bias they share, and else become zero.)
    code = _shift_to_even(value, jnp.minimum(shift, 25))
    code = jnp.where(code > fmt._max_code, fmt._max_code if fmt.saturate else fmt._top_code, code)
    nan = fmt._top_code | 1 << (fmt.mantissa_bits - 1) if fmt.ieee else 0
    code = jnp.where(size > _INFINITY, nan, code)
    return (code | (bits >> 31) << (fmt.bits - 1)).astype(fmt.dtype)


@functools.partial(jax.jit, static_argnames="fmt")
def decode(codes: chex.Array, fmt: FloatFormat) -> chex.Array:
    """The numbers that codes stand for, exactly.

    Args:
      codes: unsigned integers of any shape, as `encode` makes them.
      fmt: the format that they are of.

    Returns:
      float32 of the same shape. The top exponent code of a format with 8 exponent bits, which
      `encode` uses under `ieee` only, reads as infinity or NaN.
    """
    return jax.lax.bitcast_convert_type(_decode_bits(codes, fmt), jnp.float32)


def _bits(x: chex.Array) -> chex.Array:
    x = jnp.asarray(x)
    if x.dtype != jnp.float32:
        raise UserError(f"Only float32 arrays can be brought to a float format, not {x.dtype}.")
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _shift_to_even(value: chex.Array, shift: chex.Array) -> chex.Array:
    """value / 2^shift, rounded to the nearest integer and from a tie to the even one (uint32)."""
    floor = value >> shift
    # Twice the rest: half a unit has no integer where nothing is dropped.
    twice, unit = 2 * (value - (floor << shift)), jnp.uint32(1) << shift
    return floor + ((twice > unit) | ((twice == unit) & (floor & 1 == 1)))


def _decode_bits(codes: chex.Array, fmt: FloatFormat) -> chex.Array:
    """The bits of float32, uint32."""
    codes = jnp.asarray(codes).astype(jnp.uint32)
    size = codes & (2 ** (fmt.bits - 1) - 1)
    drop, offset = _MANTISSA - fmt.mantissa_bits, _BIAS - fmt.bias
    out = (size << drop) + (offset << _MANTISSA)
    if fmt.exponent_bits < 8:
        # Exact: at most 2^23 times a power of two, and never a subnormal float32.
        small = size.astype(jnp.float32) * jnp.float32(fmt.min_subnormal)
        small = jax.lax.bitcast_convert_type(small, jnp.uint32)
        out = jnp.where(size < 2**fmt.mantissa_bits, small, out)
        if fmt.ieee:
            special = _INFINITY | (size - fmt._top_code) << drop
            out = jnp.where(size >= fmt._top_code, special, out)
    return out | codes >> (fmt.bits - 1) << 31
