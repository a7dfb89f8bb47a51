"""Noise in shares: exact laws, bounds that hold for any update, epsilon against exact densities."""

import dataclasses
import functools
import json
import math

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fedasr import auditing
from fedasr.data.batching import Batching
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientMetrics
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy import accounting, ledger, rotation, skellam_draws
from fedasr.privacy import secure_aggregation as sa
from fedasr.privacy import skellam as rdp
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.correlated import BandedNoise
from fedasr.privacy.events import SkellamDpEvent
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler
from fedasr.training import loop
from fedasr.training.config import default_config
from fedasr.training.report import sections

ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE
ORDERS = np.array([2, 3, 5, 8, 13, 32])


def chi_square(draws, pmf, first):
    """p-value of integer draws under pmf(first), pmf(first + 1), ...; rare values go together."""
    cells = np.concatenate([[0], np.cumsum(pmf)])
    least = 20 / len(draws)
    edges = [0]
    for i in range(1, len(cells)):
        if cells[i] - cells[edges[-1]] >= least and cells[-1] - cells[i] >= least:
            edges.append(i)
    edges.append(len(cells) - 1)
    expected = np.diff(cells[edges])
    expected *= 1 / expected.sum()
    places = np.searchsorted(np.asarray(edges[1:-1]), np.asarray(draws) - first, side="right")
    found = np.bincount(places, minlength=len(expected))
    return stats.chisquare(found, expected * len(draws)).pvalue


def skellam(variance, width=12):
    """scipy's law as (pmf, first)."""
    reach = math.ceil(width * math.sqrt(variance) + 60)
    support = np.arange(-reach, reach + 1)
    return stats.skellam.pmf(support, variance / 2, variance / 2), -reach


# ------------------------------------------------------------------------------------------- law


@pytest.mark.parametrize("variance", [1e-3, 0.7, 5.0, 400.0, 3e4])
def test_a_table_is_the_law_to_the_last_bit(variance):
    """What the alias method draws, summed up in whole numbers, against scipy."""
    table = skellam_draws.skellam_table(variance)
    count = len(table.other)
    entry = 1 << (256 - (count - 1).bit_length())
    units = [0] * count
    own = [int.from_bytes(x.tobytes(), "big") for x in table.own.transpose(1, 0, 2).astype(">u4")]
    for i, (mine, other) in enumerate(zip(own, table.other.tolist(), strict=True)):
        assert 0 <= mine <= entry
        units[i] += mine
        units[other] += entry - mine
    assert sum(units) == 1 << 256
    values = table.first + np.arange(count)
    exact = special.ive(np.abs(values), variance)
    found = np.array([math.ldexp(u / (1 << 200), -56) for u in units])
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=2.0**-250)
    # The tail reaches far beyond where float32 normal draws end.
    assert values[np.flatnonzero(found)].max() >= 18.5 * math.sqrt(variance)
    assert abs(found[values < 0].sum() - found[values > 0].sum()) < 1e-12


def test_words_that_do_not_decide_are_followed_by_more():
    """Random words that equal the entry's own: what comes next decides, as the law has it."""
    table = skellam_draws.skellam_table(5.0)
    index = int(np.flatnonzero(table.own[0, :, 1])[3])
    entry_bits = (len(table.other) - 1).bit_length()
    asked = []

    def bits(key, shape, dtype):
        level = len(asked)
        asked.append(shape)
        words = np.zeros(shape, np.uint32)
        words[:] = table.own[min(level, 1), index][:, None]
        if level == 0:
            words[0] |= np.uint32(index << (32 - entry_bits))
        words[1, 1:] -= 1 if level else 0  # below the entry's: its own value
        return jnp.asarray(words)

    found = np.asarray(skellam_draws.draw(table, jax.random.key(0), 3, bits))
    assert found[1] == found[2] == table.first + index
    # The first ties once more, and gets the same words again for the next level's.
    below = tuple(table.own[1, index]) < tuple(table.own[2, index])
    assert found[0] == table.first + (index if below else int(table.other[index]))
    assert len(asked) == 2  # traced once, where it was needed


@pytest.mark.parametrize("variance", [0.05, 3.0, 5000.0])
def test_draws_follow_the_law(variance):
    draws = np.asarray(
        skellam_draws.draw(skellam_draws.skellam_table(variance), jax.random.key(3), 400_000)
    )
    assert draws.dtype == np.int32
    assert chi_square(draws, *skellam(variance)) > 1e-4
    assert chi_square(draws, *skellam(1.08 * variance)) < 1e-9  # the test can fail


