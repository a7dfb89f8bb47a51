import itertools
import math
import statistics
from statistics import NormalDist

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.feedback.analytics import (
    chosen_words,
    discover,
    ledger_entry,
    level_counts,
    quantile,
    threshold,
    volume_vector,
    volumes,
)
from fedasr.privacy import accounting, ledger
from fedasr.privacy.ledger import Users

ABC = "abc"
said_by_users = st.lists(
    st.dictionaries(st.text("abcd", max_size=4), st.integers(0, 3), max_size=10),
    min_size=1,
    max_size=6,
)


def levels_of(alphabet):
    """All candidates that there can be, by level: beginnings, and words that end."""
    for length in (1, 2, 3):
        begun = ["".join(letters) for letters in itertools.product(alphabet, repeat=length - 1)]
        yield [word + letter for word in begun for letter in (*alphabet, "\n")]


@given(said_by_users, st.integers(1, 4))
@settings(deadline=None)
def test_a_user_moves_a_level_by_at_most_the_root_of_most(said, most):
    """Also where words begin alike; and nothing that a user reports depends on the others."""
    reported = [chosen_words(one, ABC, most, 3) for one in said]
    for candidates in levels_of(ABC):
        everybody = level_counts(reported, candidates)
        for user in range(len(said)):
            moved = everybody - level_counts(reported[:user] + reported[user + 1 :], candidates)
            assert np.linalg.norm(moved) <= math.sqrt(most)
            np.testing.assert_array_equal(moved, level_counts([reported[user]], candidates))


def test_words_that_begin_alike_count_once():
    counts = level_counts([("ab", "ac", "b"), ("ab",)], ["a", "b", "c"])
    np.testing.assert_array_equal(counts, [2, 1, 0])


def test_a_user_reports_what_is_said_most_and_fits():
    said = {"ab": 2, "b": 5, "abcab": 9, "ad": 9, "": 9, "c": 2, "a": 0}
    assert chosen_words(said, ABC, 2, 4) == ("b", "ab")
    assert chosen_words(said, ABC, 9, 4) == ("b", "ab", "c")


@given(said_by_users, st.integers(1, 3))
@settings(deadline=None)
def test_without_noise_it_finds_the_words_that_enough_users_report(said, most):
    found = discover(said, alphabet=ABC, most=most, noise_multiplier=0.0, longest=3, least=2)
    reported = [word for one in said for word in chosen_words(one, ABC, most, 3)]
    assert found.words == {w: reported.count(w) for w in set(reported) if reported.count(w) >= 2}
    assert found.noise_multipliers == (0.0,) * 4


def test_with_noise_it_finds_common_words_and_hardly_any_other():
    users = [{"cab": 3, "abba": 2}] * 400 + [{"cc": 2, "secret": 1}] * 150 + [{"bac": 1}] * 2
    letters = "abcdefghijklmnopqrstuvwxyz"
    found = [
        discover(users, alphabet=letters, most=2, noise_multiplier=8.0, longest=6, seed=seed)
        for seed in range(8)
    ]
    for one in found:
        assert {"cab", "abba", "cc", "secret"} <= set(one.words)
        assert one.words["cab"] == pytest.approx(400, abs=6 * 8 * math.sqrt(2))
    # Beginnings that nobody says pass 0.1 times a level, and a word has to pass the last level.
    assert sum(len(one.words) - 4 for one in found) <= 5
    assert found[0].words["cab"] != found[1].words["cab"]
    assert found[0].noise_multipliers == (8.0,) * 7


def test_thresholds_let_few_of_many_empty_candidates_pass():
    for candidates in (1, 27, 10_000):
        bound = threshold(3.0, candidates, 0.1)
        chance = 1 - NormalDist(0, 3.0).cdf(bound)
        assert candidates * chance <= 0.1 * (1 + 1e-6)
    assert threshold(0.0, 100, 0.1, least=2.0) == 2.0
    assert threshold(1.0, 1, 5.0) == 1.0  # half of them at most, and one user


def test_noise_is_on_every_candidate_and_of_the_stated_size():
    letters = "".join(chr(0x4E00 + i) for i in range(20_000))
    found = discover(
        [], alphabet=letters, most=4, noise_multiplier=1.5, longest=1, spurious=1e9, least=1e-9
    )
    # Half of the letters' noise is above 0, and of the words that end there half again.
    assert len(found.words) == pytest.approx(5_000, abs=5 * math.sqrt(20_000 * 3 / 16))
    values = np.asarray(list(found.words.values()))
    assert np.sqrt(np.mean(values**2)) == pytest.approx(1.5 * math.sqrt(4), rel=0.05)


def test_each_level_has_noise_of_its_own():
    options = {"alphabet": "a", "most": 1, "longest": 1, "spurious": 1e9, "least": 1e-9}
    found = [discover([], noise_multiplier=1.0, seed=seed, **options) for seed in range(80)]
    # It has to be above 0 at two levels; the same noise at both would be in half of the cases.
    assert 12 <= sum("a" in one.words for one in found) <= 28


