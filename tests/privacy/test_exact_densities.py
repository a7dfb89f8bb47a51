"""Claims against the exact densities of small cases: what is claimed is true, and hardly more.

One round of few users is a mixture of normal densities, which is written down here from the law of
the sampling, without an accountant. Its privacy losses, rounded down, are composed over the rounds
by FFT: a lower bound on the delta that an epsilon really needs. The user who is hidden sends +1;
the others nothing, which hides the least, or -1, so that displacing one of them counts double.
"""

import dataclasses
import itertools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedasr.privacy import accounting
from fedasr.privacy.correlated import BandedNoise, BufferedNoise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

RELATION = dp_accounting.NeighboringRelation
DELTA = 1e-5


# ------------------------------------------------------------------------------- exact densities


def normals(parts, z, grid):
    """Density of a mixture: [(probability, mean)] with noise of standard deviation z."""
    return sum(p * stats.norm.pdf(grid, mean, z) for p, mean in parts)


def poisson_round(users, q, slots, other, reading):
    """[(probability, mean of the sum)] of a round of `users`; all but one of them send `other`.

    reading: "with" the user's +1; "zero" sent in its place; or "absent": the user is never drawn.
    """
    for others in range(users):
        chance = stats.binom.pmf(others, users - 1, q)
        if reading == "absent":
            yield chance, other * min(others, slots)
            continue
        yield chance * (1 - q), other * min(others, slots)
        kept = min(others + 1, slots)
        inside = kept / (others + 1)  # that the user is among the kept
        yield chance * q * inside, (reading == "with") + other * (kept - 1)
        yield chance * q * (1 - inside), other * kept


def groups(sampler):
    """Users in each of the groups that take turns."""
    sizes = [len(range(g, sampler.population, sampler.cycle)) for g in range(sampler.cycle)]
    return sorted(set(sizes))


def compared(sampler):
    """The rounds that the sampler's claim compares: pairs of lists of (probability, mean)."""
    if isinstance(sampler, FixedSizeSampler):
        assert sampler.neighboring_relation == RELATION.REPLACE_ONE
        q, k = sampler.cohort_size / sampler.population, sampler.cohort_size
        for other, ours, theirs in itertools.product((-1, 0), (1, 0), (-1, 0)):
            left_out = (1 - q, other * k)
            yield [left_out, (q, other * (k - 1) + ours)], [left_out, (q, other * (k - 1) + theirs)]
        return
    q, slots = sampler.sampling_probability, sampler.slots
    for users, other in itertools.product(groups(sampler), (0, -1)):
        claimed = [*poisson_round(users, q, slots, other, "with")]
        if sampler.neighboring_relation == RELATION.REPLACE_SPECIAL:
            for reading in ("zero", "absent"):
                yield claimed, [*poisson_round(users, q, slots, other, reading)]
        else:  # one user fewer: everything that follows from their number is another
            assert sampler.neighboring_relation == RELATION.ADD_OR_REMOVE_ONE
            fewer = PoissonSampler(sampler.population - 1, sampler.expected_cohort, 0)
            p = fewer.sampling_probability
            yield claimed, [*poisson_round(users, p, fewer.slots, other, "absent")]


def composed_delta(p, q, step, rounds, epsilon, points=2**18):
    """No more than the delta that `rounds` of density p against q need at epsilon."""
    losses, mass = np.log(p) - np.log(q), p * step
    spread = math.sqrt((mass * losses**2).sum())
    reach = 12 * spread * math.sqrt(rounds) + 2 * rounds * abs((mass * losses).sum()) + 3 * epsilon
    width = 2 * max(reach, 1.01 * np.abs(losses).max()) / points
    place = np.floor(losses / width).astype(int)
    histogram = np.bincount(place % points, mass, points)
    total = np.maximum(np.fft.irfft(np.fft.rfft(histogram) ** rounds, points), 0)
    values = np.fft.fftfreq(points, 1 / points) * width
    above = values > epsilon
    # What wraps around comes from losses far above: it is lost, never added.
    return float((total[above] * -np.expm1(epsilon - values[above])).sum())


def needed(pairs, z, rounds, epsilon):
    """The most delta that any of the pairs needs at epsilon, in either direction."""
    worst = 0.0
    for ours, theirs in pairs:
        means = [mean for _, mean in (*ours, *theirs)]
        grid = np.linspace(min(means) - 9 * z, max(means) + 9 * z, 4001)
        p, q = normals(ours, z, grid), normals(theirs, z, grid)
        step = grid[1] - grid[0]
        assert p.sum() * step == pytest.approx(1, abs=1e-9)
        for a, b in ((p, q), (q, p)):
            worst = max(worst, composed_delta(a, b, step, rounds, epsilon))
    return worst


