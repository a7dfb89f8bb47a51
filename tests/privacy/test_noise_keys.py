"""No random key is used twice: not by two rounds, leaves, devices, clients, nor after a resume.

The keys are those that the code under test really uses: the normal draws are replaced by the key's
own 64 bits, as four numbers below 2^16, and a client's update is made of the key that it gets and
of those that its loss gets.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training, take_batch
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy import noise
from fedasr.privacy.adaptive import AdaptiveClip, adapt_scales
from fedasr.privacy.correlated import BandedNoise
from fedasr.privacy.gaussian import add_gaussian_noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler

SEED, USERS, STEPS = 5, 4, 3


def digits(key):
    """The bits of a key as float32 [4], exactly."""
    data = jax.random.key_data(key)
    return jnp.concatenate([data & 0xFFFF, data >> 16]).astype(jnp.float32)


def distinct(keys):
    keys = np.asarray(keys).reshape(-1, 4)
    assert np.all((keys == np.round(keys)) & (keys >= 0) & (keys < 2**16))
    return len(keys) == len(np.unique(keys, axis=0))


@pytest.fixture
def noise_shows_its_key(monkeypatch):
    def drawn(key, size, reach):
        return jnp.tile(digits(key), -(-size // 4))[:size]

    monkeypatch.setattr(noise, "standard_normal", drawn)


def many_rounds():
    """Such that a count that is cut to some bits, or taken modulo some number, comes again."""
    powers = [b**k + i for b in (2, 10) for k in range(1, 31) for i in range(-2, 3)]
    found = {*range(20_000), *powers, *range(2**31 - 22, 2**31 - 2)}
    return np.array(sorted(n for n in found if 0 <= n < 2**31 - 1), np.int32)


@pytest.mark.parametrize("correlation", [None, BandedNoise(2, 9)])
def test_no_two_rounds_share_a_key(noise_shows_its_key, correlation):
    transform = add_gaussian_noise(1.0, jax.random.key(SEED), correlation)
    zeros = {"leaf": jnp.zeros(4)}
    state = transform.init(zeros)
    counts = many_rounds()

    def drawn(count):
        out, after = transform.update(zeros, state._replace(count=count))
        return out["leaf"], after.count

    keys, after = jax.vmap(drawn)(counts)
    assert keys.shape == (len(counts), 4)
    np.testing.assert_array_equal(after, counts + 1)
    if correlation is None:
        assert distinct(keys)
    else:  # the first of its rounds: nothing to take back, but a factor
        assert len(np.unique(keys, axis=0)) == len(keys)


def test_no_two_rounds_share_a_key_of_the_votes(noise_shows_its_key):
    """The noise on four votes is seen where the scales go: a monotonous function of the key."""
    adapt = adapt_scales(AdaptiveClip(1e-6, rate=1.0), 1.0, jax.random.key(SEED))
    params = {f"leaf{i}": jnp.zeros(1) for i in range(4)}
    state = adapt.init(params)
    counts = many_rounds()

    def drawn(count):
        _, after = adapt.update(
            params, state._replace(count=count), clipped=jnp.full(4, 0.5), clients=1.0
        )
        return after.scales, after.count

    scales, after = jax.vmap(drawn)(counts)
    np.testing.assert_array_equal(after, counts + 1)
    assert len(np.unique(np.asarray(scales), axis=0)) == len(counts)


def test_no_two_rounds_or_users_share_a_clients_key():
    simulation = key_simulation(1)
    counts = many_rounds()[::7]
    root = simulation.root_of(KEY_PARAMS)
    keys = [jax.random.key_data(simulation._round_key(c, root)) for c in counts[:300]]
    assert len({tuple(np.asarray(k).tolist()) for k in keys}) == 300
    by_round = jax.vmap(lambda c: jax.random.key_data(simulation._round_key_of(root, c)))(counts)
    assert len(np.unique(np.asarray(by_round), axis=0)) == len(counts)


def test_no_two_leaves_share_draws():
    """50 leaves of one shape in 4 rounds."""
    transform = add_gaussian_noise(1.0, jax.random.key(SEED))
    zeros = {f"leaf{i:02d}": jnp.zeros(4) for i in range(50)}
    state, drawn = transform.init(zeros), []
    for _ in range(4):
        out, state = transform.update(zeros, state)
        drawn += [np.asarray(x) for x in jax.tree.leaves(out)]
    assert np.unique(np.concatenate(drawn)).size == 4 * 50 * 4


def gradient_is_the_key(params, batch, key):
    """Each example has a row of its own: a client's every step shows its key there."""
    return params["steps"][batch["row"][0]] @ digits(key), {}


