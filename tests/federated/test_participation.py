"""Who gets an update back, and when: rules by hand, and what the server makes of it."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

import fedasr as fa
from fedasr.federated.algorithms import Facts, make_algorithm, memory_layout
from fedasr.federated.participation import Devices, Participation
from fedasr.privacy.sampling import AsynchronousSampler

USERS, COHORT, RATE = 40, 10, 0.1
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(USERS, 2)).astype(np.float32)
CORPUS = fa.InMemoryCorpus(
    {f"u{i:02d}": [{"x": x}] * (1 + i % 3) for i, x in enumerate(POINTS)}  # 1 to 3 steps
)
STEPS = np.array([1 + i % 3 for i in range(USERS)])
START = {"w": np.zeros(2, np.float32)}
SAMPLER = fa.FixedSizeSampler(USERS, COHORT, seed=0)
ONE = fa.Hardware(jax.devices()[:1])


def squares(params, batch, key):
    return 0.5 * ((params["w"] - batch["x"][0]) ** 2).sum(), {}


UPDATE = fa.local_training(squares, optax.sgd(RATE), grad_clip=None)
EVERYBODY = list(range(USERS))


def rules(spread=0.0, seconds=1.0, transfer=0.0, **options):
    return Participation(Devices.drawn(USERS, 3, seconds, spread, transfer), seed=3, **options)


def simulation(
    participation, name="federated", folder=None, clip=np.inf, noise=0.0, sampler=SAMPLER
):
    layout = memory_layout(name, START)
    store = None if layout is None else fa.LocalStore(folder, layout, USERS)
    return fa.Simulation(
        CORPUS,
        fa.Mechanism(clip, "global", noise, sampler),
        dataclasses.replace(
            make_algorithm(name, UPDATE, optax.sgd(1.0), Facts(0.25, 1.0), {}, store=store),
            participation=participation,
        ),
        fa.Batching(1, epochs=1),
        hardware=ONE,
    )


def by_hand(x, users):
    return sum(((x - POINTS[u]) * (1 - (1 - RATE) ** STEPS[u]) for u in users), np.zeros(2))


def test_the_server_divides_by_the_expected_cohort_whoever_is_missing():
    found = rules(spread=0.5, dropout_before=0.3, dropout_after=0.2, available=0.8, deadline=2.5)
    sim = simulation(found)
    state = sim.init(START)
    sampler = sim.draws(state).sampler
    x, missing = np.zeros(2), 0
    for round, (after, metrics) in enumerate(sim.run(state, 6)):
        cohort = sampler.cohort(round)
        turnout = found.turnout(round, cohort, STEPS[cohort])
        x = x - by_hand(x, turnout.arrived) / COHORT
        np.testing.assert_allclose(after.params["w"], x, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(metrics.turnout.arrived, turnout.arrived)
        assert metrics.clients == len(turnout.arrived)
        assert (
            metrics.turnout.drawn
            == COHORT
            == (len(turnout.arrived) + turnout.unavailable + turnout.dropped + turnout.late)
        )
        missing += COHORT - len(turnout.arrived)
    assert missing > 10


def test_epsilon_is_that_of_the_users_drawn():
    sampler = fa.PoissonSampler(USERS, COHORT, seed=0)
    events = [
        simulation(found, clip=1.0, noise=1.0, sampler=sampler).mechanism.event(5)
        for found in (None, rules(dropout_before=0.9))
    ]
    assert events[0] == events[1]


def test_it_is_a_function_of_seed_round_and_user():
    """So whom else the round asks makes no difference, and nor does what came before."""
    found = rules(
        spread=0.5, dropout_before=0.3, available=0.7, diurnal=0.3, jitter=0.3, deadline=2
    )
    together = found.turnout(7, EVERYBODY, STEPS)
    for user in EVERYBODY:
        alone = found.turnout(7, [user], STEPS[[user]])
        assert (user in together.arrived) == (user in alone.arrived)
    again = rules(
        spread=0.5, dropout_before=0.3, available=0.7, diurnal=0.3, jitter=0.3, deadline=2
    )
    np.testing.assert_array_equal(again.turnout(7, EVERYBODY, STEPS).arrived, together.arrived)
    assert set(found.turnout(8, EVERYBODY, STEPS).arrived) != set(together.arrived)


def test_shares_and_times():
    times = np.array([rules(spread=0.7, transfer=2.0).seconds(0, u, 3) for u in range(USERS)])
    own = Devices.drawn(USERS, 3, 1.0, 0.7, 2.0)
    np.testing.assert_allclose(times, own.transfer + 3 * own.seconds_per_step)
    many = Devices.drawn(20_000, 0, 2.0, 0.7)
    assert abs(np.log(many.seconds_per_step).std() - 0.7) < 0.02
    assert abs(np.median(many.seconds_per_step) - 2.0) < 0.05
    one = rules(jitter=0.5)
    jitter = np.log([[one.seconds(r, u, 1) for u in EVERYBODY] for r in range(10)])
    assert abs(jitter.std() - 0.5) < 0.06 and jitter.std(0).min() > 0.1 < jitter.std(1).min()
    found = rules(dropout_before=0.2, dropout_after=0.5, available=0.6)
    turnouts = [found.turnout(r, EVERYBODY, STEPS) for r in range(60)]
    drawn = 60 * USERS
    assert abs(sum(t.unavailable for t in turnouts) / drawn - 0.4) < 0.04
    there = drawn - sum(t.unavailable for t in turnouts)
    assert abs(sum(t.dropped for t in turnouts) / there - 0.6) < 0.05
    assert abs(sum(len(t.lost) for t in turnouts) / there - 0.8 * 0.5) < 0.05


def test_the_time_of_a_round():
    slow = rules(spread=1.0)
    times = sorted(slow.seconds(0, u, int(STEPS[u])) for u in EVERYBODY)
    assert slow.turnout(0, EVERYBODY, STEPS).seconds == times[-1]
    limit = times[20] + 1e-9
    late = rules(spread=1.0, deadline=limit).turnout(0, EVERYBODY, STEPS)
    assert (len(late.arrived), late.late, late.seconds) == (21, USERS - 21, limit)
    first = rules(spread=1.0, first=5).turnout(0, EVERYBODY, STEPS)
    assert (len(first.arrived), first.late, first.seconds) == (5, USERS - 5, times[4])
    nobody = rules(available=0.0, deadline=3.0).turnout(0, EVERYBODY, STEPS)
    assert (len(nobody.arrived), nobody.unavailable, nobody.seconds) == (0, USERS, 3.0)


def test_most_are_there_at_night():
    found = rules(available=0.5, diurnal=0.4, round_hours=1.0)
    hours = np.array([
        [sum(found.is_there(24 * day + h, u) for u in EVERYBODY) for h in range(24)]
        for day in range(10)
    ]).mean(0) / USERS  # fmt: skip
    assert hours[2] > 0.75 and hours[14] < 0.25


def test_devices_from_a_file(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("user,seconds_per_step,from_hour,to_hour,more\nb,2,22,6,x\na,0.5,,,\n")
    devices = Devices.read(path, ["a", "b"])
    np.testing.assert_array_equal(devices.seconds_per_step, [0.5, 2.0])
    found = Participation(devices, round_hours=1.0)
    assert [found.is_there(hour, 0) for hour in (0, 12, 23)] == [True] * 3
    assert [found.is_there(hour, 1) for hour in (0, 5, 6, 21, 22, 46)] == [1, 1, 0, 0, 1, 1]
    for text, message in [
        ("user\na\n", "no column 'seconds_per_step'"),
        ("user,seconds_per_step\na,fast\n", "line 2: seconds_per_step='fast' must be a number"),
        ("user,seconds_per_step\na,-1\n", "must be a number from 0"),
        ("user,seconds_per_step\na,nan\n", "must be a number from 0"),
        ("user,seconds_per_step,to_hour\na,1,25\n", "to_hour='25' must be a number from 0 to 24"),
        ("user,seconds_per_step\na,1\na,1\n", "'a' has two rows"),
        ("user,seconds_per_step\na,1\n", "no row of user 'b'"),
    ]:
        path.write_text(text)
        with pytest.raises(fa.UserError, match=message) as caught:
            Devices.read(path, ["a", "b"])
        assert "\n" not in str(caught.value)
    with pytest.raises(fa.UserError, match="cannot read the devices"):
        Devices.read(tmp_path / "none.csv", ["a"])


def test_who_loses_an_update_remembers_it_all_the_same(tmp_path):
    """Control variates move with training; the server's, with updates that arrive."""
    losing = rules(dropout_after=1.0)
    sim = simulation(losing, "scaffold", tmp_path)
    state = sim.init(START)
    cohort = sim.draws(state).sampler.cohort(0)
    ((after, metrics),) = sim.run(state, 1)
    np.testing.assert_array_equal(after.params["w"], 0)
    assert np.flatnonzero(sim.store.known).tolist() == cohort.tolist()
    assert len(metrics.turnout.lost) == COHORT
    assert metrics.clients == 0 and not len(metrics.norms)  # nobody votes on bounds, either
    rows = sim.store.gather(cohort, np.zeros(2, np.float32))
    assert np.abs(rows).sum(1).min() > 0
    leaving = simulation(rules(dropout_before=1.0), "scaffold", tmp_path / "before")
    ((_, metrics),) = leaving.run(leaving.init(START), 1)
    assert not leaving.store.known.any() and metrics.clients == 0 and math.isnan(metrics.loss)


