"""Buffered asynchrony: the schedule's bounds by brute force, rounds against plain NumPy."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedasr as fa
from fedasr.federated.algorithms import Facts, make_algorithm
from fedasr.federated.participation import Devices
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.sampling import AsynchronousSampler
from fedasr.training.builders import participations
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

USERS, BUFFER, RATE = 12, 3, 0.1
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(USERS, 2)).astype(np.float32)
CORPUS = fa.InMemoryCorpus({f"u{i:02d}": [{"x": x}] for i, x in enumerate(POINTS)})
START = {"w": np.ones(2, np.float32)}
TIMES = tuple(Devices.drawn(USERS, 0, 1.0, 1.0).seconds_per_step)


@given(
    population=st.integers(4, 40),
    size=st.integers(1, 5),
    more=st.integers(0, 12),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    jitter=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_no_user_takes_part_more_often_than_is_accounted(
    population, size, more, spread, jitter, seed
):
    if 2 * size + more > population:
        return
    times = tuple(Devices.drawn(population, seed, 1.0, spread).seconds_per_step)
    sampler = AsynchronousSampler(population, size, size + more, seed, times, jitter)
    rounds, turns, clock = 40, collections.defaultdict(list), 0.0
    for round in range(rounds):
        users, ages = sampler.cohort(round), sampler.staleness(round)
        assert len(users) == len(set(users)) == size and (users == np.sort(users)).all()
        assert ((ages >= 0) & (ages <= round)).all()
        assert sampler.clock(round) >= clock
        clock = sampler.clock(round)
        for user in users:
            turns[user].append(round)
        for user in turns:
            assert len(turns[user]) <= sampler.participations(round + 1)
    gaps = [b - a for mine in turns.values() for a, b in itertools.pairwise(mine)]
    assert not gaps or min(gaps) >= sampler.separation


@pytest.mark.parametrize(
    ("sizes", "rounds", "times"),
    [
        ((5, 2, 2), 6, (2, 2, 100, 0, 1)),
        ((6, 2, 3), 6, (0, 100, 100, 1, 2, 0)),
        ((7, 2, 2), 9, (1, 100, 0, 100, 2, 0, 0)),
        ((7, 2, 4), 14, (2, 0, 1, 2, 0, 0, 0)),
    ],
)
def test_some_user_takes_part_as_often_as_is_accounted(sizes, rounds, times):
    """So that no smaller bound would be true."""
    sampler = AsynchronousSampler(*sizes, 0, times)
    met = collections.Counter(int(u) for r in range(rounds) for u in sampler.cohort(r))
    assert max(met.values()) == sampler.participations(rounds) > 2


def test_times_vary_by_the_jitter():
    """One user at a time: the clock's steps are the times."""
    clocks = {}
    for jitter in (0.0, 0.5):
        sampler = AsynchronousSampler(USERS, 1, 1, 0, (2.0,) * USERS, jitter)
        clocks[jitter] = np.diff([0, *(sampler.clock(r) for r in range(400))])
    np.testing.assert_allclose(clocks[0.0], 2.0)
    found = np.log(clocks[0.5] / 2.0)
    assert abs(found.std() - 0.5) < 0.06 and abs(found.mean()) < 0.08
    assert abs(np.corrcoef(found[:-USERS], found[USERS:])[0, 1]) < 0.2  # a user's are not alike


def test_it_is_a_function_of_seed_and_round():
    one, other = (AsynchronousSampler(USERS, BUFFER, 5, 7, TIMES, jitter=0.5) for _ in range(2))
    backwards = {r: other.cohort(r).tolist() for r in reversed(range(10))}
    assert [one.cohort(r).tolist() for r in range(10)] == [backwards[r] for r in range(10)]
    assert one.reseeded(8).cohort(3).tolist() != one.cohort(3).tolist() or (
        one.reseeded(8).cohort(4).tolist() != one.cohort(4).tolist()
    )


