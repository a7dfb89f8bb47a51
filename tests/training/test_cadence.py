"""When checkpoints are due by time, and what is said of the time that they take."""

import pytest

from fedasr.training.cadence import Cadence
from fedasr.training.sections import Checkpoint


class Clock:
    """Seconds that a test turns on."""

    now = 100.0

    def __call__(self):
        return self.now


def make(**settings):
    clock = Clock()
    return Cadence(Checkpoint(**settings), clock), clock


def test_a_checkpoint_is_due_when_the_last_one_is_old_and_none_is_being_written():
    cadence, clock = make(every_seconds=600.0)
    assert not cadence.is_old(busy=False)
    clock.now += 599
    assert not cadence.is_old(busy=False)
    clock.now += 1
    assert cadence.is_old(busy=False) and not cadence.is_old(busy=True)
    cadence.saved(0.0)
    assert not cadence.is_old(busy=False)
    clock.now += 601
    assert cadence.is_old(busy=False)


def test_without_seconds_rounds_alone_decide():
    cadence, clock = make()
    clock.now += 1e9
    assert not cadence.is_old(busy=False)


@pytest.mark.parametrize(
    ("deadline", "round_seconds", "writing", "told"),
    [
        (30.0, 1.0, 2.0, False),
        (30.0, 28.1, 2.0, True),
        (30.0, 27.9, 2.0, False),
        (30.0, 1.0, 15.1, True),  # the one before may be under way
        (30.0, 1.0, 14.9, False),
        (0.0, 1000.0, 1000.0, False),
        (30.0, 1000.0, 0.0, False),  # nothing is known yet
    ],
)
def test_a_deadline_that_cannot_be_kept_is_told_once(deadline, round_seconds, writing, told):
    cadence, clock = make(deadline=deadline)
    clock.now += 5000  # compiling
    cadence.unit()
    assert cadence.warnings(0.0) == []
    found = []
    for _ in range(3):
        clock.now += round_seconds
        cadence.unit()
        found += cadence.warnings(writing)
    assert len(found) == told
    if told:
        assert found[0].startswith("warning: after SIGTERM a round of")
        assert f"checkpoint.deadline={deadline:g} s" in found[0]
        assert "checkpoint.every_seconds" in found[0] and "\n" not in found[0]


def test_a_round_that_compiles_again_is_not_told():
    cadence, clock = make(deadline=30.0)
    for seconds in (100, 1, 1, 90, 1, 1):
        clock.now += seconds
        cadence.unit()
        assert cadence.warnings(2.0) == []


@pytest.mark.parametrize(
    ("waited", "passed", "told"), [(6.0, 119.0, True), (6.0, 121.0, False), (1.0, 2.0, False)]
)
def test_rounds_that_wait_for_checkpoints_are_told_once(waited, passed, told):
    cadence, clock = make()
    clock.now += passed
    cadence.saved(waited)
    assert cadence.warnings(0.0) == []  # none has been written
    found = cadence.warnings(3.0) + cadence.warnings(3.0)
    assert len(found) == told
    assert all("checkpoint.every_seconds" in text for text in found)
