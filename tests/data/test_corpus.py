import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import make_buckets
from fedasr.data.corpus import InMemoryCorpus, all_lengths, shared_users, user_hashes
from fedasr.data.records import ArrayRecordCorpus, open_corpus, read_metadata
from fedasr.data.writing import write_corpus
from fedasr.errors import UserError


def speech(rng, users=5, mels=4):
    def example():
        return {
            "features": rng.normal(size=(rng.integers(3, 30), mels)).astype(np.float16),
            "labels": rng.integers(1, 30, rng.integers(1, 9)).astype(np.int32),
        }

    return {f"user {i}": [example() for _ in range(rng.integers(1, 7))] for i in range(users)}


def assert_same(a, b):
    assert list(a.users) == list(b.users)
    np.testing.assert_array_equal(a.sizes, b.sizes)
    assert a.sizes.dtype == b.sizes.dtype == np.int64
    for key, values in all_lengths(a).items():
        np.testing.assert_array_equal(values, all_lengths(b)[key])
    np.testing.assert_array_equal(user_hashes(a), user_hashes(b))
    for user, size in enumerate(a.sizes):
        lengths, other = a.lengths(user), b.lengths(user)
        assert lengths.keys() == other.keys()
        for key in lengths:
            assert lengths[key].dtype == other[key].dtype == np.int32
            np.testing.assert_array_equal(lengths[key], other[key])
        for x, y in zip(a.get(user, range(size)), b.get(user, range(size)), strict=True):
            assert x.keys() == y.keys()
            for key in x:
                assert x[key].dtype == y[key].dtype and x[key].shape == y[key].shape
                np.testing.assert_array_equal(x[key], y[key])


@st.composite
def corpora(draw):
    dtypes = [np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.bool_]
    arrays = {
        key: (draw(st.sampled_from(dtypes)), draw(st.sampled_from(["ragged", "fixed", "scalar"])))
        for key in draw(st.sets(st.sampled_from(["features", "labels", "a_1", "B"]), min_size=1))
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    trailing = draw(st.sampled_from([(), (3,), (2, 2)]))

    def array(dtype, kind):
        if kind == "scalar":
            shape = ()
        else:
            shape = (int(rng.integers(0, 5)) if kind == "ragged" else 3, *trailing)
        return rng.integers(0, 100, shape).astype(dtype)

    ids = draw(st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=4))
    users = {
        user: [{k: array(*v) for k, v in arrays.items()} for _ in range(rng.integers(1, 4))]
        for user in ids
    }
    return users, [key for key, (_, kind) in arrays.items() if kind == "ragged"]


@settings(deadline=None, max_examples=30)
@given(corpora(), st.integers(1, 400))
def test_what_is_written_is_what_is_read(tmp_path_factory, made, shard_bytes):
    users, ragged = made
    memory = InMemoryCorpus(users, ragged=ragged)
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": memory, "dev": memory}, shard_bytes=shard_bytes)
    assert_same(memory, open_corpus(folder, "train"))
    assert_same(memory, open_corpus(folder, "dev"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    memory = InMemoryCorpus(speech(np.random.default_rng(0)))
    folder = tmp_path_factory.mktemp("stored")
    write_corpus(folder, {"train": memory}, {"name": "mine"}, shard_bytes=500)
    return memory, folder


@pytest.fixture
def copied(stored, tmp_path):
    memory, _ = stored
    write_corpus(tmp_path / "c", {"train": memory}, shard_bytes=500)
    return tmp_path / "c"


def test_users_are_sorted_and_lengths_are_those_of_the_examples(stored):
    for corpus in stored[0], open_corpus(stored[1], "train"):
        assert list(corpus.users) == sorted(corpus.users)
        for user, size in enumerate(corpus.sizes):
            examples = corpus.get(user, range(size))
            for key in ("features", "labels"):
                expected = [len(example[key]) for example in examples]
                np.testing.assert_array_equal(corpus.lengths(user)[key], expected)


def test_random_access_in_any_order_with_repeats(stored):
    memory, folder = stored
    corpus = open_corpus(folder, "train")
    rng = np.random.default_rng(1)
    for _ in range(50):
        user = int(rng.integers(len(memory.users)))
        indices = rng.integers(0, memory.sizes[user], 5)
        for x, y in zip(memory.get(user, indices), corpus.get(user, indices), strict=True):
            np.testing.assert_array_equal(x["features"], y["features"])
    assert corpus.get(0, []) == []


def test_an_index_out_of_range_never_reads_a_neighbour(stored):
    for corpus in stored[0], open_corpus(stored[1], "train"):
        for user, indices in [(0, [corpus.sizes[0]]), (1, [-1]), (-1, [0]), (99, [0])]:
            with pytest.raises(IndexError):
                corpus.get(user, indices)
        with pytest.raises(IndexError):
            corpus.lengths(len(corpus.users))


def test_threads_and_pickles_read_the_same(stored):
    memory, folder = stored
    corpus = open_corpus(folder, "train")  # not yet opened: threads race to open it
    work = [(u, i) for u, size in enumerate(memory.sizes) for i in range(size)] * 5
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda w: corpus.get(w[0], [w[1]])[0], work))
    for (user, i), example in zip(work, read, strict=True):
        np.testing.assert_array_equal(example["features"], memory.get(user, [i])[0]["features"])
    assert_same(memory, pickle.loads(pickle.dumps(corpus)))