def test_times_of_devices_from_a_file(tmp_path):
    """Of all users as many steps as the configuration says; devices that are away are refused."""
    config = default_config()
    config.participation.update(enabled=True, trace=str(tmp_path / "devices.csv"))
    config.client.update(steps=3)
    config = Config.of(to_json(config.to_dict()))
    rows = [f"u{i:02d},{i},10" for i in range(USERS)]
    head = "user,seconds_per_step,transfer_seconds"
    (tmp_path / "devices.csv").write_text("\n".join([head, *rows]))
    sampler = AsynchronousSampler(USERS, BUFFER, 6, 0)
    found = participations.with_times(config, sampler, CORPUS.users)
    assert found.times == tuple(10.0 + 3 * i for i in range(USERS))
    rows[0] += ",8"
    (tmp_path / "devices.csv").write_text("\n".join([f"{head},from_hour", *rows]))
    with pytest.raises(fa.UserError, match="from_hour and to_hour are of rounds"):
        participations.with_times(config, sampler, CORPUS.users)


def squares(params, batch, key):
    return 0.5 * ((params["w"] - batch["x"][0]) ** 2).sum(), {}


UPDATE = fa.local_training(squares, optax.sgd(RATE), grad_clip=None)


def make(sampler, name="fedbuff", clip=np.inf, noise=0.0, adaptive=None, **options):
    return fa.Simulation(
        CORPUS,
        fa.Mechanism(clip, "global", noise, sampler, adaptive=adaptive),
        make_algorithm(name, UPDATE, optax.sgd(0.9), Facts(0.25, 1.0), options),
        fa.Batching(1, steps=2),
        hardware=fa.Hardware(jax.devices()[:1]),
    )


def trained(sim, rounds, state=None):
    *_, (state, metrics) = sim.run(sim.init(START) if state is None else state, rounds)
    return state, metrics


@pytest.mark.parametrize("versions", [16, 3])
def test_as_by_hand(versions):
    sampler = AsynchronousSampler(USERS, BUFFER, 6, 0, TIMES)
    sim = make(sampler, versions=versions)
    state = sim.init(START)
    sampler = sim.draws(state).sampler
    models, late, oldest = [np.float64(START["w"])], 0, 0
    for round in range(20):
        total = np.zeros(2)
        for user, age in zip(sampler.cohort(round), sampler.staleness(round), strict=True):
            oldest = max(oldest, age)
            if age >= versions:
                late += 1
                continue
            start = models[-1 - age]
            delta = (start - POINTS[user]) * (1 - (1 - RATE) ** 2)
            total += delta / np.sqrt(1 + age)
        models.append(models[-1] - 0.9 * total / BUFFER)
    state, metrics = trained(sim, 20, state)
    np.testing.assert_allclose(state.params["w"], models[-1], rtol=1e-5, atol=1e-6)
    assert oldest >= 3 and (late > 0) == (versions == 3)
    assert metrics.turnout.drawn == BUFFER and metrics.turnout.seconds > 0


def test_without_delays_it_is_federated_averaging():
    """As many at a time as make a round, all as fast: the users in turn."""
    buffered = make(AsynchronousSampler(USERS, BUFFER, BUFFER, 0))
    plain = make(fa.ShuffledSampler(USERS, BUFFER, 0), "federated")
    states = [sim.init(START) for sim in (buffered, plain)]
    root = np.asarray(states[0].root)
    states[1] = plain.transfer(states[1]._replace(root=root))
    found = [trained(sim, 8, s)[0] for sim, s in zip((buffered, plain), states, strict=True)]
    np.testing.assert_array_equal(found[0].params["w"], found[1].params["w"])


