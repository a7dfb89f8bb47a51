import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.data.batching import Chunk, ClientBatcher, LocalBatches, Store
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated import cohort as cohort_module
from fedasr.federated.client import local_training
from fedasr.federated.cohort import client_mesh, client_sharding, make_cohort
from fedasr.models.recogniser import make_recogniser
from fedasr.privacy.clipping import clip_by_layer, layer_names

STEPS, BATCH, SLOTS = 4, 2, 8
ROUND = np.int32(5)
CLIP = clip_by_layer(0.6)
PARAMS = {
    "w1": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "b1": np.zeros(4, np.float32),
    "w2": np.random.default_rng(1).normal(size=(4, 1)).astype(np.float32),
}


def noisy_mlp(params, batch, key):
    """A network whose input noise has a key per slot, so that padding must not move it."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(batch["mask"])))
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
    hidden = jnp.tanh((batch["x"] + 0.3 * noise) @ params["w1"] + params["b1"])
    values = jnp.sum((hidden @ params["w2"] - batch["y"]) ** 2, axis=-1)
    count = jnp.sum(batch["mask"])
    loss = jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.maximum(count, 1)
    return loss, {"examples": count.astype(jnp.int32)}


UPDATE = local_training(noisy_mlp, optax.sgd(0.2))


@functools.cache
def mlp_cohort(devices, in_turns=False):
    mesh = client_mesh(jax.devices()[:devices])
    return make_cohort(UPDATE, CLIP, mesh, in_turns=in_turns)


@jax.jit
def one_client(params, batches, num_steps, key):
    delta, metrics = UPDATE(params, batches, num_steps, key)
    clipped, stats = CLIP.update(delta, CLIP.init(params))
    return clipped, metrics, stats


def random_clients(seed, count, least_steps=0):
    """Clients as (user, num_steps, batches of STEPS x BATCH)."""
    rng = np.random.default_rng(seed)
    clients = []
    for user in rng.choice(1000, count, replace=False):
        mask = rng.random((STEPS, BATCH)) < 0.7
        mask[:, 0] = True
        scale = rng.choice([0.2, 1.0, 3.0])
        batches = {
            "x": (scale * rng.normal(size=(STEPS, BATCH, 3))).astype(np.float32),
            "y": rng.normal(size=(STEPS, BATCH, 1)).astype(np.float32),
            "mask": mask,
        }
        clients.append((int(user), int(rng.integers(least_steps, STEPS + 1)), batches))
    return clients


def python_loop(clients, params, round_key, one_client=one_client):
    """The cohort's sum, one client after the other, added up in float64."""
    total = jax.tree.map(lambda x: np.zeros(x.shape), params)
    sums = {"clients": 0, "steps": 0, "invalid": 0, "loss": 0.0, "norms": 0.0, "clipped": 0.0}
    examples = 0
    for user, num_steps, batches in clients:
        key = jax.random.fold_in(round_key, user)
        delta, metrics, stats = jax.device_get(one_client(params, batches, num_steps, key))
        sums["clients"] += num_steps > 0
        sums["steps"] += num_steps
        if num_steps == 0:
            continue
        if not stats.finite:
            sums["invalid"] += 1
            continue
        total = jax.tree.map(lambda t, d: t + d.astype(np.float64), total, delta)
        sums["loss"] += float(metrics.loss)
        sums["norms"] += stats.norms.astype(np.float64)
        sums["clipped"] += stats.clipped.astype(np.float64)
        examples += int(next(iter(metrics.aux.values())))
    return total, sums, examples


def cohort_sum(cohort, devices, clients, params, round_key, per_device, steps=STEPS, batch=BATCH):
    """The sum over chunks of per_device x devices slots; room beyond the data holds garbage."""
    mesh_sharding = client_sharding(client_mesh(jax.devices()[:devices]))
    slots = per_device * devices
    accumulator = None
    for start in range(0, max(len(clients), 1), slots):
        part = clients[start : start + slots]
        batches = {
            "x": np.full((slots, steps, batch, 3), np.nan, np.float32),
            "y": np.full((slots, steps, batch, 1), np.nan, np.float32),
            "mask": np.zeros((slots, steps, batch), bool),
        }
        num_steps, user = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        for i, (who, count, own) in enumerate(part):
            # Masked examples of a real batch are finite; padding steps and slots are garbage.
            for name in ("x", "y"):
                batches[name][i, :count] = 7.0
            for name, value in own.items():
                batches[name][i, :STEPS, :BATCH][:count] = value[:count]
            num_steps[i], user[i] = count, who
        chunk = Chunk(batches, num_steps, user, (num_steps > 0).astype(np.float32))
        chunk = jax.device_put(chunk, mesh_sharding)
        if accumulator is None:
            accumulator = cohort.zeros(params, chunk)
        accumulator = cohort.add(accumulator, params, chunk, round_key, ROUND)
    return jax.device_get(cohort.total(accumulator))


