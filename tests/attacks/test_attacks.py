"""Attacks at tiny size: they find what is there, and stay within their bounds under noise."""

import copy
import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy import stats

from fedasr import attacks
from fedasr.attacks import (
    attribute,
    bounds,
    inversion,
    matching,
    membership,
    names,
    speaker,
    training,
)
from fedasr.attacks.results import Result, clopper_pearson
from fedasr.attacks.roll_call import RollCall
from fedasr.attacks.target import Settings, Target, choose_users
from fedasr.data.batching import Grid
from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.listing import Listed
from fedasr.errors import UserError
from fedasr.federated.server import ServerState
from fedasr.models.recogniser import ARRAYS
from fedasr.privacy import noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler
from fedasr.streams import Stream, seed_key
from fedasr.text import CharTokenizer
from fedasr.training.builders import models
from fedasr.training.config import Config, default_config
from fedasr.training.evaluation import MULTIPLES
from fedasr.training.logging import to_json

USERS = 6
LOUD = 5.0  # a noise multiplier under which nothing is learned


class Data:
    """Of a run: six training users, each with sounds of their own, and as many held out."""

    def __init__(self, tmp):
        self.directory, self.tokenizer = tmp, CharTokenizer()
        self.grid = Grid(4, MULTIPLES, {"labels": 0.5})
        self.train = people("t")
        self.evaluation = {"test": people("e")}

    def resident(self, sharding):
        return None


def people(kind):
    rng = np.random.default_rng(ord(kind))
    users = {}
    for user in range(USERS):
        voice = rng.standard_normal(80)
        words = rng.choice(np.arange(1, 29), 3, replace=False)  # nobody else says quite these
        users[f"{kind}{user}"] = [
            {
                "features": (voice + 0.3 * rng.standard_normal((48, 80))).astype(np.float16),
                "labels": rng.permutation(words).astype(np.int32),
            }
            for _ in range(4)
        ]
    return InMemoryCorpus(users, ragged=ARRAYS)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    config = default_config()
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16, dropout=0.0)
    config.client.update(steps=2, batch_size=2, learning_rate=0.5)
    config.server.optimizer, config.server.learning_rate = "adam", 0.02
    config.privacy.clip_norm = 0.5
    typed = Config.of(to_json(config.to_dict()))
    recogniser = models.build_recogniser(typed, augmented=False)
    params = recogniser.init(seed_key(0, Stream.INIT))
    data = Data(tmp_path_factory.mktemp("attacks"))
    return Target(typed, data, recogniser, params, jax.devices()[:1])


@pytest.fixture(scope="module")
def given(target):
    return matching.halves(target, Settings(users=USERS))


def by_noise(results):
    return {one.noise_multiplier: one for one in results}


def test_a_speaker_is_known_by_an_update_and_not_under_noise(target, given):
    settings = Settings(users=USERS, noise=(0.0, LOUD), draws=20)
    found = by_noise(speaker.attack(target, settings, given))
    assert found[None].success >= 5 / 6 and found[None].interval[0] > found[None].chance
    assert found[0.0].success >= 5 / 6 and found[0.0].bound == 1.0
    assert found[LOUD].targets == 2 * 20 * USERS
    assert found[LOUD].success <= found[LOUD].bound < 0.3
    assert not any(one.exceeds for one in found.values())


def test_noise_that_is_off_is_exposed(target, given, monkeypatch):
    """The planted fault: the mechanism claims its noise, and draws zeros."""
    real = noise.normal_like
    monkeypatch.setattr(
        noise, "normal_like", lambda *args: jax.tree.map(lambda z: 0 * z, real(*args))
    )
    settings = Settings(users=USERS, noise=(LOUD,), draws=3)
    (result,) = [one for one in speaker.attack(target, settings, given) if one.noise_multiplier]
    assert result.success >= 5 / 6 and result.exceeds


def test_updates_are_clipped_and_noised_by_the_runs_own_code(target, given):
    clipped = target.clipped(given.observed)
    assert (np.linalg.norm(clipped, axis=1) <= 0.5 * (1 + 1e-5)).all()
    assert (np.linalg.norm(given.observed, axis=1) > 0.5).any()
    extra = target.noised(clipped, 0.3, 0)[0] - clipped
    assert extra.std() == pytest.approx(0.15, rel=0.02)
    correlation = np.corrcoef(extra) - np.eye(USERS)
    assert abs(correlation).max() < 0.1  # each its own
    again, other = target.noised(clipped, 0.3, 0, 2) - clipped
    assert (again == extra).all() and abs(np.corrcoef(extra[0], other[0])[0, 1]) < 0.1
    halves = target.noised(clipped / 2, 0.3, 0)[0] - clipped / 2
    assert abs(np.corrcoef(extra[0], halves[0])[0, 1]) < 0.1  # of what is released, too
    other = target.noised(clipped, 0.3, 1)[0] - clipped
    assert abs(np.corrcoef(extra[0], other[0])[0, 1]) < 0.1