def test_a_run_goes_on_to_the_same_bits():
    """Earlier models, too, are in its state."""
    sampler = AsynchronousSampler(USERS, BUFFER, 6, 0, TIMES)
    whole, _ = trained(make(sampler), 9)
    half, _ = trained(make(sampler), 4)
    sim = make(sampler)
    again, _ = trained(sim, 5, sim.transfer(jax.device_get(half)))
    for one, other in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_while_bounds_warm_up_the_earlier_models_are_the_first_one():
    adaptive = AdaptiveClip(0.0, warmup=4)
    sim = make(AsynchronousSampler(USERS, BUFFER, 6, 0, TIMES), clip=1.0, adaptive=adaptive)
    state, _ = trained(sim, 4)
    np.testing.assert_array_equal(sim._view(state, 1).params["w"], START["w"])
    after, _ = trained(sim, 2, state)
    assert np.abs(sim._view(after, 1).params["w"] - START["w"]).max() > 1e-3
    np.testing.assert_array_equal(sim._view(after, 2).params["w"], START["w"])


def test_old_updates_count_less_than_the_clip_norm():
    sim = make(AsynchronousSampler(USERS, BUFFER, 6, 0, TIMES), clip=0.01, power=2.0)
    sums = []
    total = sim._cohort.total

    def watched(accumulator):
        found = total(accumulator)
        sums.append(float(np.linalg.norm(found.delta["w"])))
        return found

    sim._cohort = sim._cohort._replace(total=watched)
    trained(sim, 6)
    assert 0 < max(sums) <= BUFFER * 0.01 * (1 + 1e-6)
    assert min(sums) < 0.5 * BUFFER * 0.01


def test_a_discount_is_at_most_one():
    """Whatever an algorithm says: a user moves the sum by no more than the clip norm."""
    algorithm = make_algorithm("fedbuff", UPDATE, optax.sgd(0.9), Facts(0.25, 1.0), {})
    more = dataclasses.replace(algorithm.extras, discount=lambda age: 5.0)
    mechanism = fa.Mechanism(1e-3, "global", 0.0, AsynchronousSampler(USERS, BUFFER, 6, 0, TIMES))
    sim = fa.Simulation(
        CORPUS,
        mechanism,
        dataclasses.replace(algorithm, extras=more),
        fa.Batching(1, steps=2),
        hardware=fa.Hardware(jax.devices()[:1]),
    )
    state, _ = trained(sim, 1)
    assert 0 < np.linalg.norm(state.params["w"] - START["w"]) <= 0.9 * 1e-3 * (1 + 1e-3)


def test_it_is_accounted_by_participations():
    sampler = AsynchronousSampler(1000, 10, 20, 0)
    mechanism = fa.Mechanism(1.0, "global", 4.0, sampler)
    assert sampler.participations(100) == 2 and not sampler.amplifies
    same = fa.Mechanism(1.0, "global", 4.0, fa.ShuffledSampler(500, 10, 0))
    assert same.sampler.participations(100) == 2
    assert mechanism.event(100) == same.event(100)
    deployed = mechanism.deployed(1000, 1_000_000)
    assert deployed.sampler.concurrency == 2000 and deployed.sampler.participations(100) == 1
    state, _ = trained(make(AsynchronousSampler(USERS, 3, 6, 0, TIMES), clip=1.0, noise=1.0), 3)
    assert np.isfinite(state.params["w"]).all()


def test_what_is_refused():
    with pytest.raises(
        fa.UserError, match="need a sampler that bounds every user's participations"
    ):
        make(fa.PoissonSampler(USERS, 3, 0))
    with pytest.raises(fa.UserError, match="updates of any age, such as 'fedbuff'"):
        make(AsynchronousSampler(USERS, 3, 3, 0), "federated")
    for options, message in [({"versions": 0}, "versions=0"), ({"power": -1.0}, "power=-1.0")]:
        with pytest.raises(fa.UserError, match=message):
            make(AsynchronousSampler(USERS, 3, 3, 0), **options)
    for args, message in [
        ((12, 3, 2, 0), "concurrency must be a whole number of users, at least the 3"),
        ((12, 3, 10, 0), "more than the population of 12"),
        ((12, 3, 3, 0, (1.0,)), "times must be of 12 users"),
        ((12, 3, 3, 0, (-1.0,) * 12), "numbers from 0"),
    ]:
        with pytest.raises(fa.UserError, match=message):
            AsynchronousSampler(*args)
