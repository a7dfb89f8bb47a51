"""The planner against the privacy table of arXiv 2310.00098 and an accountant written by hand."""

import math

import numpy as np
import pytest
from scipy.special import gammaln, logsumexp

from fedasr.cli import plan
from fedasr.errors import UserError
from fedasr.privacy import accounting
from fedasr.privacy.sampling import PoissonSampler

# sigma in 1e-6, cohort, population, rounds, epsilon as printed (delta 1e-9).
TABLE = [
    (3, 204_800, 69_506_000, 2034, 7.2),
    (10, 204_800, 6_950_600, 2006, 4.5),
    (5, 204_800, 6_950_600, 2006, 13),
    (3, 204_800, 6_950_600, 2006, 42),
    (1.8, 204_800, 69_506_000, 2034, 45),
    (5, 204_800, 69_506_000, 2034, 2.1),
    (3, 204_800, 695_060_000, 3390, 3.7),
    (5, 204_800, 695_060_000, 3390, 1.2),
    (10, 204_800, 69_506_000, 2034, 0.75),
    (30, 51_200, 1_737_650, 2006, 6.5),
    (50, 51_200, 1_737_650, 2006, 3.5),
    (100, 51_200, 1_737_650, 2006, 1.6),
    (100, 10_240, 347_530, 2006, 13),
    (20, 102_400, 3_475_300, 2006, 4.5),
    (10, 102_400, 3_475_300, 2006, 13),
    (10, 51_200, 1_737_650, 2006, 72),
    (10, 1_024, 34_753, 2006, 1.1e7),
]


def tight(noise, probability, rounds, delta):
    """RDP of the Poisson-subsampled Gaussian at integer orders (Mironov et al., 2019), converted
    by Canonne, Kamath and Steinke (2020)."""
    best = math.inf
    for order in range(2, 512):
        k = np.arange(order + 1)
        terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms = terms + k * np.log(probability) + (order - k) * np.log1p(-probability)
        terms = terms + k * (k - 1) / (2 * noise**2)
        rdp = rounds * logsumexp(terms) / (order - 1)
        epsilon = rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, epsilon)
    return best


@pytest.mark.parametrize("sigma,cohort,population,rounds,printed", TABLE)
def test_every_row_of_the_privacy_table(sigma, cohort, population, rounds, printed):
    sampler = PoissonSampler(population, cohort, seed=0)
    noise = sigma * 1e-6 * cohort
    event = accounting.compose(sampler.event(noise), rounds)
    epsilon = accounting.rdp_epsilon(event, 1e-9, sampler.neighboring_relation)
    exact = tight(noise, cohort / population, rounds, 1e-9)
    if printed in (45, 72, 1.1e7):
        # Orders below 2 are the best here, where the oracle has none; "45" seems to come from
        # integer orders, and "1.1e7" from another smallest order than ours: both are looser.
        assert epsilon < exact
        assert epsilon <= 1.01 * printed
        assert {45: exact, 72: epsilon}.get(printed, printed) == pytest.approx(printed, rel=0.10)
    elif printed >= 3:
        assert epsilon == pytest.approx(printed, rel=0.10)
        assert epsilon == pytest.approx(exact, rel=0.02)
    else:
        assert epsilon <= printed
        assert epsilon == pytest.approx(exact, rel=0.02)


def test_the_misprint():
    """One row prints 1.3 where ten times that is meant: 13, as here, for sigma 100e-6."""
    row = plan.plan(10_240, 347_530, 2006, 1e-9, sigma=100e-6)
    assert row["epsilon_rdp"] == pytest.approx(13, rel=0.05)
    assert row["epsilon"] == row["epsilon_pld"] < row["epsilon_rdp"]
    assert row["accountant"] == "PLD" and row["pld_interval"] > 0 and row["rdp_order"] > 1
    assert row["noise_multiplier"] == pytest.approx(1.024)
    assert row["sigma"] == pytest.approx(100e-6)