# ---------------------------------------------------------------------------------- the sampling

CASES = {
    # sampler, z, rounds, whether the claim is tight within a tenth of epsilon
    "poisson": (PoissonSampler(12, 1, 0), 3.0, 400, True),
    "poisson, little noise": (PoissonSampler(30, 2, 0), 0.8, 20, True),
    "truncated": (PoissonSampler(6, 2, 0, slots=2), 4.0, 50, False),
    "hardly truncated": (PoissonSampler(8, 2, 0, slots=6), 4.0, 100, True),
    "cyclic": (PoissonSampler(13, 2, 0, cycle=2), 4.0, 200, True),
    "cyclic, truncated": (PoissonSampler(7, 1, 0, slots=1, cycle=2), 4.0, 100, False),
    "fixed size": (FixedSizeSampler(200, 2, 0), 1.5, 5, False),
}


@pytest.mark.parametrize("name", CASES)
def test_claims_hold_for_the_exact_densities(name):
    sampler, z, rounds, tight = CASES[name]
    claim = Mechanism(1.0, "global", z, sampler).epsilon(rounds, DELTA)
    turns = sampler.participations(rounds)
    pairs = [*compared(sampler)]
    assert needed(pairs, z, turns, claim.epsilon) <= DELTA
    assert needed(pairs, z, turns, claim.epsilon_rdp) <= DELTA
    if tight:  # a tenth less is too little
        assert needed(pairs, z, turns, 0.9 * claim.epsilon) > DELTA


class ClaimsMore(PoissonSampler):
    """Claims to hide how many users there are."""

    @property
    def neighboring_relation(self):
        return RELATION.ADD_OR_REMOVE_ONE


def by_pld(mechanism, rounds):
    """The claim, without the slower accountant."""
    relation = mechanism.sampler.neighboring_relation
    return accounting.pld_epsilon(mechanism.event(rounds), DELTA, relation)


def test_one_user_more_or_less_is_not_what_is_claimed():
    """The probability follows from the number of users and moves everybody else."""
    sampler, z, rounds, _ = CASES["poisson"]
    more = ClaimsMore(sampler.population, sampler.expected_cohort, 0)
    epsilon = by_pld(Mechanism(1.0, "global", z, more), rounds)
    assert needed(compared(more), z, rounds, epsilon) > 100 * DELTA


def test_truncation_is_not_accounted_for_as_plain_sampling():
    sampler, z, rounds, _ = CASES["truncated"]
    plain = dataclasses.replace(sampler, slots=sampler.population)
    epsilon = by_pld(Mechanism(1.0, "global", z, plain), rounds)
    assert needed(compared(sampler), z, rounds, epsilon) > 5 * DELTA


def test_fixed_size_counts_a_user_twice():
    sampler, z, rounds, _ = CASES["fixed size"]
    epsilon = Mechanism(1.0, "global", 2 * z, sampler).epsilon(rounds, DELTA).epsilon
    assert needed(compared(sampler), z, rounds, epsilon) > 10 * DELTA


# ------------------------------------------------------------------------------ correlated noise


def columns(correlation, rounds):
    """C of the noise C^-1 z that is really added, from the noise of unit vectors: [rounds] each."""
    inverse = correlation.inverse()
    step, state = jax.jit(inverse.multiply_next), inverse.init_multiply(jnp.zeros(rounds))
    rows = []
    for row in np.eye(rounds):
        added, state = step(jnp.asarray(row, jnp.float32), state)
        rows.append(np.asarray(added, np.float64))
    return np.linalg.inv(np.stack(rows)).T


