import bisect
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.compression import formats
from fedasr.compression.formats import BFLOAT16, HALF, FloatFormat
from fedasr.errors import UserError

S1E3M7 = FloatFormat(3, 7)
SMALL = [
    FloatFormat(*widths)
    for widths in ((1, 0), (1, 3), (2, 0), (2, 3), (3, 7), (4, 3), (5, 2), (6, 0), (7, 1), (8, 2))
] + [
    FloatFormat(4, 3, ieee=True),
    FloatFormat(2, 1, ieee=True, saturate=False),
    FloatFormat(5, 2, ieee=True, saturate=False),
    FloatFormat(8, 1, ieee=True, saturate=False),
]
LARGE = [
    FloatFormat(*widths)
    for widths in ((1, 23), (3, 7), (4, 14), (5, 10), (6, 22), (7, 0), (7, 23), (8, 0), (8, 22))
]
MILLION = 2**20


def ids(fmt):
    return f"{fmt}{'-ieee' * fmt.ieee}{'-infinite' * (not fmt.saturate)}"


@functools.cache
def jitted(fmt):
    return jax.jit(
        lambda x, codes: (
            formats.quantise(x, fmt),
            formats.encode(x, fmt),
            formats.decode(codes, fmt),
        )
    )


def run(fmt, x=(), codes=()):
    """x quantised, the codes of x, `codes` decoded; padded so that there are few shapes."""
    x, codes = np.asarray(x, np.float32), np.asarray(codes, fmt.dtype)
    room = 2**12 if max(x.size, codes.size) <= 2**12 else MILLION
    padded = np.pad(x, (0, room - x.size)), np.pad(codes, (0, room - codes.size))
    quantised, encoded, decoded = jax.device_get(jitted(fmt)(*padded))
    assert encoded.dtype == fmt.dtype
    return quantised[: x.size], encoded[: x.size], decoded[: codes.size]


def quantise(fmt, x):
    return run(fmt, x)[0]


def decode(fmt, codes):
    return run(fmt, codes=codes)[2]


def value_of(code, fmt):
    """The number of a positive code, as an exact fraction; None for infinity."""
    bias = 2 ** (fmt.exponent_bits - 1) - 1
    exponent, mantissa = divmod(code, 2**fmt.mantissa_bits)
    if (fmt.ieee or fmt.exponent_bits == 8) and exponent == 2**fmt.exponent_bits - 1:
        return None
    if exponent == 0:
        return Fraction(2) ** (1 - bias) * Fraction(mantissa, 2**fmt.mantissa_bits)
    return Fraction(2) ** (exponent - bias) * (1 + Fraction(mantissa, 2**fmt.mantissa_bits))


@functools.cache
def numbers(fmt):
    """All the positive numbers of a format and zero: entry `code` is the fraction."""
    values = [value_of(code, fmt) for code in range(2 ** (fmt.bits - 1))]
    return values[: values.index(None)] if None in values else values


def float32(fraction):
    """Exactly, or not at all."""
    x = np.float32(float(fraction))
    assert Fraction(float(x)) == fraction
    return x


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def assert_same(a, b):
    """Bit for bit, and NaN where the other is NaN."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(bits(a)[~np.isnan(a)], bits(b)[~np.isnan(b)])


@pytest.mark.parametrize("fmt", SMALL, ids=ids)
def test_every_code_and_what_rounds_to_it(fmt):
    values = numbers(fmt)
    count, sign = len(values), 1 << (fmt.bits - 1)
    largest = values[-1]
    # One more number, if the format went on; halfway to it begins infinity.
    beyond = largest + (largest - values[-2] if fmt.mantissa_bits else largest)
    points, codes = [], []  # floats, the code that each must have
    for code, value in enumerate(values):
        points.append(float32(value))
        codes.append(code)
        above = values[code + 1] if code + 1 < count else beyond
        middle = float32((value + above) / 2)
        after = code + 1
        if after == count and fmt.saturate:
            after = code
        points += [np.nextafter(middle, np.float32(0)), middle]
        codes += [code, code if code % 2 == 0 else after]
        if (following := np.nextafter(middle, np.float32(np.inf))) < np.inf:
            points.append(following)
            codes.append(after)
    points, codes = np.array(points), np.array(codes)
    expected = np.array([*map(float32, values), np.float32(np.inf)])[codes]
    got, got_codes, _ = run(fmt, points)
    assert_same(got, expected)
    np.testing.assert_array_equal(got_codes, codes)
    negative, negative_codes, _ = run(fmt, -points)
    assert_same(negative, -expected)
    np.testing.assert_array_equal(negative_codes, codes + sign)
    everything = np.concatenate([np.arange(count), np.arange(count) + sign])
    exact = np.array([float32(value) for value in values])
    assert_same(decode(fmt, everything), np.concatenate([exact, -exact]))


@pytest.mark.parametrize("fmt", SMALL, ids=ids)
def test_random_numbers_go_to_the_nearest(fmt):
    rng = np.random.default_rng(fmt.bits)
    x = (fmt.max * 1.1 * rng.random(100) ** rng.integers(1, 12, 100)).clip(0, 3e38)
    x = x.astype(np.float32)
    got, codes, _ = run(fmt, x)
    values = numbers(fmt)
    for number, result, code in zip(x, got, codes, strict=True):
        exact = Fraction(float(number))
        if result == np.inf:
            assert not fmt.saturate and exact > values[-1]
            continue
        assert values[code] == Fraction(float(result))
        place = bisect.bisect(values, exact)
        best = min(abs(exact - value) for value in values[max(place - 1, 0) : place + 1])
        assert abs(exact - values[code]) == best


def random_bits(rng, fmt, count=MILLION):
    """Half of them any bits of float32, half with exponents around those of the format."""
    x = rng.integers(0, 2**32, count, dtype=np.uint32)
    low = max(0, 127 - fmt.bias - fmt.mantissa_bits - 3)
    high = min(255, 127 - fmt.bias + 2**fmt.exponent_bits + 2)
    near = rng.integers(low, high, count // 2, dtype=np.uint32) << 23
    x[: count // 2] = x[: count // 2] & 0x807FFFFF | near
    return x.view(np.float32)


def in_float64(x, fmt):
    """Another way to round: numpy's rint of multiples of the spacing, in float64."""
    bias = 2 ** (fmt.exponent_bits - 1) - 1
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = x.astype(np.float64)
    _, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, 1 - bias) - fmt.mantissa_bits)
    top = 2**fmt.exponent_bits - 1 - (fmt.exponent_bits == 8) - bias
    largest = np.ldexp(2 - 2.0**-fmt.mantissa_bits, top)
    return np.clip(np.rint(x / spacing) * spacing, -largest, largest).astype(np.float32)


