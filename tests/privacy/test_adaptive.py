import dataclasses
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import ClientMetrics
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy import clipping
from fedasr.privacy.adaptive import AdaptiveClip, ClientView, adapt_scales, clip_scaled, hold
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler, ShuffledSampler

PARAMS = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.float32)}
USERS = 40
NORMS = np.linspace(1.0, 5.0, USERS)  # of every user's update, in each layer: a, and b half of it
MEDIAN = float(np.median(NORMS))


def own_delta(params, batches, num_steps, key, max_steps=None, round=0):
    """Sends what the user's only example says."""
    del key, max_steps, round
    size = jnp.where(num_steps > 0, batches["norm"][0, 0], 0.0)
    delta = {
        "a": jnp.zeros(3).at[0].set(size),
        "b": jnp.zeros((2, 2)).at[1, 1].set(size / 2),
    }
    return jax.tree.map(lambda d, p: d.astype(p.dtype), delta, params), ClientMetrics(
        jnp.float32(0), {}
    )


@pytest.fixture(scope="module")
def corpus():
    return InMemoryCorpus({f"u{i:02}": [{"norm": np.float32(n)}] for i, n in enumerate(NORMS)})


def simulation(corpus, budget="uniform", clip=1.0, noise=0.0, votes=0.5, **adaptive):
    mechanism = Mechanism(
        clip,
        budget,
        noise,
        ShuffledSampler(USERS, 20, seed=0),
        adaptive=AdaptiveClip(votes, **adaptive),
    )
    return Simulation(
        corpus,
        mechanism,
        FedAvg(own_delta, optax.sgd(1.0)),
        Batching(1, steps=1),
        hardware=Hardware(chunk=10),
    )


def run(sim, rounds, state=None):
    states, metrics = [], []
    for new, figures in sim.run(sim.init(PARAMS) if state is None else state, rounds):
        states.append(new)
        metrics.append(figures)
    return states, metrics


@pytest.mark.parametrize("clip", [100 * MEDIAN, MEDIAN / 100])
def test_bounds_find_the_median_from_far_away(corpus, clip):
    _, metrics = run(simulation(corpus, "global", clip, rate=0.5), 60)
    whole = NORMS * math.sqrt(1.25)
    bounds = clip * np.array([m.clip_scales[0] for m in metrics])
    assert abs(bounds[0] / clip - 1) < 1e-6  # the first round knows nothing yet
    assert np.quantile(whole, 0.35) < bounds[-15:].mean() < np.quantile(whole, 0.65)


def test_every_layer_has_its_own_bound_and_quantile(corpus):
    sim = simulation(corpus, "uniform", clip=20.0, votes=0.01, rate=0.5, quantile=0.8)
    _, metrics = run(sim, 60)
    scales = np.mean([m.clip_scales for m in metrics[-15:]], axis=0)
    a, b = 20.0 / math.sqrt(2) * scales
    assert np.quantile(NORMS, 0.7) < a < np.quantile(NORMS, 0.9)
    assert b == pytest.approx(a / 2, rel=0.1)
    clipped = np.mean([m.clipped for m in metrics[-15:]], axis=0)
    np.testing.assert_allclose(clipped, 0.2, atol=0.1)
    # Norms are reported in the update's own units.
    np.testing.assert_allclose(metrics[-1].norms[0], NORMS.mean(), rtol=0.2)


def test_a_round_is_the_mean_of_clipped_updates_and_the_votes_move_the_bound(corpus):
    """By hand, without noise on either query."""
    sim = simulation(corpus, "global", clip=3.0, votes=0.0, rate=0.3, quantile=0.6)
    states, metrics = run(sim, 2)
    sampler = sim.draws(states[0]).sampler
    bound, params = 3.0, 0.0
    for round, (state, figures) in enumerate(zip(states, metrics, strict=True)):
        users = sampler.cohort(round)
        whole = NORMS[users] * math.sqrt(1.25)
        sent = NORMS[users] * np.minimum(1, bound / whole)
        params -= sent.mean()
        assert float(state.params["a"][0]) == pytest.approx(params, rel=1e-5)
        assert figures.clip_scales[0] == pytest.approx(bound / 3.0, rel=1e-6)
        bound *= math.exp(-0.3 * (np.mean(whole <= bound) - 0.6))


