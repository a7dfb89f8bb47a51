"""The server's step on stacked blocks is the step on each block's arrays, noise included."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr import stacks
from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.server import SERVER_OPTIMIZERS, by_block, make_optimizer
from fedasr.federated.simulation import Simulation
from fedasr.privacy import noise
from fedasr.privacy.correlated import BandedNoise
from fedasr.privacy.gaussian import add_gaussian_noise
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

pytestmark = pytest.mark.usefixtures("optimized")

BLOCKS = 12  # so that names are not in the order of numbers
KEY = jax.random.key(5)


def tree(seed, blocks=BLOCKS):
    """Arrays of different sizes before, in and behind the blocks by their names."""
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 10.0), jnp.float32)

    named = {f"block_{i}": {"a": drawn(3, 2), "n": {"b": drawn(2)}} for i in range(blocks)}
    return named | {"after": drawn(5), "final": drawn(3), "zed": {"c": drawn(2, 2)}}


def close(found, wanted, rtol=2e-6):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, wanted)


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_states_are_stacked_and_back():
    params = tree(0)
    state = optax.adam(0.1).init(params)
    stacked = stacks.stack_within((params, state, 3))
    assert stacks.is_stacked(stacked[0]) and stacks.is_stacked(stacked[1][0].mu)
    axes = [None, 0, 0, None, None]
    assert stacks.axes(stacked) == [*axes, None, *axes, *axes, None]  # with the count among them
    assert set(stacks.axes((params, state))) == {None}
    same(stacks.unstack_within(stacked), (params, state, 3))


@pytest.mark.parametrize("blocks", [1, 2, BLOCKS])
def test_a_block_gets_its_own_draws(blocks):
    """Equal to those without stacks, all different: nothing is drawn once for several blocks."""
    params = tree(0, blocks)
    plain = noise.normal_like(KEY, params, 8.0)
    found = noise.normal_like(KEY, stacks.stack(params), 8.0)
    same(stacks.unstack(found), plain)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
    assert len(np.unique(values)) == values.size == sum(x.size for x in jax.tree.leaves(params))


def test_noise_is_added_once_to_every_number():
    chain, params = add_gaussian_noise(2.0, KEY), tree(1)
    state = chain.init(params)
    for _ in range(2):
        plain, after = chain.update(params, state)
        found, again = chain.update(stacks.stack(params), state)
        same(stacks.unstack(found), plain)
        same(again, after)
        state = after


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_every_optimizer_treats_blocks_one_by_one(name):
    """Also those that look at the norm of an array, such as LAMB."""
    optimizer = make_optimizer(name, lambda count: 0.1 / (1 + count))
    update = jax.jit(optimizer.update)
    params = tree(2)
    state = optimizer.init(params)
    stacked, its_state = stacks.stack_within((params, state))
    for step in range(3):
        gradient = tree(10 + step)
        moves, state = update(gradient, state, params)
        params = optax.apply_updates(params, moves)
        moves, its_state = update(stacks.stack(gradient), its_state, stacked)
        stacked = optax.apply_updates(stacked, moves)
    close(stacks.unstack_within((stacked, its_state)), (params, state))


@pytest.mark.parametrize("optimizer", [optax.scale_by_factored_rms(min_dim_size_to_factor=2),
                                       optax.sm3(0.1, 0.9), optax.lamb(0.1)])  # fmt: skip
def test_a_state_that_is_made_of_stacks_is_that_of_each_block(optimizer):
    """As on clients; also where a state's form depends on the axes of an array."""
    every, params = by_block(optimizer), tree(4)
    state = every.init(params)
    stacked, its_state = stacks.stack(params), every.init(stacks.stack(params))
    same(its_state, stacks.stack_within(state))
    gradient = tree(5)
    moves, state = every.update(gradient, state, params)
    found, its_state = every.update(stacks.stack(gradient), its_state, stacked)
    close(stacks.unstack_within((found, its_state)), (moves, state))


def test_what_a_step_on_stacks_holds_counts(corpus, monkeypatch):
    """The state before and after, the one that was given out, the sum and its noise.

    Beside programs of clients that take nothing: here they would take more.
    """
    monkeypatch.setattr("fedasr.federated.simulation.program_bytes", lambda memory: 0)
    bytes_of = sum(x.nbytes for x in jax.tree.leaves(START))
    plain, found = (simulation(corpus, stacked).chunk_bytes(START) for stacked in (False, True))
    assert found >= 3 * 3 * bytes_of + 4 * bytes_of and plain >= 2 * 3 * bytes_of + 4 * bytes_of
    assert not stacks.can_stack({"block_0": {}, "final": jnp.ones(2)})


def test_what_looks_at_several_arrays_at_once_is_refused():
    params = stacks.stack(tree(0))
    joint = by_block(optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="batched"):
        joint.update(params, joint.init(params), params)


def loss(params, batch, key):
    del key
    params = stacks.unstack(params) if stacks.is_stacked(params) else params
    x = batch["x"]
    for i in range(BLOCKS):
        block = params[f"block_{i}"]
        x = x + jnp.tanh(jnp.pad(x @ block["a"], ((0, 0), (0, 1))) + block["n"]["b"].sum())
    score = x @ params["final"] + jnp.sum(params["after"]) + jnp.sum(params["zed"]["c"])
    error = jnp.where(batch["mask"], score - batch["y"], 0.0)
    return 0.5 * jnp.sum(error**2) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)

    def example():
        return {"x": rng.normal(size=3).astype(np.float32), "y": np.float32(rng.normal())}

    return InMemoryCorpus({f"user{i}": [example() for _ in range(2 + i % 2)] for i in range(6)})


