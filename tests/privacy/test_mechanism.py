import dataclasses
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld
from scipy import stats

from fedasr.errors import UserError
from fedasr.privacy import clipping
from fedasr.privacy.gaussian import NoiseState, add_gaussian_noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

SAMPLER = PoissonSampler(100, 20, seed=0)
KEY = jax.random.key(7)
ZEROS = {"a": jnp.zeros((1000, 600)), "b": jnp.zeros((600, 1000)), "c": jnp.zeros(10)}


def mechanism(clip_norm=0.5, noise_multiplier=2.0, budget="uniform", sampler=SAMPLER):
    return Mechanism(clip_norm, budget, noise_multiplier, sampler)


@pytest.fixture(scope="module")
def server():
    transform = mechanism().server_transform(KEY)
    return transform, jax.jit(transform.update)


@pytest.fixture(scope="module")
def three_rounds(server):
    transform, update = server
    state, states, outs = transform.init(ZEROS), [], []
    for _ in range(3):
        states.append(state)
        out, state = update(ZEROS, state)
        outs.append(jax.tree.map(np.asarray, out))
    return states, outs


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def test_noise_has_the_stated_mean_and_std(three_rounds):
    """Over 1.2 million draws; std on the mean of C z / expected cohort = 0.5 * 2 / 20."""
    noise = flat(three_rounds[1][0])
    assert noise.size > 10**6
    assert stats.kstest(noise, stats.norm(0.0, 0.05).cdf).pvalue > 1e-3
    assert abs(noise.mean()) < 4 * 0.05 / math.sqrt(noise.size)
    assert abs(noise.std() / 0.05 - 1) < 4 / math.sqrt(2 * noise.size)
    assert stats.kstest(noise, stats.norm(0.0, 0.0505).cdf).pvalue < 1e-6  # the test can tell


def test_noise_is_fresh_every_round_and_in_every_leaf(three_rounds):
    _, outs = three_rounds
    limit = 5 / math.sqrt(600_000)
    streams = [np.ravel(out[leaf]) for out in outs for leaf in ("a", "b")]
    correlations = np.corrcoef(streams)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < limit
    assert np.unique(flat(outs[0])).size > 1e5


def test_noise_is_the_same_after_a_resume(server, three_rounds):
    transform, update = server
    states, outs = three_rounds
    saved = [np.asarray(x) for x in jax.tree.leaves(states[2])]
    assert [s.tolist() for s in saved] == [2]  # the number of rounds is all the state there is
    fresh = transform.init(ZEROS)
    restored = jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(x) for x in saved])
    again, _ = update(ZEROS, restored)
    for name in ZEROS:
        assert np.asarray(again[name]).tobytes() == outs[2][name].tobytes()


def test_another_key_gives_other_noise(three_rounds):
    transform = mechanism().server_transform(jax.random.key(8))
    out, _ = transform.update({"c": ZEROS["c"]}, transform.init(ZEROS))
    assert not np.any(np.isin(np.asarray(out["c"]), [o["c"] for o in three_rounds[1]]))


def test_the_sum_is_divided_by_the_expected_cohort(server, three_rounds):
    """Whatever the realised cohort: the sum of 3 clients, too, is divided by 20; noise once."""
    _, update = server
    states, outs = three_rounds
    for clients in (3, 20, 31):
        total = jax.tree.map(lambda x, clients=clients: x + 5.0 * clients, ZEROS)
        mean, _ = update(total, states[0])
        np.testing.assert_allclose(flat(mean) - flat(outs[0]), 5.0 * clients / 20, atol=2e-6)


def test_no_noise_where_none_is_asked_for():
    tree = {"a": jnp.arange(5.0)}
    for m in (mechanism(noise_multiplier=0.0), mechanism(math.inf, 0.0)):
        transform = m.server_transform(KEY)
        out, state = transform.update(tree, transform.init(tree))
        np.testing.assert_allclose(out["a"], np.arange(5) / 20, rtol=1e-6)
        assert state[1] == NoiseState(1)
        assert m.noise_std == m.sigma == 0


