"""Where memory, threads or files give out, a program says so in one line, whoever noticed."""

import subprocess
import sys

import pytest

HEAD = """
import logging, os, resource, sys, threading, time
from fedasr.cli import common, exhaustion
lack = RuntimeError("can't start new thread")

def limit(what, most):
    resource.setrlimit(what, (most, most))

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

class Final:
    def __del__(self):
        raise lack

def in_thread(error):
    def fail():
        raise error
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
"""
PROGRAMS = {
    # A thread and a finaliser fail first; what the program meets is another thing.
    "elsewhere": """
        in_thread(lack)
        del Final().x
    """,
    "logged": """
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            logging.getLogger("asyncio").error("never retrieved", exc_info=True)
            logging.getLogger("some.library").exception("what is this")
        raise ValueError("no result")
    """,
    "memory": """
        limit(resource.RLIMIT_AS, size() + (8 << 20))
        kept = []
        while True:
            kept.append(bytearray(1 << 16))
    """,
    "files": """
        limit(resource.RLIMIT_NOFILE, 32)
        kept = [open("/dev/null") for _ in range(99)]
    """,
    # The loop is left half-made, and the coroutine never starts: both would be said, too.
    "event loop": """
        import asyncio
        async def save():
            pass
        limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")))
        asyncio.run(save())
    """,
    # As where memory gives out in a thread's first lines.
    "a thread that never begins": """
        class Lost(threading.Thread):
            def _bootstrap(self):
                pass
        exhaustion._LOOK, exhaustion._PATIENCE = 0.1, 0.3
        threading.Thread(target=lambda: Lost(daemon=True).start(), daemon=True).start()
        time.sleep(60)
    """,
    "abort": """
        limit(resource.RLIMIT_AS, size() + (4 << 20))
        os.abort()
    """,
    "abort in a thread": """
        limit(resource.RLIMIT_NOFILE, 0)
        threading.Thread(target=os.abort).start()
        time.sleep(60)
    """,
}
WORDS = {
    "elsewhere": "no more threads: allow the process more threads",
    "logged": "no open files: allow",
    "memory": "out of memory: give",
    "files": "no open files: allow the process more open files (ulimit -n); what was saved",
    "event loop": "no open files: allow",
    "a thread that never begins": "a thread was started and never began",
    "abort": "error: ",  # of the address space, threads or memory are missed first
    "abort in a thread": "no open files",
}


def run(body):
    lines = [f"    {line.removeprefix('        ')}" for line in body.strip("\n").splitlines()]
    program = "\n".join([HEAD, "def program():", *lines, "", "sys.exit(common.status_of(program))"])
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are those of Linux")
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_line(name):
    done = run(PROGRAMS[name])
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and WORDS[name] in line
    assert "the same command goes on" in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as the others")
def test_other_faults_are_told_as_ever():
    done = run("in_thread(ValueError('of a thread'))\nraise KeyError('of the program')")
    assert done.returncode == 1
    assert "of a thread" in done.stderr and "of the program" in done.stderr
    assert done.stderr.count("Traceback") == 2
    done = run("os.abort()")
    assert done.returncode == -6 and "error: " not in done.stderr


def test_what_libraries_repeat_is_said_once():
    done = run("""
        import warnings
        common._say_once("persistent compilation cache", "compiled programs are not kept")
        for name in ("jit_a", "jit_b"):
            warnings.warn(
                f"Error writing persistent compilation cache entry for '{name}': OSError: "
                "[Errno 30] Read-only file system: '/x'"
            )
        warnings.warn("another")
        return 2
    """)
    first, second, *rest = done.stderr.splitlines()
    reason = "OSError: [Errno 30] Read-only file system: '/x'"
    assert first == f"warning: compiled programs are not kept ({reason})"
    assert "another" in second and len(rest) <= 1, done.stderr
