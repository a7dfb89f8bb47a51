import dataclasses
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.compression.partial import Subset, partial_training
from fedasr.data.batching import Batching, ClientBatcher, LocalBatches, Padding, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientMetrics, local_training, take_batch
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler
from fedasr.streams import Stream, key, make_root

pytestmark = pytest.mark.usefixtures("optimized")

SIZES = [1, 4, 2, 3, 5, 2]
PARAMS = {"w": np.float32([[0.5], [-1.0]]), "b": np.float32([0.25])}
ONE = jax.devices()[:1]
ROOT = make_root("of simulations that differ and are compared draw by draw")


def squares(params, batch, key):
    del key
    error = (batch["x"] @ params["w"] + params["b"] - batch["y"])[..., 0]
    count = jnp.maximum(jnp.sum(batch["mask"]), 1)
    loss = 0.5 * jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / count
    return loss, {"examples": jnp.sum(batch["mask"], dtype=jnp.int32)}


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    users = {
        f"user{i}": [
            {"x": rng.normal(size=2).astype(np.float32), "y": rng.normal(size=1).astype(np.float32)}
            for _ in range(size)
        ]
        for i, size in enumerate(SIZES)
    }
    return InMemoryCorpus(users)


def simulation(
    corpus,
    *,
    clip=math.inf,
    noise=0.0,
    sampler=None,
    server=None,
    batching=None,
    client=None,
    seed=3,
    hardware=Hardware(ONE),
):
    sampler = sampler or FixedSizeSampler(len(corpus.users), 3, seed=7)
    return Simulation(
        corpus,
        Mechanism(clip, "uniform", noise, sampler),
        FedAvg(
            local_training(squares, client or optax.sgd(0.2, momentum=0.9)),
            server or optax.sgd(1.0, momentum=0.5),
        ),
        batching or Batching(2, epochs=2),
        hardware=hardware,
        seed=seed,
    )


@pytest.fixture(scope="module")
def noisy(corpus):
    return simulation(corpus, clip=0.5, noise=0.2, server=optax.adam(0.1, eps=0.1))


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def distance(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in leaves)


def federated_averaging(corpus, rounds, sampler, seed, weights=None):
    """A plain loop in float64: momentum SGD on clients, momentum SGD on the server."""
    weights = np.ones(len(SIZES)) if weights is None else weights
    theta = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    velocity = {k: 0.0 for k in theta}
    history = []
    for round in range(rounds):
        total = {k: 0.0 for k in theta}
        losses, steps, norms, examples = [], 0, [], 0
        for user in sampler.cohort(round):
            local, momentum, own = dict(theta), {k: 0.0 for k in theta}, []
            plan = LocalBatches(2, epochs=2).plan(SIZES[user], seed, round, int(user))
            for indices in plan:
                batch = corpus.get(int(user), indices.tolist())
                x = np.stack([e["x"] for e in batch]).astype(np.float64)
                error = x @ local["w"] + local["b"] - np.stack([e["y"] for e in batch])
                own.append(0.5 * (error**2).mean())
                grads = {"w": x.T @ error / len(x), "b": error.mean(0)}
                norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
                for k in local:
                    momentum[k] = 0.9 * momentum[k] + grads[k] / max(norm, 1.0)
                    local[k] = local[k] - 0.2 * momentum[k]
                examples += len(x)
            delta = {k: theta[k] - local[k] for k in theta}
            total = {k: total[k] + weights[user] * delta[k] for k in theta}
            losses.append(np.mean(own))
            steps += len(plan)
            norms.append([np.linalg.norm(delta[k]) for k in sorted(delta)])
        for k in theta:
            velocity[k] = 0.5 * velocity[k] + total[k] / sampler.expected_cohort
            theta[k] = theta[k] - velocity[k]
        history.append((dict(theta), np.mean(losses), steps, np.mean(norms, 0), examples))
    return history


@pytest.mark.parametrize(("chunk", "devices"), [(1, 1), (0, 2)])
def test_rounds_equal_federated_averaging_by_hand(corpus, chunk, devices):
    sampler = FixedSizeSampler(len(corpus.users), 3, seed=7)
    sim = simulation(
        corpus, sampler=sampler, hardware=Hardware(jax.devices()[:devices], chunk=chunk)
    )
    expected = federated_averaging(corpus, 3, *sim.draws(sim.init(PARAMS)))
    assert sim.chunk == (1 if chunk else 2)
    done = 0
    for (state, metrics), (theta, loss, steps, norms, examples) in zip(
        sim.run(sim.init(PARAMS), 3), expected, strict=True
    ):
        done += 1
        assert int(state.round) == metrics.round == done
        for k in theta:
            np.testing.assert_allclose(state.params[k], theta[k], rtol=1e-5, atol=1e-6)
        assert metrics.loss == pytest.approx(loss, rel=1e-5)
        assert (metrics.clients, metrics.steps, metrics.invalid) == (3, steps, 0)
        assert metrics.aux == {"examples": examples}
        np.testing.assert_allclose(metrics.norms, norms, rtol=1e-5)  # layers: "b", "w"
        assert not metrics.clipped.any()
        assert metrics.padding.real == examples
        assert metrics.seconds >= metrics.waiting >= 0


