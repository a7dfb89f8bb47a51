"""A corpus and a sampler of a user's own, with the documented members and no others, everywhere."""

import dp_accounting
import jax
import numpy as np
import optax
import pytest

import fedasr as fa
from fedasr import auditing
from fedasr.data import batching
from fedasr.data.corpus import all_lengths, find_users, shared_users
from fedasr.data.records import ArrayRecordCorpus
from fedasr.data.views import ReshuffledCorpus, UnionCorpus, UserSubset
from fedasr.federated.simulation import corpus_digest
from fedasr.feedback.weighting import words_of_users
from fedasr.fusion.recognisers import utterance_scores
from fedasr.models.recogniser import ARRAYS
from fedasr.privacy import ledger
from fedasr.privacy.correlated import Correlation
from fedasr.privacy.sampling import SilentSampler
from fedasr.training.central import CentralTraining

USERS = 6
SMALL = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16}


class Recordings:
    """The four members of `Corpus`; examples are made when they are read."""

    def __init__(self, prefix="user"):
        self.users = [f"{prefix} {i}" for i in range(USERS)]
        self.sizes = np.asarray([3 + i % 2 for i in range(USERS)])

    def lengths(self, user):
        size = self.sizes[user]
        return {
            "features": np.full(size, 48 + user, np.int32),
            "labels": np.full(size, 3, np.int32),
        }

    def get(self, user, indices):
        examples = []
        for index in indices:
            rng = np.random.default_rng((user, int(index)))
            features = rng.standard_normal((48 + user, 80)).astype(np.float16)
            labels = rng.integers(1, 20, 3).astype(np.int32)
            examples.append({"features": features, "labels": labels})
        return examples


class Coins:
    """The members of `Sampler`: everybody by a coin, without the machinery of `PoissonSampler`."""

    separation = 1
    sensitivity = 1.0
    amplifies = True
    overflow_probability = 0.0
    description = "coins"
    neighbours = "one user's part replaced by nothing"
    neighboring_relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def __init__(self, population, probability, draws=0):
        self.population, self.slots = population, population
        self.expected_cohort = population * probability
        self._probability, self._draws = probability, draws

    def cohort(self, round):
        rng = np.random.default_rng((self._draws, round))
        return np.flatnonzero(rng.random(self.population) < self._probability)

    def event(self, noise_multiplier):
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.PoissonSampledDpEvent(self._probability, gaussian)

    def participations(self, rounds):
        return rounds

    def deployed(self, cohort, population):
        return Coins(population, cohort / population)

    def reseeded(self, seed):
        return Coins(self.population, self._probability, seed)


class Sharp:
    """The members of `Correlation`: noise that is not correlated at all."""

    description, bands, rounds, buffers = "plain", 1, 4, 0

    def coefficients(self, rounds):
        return np.append(1.0, np.zeros(rounds - 1))

    def inverse(self):
        raise AssertionError("one band needs no inverse")


def plain_loss(params, batch, key):
    error = ((batch["features"].mean((1, 2)) - params["w"]) ** 2) * batch["mask"]
    return error.sum() / batch["mask"].sum(), {}


def simulation(
    sampler,
    privacy=None,
    algorithm=None,
    batching=fa.Batching(2, steps=2),
    **options,
):
    mechanism = fa.Mechanism(0.5, "uniform", 0.5, sampler, **(privacy or {}))
    update = fa.local_training(plain_loss, optax.sgd(0.1))
    return fa.Simulation(
        Recordings(),
        mechanism,
        fa.FedAvg(update, optax.sgd(1.0), **(algorithm or {})),
        batching,
        **options,
    )


def after(sim, params, rounds=2):
    state = sim.init(params)
    for state, metrics in sim.run(state, rounds):
        assert metrics.clients <= USERS and state.round == metrics.round
    return jax.device_get(state.params)


def test_our_classes_and_others_are_instances():
    for corpus in (Recordings(), fa.InMemoryCorpus({"a": [{"x": np.zeros(2)}]})):
        assert isinstance(corpus, fa.Corpus)
    for views in (
        UserSubset(Recordings(), [0, 2]),
        UnionCorpus([Recordings()]),
        ReshuffledCorpus(Recordings(), 0),
        auditing.CanaryCorpus(np.ones((1, 2)), 3),
    ):
        assert isinstance(views, fa.Corpus)
    samplers = (
        Coins(6, 0.5),
        fa.PoissonSampler(6, 2.0, 0),
        fa.FixedSizeSampler(6, 2, 0),
        fa.ShuffledSampler(6, 2, 0),
        SilentSampler(fa.PoissonSampler(6, 2.0, 0), (1, 2)),
    )
    for sampler in samplers:
        assert isinstance(sampler, fa.Sampler)
        assert isinstance(sampler.reseeded(3), fa.Sampler)
        assert isinstance(sampler.deployed(3, 10), fa.Sampler)
    for correlation in (Sharp(), fa.BandedNoise(2, 4), fa.BufferedNoise(2, 4, 1, 4)):
        assert isinstance(correlation, Correlation)
    assert isinstance(fa.local_training(plain_loss, optax.sgd(1.0)), fa.ClientUpdate)
    for other in (object(), {}, [1], "corpus"):
        assert not isinstance(other, fa.Corpus | fa.Sampler | Correlation)


