import itertools
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import (
    ClientBatcher,
    LocalBatches,
    Padding,
    PooledBatcher,
    Prefetcher,
    Store,
    arrays,
    best_boundaries,
    eval_batches,
    fitting_bucket,
    make_buckets,
    pack,
    pack_sorted,
    round_up,
    rounded_slots,
)
from fedasr.data.batching import clients as chunking
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError

MULTIPLES = {"features": 4, "labels": 2}


def speech_corpus(sizes, seed=0, longest=20):
    """Ragged examples that carry their own identity: features are filled with 1000 user + index."""
    rng = np.random.default_rng(seed)
    users = {}
    for user, size in enumerate(sizes):
        users[f"user{user:03d}"] = [
            {
                "features": np.full((rng.integers(1, longest), 2), 1000 * user + i + 1, np.float32),
                "labels": rng.integers(1, 30, rng.integers(1, 8)).astype(np.int32),
                "id": np.int32(1000 * user + i),
            }
            for i in range(size)
        ]
    return InMemoryCorpus(users, ragged=("features", "labels"))


sizes_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(
    size=st.integers(1, 40),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 10**6),
    user=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_every_epoch_holds_each_example_once(size, batch, epochs, seed, round, user):
    local = LocalBatches(batch, epochs=epochs)
    plan = local.plan(size, seed, round, user)
    per_epoch = -(-size // batch)
    assert len(plan) == epochs * per_epoch
    for start in range(0, len(plan), per_epoch):
        epoch = plan[start : start + per_epoch]
        assert sorted(np.concatenate(epoch)) == list(range(size))
        assert all(len(b) == batch for b in epoch[:-1])
    again = local.plan(size, seed, round, user)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


@given(size=st.integers(1, 40), batch=st.integers(1, 9), steps=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_steps_are_full_batches_from_whole_passes(size, batch, steps):
    plan = LocalBatches(batch, steps=steps).plan(size, 1, 2, 3)
    full = min(batch, size)
    assert [len(b) for b in plan] == [full] * steps
    stream = np.concatenate(plan)
    for start in range(0, len(stream), size):
        seen = stream[start : start + size]
        assert len(set(seen)) == len(seen)
    counts = np.bincount(stream, minlength=size)
    assert counts.max() - counts.min() <= 1


def test_the_order_of_examples_differs_by_seed_round_and_user():
    local = LocalBatches(8, epochs=1)
    orders = {
        tuple(np.concatenate(local.plan(30, *where)))
        for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    }
    assert len(orders) == 5


def test_max_steps_limits_epochs():
    whole = LocalBatches(2, epochs=3).plan(5, 0, 0, 0)
    cut = LocalBatches(2, epochs=3, max_steps=4).plan(5, 0, 0, 0)
    assert len(whole) == 9 and len(cut) == 4
    assert all(np.array_equal(a, b) for a, b in zip(cut, whole, strict=False))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 1, "steps": 1, "epochs": 1},
        {"batch_size": 0, "steps": 1},
        {"batch_size": 1, "steps": 0},
        {"batch_size": 1, "epochs": 0},
        {"batch_size": 1, "epochs": 1, "max_steps": 0},
    ],
)
def test_unusable_local_batches(options):
    with pytest.raises(UserError):
        LocalBatches(**options)