def test_the_mean_is_over_the_expected_cohort_not_the_realised(corpus):
    sim = simulation(corpus, sampler=PoissonSampler(len(corpus.users), 2.5, seed=1))
    sampler, order = sim.draws(sim.init(PARAMS))
    rounds = range(6)
    sizes = {len(sampler.cohort(r)) for r in rounds}
    assert len(sizes) > 2
    expected = federated_averaging(
        corpus,
        next(r for r in rounds if len(sampler.cohort(r)) == 0) if 0 in sizes else len(rounds),
        sampler,
        order,
    )
    for (state, metrics), wanted in zip(
        sim.run(sim.init(PARAMS), len(expected)), expected, strict=True
    ):
        assert metrics.clients == len(sampler.cohort(metrics.round - 1))
        for k in PARAMS:
            np.testing.assert_allclose(state.params[k], wanted[0][k], rtol=1e-5, atol=1e-6)


def test_same_seed_same_run_and_resume_is_bit_identical(corpus, noisy):
    states = [state for state, _ in noisy.run(noisy.init(PARAMS), 4)]
    again = [state for state, _ in noisy.run(noisy.init(PARAMS), 4)]
    assert_identical(states[-1], again[-1])
    # A new process would have a new simulation and the state as plain arrays.
    saved = jax.tree.map(np.array, jax.device_get(states[1]))
    resumed = simulation(corpus, clip=0.5, noise=0.2, server=optax.adam(0.1, eps=0.1))
    rest = list(resumed.run(resumed.transfer(saved), 2))
    assert [metrics.round for _, metrics in rest] == [3, 4]
    assert_identical(rest[-1][0], states[-1])


def test_noise_and_seed_matter(corpus, noisy):
    (state, _), *_ = noisy.run(noisy.init(PARAMS), 1)
    silent = simulation(corpus, clip=0.5, server=optax.adam(0.1, eps=0.1))
    (without, _), *_ = silent.run(silent.init(PARAMS), 1)
    assert distance(state.params, without.params) > 1e-3
    other = simulation(corpus, clip=0.5, noise=0.2, server=optax.adam(0.1, eps=0.1), seed=4)
    (reseeded, _), *_ = other.run(other.init(PARAMS), 1)
    assert distance(state.params, reseeded.params) > 1e-3


def test_noise_is_on_the_mean_with_the_stated_deviation():
    users = {str(i): [{"x": np.float32([1.0])}] for i in range(4)}
    mechanism = Mechanism(0.5, "global", 2.0, FixedSizeSampler(4, 2, seed=0))
    constant = local_training(
        lambda p, b, k: (0.0 * p.sum() + 0.0 * b["x"].sum(), {}), optax.sgd(1)
    )
    sim = Simulation(
        InMemoryCorpus(users),
        mechanism,
        FedAvg(constant, optax.sgd(1.0)),
        Batching(1, steps=1),
        hardware=Hardware(ONE),
    )
    state = sim.init(np.zeros(40_000, np.float32))
    draws, last = [], np.zeros(40_000)
    for state, _ in sim.run(state, 2):
        draws.append(np.asarray(state.params) - last)
        last = np.asarray(state.params)
    for draw in draws:
        assert draw.std() == pytest.approx(0.5 * 2.0 / 2, rel=0.03)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.03


def test_client_randomness_comes_from_seed_round_and_user():
    corpus = InMemoryCorpus({str(i): [{"x": np.float32([1.0])}] for i in range(2)})

    def noise_as_gradient(params, batch, key):
        return jnp.sum(params * jax.random.normal(key, (5,))) + 0.0 * batch["x"].sum(), {}

    sim = Simulation(
        corpus,
        Mechanism(math.inf, "uniform", 0.0, FixedSizeSampler(2, 2, seed=0)),
        FedAvg(local_training(noise_as_gradient, optax.sgd(1.0), grad_clip=None), optax.sgd(1.0)),
        Batching(1, steps=1),
        hardware=Hardware(ONE),
        seed=6,
    )
    fold = jax.random.fold_in
    expected = np.zeros(5)
    start = sim.init(np.zeros(5, np.float32))
    clients = key(start.root, Stream.CLIENTS)
    for round, (state, _) in enumerate(sim.run(start, 3)):
        for user in range(2):
            own = fold(fold(fold(clients, round), user), 0)  # step 0
            expected = expected - np.asarray(jax.random.normal(own, (5,))) / 2
        np.testing.assert_allclose(state.params, expected, rtol=1e-4, atol=1e-5)


