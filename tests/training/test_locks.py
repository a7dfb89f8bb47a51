"""Only contention is contention; without flock a file guards the directory."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from fedasr.errors import UserError
from fedasr.training import locks
from fedasr.training.locks import lock_directory


@pytest.fixture
def without_flock(monkeypatch):
    """without_flock(number): flock fails with that error from now on."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.4)
    return lambda number: monkeypatch.setattr(locks, "_flock", lambda file: number)


def test_a_lock_is_held_once_and_freed(tmp_path):
    with lock_directory(tmp_path) as lock:
        assert lock.warning == ""
        with pytest.raises(UserError, match="in use by another process"):
            lock_directory(tmp_path)
    lock_directory(tmp_path).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_no_lock_is_not_contention(tmp_path, without_flock, number):
    without_flock(number)
    with lock_directory(tmp_path) as lock:
        assert os.strerror(number) in lock.warning and ".owner" in lock.warning
        with pytest.raises(UserError, match="in use"):
            lock_directory(tmp_path)
    assert not (tmp_path / ".owner").exists()
    lock_directory(tmp_path).close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_contention_is_contention(tmp_path, without_flock, number):
    without_flock(number)
    with pytest.raises(UserError, match="in use"):
        lock_directory(tmp_path)
    assert not (tmp_path / ".owner").exists()


def test_an_owner_that_died_here_is_known_at_once(tmp_path, without_flock):
    code = f"""
import os, sys
from fedasr.training import locks
locks._flock = lambda file: {errno.ENOSYS}
lock = locks.lock_directory(sys.argv[1])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / ".owner").exists()
    without_flock(errno.ENOSYS)
    began = time.monotonic()
    with lock_directory(tmp_path):
        assert time.monotonic() - began < 0.4
    # A process of the same number that began at another time is somebody else.
    other = {"host": locks.socket.gethostname(), "boot": locks._boot(), "pid": os.getpid()}
    (tmp_path / ".owner").write_text(json.dumps(other | {"started": "1", "name": "x"}))
    lock_directory(tmp_path).close()


def test_an_owner_elsewhere_lives_as_long_as_its_file_changes(tmp_path, without_flock, monkeypatch):
    without_flock(errno.ENOLCK)
    with lock_directory(tmp_path), monkeypatch.context() as elsewhere:
        elsewhere.setattr(locks, "_boot", lambda: "another machine")
        with pytest.raises(UserError, match="in use"):
            lock_directory(tmp_path)
    (tmp_path / ".owner").write_text('{"host": "gone", "boot": "b", "pid": 1, "started": "2"}')
    began = time.monotonic()
    lock_directory(tmp_path).close()
    assert time.monotonic() - began >= 0.4
    for damaged in ("", "[]", "{}", "\0"):
        (tmp_path / ".owner").write_text(damaged)
        lock_directory(tmp_path).close()


def test_the_copy_of_a_directory_in_use_is_free(tmp_path, without_flock):
    without_flock(errno.ENOSYS)
    (tmp_path / "run").mkdir()
    with lock_directory(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with pytest.raises(UserError, match="in use"):
            lock_directory(tmp_path / "run")
        began = time.monotonic()
        with lock_directory(tmp_path / "copy"):
            assert time.monotonic() - began < 0.4


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to --workdir"):
        lock_directory(tmp_path / "file")