@given(sizes=sizes_strategy, count=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_buckets_hold_everything_in_ascending_order(sizes, count, seed):
    corpora = [speech_corpus(sizes, seed), speech_corpus(sizes[:1], seed + 1)]
    buckets = make_buckets(corpora, count, MULTIPLES)
    assert 1 <= len(buckets) <= count
    for bucket in buckets:
        assert all(bucket[name] % multiple == 0 for name, multiple in MULTIPLES.items())
    for small, large in itertools.pairwise(buckets):
        assert small != large and all(small[n] <= large[n] for n in MULTIPLES)
    lengths = {
        name: np.concatenate([c.lengths(u)[name] for c in corpora for u in range(len(c.users))])
        for name in MULTIPLES
    }
    for name, multiple in MULTIPLES.items():
        assert buckets[-1][name] == round_up(lengths[name].max(), multiple)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30).map(np.array),
    count=st.integers(1, 4),
)
@settings(deadline=None, max_examples=200)
def test_no_boundaries_pad_less(lengths, count):
    def padded(boundaries):
        return sum(min(b for b in boundaries if b >= length) for length in lengths)

    found = best_boundaries(lengths, count)
    assert found == sorted(set(found)) and len(found) <= count and found[-1] == lengths.max()
    others = set(lengths.tolist()) - {int(lengths.max())}
    best = min(
        padded([*some, lengths.max()])
        for number in range(count)
        for some in itertools.combinations(others, number)
    )
    assert padded(found) == best


def test_boundaries_of_very_many_lengths_are_near_the_best():
    lengths = np.random.default_rng(0).integers(1, 100_001, 5000)
    found = best_boundaries(lengths, 4)
    padded = np.array(found)[np.searchsorted(found, lengths)]
    # Uniform lengths: the best boundaries are quarters, with 5/8 of the longest on average.
    assert padded.mean() == pytest.approx(100_000 * 5 / 8, rel=0.01)
    assert found[-1] >= lengths.max()


def test_bucket_shapes_of_a_known_corpus():
    users = {
        "u": [{"a": np.zeros(n), "b": np.zeros(m)} for n, m in [(1, 9), (2, 3), (5, 3), (30, 4)]]
    }
    corpus = InMemoryCorpus(users)
    assert make_buckets([corpus], 2) == ({"a": 8, "b": 16}, {"a": 32, "b": 16})
    assert make_buckets([corpus], 2, {"a": 1, "b": 1}) == ({"a": 5, "b": 9}, {"a": 30, "b": 9})
    # The array named first orders the examples.
    assert make_buckets([corpus], 2, {"b": 1, "a": 1}) == ({"a": 30, "b": 4}, {"a": 30, "b": 9})


def test_no_buckets_without_ragged_arrays():
    corpus = InMemoryCorpus({"u": [{"x": np.zeros(3)}, {"x": np.ones(3)}]})
    assert make_buckets([corpus]) == ()


def test_unknown_ragged_array_is_named():
    with pytest.raises(UserError, match="nothing"):
        make_buckets([speech_corpus([1])], multiples={"nothing": 8})


def test_fitting_bucket_is_the_smallest():
    buckets = ({"a": 4, "b": 2}, {"a": 8, "b": 2}, {"a": 8, "b": 6})
    assert fitting_bucket(buckets, {"a": 4, "b": 2}) == 0
    assert fitting_bucket(buckets, {"a": 5, "b": 1}) == 1
    assert fitting_bucket(buckets, {"a": 1, "b": 3}) == 2
    with pytest.raises(UserError, match="none of the buckets"):
        fitting_bucket(buckets, {"a": 9, "b": 1})


