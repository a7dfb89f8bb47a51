import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import eval_batches, make_buckets
from fedasr.data.corpus import (
    InMemoryCorpus,
    all_lengths,
    find_users,
    shared_users,
    user_hash,
    user_hashes,
)
from fedasr.data.records import has_split, open_corpus
from fedasr.data.splits import resolve
from fedasr.data.views import ReshuffledCorpus, UnionCorpus, UserSubset
from fedasr.data.writing import write_corpus
from fedasr.errors import UserError


def corpus(sizes, first=0, mark=0):
    """Examples that say whose they are: user `first` + i has sizes[i] of them."""
    return InMemoryCorpus(
        {
            f"user {first + i:05d}": [
                {
                    "id": np.int64(10_000 * mark + 100 * (first + i) + j),
                    "x": np.zeros(1 + (i + j) % 7),
                }
                for j in range(size)
            ]
            for i, size in enumerate(sizes)
        },
        ragged=("x",),
    )


def ids(some):
    """{user: ids of their examples}."""
    return {
        user: [int(example["id"]) for example in some.get(i, range(int(some.sizes[i])))]
        for i, user in enumerate(some.users)
    }


def flat(lists):
    return sorted(itertools.chain.from_iterable(lists))


def assert_consistent(some):
    users = list(some.users)
    assert users == sorted(set(users)) and len(users) == len(some.users) == len(some.sizes)
    assert some.users[-1] == users[-1] and tuple(some.users[:2]) == tuple(users[:2])
    assert np.asarray(some.sizes).dtype == np.int64 and some.sizes.min() >= 1
    by_user = [some.lengths(i)["x"] for i in range(len(users))]
    for i, lengths in enumerate(by_user):
        assert lengths.dtype == np.int32
        examples = some.get(i, range(int(some.sizes[i])))
        assert [len(example["x"]) for example in examples] == lengths.tolist()
        again = some.get(i, [int(some.sizes[i]) - 1, 0])
        assert [e["id"] for e in again] == [examples[-1]["id"], examples[0]["id"]]
        for bad in (-1, int(some.sizes[i])):
            with pytest.raises(IndexError):
                some.get(i, [bad])
    for bad in (-1, len(users)):
        with pytest.raises(IndexError):
            some.lengths(bad)
        with pytest.raises(IndexError):
            some.get(bad, [0])
    np.testing.assert_array_equal(all_lengths(some)["x"], np.concatenate(by_user))
    np.testing.assert_array_equal(user_hashes(some), [user_hash(user) for user in users])


