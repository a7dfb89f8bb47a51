import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedasr.errors import UserError
from fedasr.privacy import accounting
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE
DELTA = 1e-9


def poisson(q, z, rounds):
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    return dp_accounting.SelfComposedDpEvent(event, rounds)


def of_sampler(sampler, z, rounds, delta=DELTA):
    event = accounting.compose(sampler.event(z), rounds)
    return accounting.epsilon(event, delta, sampler.neighboring_relation, sampler.description)


@pytest.mark.parametrize(("q", "z", "rounds"), [(0.001024, 0.5, 200), (0.03, 1.43, 2000)])
def test_equals_dp_accounting_called_by_hand(q, z, rounds):
    got = accounting.epsilon(poisson(q, z, rounds), DELTA, ZERO_OUT)
    by_rdp = rdp.RdpAccountant()
    by_rdp.compose(poisson(q, z, rounds))
    np.testing.assert_allclose(got.epsilon_rdp, by_rdp.get_epsilon(DELTA), rtol=2e-3)
    assert got.epsilon_rdp <= by_rdp.get_epsilon(DELTA) * (1 + 1e-9)  # our orders hold theirs
    by_pld = pld.PLDAccountant(ZERO_OUT, 1e-4)
    by_pld.compose(poisson(q, z, rounds))
    np.testing.assert_allclose(got.epsilon_pld, by_pld.get_epsilon(DELTA), rtol=1e-3)
    assert got.epsilon == got.epsilon_pld < got.epsilon_rdp
    assert got.accountant == "PLD"


def test_truncation_by_hand():
    sampler = PoissonSampler(1000, 100, seed=0, slots=130)
    got = of_sampler(sampler, 2.0, 30)
    by_pld = pld.PLDAccountant(ZERO_OUT, 1e-4)
    by_pld.compose(sampler.event(2.0), 30)
    np.testing.assert_allclose(got.epsilon_pld, by_pld.get_epsilon(DELTA), rtol=1e-3)
    ordinary = accounting.epsilon(poisson(0.1, 2.0, 30), DELTA, ZERO_OUT)
    assert ordinary.epsilon_pld < got.epsilon_pld < got.epsilon_rdp
    assert ordinary.epsilon_rdp < got.epsilon_rdp


@pytest.mark.parametrize(
    ("population", "cohort", "z", "rounds", "delta"),
    [(10_000, 8, 1.0, 200, 1e-9), (1000, 1, 1.0, 200, 1e-9)],
)
def test_default_slots_cost_nothing_visible(population, cohort, z, rounds, delta):
    """Small cohorts: with seven deviations' slots the second had 4.4 times the epsilon."""
    got = of_sampler(PoissonSampler(population, cohort, seed=0), z, rounds, delta)
    finer = pld.PLDAccountant(ZERO_OUT, 1e-4)
    finer.compose(poisson(cohort / population, z, rounds))
    assert got.epsilon_pld == pytest.approx(finer.get_epsilon(delta), rel=1e-3)
    ordinary = accounting.epsilon(poisson(cohort / population, z, rounds), delta, ZERO_OUT)
    assert got.epsilon_pld == pytest.approx(ordinary.epsilon_pld, rel=1e-4)
    assert got.epsilon_rdp == pytest.approx(ordinary.epsilon_rdp, rel=1e-4)
    # For tinier deltas, where the PLD's arithmetic ends, by Rényi DP.
    tiny = [
        accounting.rdp_epsilon(accounting.compose(s.event(z), 2000), 1e-12, ZERO_OUT)
        for s in (
            PoissonSampler(population, cohort, 0),
            PoissonSampler(population, cohort, 0, population),
        )
    ]
    assert tiny[0] == pytest.approx(tiny[1], rel=1e-3)


def test_the_relation_leaves_the_figures_of_plain_poisson_sampling():
    """Zero-out and add or remove are the same two distributions there, in both accountants."""
    event = poisson(0.01, 1.1, 300)
    other = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    one, two = (accounting.epsilon(event, DELTA, relation) for relation in (ZERO_OUT, other))
    assert (one.epsilon_pld, one.epsilon_rdp) == (two.epsilon_pld, two.epsilon_rdp)


def test_rare_truncation_costs_next_to_nothing():
    default = of_sampler(PoissonSampler(10**6, 1024, seed=0), 0.5, 200)
    ordinary = accounting.epsilon(poisson(1024 / 1e6, 0.5, 200), DELTA, ZERO_OUT)
    np.testing.assert_allclose(default.epsilon_pld, ordinary.epsilon_pld, rtol=1e-3)
    np.testing.assert_allclose(default.epsilon_rdp, ordinary.epsilon_rdp, rtol=1e-3)
    assert default.epsilon_rdp >= ordinary.epsilon_rdp