@given(
    sizes=sizes_strategy,
    chunk_size=st.integers(1, 5),
    count=st.integers(1, 3),
    batch=st.integers(1, 3),
    epochs=st.booleans(),
    round=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_chunks_hold_exactly_the_plan(dense, sizes, chunk_size, count, batch, epochs, round, seed):
    corpus = speech_corpus(sizes, seed)
    local = LocalBatches(batch, **({"epochs": 2} if epochs else {"steps": 3}))
    buckets = make_buckets([corpus], count, MULTIPLES)
    batcher = ClientBatcher(corpus, local, buckets, chunk_size, seed)
    users = list(range(0, len(sizes), 2)) or [0]
    met, work = [], []
    for chunk, padding in batcher.chunks(users, round):
        batches, num_steps = dense(chunk.batches), chunk.num_steps
        assert isinstance(chunk.batches, Store) == epochs
        real = 0
        shape = batches["mask"].shape
        assert shape[0] == chunk_size == len(num_steps) == len(chunk.user) == len(chunk.weight)
        assert shape[2] == batch
        assert np.array_equal(chunk.weight, num_steps > 0)
        clients = int((num_steps > 0).sum())
        assert clients and np.all(num_steps[:clients] > 0)  # empty slots come last
        frames, labels = batches["features"].shape[3], batches["labels"].shape[3]
        bucket = {"features": frames, "labels": labels}
        assert bucket in buckets
        needed = 0
        for slot in range(clients):
            user = int(chunk.user[slot])
            met.append(user)
            plan = local.plan(sizes[user], seed, round, user)
            assert num_steps[slot] == len(plan)
            own = 0
            for step in range(shape[1]):
                indices = plan[step] if step < len(plan) else []
                assert batches["mask"][slot, step].sum() == len(indices)
                for position in range(batch):
                    at = (slot, step, position)
                    if position >= len(indices):
                        assert not batches["mask"][at] and not batches["features"][at].any()
                        assert not batches["labels"][at].any()
                        assert batches["features_length"][at] == batches["labels_length"][at] == 0
                        continue
                    example = corpus.get(user, [int(indices[position])])[0]
                    assert batches["mask"][at] and batches["id"][at] == example["id"]
                    for name in bucket:
                        length = batches[f"{name}_length"][at]
                        assert length == len(example[name])
                        assert np.array_equal(batches[name][at][:length], example[name])
                        assert not batches[name][at][length:].any()
                    real += len(example["features"])
                    lengths = {name: len(example[name]) for name in bucket}
                    own = max(own, fitting_bucket(buckets, lengths))
            needed = max(needed, own)
            work.append((own, len(plan)))
        assert not batches["mask"][clients:].any()
        assert bucket == buckets[needed]
        assert padding.real == real
        assert padding.computed == chunk_size * num_steps.max() * batch * frames
        assert padding.fraction == pytest.approx(1 - real / padding.computed)
    assert sorted(met) == users
    assert work == sorted(work, reverse=True)  # the most work first


@pytest.mark.parametrize("options", [{"steps": 3}, {"epochs": 2}])
@pytest.mark.parametrize("keep", [None, ("features", "labels")])
@pytest.mark.parametrize(("side_by_side", "turns"), [(6, 1), (3, 2)])
def test_processes_read_their_own_rows_and_no_others(options, keep, side_by_side, turns):
    """Put together they are the chunks of a single process; empty slots among them."""
    corpus = speech_corpus([1, 4, 2, 3, 6])
    read = []

    class Watched(InMemoryCorpus):
        def get(self, user, indices):
            read.append(user)
            return corpus.get(user, indices)

    sizes = corpus.sizes
    watched = Watched(
        {u: corpus.get(i, range(sizes[i])) for i, u in enumerate(corpus.users)},
        ragged=("features", "labels"),
    )
    buckets, local = make_buckets([corpus], 2, MULTIPLES), LocalBatches(2, **options)

    def chunks(rows=None):
        batcher = ClientBatcher(
            watched, local, buckets, side_by_side, 0, keep, 3, rows=rows, turns=turns
        )
        return list(batcher.chunks(range(5), 1)) + list(batcher.chunks([2], 1))

    whole = chunks()
    read.clear()
    parts = []
    boundary = side_by_side // 3
    for rows in (slice(0, boundary), slice(boundary, side_by_side)):
        parts.append(chunks(rows))
        own = slice(rows.start * turns, rows.stop * turns)
        found = {int(user) for chunk, _ in whole for user in chunk.user[own]}
        # Arrays that hold none of a process's rows need names and dtypes: one user's, or those of
        # user 2, who is alone in the last chunk.
        assert len(set(read) - found - {2}) <= 1
        read.clear()
    for (chunk, padding), *several in zip(whole, *parts, strict=True):
        assert {part_padding for _, part_padding in several} == {padding}
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *(part for part, _ in several))
        assert jax.tree.structure(joined) == jax.tree.structure(chunk)
        jax.tree.map(np.testing.assert_array_equal, joined, chunk)