def test_the_tail_is_drawn_as_often_as_it_should_be():
    """Beyond four standard deviations, where a table of too few digits would be off."""
    draws = np.asarray(
        skellam_draws.draw(skellam_draws.skellam_table(90.0), jax.random.key(5), 2_000_000)
    )
    far = 37
    expected = 2 * stats.skellam.sf(far - 1, 45, 45) * draws.size
    assert 100 < expected < 1000
    assert abs((np.abs(draws) >= far).sum() - expected) < 4.5 * math.sqrt(expected)


def test_impossible_variances():
    for variance in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="variance"):
            skellam_draws.skellam_pmf(variance)
    with pytest.raises(UserError, match="fewer bits"):
        skellam_draws.skellam_table(1e11)


# -------------------------------------------------------------------------------------- rotation


@given(st.integers(1, 10**9))
def test_padding_is_short(dimension):
    size = rotation.padded(dimension)
    assert dimension <= size <= dimension * 1.125
    assert math.prod(rotation._factors(size)) == size


rotate = jax.jit(rotation.rotate)
unrotate = jax.jit(rotation.unrotate, static_argnums=2)


@pytest.mark.parametrize("dimension", [1, 3, 48, 1900])
def test_rotation_is_orthogonal(dimension, seed=3):
    size = rotation.padded(dimension)
    x = np.random.default_rng(seed).normal(size=dimension).astype(np.float32)
    key = jax.random.key(seed)
    y = rotate(jnp.asarray(x), key)
    assert y.shape == (size,)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
    np.testing.assert_allclose(unrotate(y, key, dimension), x, atol=1e-5)