def test_an_empty_round_still_gets_noise_and_a_server_step(corpus):
    sampler = PoissonSampler(len(corpus.users), 0.7, seed=0)
    sim = simulation(corpus, clip=0.5, noise=0.1, sampler=sampler, server=optax.sgd(1.0))
    start = sim.init(PARAMS)
    cohorts = [len(sim.draws(start).sampler.cohort(r)) for r in range(8)]
    assert 0 in cohorts and max(cohorts) > 0
    before = PARAMS
    for (state, metrics), size in zip(sim.run(start, 8), cohorts, strict=True):
        assert metrics.clients == size
        assert distance(state.params, before) > 1e-4
        before = state.params
        if size == 0:
            assert math.isnan(metrics.loss) and metrics.padding == Padding(0, 0)
            assert metrics.steps == metrics.invalid == 0 and metrics.aux == {}
        else:
            assert math.isfinite(metrics.loss)


def test_clipping_and_invalid_clients_are_reported():
    value = {"good": 1.0, "huge": 1e3, "worse": np.nan}
    corpus = InMemoryCorpus({
        name: [{"x": np.full(2, v, np.float32), "y": np.zeros(1, np.float32)}]
        for name, v in value.items()
    })  # fmt: skip
    sim = Simulation(
        corpus,
        Mechanism(0.9, "global", 0.0, FixedSizeSampler(3, 3, seed=0)),
        FedAvg(local_training(squares, optax.sgd(1.0), grad_clip=None), optax.sgd(1.0)),
        Batching(1, steps=1),
        hardware=Hardware(ONE),
    )
    params = {"w": np.zeros((2, 1), np.float32), "b": np.float32([0.5])}
    ((state, metrics),) = sim.run(sim.init(params), 1)
    # Gradients: error (1, 1 or 1000, 1000) and 1, with the error 0.5.
    assert (metrics.clients, metrics.invalid, metrics.steps) == (3, 1, 3)
    assert metrics.aux == {"examples": 2}
    assert metrics.loss == pytest.approx(0.125)
    np.testing.assert_allclose(metrics.norms, [0.5, 0.5 * np.sqrt(2) * 1001 / 2], rtol=1e-5)
    np.testing.assert_allclose(metrics.clipped, [0.5, 0.5])  # a global clip clips every layer
    good = np.float64([0.5, 0.5, 0.5])
    huge = np.float64([0.5, 500, 500])
    mean = (good + 0.9 * huge / np.linalg.norm(huge)) / 3
    np.testing.assert_allclose(state.params["b"], 0.5 - mean[:1], rtol=1e-5)
    np.testing.assert_allclose(state.params["w"][:, 0], -mean[1:], rtol=1e-5)


def test_one_compilation_per_shape_of_chunk():
    rng = np.random.default_rng(1)
    users = {
        f"u{i:02d}": [
            {"x": rng.normal(size=(rng.choice([3, 8, 16]), 2)).astype(np.float32)}
            for _ in range(rng.integers(1, 5))
        ]
        for i in range(12)
    }
    corpus = InMemoryCorpus(users)
    buckets = make_buckets([corpus], 2)
    assert buckets == ({"x": 8}, {"x": 16})

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

    local = LocalBatches(1, epochs=1)
    mechanism = Mechanism(1.0, "global", 0.1, PoissonSampler(12, 6, seed=0))
    sim = Simulation(
        corpus,
        mechanism,
        FedAvg(local_training(loss, optax.sgd(0.1)), optax.sgd(1.0)),
        Batching(1, epochs=1, buckets=buckets),
        hardware=Hardware(ONE, chunk=2),
    )
    batcher = ClientBatcher(corpus, local, buckets, 2, seed=0)
    shapes, chunks = set(), 0
    state = sim.init({"w": np.ones((2, 1), np.float32)})
    draws = sim.draws(state)
    for round, _ in enumerate(sim.run(state, 10)):
        for chunk, _ in batcher.chunks(draws.sampler.cohort(round), round, draws.order):
            shapes.add(tuple(x.shape for x in jax.tree.leaves(chunk)))
            chunks += 1
        assert sim.compilations() <= len(shapes) + 2  # the next round's may be under way
    assert sim.compilations() == len(shapes) < chunks / 3
    assert 3 <= len(shapes)