def test_noise_keeps_dtypes_and_is_pure():
    tree = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4)}
    transform = add_gaussian_noise(1.0, KEY)
    state = transform.init(tree)
    one, _ = transform.update(tree, state)
    two, _ = transform.update(tree, state)
    assert one["a"].dtype == jnp.bfloat16 and one["b"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, one, two)
    with pytest.raises(UserError, match="standard deviation"):
        add_gaussian_noise(math.inf, KEY)


def test_client_transform_clips_as_stated():
    tree = {"a": jnp.full(9, 10.0), "b": jnp.full(16, 0.01)}
    for m, norms in (
        (mechanism(1.0), (math.sqrt(0.5), 0.04)),
        (mechanism(1.0, budget="dim"), (0.6, 0.04)),
        (mechanism(1.0, budget="global"), (1.0, 0.04 / 30)),
        (mechanism(math.inf, 0.0), (30.0, 0.04)),
    ):
        transform = m.client_transform()
        out, state = transform.update(tree, transform.init(tree))
        assert isinstance(state, clipping.ClipState)
        np.testing.assert_allclose(
            [optax.tree.norm(out["a"]), optax.tree.norm(out["b"])], norms, 1e-5
        )
        np.testing.assert_allclose(state.norms, [30.0, 0.04], rtol=1e-6)
    grouped = Mechanism(1.0, "uniform", 1.0, SAMPLER, layers=lambda path: "all")
    assert grouped.client_transform().init(tree).norms.shape == (1,)


def test_epsilon_is_that_of_the_sampler():
    m = mechanism(noise_multiplier=1.5)
    got = m.epsilon(40, 1e-6)
    by_hand = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    by_hand.compose(
        dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(100, 0.2, SAMPLER.slots, 1.5), 40
    )
    np.testing.assert_allclose(got.epsilon, by_hand.get_epsilon(1e-6), rtol=1e-3)
    assert got.accountant == "PLD" and got.delta == 1e-6 and got.sampling == SAMPLER.description
    assert m.event(40) == dp_accounting.SelfComposedDpEvent(SAMPLER.event(1.5), 40)
    fixed = mechanism(noise_multiplier=1.5, sampler=FixedSizeSampler(100, 20, seed=0))
    assert fixed.epsilon(40, 1e-6).accountant == "RDP"
    assert fixed.epsilon(40, 1e-6).epsilon > got.epsilon


def test_deployment_keeps_the_noise_on_the_mean():
    m = mechanism(clip_norm=0.01, noise_multiplier=0.02)
    deployed = m.deployed(1024, 10**6)
    assert deployed.sigma == pytest.approx(m.sigma) and m.sigma == pytest.approx(0.001)
    assert deployed.noise_multiplier == pytest.approx(1.024)
    assert deployed.noise_std == pytest.approx(m.noise_std)
    assert (deployed.clip_norm, deployed.budget) == (m.clip_norm, m.budget)
    assert (deployed.sampler.population, deployed.sampler.expected_cohort) == (10**6, 1024)
    assert isinstance(deployed.sampler, PoissonSampler)
    assert deployed.epsilon(100, 1e-9).epsilon < 2 < m.epsilon(100, 1e-9).epsilon


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(clip_norm=math.inf, noise_multiplier=1.0), "clip_norm"),
        (dict(clip_norm=0.0), "clip_norm"),
        (dict(clip_norm=math.nan), "clip_norm"),
        (dict(noise_multiplier=-1.0), "noise_multiplier"),
        (dict(noise_multiplier=math.nan), "noise_multiplier"),
        (dict(budget="unknown"), "budget"),
    ],
)
def test_mistakes_are_user_errors(arguments, match):
    with pytest.raises(UserError, match=match):
        mechanism(**arguments)


def test_weights_and_noise_exclude_each_other():
    sampler = PoissonSampler(100, 10, seed=0)
    with pytest.raises(UserError, match="no bounded sensitivity"):
        Mechanism(1.0, "uniform", 0.5, sampler, weighting="examples")
    with pytest.raises(UserError, match="'uniform', 'bounded' or 'examples'"):
        Mechanism(1.0, "uniform", 0.0, sampler, weighting="seconds")
    assert Mechanism(math.inf, "global", 0.0, sampler, weighting="examples").noise_std == 0.0