EDGES = {"length_edges": (1, 2), "count_edges": (1, 3), "most_seconds": 10.0}
seconds_of_users = st.lists(
    st.lists(st.floats(0, 50), max_size=6).map(np.asarray), min_size=1, max_size=5
)


@given(seconds_of_users)
@settings(deadline=None)
def test_a_user_moves_volumes_by_at_most_the_root_of_three(seconds):
    found = volumes(seconds, noise_multiplier=0.0, **EDGES)
    for user, own in enumerate(seconds):
        vector = volume_vector(np.asarray(own, np.float64), (1, 2), (1, 3), 10.0)
        assert np.linalg.norm(vector) <= math.sqrt(3) + 1e-12
        rest = volumes(seconds[:user] + seconds[user + 1 :], noise_multiplier=0.0, **EDGES)
        moved = [found.lengths - rest.lengths, found.users - rest.users]
        moved.append([(found.seconds - rest.seconds) / 10.0])
        np.testing.assert_allclose(np.concatenate(moved), vector, atol=1e-9)


def test_volumes_by_hand():
    seconds = [np.asarray([0.5, 1.0, 1.5, 3.0]), np.asarray([4.0, 20.0]), np.asarray([])]
    found = volumes(seconds, noise_multiplier=0.0, **EDGES)
    np.testing.assert_allclose(found.lengths, [0.25, 0.5, 1.25])
    np.testing.assert_allclose(found.users, [1, 1, 1])
    assert (found.seconds, found.noise_std) == (16.0, 0.0)
    assert quantile(found.lengths, (1, 2), 0.3) == 2 and quantile(found.lengths, (1, 2), 0.1) == 1
    assert quantile(found.lengths, (1, 2), 0.9) == math.inf
    assert quantile(np.asarray([-1.0, -2.0]), (1,), 0.5) == math.inf


def test_noise_of_volumes_is_of_the_stated_size():
    edges = tuple(range(1, 20_000))
    found = volumes([], noise_multiplier=2.0, length_edges=edges, count_edges=(1,), seed=1)
    assert found.noise_std == 2.0 * math.sqrt(3)
    deviation = statistics.stdev(found.lengths)
    assert deviation == pytest.approx(found.noise_std, rel=5 / math.sqrt(2 * 20_000))
    other = volumes([], noise_multiplier=2.0, length_edges=edges, count_edges=(1,), seed=2)
    assert (other.lengths != found.lengths).all()


def test_the_ledger_charges_what_the_density_of_all_queries_says():
    users = Users.of(["a", "b", "c", "d"])
    multipliers = (6.0,) * 7 + (2.5,)
    entry = ledger_entry("words and volumes", multipliers, users, [(10.0, 40)])
    shift = math.sqrt(sum(1 / z**2 for z in multipliers))  # of one user, in standard deviations
    epsilon = accounting.epsilon(
        entry.event, 1e-6, dp_accounting.NeighboringRelation[entry.relation]
    ).epsilon

    def delta_at(epsilon):  # exact, of two Gaussians so far apart
        cdf = NormalDist().cdf
        return cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * cdf(
            -shift / 2 - epsilon / shift
        )

    assert delta_at(epsilon) <= 1e-6 <= delta_at(epsilon * 0.98)
    ((case, deployed, _),) = entry.deployed
    assert case == (10.0, 40)
    assert [e.noise_multiplier for e in deployed.events] == [10 * z for z in multipliers]
    # It is written down, read again and composed with what training costs.
    (again,) = ledger.from_data(ledger.to_data([entry]))
    assert again.event == entry.event and again.stage == "analytics"
    rounds = ledger.Entry(
        "rounds", "rounds", 1, dp_accounting.GaussianDpEvent(2.0), entry.relation, "", users
    )
    both = ledger.total([again, rounds], 1e-6)
    shift = math.hypot(shift, 0.5)
    assert both.shared == 4 and delta_at(both.epsilon) <= 1e-6 <= delta_at(both.epsilon * 0.98)
    exact = ledger_entry("exact", (0.0,), users)
    assert ledger.total([exact, rounds], 1e-6).epsilon == math.inf


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"most": 0}, "most=0"),
        ({"longest": 0}, "longest=0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"spurious": 0.0}, "spurious"),
        ({"alphabet": "aa"}, "alphabet"),
        ({"alphabet": ""}, "alphabet"),
    ],
)
def test_mistaken_searches(bad, message):
    options = {"alphabet": ABC, "most": 1, "noise_multiplier": 1.0} | bad
    with pytest.raises(UserError, match=message):
        discover([{"a": 1}], **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"length_edges": (2, 1)}, "length_edges"),
        ({"count_edges": ()}, "count_edges"),
        ({"most_seconds": 0.0}, "most_seconds"),
        ({"seconds": [np.asarray([-1.0])]}, "lengths of utterances"),
        ({"seconds": [np.asarray([math.inf])]}, "lengths of utterances"),
    ],
)
def test_mistaken_volumes(bad, message):
    options = {"seconds": [], "noise_multiplier": 1.0} | bad
    with pytest.raises(UserError, match=message):
        volumes(options.pop("seconds"), **options)