def test_stopping_early_ends_the_reading_thread(noisy):
    before = set(threading.enumerate())
    rounds = noisy.run(noisy.init(PARAMS), 1000)
    next(rounds)
    assert set(threading.enumerate()) > before
    rounds.close()
    assert set(threading.enumerate()) == before


def test_an_error_while_reading_reaches_the_caller(corpus):
    class Broken:
        users, sizes = corpus.users, corpus.sizes
        lengths = corpus.lengths

        def get(self, user, indices):
            raise UserError("file 7 is damaged")

    sim = simulation(Broken(), batching=Batching(1, steps=1))
    with pytest.raises(UserError, match="file 7"):
        next(sim.run(sim.init(PARAMS), 1))


def test_a_round_does_not_count_the_time_of_its_caller(noisy):
    list(noisy.run(noisy.init(PARAMS), 3))  # all that is to be compiled is
    rounds = noisy.run(noisy.init(PARAMS), 3)
    next(rounds)
    time.sleep(0.5)
    _, metrics = next(rounds)
    rounds.close()
    assert metrics.seconds < 0.4


def test_sampler_and_corpus_must_agree(corpus):
    with pytest.raises(UserError, match="99 users"):
        simulation(corpus, sampler=FixedSizeSampler(99, 3, seed=0))