@pytest.mark.parametrize("options", [{"steps": 3}, {"epochs": 2}])
@pytest.mark.parametrize("rows", [None, slice(1, 2)])
def test_turns_are_the_next_chunks_side_by_side(dense, options, rows):
    """Each device has its clients of several chunks of one shape, in their order."""
    corpus = speech_corpus([1, 4, 2, 3, 6, 5, 2, 1, 3], seed=1)
    buckets, local = make_buckets([corpus], 2, MULTIPLES), LocalBatches(2, **options)
    users, turns, own = range(8, -1, -1), 2, range(2)[rows or slice(0, 2)]

    def chunks(turns):
        weights = np.linspace(0.1, 0.9, 9)  # each user's own
        batcher = ClientBatcher(
            corpus, local, buckets, 2, 0, devices=2, weights=weights, rows=rows, turns=turns
        )
        return list(batcher.chunks(users, 1))

    def clients(chunk):
        batches = dense(chunk.batches)
        for row, steps in enumerate(chunk.num_steps):
            data = {name: value[row, :steps] for name, value in batches.items()}
            yield int(chunk.user[row]), int(steps), float(chunk.weight[row]), data

    def frames(chunk):
        return dense(chunk.batches)["features"].shape[3]

    single, several = chunks(1), chunks(turns)
    assert len({frames(chunk) for chunk, _ in single}) == 2  # a boundary between shapes
    assert len(several) < len(single)
    assert sum(p.real for _, p in several) == sum(p.real for _, p in single)
    assert sum(p.computed for _, p in several) == sum(p.computed for _, p in single)
    left = [chunk for chunk, _ in single if chunk.num_steps.any()]  # on these rows
    for chunk, _ in several:
        assert len(chunk.num_steps) == turns * len(own)
        found = list(clients(chunk))
        for turn in range(turns):
            rows_of_turn = found[turn::turns]
            if not any(steps for _, steps, _, _ in rows_of_turn):
                continue  # nobody left of this shape: all slots empty
            before = left.pop(0)
            assert frames(before) == frames(chunk)
            for (user, steps, weight, data), expected in zip(
                rows_of_turn, clients(before), strict=True
            ):
                assert (user, steps, weight) == expected[:3]
                jax.tree.map(np.testing.assert_array_equal, data, expected[3])
    assert not [chunk for chunk in left if chunk.num_steps.any()]


@pytest.mark.parametrize("options", [{"epochs": 2}, {"steps": 3}])
@pytest.mark.parametrize("rows", [None, slice(1, 2)])
def test_what_memory_held_before_is_nowhere(options, rows, monkeypatch):
    """Chunks are the same whatever fills the arrays that they are written into."""
    corpus = speech_corpus([1, 5, 2, 3, 4])
    buckets = make_buckets([corpus], 2, MULTIPLES)
    room = arrays.unfilled

    def chunks(filling):
        def filled(*args):
            array = room(*args)
            array.view(np.uint8).fill(filling)
            return array

        monkeypatch.setattr(arrays, "unfilled", filled)
        batcher = ClientBatcher(
            corpus, LocalBatches(2, **options), buckets, 2, 0, devices=2, rows=rows, turns=2
        )
        return jax.tree.leaves([chunk for chunk, _ in batcher.chunks(range(5), 0)])

    first, second = chunks(0x00), chunks(0xFF)  # the latter is NaN in floats
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("turns", [1, 4])
def test_devices_have_like_work(turns):
    """Of 16 clients with 1 to 16 batches each of two devices gets as many, within one."""
    corpus = speech_corpus(range(1, 17))
    buckets = make_buckets([corpus])
    batcher = ClientBatcher(
        corpus, LocalBatches(1, epochs=1), buckets, 2, 0, devices=2, turns=turns
    )
    steps = np.zeros(2, int)
    for chunk, _ in batcher.chunks(range(16), 0):
        steps += chunk.num_steps.reshape(2, -1).sum(axis=1)
    assert steps.sum() == 136
    assert abs(steps[0] - steps[1]) <= 1


