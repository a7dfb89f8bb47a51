"""Sinks that fail, hang or vanish: the run goes on, and says so once."""

import errno
import io
import json
import os
import shutil
import threading
import time

import pytest

from fedasr.training import logging as run_logging
from fedasr.training.logging import RunLogger, read_metrics
from fedasr.training.sinks import Sink


def rounds(log, numbers):
    for number in numbers:
        log.round(number, {"loss": 1.0 / number})


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hang(*args, **kwargs):
    threading.Event().wait()


@pytest.mark.parametrize("trouble", [full, hang])
def test_tensorboard_is_left_behind(tmp_path, monkeypatch, trouble):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(run_logging._Events, "write", trouble)
    out = io.StringIO()
    began = time.monotonic()
    with RunLogger(tmp_path, stream=out) as log:
        rounds(log, range(1, 2001))
        monkeypatch.setattr(
            log._to_tensorboard, "close", lambda: Sink.close(log._to_tensorboard, 0.1)
        )
    assert time.monotonic() - began < 10
    assert len(read_metrics(tmp_path)) == 2000
    assert list(log.failures) == ["TensorBoard"]
    assert out.getvalue().count("warning: TensorBoard: ") == 1


def test_a_folder_where_tensorboard_is_a_file_or_cannot_be_made(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("in the way")
    with RunLogger(tmp_path, stream=io.StringIO()) as log:
        rounds(log, [1, 2])
    assert len(read_metrics(tmp_path)) == 2 and "TensorBoard" in log.failures


def test_metrics_that_cannot_be_written_come_back_whole(tmp_path, monkeypatch):
    """A disk that is full for a while leaves no half of a line behind."""
    out = io.StringIO()
    with RunLogger(tmp_path, tensorboard=False, stream=out) as log:
        rounds(log, [1])
        whole = log._file._file

        class Full:
            def __getattr__(self, name):
                return getattr(whole, name)

            def write(self, data):
                whole.write(data[:5])
                full()

        log._file._file = Full()
        rounds(log, [2, 3])
        log._file._file = whole
        rounds(log, [4])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 4]
    assert list(log.failures) == ["metrics.jsonl"] and "No space" in log.failures["metrics.jsonl"]
    assert out.getvalue().count("metrics.jsonl") == 1


def test_a_work_directory_that_vanishes(tmp_path):
    with RunLogger(tmp_path / "run", stream=io.StringIO()) as log:
        rounds(log, [1])
        while (tmp_path / "run").exists():  # something may be written while it is removed
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        rounds(log, [2, 3])


def test_a_full_disk_at_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(run_logging, "_replace", full)
    with RunLogger(tmp_path, 0, stream=io.StringIO(), tensorboard=False) as log:
        rounds(log, [1])
    assert "metrics.jsonl" in log.failures


class Pipe(io.StringIO):
    """A terminal's pipe that nobody reads any more, or that is closed."""

    def __init__(self, trouble):
        super().__init__()
        self.write = trouble


def broken(*args):
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize("trouble", [broken, hang])
def test_a_terminal_that_does_not_listen(tmp_path, trouble):
    began = time.monotonic()
    log = RunLogger(tmp_path, stream=Pipe(trouble), tensorboard=False, interval=0, patience=0.2)
    log.start(3)
    rounds(log, [1, 2, 3])
    log.message("hello")
    log.close()
    assert time.monotonic() - began < 8
    assert len(read_metrics(tmp_path)) == 3 and list(log.failures) == ["progress"]


def test_a_sink_is_waited_for_once_and_again_when_it_answers():
    told, go, done = [], threading.Event(), []
    sink = Sink("slow", lambda *what: told.append(what), patience=0.2)
    sink(go.wait)
    began = time.monotonic()
    for number in range(50):
        sink(done.append, number)
    assert time.monotonic() - began < 0.2
    go.set()
    deadline = time.monotonic() + 5
    while len(done) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == list(range(50))  # in order, and none is lost below the queue's size
    sink(done.append, 50)
    assert done[-1] == 50
    assert told == [("slow", "it has not answered for 0.2 s")]


def test_metrics_that_are_removed_begin_anew_and_it_is_said(tmp_path):
    out = io.StringIO()
    with RunLogger(tmp_path, tensorboard=False, stream=out) as log:
        rounds(log, [1, 2])
        (tmp_path / "metrics.jsonl").unlink()
        rounds(log, [3, 4])
        (tmp_path / "metrics.jsonl").unlink()
        rounds(log, [5])
    assert [record["round"] for record in read_metrics(tmp_path)] == [5]
    assert "was removed while the run wrote to it" in log.failures["metrics.jsonl"]
    assert out.getvalue().count("metrics.jsonl") == 2  # one line with its path


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_something_else_that_is_called_like_the_metrics(tmp_path, what):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if what == "folder" else os.mkfifo(path)
    began = time.monotonic()
    out = io.StringIO()
    log = RunLogger(tmp_path, 3, 0, tensorboard=False, stream=out, patience=0.2)
    rounds(log, [4, 5])
    log._to_file.close(0.1)
    assert log.kept == [] and list(log.failures) == ["metrics.jsonl"]
    log._to_terminal.close(1.0)
    assert out.getvalue().count("warning: metrics.jsonl") == 1
    assert time.monotonic() - began < 5