def assert_same_sum(result, expected, rtol=1e-5):
    total, sums, examples = expected
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, result.delta, total)

    def norm(tree):
        return np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))

    assert norm(difference) <= rtol * norm(total)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(result.delta))
    for name in ("clients", "steps", "invalid"):
        assert getattr(result, name) == sums[name]
    for name in ("loss", "norms", "clipped"):
        np.testing.assert_allclose(getattr(result, name), sums[name], rtol=1e-4, atol=1e-6)
    assert next(iter(result.aux.values())) == examples


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("chunk", "in_turns"), [(1, False), (3, False), (8, False), (3, True)])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, SLOTS), round=st.integers(0, 10**6))
@settings(deadline=None, max_examples=12)
def test_the_sum_equals_a_python_loop(chunk, in_turns, devices, seed, count, round):
    # A chunk of 8 clients is the whole cohort.
    round_key = jax.random.fold_in(jax.random.key(11), round)
    clients = random_clients(seed, count)
    expected = python_loop(clients, PARAMS, round_key)
    order = np.random.default_rng(seed + 1).permutation(count)
    shuffled = [clients[i] for i in order]
    cohort = mlp_cohort(devices, in_turns)
    result = cohort_sum(cohort, devices, shuffled, PARAMS, round_key, chunk)
    assert_same_sum(result, expected)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, SLOTS))
@settings(deadline=None, max_examples=12)
def test_more_room_for_steps_and_examples_changes_nothing(seed, count):
    round_key = jax.random.key(5)
    clients = random_clients(seed, count)
    expected = python_loop(clients, PARAMS, round_key)
    result = cohort_sum(mlp_cohort(1), 1, clients, PARAMS, round_key, 3, steps=7, batch=5)
    assert_same_sum(result, expected)


@pytest.mark.parametrize(("chunk", "in_turns"), [(1, False), (3, False), (3, True)])
def test_a_client_that_is_not_finite_adds_zero_and_is_counted(chunk, in_turns):
    round_key = jax.random.key(3)
    clients = random_clients(4, 6, least_steps=1)
    for bad, value in ((1, np.nan), (4, np.inf)):
        clients[bad][2]["x"][0, 0] = value
        clients[bad][2]["y"][0, 0] = value
    expected = python_loop(clients, PARAMS, round_key)
    assert expected[1]["invalid"] == 2
    good = [client for i, client in enumerate(clients) if i not in (1, 4)]
    cohort = mlp_cohort(1, in_turns)
    result = cohort_sum(cohort, 1, clients, PARAMS, round_key, chunk)
    assert_same_sum(result, expected)
    assert (result.clients, result.invalid) == (6, 2)
    alone = cohort_sum(cohort, 1, good, PARAMS, round_key, chunk)
    for a, b in zip(jax.tree.leaves(result.delta), jax.tree.leaves(alone.delta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.loss, alone.loss, rtol=1e-6)


def test_sums_over_devices_of_arrays_large_and_small(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = [(3, 2, 5), (3,), (3, 40), (3, 4, 1), (3, 0), (3,)]
    values = [rng.integers(-9, 9, shape).astype(np.float32) for shape in shapes]
    values[3], values[5] = values[3].astype(np.int32), values[5].astype(np.int32)
    for limit in (0, 40, 1 << 20):
        monkeypatch.setattr(cohort_module, "_TOGETHER_BYTES", limit)
        sums = cohort_module._sums_over_devices([jnp.asarray(x) for x in values])
        for x, found in zip(values, sums, strict=True):
            assert found.dtype == x.dtype
            np.testing.assert_array_equal(found, x.sum(axis=0))


def test_empty_slots_alone_add_exact_zeros():
    result = cohort_sum(mlp_cohort(2), 2, [], PARAMS, jax.random.key(0), 3)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


def test_randomness_belongs_to_the_user_and_the_round():
    ((_, _, batches),) = random_clients(0, 1, least_steps=2)

    def delta(user, round, place=0):
        clients = [(900 + i, 0, batches) for i in range(place)] + [(user, 2, batches)]
        key = jax.random.key(round)
        result = cohort_sum(mlp_cohort(1), 1, clients, PARAMS, key, 3)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(result.delta)])

    first = delta(user=1, round=1)
    np.testing.assert_array_equal(first, delta(user=1, round=1, place=2))
    others = [delta(user=2, round=1), delta(user=1, round=2), delta(user=2, round=2)]
    others += [delta(user=1 + far, round=1) for far in (256, 1000, 65_536)]
    for i, a in enumerate([first, *others]):
        for b in others[i:]:
            assert np.abs(a - b).max() > 1e-4


