"""The ledger: events as data, who is charged for what, totals equal to dp-accounting's by hand."""

import json
import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import pld

from fedasr.errors import UserError
from fedasr.privacy import ledger
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.correlated import BandedNoise
from fedasr.privacy.ledger import UNKNOWN_USERS, Entry, Users
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

ZERO_OUT = dp.NeighboringRelation.REPLACE_SPECIAL
A, B, C = (Users.of([f"u{i}" for i in span]) for span in (range(10), range(5, 15), range(20, 30)))


def gaussian(z):
    return dp.GaussianDpEvent(z)


def entry(name, z, users, rounds=1, **more):
    event = dp.SelfComposedDpEvent(gaussian(z), rounds)
    return Entry(name, "rounds", rounds, event, "REPLACE_SPECIAL", "", users, **more)


def by_hand(*multipliers, delta=1e-6):
    account = pld.PLDAccountant(ZERO_OUT, 1e-4)
    for z in multipliers:
        account.compose(gaussian(z))
    return account.get_epsilon(delta)


@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism(1.0, "global", 2.0, PoissonSampler(100, 5, 0)),
        Mechanism(1.0, "global", 2.0, PoissonSampler(100, 5, 0, cycle=4)),
        Mechanism(1.0, "global", 2.0, FixedSizeSampler(100, 5, 0)),
        Mechanism(1.0, "global", 2.0, ShuffledSampler(20, 5, 0), correlation=BandedNoise(3, 12)),
        Mechanism(
            1.0, "global", 2.0, PoissonSampler(9, 3, 0), adaptive=AdaptiveClip(9.0), released=(4.0,)
        ),
        Mechanism(1.0, "global", 0.0, PoissonSampler(100, 5, 0)),
    ],
)
def test_entries_survive_json(mechanism):
    one = ledger.of_mechanism("run", mechanism, 12, A, [(10.0, 1000)])
    data = json.loads(json.dumps(ledger.to_data([one]), allow_nan=False))
    (read,) = ledger.from_data(data)
    assert read.event == one.event == mechanism.event(12)
    assert read.deployed == one.deployed and read.deployed[0][0] == (10.0, 1000)
    assert (read.users.hashes == A.hashes).all() and read.users.digest == A.digest
    assert ledger.total([read], 1e-6).epsilon == pytest.approx(mechanism.epsilon(12, 1e-6).epsilon)


def test_chain_of_three_runs_is_charged_as_by_hand():
    """Users 5-9 are in both of the first runs; the third has others, and all of the first."""
    first, second = entry("a", 3.0, A), entry("b", 2.0, B)
    third = entry("c", 4.0, Users.of([f"u{i}" for i in (*range(10), 99)]))
    assert ledger.total([first], 1e-6).epsilon == pytest.approx(by_hand(3.0), rel=2e-3)
    two = ledger.total([first, second], 1e-6)
    assert two.epsilon == pytest.approx(by_hand(3.0, 2.0), rel=2e-3)
    assert two.shared == 5 and two.assumed == ()
    three = ledger.total([first, second, third], 1e-6)
    assert three.epsilon == pytest.approx(by_hand(3.0, 2.0, 4.0), rel=2e-3)
    assert three.shared == 10


def test_users_who_are_not_shared_are_not_charged_twice():
    apart = ledger.total([entry("a", 1.0, C), entry("b", 2.0, A)], 1e-6)
    assert apart.epsilon == pytest.approx(by_hand(2.0), rel=2e-3) and apart.shared == 0
    # Nobody is in both earlier runs: the worse of the two counts.
    sets = ledger.total([entry("a", 1.0, Users.of(["u0"])), entry("b", 5.0, Users.of(["u1"])),
                         entry("c", 2.0, A)], 1e-6)  # fmt: skip
    assert sets.epsilon == pytest.approx(by_hand(1.0, 2.0), rel=2e-3)


def test_unknown_users_are_the_worst_case(monkeypatch):
    unknown = ledger.total([entry("a", 3.0, UNKNOWN_USERS), entry("b", 2.0, A)], 1e-6)
    assert unknown.epsilon == pytest.approx(by_hand(3.0, 2.0), rel=2e-3)
    assert unknown.assumed == ("a",) and unknown.shared == 10
    planned = ledger.total([entry("a", 3.0, C), entry("b", 2.0, UNKNOWN_USERS)], 1e-6)
    assert planned.epsilon == pytest.approx(by_hand(3.0, 2.0), rel=2e-3)
    monkeypatch.setattr(ledger, "_MOST_HASHES", 5)
    many = Users.of([f"u{i}" for i in range(6)])
    assert many.count == 6 and many.hashes is None