@pytest.mark.parametrize("options", [{"steps": 3}, {"epochs": 2}])
def test_turns_are_few_where_clients_have_much_data(options, monkeypatch):
    corpus = speech_corpus([9, 9, 9, 9])
    buckets, local = make_buckets([corpus]), LocalBatches(2, **options)

    def rows():
        batcher = ClientBatcher(corpus, local, buckets, 1, 0, turns=4)
        return [len(chunk.user) for chunk, _ in batcher.chunks(range(4), 0)]

    assert rows() == [4]
    ((chunk, _),) = ClientBatcher(corpus, local, buckets, 1, 0, turns=4).chunks(range(4), 0)
    data = chunk.batches.arrays if isinstance(chunk.batches, Store) else chunk.batches
    each = sum(data[name].nbytes for name in ("features", "labels", "id")) // 4
    monkeypatch.setattr(chunking, "TURN_BYTES", 2 * each)
    assert rows() == [2, 2]
    monkeypatch.setattr(chunking, "TURN_BYTES", 1)
    assert rows() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="turns"):
        ClientBatcher(corpus, local, buckets, 4, 0, turns=2)


@pytest.mark.parametrize("options", [{"steps": 1}, {"epochs": 1}])
def test_buckets_of_arrays_that_do_not_vary(options):
    corpus = InMemoryCorpus({f"u{i}": [{"x": np.ones((5, 2), np.float32)}] * 2 for i in range(3)})
    assert not corpus.lengths(0)
    batcher = ClientBatcher(corpus, LocalBatches(2, **options), [{"x": 8}], 2, 0)
    chunks = list(batcher.chunks(range(3), 0))
    assert [padding.real for _, padding in chunks] == [20, 10]
    one = batcher.example_chunk(range(3), 0)
    whole = chunks[0][0]
    assert jax.tree.map(lambda x: x[:1].shape, whole) == jax.tree.map(lambda x: x.shape, one)
    assert batcher.example_chunk([], 0) is None


def test_step_slots_are_few():
    corpus = speech_corpus([1, 2, 3, 5, 6, 6])
    batcher = ClientBatcher(corpus, LocalBatches(1, epochs=1), make_buckets([corpus]), 1, 0)
    chunks = [chunk for chunk, _ in batcher.chunks(range(6), 0)]
    assert [int(c.num_steps[0]) for c in chunks] == [6, 6, 5, 3, 2, 1]
    assert [c.batches.index.shape[1] for c in chunks] == [16, 16, 16, 4, 4, 4]


def test_only_the_kept_arrays_are_read():
    corpus = speech_corpus([2])
    batcher = ClientBatcher(
        corpus, LocalBatches(1, steps=1), make_buckets([corpus]), 1, 0, select=("features",)
    )
    chunk, padding = next(batcher.chunks([0], 0))
    assert set(chunk.batches) == {"features", "features_length", "mask"}
    assert padding.real == chunk.batches["features_length"].sum() > 0


def test_chunk_size_must_be_positive():
    with pytest.raises(UserError, match="chunk"):
        ClientBatcher(speech_corpus([1]), LocalBatches(1, steps=1), (), 0, 0)


def test_padding_adds_up():
    total = Padding(3, 4) + Padding(1, 6)
    assert total == Padding(4, 10) and total.fraction == pytest.approx(0.6)
    assert Padding(0, 0).fraction == 0.0


