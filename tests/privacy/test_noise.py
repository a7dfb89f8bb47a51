"""The normal law of the noise: its bulk, its tails beyond any single word's reach, its end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.correlated import BandedNoise
from fedasr.privacy.gaussian import add_gaussian_noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

pytestmark = pytest.mark.usefixtures("optimized")

draw = jax.jit(noise.standard_normal, static_argnums=(1, 2))


def words_with_zeros(leading, count, seed):
    """[2, n] words of which the first `leading` bits of u are zero, the rest random."""
    rng = np.random.default_rng(seed)
    high, low = rng.integers(0, 2**32, (2, count), dtype=np.uint64)
    return jnp.asarray(np.stack([high >> np.uint64(leading), low]), jnp.uint32)


def test_bulk_is_normal_and_draws_are_independent():
    x = np.asarray(draw(jax.random.key(0), 1_000_001, 24.0), np.float64)
    assert x.shape == (1_000_001,)
    assert stats.kstest(x, stats.norm.cdf).pvalue > 0.01
    # Both of a pair, and their squares, which a wrong radius would tie together.
    a, b = x[:500_000], x[500_001:1_000_001]
    for u, v in ((a, b), (a**2, b**2), (a[1:], a[:-1])):
        assert abs(np.corrcoef(u, v)[0, 1]) < 5 / math.sqrt(len(u))
    counts = np.array([(np.abs(x) > bound).sum() for bound in (3.0, 4.0, 4.5)])
    expected = 2 * stats.norm.sf([3.0, 4.0, 4.5]) * len(x)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_tail_reached_by_chance_alone():
    """Beyond JAX's own end of 5.42: with 3e7 draws about as many as there should be."""
    total, size = 0, 1 << 22
    for i in range(8):
        x = draw(jax.random.key(100 + i), size, 24.0)
        total += int(jnp.sum(jnp.abs(x) > 4.9))
    expected = 8 * size * 2 * stats.norm.sf(4.9)
    assert abs(total - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("leading", [1, 8, 20, 26, 32])
def test_exponential_is_exact_given_so_many_leading_zeros(leading):
    """By importance: where u < 2^-k the law is k log 2 plus a standard exponential variable."""
    e, more = map(np.asarray, noise.exponential(words_with_zeros(leading, 200_000, leading)))
    assert abs(more.mean() - 2.0 ** (leading - 32)) < 5e-3
    rest = e[~more].astype(np.float64) - leading * math.log(2)
    if leading < 32:
        # Given that it does not go on: exponential, cut at the rest of the 32 bits.
        end = -math.expm1(-(32 - leading) * math.log(2))
        assert stats.kstest(rest, lambda x: np.clip(stats.expon.cdf(x) / end, 0, 1)).pvalue > 0.01
    else:
        np.testing.assert_allclose(e, 32 * math.log(2), rtol=1e-7)


@pytest.mark.parametrize("zero_words", [1, 3])
def test_tail_goes_on_from_fresh_bits(zero_words, monkeypatch):
    """Draws whose first 32, 96 bits are all zero: x^2 + y^2 is exponential beyond, angles even."""
    count = 40_000
    bits, calls = jax.random.bits, []

    def zeros_at_first(key, shape, dtype):
        calls.append(shape)
        drawn = bits(key, shape, dtype)
        return jnp.zeros_like(drawn) if len(calls) < zero_words else drawn

    first, more = noise.exponential(jnp.zeros((2, count), jnp.uint32))
    angle = jax.random.bits(jax.random.key(3), (count,), jnp.uint32)
    with monkeypatch.context() as patch, jax.disable_jit():
        patch.setattr(jax.random, "bits", zeros_at_first)
        x, y = noise.pairs(first, more, angle, jax.random.key(4), 100)
    assert len(calls) == zero_words
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    beyond = (x**2 + y**2) / 2 - zero_words * 32 * math.log(2)
    assert stats.kstest(beyond, stats.expon.cdf).pvalue > 0.01
    angles = np.arctan2(y, x) / (2 * np.pi) + 0.5
    assert stats.kstest(angles, stats.uniform.cdf).pvalue > 0.01
    # The marginal law of one coordinate, given the ring: as of a normal pair so far out.
    assert np.abs(x).max() > 0.999 * math.sqrt(2 * zero_words * 32 * math.log(2))


def test_every_draw_ends_where_it_is_said_to(monkeypatch):
    """With all bits zero for ever the radius is that of `reached`, as the floor assumes."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    for reach in (5.0, 17.0, 40.0):
        x = np.asarray(noise.standard_normal(jax.random.key(0), 4, reach))
        assert noise.reached(reach) >= reach
        radius = np.hypot(x[:2], x[2:])
        np.testing.assert_allclose(radius, noise.reached(reach), rtol=1e-5)


def test_blocks_have_draws_of_their_own(monkeypatch):
    monkeypatch.setattr(noise, "_BLOCK", 64)
    x = np.asarray(jax.jit(lambda k: noise.standard_normal(k, 1000, 24.0))(jax.random.key(0)))
    assert x.shape == (1000,) and len(np.unique(x)) == 1000


@pytest.mark.parametrize("at_once", [2, 3, 16])
def test_accelerators_make_the_same_draws_several_blocks_at_once(monkeypatch, at_once):
    """Also where a tail goes on, in some blocks and not in others."""
    usual = noise.exponential

    def often(words):
        value, more = usual(words)
        more |= words[0] % 64 == 0
        return jnp.where(more, jnp.float32(noise._STEP), value), more

    monkeypatch.setattr(noise, "exponential", often)
    monkeypatch.setattr(noise, "_BLOCK", 64)
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    size = 7 * 64 + 5
    on_cpu = noise.standard_normal(jax.random.key(3), size, 40.0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda cpu, default: default())
    found = noise.standard_normal(jax.random.key(3), size, 40.0)
    np.testing.assert_array_equal(found, on_cpu)
    assert found.shape == (size,) and len(np.unique(found)) == size
    assert np.abs(found).max() > 6.0  # some did go on


def test_leaves_and_rounds_have_draws_of_their_own():
    transform = add_gaussian_noise(1.0, jax.random.key(1))
    zeros = {f"leaf{i}": jnp.zeros(33) for i in range(7)}
    state, seen = transform.init(zeros), []
    update = jax.jit(transform.update)
    for _ in range(300):
        out, state = update(zeros, state)
        seen.append(np.concatenate([np.asarray(x) for x in jax.tree.leaves(out)]))
    assert len(np.unique(np.concatenate(seen))) > 0.999 * 300 * 7 * 33


@pytest.mark.parametrize("correlation", [None, BandedNoise(2, 8)])
def test_every_number_of_every_leaf_gets_noise_in_every_round(correlation):
    """Scalars, vectors, tensors, in any dtype; the first of 8 rounds as well as the last."""
    std = 4.0
    kinds = {"scalar": (), "bias": (3,), "kernel": (2, 3), "deep": (2, 1, 2, 2), "none": (0,)}
    zeros = {
        f"{name} {dtype}": jnp.zeros(shape, dtype)
        for name, shape in kinds.items()
        for dtype in ("float32", "bfloat16", "float16")
    }

    def run(key):
        transform = add_gaussian_noise(std, key, correlation)

        def step(state, _):
            out, state = transform.update(zeros, state)
            leaves = [x.astype(jnp.float32).ravel() for x in jax.tree.leaves(out)]
            return state, jnp.concatenate(leaves)

        return jax.lax.scan(step, transform.init(zeros), None, 8)[1]

    runs = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2000)))
    rows = np.eye(8)
    if correlation is not None:
        column = correlation.coefficients(8)
        strategy = sum(np.diag(np.full(8 - i, c), -i) for i, c in enumerate(column) if c)
        rows = np.linalg.inv(strategy)
    expected = std * np.linalg.norm(rows, axis=1)
    assert runs.shape == (2000, 8, 3 * 18)
    error = np.abs(runs.std(axis=0) / expected[:, None] - 1)
    assert error.max() < 6 / math.sqrt(2 * 2000)


@pytest.mark.parametrize("correlation", [None, BandedNoise(3, 12)])
def test_noise_is_drawn_as_far_as_its_claim_needs(monkeypatch, correlation):
    """With so little of it that a user moves it far beyond any reach that is fixed."""
    asked = []

    def draw(key, size, reach):
        asked.append(reach)
        return jnp.zeros(size)

    monkeypatch.setattr(noise, "standard_normal", draw)
    sampler = ShuffledSampler(12, 4, 0)
    mechanism = Mechanism(
        1.0, "global", 0.02, sampler, correlation=correlation, adaptive=AdaptiveClip(0.01)
    )
    transform = mechanism.server_transform(jax.random.key(0), jax.random.key(1))
    zeros = {"a": jnp.zeros(3)}
    transform.update(zeros, transform.init(zeros), clipped=jnp.zeros(1), clients=jnp.float32(0))
    assert len(asked) == 2
    moved = 1 / 0.02 if correlation is None else math.sqrt(3) / 0.02  # of 12 rounds, 3 turns apart
    assert asked[0] >= 0.999 * moved + 15 and asked[1] >= 1 / 0.01 + 15
    # So far beyond the user that what lies further out is nothing.
    assert stats.norm.sf(noise.reached(asked[0]) - moved) < 1e-40


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_tail_delta_bounds_what_lies_beyond(shift):
    """Against direct sampling, with an end so near that something lies beyond it."""
    reach = 0.1  # one draw: ends at 6.66
    end = noise.reached(reach)
    rng = np.random.default_rng(0)
    n = 2_000_000
    # Importance: points near the disc's rim in the direction of the shift.
    centre = end - shift
    g = rng.normal(size=(n, 2)) + np.array([centre, 0])
    weight = np.exp(-g[:, 0] * centre + centre**2 / 2)
    outside = np.hypot(g[:, 0] + shift, g[:, 1]) > end
    true = float((weight * outside).mean())
    bound = noise.tail_delta(shift, reach, rounds=1, turns=1.0, coordinates=2)
    assert true <= bound < 400 * true
    twice = noise.tail_delta(shift, reach, rounds=2, turns=2.0, coordinates=2)
    assert twice == pytest.approx(2 * bound)


def test_tail_delta_holds_in_every_direction():
    """Spread over many coordinates a user moves each by less, but there are more of them."""
    shift, reach, n = 1.0, 0.1, 10_000
    end = noise.reached(reach)
    for spread in (1, 10, 1000, n):
        each = shift / math.sqrt(spread)
        # Rice: the radius of a pair whose centre is moved by `each`.
        true = spread * stats.rice.sf(end, each) + (n - spread) * stats.rice.sf(end, 0)
        assert true <= noise.tail_delta(shift, reach, rounds=1, turns=1.0, coordinates=2 * n)


MECHANISMS = [
    Mechanism(1.0, "global", 4.5e-4 * 1024, PoissonSampler(1_000_000, 1024, 0)),
    Mechanism(1.0, "global", 4.5e-4 * 8, PoissonSampler(68, 8, 0)),
    Mechanism(1.0, "global", 0.5, FixedSizeSampler(1000, 10, 0)),
    Mechanism(1.0, "global", 2.0, ShuffledSampler(100, 10, 0), correlation=BandedNoise(4, 120)),
    Mechanism(
        1.0,
        "uniform",
        1.0,
        PoissonSampler(1000, 10, 0),
        adaptive=AdaptiveClip(5.0),
        released=(3.0,),
    ),
]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_the_tails_cost_is_far_below_any_delta_in_use(mechanism):
    assert 0 < mechanism.tail_delta(120) < 1e-20
    assert mechanism.tail_delta(240) > mechanism.tail_delta(120)
    floor = mechanism.tail_delta(120)
    with pytest.raises(UserError, match="delta"):
        mechanism.epsilon(120, floor)


def test_noise_that_reaches_too_short_is_refused(monkeypatch):
    """As a single word's 32 bits would: the quickstart's deployment at delta 1e-9."""
    mechanism = MECHANISMS[0]
    monkeypatch.setattr(noise, "_draws", lambda reach: 1)
    assert mechanism.tail_delta(120) > 1e-7
    with pytest.raises(UserError, match="cannot be claimed"):
        mechanism.epsilon(120, 1e-9)


def test_nothing_that_noise_alone_never_gives_happens_with_a_user():
    """All of C in one coordinate: what lies beyond JAX's end happens without the user as well."""
    mechanism = MECHANISMS[0]
    transform = mechanism.server_transform(jax.random.key(123))
    zeros = {"a": jnp.zeros(1 << 24)}
    out, _ = jax.jit(transform.update)(zeros, transform.init(zeros))
    beyond = np.asarray(out["a"]) > 5.3 * mechanism.noise_std
    expected = (1 << 24) * stats.norm.sf(5.3)
    assert abs(beyond.sum() - expected) <= 4 * math.sqrt(expected)