def test_the_renyi_bound_of_truncated_rounds_covers_the_exact_divergence():
    """One round, one dimension, the worst neighbours: the bound must exceed the integral.

    Others contribute -1 each, the user +1: sampled into a full round, the user displaces a -1.
    """
    population, slots, q, z = 6, 2, 0.4, 1.0
    grid = np.linspace(-15, 15, 20001)

    def density(users):
        """Users beyond the others (0 or 1), each sampled with q, at most `slots` kept."""
        out = np.zeros_like(grid)
        for others in range(population):
            weight = stats.binom.pmf(others, population - 1, q)
            for here in range(users + 1):
                chance = weight * (q if here else 1 - q if users else 1.0)
                drawn = others + here
                kept = min(slots, drawn)
                inside = here * kept / max(drawn, 1)  # that the user is among the kept
                out += chance * inside * stats.norm.pdf(grid, 2 - kept, z)
                out += chance * (1 - inside) * stats.norm.pdf(grid, -kept, z)
        return out

    p, r = density(1), density(0)
    step = grid[1] - grid[0]
    np.testing.assert_allclose([p.sum() * step, r.sum() * step], 1, rtol=1e-6)
    sampler = PoissonSampler(population, 2, seed=0, slots=slots)
    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(population, q, slots, z)
    for delta in (1e-2, 1e-4):
        bound = accounting.rdp_epsilon(event, delta, sampler.neighboring_relation)
        for a, b in ((p, r), (r, p)):
            spent = np.sum(np.maximum(a - math.exp(bound) * b, 0)) * step
            assert spent <= delta
    # Without the correction the figure would be too small to be true somewhere.
    ordinary = accounting.rdp_epsilon(poisson(q, z, 1), 1e-4, ZERO_OUT)
    assert accounting.rdp_epsilon(event, 1e-4, ZERO_OUT) > ordinary


def test_known_figures():
    """The published setting of 34,753 users: Poisson 7.2 (Rényi) or 6.8, fixed size 43.7.

    Fixed size has the often quoted 15.5 at a noise of 1.43 times its own sensitivity, which is 2C.
    """
    got = of_sampler(PoissonSampler(34753, 1024, seed=0), 1.43, 2000)
    np.testing.assert_allclose([got.epsilon_rdp, got.epsilon_pld], [7.2, 6.8], atol=0.05)
    fixed = of_sampler(FixedSizeSampler(34753, 1024, seed=0), 1.43, 2000)
    np.testing.assert_allclose(fixed.epsilon, 43.7, atol=0.1)
    doubled = of_sampler(FixedSizeSampler(34753, 1024, seed=0), 2 * 1.43, 2000)
    np.testing.assert_allclose(doubled.epsilon, 15.5, atol=0.05)
    cramped = of_sampler(PoissonSampler(34753, 1024, seed=0, slots=1050), 1.43, 2000)
    assert cramped.epsilon > 1.5 * got.epsilon
    assert fixed.accountant == "RDP" and fixed.epsilon_pld is None
    by_hand = rdp.RdpAccountant(range(2, 65), REPLACE)
    by_hand.compose(FixedSizeSampler(34753, 1024, seed=0).event(1.43), 2000)
    np.testing.assert_allclose(fixed.epsilon_rdp, by_hand.get_epsilon(DELTA), rtol=1e-9)


@pytest.mark.parametrize("noise", [1.0, 2.0, 5.0])
def test_everyone_in_one_round_is_the_gaussian_mechanism(noise):
    """Balle and Wang, 2018, theorem 8: the exact delta of the Gaussian mechanism."""

    def exact(sensitivity):
        def excess(epsilon):
            half, shift = sensitivity / (2 * noise), epsilon * noise / sensitivity
            exact = stats.norm.cdf(half - shift) - np.exp(epsilon) * stats.norm.cdf(-half - shift)
            return exact - 1e-6

        return optimize.brentq(excess, 1e-3, 100)

    got = of_sampler(FixedSizeSampler(100, 100, seed=0), noise, 1, delta=1e-6)
    assert exact(2) <= got.epsilon <= 1.15 * exact(2)
    got = of_sampler(ShuffledSampler(100, 100, seed=0), noise, 1, delta=1e-6)
    assert got.epsilon == got.epsilon_pld == pytest.approx(exact(1), rel=1e-3)


def test_a_fixed_size_covers_the_user_whom_another_displaces():
    """One round: the others send -1, the user +1 or nothing, in the place of one of them."""
    population, size, z, delta = 1000, 10, 1.0, 1e-5
    grid = np.linspace(-15, 15, 20001)
    drawn = size / population
    with_user = (1 - drawn) * stats.norm.pdf(grid, 0, z) + drawn * stats.norm.pdf(grid, 2, z)
    without = (1 - drawn) * stats.norm.pdf(grid, 0, z) + drawn * stats.norm.pdf(grid, 1, z)

    def spent(epsilon):
        return np.sum(np.maximum(with_user - np.exp(epsilon) * without, 0)) * (grid[1] - grid[0])

    claimed = of_sampler(FixedSizeSampler(population, size, seed=0), z, 1, delta=delta)
    assert spent(claimed.epsilon) <= delta
    # At sensitivity C the claim would be wrong.
    wrong = of_sampler(FixedSizeSampler(population, size, seed=0), 2 * z, 1, delta=delta)
    assert spent(wrong.epsilon) > 10 * delta


