"""No two draws agree unless they are the same draw of the same run: every use has its stream.

Keys are recorded where random bits are really made: a PRNG implementation that calls back with each
key that it is asked for bits of, whoever asks, under jit and vmap.
"""

import contextlib
import copy
import functools
import itertools

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr import streams
from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.fields import flatten
from fedasr.models.recogniser import make_recogniser
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler
from fedasr.streams import Stream
from fedasr.training.builders.identities import run_identity
from fedasr.training.config import Config, default_config, fields
from fedasr.training.logging import to_json

ONE = jax.devices()[:1]
CORPUS = InMemoryCorpus({f"u{i}": [{"x": np.float32([i])}] * 3 for i in range(8)})
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros(5, np.float32)}
MODELS = {
    "transformer": {"dim": 16, "blocks": 2, "heads": 2, "mlp": 16, "vocab": 8},
    "conformer": {"dim": 16, "blocks": 1, "heads": 2, "vocab": 8},
    "recurrent": {"features": 4, "units": 6, "layers": 2, "window": 2, "stride": 1, "vocab": 8},
}
RNNT = (
    "transformer",
    MODELS["transformer"] | {"objective": "rnnt", "joint_dim": 8, "prediction_dim": 8},
)


def loss(params, batch, key):
    dropped = jax.random.bernoulli(key, 0.5, (5,))
    return jnp.sum(params["b"] * dropped) + params["w"].sum() * batch["x"].sum(), {}


def simulation(**options):
    options = {"seed": 3, "hardware": Hardware(ONE), **options}
    mechanism = options.pop("mechanism", None) or Mechanism(
        1.0, "uniform", 1.0, PoissonSampler(8, 4, 0), adaptive=AdaptiveClip(2.0)
    )
    update = local_training(loss, optax.sgd(0.1))
    corpus = options.pop("corpus", CORPUS)
    return Simulation(
        corpus, mechanism, FedAvg(update, optax.sgd(1.0)), Batching(2, steps=2), **options
    )


@pytest.fixture(scope="module")
def recorder():
    """Keys of which random bits were made, as (high, low), with how often; as a context."""
    seen: list[tuple[int, int]] = []

    def note(key):
        seen.append((int(key[0]), int(key[1])))

    threefry = jax.extend.random.threefry_prng_impl

    @contextlib.contextmanager
    def recording():
        seen.clear()
        yield seen

    def random_bits(key, bit_width, shape):
        jax.debug.callback(note, key)
        return threefry.random_bits(key, bit_width, shape)

    implementation = jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=threefry.seed,
        split=threefry.split,
        random_bits=random_bits,
        fold_in=threefry.fold_in,
        name="recorded",
        tag="rec",
    )
    return recording, implementation


@pytest.fixture
def recorded(recorder, monkeypatch):
    recording, implementation = recorder
    monkeypatch.setattr(jax.random, "key", functools.partial(jax.random.key, impl=implementation))
    wrap = jax.random.wrap_key_data
    monkeypatch.setattr(
        jax.random, "wrap_key_data", lambda data, impl=None: wrap(data, impl=implementation)
    )
    return recording


def drawn(recording, *actions):
    """The keys drawn from by each action."""
    found = []
    for action in actions:
        with recording() as seen:
            jax.block_until_ready(action())
            jax.effects_barrier()
            found.append(list(seen))
    return found


def rounds(sim, state, count):
    for state, _ in sim.run(state, count):  # noqa: B007
        pass
    return state


def test_tags_are_unique_and_no_counter_reaches_them():
    assert len({int(s) for s in Stream}) == len(Stream.__members__)
    assert all(2**31 <= s < 2**32 for s in Stream)


@pytest.mark.parametrize(("name", "options"), [*MODELS.items(), RNNT])
def test_initialisation_meets_no_stream_of_any_run(recorded, name, options):
    """With the models' own initialisers, for the seed of the run and its neighbours."""
    recogniser = make_recogniser(name, options)
    inits = drawn(
        recorded,
        *(lambda s=s: recogniser.init(streams.seed_key(s, Stream.INIT)) for s in range(3)),
    )
    # Initialisers that draw from a key of their own alone, in every run of a seed.
    assert len(inits[0]) > 5
    assert len({k for one in inits for k in one}) == len({*inits[0]}) * 3
    sim = simulation()
    (runs,) = drawn(recorded, lambda: rounds(sim, sim.init(PARAMS), 3).params)
    assert len(runs) > 10 and not {*runs} & {k for one in inits for k in one}


@pytest.mark.parametrize("adaptive", [None, AdaptiveClip(2.0)])
def test_no_key_is_drawn_from_twice_in_a_run(recorded, adaptive):
    mechanism = Mechanism(1.0, "uniform", 1.0, FixedSizeSampler(8, 4, 0), adaptive=adaptive)
    sim = simulation(mechanism=mechanism)
    (keys,) = drawn(recorded, lambda: rounds(sim, sim.init(PARAMS), 4).params)
    # 4 clients of 2 steps, one draw of noise and one for the votes a round.
    each = 4 * 2 + 1 + (adaptive is not None)
    assert len(keys) == 4 * each and len(set(keys)) == len(keys)