def test_noise_follows_the_bound(corpus):
    """Zero updates leave the noise alone: std on the mean is bound * z / cohort, layer by layer."""
    mechanism = Mechanism(
        2.0, "uniform", 1.5, ShuffledSampler(USERS, 20, seed=0), adaptive=AdaptiveClip(1.0)
    )
    big = {"a": jnp.zeros(200_000), "b": jnp.zeros(200_000)}
    transform = mechanism.server_transform(jax.random.key(0), jax.random.key(1))
    state = transform.init(big)
    scales = jnp.float32([0.5, 3.0])
    state = (*state[:2], state[2]._replace(scales=scales))
    out, after = transform.update(big, state, clipped=jnp.zeros(2), clients=jnp.float32(0))
    for name, scale in zip("ab", scales, strict=True):
        assert np.std(out[name]) == pytest.approx(2.0 * 1.5 / 20 * float(scale), rel=0.01)
    assert (np.asarray(after[2].scales) != np.asarray(scales)).all()


def test_votes_have_the_stated_noise():
    """std of the share is z sqrt(m) / 2 / cohort, and one user changes the votes by sqrt(m) / 2."""
    m, cohort = 2, 20.0
    adapt = adapt_scales(AdaptiveClip(3.0, 0.5, rate=1.0), cohort, jax.random.key(0))

    def log_scales(clipped, clients, count):
        state = adapt.init(PARAMS)._replace(count=count)
        _, state = adapt.update(PARAMS, state, clipped=clipped, clients=clients)
        return jnp.log(state.scales)

    counts = jnp.arange(20_000, dtype=jnp.int32)
    draws = jax.vmap(lambda c: log_scales(jnp.zeros(2), 0.0, c))(counts)
    np.testing.assert_allclose(np.std(draws, axis=0), 3.0 * math.sqrt(m) / 2 / cohort, rtol=0.03)
    assert abs(np.corrcoef(np.asarray(draws).T)[0, 1]) < 0.05
    before = log_scales(jnp.float32([3, 4]), 10.0, jnp.int32(0))
    for vote in ([0, 0], [0, 1], [1, 1]):
        after = log_scales(jnp.float32([3, 4]) + jnp.float32(vote), 11.0, jnp.int32(0))
        moved = np.linalg.norm(np.asarray(after - before)) * cohort
        assert moved == pytest.approx(math.sqrt(m) / 2, rel=1e-3)


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1.0, 1e5])
def test_a_scaled_clip_is_a_clip_at_the_scaled_bound(budget, scale):
    rng = np.random.default_rng(0)
    delta = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in PARAMS.items()}
    make = clipping.clip_global if budget == "global" else clipping.clip_by_layer
    inner = make(0.8)
    scaled = clip_scaled(inner)
    view = ClientView(PARAMS, jnp.full(1 if budget == "global" else 2, scale, jnp.float32))
    out, state = scaled.update(delta, scaled.init(view))
    expected, reference = make(0.8 * scale).update(delta, inner.init(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a * scale, b, rtol=1e-5), out, expected)
    np.testing.assert_allclose(state.norms, reference.norms, rtol=1e-5)
    np.testing.assert_array_equal(state.clipped, reference.clipped)
    assert math.sqrt(sum(float(jnp.sum(x**2)) for x in out.values())) <= 0.8 * (1 + 1e-6)


