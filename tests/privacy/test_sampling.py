import dataclasses
import itertools
import math
import time

import dp_accounting
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedasr.errors import UserError
from fedasr.privacy.sampling import (
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    ShuffledSampler,
    SilentSampler,
)

SAMPLERS = [PoissonSampler(50, 10, seed=3), FixedSizeSampler(50, 10, seed=3)]


@settings(deadline=None, max_examples=60)
@given(
    population=st.integers(1, 500),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 10**6),
)
def test_cohorts_are_valid_and_pure(population, share, seed, round):
    expected = max(population * share, 1e-3)
    for make in (
        lambda: PoissonSampler(population, min(expected, population), seed),
        lambda: FixedSizeSampler(population, math.ceil(population * share), seed),
    ):
        sampler = make()
        cohort = sampler.cohort(round)
        assert cohort.dtype == np.int64
        assert np.all(np.diff(cohort) > 0)  # sorted, nobody twice
        assert len(cohort) <= sampler.slots <= population
        assert cohort.size == 0 or (cohort[0] >= 0 and cohort[-1] < population)
        make().cohort(round + 1)  # what else was asked for makes no difference
        np.testing.assert_array_equal(make().cohort(round), cohort)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rounds_and_seeds_differ(sampler):
    rounds = {tuple(sampler.cohort(r)) for r in range(200)}
    assert len(rounds) == 200
    other = type(sampler)(50, 10, seed=4)
    assert all(tuple(other.cohort(r)) not in rounds for r in range(50))
    assert isinstance(sampler, Sampler)
    assert sampler.expected_cohort == 10


@pytest.mark.parametrize("make", [PoissonSampler, FixedSizeSampler])
def test_no_round_has_the_cohort_of_another(make):
    """Nor one of another seed: not of seed + round, nor after 256, 1000 or 65536 rounds."""
    sampler = make(400, 40, seed=5)
    powers = [b**k + i for b in (2, 10) for k in range(1, 40) for i in range(-1, 2)]
    rounds = sorted({*range(1500), *(n for n in powers if n >= 0)})
    assert len({tuple(sampler.cohort(r)) for r in rounds}) == len(rounds)
    table = {tuple(make(400, 40, s).cohort(r)) for s in range(12) for r in range(12)}
    assert len(table) == 144


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_everybody_is_equally_likely(sampler):
    rounds = 4000
    counts = np.zeros(50)
    for r in range(rounds):
        counts[sampler.cohort(r)] += 1
    sd = math.sqrt(rounds * 0.2 * 0.8)
    assert np.abs(counts - 0.2 * rounds).max() < 5 * sd
    # Chi-squared over users; a fixed-size cohort leaves 49 degrees of freedom, scaled by 50/49.
    statistic = np.sum((counts - 0.2 * rounds) ** 2) / sd**2
    assert 1e-4 < stats.chi2.sf(statistic, 50) < 1 - 1e-4