def test_weights_scale_the_deltas_only():
    clients = random_clients(8, 3, least_steps=1)
    chunk = Chunk(
        {name: np.stack([own[name] for _, _, own in clients]) for name in clients[0][2]},
        np.int32([steps for _, steps, _ in clients]),
        np.int32([user for user, _, _ in clients]),
        np.float32([0.5, 0.0, 2.0]),
    )
    cohort, key = mlp_cohort(1), jax.random.key(2)
    result = cohort.total(cohort.add(cohort.zeros(PARAMS, chunk), PARAMS, chunk, key, ROUND))
    alone = [python_loop([client], PARAMS, key) for client in clients]
    total = jax.tree.map(lambda a, b: 0.5 * a + 2.0 * b, alone[0][0], alone[2][0])
    assert_same_sum(result, (total, *python_loop(clients, PARAMS, key)[1:]))


# The same for a recogniser with everything random turned on.

# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = {"features": 16, "labels": 4}
LARGE = {"features": 27, "labels": 6}
LOCAL = LocalBatches(2, epochs=1)


@pytest.fixture(scope="module")
def recogniser():
    options = {
        "vocab": 6, "features": 8, "dim": 16, "blocks": 1, "heads": 2, "mlp": 16,
        "dropout": 0.3, "layer_drop": 0.5, "cape_shift": 1.0,
    }  # fmt: skip
    augment = SpecAugmentConfig(
        frequency_masks=1, frequency_width=3, time_masks=2, time_width=4, time_fraction=0.3
    )
    return make_recogniser("transformer", options, augment)


@pytest.fixture(scope="module")
def speech():
    rng = np.random.default_rng(2)

    def utterance():
        # Some of these have more labels than the stride of 3 leaves frames.
        return {
            "features": rng.normal(size=(rng.integers(8, 17), 8)).astype(np.float16),
            "labels": rng.integers(1, 6, rng.integers(1, 5)).astype(np.int32),
        }

    users = {f"u{i}": [utterance() for _ in range(size)] for i, size in enumerate([4, 1, 3, 2, 4])}
    return InMemoryCorpus(users)


def test_the_sum_of_a_recogniser_equals_a_python_loop(recogniser, speech, dense):
    update = local_training(recogniser.loss, optax.sgd(0.5))
    params = jax.jit(recogniser.init, compiler_options=COMPILER)(jax.random.key(0))
    round_key = jax.random.key(17)

    @functools.partial(jax.jit, compiler_options=COMPILER)
    def alone(params, batches, num_steps, key):
        delta, metrics = update(params, batches, num_steps, key)
        clipped, stats = CLIP.update(delta, CLIP.init(params))
        return clipped, metrics._replace(aux={"utterances": metrics.aux["utterances"]}), stats

    tight = ClientBatcher(speech, LOCAL, (SMALL,), 1, seed=0)
    clients = []
    for chunk, _ in tight.chunks(range(5), 3):
        batches = {name: value[0] for name, value in dense(chunk.batches).items()}
        if batches["mask"].shape[0] == 1:  # one shape, so that one program serves all
            batches = {name: np.concatenate([value] * 4) for name, value in batches.items()}
        clients.append((int(chunk.user[0]), int(chunk.num_steps[0]), batches))
    expected = python_loop(clients, params, round_key, alone)

    # Batches gathered on the device, larger buckets, chunks of 2 x 2 with empty slots, two devices.
    mesh = client_mesh(jax.devices()[:2])
    cohort = make_cohort(update, CLIP, mesh)
    accumulator = None
    for chunk, _ in ClientBatcher(speech, LOCAL, (LARGE,), 4, seed=0).chunks([4, 2, 0, 1, 3], 3):
        assert isinstance(chunk.batches, Store)
        chunk = jax.device_put(chunk, client_sharding(mesh))
        accumulator = cohort.zeros(params, chunk) if accumulator is None else accumulator
        lowered = cohort.add.lower(accumulator, params, chunk, round_key, ROUND)
        add = lowered.compile(compiler_options=COMPILER)
        accumulator = add(accumulator, params, chunk, round_key, ROUND)
    result = jax.device_get(cohort.total(accumulator))
    assert result.clipped.sum() > 0 and result.clients == 5
    assert len(result.norms) == len(layer_names(params))
    assert result.aux["infeasible"] + result.aux["utterances"] == speech.sizes.sum()
    result = result._replace(aux={"utterances": result.aux["utterances"]})
    assert_same_sum(result, expected)