def test_invalid_updates_have_no_vote(corpus):
    users = {f"u{i:02}": [{"norm": np.float32(np.nan if i % 2 else 1.0)}] for i in range(USERS)}
    sim = simulation(InMemoryCorpus(users), "global", clip=100.0, votes=0.0, rate=1.0)
    _, metrics = run(sim, 2)
    valid = 20 - metrics[0].invalid
    assert 0 < valid < 20
    # Half a vote for each valid user, none for the others.
    expected = math.exp(-(valid / 2 / 20 + 0.5 - 0.5))
    assert metrics[1].clip_scales[0] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_goes_on_with_its_bounds(corpus):
    sim = simulation(corpus, noise=0.5)
    states, _ = run(sim, 4)
    restored = sim.transfer(jax.device_get(states[1]))
    again, _ = run(sim, 2, restored)
    jax.tree.map(np.testing.assert_array_equal, again[-1], states[-1])


def test_the_votes_are_accounted_for():
    sampler = PoissonSampler(1000, 50, seed=0)
    plain = Mechanism(1.0, "uniform", 1.0, sampler)
    voting = dataclasses.replace(plain, adaptive=AdaptiveClip(5.0))
    event = voting.event(10)
    assert event.count == 10
    assert event.event.noise_multiplier == pytest.approx((1.0 + 1 / 25) ** -0.5)
    assert voting.epsilon(10, 1e-5).epsilon > plain.epsilon(10, 1e-5).epsilon
    deployed = voting.deployed(500, 10**5)
    assert deployed.adaptive.noise_multiplier == pytest.approx(50.0)
    assert deployed.noise_multiplier == pytest.approx(10.0)
    silent = dataclasses.replace(plain, noise_multiplier=0.0, adaptive=AdaptiveClip(0.0))
    assert silent.event(3).event == dp_accounting.NonPrivateDpEvent()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptiveClip(-1.0), "noise"),
        (lambda: AdaptiveClip(math.nan), "noise"),
        (lambda: AdaptiveClip(1.0, quantile=1.0), "quantile"),
        (lambda: AdaptiveClip(1.0, rate=0.0), "rate"),
        (lambda: _mechanism(math.inf, 0.0, AdaptiveClip(1.0)), "finite clip_norm"),
        (lambda: _mechanism(1.0, 1.0, AdaptiveClip(0.0)), "noise of their own"),
    ],
)
def test_mistakes_are_user_errors(make, match):
    with pytest.raises(UserError, match=match):
        make()


def _mechanism(clip, noise, adaptive):
    return Mechanism(clip, "global", noise, PoissonSampler(10, 2, 0), adaptive=adaptive)


def test_warm_up_moves_the_bounds_alone(corpus):
    sim = simulation(
        corpus, "global", 100 * MEDIAN, noise=0.5, votes=0.01, rate=0.1, warmup=4, warmup_rate=4.0
    )
    states, metrics = run(sim, 6)
    for state in states[:4]:
        jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert all(np.any(x) for x in jax.tree.leaves(states[4].params))
    scales = [float(m.clip_scales[0]) for m in metrics]
    # All users stay within bounds that are far too large: e^-2 a round, then e^-0.05.
    np.testing.assert_allclose(np.diff(np.log(scales[:3])), -2.0, atol=0.05)
    assert abs(np.log(scales[5] / scales[4])) <= 0.06
    with pytest.raises(UserError, match="warmup=-1"):
        AdaptiveClip(1.0, warmup=-1)


def test_a_held_optimiser_begins_as_if_nothing_had_been():
    optimizer = optax.adam(0.1)
    held = hold(optimizer, 2)
    state, plain = held.init(PARAMS), optimizer.init(PARAMS)
    noise = jax.tree.map(lambda p: np.full(p.shape, 1e3, np.float32), PARAMS)
    for _ in range(2):
        updates, state = held.update(noise, state, PARAMS)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    gradient = jax.tree.map(np.ones_like, noise)
    found, expected = held.update(gradient, state)[0], optimizer.update(gradient, plain)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
