"""A user's data has no say in how the updates of others are computed, down to their last bit.

Clipping bounds what a user adds to the sum. Nothing would bound what a user did to the rounding of
others' updates by being padded together with them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import (
    Batching,
    ClientBatcher,
    Grid,
    LocalBatches,
    Store,
    make_buckets,
    make_resident,
)
from fedasr.data.corpus import InMemoryCorpus, all_lengths
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Item, Simulation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler

GRID = Grid(2, {"x": 4, "y": 2}, {"y": 0.5})
ROUND, SEED = 3, 7
LAYOUTS = {
    "dense": ({"batch_size": 2, "steps": 3}, {}),
    "store": ({"batch_size": 2, "epochs": 2}, {}),
    "few steps": ({"batch_size": 2, "epochs": 3, "max_steps": 4}, {}),
    "frames": ({"frames": 40, "epochs": 2}, {}),
    "parts": ({"batch_size": 3, "epochs": 2}, {"micro_batch": 2}),
    "parts of frames": ({"frames": 40, "epochs": 2}, {"micro_batch": 2}),
    "resident": ({"batch_size": 2, "epochs": 2}, {"resident": True}),
    "resident parts": ({"frames": 40, "steps": 3}, {"micro_batch": 2, "resident": True}),
}


def examples(seed, lengths):
    rng = np.random.default_rng(seed)
    return [
        {
            "x": rng.normal(size=(frames, 3)).astype(np.float32),
            "y": rng.integers(1, 9, labels).astype(np.int32),
        }
        for frames, labels in lengths
    ]


def make_corpus(own, others):
    """The user 0 with examples of these (frames, labels), and others."""
    users = {"a": examples(0, own)}
    users |= {f"b{i:02d}": examples(1 + i, lengths) for i, lengths in enumerate(others)}
    return InMemoryCorpus(users, ragged=("x", "y"))


def computed(batches, row, num_steps):
    """Of a client: all batches, part by part, in the shapes in which they are computed."""
    if not isinstance(batches, Store):
        return [{name: x[row, step] for name, x in batches.items()} for step in range(num_steps)]
    assert (batches.parts[row, num_steps:] == 0).all()
    own_arrays = next(iter(batches.offsets.values())).ndim == 2  # [clients, examples]
    found = []
    for step in range(num_steps):
        for part in range(batches.parts[row, step]):
            kind = batches.kinds[row, step, part]
            size = {name: span.shape[1] for name, span in batches.spans[kind].items()}
            index = batches.index[row, step, part]
            assert (index[size[""] :] == -1).all()
            one = {"mask": index[: size[""]] >= 0}
            for name in batches.offsets:
                rows = batches.arrays[name][row] if own_arrays else batches.arrays[name]
                first = batches.offsets[name][row] if own_arrays else batches.offsets[name]
                length = batches.lengths[name][row] if own_arrays else batches.lengths[name]
                one[name] = np.zeros((size[""], size[name], *rows.shape[1:]), rows.dtype)
                for slot, i in enumerate(index[: size[""]]):
                    if i >= 0:
                        one[name][slot, : length[i]] = rows[first[i] : first[i] + length[i]]
            found.append(one)
    return found


def of_user(corpus, cohort, layout, grid=GRID, **options):
    """What is computed for user 0, all shapes of the chunk that it is in, and its own rows."""
    how, more = LAYOUTS[layout]
    more = dict(more) | options
    resident = None
    if more.pop("resident", False):
        resident = make_resident(corpus, make_buckets([corpus], 1, GRID.multiples))
    batcher = ClientBatcher(
        corpus, LocalBatches(**how), grid, seed=SEED, resident=resident,
        **{"chunk_size": 1} | more,
    )  # fmt: skip
    for chunk, _ in batcher.chunks(cohort, ROUND):
        for row in np.flatnonzero((chunk.user == 0) & (chunk.num_steps > 0)):
            shapes = [x.shape for x in jax.tree.leaves(chunk)]
            rows = [] if resident else [x[row] for x in jax.tree.leaves(chunk)]
            batches = chunk.batches
            if resident is not None:
                batches = batches._replace(**resident._asdict())
            return computed(batches, row, chunk.num_steps[row]), shapes, rows
    raise AssertionError("the user is not there")


def check_own(own, others, more, layout, grid=GRID, **options):
    few, many = make_corpus(own, others), make_corpus(own, more)
    alone = of_user(few, [0], layout, grid, **options)
    for corpus in (few, many):
        cohort = range(len(corpus.users))[::-1]
        found = of_user(corpus, cohort, layout, grid, **options)
        assert len(found[0]) == len(alone[0])
        assert found[1] == alone[1]  # one and the same program
        for a, b in zip(alone[0] + alone[2], found[0] + found[2], strict=True):
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


lengths = st.tuples(st.integers(1, 60), st.integers(0, 20))
people = st.lists(st.lists(lengths, min_size=1, max_size=8), min_size=1, max_size=5)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    own=st.lists(lengths, min_size=1, max_size=8),
    others=people,
    more=people,
    longer=st.integers(1, 400),
    side=st.sampled_from([(1, 1, 1), (2, 2, 1), (2, 2, 3), (3, 1, 1), (4, 2, 1)]),
)
@settings(deadline=None, max_examples=25)
def test_a_users_batches_are_a_function_of_its_own_data(layout, own, others, more, longer, side):
    chunk, devices, turns = side
    if "parts" in layout and chunk != devices:
        chunk, devices = 1, 1
    more = [[(longer, 5), *more[0]], *more[1:]]
    check_own(own, others, more, layout, chunk_size=chunk, devices=devices, turns=turns)


class OfEverybody(Grid):
    """The planted fault: the lengths follow from the longest of all users."""

    def cells(self, lengths):
        return ({name: int(values.max()) for name, values in lengths.items()},)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_global_maximum_is_noticed(layout):
    args = [(9, 2), (5, 3), (12, 1)], [[(8, 1)]], [[(100, 1)], [(7, 2)]], layout
    check_own(*args)
    with pytest.raises(AssertionError):
        check_own(*args, grid=OfEverybody(2, GRID.multiples, GRID.room))


@given(
    per_doubling=st.integers(1, 6),
    multiple=st.integers(1, 24),
    room=st.floats(0.05, 2.0),
    frames=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    labels=st.lists(st.integers(0, 900), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=100)
def test_the_grid_is_the_same_whatever_the_lengths(per_doubling, multiple, room, frames, labels):
    grid = Grid(per_doubling, {"x": multiple, "y": 2}, {"y": room})
    cells = grid.cells({"x": np.array(frames), "y": np.array(labels)})
    far = grid.cells({"x": np.array([*frames, 20_000]), "y": np.array(labels)})
    assert far[: len(cells)] == cells and far[-1]["x"] >= 20_000
    assert cells[0]["x"] == multiple and cells[-1]["x"] >= max(frames)
    for small, large in itertools.pairwise(far):
        assert small["x"] < large["x"] and small["y"] <= large["y"]
        exact = small["x"] * 2 ** (1 / per_doubling)
        assert large["x"] <= max(exact, small["x"]) + multiple
    assert all(cell["x"] % multiple == cell["y"] % 2 == 0 for cell in far)
    assert all(cell["y"] >= room * cell["x"] for cell in far)
    tops = grid.tops(cells)
    assert tops[-1] == len(cells) - 1
    doublings = [cells[top]["x"] for top in tops]
    assert doublings == [multiple << i for i in range(len(doublings))]


def test_grids_that_make_no_sense():
    with pytest.raises(UserError, match="at least 1"):
        Grid(0)
    with pytest.raises(UserError, match="no room for 'y'"):
        Grid(2, {"x": 1}, {"y": 0.0})
    with pytest.raises(UserError, match="no ragged array"):
        Grid(2, {"z": 1}).cells(all_lengths(make_corpus([(1, 1)], [])))


# ---------------------------------------------------------------------- the sum of clipped updates

CLIP = 0.1
PARAMS = {"a": 0.3 * jax.random.normal(jax.random.key(0), (3, 16)), "b": jnp.ones((16, 4)) / 4}


def loss(params, batch, key):
    """Products and sums along the padded axis, whose rounding depends on its length."""
    inside = jnp.arange(batch["x"].shape[1]) < batch["x_length"][:, None]
    hidden = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
    weights = jax.nn.softmax(jnp.where(inside, hidden[..., 0], -1e9), axis=1)
    pooled = jnp.sum(weights[..., None] * hidden, axis=1)
    error = jnp.sum((pooled - jnp.sum(batch["y"], axis=1, keepdims=True) / 9) ** 2, axis=1)
    mask = batch["mask"]
    return jnp.sum(jnp.where(mask, error, 0.0)) / jnp.maximum(jnp.sum(mask), 1), {}


def cohort_sum(corpus, cohort, layout, grid=GRID, chunk=1):
    """The cohort's sum of clipped updates, float64 [parameters]."""
    how, more = LAYOUTS[layout]
    more = dict(more)
    resident = None
    if more.pop("resident", False):
        resident = make_resident(corpus, make_buckets([corpus], 1, GRID.multiples))
    simulation = Simulation(
        corpus,
        Mechanism(CLIP, "global", 1.0, PoissonSampler(len(corpus.users), 4.0, seed=1)),
        FedAvg(local_training(loss, optax.sgd(0.5)), optax.sgd(1.0)),
        Batching(**how, **more, buckets=grid, resident=resident),
        hardware=Hardware(jax.devices()[:1], chunk=chunk),
        seed=SEED,
    )
    sums, key = None, simulation._round_key(np.int32(ROUND))
    for chunk, padding in simulation.batcher.chunks(cohort, ROUND):
        chunk = simulation._transfer(Item(chunk, padding)).chunk
        if sums is None:
            sums = simulation._cohort.zeros(PARAMS, chunk)
        sums = simulation._cohort.add(sums, PARAMS, chunk, key, np.int32(ROUND))
    total = jax.device_get(simulation._cohort.total(sums))
    assert total.clients == len(cohort) and total.invalid == 0
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(total.delta)])