def test_fixed_size_counts_noise_by_its_own_sensitivity():
    """The often quoted 15.5 (a user replaced moves the sum by 2C), and the noise it needs."""
    setting = (1024, 34_753, 2000, 1e-9)
    row = plan.plan(*setting, noise_multiplier=2.86, sampling="fixed")
    assert row["epsilon"] == pytest.approx(15.5, abs=0.05)
    assert row["neighbours"] == "replace one user by any other"
    assert row["sigma"] == pytest.approx(2 * 1.43 / 1024)
    assert row["noise_multiplier"] == pytest.approx(2.86)  # on the sum, in clip norms
    assert row["noise_over_sensitivity"] == pytest.approx(1.43)
    same_noise = plan.plan(*setting, sigma=1.43 / 1024, sampling="fixed")
    assert same_noise["epsilon"] == pytest.approx(43.7, abs=0.1)
    assert same_noise["noise_multiplier"] == pytest.approx(1.43)
    assert same_noise["noise_over_sensitivity"] == pytest.approx(1.43 / 2)
    poisson = plan.plan(*setting, noise_multiplier=1.43)
    assert poisson["epsilon_rdp"] == pytest.approx(7.2, abs=0.05)
    assert poisson["epsilon"] == poisson["epsilon_pld"] == pytest.approx(6.8, abs=0.05)
    cramped = plan.plan(*setting, noise_multiplier=1.43, slots=1050)
    assert cramped["epsilon"] > 2 * poisson["epsilon"]


def test_noise_for_a_target_gives_the_target():
    row = plan.plan(1024, 1_000_000, 500, 1e-8, target_epsilon=4.0)
    assert row["accountant"] == "PLD" and row["epsilon_rdp"] > row["epsilon"]
    assert 3.98 < row["epsilon"] <= 4.0 and row["noise_over_sensitivity"] == row["noise_multiplier"]
    less = plan.plan(1024, 1_000_000, 500, 1e-8, noise_multiplier=row["noise_multiplier"] / 1.001)
    assert less["epsilon"] > 4.0
    again = plan.plan(1024, 1_000_000, 500, 1e-8, noise_multiplier=row["noise_multiplier"])
    assert again == row


def test_the_smallest_population_is_enough_and_less_is_not():
    found = plan.smallest_population(1024, 200, 1e-6, 1e-3, 2.0)
    smaller = int(found / 1.011)
    for population, enough in ((found, True), (smaller, False)):
        sampler = PoissonSampler(population, 1024, seed=0)
        event = accounting.compose(sampler.event(1.024), 200)
        epsilon = accounting.epsilon(event, 1e-6, sampler.neighboring_relation).epsilon
        assert (epsilon <= 2.0) == enough
    assert plan.smallest_population(1024, 2000, 1e-9, 1e-7, 1.0) is None


@pytest.mark.parametrize(
    "how,message",
    [
        (dict(), "exactly one"),
        (dict(sigma=1e-3, noise_multiplier=1.0), "exactly one"),
        (dict(sigma=-1.0), "above 0"),
        (dict(sigma=1e-3, slots=5), "slots"),
    ],
)
def test_mistakes(how, message):
    with pytest.raises(UserError, match=message):
        plan.plan(100, 1000, 10, 1e-6, **how)
    with pytest.raises(UserError, match="cohort=100 is more than the 50 users"):
        plan.plan(100, 50, 10, 1e-6, sigma=1e-3)


def test_noise_in_shares():
    """As the run's own, for so many parameters; needed bits are asked for before anything runs."""
    kind = {"noise_multiplier": 1.43, "noise": "skellam"}
    row = plan.plan(1024, 34_753, 2000, 1e-9, parameters=10_000_000, bits=20, **kind)
    central = plan.plan(1024, 34_753, 2000, 1e-9, noise_multiplier=1.43)
    assert (row["accountant"], row["epsilon_pld"]) == ("RDP", None)
    assert central["epsilon_rdp"] < row["epsilon"] < 1.003 * central["epsilon_rdp"]
    assert "20 bits" in row["sampling"]
    with pytest.raises(UserError, match="--parameters"):
        plan.plan(1024, 34_753, 2000, 1e-9, **kind)