@pytest.mark.parametrize("fmt", LARGE, ids=ids)
def test_a_million_bit_patterns(fmt):
    x = random_bits(np.random.default_rng(fmt.bits), fmt)
    got, codes, _ = run(fmt, x)
    assert_same(got, in_float64(x, fmt))
    again, codes_again, decoded = run(fmt, got, codes)
    assert_same(again, got)
    # A NaN has no code here.
    nan = np.isnan(x)
    np.testing.assert_array_equal(codes_again[~nan], codes[~nan])
    expected = np.where(nan, np.copysign(np.float32(0), x), got)
    np.testing.assert_array_equal(bits(decoded), bits(expected))


@pytest.mark.parametrize(
    "fmt, dtype", [(HALF, np.float16), (BFLOAT16, ml_dtypes.bfloat16)], ids=["half", "bfloat16"]
)
def test_ieee_formats_are_those_of_numpy(fmt, dtype):
    every = np.arange(2**16, dtype=np.uint16)
    exact = every.view(dtype).astype(np.float32)
    got, codes, decoded = run(fmt, exact, every)
    assert_same(decoded, exact)
    assert_same(got, exact)
    numbers = ~np.isnan(exact)
    np.testing.assert_array_equal(codes[numbers], every[numbers])
    # From a NaN a quiet one with its sign.
    assert np.all(np.isnan(codes[~numbers].view(dtype)))
    np.testing.assert_array_equal(codes[~numbers] >> 15, every[~numbers] >> 15)

    x = random_bits(np.random.default_rng(0), fmt)
    with np.errstate(all="ignore"):
        expected = x.astype(dtype)
    got, codes, _ = run(fmt, x)
    assert_same(got, expected.astype(np.float32))
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(codes[numbers], expected.view(np.uint16)[numbers])
    # Saturating, only what overflows is different.
    saturated = quantise(FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, ieee=True), x)
    assert_same(saturated, np.clip(expected.astype(np.float32), -fmt.max, fmt.max))
    assert fmt.max == float(ml_dtypes.finfo(dtype).max)
    assert fmt.min_normal == float(ml_dtypes.finfo(dtype).smallest_normal)
    assert fmt.min_subnormal == float(ml_dtypes.finfo(dtype).smallest_subnormal)


def test_float32_itself_changes_nothing():
    x = random_bits(np.random.default_rng(1), FloatFormat(8, 23))
    whole, codes, _ = run(FloatFormat(8, 23, ieee=True, saturate=False), x)
    assert_same(whole, x)
    np.testing.assert_array_equal(codes[~np.isnan(x)], bits(x)[~np.isnan(x)])
    finite = quantise(FloatFormat(8, 23), x)
    assert_same(finite, np.clip(x, *(np.finfo(np.float32).max * np.float32([-1, 1]))))


@pytest.mark.parametrize("fmt", SMALL, ids=ids)
def test_nan_and_infinity(fmt):
    x = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0])
    got, codes, _ = run(fmt, x)
    overflow = fmt.max if fmt.saturate else np.inf
    assert_same(got, np.float32([np.nan, np.nan, overflow, -overflow, 0.0, -0.0]))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(x))
    decoded = decode(fmt, codes)
    assert_same(decoded[2:], got[2:])
    assert np.all(np.isnan(decoded[:2])) if fmt.ieee else not np.any(decoded[:2])