def test_attributes_come_from_others(target, given, monkeypatch):
    voices = given.enrolled.copy()
    kinds = np.array(list("aabbcc"))
    voices[:] = 0
    for i, kind in enumerate(kinds):
        voices[i, [ord(kind), 200 + i]] = 1.0, 0.1
    right = attribute.guessed(voices, voices[None], kinds)
    assert right.all()
    # A user's own update is not among those it is compared with.
    alone = attribute.guessed(voices, voices[None], np.array(list("aabbcd")))
    assert alone[0, :4].all() and not alone[0, 4:].any()
    said = dict(zip(given.users, zip("xxyyyz", "abcdef", strict=True), strict=True))
    listed = {
        user: [Listed("", 1.0, {"accent": accent, "name": name, "mood": str(i)}) for i in (0, 1)]
        for user, (accent, name) in said.items()
    }
    monkeypatch.setattr(attribute, "read_listing", lambda *_: (listed, True))
    found = attribute.attack(target, Settings(users=USERS), given)
    assert {one.attack for one in found} == {"attribute accent"}  # the others name people, or takes
    assert found[0].targets == 5 and found[0].chance == pytest.approx(3 / 5)  # z is alone
    monkeypatch.setattr(attribute, "read_listing", lambda *_: ({}, False))
    assert attribute.attack(target, Settings(users=USERS), given) == []


@pytest.mark.slow
def test_planted_names_are_found_and_not_under_noise(target):
    settings = Settings(users=USERS, noise=(LOUD,), rounds=12, candidates=12)
    found = by_noise(names.attack(target, settings))
    assert {one.attack for one in found.values()} == {"names 1 in 4"}  # nobody has ten
    assert found[None].success >= 0.6 and found[None].interval[0] > 2 * found[None].chance
    assert found[LOUD].interval[0] <= found[LOUD].bound < 0.3
    held_out = next(iter(target.data.evaluation.values()))
    planted = names.planted(target, settings)
    assert planted.among == [4] * USERS == [len(each) for each in planted.users.values()]
    rows = zip(planted.users.values(), planted.candidates, planted.true, strict=True)
    for user, (examples, candidates, true) in enumerate(rows):
        labels = [tuple(x["labels"]) for x in candidates]
        assert len(set(labels)) == len(labels)
        said = [tuple(x["labels"]) for x in examples]
        own = [tuple(x["labels"]) for x in held_out.get(user, range(4))]
        assert said.count(labels[true]) == 1 and len(set(own) - set(said)) <= 1
        assert sum(a != b for a, b in zip(said, own, strict=True)) == 1
        assert sum(name in said for name in labels) == 1


def test_names_need_users_who_say_enough(target):
    few = dataclasses.replace(target, data=copy.copy(target.data))
    few.data.evaluation = {"test": InMemoryCorpus(
        {user: people("e").get(i, range(3)) for i, user in enumerate("ab")}, ragged=ARRAYS
    )}  # fmt: skip
    with pytest.raises(UserError, match="no two held-out users have 4"):
        names.planted(few, Settings())


@pytest.mark.slow
def test_who_trained_is_told_by_shadows(target):
    settings = Settings(users=USERS, noise=(LOUD,), rounds=4, shadows=8)
    found = by_noise(membership.attack(target, settings))
    assert found[None].success > 0.8 and found[None].interval[0] > 0.5
    assert found[LOUD].interval[0] <= found[LOUD].bound < 0.7
    present = membership.coins(8, USERS, 0)
    assert (present.sum(0) == 4).all() and 0 < present.sum(1).mean() < USERS


def test_each_training_has_noise_of_its_own():
    """Of each attack, of each trial and of each multiplier."""
    roots = set()

    class Recorder:
        def simulation(self, *args):
            return self

        def mechanism(self, *args):
            return None

        def init(self, params, root):
            roots.add(root.tobytes())
            return ServerState(params, None, 0, root)

        def run(self, state, rounds):
            return iter(())

    recorder = Recorder()
    recorder.config, recorder.params = default_config(), 0
    recorder.config.server.optimizer = "adam"
    recorder.config = Config.of(to_json(recorder.config.to_dict()))
    users = {"a": [{"features": np.zeros((2, 1)), "labels": np.zeros(1)}]}
    for name in ("names", "membership"):
        for z in (None, 0.0, 1.0):
            training.trained(recorder, Settings(), name, users, np.ones((2, 1), bool), z)
    assert len(roots) == 2 * 3 * 2


def test_likelihood_ratios_by_hand():
    present = np.array([[1], [0], [1], [0], [1]], bool)
    losses = np.array([[1.0], [3.0], [1.2], [3.4], [0.8]])
    found = membership.ratios(losses, present)[0, 0]
    # The others: in 1.2 and 0.8 (mean 1, deviations .2), out 3.0 and 3.4 (mean 3.2, .2).
    variance = 4 * 0.04 / 2
    assert found == pytest.approx(((1 - 3.2) ** 2 - 0) / (2 * variance))
    assert membership.ratios(losses[:2], present[:2])[0, 0] == 0  # nobody to compare with


