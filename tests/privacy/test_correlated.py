import dataclasses
import itertools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.privacy import correlated
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.correlated import BandedNoise, BufferedNoise, sensitivity
from fedasr.privacy.gaussian import add_gaussian_noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

ROUNDS = 9
BANDED = BandedNoise(3, ROUNDS)


@pytest.fixture(scope="module")
def buffered():
    return BufferedNoise(1, ROUNDS, separation=3, participations=3)


@pytest.fixture(scope="module", params=["banded", "buffered"])
def correlation(request, buffered):
    return BANDED if request.param == "banded" else buffered


def strategy(correlation, rounds=ROUNDS):
    """C as a matrix."""
    coefficients = correlation.coefficients(rounds)
    return sum(np.diag(np.full(rounds - i, c), -i) for i, c in enumerate(coefficients))


def noise_of(correlation, size, std=1.0, rounds=ROUNDS, key=3):
    """The noise of every round on one leaf: float64 [rounds, size]."""
    transform = add_gaussian_noise(std, jax.random.key(key), correlation)
    zeros = {"a": jnp.zeros(size)}
    state, update, out = transform.init(zeros), jax.jit(transform.update), []
    for _ in range(rounds):
        noisy, state = update(zeros, state)
        out.append(np.asarray(noisy["a"], np.float64))
    return np.stack(out)


def test_covariance_over_rounds_matches_the_factorisation(correlation):
    """Cov = std^2 C^-1 C^-T, every entry within five of its own standard errors."""
    size = 200_000
    inverse = np.linalg.inv(strategy(correlation))
    expected = 0.25 * inverse @ inverse.T
    noise = noise_of(correlation, size, std=0.5)
    found = noise @ noise.T / size
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
    assert (np.abs(found - expected) < 5 * error).all()
    assert not (np.abs(found - 0.25 * np.eye(ROUNDS)) < 5 * error).all()  # the test can tell
    assert np.abs(noise.mean(axis=1)).max() < 5 * math.sqrt(np.diag(expected).max() / size)


def test_the_fresh_noise_comes_back(correlation):
    """C times the noise is the independent noise of the same key, so nothing else is released."""
    fresh = noise_of(None, 1000)
    again = strategy(correlation) @ noise_of(correlation, 1000)
    np.testing.assert_allclose(again, fresh, atol=2e-5)


def test_sums_are_less_noisy_than_with_independent_noise(correlation):
    """The mean squared error of prefix sums, at the same sensitivity for turns 3 apart."""
    prefix = np.tril(np.ones((ROUNDS, ROUNDS)))
    error = np.linalg.norm(prefix @ np.linalg.inv(strategy(correlation)))
    error *= sensitivity(correlation, ROUNDS, 3, 3)
    assert error < 0.9 * np.linalg.norm(prefix) * math.sqrt(3)


@pytest.mark.parametrize("separation", [1, 2, 3, 4])
@pytest.mark.parametrize("participations", [1, 2, 3])
def test_sensitivity_is_the_worst_pattern_of_turns(correlation, separation, participations):
    """Against all patterns of turns, with every sign of what the user sends."""
    matrix = strategy(correlation)
    worst = 0.0
    for turns in itertools.combinations(range(ROUNDS), participations):
        if any(b - a < separation for a, b in itertools.pairwise(turns)):
            continue
        for signs in itertools.product((-1, 1), repeat=participations):
            worst = max(worst, np.linalg.norm(matrix[:, turns] @ np.array(signs)))
    found = sensitivity(correlation, ROUNDS, separation, participations)
    assert found == pytest.approx(worst, rel=1e-9)


def test_bands_within_the_separation_add_up_like_independent_turns():
    full = BandedNoise(3, 200)
    assert sensitivity(full, 200, 3, 10) == pytest.approx(math.sqrt(10), rel=1e-6)
    assert full.coefficients(10)[3:].tolist() == [0.0] * 7
    assert sensitivity(BandedNoise(1, 5), 5, 1, 5) == pytest.approx(math.sqrt(5))


def test_a_resumed_run_takes_back_what_it_added(correlation):
    transform = add_gaussian_noise(1.0, jax.random.key(0), correlation)
    zeros = {"a": jnp.zeros(5), "b": jnp.zeros((2, 3), jnp.bfloat16)}
    state, outs, saved = transform.init(zeros), [], None
    for round in range(5):
        if round == 3:
            saved = jax.device_get(state)
        noisy, state = transform.update(zeros, state)
        outs.append(noisy)
    assert noisy["b"].dtype == jnp.bfloat16
    state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(saved))
    for round in (3, 4):
        noisy, state = transform.update(zeros, state)
        jax.tree.map(np.testing.assert_array_equal, noisy, outs[round])
    sizes = [x.size for x in jax.tree.leaves(state.buffers)]
    assert sum(sizes) == 11 * correlation.buffers
    assert {x.dtype for x in jax.tree.leaves(state.buffers)} == {jnp.dtype("float32")}


def mechanism(sampler, correlation=BANDED, noise=2.0):
    return Mechanism(1.0, "global", noise, sampler, correlation=correlation)