def test_a_run_goes_on_to_the_same_bits():
    found = rules(spread=0.5, dropout_before=0.3, available=0.8, deadline=2.5)
    sim = simulation(found)
    *_, (whole, _) = sim.run(sim.init(START), 4)
    *_, (half, _) = sim.run(sim.init(START), 2)
    again = simulation(found)
    *_, (other, _) = again.run(again.transfer(jax.device_get(half)), 2)
    np.testing.assert_array_equal(whole.params["w"], other.params["w"])


def test_what_is_refused():
    with pytest.raises(fa.UserError, match=r"participation\.first has users displace each other"):
        simulation(rules(first=3), clip=1.0, noise=1.0)
    with pytest.raises(fa.UserError, match="devices of 3 users, the corpus has 40"):
        simulation(Participation(Devices.drawn(3, 0)))
    with pytest.raises(fa.UserError, match="participation is of rounds"):
        simulation(rules(), "fedbuff", sampler=AsynchronousSampler(USERS, COHORT, COHORT, 0))
    secure = fa.SecureAggregation(2, 16)
    mechanism = fa.Mechanism(1.0, "global", 1.0, fa.PoissonSampler(USERS, COHORT, 0), secure=secure)
    with pytest.raises(fa.UserError, match="noise in shares is missing where users drop out"):
        algorithm = fa.FedAvg(UPDATE, optax.sgd(1.0), participation=rules())
        fa.Simulation(CORPUS, mechanism, algorithm, fa.Batching(1, epochs=1))
    for options in ({"available": 1.5}, {"dropout_before": -0.1}, {"deadline": -1}):
        with pytest.raises(fa.UserError, match=rf"participation\.{next(iter(options))}="):
            rules(**options)