def test_metadata(stored):
    metadata = read_metadata(stored[1])
    assert metadata["name"] == "mine"
    assert metadata["arrays"]["features"] == {
        "dtype": "float16",
        "shape": [None, 4],
        "ragged": True,
    }
    split = metadata["splits"]["train"]
    assert split["examples"] == stored[0].sizes.sum() == sum(split["shards"])
    assert len(split["files"]) == len(split["shards"]) > 1


def test_opening_reads_no_example_file(copied):
    corpus = open_corpus(copied, "train")
    for name, size in corpus.metadata["splits"]["train"]["files"].items():
        (copied / name).write_bytes(bytes(size))
    assert corpus.lengths(0)["features"].shape == (corpus.sizes[0],)


def test_a_million_users_open_quickly(tmp_path, stored):
    _, folder = stored
    users = 1_000_000
    index = tmp_path / "index" / "train"
    index.mkdir(parents=True)
    (index / "users.bin").write_bytes(b"".join(b"%032d" % i for i in range(users)))
    np.save(index / "user_ends.npy", np.arange(1, users + 1, dtype=np.int64) * 32)
    hashes = np.random.default_rng(0).integers(0, 2**63, users).astype(np.uint64)
    np.save(index / "user_hashes.npy", hashes)
    np.save(index / "offsets.npy", np.arange(users + 1, dtype=np.int64) * 3)
    np.save(index / "lengths.features.npy", np.full(users * 3, 7, np.int32))
    metadata = read_metadata(folder)
    metadata["arrays"] = {"features": metadata["arrays"]["features"]}
    metadata["splits"]["train"] |= {"files": {}, "users": users}
    (tmp_path / "corpus.json").write_text(json.dumps(metadata))
    start = time.process_time()
    corpus = open_corpus(tmp_path, "train")
    assert corpus.lengths(999_999)["features"].tolist() == [7, 7, 7]
    assert corpus.users[-1] == f"{999_999:032d}"
    assert make_buckets([corpus]) == ({"features": 8},)
    assert time.process_time() - start < 1
    tenth = open_corpus(tmp_path, "train[:10%]")
    assert len(tenth.users) == 100_000 and tenth.sizes.sum() == 300_000
    assert not shared_users(tenth, open_corpus(tmp_path, "train[10%:]"))
    assert time.process_time() - start < 5