def simulation(
    corpus, stacked, *, sigma=0.02, server="lamb", client="sgd", sampler=None, chunk=1, **options
):
    named = isinstance(server, str)
    return Simulation(
        corpus,
        Mechanism(0.5, "uniform", sigma, sampler or FixedSizeSampler(6, 4, seed=7), **options),
        FedAvg(
            local_training(loss, make_optimizer(client, 0.1)),
            make_optimizer(server, 0.01) if named else server,
        ),
        Batching(2, epochs=1),
        hardware=Hardware(jax.devices()[:1], chunk=chunk, stacked_blocks=stacked),
    )


START = jax.tree.map(lambda x: x * 0.1, tree(3))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    ("options", "singly"),
    [
        ({"client": "lars"}, False),
        ({"server": "adam", "weighting": "examples", "sigma": 0.0}, False),
        ({}, True),
    ],
)
def test_a_run_on_stacks_is_the_run_without(corpus, chunk, options, singly, monkeypatch):
    """singly: clients compute with each block's own arrays, as on a TPU."""
    plain = simulation(corpus, False, chunk=chunk, **options)
    found = simulation(corpus, True, chunk=chunk, **options)
    given = []
    monkeypatch.setattr(stacks, "one_by_one", lambda kind, blocks: given.append(blocks) or singly)
    assert found._steps_on_stacks and not plain._steps_on_stacks
    of_plain = list(plain.run(plain.init(START), 3))
    of_found = list(found.run(found.init(START), 3))
    for (state, metrics), (wanted, its) in zip(of_found, of_plain, strict=True):
        close(state, wanted, rtol=2e-4)
        np.testing.assert_allclose(metrics.norms, its.norms, rtol=1e-4)
    assert found._step._cache_size() == 1 and found.compilations() == plain.compilations()
    assert set(given) == {BLOCKS}


def test_a_run_goes_on_bit_by_bit_from_what_it_gave(corpus):
    """What is given between rounds, and saved, has each block's arrays."""
    sim = simulation(corpus, True)
    states = [jax.device_get(state) for state, _ in sim.run(sim.init(START), 4)]
    assert all(stacks.can_stack(state.params) for state in states)
    again = simulation(corpus, True)
    resumed = [state for state, _ in again.run(again.transfer(states[1]), 2)]
    same(jax.device_get(resumed[-1]), states[-1])


def test_a_round_with_nobody_has_the_same_noise(corpus):
    nobody = PoissonSampler(6, 1e-9, seed=1)
    moved = []
    for stacked in (False, True):
        sim = simulation(corpus, stacked, sampler=nobody, server="sgd", sigma=1.0)
        ((state, metrics),) = sim.run(sim.init(START), 1)
        assert metrics.clients == 0
        moved.append(state.params)
    close(moved[1], moved[0])
    assert all(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved[1], START)), strict=True)
    )


def test_parameters_are_stacked_once_a_round_where_the_server_has_them_singly(corpus):
    """As with an optimiser of one's own, which may draw, or look at several arrays."""
    server = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.01))
    plain, found = (simulation(corpus, stacked, server=server) for stacked in (False, True))
    assert not found._steps_on_stacks
    ready, given = found._cohort.ready, []

    def counted(params):
        given.append(ready(params))
        return given[-1]

    found._cohort = found._cohort._replace(ready=counted)
    runs = [[state.params for state, _ in s.run(s.init(START), 2)] for s in (plain, found)]
    assert len(given) == 2 and all(map(stacks.is_stacked, given))  # four chunks each
    close(runs[1][-1], runs[0][-1], rtol=2e-4)


def test_correlated_noise_has_the_server_without_stacks(corpus):
    given = {"sampler": ShuffledSampler(6, 2, seed=1), "correlation": BandedNoise(2, 4)}
    assert not simulation(corpus, True, **given)._steps_on_stacks


def test_the_noise_of_a_round_has_the_scale_that_is_claimed(corpus):
    """Of what the parameters become, all numbers of all blocks together."""
    sim = simulation(corpus, True, sigma=8.0, server="sgd", sampler=PoissonSampler(6, 1e-9, seed=1))
    moved = [START, *(state.params for state, _ in sim.run(sim.init(START), 40))]
    steps = [jax.tree.map(jnp.subtract, a, b) for a, b in itertools.pairwise(moved)]
    values = np.concatenate([np.ravel(x) for step in steps for x in jax.tree.leaves(step)])
    wanted = 0.01 * sim.mechanism.noise_std
    assert abs(np.std(values) / wanted - 1) < 4 / math.sqrt(2 * values.size)
    of_blocks = np.array(
        [[np.ravel(step[f"block_{i}"]["a"]) for step in steps] for i in range(BLOCKS)]
    ).reshape(BLOCKS, -1)
    among = np.corrcoef(of_blocks)[~np.eye(BLOCKS, dtype=bool)]
    assert np.abs(among).max() < 5 / math.sqrt(of_blocks.shape[1])