@pytest.mark.parametrize(
    ("sigma", "cohort", "population", "rounds", "printed"),
    [
        (3e-6, 204800, 69506000, 2034, 7.2),
        (10e-6, 204800, 6950600, 2006, 4.5),
        (5e-6, 204800, 6950600, 2006, 13),
        (3e-6, 204800, 6950600, 2006, 42),
        (30e-6, 51200, 1737650, 2006, 6.5),
        (10e-6, 51200, 1737650, 2006, 72),
    ],
)
def test_the_published_table(sigma, cohort, population, rounds, printed):
    sampler = PoissonSampler(population, cohort, seed=0)
    event = accounting.compose(sampler.event(sigma * cohort), rounds)
    got = accounting.rdp_epsilon(event, DELTA, ZERO_OUT)
    np.testing.assert_allclose(got, printed, rtol=0.035)


def test_no_noise_has_no_guarantee():
    for sampler in (PoissonSampler(100, 10, seed=0), FixedSizeSampler(100, 10, seed=0)):
        got = of_sampler(sampler, 0.0, 5)
        assert got.epsilon == got.epsilon_rdp == math.inf


def test_tiny_noise_is_accounted_for_by_renyi_dp():
    got = of_sampler(PoissonSampler(96, 16, seed=0), accounting.MIN_PLD_NOISE / 2, 10)
    assert got.accountant == "RDP" and got.epsilon_pld is None
    assert got.epsilon == got.epsilon_rdp and math.isfinite(got.epsilon)
    above = of_sampler(PoissonSampler(96, 16, seed=0), accounting.MIN_PLD_NOISE, 10)
    assert above.accountant == "PLD" and above.epsilon < got.epsilon


def test_epsilon_falls_with_noise_and_rises_with_rounds():
    sampler = PoissonSampler(1000, 20, seed=0)
    by_noise = [of_sampler(sampler, z, 50).epsilon for z in (0.4, 1.0, 3.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    by_rounds = [of_sampler(sampler, 1.0, t).epsilon for t in (0, 1, 500)]
    assert by_rounds == sorted(by_rounds) and by_rounds[0] == 0


@pytest.mark.parametrize(
    "sampler", [PoissonSampler(10**6, 1024, seed=0), FixedSizeSampler(10**4, 20, seed=0)]
)
def test_calibration_meets_the_target(sampler):
    def event(noise):
        return accounting.compose(sampler.event(noise), 100)

    def at(noise):
        return accounting.epsilon(event(noise), DELTA, sampler.neighboring_relation).epsilon

    z = accounting.calibrate_noise(8.0, DELTA, event, sampler.neighboring_relation)
    assert at(z) <= 8.0 < at(z / 1.001)


def test_noise_is_calibrated_with_the_accountant_that_reports():
    """By Rényi DP it would be 42% more."""
    m = Mechanism(1.0, "global", 1.0, PoissonSampler(10**6, 1024, seed=0))
    assert m.calibrated(1.0, DELTA, 120).noise_multiplier == pytest.approx(0.8040, rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(-6, -0.05),
    st.floats(-20, 20),
    st.floats(-8, 8),
    st.floats(0, 3),
    st.booleans(),
)
def test_smallest_finds_where_a_falling_figure_meets_its_target(power, at, guess, bend, wall):
    """Powers with a bend, a wall of infinities below; few evaluations where it is a power."""
    calls = []

    def figure(x):
        calls.append(x)
        log = math.log(x) - at
        if wall and log < -0.5:
            return math.inf
        return math.exp(min(power * log - bend * math.tanh(log) ** 3, 600))

    least, most = 1e-7, 1e7
    found = accounting.smallest(figure, 1.0, math.exp(guess), least, most, 1.001)
    if at > math.log(most):
        assert found is None
        return
    assert len(calls) < 60 and len(set(calls)) == len(calls)
    assert least <= found <= most and figure(found) <= 1.0
    assert found == least or figure(found / 1.001) > 1.0


def test_calibration_gives_up_with_advice(monkeypatch):
    monkeypatch.setattr(accounting, "_MAX_NOISE", 16.0)
    cramped = Mechanism(1.0, "global", 1.0, PoissonSampler(100, 50, seed=0, slots=50))
    with pytest.raises(UserError, match="slots"):
        cramped.calibrated(1e-9, 1e-12, 1000)
    with pytest.raises(UserError, match="target_epsilon"):
        cramped.calibrated(0.0, 1e-9, 10)


def test_mistakes_are_user_errors():
    with pytest.raises(UserError, match="delta"):
        accounting.epsilon(poisson(0.1, 1.0, 1), 0.0, ZERO_OUT)
    with pytest.raises(UserError, match="rounds"):
        accounting.compose(dp_accounting.GaussianDpEvent(1.0), -1)
    with pytest.raises(UserError, match="no Rényi bound"):
        accounting.rdp_epsilon(poisson(0.1, 1.0, 1), DELTA, REPLACE)