@pytest.mark.slow
def test_features_come_back_from_one_gradient(target):
    settings = Settings(users=4, noise=(LOUD,))
    found = by_noise(inversion.attack(target, settings))
    assert found[None].success >= 0.75, found
    assert found[LOUD].interval[0] <= found[LOUD].bound


def test_bounds_are_those_of_the_accountant():
    """The Gaussian's own curve is just below every pair of the project's accountant."""
    mechanism = Mechanism(1.0, "global", 2.0, RollCall(np.ones((1, 5), bool), 3, 5.0))
    for chance in (0.02, 0.3):
        exact = bounds.at_most(mechanism, 3, chance)
        pairs = [(mechanism.epsilon(3, d).epsilon, d) for d in (0.3, 0.2, 0.1, 0.03, 0.01, 1e-3)]
        by_pairs = min(math.exp(e) * chance + d for e, d in pairs)
        assert exact <= by_pairs <= 1.35 * exact
    accuracy = bounds.accuracy_at_most(mechanism, 3)
    pairs = [(mechanism.epsilon(3, d).epsilon, d) for d in (0.5, 0.3, 0.2, 0.1)]
    assert (
        accuracy <= min((math.exp(e) + d) / (1 + math.exp(e)) for e, d in pairs) <= accuracy + 0.1
    )
    nothing = dataclasses.replace(mechanism, noise_multiplier=0.0)
    assert bounds.at_most(nothing, 1, 0.1) == bounds.accuracy_at_most(nothing, 1) == 1.0


def test_bounds_by_pairs():
    """Where chance amplifies: of every pair of the accountant's that is tried."""
    mechanism = Mechanism(1.0, "global", 1.0, PoissonSampler(50, 5.0, 0))
    pairs = [(mechanism.epsilon(4, d).epsilon, d) for d in bounds._DELTAS]
    found = bounds.at_most(mechanism, 4, 0.1), bounds.accuracy_at_most(mechanism, 4)
    assert found[0] == pytest.approx(min(math.exp(e) * 0.1 + d for e, d in pairs))
    assert found[1] == pytest.approx(min((math.exp(e) + d) / (1 + math.exp(e)) for e, d in pairs))


def test_results_are_of_all_rounds_of_a_training(target):
    settings = Settings(rounds=4)
    mechanism = target.mechanism(RollCall(np.ones((1, 1), bool), 4, 1.0), 2.0)
    for chance in (None, 0.1):
        found = training.training_result(
            target, settings, "x", ("noise 2", 2.0), [True, False], chance, "x"
        )
        assert found.epsilon == mechanism.epsilon(4, found.delta).epsilon
        exact = bounds.at_most(mechanism, 4, chance) if chance else stats.norm.cdf(4**0.5 / 4)
        assert found.bound == pytest.approx(exact) and found.success == 0.5
    calls = RollCall(np.array([[1, 0, 1], [0, 1, 0]], bool), 2, 3.0)
    assert [calls.cohort(r).tolist() for r in range(4)] == [[0, 2], [0, 2], [1], [1]]


def test_a_bound_holds_for_the_best_attack():
    """The likeliest of 20 one-hot secrets under Gaussian noise: just below the bound."""
    rng = np.random.default_rng(0)
    mechanism = Mechanism(1.0, "global", 1.0, RollCall.one())
    secrets = rng.integers(20, size=20_000)
    seen = np.eye(20)[secrets] + rng.standard_normal((20_000, 20))
    success = (seen.argmax(1) == secrets).mean()
    assert (
        0.7 * bounds.at_most(mechanism, 1, 1 / 20) < success < bounds.at_most(mechanism, 1, 1 / 20)
    )


def test_intervals_of_shares():
    for hits, trials in ((0, 5), (3, 10), (7, 7)):
        expected = stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
        assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high))
    base = dict.fromkeys(("attack", "setting", "what"), "x")
    one = Result(**base, success=0.9, targets=9, interval=(0.5, 1.0), chance=0.1, bound=0.49,
                 noise_multiplier=1.0, epsilon=1.0, delta=1e-3)  # fmt: skip
    assert one.exceeds and one.record()["exceeds"] is True
    assert not dataclasses.replace(one, bound=0.5).exceeds


def test_who_can_be_a_target():
    corpus = people("x")
    assert choose_users(corpus, 3, 0) == choose_users(corpus, 3, 0) != choose_users(corpus, 3, 1)
    with pytest.raises(UserError, match="two users"):
        choose_users(corpus, 3, 0, least=9)
    assert set(attacks.ATTACKS) == {"speaker", "attribute", "names", "membership", "inversion"}