def test_no_tensorflow_and_no_jax():
    code = (
        "import sys, fedasr.data.corpus, fedasr.data.preparation.prepare, fedasr.data.splits\n"
        "from fedasr.data.sources import common_voice, librispeech, manifest\n"
        "bad = {'tensorflow', 'tensorflow_datasets', 'jax', 'soundfile', 'rich'}\n"
        "assert not bad & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_that_are_no_corpus(tmp_path, copied):
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(tmp_path / "absent", "train")
    with pytest.raises(UserError, match="no split 'tset': choose one of train"):
        open_corpus(copied, "tset")
    (copied / "corpus.json").write_text("{")
    with pytest.raises(UserError, match=r"corpus\.json is damaged"):
        open_corpus(copied, "train")
    (copied / "corpus.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        open_corpus(copied, "train")


@pytest.mark.parametrize(
    "name",
    ["users.bin", "user_ends.npy", "user_hashes.npy", "offsets.npy", "lengths.features.npy"],
)
@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_damaged_index_is_named(copied, name, damage):
    path = copied / "index" / "train" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        open_corpus(copied, "train")


def test_an_index_of_other_data_is_noticed(copied):
    path = copied / "index" / "train" / "lengths.features.npy"
    np.save(path, np.load(path) + np.int32(1))
    corpus = open_corpus(copied, "train")
    with pytest.raises(UserError, match="array_record-00000-of"):
        corpus.get(0, [0])


def test_damaged_examples_are_named(copied):
    files = list(read_metadata(copied)["splits"]["train"]["files"])
    last = copied / files[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    with pytest.raises(UserError, match=last.name):
        open_corpus(copied, "train")
    last.write_bytes(bytes(len(content)))  # the right size, but zeros
    corpus = open_corpus(copied, "train")
    corpus.get(0, [0])
    with pytest.raises(UserError, match=last.name):
        corpus.get(len(corpus.users) - 1, [corpus.sizes[-1] - 1])
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name} is missing"):
        open_corpus(copied, "train")


def test_in_memory_finds_ragged_keys():
    def corpus(first, second, **options):
        return InMemoryCorpus({"a": [{"x": np.zeros(first)}, {"x": np.zeros(second)}]}, **options)

    assert corpus((2, 3), (4, 3)).ragged == ("x",)
    assert corpus((2, 3), (2, 3)).ragged == ()
    assert corpus((2, 3), (2, 3), ragged=["x"]).ragged == ("x",)
    assert corpus((2, 3), (2, 3)).lengths(0) == {}


@pytest.mark.parametrize(
    ("users", "options", "message"),
    [
        ({}, {}, "no users"),
        ({"a": []}, {}, "no examples"),
        ({"a": [{"x": np.zeros(2)}, {"y": np.zeros(2)}]}, {}, "same"),
        ({"a": [{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}]}, {}, "only axis 0"),
        ({"a": [{"x": np.zeros(2)}, {"x": np.zeros(2, int)}]}, {}, "only axis 0"),
        ({"a": [{"x": np.zeros(2)}, {"x": np.zeros(())}]}, {}, "varies"),
        ({"a": [{"x": np.zeros(2)}, {"x": np.zeros(3)}]}, {"ragged": []}, "varies"),
        ({"a": [{"x": np.zeros(2)}]}, {"ragged": ["y"]}, "no example has"),
        ({"a": [{"x": np.zeros(())}]}, {"ragged": ["x"]}, "scalar"),
    ],
)
def test_in_memory_refuses(users, options, message):
    with pytest.raises(UserError, match=message):
        InMemoryCorpus(users, **options)


def test_writing_refuses(tmp_path):
    one = InMemoryCorpus({"a": [{"x": np.zeros(2)}]})
    other = InMemoryCorpus({"a": [{"x": np.zeros(3)}]})
    with pytest.raises(UserError, match="at least one split"):
        write_corpus(tmp_path, {})
    for name in ("all", "a/b", ""):
        with pytest.raises(UserError, match="name of a split"):
            write_corpus(tmp_path, {name: one})
    with pytest.raises(UserError, match="another split"):
        write_corpus(tmp_path, {"a": one, "b": other})

    unsorted = InMemoryCorpus({"a": [{"x": np.zeros(2)}], "b": [{"x": np.zeros(2)}]})
    unsorted.users = ("b", "a")
    with pytest.raises(UserError, match="sorted"):
        write_corpus(tmp_path, {"a": unsorted})
    with pytest.raises(UserError, match="name an array"):
        write_corpus(tmp_path, {"a": InMemoryCorpus({"u": [{"x/y": np.zeros(2)}]})})
    assert not (tmp_path / "corpus.json").exists()


def test_examples_that_change_shape_stop_the_writing(tmp_path):
    class Changing(InMemoryCorpus):
        def get(self, user, indices):
            return [{"x": np.zeros(2 + user)}]

    same = {"a": [{"x": np.zeros(2)}], "b": [{"x": np.zeros(2)}]}
    with pytest.raises(UserError, match="'x' of user 'b'"):
        write_corpus(tmp_path, {"train": Changing(same)})
    with pytest.raises(UserError, match="not a prepared corpus"):
        ArrayRecordCorpus(tmp_path, "train")