def test_no_two_streams_of_a_root_or_seed_agree():
    root = streams.make_root("a run")
    words = root.astype("<u4").tobytes()
    for make in (
        lambda s: tuple(np.asarray(jax.random.key_data(streams.key(root, s))).tolist()),
        lambda s: tuple(np.asarray(jax.random.key_data(streams.seed_key(3, s))).tolist()),
        lambda s: tuple(
            np.asarray(jax.random.key_data(streams.fold(jax.random.key(0), s))).tolist()
        ),
        lambda s: streams.sub_seed(root, s),
        lambda s: streams.sub_seed(root, s, "part"),
        lambda s: streams.generator(s, words).integers(2**62),
        lambda s: streams.generator(s, 0, 1).integers(2**62),
    ):
        assert len({make(stream) for stream in Stream}) == len(Stream)
    parts = [(), (0,), (1,), ("a",), (0, 1), (1, 0)]
    assert len({streams.sub_seed(root, Stream.SAMPLING, *p) for p in parts}) == len(parts)
    assert len({streams.generator(Stream.SAMPLING, *p).integers(2**62) for p in parts}) == 6


def test_a_secret_root_is_the_operating_systems_and_its_name_does_not_give_it_away(monkeypatch):
    asked = []

    def token_bytes(count):
        asked.append(count)
        return bytes(range(100, 100 + count))

    monkeypatch.setattr(streams.secrets, "token_bytes", token_bytes)
    root = streams.secret_root()
    assert asked == [32] and root.dtype == np.uint32 and root.shape == (8,)
    assert root.astype("<u4").tobytes() == bytes(range(100, 132))
    name = streams.public_name(root)
    assert len(name) == 16
    for shown in (root.astype("<u4"), root.astype(">u4")):
        text = shown.tobytes().hex()
        assert not any(name[i : i + 6] in text for i in range(11))


def variants():
    """Runs that differ in one thing each from the first."""
    moved = {**PARAMS, "b": np.full(5, 1e-7, np.float32)}
    larger = InMemoryCorpus({f"v{i}": [{"x": np.float32([i])}] * 3 for i in range(8)})
    noisier = Mechanism(1.0, "uniform", 1.5, PoissonSampler(8, 4, 0), adaptive=AdaptiveClip(2.0))
    seeded = Mechanism(1.0, "uniform", 1.0, PoissonSampler(8, 4, 1), adaptive=AdaptiveClip(2.0))
    return {
        "first": (simulation(), PARAMS),
        "another seed": (simulation(seed=4), PARAMS),
        "another configuration": (simulation(identity="row 2"), PARAMS),
        "another start": (simulation(), moved),
        "other users": (simulation(corpus=larger), PARAMS),
        "other noise": (simulation(mechanism=noisier), PARAMS),
        "another sampler": (simulation(mechanism=seeded), PARAMS),
    }


def test_runs_that_differ_in_anything_share_no_draw(recorded):
    found, cohorts = {}, {}
    for name, (sim, params) in variants().items():
        (keys,) = drawn(recorded, lambda: rounds(sim, sim.init(params), 2).params)  # noqa: B023
        draws = sim.draws(sim.init(params))
        found[name] = set(keys)
        cohorts[name] = [draws.sampler.cohort(r).tolist() for r in range(20)]
        plan = Batching(2, steps=9).plan(3, draws.order, 0, 0)
        cohorts[name].append(np.concatenate(plan).tolist())
    for a, b in itertools.combinations(found, 2):
        assert not found[a] & found[b], (a, b)
        same = [x == y for x, y in zip(cohorts[a], cohorts[b], strict=True)]
        assert sum(same) < 8, (a, b)  # of 20 cohorts, some small ones agree by chance
        assert not same[-1], (a, b)


def test_a_chained_run_shares_no_draw_with_its_parent(recorded):
    sim = simulation()
    first = sim.init(PARAMS)
    (keys,) = drawn(recorded, lambda: rounds(sim, first, 3).params)
    parent = jax.device_get(rounds(sim, sim.init(PARAMS), 3).params)
    child = sim.init(parent)
    (more,) = drawn(recorded, lambda: rounds(sim, child, 3).params)
    assert not {*keys} & {*more}


def test_the_same_run_again_resumed_or_halved_draws_the_same(recorded):
    sim = simulation()
    whole, again = drawn(
        recorded, *[lambda: rounds(sim, sim.init(PARAMS), 3).params for _ in range(2)]
    )
    assert sorted(whole) == sorted(again)
    saved = jax.device_get(rounds(sim, sim.init(PARAMS), 2))
    other = simulation(
        hardware=Hardware(ONE, chunk=2)
    )  # as after running out of memory, and in another process
    (rest,) = drawn(recorded, lambda: rounds(other, other.transfer(saved), 1).params)
    assert {*rest} <= {*whole}
    assert {*rest} != {*whole}