@pytest.mark.parametrize("dimension", [1, 2, 64, 700])
def test_rotation_spreads_a_single_coordinate(dimension):
    size = rotation.padded(dimension)
    x = jnp.zeros(dimension).at[dimension // 2].set(1.0)
    y = np.asarray(rotate(x, jax.random.key(1)))
    assert np.abs(y).max() <= math.sqrt(rotation.flatness(dimension) / size) * (1 + 1e-5)
    assert 1 <= rotation.flatness(dimension) <= 2
    other = np.asarray(rotate(jnp.ones(dimension), jax.random.key(1)))
    another = np.asarray(rotate(jnp.ones(dimension), jax.random.key(2)))
    assert dimension < 3 or np.abs(other - another).max() > 1e-3


# -------------------------------------------------------------------------------------- rounding


round_at_random = jax.jit(sa.round_at_random)


@given(
    st.sampled_from([1, 6, 290]),
    st.sampled_from(["half", "normal", "one", "tiny", "whole"]),
    st.floats(0.05, 3000.0),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_no_rounding_is_longer_than_its_bound(dimension, kind, norm, seed):
    rng = np.random.default_rng(seed)
    x = {
        "half": np.full(dimension, 0.5),
        "normal": rng.normal(size=dimension),
        "one": np.eye(1, dimension)[0],
        "tiny": np.full(dimension, 1e-3),
        "whole": rng.integers(-3, 4, dimension),
    }[kind]
    x = np.asarray(x * min(1.0, norm / max(np.linalg.norm(x), 1e-9)), np.float32)
    x *= np.float32(1 - sa._SCALE_MARGIN)
    bound = sa.rounded_norm(norm, dimension)
    rounded = np.asarray(round_at_random(jnp.asarray(x), jax.random.key(seed), bound), np.int64)
    assert (rounded**2).sum() <= bound**2
    assert (np.abs(rounded - x) < 1).all()


def test_rounding_again_is_what_keeps_the_bound():
    """Many halves: without a second attempt the bound is exceeded, with one it never is."""
    x = jnp.full(16, 0.5)
    norm, keys = 2.0, jax.random.split(jax.random.key(0), 4000)
    bound = sa.rounded_norm(norm, 16)
    once = jax.vmap(lambda k: (jax.random.uniform(k, x.shape) < 0.5).sum())(keys)
    assert (np.asarray(once) > bound**2).mean() > 0.01
    rounded = jax.vmap(lambda k: sa.round_at_random(x, k, bound))(keys)
    lengths = np.asarray((rounded**2).sum(axis=1))
    assert lengths.max() <= bound**2 and lengths.std() > 0.5


def test_a_vector_that_is_too_long_to_begin_with_is_dropped():
    x = jnp.full(8, 1000.3)
    assert (sa.round_at_random(x, jax.random.key(0), 10.0) == 0).all()
    assert (sa.round_at_random(-x, jax.random.key(0), 1e5) <= -1000).all()


def test_rounding_has_the_right_mean():
    x = jnp.asarray([-2.75, -0.5, 0.0, 0.125, 0.9, 7.0])
    keys = jax.random.split(jax.random.key(4), 40_000)
    rounded = np.asarray(jax.vmap(lambda k: sa.round_at_random(x, k, 100.0))(keys))
    rest = np.asarray(x) - np.floor(x)
    error = np.sqrt(rest * (1 - rest) / len(keys)) * 4.5 + 1e-9
    assert (np.abs(rounded.mean(axis=0) - np.asarray(x)) <= error).all()


@given(st.integers(-(2**31), 2**31 - 1), st.integers(6, 20))
@settings(max_examples=50, deadline=None)
def test_wrapping_is_the_nearest_residue(value, bits):
    half = 2 ** (bits - 1)
    assert int(sa.wrap(jnp.int32(value), bits)) == (value + half) % 2**bits - half


def test_a_sum_of_residues_is_the_sum():
    """Also where the int32 sum itself overflows."""
    values = np.random.default_rng(0).integers(-(2**30), 2**30, (50, 7))
    for bits in (6, 13, 20):
        sent = sa.wrap(jnp.asarray(values, jnp.int32), bits)
        total = sa.wrap(sent.sum(axis=0, dtype=jnp.int32), bits)
        half = 2 ** (bits - 1)
        np.testing.assert_array_equal(total, (values.sum(axis=0) + half) % 2**bits - half)


# ------------------------------------------------------------------------------ clients and server

SECURE = sa.SecureAggregation(dimension=900, bits=18)
LIKE = {"a": np.zeros((20, 30), np.float32), "b": np.zeros(300, np.float32)}
CLIP, NOISE, SLOTS = 0.5, 1.3, 24


def updates(clients, seed=0):
    """Updates at the clip norm, as float32 arrays with a leading axis."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(clients, 900)) + 1.0
    x *= CLIP / np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(np.float32)
    return {"a": x[:, :600].reshape(-1, 20, 30), "b": x[:, 600:]}


@functools.partial(jax.jit, static_argnums=(0, 4))
def noisy_sum(encoding, deltas, rotation, key, clients):
    """What the server decodes of a round of so many clients."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(clients))
    sent = jax.vmap(lambda delta, k: sa.encode(encoding, delta, rotation, k))(deltas, keys)
    total = sent.sum(axis=0, dtype=jnp.int32)
    missing = sa.missing_noise(encoding, jax.random.fold_in(key, 10**6), SLOTS - clients)
    return sa.decode(encoding, total + missing, rotation, LIKE), sent


@pytest.mark.parametrize("clients", [1, 24])
def test_the_noise_is_the_same_whoever_takes_part(clients):
    """Decoded sum minus true sum: the claimed variance, Gaussian in shape, for any cohort."""
    encoding = sa.make_encoding(SECURE, CLIP, NOISE, SLOTS)
    deltas = updates(clients)
    errors = {"a": [], "b": []}
    for round in range(6):
        rotation, key = jax.random.key(100 + round), jax.random.key(round)
        found, sent = noisy_sum(encoding, deltas, rotation, key, clients)
        assert sent.dtype == jnp.int32 and found["a"].shape == (20, 30)
        assert (-(2**17) <= sent).all() and (sent < 2**17).all()
        for name in errors:
            errors[name].append(np.asarray(found[name] - deltas[name].sum(axis=0)).ravel())
    for name, error in errors.items():
        every = np.concatenate(error)
        assert stats.kstest(every / (NOISE * CLIP), "norm").pvalue > 1e-4, name
        # No two rounds share noise, nor do two leaves.
        together = np.corrcoef(np.stack(errors["a"])[:, :300], np.stack(errors["b"]))
        np.fill_diagonal(together, 0)
        assert np.abs(together).max() < 0.35


def test_without_the_missing_shares_there_is_less_noise():
    """What the test above would see."""
    encoding = sa.make_encoding(SECURE, CLIP, NOISE, SLOTS)
    _, sent = noisy_sum(encoding, updates(1), jax.random.key(0), jax.random.key(0), 1)
    found = sa.decode(encoding, sent[0], jax.random.key(0), LIKE)
    error = np.asarray(sa.flatten(found) - sa.flatten(updates(1)))
    assert error.std() < 0.3 * NOISE * CLIP


@pytest.mark.parametrize("missing", [0, 1, 7, 8, 23, 77, 600])
def test_missing_shares_follow_the_law_of_their_sum(missing):
    encoding = sa.Encoding(100_000, 16, 1.0, 1.0, 1.0, variance=900.0, shares=600)
    draw = jax.jit(lambda key, n: sa.missing_noise(encoding, key, n))
    found = np.asarray(draw(jax.random.key(missing), jnp.int32(missing)))
    if missing == 0:
        assert (found == 0).all()
        return
    assert chi_square(found, *skellam(1.5 * missing)) > 1e-4
    half = found[:50_000] * 1.0
    assert abs(np.corrcoef(half, found[50_000:])[0, 1]) < 0.025
    assert (np.asarray(draw(jax.random.key(missing), -jnp.int32(missing))) == 0).all()


def test_shares_of_clients_add_up_to_the_law_of_the_whole():
    encoding = sa.make_encoding(sa.SecureAggregation(2048, 10), 1.0, 2.0, 16)
    nothing = jnp.zeros(2048)
    keys = jax.random.split(jax.random.key(9), (30, 16))
    one = functools.partial(sa.encode, encoding, nothing, jax.random.key(0))
    sent = jax.jit(jax.vmap(jax.vmap(one)))(keys)
    total = np.asarray(sent.sum(axis=1)).ravel()
    assert chi_square(total, *skellam(encoding.variance)) > 1e-4
    flat = np.asarray(sent[0], np.float64)
    between = np.corrcoef(flat)
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 0.12


def test_coordinates_wrap_as_often_as_predicted(deviations=1.8):
    """Counted against the same sum in wider words, predicted from the sum's true length."""
    secure = sa.SecureAggregation(900, 12, deviations)
    encoding = sa.make_encoding(secure, CLIP, NOISE, SLOTS)
    wide = dataclasses.replace(encoding, bits=30)
    deltas = updates(SLOTS)
    norm = float(np.linalg.norm(np.asarray(sa.flatten(jax.tree.map(lambda x: x.sum(0), deltas)))))
    wrapped = total = 0
    for round in range(30):
        args = (jax.random.key(round), jax.random.key(round + 500), SLOTS)
        # The wide sum differs by what wrapped and by nothing else.
        one, _ = noisy_sum(encoding, deltas, *args)
        two, _ = noisy_sum(wide, deltas, *args)
        turned = (rotation.rotate(sa.flatten(x), args[0]) * encoding.scale for x in (one, two))
        apart = np.round(np.asarray(next(turned) - next(turned)) / 2**12)
        wrapped += (apart != 0).sum()
        total += apart.size
    predicted = encoding.wrapped(norm)
    assert 0.005 < predicted < 0.15
    assert wrapped / total == pytest.approx(predicted, rel=0.15)
    assert predicted <= math.erfc(deviations / math.sqrt(2)) * 1.001  # the worst case
    assert encoding.wrapped(0.0) < predicted


def test_wrong_sizes_and_settings():
    encoding = sa.make_encoding(SECURE, CLIP, NOISE, SLOTS)
    with pytest.raises(UserError, match="set the dimension to 100"):
        sa.encode(encoding, jnp.zeros(100), jax.random.key(0), jax.random.key(1))
    for bad in ({"bits": 5}, {"bits": 21}, {"bits": 9.5}, {"deviations": 0}, {"dimension": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            dataclasses.replace(SECURE, **bad)
    with pytest.raises(UserError, match="above 0"):
        sa.make_encoding(SECURE, CLIP, 0.0, SLOTS)
    with pytest.raises(UserError, match="clip_norm"):
        sa.make_encoding(SECURE, math.inf, 1.0, SLOTS)
    few = dataclasses.replace(SECURE, bits=8)
    with pytest.raises(UserError, match="at least 11"):
        sa.make_encoding(few, CLIP, NOISE, 10_000)
    sa.make_encoding(dataclasses.replace(SECURE, bits=11), CLIP, NOISE, 10_000)


def test_what_a_client_sends():
    assert sa.SecureAggregation(10_000_000, 16).bytes == 2 * 10_485_760


# ------------------------------------------------------------------------------------- accounting


def shifted(variance, shift, reach):
    """Laws of the noise, and of the noise plus an integer, on -reach..reach."""
    support = np.arange(-reach, reach + 1)
    half = variance / 2
    return stats.skellam.pmf(support, half, half), stats.skellam.pmf(support - shift, half, half)


def renyi(order, p, q):
    keep = (p > 1e-290) & (q > 1e-290)
    logs = order * np.log(p[keep]) + (1 - order) * np.log(q[keep])
    return float(np.logaddexp.reduce(logs) / (order - 1))


@pytest.mark.parametrize("variance", [2.0, 11.0, 150.0])
@pytest.mark.parametrize("shift", [1, 2, 6])
def test_bound_against_exact_divergences(variance, shift):
    for order in ORDERS:
        reach = int(shift * order + 25 * math.sqrt(variance) + 60)
        noise, moved = shifted(variance, shift, reach)
        exact = renyi(order, moved, noise)
        bound = rdp.skellam_rdp(order, shift, shift, variance)
        # Only where all of the sum lies within what float64 holds is it exact.
        if order * shift < 12 * math.sqrt(variance):
            assert exact <= bound * (1 + 1e-9)
            assert exact >= 0.9 * order * shift**2 / (2 * variance) / (
                1 + (order * shift / variance) ** 2
            )


def test_bound_in_three_dimensions():
    """Independent coordinates: divergences add up, as do l1 and squared l2."""
    variance, shifts = 30.0, (3, 1, 2)
    for order in ORDERS:
        exact = sum(renyi(order, *shifted(variance, s, 400)[::-1]) for s in shifts)
        l2, l1 = math.sqrt(sum(s * s for s in shifts)), sum(shifts)
        bound = float(rdp.skellam_rdp(order, l2, l1, variance))
        assert exact <= bound
        assert order > 5 or bound <= 1.25 * exact
        assert rdp.skellam_rdp(order, l2, l2**2, variance) >= bound  # l1 <= l2^2 on integers


@pytest.mark.parametrize("probability", [0.01, 0.3, 1.0])
def test_sampling_against_exact_divergences_both_ways(probability):
    variance, shift = 40.0, 4
    noise, moved = shifted(variance, shift, 500)
    mixed = (1 - probability) * noise + probability * moved

    def exactly(orders):
        return np.array([renyi(order, moved, noise) for order in np.atleast_1d(orders)])

    orders = np.array([2, 3, 5, 8, 13])
    found = rdp.sampled_rdp(orders, probability, exactly)
    for order, value in zip(orders, found, strict=True):
        np.testing.assert_allclose(value, renyi(order, mixed, noise), rtol=1e-6)
        assert renyi(order, noise, mixed) <= value * (1 + 1e-9)
    event = SkellamDpEvent(shift, shift, variance, probability)
    assert (event.rdp(orders) >= found).all()
    assert (rdp.sampled_rdp(orders, 0.0, exactly) == 0).all()
    for order in (1.2, 2.4, 7.7):  # between them: no less than exact, no more than the next
        value = rdp.sampled_rdp(np.array([order]), probability, exactly).item()
        assert renyi(order, mixed, noise) <= value <= renyi(math.ceil(order), mixed, noise) * 1.0001
    with pytest.raises(UserError, match="above 1"):
        rdp.sampled_rdp(np.array([1.0]), 0.1, exactly)


def hockey_stick(epsilon, p, q):
    return np.maximum(p - math.exp(epsilon) * q, 0).sum()


@pytest.mark.parametrize("rounds", [1, 2])
def test_epsilon_holds_for_the_exact_law_of_few_users(rounds):
    """Three users, each in a round by a coin of their own; everyone adds a share, the server the
    rest. Against a user who sends nothing, delta is what is claimed. Noise from those present alone
    would be caught."""
    probability, shares, variance, shift, delta = 0.3, 3, 12.0, 3, 1e-4
    event = SkellamDpEvent(shift, shift, variance, probability)
    claimed = accounting.rdp_epsilon(accounting.compose(event, rounds), delta, ADD_OR_REMOVE)
    reach = 160
    support = np.arange(-reach, reach + 1)

    def law(sends, topped_up):
        total = np.zeros(len(support))
        for who in range(8):
            here = [bool(who >> i & 1) for i in range(3)]
            chance = math.prod(probability if x else 1 - probability for x in here)
            count = shares if topped_up else sum(here)
            moved = support - (sends if here[0] else 0)
            half = variance / shares * count / 2
            pmf = (moved == 0) * 1.0 if half == 0 else stats.skellam.pmf(moved, half, half)
            total += chance * pmf
        return total

    def delta_of(topped_up):
        worst = 0.0
        for p, q in ((shift, 0), (0, shift)):
            one, two = law(p, topped_up), law(q, topped_up)
            if rounds == 2:
                one, two = np.outer(one, one), np.outer(two, two)
            worst = max(worst, hockey_stick(claimed, one, two))
        return worst

    assert 0 < delta_of(True) <= delta
    assert delta_of(False) > 2 * delta


def test_epsilon_comes_near_the_gaussians_as_bits_grow():
    sampler = PoissonSampler(34_753, 1024, seed=0)
    rounds, delta, z = 2000, 1e-9, 1.43
    central = accounting.epsilon(
        accounting.compose(sampler.event(z), rounds), delta, ADD_OR_REMOVE
    ).epsilon_rdp
    found = {}
    for bits in (14, 16, 20):
        secure = sa.SecureAggregation(10_000_000, bits)
        event = attrs.evolve(
            sa.make_encoding(secure, 1.0, z, sampler.slots).event,
            sampling_probability=sampler.sampling_probability,
            dataset_size=sampler.population,
            truncated_batch_size=sampler.slots,
        )
        result = accounting.epsilon(accounting.compose(event, rounds), delta, ADD_OR_REMOVE)
        assert (result.accountant, result.epsilon_pld) == ("RDP", None)
        found[bits] = result.epsilon
    assert found[14] > found[16] > found[20] > central
    assert found[20] < 1.003 * central and found[16] < 1.2 * central and found[14] > 3 * central


def test_few_slots_cost_what_they_cost_a_gaussian():
    """Truncation as in the Gaussian's event, whose Rényi bound has the same terms."""
    sampler = PoissonSampler(1000, 50, seed=0, slots=60)
    delta, rounds, variance, length = 1e-6, 20, 1e8, 2.5e3
    gaussian = accounting.rdp_epsilon(
        accounting.compose(sampler.event(math.sqrt(variance) / length), rounds),
        delta,
        ADD_OR_REMOVE,
    )
    event = SkellamDpEvent(length, length, variance, 0.05, 1000, 60)
    ours = accounting.rdp_epsilon(accounting.compose(event, rounds), delta, ADD_OR_REMOVE)
    assert ours == pytest.approx(gaussian, rel=0.02)
    roomy = accounting.rdp_epsilon(
        accounting.compose(event.untruncated(), rounds), delta, ADD_OR_REMOVE
    )
    assert roomy < 0.9 * ours


def test_events_are_written_down_and_read_again():
    event = SkellamDpEvent(3.5, 12.25, 100.0, 0.1, 1000, 140)
    whole = dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(event, 7), dp_accounting.GaussianDpEvent(2.0)]
    )
    assert ledger.event_from_data(json.loads(json.dumps(ledger.event_to_data(whole)))) == whole


def test_what_the_ends_of_the_tails_cost():
    """Enough draws, or enough noise, reach far enough; few draws with little noise do not."""
    many = sa.Encoding(640, 16, 1.0, 100.0, 1000.0, 100.0**2, 60)
    assert 0 <= many.tail_delta(1000, 100.0) < 1e-60
    for l2, most in ((100.0 * 2, 1e-17), (100.0 * 9.5, 1.0)):
        one = sa.Encoding(640, 16, 1.0, l2, 1000.0, 100.0**2, 1)
        assert 0 < one.tail_delta(1000, 100.0) <= most
    assert one.tail_delta(1000, 100.0) == 1.0 and one.tail_delta(0, 0.0) == 0.0
    assert many.blocks == [1, 4] and one.blocks == [1]
    assert sa.Encoding(640, 16, 1.0, 1.0, 1.0, 1e4, 1300).blocks == [1, 4, 16, 64, 256]
    assert sa.Encoding(640, 20, 1.0, 1.0, 1.0, 6e9, 1300).blocks == [1, 4, 16]
    # One draw's tail itself, where it would end: the Chernoff bound is above the exact mass.
    reach = 6.0 * 100
    alone = sa.Encoding(1, 16, 1.0, 1200 - reach, 1.0, 100.0**2, 1)
    exact = stats.skellam.sf(reach, 5000, 5000) * 2 / (1200 - reach)
    assert exact < alone.tail_delta(1, 1.0) < 1000 * exact
    secure = secure_mechanism(ShuffledSampler(30, 2, seed=0), z=0.01, bits=12)
    with pytest.raises(UserError, match="cannot be claimed"):
        secure.epsilon(10, 1e-9)
    assert secure.central().epsilon(10, 1e-9).epsilon > 1000


def test_composed_with_other_events_and_refused_where_it_does_not_hold():
    event = SkellamDpEvent(10, 50, 1e4)
    alone = accounting.epsilon(event, 1e-6, ADD_OR_REMOVE)
    with_more = dp_accounting.ComposedDpEvent([event, dp_accounting.GaussianDpEvent(3.0)])
    both = accounting.epsilon(with_more, 1e-6, ADD_OR_REMOVE)
    assert alone.epsilon < both.epsilon < alone.epsilon + 2
    with pytest.raises(UserError, match="no Rényi bound"):
        accounting.epsilon(event, 1e-6, REPLACE_ONE)


# -------------------------------------------------------------------------------------- simulation

PARAMS = 60  # of the crafted canaries: three layers of twenty


def secure_mechanism(sampler, bits=16, z=0.8, **options):
    secure = sa.SecureAggregation(PARAMS, bits)
    return Mechanism(0.5, options.pop("budget", "uniform"), z, sampler, secure=secure, **options)


def means(
    mechanism, rounds, update=None, hardware=Hardware(jax.devices()[:1]), seed=3, weights=None
):
    """The noisy means that a server publishes, [rounds, 60], in units of C / expected cohort."""
    sampler = mechanism.sampler
    simulation = canaries(mechanism, update, hardware, seed, weights)
    state = simulation.init(auditing.canary_params(20))
    seen = [sa.flatten(state.params) for state, _ in simulation.run(state, rounds)]
    return np.stack(seen) * sampler.expected_cohort / mechanism.clip_norm


def canaries(mechanism, update=None, hardware=Hardware(jax.devices()[:1]), seed=3, weights=None):
    """A simulation of crafted updates."""
    sampler = mechanism.sampler
    corpus = auditing.CanaryCorpus(np.ones((1, 20)), sampler.population)
    scales = auditing.layer_weights(mechanism, auditing.canary_params(20))
    crafted = auditing.crafted_update(scales, 0.3, 10**6)
    return Simulation(
        corpus,
        mechanism,
        FedAvg(update or crafted, auditing.publish(), weights=weights),
        Batching(1, steps=1, buckets=()),
        hardware=hardware,
        seed=seed,
    )


def broken_update(params, batches, num_steps, key, max_steps=None, round=0):
    del batches, num_steps, key, max_steps, round
    return jax.tree.map(lambda x: x + jnp.nan, params), ClientMetrics(jnp.float32(0), {})


@pytest.mark.parametrize(
    ("sampler", "update"),
    [
        (PoissonSampler(30, 0.7, seed=1), None),  # many rounds with nobody in them
        (PoissonSampler(30, 15, seed=1), None),
        (PoissonSampler(30, 15, seed=1), broken_update),  # everybody's update is NaN
    ],
)
def test_a_simulations_noise_is_what_is_claimed(sampler, update):
    """Whoever takes part, and whatever becomes of their updates."""
    noise = means(secure_mechanism(sampler), 40, update)
    if update is None:
        noise = noise - means(Mechanism(0.5, "uniform", 0.0, sampler), 40)
    assert stats.kstest(noise.ravel() / 0.8, "norm").pvalue > 1e-4
    between = np.corrcoef(noise)
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 0.65  # 780 pairs of rounds with 60 coordinates each


def test_chunks_and_devices_change_nothing_and_seeds_everything():
    mechanism = secure_mechanism(PoissonSampler(30, 15, seed=1))
    one = means(mechanism, 3)
    together = means(mechanism, 3, hardware=Hardware(jax.devices()[:2], chunk=4))
    np.testing.assert_allclose(together, one, atol=0.02)
    assert np.abs(means(mechanism, 3, seed=4) - one).mean(axis=1).min() > 0.3


def test_its_programs_can_be_had_before_a_run():
    """As for accelerators that are not there."""
    simulation = canaries(secure_mechanism(PoissonSampler(30, 15, seed=1)))
    programs = simulation.trace(auditing.canary_params(20))
    assert {name: program.lower().as_text() != "" for name, program in programs.items()} == {
        "clients": True,
        "server": True,
    }


def test_weights_and_parts_of_the_model():
    """Weights scale updates before they are encoded; an encoding of another size is refused."""
    sampler = ShuffledSampler(20, 20, seed=0)
    weights = np.linspace(0, 1, 20)
    mechanism = secure_mechanism(sampler, z=1e-3, weighting="bounded")
    found = means(mechanism, 1, weights=weights)[0].reshape(3, 20) * math.sqrt(3)
    np.testing.assert_allclose(found, np.tile(weights * 0.6, (3, 1)), atol=0.02)
    wrong = dataclasses.replace(mechanism, secure=sa.SecureAggregation(600))
    with pytest.raises(UserError, match="set the dimension to 60"):
        means(wrong, 1, weights=weights)
    with pytest.raises(UserError, match="model_devices=1"):
        means(mechanism, 1, hardware=Hardware(jax.devices()[:2], 2))


POISSON = PoissonSampler(1000, 100, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correlation": BandedNoise(2, 8)}, "correlated Gaussian noise"),
        ({"adaptive": AdaptiveClip(1.0)}, "adaptive"),
        ({"sampler": FixedSizeSampler(1000, 100, 0)}, "'shuffled'"),
        ({"weighting": "examples"}, "weighting"),
        ({"noise_multiplier": 0.0}, "above 0"),
        ({"secure": sa.SecureAggregation(60, 6)}, "bits are too few"),
    ],
)
def test_what_nobody_can_account_for_is_refused(options, message):
    if "correlation" in options:
        options["sampler"] = PoissonSampler(1000, 100, seed=0, cycle=2)
    known = Mechanism(0.5, "uniform", 1.0, POISSON, secure=sa.SecureAggregation(60))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(known, **options)


def test_the_mechanisms_event():
    secure = Mechanism(0.5, "uniform", 1.2, POISSON, secure=sa.SecureAggregation(10**6, 20))
    central = secure.central()
    assert central.secure is None and central.noise_std == secure.noise_std
    one, two = secure.epsilon(50, 1e-6), central.epsilon(50, 1e-6)
    assert one.epsilon_pld is None and two.epsilon < one.epsilon
    assert two.epsilon_rdp <= one.epsilon < 1.01 * two.epsilon_rdp
    assert "Skellam" in one.sampling
    event = secure.event(50).event
    assert (event.sampling_probability, event.dataset_size) == (0.1, 1000)
    assert event.truncated_batch_size == POISSON.slots
    in_turn = dataclasses.replace(secure, sampler=ShuffledSampler(1000, 100, 0))
    assert in_turn.event(25).count == 3 and in_turn.event(25).event.sampling_probability == 1
    assert in_turn.event(0) == dp_accounting.NoOpDpEvent()
    # The deployment has a grid of its own: more clients, more noise, the same bits.
    deployed = secure.deployed(1000, 10**6)
    assert deployed.encoding.shares > 1000 and deployed.epsilon(50, 1e-6).epsilon < 1
    assert secure.calibrated(5.0, 1e-6, 50).epsilon(50, 1e-6).epsilon == pytest.approx(5, rel=2e-3)
    released = dataclasses.replace(secure, released=(3.0,))
    assert released.epsilon(50, 1e-6).epsilon > one.epsilon


def dry(changes):
    """Of the synthetic corpus, without making it."""
    config = default_config()
    config.cohort = 2
    config.model.options.update({"dim": 16, "blocks": 1, "heads": 2, "mlp": 16})
    base = {"privacy.noise": "skellam", "privacy.sigma": 0.3}
    config.update_from_flattened_dict(base | changes)
    return loop.dry_run(config.to_dict())


def test_a_configuration():
    summary = dry({"privacy.bits": 18})
    count = summary["parameters"]
    plain, ours = summary["clients"]
    assert ours["up_bytes"] == rotation.padded(count) * 18 / 8 < plain["up_bytes"]
    assert ours["down_bytes"] == plain["down_bytes"] and "18 bits" in ours["method"]
    assert summary["bytes_per_client"]["up"] == ours["up_bytes"]
    privacy = summary["privacy"]
    assert "Skellam" in privacy["noise"]
    for row in (privacy, privacy["extrapolations"][0]):
        shares = row["secure_aggregation"]
        assert shares["central"]["epsilon"] <= row["epsilon"]
        assert shares["coordinates"] == rotation.padded(count) and 1 < shares["sensitivity"] < 1.5
        assert 0 < shares["wrapped"][0] < shares["wrapped"][1] < 1e-8
    text = sections.privacy_section([], summary)
    assert "shares that clients add" in text and "18 bits" in text
    part = dry({"partial.mode": "fixed", "partial.patterns": ("bias",)})
    small = part["clients"][-1]["up_bytes"]
    assert small < ours["up_bytes"] / 5
    assert part["privacy"]["secure_aggregation"]["coordinates"] == small / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression.upload": "S1E3M7"}, "compression.upload"),
        ({"partial.mode": "round"}, "partial.mode='fixed'"),
        ({"privacy.sampler": "fixed"}, "'poisson'"),
        ({"privacy.sigma": 0.0}, "privacy.sigma above 0"),
        ({"privacy.bits": 40}, "bits"),
        ({"privacy.bits": 6}, "too few"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        dry(changes)
    assert "\n" not in str(caught.value)
