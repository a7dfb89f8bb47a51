import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.feedback.histograms import bucket, client_histogram

key_sets = st.lists(st.sets(st.text("abc", max_size=3), max_size=12), min_size=1, max_size=6)


def test_counts_are_clients_not_occurrences():
    histogram = client_histogram([["a", "a", "b"], ["a"], []], most=5)
    assert (histogram.count("a"), histogram.count("b"), histogram.count("c")) == (2, 1, 0)
    assert histogram.counts.sum() == 3 and histogram.noise_std == 0


@given(key_sets, st.integers(1, 4), st.integers(1, 40))
@settings(deadline=None)
def test_a_client_moves_the_counts_by_at_most_the_root_of_most(keys, most, buckets):
    """What the noise is scaled to; and the part of the others does not depend on who is there."""
    everybody = client_histogram(keys, most=most, buckets=buckets).counts
    for user, own in enumerate(keys):
        others = client_histogram(keys[:user] + keys[user + 1 :], most=most, buckets=buckets).counts
        moved = everybody - others
        assert np.linalg.norm(moved) <= math.sqrt(most)
        np.testing.assert_array_equal(
            moved, client_histogram([own], most=most, buckets=buckets).counts
        )
        held = {bucket(key, buckets) for key in own}
        assert set(np.flatnonzero(moved)) <= held
        assert np.count_nonzero(moved) == min(most, len(held))


def test_noise_is_on_every_bucket_and_of_the_stated_size():
    noisy = client_histogram([["a"]] * 3, most=4, buckets=40_000, noise_multiplier=1.5, seed=1)
    noise = noisy.counts - client_histogram([["a"]] * 3, most=4, buckets=40_000).counts
    assert noisy.noise_std == 3.0 == 1.5 * math.sqrt(4)
    assert (noise != 0).all()
    assert abs(statistics.stdev(noise) / 3.0 - 1) < 5 / math.sqrt(2 * 40_000)
    assert abs(noise.mean()) < 5 * 3.0 / math.sqrt(40_000)
    again = client_histogram([["b"]], most=4, buckets=40_000, noise_multiplier=1.5, seed=1)
    other = client_histogram([["b"]], most=4, buckets=40_000, noise_multiplier=1.5, seed=2)
    assert (again.counts != other.counts).all()


def test_buckets_are_the_same_everywhere():
    assert bucket("compasses", 1 << 16) == 58402
    assert len({bucket(f"word {i}", 1 << 16) for i in range(500)}) > 490


@pytest.mark.parametrize(
    "bad", [{"most": 0}, {"most": 1, "buckets": 0}, {"most": 1, "noise_multiplier": math.nan}]
)
def test_mistakes(bad):
    with pytest.raises(UserError):
        client_histogram([["a"]], **bad)