def test_normalising_needs_layers_with_bounds():
    sampler = PoissonSampler(100, 10, seed=0)
    for clip_norm, budget in ((1.0, "global"), (math.inf, "uniform")):
        with pytest.raises(UserError, match="per-layer budget"):
            Mechanism(clip_norm, budget, 0.0, sampler, normalise=True)
    small, large = {"a": jnp.ones(1) * 0.1, "b": jnp.ones(1) * 5}, {"a": 0.7071, "b": 0.7071}
    transform = Mechanism(1.0, "uniform", 0.0, sampler, normalise=True).client_transform()
    clipped, _ = transform.update(small, transform.init(small))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, [y], rtol=1e-4), clipped, large)


@pytest.mark.parametrize(
    "sampler",
    [
        PoissonSampler(1000, 50, seed=0),
        ShuffledSampler(1000, 50, seed=0),
        FixedSizeSampler(1000, 50, seed=0),
    ],
    ids=["poisson", "shuffled", "fixed"],
)
def test_what_was_released_before_is_accounted_for(sampler):
    """Two histograms at z and a run; Renyi curves add up, PLD agrees where it has a figure."""
    plain = Mechanism(0.5, "uniform", 3.0, sampler)
    both = dataclasses.replace(plain, released=(6.0, 8.0))
    alone, together = plain.epsilon(40, 1e-5), both.epsilon(40, 1e-5)
    assert alone.epsilon < together.epsilon and alone.epsilon_rdp < together.epsilon_rdp
    # One Gaussian query that is as informative as the two.
    z = (1 / 6.0**2 + 1 / 8.0**2) ** -0.5
    one = dataclasses.replace(plain, released=(z,)).epsilon(40, 1e-5)
    np.testing.assert_allclose(one.epsilon_rdp, together.epsilon_rdp, rtol=1e-6)
    # Without any round the histograms are all there is.
    only = both.epsilon(0, 1e-5)
    assert _gaussian_delta(only.epsilon, z / sampler.sensitivity) <= 1e-5 * 1.001
    # dp_accounting's PLD, unlike its RDP, halves the noise of an event once more for replacing.
    effective = z / sampler.sensitivity**2
    np.testing.assert_allclose(_gaussian_delta(only.epsilon_pld, effective), 1e-5, rtol=0.05)
    assert 1e-7 < _gaussian_delta(only.epsilon_rdp, z / sampler.sensitivity) <= 1e-5
    assert math.isinf(dataclasses.replace(plain, released=(0.0,)).epsilon(40, 1e-5).epsilon)
    deployed = both.deployed(100, 10_000)
    assert deployed.released == (60.0, 80.0)


def _gaussian_delta(epsilon, z):
    """Exact delta of one Gaussian query (Balle and Wang, 2018)."""
    a, b = 0.5 / z, epsilon * z
    return stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)


def test_bounded_weights_are_checked_and_keep_the_mechanism():
    bounded = Mechanism(0.5, "uniform", 2.0, SAMPLER, weighting="bounded")
    plain = mechanism()
    assert bounded.noise_std == plain.noise_std and bounded.event(9) == plain.event(9)
    weights = bounded.check_weights([0, 0.5, 1], 3)
    assert weights.dtype == np.float32 and weights.tolist() == [0, 0.5, 1]
    assert bounded.check_weights(None, 3) is None and plain.check_weights(None, 3) is None
    # Just above 1 in float64, 1 in float32: what is used is what is checked.
    assert bounded.check_weights([1 + 1e-9], 1)[0] == 1
    for bad in ([1.0000002], [-1e-9], [math.nan], [math.inf], [[1.0]]):
        with pytest.raises(UserError):
            bounded.check_weights(bad, 1)
    with pytest.raises(UserError, match="bounded"):
        plain.check_weights([1.0], 1)
    with pytest.raises(UserError, match="released"):
        Mechanism(0.5, "uniform", 2.0, SAMPLER, released=(-1.0,))
    with pytest.raises(UserError, match="weighting"):
        Mechanism(0.5, "uniform", 2.0, SAMPLER, weighting="quality")