def test_poisson_users_are_independent_of_each_other():
    sampler = PoissonSampler(20, 10, seed=0)
    rows = np.zeros((4000, 20))
    for r in range(4000):
        rows[r, sampler.cohort(r)] = 1
    sizes = rows.sum(1)
    assert abs(sizes.mean() - 10) < 5 * math.sqrt(5 / 4000)
    assert abs(sizes.var() / 5 - 1) < 0.15  # binomial, not constant
    correlations = np.corrcoef(rows.T)[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(4000)
    assert abs(correlations.mean()) < 5 / math.sqrt(4000 * 190)


def test_fixed_size_is_fixed():
    assert {len(SAMPLERS[1].cohort(r)) for r in range(50)} == {10}


def test_overfull_rounds_are_truncated_uniformly():
    sampler = PoissonSampler(40, 20, seed=1, slots=21)
    cohorts = [sampler.cohort(r) for r in range(4000)]
    full = [c for c in cohorts if len(c) == 21]
    # P(Bin(40, 1/2) >= 21) = 0.437: many rounds are cut, none is longer than the slots.
    assert abs(len(full) / 4000 - stats.binom.sf(20, 40, 0.5)) < 0.04
    assert max(map(len, cohorts)) == 21
    counts = np.bincount(np.concatenate(full), minlength=40)
    mean = len(full) * 21 / 40
    sd = math.sqrt(len(full) * 21 / 40 * 19 / 40)
    assert np.abs(counts - mean).max() < 5 * sd


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**7), st.floats(1e-9, 1), st.integers(1, 9))
@example(29101, 1.0, 7)
def test_default_slots_are_the_fewest_that_are_hardly_ever_full(population, share, cycle):
    cycle = min(cycle, population)
    sampler = PoissonSampler(population, max(share * population / cycle, 1e-9), 0, cycle=cycle)
    others, q = -(-population // cycle) - 1, sampler.sampling_probability
    assert stats.binom.sf(sampler.slots - 1, others, q) <= 1.0001e-18
    # One fewer would be full more often, or could not hold the expected cohort.
    fewer = sampler.slots - 1
    assert stats.binom.sf(fewer - 1, others, q) > 0.9999e-18 or fewer < 1
    assert sampler.overflow_probability <= 1.0001e-18


def test_default_slots_leave_room():
    assert PoissonSampler(1000, 1, seed=0).slots == 20
    assert PoissonSampler(12, 10, seed=0).slots == 12
    assert PoissonSampler(1, 1, seed=0).slots == 1
    everyone = PoissonSampler(12, 12, seed=0)
    assert everyone.overflow_probability == 0
    np.testing.assert_array_equal(everyone.cohort(5), np.arange(12))


@pytest.mark.parametrize("make", [PoissonSampler, FixedSizeSampler])
def test_a_million_users_are_quick(make):
    sampler = make(10**6, 1024, seed=0)
    times = []
    for r in range(5):
        start = time.perf_counter()
        sampler.cohort(r)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_events_state_the_sampling():
    poisson = PoissonSampler(1000, 50, seed=0, slots=70)
    assert poisson.event(1.5) == dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=1000,
        sampling_probability=0.05,
        truncated_batch_size=70,
        noise_multiplier=1.5,
    )
    fixed = FixedSizeSampler(1000, 50, seed=0)
    assert fixed.event(1.5) == dp_accounting.SampledWithoutReplacementDpEvent(
        1000,
        50,
        dp_accounting.GaussianDpEvent(0.75),  # replacing a user moves the sum by 2C
    )
    relation = dp_accounting.NeighboringRelation
    # What follows from the number of users (probability, slots, groups) is the same for both.
    assert poisson.neighboring_relation == relation.REPLACE_SPECIAL
    assert "by nothing" in poisson.neighbours and "number of users is public" in poisson.neighbours
    assert fixed.neighboring_relation == relation.REPLACE_ONE
    for sampler in (poisson, fixed):
        assert sampler.event(0.0) == dp_accounting.NonPrivateDpEvent()
        with pytest.raises(UserError, match="noise_multiplier"):
            sampler.event(-1.0)
    assert "70" in poisson.description and "without replacement" in fixed.description


