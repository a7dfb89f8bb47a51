"""Audits of the round code: the correct mechanism passes, every planted fault is caught."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
from scipy import stats

from fedasr import auditing
from fedasr.errors import UserError
from fedasr.federated.simulation import Simulation
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

pytest.importorskip("jax_privacy", reason="audits need jax-privacy")


ONE = jax.devices()[:1]
# One run with canaries: 6 x 1000 of them, a quarter sampled in each of two rounds. Claimed: 2.30.
CANARIES, TRIALS, ROUNDS, DELTA, NOISE, COHORT = 1000, 6, 2, 1e-3, 0.9, 250
AUDITS = 20


def claimed_to_be(cls=Mechanism, *, budget="uniform", sampler=None):
    sampler = sampler or PoissonSampler(CANARIES, COHORT, seed=1)
    return cls(0.5, budget, NOISE, sampler)


def audit(mechanism, **options):
    options = {"trials": TRIALS, "canaries": CANARIES, "seed": 5, **options}
    delta = options.pop("delta", DELTA)
    return auditing.audit_updates(mechanism, ROUNDS, delta, devices=ONE, **options)


@pytest.fixture(scope="module", autouse=True)
def accounted_once():
    """Every mechanism here makes the same claim, and each would compute it for a second."""
    patch = pytest.MonkeyPatch()
    known = functools.lru_cache(Mechanism.epsilon)
    patch.setattr(Mechanism, "epsilon", lambda self, *args: known(as_stated(self), *args))
    yield
    patch.undo()


def as_stated(mechanism):
    """The mechanism that a faulty one says it is."""
    sampler = mechanism.sampler
    if isinstance(sampler, EveryoneTwice):
        sampler = PoissonSampler(**dataclasses.asdict(sampler))
    return Mechanism(mechanism.clip_norm, mechanism.budget, mechanism.noise_multiplier, sampler)


# --------------------------------------------------------------------------------- planted faults


class HalfTheNoise(Mechanism):
    @property
    def noise_std(self):
        return super().noise_std / 2


class NoiseReused(Mechanism):
    def server_transform(self, *keys):
        chain = super().server_transform(*keys)
        return optax.stateless(lambda total, params: chain.update(total, chain.init(params))[0])


class LayerLeftOut(Mechanism):
    def client_transform(self):
        clip = super().client_transform()

        def update(delta, state, params=None):
            clipped, state = clip.update(delta, state, params)
            return {**clipped, "second": delta["second"]}, state

        return optax.GradientTransformation(clip.init, update)


@pytest.fixture
def draws(monkeypatch):
    """What simulations draw, in order."""
    seen, original = [], Simulation.draws

    def recorded(self, state):
        seen.append(original(self, state))
        return seen[-1]

    monkeypatch.setattr(Simulation, "draws", recorded)
    return seen


class EveryoneTwice(PoissonSampler):
    def cohort(self, round):
        return np.repeat(super().cohort(round), 2)


def weighted():
    mechanism = claimed_to_be()
    object.__setattr__(mechanism, "weighting", "examples")  # which the constructor refuses
    return mechanism


FAULTS = {
    "noise at half its scale": lambda: claimed_to_be(HalfTheNoise),
    "noise reused between rounds": lambda: claimed_to_be(NoiseReused),
    "a layer left out of clipping": lambda: claimed_to_be(LayerLeftOut),
    "a layer left out of the global clip": lambda: claimed_to_be(LayerLeftOut, budget="global"),
    "division by the realised cohort with weights": weighted,
    "users sampled twice": lambda: claimed_to_be(sampler=EveryoneTwice(CANARIES, COHORT, seed=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    found = audit(FAULTS[fault]())
    assert found.epsilon_claimed == pytest.approx(2.30, abs=0.01)
    assert found.exceeds and found.epsilon_lower > found.epsilon_claimed


@pytest.fixture(scope="module")
def audits():
    """Audits of the correct mechanism with coins, users and noise of their own.

    They are blocks of rounds of one simulation: compiling it once saves most of the time.
    """
    mechanism = claimed_to_be()
    present = auditing.toss(AUDITS * TRIALS, CANARIES, "one_run", 3)
    seen = auditing.observe(mechanism, present, ROUNDS, 3, ONE)
    claimed = mechanism.epsilon(ROUNDS, DELTA).epsilon
    found = []
    for start in range(0, len(present), TRIALS):
        own = slice(start, start + TRIALS)
        scores = {
            name: auditing.Scores(values[present[own]], values[~present[own]])
            for name, values in auditing.statistics(seen[own], mechanism).items()
        }
        options = {"method": "one_run", "trials": TRIALS, "rounds": ROUNDS}
        found.append(auditing.conclude(scores, claimed, DELTA, **options))
    return found


@pytest.mark.slow
def test_the_correct_mechanism_passes_twenty_audits(audits):
    """At 95% confidence one of 20 may exceed the claim by chance: the expected number of misses."""
    assert len(audits) == AUDITS

    assert sum(found.exceeds for found in audits) <= round(AUDITS * 0.05)


@pytest.mark.slow
def test_the_attack_sees_something(audits):
    """An audit that never finds anything would pass the test above, too."""
    lower = [found.epsilon_lower for found in audits]
    assert np.median(lower) > 0.25 * audits[0].epsilon_claimed
    assert all(found.statistic == "likelihood" for found in audits)
    assert 0.58 < np.mean([found.auroc for found in audits]) < 0.65
    assert all(found.strict <= found.epsilon_lower for found in audits)


@pytest.mark.slow
def test_many_runs_pass_and_catch():
    """One canary among ten users, in 500 runs."""
    sampler = PoissonSampler(10, 2.5, seed=2)
    options = {"method": "many_runs", "trials": 500, "canaries": None}
    correct = audit(claimed_to_be(sampler=sampler), **options)
    assert not correct.exceeds and correct.canaries == correct.trials == 500
    assert correct.strict == correct.epsilon_lower
    broken = audit(claimed_to_be(LayerLeftOut, sampler=sampler), **options)
    assert broken.exceeds


# ------------------------------------------------------------------------------------ the harness


@pytest.mark.parametrize(
    ("budget", "sampler"),
    [
        ("uniform", PoissonSampler(12, 6, seed=4)),
        ("dim", PoissonSampler(12, 6, seed=4)),
        ("global", FixedSizeSampler(12, 6, seed=4)),
    ],
)
def test_observed_is_who_was_sampled_and_present(budget, sampler, draws):
    """Almost without noise, a canary adds exactly one unit to the rounds it is sampled in."""
    present = auditing.toss(3, 9, "one_run", 1)
    mechanism = Mechanism(0.2, budget, 1e-4, sampler)
    seen = auditing.observe(mechanism, present, 2, 0, ONE)
    assert seen.shape == (3, 2, 9)
    for trial in range(3):
        for round in range(2):
            cohort = draws[0].sampler.cohort(2 * trial + round)
            expected = np.isin(np.arange(9), cohort) & present[trial]
            np.testing.assert_allclose(seen[trial, round], expected, atol=1e-3)
    assert 0 < seen.round().mean() < 0.5


def test_published_noise_has_the_mechanisms_scale():
    seen = auditing.observe(claimed_to_be(), np.zeros((4, CANARIES), bool), ROUNDS, 7, ONE)
    assert stats.kstest(seen.ravel(), stats.norm(0, NOISE).cdf).pvalue > 1e-3


def test_trials_are_simulations_of_their_own_where_something_is_remembered(draws):
    mechanism = Mechanism(0.2, "uniform", 1e-4, ShuffledSampler(6, 2, seed=4))
    seen = auditing.observe(mechanism, np.ones((2, 6), bool), 2, 0, ONE)
    for trial in range(2):
        for round in range(2):
            cohort = draws[trial].sampler.cohort(round)
            np.testing.assert_allclose(seen[trial, round], np.isin(np.arange(6), cohort), atol=1e-3)


def test_likelihood_is_the_log_ratio_of_densities():
    seen = np.random.default_rng(0).normal(size=(5, 3, 2))
    mechanism = claimed_to_be(sampler=PoissonSampler(10, 2.5, seed=0))
    without = stats.norm(0, NOISE).logpdf(seen)
    sampled = stats.norm(1, NOISE).pdf(seen)
    present = np.log(0.75 * np.exp(without) + 0.25 * sampled)
    found = auditing.statistics(seen, mechanism)
    np.testing.assert_allclose(found["likelihood"], (present - without).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found["spread"], np.ptp(seen, axis=1))
    assert set(auditing.statistics(seen[:, :1], mechanism)) == {"likelihood"}


def test_coins():
    coins = auditing.toss(50, 40, "one_run", 1)
    assert abs(coins.mean() - 0.5) < 0.05
    assert (coins == auditing.toss(50, 40, "one_run", 1)).all()
    assert (coins != auditing.toss(50, 40, "one_run", 2)).any()
    assert auditing.toss(10, 1, "many_runs", 0).sum() == 5


# ----------------------------------------------------------------------------------------- bounds


conclude = functools.partial(auditing.conclude, delta=1e-6, trials=2, rounds=1)


def gaussian_scores(shift, count, seed=0):
    rng = np.random.default_rng(seed)
    return auditing.Scores(shift + rng.normal(size=count), rng.normal(size=count))


@pytest.mark.parametrize("method", auditing.METHODS)
def test_bounds_of_known_attacks(method):
    blind = conclude({"a": gaussian_scores(0, 2000)}, 1.0, method=method)
    assert blind.epsilon_lower < 0.3 and not blind.exceeds
    perfect = conclude({"a": gaussian_scores(50, 2000)}, 1.0, method=method)
    assert perfect.epsilon_lower > 3 and perfect.exceeds and perfect.auroc == 1
    assert not dataclasses.replace(perfect, epsilon_claimed=math.inf).exceeds


def test_perfect_guesses_give_the_bounds_of_the_papers():
    """k right guesses of k: any mechanism with e^eps / (1 + e^eps) below alpha^(1/k) is refuted."""
    scores = gaussian_scores(50, 2000)
    found = conclude({"a": scores}, 1.0, method="one_run", delta=1e-12)
    guesses = auditing.guess_count(4000)
    assert guesses == 80
    rate = 0.05 ** (1 / guesses)
    assert found.strict == pytest.approx(math.log(rate / (1 - rate)), abs=1e-3)
    # Clopper and Pearson with no error in either world, at half the error each and one of two
    # thresholds.
    found = conclude({"a": scores}, 1.0, method="many_runs", delta=1e-12)
    thresholds = 3
    upper = 1 - (0.05 / 2 / thresholds) ** (1 / 2000)
    assert found.epsilon_lower == pytest.approx(math.log((1 - upper) / upper), abs=0.02)


def test_attacks_share_the_error():
    alone = conclude({"a": gaussian_scores(2, 500)}, 1.0, method="many_runs")
    blind = gaussian_scores(0, 500, 1)
    shared = conclude({"b": blind, "a": gaussian_scores(2, 500)}, 1.0, method="many_runs")
    assert shared.statistic == "a"
    assert 0 < shared.epsilon_lower < alone.epsilon_lower
    half = conclude({"a": gaussian_scores(2, 500)}, 1.0, method="many_runs", confidence=0.975)
    assert shared.epsilon_lower == half.epsilon_lower == shared.bounds["a"]


def test_roc_curve(tmp_path):
    scores = auditing.Scores(np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0]))
    fpr, tpr = scores.roc()
    np.testing.assert_allclose(fpr, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(tpr, [0, 1 / 3, 2 / 3, 1, 1])
    found = conclude({"a": gaussian_scores(1, 50)}, 1.0, method="many_runs")
    path = tmp_path / "roc.png"
    auditing.write_roc(found, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    auditing.write_roc(dataclasses.replace(found, epsilon_claimed=math.inf), str(path))
    with pytest.raises(UserError, match="plot"):
        auditing.write_roc(found, str(tmp_path / "roc.nothing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "few_runs"}, "few_runs"),
        ({"method": "many_runs", "trials": 1}, "at least 2"),
        ({"method": "many_runs", "canaries": 3}, "one canary"),
        ({"trials": 0}, "a round and a run"),
        ({"confidence": 1.0}, "confidence"),
        ({"canaries": 2000}, "do not fit"),
        ({"canaries": 1, "trials": 1}, "by chance"),
        ({"delta": 0.01}, "too near"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        audit(claimed_to_be(), **options)


def test_adaptive_bounds_are_not_audited():
    adaptive = dataclasses.replace(claimed_to_be(), adaptive=AdaptiveClip(1.0))
    with pytest.raises(UserError, match="fixed bounds"):
        audit(adaptive)


def test_without_noise_or_delta_there_is_nothing_to_audit():
    silent = Mechanism(0.5, "uniform", 0.0, PoissonSampler(10, 5, seed=0))
    with pytest.raises(UserError, match="without noise"):
        audit(silent, canaries=None)
    with pytest.raises(UserError, match="delta"):
        auditing.audit_updates(claimed_to_be(), ROUNDS, 1.0)