def test_round_metrics_are_frozen(noisy):
    _, metrics = next(noisy.run(noisy.init(PARAMS), 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.loss = 0.0


def test_the_round_reaches_the_clients(corpus):
    def update(params, batches, num_steps, key, max_steps=None, round=0):
        del batches, num_steps, key, max_steps
        return jax.tree.map(lambda p: jnp.ones_like(p) * round, params), ClientMetrics(0.0, {})

    sampler = FixedSizeSampler(len(corpus.users), 3, seed=7)
    mechanism = Mechanism(math.inf, "global", 0.0, sampler)
    sim = Simulation(
        corpus,
        mechanism,
        FedAvg(update, optax.sgd(1.0)),
        Batching(2, steps=1),
        hardware=Hardware(ONE),
    )
    means = []
    state = sim.init({"w": jnp.zeros(())})
    for state, _ in sim.run(state, 3):
        means.append(float(state.params["w"]))
    assert means == [0.0, -1.0, -3.0]  # the first round counts as 0


def test_weighting_by_examples_is_the_weighted_mean(corpus):
    sampler = FixedSizeSampler(len(corpus.users), len(corpus.users), seed=0)
    batching = Batching(8, epochs=1)
    update = local_training(squares, optax.sgd(0.2), grad_clip=None)
    mechanism = Mechanism(math.inf, "global", 0.0, sampler, weighting="examples")
    algorithm = FedAvg(update, optax.sgd(1.0))
    sim = Simulation(corpus, mechanism, algorithm, batching, hardware=Hardware(ONE))
    ((state, _),) = sim.run(sim.init(PARAMS), 1)
    # One full-batch step a client: the weighted mean is one step on all examples together.
    examples = [e for u in range(len(SIZES)) for e in corpus.get(u, range(SIZES[u]))]
    batch = {name: np.stack([e[name] for e in examples]) for name in ("x", "y")}
    batch["mask"] = np.ones(len(examples), bool)
    grads = jax.grad(squares, has_aux=True)(PARAMS, batch, None)[0]
    expected = jax.tree.map(lambda p, g: p - 0.2 * g, PARAMS, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), dict(state.params), expected
    )


def weighted(corpus, **options):
    """As `simulation` without clipping, for weights."""
    count = len(corpus.users)
    mechanism = Mechanism(
        math.inf, "global", 0.0, FixedSizeSampler(count, 3, seed=7), weighting="bounded"
    )
    update = local_training(squares, optax.sgd(0.2, momentum=0.9))
    algorithm = FedAvg(update, optax.sgd(1.0, momentum=0.5), **options)
    return Simulation(
        corpus, mechanism, algorithm, Batching(2, epochs=2), hardware=Hardware(ONE), seed=3
    )


def test_weights_multiply_users_updates_whoever_sets_them(corpus):
    """The corpus's owner, by user; and the devices, here by the first number of their data."""

    def by_data(params, delta, batches, key):
        assert delta["w"].shape == params["w"].shape
        return take_batch(batches, 0)["x"][0, 0]

    given = np.float32([0.0, 1.0, 0.25, 0.5, 0.75, 0.125])
    sim = weighted(corpus, weights=given, weigh=by_data)
    start = sim.init(PARAMS)
    sampler, order = sim.draws(start)
    plans = [LocalBatches(2, epochs=2).plan(n, order, 0, u) for u, n in enumerate(SIZES)]
    first = [corpus.get(u, [int(plan[0][0])])[0]["x"][0] for u, plan in enumerate(plans)]
    answers = np.clip(first, 0, 1)  # of the first round
    assert 0 < answers[sampler.cohort(0)].max() and 0 < given[sampler.cohort(0)].max()
    ((state, metrics),) = sim.run(start, 1)
    ((theta, *_),) = federated_averaging(corpus, 1, sampler, order, given * answers)
    for k in theta:
        np.testing.assert_allclose(state.params[k], theta[k], rtol=1e-5, atol=1e-7)
    assert (metrics.clients, metrics.invalid) == (3, 0)


def test_weights_of_one_are_none_at_all(corpus):
    """Bit for bit, and with no more compilations."""
    ones, plain = weighted(corpus, weights=np.ones(len(SIZES))), simulation(corpus)
    runs = [list(sim.run(sim.init(PARAMS, ROOT), 2))[-1] for sim in (ones, plain)]
    assert_identical(runs[0][0].params, runs[1][0].params)
    assert runs[0][1].loss == runs[1][1].loss
    assert ones.compilations() == plain.compilations()


def test_a_weight_that_is_no_number_is_an_invalid_client(corpus):
    sim = weighted(corpus, weigh=lambda p, d, b, k: jnp.where(d["b"][0] > 0, jnp.nan, 0.5))
    found = list(sim.run(sim.init(PARAMS), 3))
    assert 0 < sum(metrics.invalid for _, metrics in found) < 9
    assert all(np.isfinite(x).all() for x in found[-1][0].params.values())


@pytest.mark.parametrize(
    ("weighting", "options", "match"),
    [
        ("bounded", {"weights": [1.0, 0.5, 1.01, 0, 0, 0]}, "above 1"),
        ("bounded", {"weights": [1.0, -0.5, 1, 0, 0, 0]}, r"\[0, 1\]"),
        ("bounded", {"weights": [1.0, np.nan, 1, 0, 0, 0]}, r"\[0, 1\]"),
        ("bounded", {"weights": [1.0, 0.5]}, "6 users"),
        ("uniform", {"weights": np.ones(6)}, "bounded"),
        ("uniform", {"weigh": lambda *_: 1.0}, "bounded"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_weights_that_would_move_the_sum_too_far_are_refused(
    corpus, weighting, options, match, noise
):
    mechanism = Mechanism(
        0.3, "uniform", noise, PoissonSampler(len(SIZES), 3, seed=0), weighting=weighting
    )
    update = local_training(squares, optax.sgd(0.2))
    with pytest.raises(UserError, match=match):
        algorithm = FedAvg(update, optax.sgd(1.0), **options)
        Simulation(corpus, mechanism, algorithm, Batching(2, epochs=1))


@pytest.mark.parametrize("adaptive", [None, AdaptiveClip(0.5)])
def test_variables_that_are_not_trained_are_out_of_the_mechanism(corpus, adaptive):
    """As if the model had the trained variables only: same bounds, noise and optimiser."""
    trained = [False, True]  # b, w

    def make_update(loss):
        return local_training(loss, optax.sgd(0.2))

    def alone(params, batch, key):
        return squares(PARAMS | params, batch, key)

    def run(client, params, trained=None):
        sampler = PoissonSampler(len(SIZES), 3, seed=7)
        mechanism = Mechanism(0.5, "uniform", 0.2, sampler, adaptive=adaptive)
        sim = Simulation(
            corpus,
            mechanism,
            FedAvg(client, optax.adam(0.1), trained=trained),
            Batching(2, epochs=2),
            hardware=Hardware(ONE),
            seed=3,
        )
        *_, (state, metrics) = sim.run(sim.init(params, ROOT), 3)
        return state, metrics

    subset = Subset("fixed", ("w",))
    assert subset.trained(PARAMS) == trained
    state, metrics = run(partial_training(make_update, squares, subset), PARAMS, trained)
    expected, expected_metrics = run(make_update(alone), {"w": PARAMS["w"]})
    np.testing.assert_array_equal(state.params["b"], PARAMS["b"])
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-5)
    assert np.any(state.params["w"] != PARAMS["w"])
    np.testing.assert_allclose(metrics.norms, expected_metrics.norms, rtol=1e-5)
    assert len(jax.tree.leaves(state.opt_state)) == len(jax.tree.leaves(expected.opt_state))
