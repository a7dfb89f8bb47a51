"""Signals become a flag, then an exception, and the handlers are restored."""

import contextlib
import os
import signal
import threading

import pytest

from fedasr.training import interrupts
from fedasr.training.interrupts import graceful_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag(number):
    with graceful_stop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_raises(second):
    with pytest.raises(KeyboardInterrupt), graceful_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)


def test_previous_handlers_come_back():
    def mine(number, frame):
        raise AssertionError("not called")

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError), graceful_stop():
            assert signal.getsignal(signal.SIGTERM) is not mine
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_stderr_says_what_happens(capfd):
    with graceful_stop():
        os.kill(os.getpid(), signal.SIGTERM)
    assert "SIGTERM: stopping after this round" in capfd.readouterr().err


@pytest.mark.parametrize("trouble", ["closed", "full"])
def test_a_signal_is_heard_though_nobody_listens(trouble, monkeypatch):
    reading, writing = os.pipe()
    if trouble == "closed":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(1 << 16))
        os.set_blocking(writing, True)
    monkeypatch.setattr(interrupts, "_STDERR", writing)
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    os.close(writing)


def test_no_op_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with graceful_stop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