local = local_training(gradient_is_the_key, optax.sgd(1.0), grad_clip=None)


def update_of_keys(params, batches, num_steps, key, max_steps=None, round=0):
    delta, metrics = local(params, batches, num_steps, key, max_steps, round)
    user = take_batch(batches, 0)["row"][0] // STEPS
    return delta | {"users": delta["users"].at[user].set(digits(key))}, metrics


def key_simulation(devices):
    """Updates that hold keys are long: the bound is 1e10, the noise has deviation 1 on the mean."""
    rows = itertools.count()
    corpus = InMemoryCorpus({
        str(user): [{"row": np.int32(next(rows))} for _ in range(STEPS)] for user in range(USERS)
    })  # fmt: skip
    mechanism = Mechanism(1e10, "global", USERS * 1e-10, FixedSizeSampler(USERS, USERS, seed=0))
    return Simulation(
        corpus,
        mechanism,
        FedAvg(update_of_keys, optax.sgd(1.0)),
        Batching(1, epochs=1),
        hardware=Hardware(jax.devices()[:devices]),
        seed=SEED,
    )


# Beside the rows of users and of their examples there is one that holds noise only.
KEY_PARAMS = {
    "steps": np.zeros((USERS * STEPS + 1, 4), np.float32),
    "twin": np.zeros((1, 4), np.float32),
    "users": np.zeros((USERS + 1, 4), np.float32),
}


def keys_of(simulation, state, rounds):
    """Keys of all clients and their steps, and of all noise, by rounds; and the last state."""
    clients, drawn = [], []
    for _ in range(rounds):
        ((state, _),) = simulation.run(simulation.transfer(state._replace(params=KEY_PARAMS)), 1)
        mean = [-np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
        drawn.append([np.round(leaf[-1]) for leaf in mean])
        clients.append(np.concatenate([leaf[:-1] - leaf[-1] for leaf in mean]) * USERS)
    return np.round(clients), np.array(drawn), state


def test_clients_and_noise_never_share_a_key(noise_shows_its_key):
    rounds = 4
    one = key_simulation(1)
    clients, drawn, _ = keys_of(one, one.init(KEY_PARAMS), rounds)
    assert clients.shape == (rounds, USERS * (STEPS + 1), 4) and drawn.shape == (rounds, 3, 4)
    # One vector over all leaves: with draws that repeat after 4 they all show the round's key.
    assert (drawn == drawn[:, :1]).all()
    assert distinct(np.concatenate([clients.reshape(-1, 4), drawn[:, 0]]))

    # A resumed run, though on two devices, draws what would have come; the noise is added once.
    *_, state = keys_of(one, one.init(KEY_PARAMS), 1)
    saved = jax.tree.map(np.array, jax.device_get(state))
    rest = keys_of(key_simulation(2), saved, rounds - 1)
    np.testing.assert_array_equal(rest[0], clients[1:])
    np.testing.assert_array_equal(rest[1], drawn[1:])


def test_noise_has_the_same_bits_on_one_and_two_devices():
    corpus = InMemoryCorpus({str(i): [{"x": np.float32(0)}] for i in range(USERS)})
    mechanism = Mechanism(0.5, "global", 2.0, FixedSizeSampler(USERS, USERS, seed=0))
    # Updates of zero: the parameters move by the noise only.
    update = local_training(lambda p, b, k: (0.0 * p["a"].sum(), {}), optax.sgd(1.0))
    params = {"a": np.zeros((300, 4), np.float32)}
    results = []
    for devices in (1, 2):
        simulation = Simulation(
            corpus,
            mechanism,
            FedAvg(update, optax.sgd(1.0)),
            Batching(1, steps=1),
            hardware=Hardware(jax.devices()[:devices]),
            seed=SEED,
        )
        ((state, _),) = simulation.run(simulation.init(params), 1)
        results.append(np.asarray(state.params["a"]))
    np.testing.assert_array_equal(*results)
    assert np.std(results[0]) == pytest.approx(0.25, rel=0.1)  # C z / expected cohort, once