def two_worlds():
    """7 users; in the second world user 0's longest utterance is 7 times as long."""
    rng = np.random.default_rng(5)
    others = [[(int(f), int(f) // 4) for f in rng.integers(33, 48, 4)] for _ in range(6)]
    own = [(40, 6), (31, 9)]
    return make_corpus(own, others), make_corpus([(280, 6), *own[1:]], others)


@pytest.mark.parametrize(
    ("layout", "chunk"), [("dense", 1), ("resident parts", 1), ("dense", 4), ("resident", 4)]
)
def test_a_longer_utterance_moves_no_others(layout, chunk):
    before, after = two_worlds()
    others = list(range(1, 7))
    first, second = (cohort_sum(w, others, layout, chunk=chunk) for w in (before, after))
    np.testing.assert_array_equal(first, second)
    assert np.linalg.norm(first) > CLIP
    # With the user the sums are added in another order: what the documents say of it holds.
    most = CLIP * (1 + 1e-6 + 7**2 / 2**24)
    for world in (before, after):
        moved = np.linalg.norm(cohort_sum(world, [0, *others], layout, chunk=chunk) - second)
        assert 0.1 * CLIP < moved <= most


def test_a_global_maximum_would_move_others(layout="dense"):
    before, after = two_worlds()
    grid = OfEverybody(2, GRID.multiples, GRID.room)
    first, second = (cohort_sum(w, range(1, 7), layout, grid) for w in (before, after))
    assert 0 < np.linalg.norm(first - second) < 0.1 * CLIP