finite32 = st.floats(width=32, allow_nan=False)
any_format = st.sampled_from(SMALL)


@given(any_format, st.lists(finite32, min_size=2, max_size=8))
@settings(deadline=None, max_examples=150)
def test_idempotent_monotone_symmetric(fmt, x):
    x = np.sort(np.float32(x))
    got = quantise(fmt, x)
    assert_same(quantise(fmt, got), got)
    assert np.all(got[1:] >= got[:-1])
    assert_same(quantise(fmt, -x), -got)
    inside = np.abs(x) <= fmt.max
    x, got = x[inside].astype(np.float64), got[inside].astype(np.float64)
    relative = np.abs(x) * 2.0 ** -(fmt.mantissa_bits + 1)
    assert np.all(np.abs(got - x) <= np.maximum(relative, fmt.min_subnormal / 2))


def test_ties_go_to_even_codes():
    # 1 + 1/128 has an odd mantissa; below 0.25 numbers are multiples of 2^-9.
    x = [1 + 1 / 256, 1 + 3 / 256, 1.5 * 2**-9, 0.5 * 2**-9, 2.5 * 2**-9, 31.9999]
    expected = [1, 1 + 2 / 128, 2 * 2**-9, 0, 2 * 2**-9, 31.875]
    np.testing.assert_array_equal(quantise(S1E3M7, x), np.float32(expected))


def test_subnormal_float32_survive_where_the_format_has_them():
    x = np.arange(1, 2**23, 2**11 + 1, dtype=np.uint32).view(np.float32)  # from 2^-149 on
    got = quantise(FloatFormat(8, 2), x)
    assert np.count_nonzero(got) > x.size / 2
    expected = np.rint(x.astype(np.float64) * 2.0**128) / 2.0**128
    np.testing.assert_array_equal(bits(got), bits(expected.astype(np.float32)))
    assert not np.any(quantise(FloatFormat(7, 23), x))


def test_limits():
    assert (S1E3M7.bits, S1E3M7.bias, S1E3M7.max) == (11, 3, 31.875)
    assert (S1E3M7.min_normal, S1E3M7.min_subnormal) == (0.25, 2.0**-9)
    assert FloatFormat(1, 0).max == FloatFormat(1, 0).min_normal == 2.0
    assert FloatFormat(8, 23).max == float(np.finfo(np.float32).max)
    for fmt in SMALL:
        x = [fmt.max, fmt.min_normal, fmt.min_subnormal, 0.49 * fmt.min_subnormal]
        np.testing.assert_array_equal(quantise(fmt, x), np.float32([*x[:3], 0]))
    assert FloatFormat(2, 3).dtype == np.uint8 and FloatFormat(8, 0).dtype == np.uint16
    assert FloatFormat(8, 8).dtype == np.uint32


def test_names():
    assert FloatFormat.parse("S1E3M7") == S1E3M7 and str(S1E3M7) == "S1E3M7"
    assert FloatFormat.parse("S1E5M10", ieee=True, saturate=False) == HALF
    assert len({S1E3M7, FloatFormat.parse("S1E3M7"), HALF}) == 2
    for name in ("S0E3M7", "E3M7", "S1E3", "S1E0M3", "S1E9M3", "S1E5M24", "s1e3m7", "S1E3M7 "):
        with pytest.raises(UserError):
            FloatFormat.parse(name)
    for options in ((1, 3, True), (5, 0, True), (5, 10, False, False)):
        with pytest.raises(UserError):
            FloatFormat(*options)
    for function in (formats.quantise, formats.encode):
        with pytest.raises(UserError, match="float16"):
            function(jnp.ones(2, jnp.float16), S1E3M7)


def test_packed_bytes():
    assert [formats.packed_bytes(n, S1E3M7) for n in (0, 1, 8, 9)] == [0, 2, 11, 13]


def test_shapes_vmap_and_gradient():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    expected = quantise(S1E3M7, x.ravel()).reshape(x.shape)
    assert jax.eval_shape(lambda x: formats.quantise(x, S1E3M7), x[:0]).shape == (0, 4, 5)

    def straight_through(x):
        return x + jax.lax.stop_gradient(formats.quantise(x, S1E3M7) - x)

    @jax.jit
    def everything(x):
        return (
            jax.vmap(jax.vmap(lambda x: formats.quantise(x, S1E3M7)))(x),
            jax.grad(lambda x: jnp.sum(formats.quantise(x, S1E3M7) ** 2))(x),
            jax.grad(lambda x: jnp.sum(straight_through(x) ** 2))(x),
        )

    mapped, gradient, straight = everything(x)
    np.testing.assert_array_equal(mapped, expected)
    assert not np.any(gradient)
    np.testing.assert_allclose(straight, 2 * expected, rtol=1e-5)