def test_events_without_amplification():
    """All the turns of a user are one Gaussian query; independent noise gives one for each."""
    sampler = ShuffledSampler(12, 4, seed=0)  # turns 3 apart
    alone = mechanism(sampler, None).event(ROUNDS)
    assert alone == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 3)
    together = mechanism(sampler).event(ROUNDS)
    assert together.noise_multiplier == pytest.approx(2.0 / sensitivity(BANDED, ROUNDS, 3, 3))
    # At this separation bands change nothing in epsilon: their gain is in the sums.
    args = (1e-5, sampler.neighboring_relation)
    from fedasr.privacy import accounting

    first, second = accounting.epsilon(alone, *args), accounting.epsilon(together, *args)
    assert second.epsilon == pytest.approx(first.epsilon, rel=0.02)
    assert second.accountant == "PLD"
    # Users closer together than the bands change more.
    close = mechanism(ShuffledSampler(12, 12, seed=0))
    assert close.event(ROUNDS).noise_multiplier < 2.0 / 3
    assert close.sampler.neighboring_relation == dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def test_event_with_amplification_is_that_of_cyclic_sampling():
    sampler = PoissonSampler(300, 10, seed=0, cycle=3)
    event = mechanism(sampler).event(ROUNDS)
    assert event.count == 3
    assert event.event.noise_multiplier == pytest.approx(2.0)
    by_hand = sampler.event(event.event.noise_multiplier)
    assert event.event == by_hand and by_hand.sampling_probability == 0.1
    half = dataclasses.replace(BANDED)
    object.__setattr__(half, "coefficients", lambda rounds: 2 * BANDED.coefficients(rounds))
    assert mechanism(sampler, half).event(ROUNDS).event.noise_multiplier == pytest.approx(1.0)
    assert "banded, 3 bands noise" in mechanism(sampler).epsilon(ROUNDS, 1e-5).sampling


def test_combinations_that_nobody_can_account_for_are_refused(buffered):
    with pytest.raises(UserError, match="cycle=3"):
        mechanism(PoissonSampler(300, 10, seed=0))
    with pytest.raises(UserError, match="cycle=3"):
        mechanism(PoissonSampler(300, 10, seed=0, cycle=2))
    with pytest.raises(UserError, match="ShuffledSampler"):
        mechanism(FixedSizeSampler(300, 10, seed=0))
    with pytest.raises(UserError, match="No accountant"):
        mechanism(PoissonSampler(300, 10, seed=0, cycle=3), buffered)
    mechanism(ShuffledSampler(300, 10, seed=0), buffered)


def test_increasing_coefficients_are_refused(monkeypatch):
    monkeypatch.setattr(correlated, "_banded", lambda rounds, bands: (0.5, 0.6, 0.1))
    with pytest.raises(UserError, match="increase"):
        sensitivity(BANDED, ROUNDS, 3, 3)


def test_calibration_and_deployment_keep_the_correlation():
    small = mechanism(ShuffledSampler(12, 4, seed=0), noise=0.5).calibrated(3.0, 1e-5, ROUNDS)
    assert small.epsilon(ROUNDS, 1e-5).epsilon == pytest.approx(3.0, rel=1e-3)
    large = small.deployed(40, 120)
    assert large.noise_multiplier == pytest.approx(10 * small.noise_multiplier)
    assert large.sampler == ShuffledSampler(120, 40, 0) and large.correlation == BANDED


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BandedNoise(0, 5), "bands"),
        (lambda: BandedNoise(6, 5), "bands"),
        (lambda: BufferedNoise(0, 5, 1, 1), "buffers"),
        (lambda: BufferedNoise(2, 5, 0, 1), "separation"),
    ],
)
def test_mistakes_are_user_errors(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_one_band_is_independent_noise_without_a_memory():
    one = add_gaussian_noise(1.0, jax.random.key(3), BandedNoise(1, ROUNDS))
    assert one.init({"a": jnp.zeros(5)}).buffers == ()
    np.testing.assert_array_equal(noise_of(BandedNoise(1, ROUNDS), 5), noise_of(None, 5))


def test_they_can_be_replaced_and_compared():
    assert dataclasses.replace(BANDED, rounds=10) != BANDED == BandedNoise(3, ROUNDS)


@pytest.mark.parametrize("rounds", [1, 4, ROUNDS])
def test_votes_are_fresh_queries_under_correlated_noise(rounds, buffered):
    """Without amplification: the sums are one query about all turns, each turn's votes another."""
    z, votes = 2.0, 3.0
    sampler = ShuffledSampler(12, 4, seed=0)
    turns = sampler.participations(rounds)
    for correlation in (BANDED, buffered):
        event = dataclasses.replace(
            mechanism(sampler, correlation, z), adaptive=AdaptiveClip(votes)
        ).event(rounds)
        changed = sensitivity(correlation, rounds, 3, turns)
        expected = (changed**2 / z**2 + turns / votes**2) ** -0.5
        assert event.noise_multiplier == pytest.approx(expected)
    # With amplification every turn is a query of its own, and so are its votes.
    cyclic = PoissonSampler(300, 10, seed=0, cycle=3)
    event = dataclasses.replace(mechanism(cyclic, noise=z), adaptive=AdaptiveClip(votes)).event(9)
    assert event.count == 3
    assert event.event.noise_multiplier == pytest.approx((1 / z**2 + 1 / votes**2) ** -0.5)