def test_a_mechanism_asks_a_sampler_for_its_members_alone():
    mechanism = fa.Mechanism(0.5, "uniform", 0.8, Coins(1000, 0.01))
    ours = fa.Mechanism(0.5, "uniform", 0.8, fa.PoissonSampler(1000, 10.0, 0))
    found = mechanism.epsilon(20, 1e-6).epsilon
    assert found == pytest.approx(ours.epsilon(20, 1e-6).epsilon, rel=1e-3)
    assert mechanism.calibrated(1.0, 1e-6, 20).epsilon(20, 1e-6).epsilon <= 1.0
    deployed = mechanism.deployed(100, 10**6)
    assert deployed.noise_multiplier == pytest.approx(8.0)
    assert deployed.epsilon(20, 1e-6).epsilon < found
    entry = ledger.of_mechanism("run", mechanism, 20, ledger.Users.of(["a"]), [(100, 10**6)])
    again = ledger.from_data(ledger.to_data([entry]))[0]
    assert again.event == entry.event


BUCKETS = ({"features": 64, "labels": 4},)
RESIDENT = fa.make_resident(Recordings(), BUCKETS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batching": fa.Batching(frames=100, epochs=1, micro_batch=1)},
        {"privacy": {"adaptive": fa.AdaptiveClip(0.5, 0.2, 1.0), "correlation": Sharp()}},
        {
            "privacy": {"weighting": "bounded"},
            "algorithm": {"weights": np.full(USERS, 0.5)},
            "hardware": fa.Hardware(jax.devices()[:1], chunk=2),
        },
        {"batching": fa.Batching(2, steps=2, buckets=BUCKETS, resident=RESIDENT)},
    ],
    ids=["dense", "in parts", "adaptive", "weighted", "resident"],
)
def test_rounds(options):
    options = {"hardware": fa.Hardware(jax.devices()[:1])} | options
    params = {"w": np.zeros((), np.float32)}
    found = after(simulation(Coins(USERS, 0.5), **options), params)
    assert np.isfinite(found["w"]) and found["w"] != 0


def test_a_run_draws_by_its_own_seed():
    """`reseeded` is all that a run asks for: the sampler has no seed that could be seen."""
    params = {"w": np.zeros((), np.float32)}
    sims = [simulation(Coins(USERS, 0.5), seed=seed) for seed in (0, 1)]
    draws = [sim.draws(sim.init(params)).sampler for sim in sims]
    cohorts = [[tuple(one.cohort(r)) for r in range(8)] for one in draws]
    assert cohorts[0] != cohorts[1]
    assert simulation(Coins(USERS, 0.5)).chunk_bytes(params) > 0


def test_an_audit():
    mechanism = fa.Mechanism(0.5, "uniform", 2.0, Coins(40, 0.5))
    found = fa.audit_updates(mechanism, 2, 1e-3, trials=2)
    assert 0 <= found.epsilon_lower <= found.epsilon_claimed


def test_an_audit_of_noise_that_remembers():
    """Every trial is then a run of its own, with draws of its own."""
    mechanism = fa.Mechanism(0.5, "uniform", 2.0, Coins(10, 0.5), correlation=Sharp())
    present = auditing.toss(2, 10, "one_run", 0)
    seen = auditing.observe(mechanism, present, 2, seed=0)
    assert seen.shape == (2, 2, 10) and len(np.unique(seen.round(6))) == seen.size


def test_central_training_and_evaluation():
    model = fa.recogniser("transformer", **SMALL)
    params = model.init(jax.random.key(0))
    trainer = CentralTraining(Recordings(), model.loss, optax.sgd(0.1), 2, seed=0, select=ARRAYS)
    for state, steps, loss in trainer.run(trainer.init(params), 2):
        assert steps == state.round == 2 and loss > 0
    rates = fa.evaluate(model, state.params, Recordings())
    assert rates.keys() == {"wer", "cer", "loss"} and rates["loss"] > 0
    assert len(jax.vmap(utterance_scores(model, Recordings()))(
        jax.tree.map(lambda x: x[None], params))[0]) == Recordings().sizes.sum()  # fmt: skip


def test_views_and_what_is_asked_of_all_users(tmp_path):
    mine, other = Recordings(), Recordings()
    assert shared_users(mine, other) == tuple(mine.users)
    assert find_users(mine, other).tolist() == list(range(USERS))
    assert corpus_digest(mine) == corpus_digest(other)
    lengths = all_lengths(mine)["features"]
    assert len(lengths) == mine.sizes.sum()
    assert len(words_of_users(mine, fa.CharTokenizer())) == USERS
    views = (
        UserSubset(mine, [4, 1]),
        UnionCorpus([mine, Recordings("voice")]),
        ReshuffledCorpus(mine, 3),
    )
    for view in views:
        examples = [example for user, size in enumerate(view.sizes)
                    for example in view.get(user, range(size))]  # fmt: skip
        told = all_lengths(view)["features"]
        assert told.tolist() == [len(example["features"]) for example in examples]
    fa.write_corpus(tmp_path / "corpus", {"train": mine, "both": views[1]})
    stored = ArrayRecordCorpus(tmp_path / "corpus", "train")
    assert list(stored.users) == mine.users and stored.sizes.tolist() == mine.sizes.tolist()
    np.testing.assert_array_equal(
        stored.get(2, [1])[0]["features"], mine.get(2, [1])[0]["features"]
    )
    assert batching.make_buckets([mine, stored], 2)