@settings(deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 5), st.integers(0, 40))
def test_shuffled_users_take_turns_as_far_apart_as_stated(population, data, seed, rounds):
    cohort = data.draw(st.integers(1, population))
    sampler = ShuffledSampler(population, cohort, seed)
    turns = {user: [] for user in range(population)}
    for round in range(rounds):
        users = sampler.cohort(round).tolist()
        assert users == sorted(set(users)) and len(users) == cohort == sampler.slots
        for user in users:
            turns[user].append(round)
    assert max(map(len, turns.values())) == sampler.participations(rounds)
    assert max(map(len, turns.values())) - min(map(len, turns.values())) <= 1
    gaps = [b - a for rounds in turns.values() for a, b in itertools.pairwise(rounds)]
    assert min(gaps, default=sampler.separation) >= sampler.separation
    if rounds > 2 * (population // cohort + 1):
        assert min(gaps) == sampler.separation  # no more is claimed than is needed


@pytest.mark.parametrize("cycle", [1, 3])
def test_overflow_is_as_probable_as_stated(cycle):
    sampler = PoissonSampler(31, 4, seed=1, slots=5, cycle=cycle)
    unlimited = dataclasses.replace(sampler, slots=31)
    rounds = range(0, 6000 * cycle, cycle)  # of the first group, the largest
    over = np.mean([len(unlimited.cohort(r)) > 5 for r in rounds])
    p = sampler.overflow_probability
    assert abs(over - p) < 5 * math.sqrt(p * (1 - p) / len(rounds))
    for certain in (FixedSizeSampler(9, 3, 0), ShuffledSampler(9, 3, 0)):
        assert certain.overflow_probability == 0


def test_silent_users_leave_the_sampling_as_it_is():
    """Nothing but the cohort may follow from who has something to send."""
    everybody = PoissonSampler(30, 6, seed=2, slots=7, cycle=2)
    silent = SilentSampler(everybody, (1, 4, 5, 29))
    for round in range(50):
        expected = [u for u in everybody.cohort(round).tolist() if u in (1, 4, 5, 29)]
        assert silent.cohort(round).tolist() == expected
    for name in Sampler.__annotations__ | {
        k: None for k, v in vars(Sampler).items() if isinstance(v, property)
    }:
        assert getattr(silent, name) == getattr(everybody, name), name
    assert isinstance(silent, Sampler)
    assert silent.event(2.0) == everybody.event(2.0)
    assert silent.participations(9) == everybody.participations(9)
    assert silent.deployed(10, 1000) == everybody.deployed(10, 1000)
    assert SilentSampler(everybody, ()).cohort(0).tolist() == []
    for bad in ((-1,), (3, 3), (5, 4), (30,)):
        with pytest.raises(UserError, match="ascending"):
            SilentSampler(everybody, bad)


def test_shuffled_order_is_the_seeds_and_everyone_is_everyone():
    orders = [
        np.concatenate([ShuffledSampler(40, 4, seed=s).cohort(r) for r in range(10)]).tolist()
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(40)) != orders[0]
    everyone = ShuffledSampler(7, 7, seed=3)
    assert everyone.cohort(5).tolist() == list(range(7))
    assert everyone.separation == 1 and everyone.participations(5) == 5
    assert everyone.description == "everyone in every round"


def test_cyclic_poisson_samples_each_user_in_its_own_turn_only():
    sampler = PoissonSampler(50, 6, seed=0, cycle=4)  # 50 users in groups of 12 and 13
    rounds = 4000
    seen = np.zeros((4, 50), int)
    for round in range(rounds):
        users = sampler.cohort(round)
        assert len(set(users.tolist())) == len(users)
        seen[round % 4, users] += 1
    groups = (seen > 0).sum(axis=0)
    assert groups.tolist() == [1] * 50  # everybody in exactly one of the groups
    assert sorted((seen > 0).sum(axis=1).tolist()) == [12, 12, 13, 13]
    q = sampler.sampling_probability
    assert q == 6 * 4 / 50
    opportunities = rounds / 4
    frequencies = seen.sum(axis=0) / opportunities
    assert np.abs(frequencies - q).max() < 5 * math.sqrt(q * (1 - q) / opportunities)
    assert sampler.separation == 4
    assert [sampler.participations(t) for t in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert sampler.event(1.5).dataset_size == 13
    assert sampler.event(1.5).sampling_probability == q
    plain = PoissonSampler(50, 6, seed=0)
    assert plain.separation == 1 and plain.participations(9) == 9


def test_deployments_keep_the_kind_of_sampling():
    assert PoissonSampler(50, 6, 1, cycle=4).deployed(100, 10**4) == PoissonSampler(
        10**4, 100, 0, cycle=4
    )
    assert ShuffledSampler(50, 6, 1).deployed(100, 10**4) == ShuffledSampler(10**4, 100, 0)
    assert FixedSizeSampler(50, 6, 1).deployed(100, 10**4) == PoissonSampler(10**4, 100, 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PoissonSampler(0, 1, seed=0), "population"),
        (lambda: PoissonSampler(2.5, 1, seed=0), "population"),
        (lambda: PoissonSampler(10, 11, seed=0), "expected_cohort"),
        (lambda: PoissonSampler(10, 0, seed=0), "expected_cohort"),
        (lambda: PoissonSampler(10, math.nan, seed=0), "expected_cohort"),
        (lambda: PoissonSampler(10, 5, seed=-1), "seed"),
        (lambda: PoissonSampler(10, 5, seed=0, slots=4), "slots"),
        (lambda: PoissonSampler(10, 5, seed=0, cycle=3), "3 groups"),
        (lambda: PoissonSampler(10, 1, seed=0, cycle=0), "cycle"),
        (lambda: PoissonSampler(10, 1, seed=0, cycle=1.5), "cycle"),
        (lambda: ShuffledSampler(10, 11, seed=0), "cohort_size"),
        (lambda: ShuffledSampler(10, 0, seed=0), "cohort_size"),
        (lambda: ShuffledSampler(10, 2, seed=0).cohort(-1), "round"),
        (lambda: FixedSizeSampler(10, 11, seed=0), "cohort_size"),
        (lambda: FixedSizeSampler(10, 0, seed=0), "cohort_size"),
        (lambda: FixedSizeSampler(10, 2.5, seed=0), "cohort_size"),
        (lambda: FixedSizeSampler(10, 5, seed=0).cohort(-1), "round"),
    ],
)
def test_mistakes_are_user_errors(make, match):
    with pytest.raises(UserError, match=match):
        make()