sizes_strategy = st.lists(st.integers(1, 5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=15)
@given(sizes_strategy, sizes_strategy, st.integers(0, 12), st.integers(0, 3))
def test_views_are_corpora(sizes, others, first, seed):
    one, two = corpus(sizes), corpus(others, first, mark=1)
    kept = np.random.default_rng(seed).permutation(len(sizes))[: 1 + len(sizes) // 2]
    subset, union, dealt = (
        UserSubset(one, kept),
        UnionCorpus([one, two]),
        ReshuffledCorpus(one, seed),
    )
    for view in (subset, union, dealt, ReshuffledCorpus(UserSubset(union, [0]), seed)):
        assert_consistent(view)
    own, theirs = ids(one), ids(two)
    assert ids(subset) == {one.users[i]: own[one.users[i]] for i in sorted(kept)}
    assert ids(union) == {
        user: own.get(user, []) + theirs.get(user, []) for user in sorted({*own, *theirs})
    }
    assert shared_users(one, two) == tuple(sorted({*own} & {*theirs}))
    assert list(ids(dealt)) == list(own)
    assert dealt.sizes.tolist() == one.sizes.tolist()
    assert flat(ids(dealt).values()) == flat(own.values())
    assert ids(ReshuffledCorpus(one, seed)) == ids(dealt)


def test_reshuffling_depends_on_the_seed_and_mixes_users():
    one = corpus([20] * 20)
    a, b = (ids(ReshuffledCorpus(one, seed)) for seed in (0, 1))
    assert a != b
    owners = {identity // 100 for identity in a[one.users[0]]}
    assert len(owners) > 5
    with pytest.raises(UserError, match="seed"):
        ReshuffledCorpus(one, -1)


def test_views_refuse():
    one = corpus([1, 2])
    for indices in ([], [0, 0]):
        with pytest.raises(UserError):
            UserSubset(one, indices)
    with pytest.raises(IndexError):
        UserSubset(one, [2])
    with pytest.raises(UserError):
        UnionCorpus([])
    fixed = InMemoryCorpus({"u": [{"x": np.zeros(3)}]})
    with pytest.raises(UserError, match="ragged"):
        UnionCorpus([one, fixed])


class Users:
    """A corpus of nothing but user ids."""

    def __init__(self, number):
        self.users = [f"{i:06d}" for i in range(number)]
        self.sizes = np.ones(number, np.int64)


@pytest.mark.parametrize(
    ("users", "percent", "first", "rest"),
    [  # arXiv 2310.00098, table of the data
        (34753, 10, 3475, 31278),
        (34753, 5, 1737, 33016),
        (6856, 10, 685, 6171),
        (7127, 10, 712, 6415),
    ],
)
def test_shares_have_the_published_numbers_of_users(users, percent, first, rest):
    whole = Users(users)
    some, others = (
        resolve(f"train[{share}]", ["train"], lambda name: whole, "here")
        for share in (f":{percent}%", f"{percent}%:")
    )
    assert (len(some.users), len(others.users)) == (first, rest)
    assert not shared_users(some, others)
    assert sorted([*some.users, *others.users]) == whole.users
    by_hash = sorted(whole.users, key=user_hash)
    assert some.users == sorted(by_hash[:first])


def test_the_order_of_users_is_fixed():
    # sha256 of "0:anna" and so on: the same shares on every machine and in every version
    assert [hex(user_hash(user)) for user in ("anna", "é")] == [
        "0x41f04e41462a1894",
        "0xe62ced1159419255",
    ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    splits = {
        "train": corpus([3] * 20),
        "train_clean_100": corpus([1, 2], 100),
        "train_clean_360": corpus([1, 2, 3], 200),
        "train_other_500": corpus([2, 2], 202, mark=1),
        "dev": corpus([1], 0, mark=2),
    }
    write_corpus(folder, splits)
    return folder, splits


def test_expressions(stored):
    folder, splits = stored
    whole = ids(splits["train"])
    assert ids(open_corpus(folder, "train")) == whole
    for first, rest, share in [
        ("[:10%]", "[10%:]", 2),
        ("[:7]", "[7:]", 7),
        ("[:12.5%]", "[12.5%:]", 2),
    ]:
        a, b = (ids(open_corpus(folder, f"train{part}")) for part in (first, rest))
        assert len(a) == share and a | b == whole and not a.keys() & b.keys()
    assert ids(open_corpus(folder, " train [ 10% : 100% ] ")) == ids(
        open_corpus(folder, "train[10%:]")
    )
    middle = ids(open_corpus(folder, "train[10%:50%]"))
    assert len(middle) == 8 and middle.items() <= whole.items()
    parts = "train[:10%]+train[10%:50%] + train[50%:]"
    assert ids(open_corpus(folder, parts)) == whole

    union = open_corpus(folder, "train_clean_360+train_other_500")
    assert_consistent(union)
    assert len(union.users) == 4  # one reads in both
    assert ids(union)["user 00202"] == [20200, 20201, 20202, 30200, 30201]
    assert ids(open_corpus(folder, "ls860")) == ids(union)
    assert len(open_corpus(folder, "ls960").users) == 6
    assert ids(open_corpus(folder, "ls100")) == ids(splits["train_clean_100"])
    assert len(open_corpus(folder, "ls860[:50%]").users) == 2
    mixed = open_corpus(folder, "train_clean_100+train[:10%]")
    assert len(mixed.users) == 4
    assert ids(pickle.loads(pickle.dumps(mixed))) == ids(mixed)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tain", "no split 'tain'.*choose one of train"),
        ("train+tain", r"no split 'tain' \(for 'train\+tain'\)"),
        ("", "is not a split"),
        ("train[10%]", "is not a split"),
        ("train+", "is not a split"),
        ("train[:10%", "is not a split"),
        ("train[:x]", "'x' in the split"),
        ("train[:-5%]", "'-5%' in the split"),
        ("train[:1.5]", "neither"),
        ("train[:101%]", "more than 100%"),
        ("train[:1%]", "users 0 to 0 of 20"),
        ("train[:21]", "users 0 to 21 of 20"),
        ("train[50%:10%]", "users 10 to 2 of 20"),
        ("train+train[:10%]", "share 2 users of 'train'"),
        ("train[:50%]+train[40%:]", "would count twice"),
        ("ls960+train_other_500", "share 2 users of 'train_other_500'"),
    ],
)
def test_expressions_that_are_refused(stored, expression, message):
    with pytest.raises(UserError, match=message):
        open_corpus(stored[0], expression)


def test_has_split(stored):
    folder, _ = stored
    assert has_split(folder, "train[:10%]+dev") and has_split({"splits": {"a": {}}}, "a")
    assert has_split(folder, "ls960")
    assert not has_split(folder, "test") and not has_split({"splits": {"a": {}}}, "a+ls100")
    with pytest.raises(UserError, match="not a split"):
        has_split(folder, "train[")


def test_a_stored_split_comes_before_a_friendly_name():
    mine = Users(3)
    assert resolve("ls100", ["ls100"], lambda name: mine, "here") is mine


def test_batches_of_a_view_are_those_of_its_examples():
    view = ReshuffledCorpus(corpus([3, 1, 4, 2]), 5)
    buckets = make_buckets([view], 2, {"x": 1})
    batches = list(eval_batches(view, buckets, 3))
    seen = flat(batch["id"][batch["mask"]].tolist() for batch in batches)
    assert seen == flat(ids(view).values())
    assert make_buckets([corpus([3, 1, 4, 2])], 2, {"x": 1})[-1] == buckets[-1]


def test_shares_of_each_users_utterances():
    sizes = {"ann": 1, "bob": 4, "cy": 9}
    whole = InMemoryCorpus(
        {user: [{"x": np.arange(i + 1)} for i in range(size)] for user, size in sizes.items()},
        ragged=("x",),
    )

    def opened(expression):
        return resolve(expression, ["train"], lambda name: whole, "here")

    def held(corpus):
        return {
            user: [len(x["x"]) for x in corpus.get(i, range(int(corpus.sizes[i])))]
            for i, user in enumerate(corpus.users)
        }

    first, rest = opened("train[:][:75%]"), opened("train[:][75%:]")
    assert {user: len(x) for user, x in held(first).items()} == {"bob": 3, "cy": 6}
    assert held(rest).keys() == sizes.keys()
    for user, size in sizes.items():
        both = held(first).get(user, []) + held(rest)[user]
        assert sorted(both) == list(range(1, size + 1))
    for corpus in (first, rest):
        for i, user in enumerate(corpus.users):
            assert corpus.lengths(i)["x"].tolist() == held(corpus)[user]
    assert find_users(first, rest).tolist() == [-1, 0, 1]
    assert find_users(rest, first).tolist() == [1, 2]
    with pytest.raises(UserError, match="at least one utterance"):
        opened("train[:][20:]")
    with pytest.raises(IndexError):
        first.get(0, [3])