def test_banded_noise_with_cyclic_sampling():
    """A user's turns touch disjoint rounds, so that each is a round of noise z over C's column."""
    sampler, z, rounds = PoissonSampler(12, 1, 0, cycle=4), 3.0, 24
    noise = BandedNoise(4, rounds)
    claim = by_pld(Mechanism(1.0, "global", z, sampler, correlation=noise), rounds)
    c = columns(noise, rounds)
    for turn in range(4):
        turns = c[turn::4]
        overlaps = turns @ turns.T
        norms = np.sqrt(np.diag(overlaps))
        assert np.abs(overlaps - np.diag(norms**2)).max() < 1e-5
        assert norms[:-1] == pytest.approx(norms[0], rel=1e-4)  # the last may be cut off
    pairs = [*compared(sampler)]
    longest = np.linalg.norm(c[0])
    assert needed(pairs, z / longest, rounds // 4, claim) <= DELTA
    assert needed(pairs, z / longest, rounds // 4, 0.9 * claim) > DELTA


def gaussian_delta(shift, epsilon):
    """Exact delta of a Gaussian that is moved by `shift` standard deviations."""
    return stats.norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * stats.norm.cdf(
        -shift / 2 - epsilon / shift
    )


@pytest.mark.parametrize("noise", [None, BandedNoise(5, 12), BufferedNoise(2, 12, 3, 4)])
def test_users_in_turn(noise):
    """Any signs of a user's turns, as they may be: the worst moves the rounds the furthest."""
    sampler, z, rounds = ShuffledSampler(6, 2, 0), 4.0, 12
    assert sampler.neighboring_relation == RELATION.REPLACE_SPECIAL
    claim = by_pld(Mechanism(1.0, "global", z, sampler, correlation=noise), rounds)
    c = np.eye(rounds) if noise is None else columns(noise, rounds)
    worst = 0.0
    for first in range(3):
        turns = c[first::3]
        for signs in itertools.product((-1, 1), repeat=len(turns)):
            worst = max(worst, float(np.linalg.norm(np.array(signs) @ turns)))
    assert gaussian_delta(worst / z, claim) <= DELTA
    assert gaussian_delta(worst / z, 0.9 * claim) > DELTA


# ------------------------------------------------------------------------------ local parameters


def remembered_delta(sampler, z, counted, used, epsilon):
    """Delta that an attack needs at epsilon on two users of whom one remembers its own turns.

    In the first `counted` rounds a user counts in its local parameters how often it took part; the
    other, who is hidden, sends -1 and displaces it where slots are few. In the `used` rounds after
    them it sends -1, too, if it counted few turns, else +1: then the sum tells.
    """
    q, both = sampler.sampling_probability, 0.5 if sampler.slots == 1 else 1.0
    alone, beside = q, q * (1 - q) + q**2 * both
    limit = round(counted * (alone + beside) / 2)

    def phase(hidden):
        few = stats.binom.cdf(limit - 1, counted, beside if hidden else alone)
        sums = 0.0
        for sign, chance in ((-1, few), (1, 1 - few)):
            law = np.zeros(5)  # of a round's sum, -2..2
            law[2] += (1 - q) * (1 - q) if hidden else 1 - q
            law[2 + sign] += q * (1 - q) if hidden else q
            if hidden:
                law[1] += q * (1 - q)
                for sent in (-1, sign) if sampler.slots == 1 else (sign - 1,):
                    law[2 + sent] += q**2 * both
            size = 1 << (4 * used + 1).bit_length()
            power = np.fft.irfft(np.fft.rfft(law, size) ** used, size)[: 4 * used + 1]
            sums = sums + chance * np.maximum(power, 0)
        return sums

    values = np.arange(-2 * used, 2 * used + 1)
    sd = z * math.sqrt(used)
    with_user, without = phase(True), phase(False)
    assert with_user.sum() == pytest.approx(1) and without.sum() == pytest.approx(1)
    worst = 0.0
    for cut in np.linspace(-4 * used, 0.8 * used, 81):
        below = stats.norm.cdf((cut - values) / sd)
        for p, q_ in ((with_user, without), (without, with_user)):
            for event in (below, 1 - below):
                worst = max(worst, (p * event).sum() - math.exp(epsilon) * (q_ * event).sum())
    return worst


@pytest.mark.parametrize(("slots", "safe"), [(None, True), (1, False)])
def test_default_slots_keep_local_parameters_from_telling(slots, safe):
    """Where nobody is displaced, nobody's memory depends on who else is there."""
    sampler = PoissonSampler(2, 1, 0, slots=slots)
    counted, used, z = 1600, 16_000, 120.0
    claim = by_pld(Mechanism(1.0, "global", z, sampler), counted + used)
    assert (sampler.overflow_probability == 0) == safe
    found = remembered_delta(sampler, z, counted, used, claim)
    assert (found <= DELTA) == safe
    if not safe:
        assert found > 30 * DELTA
