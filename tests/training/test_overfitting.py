"""When training learns its examples by heart, it is said once."""

import math

from hypothesis import given
from hypothesis import strategies as st

from fedasr.training.overfitting import Point, Watch, rising, warning

FALLING = [5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0]


def records(held_out, training=FALLING):
    """A round without an evaluation, then one with, and so on."""
    found = []
    for i, (dev, loss) in enumerate(zip(held_out, training, strict=False)):
        found.append({"round": 2 * i + 1, "loss": loss + 0.1})
        found.append({"round": 2 * i + 2, "loss": loss - 0.1, "eval": {"dev": {"loss": dev}}})
    return found


def told(*args, **kwargs):
    watch = Watch("round", "dev", False)
    return [(r["round"], text) for r in records(*args, **kwargs) if (text := watch.add(r))]


def test_a_rise_on_dev_while_training_falls_is_told_once():
    ((round, text),) = told([10, 6, 5, 5.5, 5.6, 6, 7])
    assert round == 12  # the third evaluation above the lowest
    assert "from 5 (round 6) to 6 (round 12)" in text and "from 3 to 1.2" in text
    assert "selection.split=dev" in text and "augment.enabled" in text


def test_no_warning():
    assert not told([10, 6, 5, 4, 3, 2, 1])  # falls
    assert not told([10, 6, 5, 5.1, 5.1, 5.1, 5.1])  # within 3%
    assert not told([10, 6, 5, 5.6, 4.9, 5.6, 5.6])  # not in a row
    assert not told([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])  # training rises, too: it diverges
    assert not told([math.nan] * 7)
    watch = Watch("round", "dev", False)
    assert not any(watch.add({"step": i, "loss": 1.0}) for i in range(9))


def test_what_is_kept_needs_no_remedy():
    found = [Point(i, 5.0 - i, 1.0 + i) for i in range(4)]
    assert "selection" not in warning(found, "step", "dev", kept=True)
    assert "step 3" in warning(found, "step", "dev", kept=True)


LOSSES = st.lists(st.floats(0.1, 10), min_size=8, max_size=20)


@given(LOSSES, LOSSES, st.integers(0, 40))
def test_a_resumed_watch_tells_the_same(held_out, training, cut):
    """As if it had not been stopped, wherever that was."""
    whole = records(held_out, training)
    watch = Watch("round", "dev", False)
    for record in whole:
        watch.add(record)
    resumed = Watch("round", "dev", False, whole[:cut])
    for record in whole[cut:]:
        resumed.add(record)
    assert resumed.told == watch.told


@given(LOSSES)
def test_losses_that_fall_are_no_reason(held_out):
    falling = sorted(held_out, reverse=True)
    assert rising([Point(i, 1.0 / (i + 1), x) for i, x in enumerate(falling)]) is None