def test_training_without_noise_is_infinite_for_whom_it_saw_alone():
    seed = ledger.without_privacy("a", "seed", 100, C)
    assert ledger.total([seed, entry("b", 2.0, A)], 1e-6).epsilon < 10
    assert ledger.total([seed, entry("b", 2.0, C)], 1e-6).epsilon == math.inf
    assert ledger.total([seed], 1e-6).epsilon == math.inf
    assert ledger.total([ledger.without_privacy("a", "rounds", 0, C)], 1e-6).epsilon == 0


def test_events_of_other_neighbours_are_added_up():
    """Half of delta each: valid, since replacing by any other includes by one who sends nothing."""
    fixed = Mechanism(1.0, "global", 4.0, FixedSizeSampler(100, 5, 0))
    one = ledger.of_mechanism("a", fixed, 10, A)
    both = ledger.total([one, entry("b", 2.0, A)], 1e-6)
    assert both.accountant == "sum"
    expected = fixed.epsilon(10, 5e-7).epsilon + by_hand(2.0, delta=5e-7)
    assert both.epsilon == pytest.approx(expected, rel=2e-3)


def test_a_deployment_is_charged_for_all_runs_that_stand_for_it():
    said = (((1024, 10**6), gaussian(3.0), "REPLACE_SPECIAL"),)
    first, second = entry("a", 1.0, A, deployed=said), entry("b", 1.0, B, deployed=said)
    both = ledger.total_deployed([first, second], (1024, 10**6), 1e-6)
    assert both == pytest.approx(by_hand(3.0, 3.0), rel=2e-3)
    assert ledger.total_deployed([entry("a", 1.0, A), second], (1024, 10**6), 1e-6) is None
    alone = ledger.total_deployed([entry("a", 1.0, C), second], (1024, 10**6), 1e-6)
    assert alone == pytest.approx(by_hand(3.0), rel=2e-3)


def test_search_costs_all_its_runs():
    runs = [entry(str(i), 4.0, A) for i in range(3)]
    cost = ledger.search_cost(runs, 1e-6)
    assert cost["runs"] == 3
    assert cost["epsilon"] == pytest.approx(by_hand(4.0, 4.0, 4.0), rel=2e-3)
    account = dp.rdp.RdpAccountant(neighboring_relation=ZERO_OUT)
    account.compose(dp.dp_event.RepeatAndSelectDpEvent(runs[0].event, 3, math.inf))
    assert cost["repeat_and_select"] == pytest.approx(account.get_epsilon(1e-6))
    other = ledger.search_cost([*runs, entry("4", 3.0, A)], 1e-6)
    assert other["repeat_and_select"] is None
    poisson = Mechanism(1.0, "global", 2.0, PoissonSampler(1000, 10, 0))
    real = ledger.search_cost([ledger.of_mechanism("a", poisson, 50, A)] * 4, 1e-6)
    assert real["repeat_and_select"] > poisson.epsilon(50, 1e-6).epsilon
    assert ledger.search_cost([], 1e-6)["epsilon"] == 0


@pytest.mark.parametrize(
    "broken",
    [
        [{"run": "a"}],
        [{**ledger.to_data([entry("a", 1.0, A)])[0], "event": {"type": "NoSuchEvent"}}],
        [{**ledger.to_data([entry("a", 1.0, A)])[0], "event": {"type": "GaussianDpEvent", "z": 1}}],
        [{**ledger.to_data([entry("a", 1.0, A)])[0], "event": {"type": "DpEventBuilder"}}],
    ],
)
def test_a_ledger_that_cannot_be_read_is_an_error(broken):
    with pytest.raises(UserError, match="ledger"):
        ledger.from_data(broken)


def test_hashes_are_of_ids_alone():
    assert Users.of(["a", "b"]).digest == Users.of(["b", "a"]).digest != Users.of(["a"]).digest
    members = A.members(Users.of(["u3", "nobody"]).hashes)
    assert sorted(np.asarray(members).tolist()) == [False, True]