@given(sizes=sizes_strategy, batch=st.integers(1, 5), count=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_evaluation_meets_each_example_once(sizes, batch, count):
    corpus = speech_corpus(sizes)
    buckets = make_buckets([corpus], count, MULTIPLES)
    ids, shapes = [], set()
    for batches in eval_batches(corpus, buckets, batch):
        assert len(batches["mask"]) == batch and batches["mask"].any()
        ids += batches["id"][batches["mask"]].tolist()
        shapes.add(batches["features"].shape)
        for i in np.flatnonzero(batches["mask"]):
            user, index = divmod(int(batches["id"][i]), 1000)
            example = corpus.get(user, [index])[0]
            length = batches["features_length"][i]
            assert np.array_equal(batches["features"][i, :length], example["features"])
            assert not batches["features"][i, length:].any()
    assert sorted(ids) == [1000 * u + i for u, size in enumerate(sizes) for i in range(size)]
    assert len(shapes) <= count


@given(sizes=sizes_strategy, batch=st.integers(1, 7), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_a_pooled_pass_repeats_nothing(sizes, batch, seed):
    corpus = speech_corpus(sizes)
    buckets = make_buckets([corpus], 2, MULTIPLES)
    total = sum(sizes)
    full = min(batch, total)
    per_pass = total // full
    batcher = PooledBatcher(corpus, buckets, seed, batch_size=batch, multiple=3)
    orders = []
    for start in (0, per_pass):
        batches = [batcher.batch(step) for step in range(start, start + per_pass)]
        for b in batches:
            assert len(b["mask"]) == -(-batch // 3) * 3 and b["mask"].sum() == full
            need = {n: int(b[f"{n}_length"].max()) for n in MULTIPLES}
            shape = {n: b[n].shape[1] for n in MULTIPLES}
            assert shape == buckets[fitting_bucket(buckets, need)]
        ids = [int(i) for b in batches for i in b["id"][b["mask"]]]
        assert len(set(ids)) == len(ids) == per_pass * full
        every = {1000 * u + i for u, size in enumerate(sizes) for i in range(size)}
        assert set(ids) == every if total % full == 0 else set(ids) < every
        orders.append(ids)
    if total >= 12:
        assert orders[0] != orders[1]  # passes are shuffled afresh
    again = batcher.batch(0)
    assert [int(i) for i in again["id"][again["mask"]]] == orders[0][:full]


def test_prefetcher_keeps_the_order_and_transfers():
    threads = Counter()

    def transfer(x):
        threads[threading.current_thread() is threading.main_thread()] += 1
        return 10 * x

    with Prefetcher(range(20), transfer=transfer) as items:
        assert list(items) == [10 * i for i in range(20)]
    assert threads == {False: 20}


@pytest.mark.parametrize("where", ["items", "transfer"])
def test_prefetcher_raises_in_place(where):
    def numbers():
        for i in range(5):
            if where == "items" and i == 3:
                raise OSError("broken record")
            yield i

    def transfer(i):
        if where == "transfer" and i == 3:
            raise OSError("broken record")
        return i

    seen = []
    with pytest.raises(OSError, match="broken record"):
        with Prefetcher(numbers(), transfer=transfer) as items:
            for item in items:
                seen.append(item)
    assert seen == [0, 1, 2]


def test_prefetcher_reads_only_a_few_items_ahead_and_stops_early():
    read = []
    before = set(threading.enumerate())

    def endless():
        i = 0
        while True:
            read.append(i)
            yield i
            i += 1

    with Prefetcher(endless(), depth=2) as items:
        assert next(iter(items)) == 0
        deadline = time.monotonic() + 5
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4  # one taken, two waiting, one in the thread's hand
    assert set(threading.enumerate()) == before


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    frames=st.integers(50, 200),
)
@settings(deadline=None, max_examples=100)
def test_packing_cuts_a_sequence_where_windows_begin(lengths, frames):
    lengths = np.array(lengths)
    parts = pack(lengths, frames)
    assert np.array_equal(np.concatenate(parts), np.arange(len(lengths)))
    totals = [int(lengths[part].sum()) for part in parts]
    assert all(total < frames + 50 for total in totals)
    total, longest = int(lengths.sum()), int(lengths.max())
    assert (total - longest) // frames + 1 <= len(parts) <= -(-total // frames)


def test_slots_are_few_and_enough():
    sizes = [rounded_slots(n) for n in range(1, 200)]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 16


@pytest.mark.parametrize("how", [dict(steps=5), dict(epochs=2)])
def test_batches_in_frames_hold_about_so_many(how):
    lengths = np.random.default_rng(0).integers(20, 60, 30)
    local = LocalBatches(frames=200, **how)
    plan = local.plan(30, 1, 2, 3, lengths)
    totals = [lengths[batch].sum() for batch in plan]
    assert max(totals) < 260 and np.mean(totals) > 150
    if "steps" in how:
        assert len(plan) == 5
    else:
        assert sorted(np.concatenate(plan)) == sorted([*range(30), *range(30)])
    again = local.plan(30, 1, 2, 3, lengths)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    # A user with less than one batch makes every step of all that there is.
    few = LocalBatches(frames=10_000, steps=3).plan(4, 1, 2, 3, lengths[:4])
    assert [sorted(batch) for batch in few] == [[0, 1, 2, 3]] * 3


def test_chunks_of_batches_in_frames_hold_every_example(dense):
    corpus = speech_corpus([6, 1, 3, 5])
    buckets = make_buckets([corpus], 2, MULTIPLES)
    batcher = ClientBatcher(corpus, LocalBatches(frames=30, epochs=1), buckets, 2, seed=0)
    ids, padding = [], Padding(0, 0)
    for chunk, part in batcher.chunks(range(4), 0):
        batches = dense(chunk.batches)
        mask = batches["mask"]
        assert mask.shape[2] == rounded_slots(int(mask.sum(2).max()))
        per_batch = np.where(mask, batches["features_length"], 0).sum(2)
        assert per_batch.max() < 30 + 20
        ids += batches["id"][mask].tolist()
        padding += part
    assert sorted(ids) == [1000 * u + i for u, size in enumerate(corpus.sizes) for i in range(size)]
    assert padding.real == sum(int(corpus.lengths(u)["features"].sum()) for u in range(4))
    assert padding.real <= padding.computed


def test_clients_weigh_their_examples_if_asked():
    corpus = speech_corpus([6, 1, 3])
    buckets = make_buckets([corpus], 1, MULTIPLES)
    local = LocalBatches(2, steps=1)
    for weights, expected in ((None, [1, 1, 1, 0]), (corpus.sizes, [6, 1, 3, 0])):
        batcher = ClientBatcher(corpus, local, buckets, 4, 0, weights=weights)
        ((chunk, _),) = batcher.chunks([0, 1, 2], 0)
        assert chunk.weight[np.argsort([*chunk.user[:3], 9])].tolist() == expected


def test_a_pooled_pass_in_frames_repeats_nothing():
    corpus = speech_corpus([6, 2, 9, 4], longest=12)
    buckets = make_buckets([corpus], 2, MULTIPLES)
    batcher = PooledBatcher(corpus, buckets, 0, frames=25, multiple=2)
    total = int(sum(corpus.lengths(u)["features"].sum() for u in range(4)))
    longest = max(int(corpus.lengths(u)["features"].max()) for u in range(4))
    per_pass = (total - longest) // 25 + 1
    for start in (0, per_pass):
        batches = [batcher.batch(step) for step in range(start, start + per_pass)]
        ids = [int(i) for b in batches for i in b["id"][b["mask"]]]
        assert len(set(ids)) == len(ids) >= 21 - 12
        assert all(len(b["mask"]) % 2 == 0 for b in batches)
        assert all(np.where(b["mask"], b["features_length"], 0).sum() < 25 + 12 for b in batches)
    with pytest.raises(UserError, match="shorter than an example"):
        PooledBatcher(corpus, buckets, 0, frames=5)


def test_a_batch_has_one_kind_of_size():
    for sizes in ({}, {"batch_size": 2, "frames": 100}):
        with pytest.raises(UserError, match="exactly one"):
            LocalBatches(steps=1, **sizes)
        with pytest.raises(UserError, match="exactly one"):
            PooledBatcher(speech_corpus([2]), (), 0, **sizes)


def test_a_chunk_beyond_any_memory_is_refused(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 1000)
    corpus = speech_corpus([6])
    buckets = make_buckets([corpus], 1, MULTIPLES)
    few = ClientBatcher(corpus, LocalBatches(1, steps=1), buckets, 1, seed=0)
    assert len(list(few.chunks([0], 0))) == 1
    many = ClientBatcher(corpus, LocalBatches(2, steps=50), buckets, 1, seed=0)
    with pytest.raises(UserError, match=r"client\.max_steps"):
        list(many.chunks([0], 0))


def test_epochs_cost_no_memory():
    corpus = speech_corpus([6, 5])
    buckets = make_buckets([corpus], 1, MULTIPLES)

    def features(epochs):
        batcher = ClientBatcher(corpus, LocalBatches(2, epochs=epochs), buckets, 2, seed=0)
        ((chunk, _),) = batcher.chunks([0, 1], 0)
        return chunk.batches.arrays["features"]

    once, often = features(1), features(50)
    assert once.shape == often.shape
    longest = max(int(corpus.lengths(user)["features"].sum()) for user in range(2))
    assert once.shape[1] < 2 * (longest + buckets[0]["features"])


def test_batches_of_padded_seconds_of_a_fixed_list_of_lengths():
    """By hand: buffers of 4 in the order of lengths, cut where padding would exceed 20 frames."""
    lengths = np.array([10, 3, 7, 2, 9, 4, 25, 1])
    (first, second) = pack_sorted(lengths, frames=20, buffer=4)
    # 2, 3 take 6; with 7 it would be 21. 7, 10 take 20.
    assert [x.tolist() for x in first] == [[3, 1], [2, 0]]
    # 1, 4 take 8; with 9 it would be 27; 25 is alone, however long.
    assert [x.tolist() for x in second] == [[7, 5], [4], [6]]
    assert pack_sorted(np.array([5, 5, 5, 5]), 20, 64)[0][0].tolist() == [0, 1, 2, 3]
    local = LocalBatches(epochs=2, frames=20, buffer=64)
    plan = local.plan(8, 0, 0, 0, lengths)
    # In one buffer: 1, 2, 3, 4 take 16; 7, 9 take 18; 10 and 25 are alone.
    composed = Counter(tuple(sorted(lengths[batch].tolist())) for batch in plan)
    assert composed == {(1, 2, 3, 4): 2, (7, 9): 2, (10,): 2, (25,): 2}


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    frames=st.integers(1, 90),
    buffer=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_batches_of_padded_seconds_are_as_full_as_may_be(lengths, frames, buffer):
    lengths = np.array(lengths)
    found = pack_sorted(lengths, frames, buffer)
    assert sorted(np.concatenate([x for part in found for x in part])) == list(range(len(lengths)))
    for number, part in enumerate(found):
        assert {int(i) // buffer for batch in part for i in batch} == {number}
        for batch, after in itertools.zip_longest(part, part[1:]):
            assert len(batch) == 1 or len(batch) * lengths[batch].max() <= frames
            if after is not None:
                assert lengths[batch].max() <= lengths[after[0]]
                assert (len(batch) + 1) * lengths[after[0]] > frames


def test_a_published_user_makes_the_published_number_of_steps():
    """Utterances like LibriSpeech's, 24 minutes of them, batches of 360 s, ten epochs: 60 steps."""
    rng = np.random.default_rng(0)
    long = rng.random(118) < 0.75
    lengths = np.where(long, rng.uniform(1200, 1650, 118), rng.uniform(200, 1200, 118)).astype(int)
    assert 23.5 < lengths.sum() / 6000 < 24.5
    counts = []
    for buffer in (None, 64):
        local = LocalBatches(epochs=10, frames=36_000, buffer=buffer)
        counts.append(len(local.plan(len(lengths), 0, 0, 0, lengths)))
    assert counts[0] <= 50 and counts[1] == 60
    limited = LocalBatches(steps=10, frames=36_000, buffer=64).plan(118, 0, 0, 0, lengths)
    assert len(limited) == 10


def test_a_buffer_is_for_batches_measured_in_seconds():
    with pytest.raises(UserError, match="batch_seconds"):
        LocalBatches(4, steps=1, buffer=64)