def test_a_secret_root_is_nobodys_and_kept_by_the_state(recorded):
    sim = simulation()
    roots = [streams.secret_root() for _ in range(2)]
    a, b, c = drawn(
        recorded,
        lambda: rounds(sim, sim.init(PARAMS), 2).params,
        lambda: rounds(sim, sim.init(PARAMS, roots[0]), 2).params,
        lambda: rounds(sim, sim.init(PARAMS, roots[1]), 2).params,
    )
    assert not {*a} & {*b} and not {*b} & {*c} and not {*a} & {*c}
    state = jax.device_get(sim.init(PARAMS, roots[0]))
    np.testing.assert_array_equal(state.root, roots[0])
    assert sim.draws(state).sampler != sim.draws(sim.init(PARAMS)).sampler


def test_a_state_without_a_root_is_refused():
    sim = simulation()
    with pytest.raises(UserError, match=r"Simulation\.init"):
        next(sim.run(sim.init(PARAMS)._replace(root=()), 1))


@pytest.mark.parametrize(
    "sampler",
    [PoissonSampler(9, 3, 0, cycle=3), FixedSizeSampler(9, 3, 0), ShuffledSampler(9, 3, 0)],
)
def test_samplers_take_any_seed_and_draw_by_it(sampler):
    big = 2**127 + 1
    cohorts = [
        [s.cohort(r).tolist() for r in range(9)]
        for s in (sampler, sampler.reseeded(big), sampler.reseeded(big + 1), sampler.reseeded(1))
    ]
    assert all(a != b for a, b in itertools.combinations(cohorts, 2))
    assert cohorts[1] == [sampler.reseeded(big).cohort(r).tolist() for r in range(9)]


def test_roots_tell_all_parts_apart():
    made = [
        streams.make_root(*parts).tobytes()
        for parts in ((1,), ("1",), (1, 0), (1, ""), ("1", "2"), ("12",), ("1", "2", ""), (b"1",))
    ]
    assert len(set(made)) == len(made)
    assert streams.make_root("a", 1).tobytes() == streams.make_root("a", np.int64(1)).tobytes()
    root = streams.make_root("x")
    assert root.dtype == np.uint32 and root.shape == (8,)
    # All 256 bits count.
    keys = set()
    for bit in range(256):
        other = root.copy()
        other[bit // 32] ^= np.uint32(1 << (bit % 32))
        keys.add(tuple(np.asarray(jax.random.key_data(streams.key(other, Stream.NOISE))).tolist()))
    assert len(keys) == 256
    assert streams.public_name(root) != streams.public_name(streams.make_root("y"))


def test_the_identity_of_a_configuration():
    config = {"data": {"dir": "a", "identity": "d"}, "init_from": "", "rounds": 5, "name": "n",
              "privacy": {"noise": "independent", "sigma": 1.0}}  # fmt: skip

    def changed(**more):
        other = copy.deepcopy(config)
        for path, value in more.items():
            *parents, last = path.split("__")
            functools.reduce(dict.__getitem__, parents, other)[last] = value
        return run_identity(Config.of(other))

    same = run_identity(Config.of(config))
    assert changed() == same
    # Where things lie, and how long it goes on, do not matter...
    assert changed(data__dir="b") == changed(init_from="c") == changed(rounds=9) == same
    # ... but all else does, and the length where the noise is made for it.
    assert len({same, changed(data__identity="e"), changed(name="m"), changed(privacy__sigma=2.0),
                changed(privacy__noise="banded"),
                changed(privacy__noise="banded", rounds=9)}) == 6  # fmt: skip


# Where things lie, how a run is looked at and kept, and how long it goes on.
NO_PART = {
    "data.dir", "init_from", "rounds", "seed_training.reuse", "evaluation.every_steps",
    "checkpoint.every_seconds", "checkpoint.deadline",
}  # fmt: skip
NO_SECTION = {"decoding", "selection"}


@pytest.mark.parametrize("section", sorted({name.split(".")[0] for name in flatten(fields())}))
def test_every_other_field_is_part_of_the_identity(section):
    """A field that is left out would have runs of two mechanisms share their noise."""
    same = run_identity(Config.of(to_json(default_config().to_dict())))
    for name in flatten(fields()):
        if name.split(".")[0] != section:
            continue
        config = to_json(default_config().to_dict())
        *parents, leaf = name.split(".")
        tree = functools.reduce(dict.__getitem__, parents, config)
        tree[leaf] = another(tree[leaf])
        left_out = name in NO_PART or section in NO_SECTION
        assert (run_identity(Config.of(config)) == same) == left_out, name


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {**value, "x": 1} if isinstance(value, dict) else [*value, "x"]
