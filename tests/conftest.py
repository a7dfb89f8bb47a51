"""Two CPU devices, and one cache of compiled programs for all the processes of a test session."""

import atexit
import os
import shutil
import tempfile
from multiprocessing import forkserver

# With pytest-xdist the controller gets here first: its workers, and the programs that tests start,
# inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = tempfile.mkdtemp(prefix="fedasr-tests-")
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes a third of the time and gives the same operations in slower code, here and in
# programs: see `optimized` for where it is not so.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import numpy as np
import pytest

from fedasr.data.batching import Store

jax.config.update("jax_num_cpu_devices", 2)


def dense_batches(batches):
    """A chunk's batches as arrays [clients, steps, batch, ...], by a plain loop over a `Store`."""
    if not isinstance(batches, Store):
        return batches
    index = batches.index.reshape(*batches.index.shape[:2], -1)
    out = {"mask": index >= 0}
    for name, values in batches.arrays.items():
        if name in batches.offsets:
            tail = (max(span[name].shape[1] for span in batches.spans), *values.shape[2:])
            out[f"{name}_length"] = np.zeros(index.shape, np.int32)
        else:
            tail = values.shape[2:]
        out[name] = np.zeros((*index.shape, *tail), values.dtype)
        for at in np.argwhere(index >= 0):
            client, row = at[0], index[tuple(at)]
            if name in batches.offsets:
                first, length = (
                    batches.offsets[name][client, row],
                    batches.lengths[name][client, row],
                )
                out[name][tuple(at)][:length] = values[client, first : first + length]
                out[f"{name}_length"][tuple(at)] = length
            else:
                out[name][tuple(at)] = values[client, row]
    return out


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Slow tests, planted faults (parts of the suite, again and again) and long studies are for who
    asks: -m slow, -m planted, -m long. Files with the longest tests come first, so that parallel
    workers finish together.
    """
    asked = config.option.markexpr or ""
    for name in ("slow", "planted", "long", "accelerator"):
        if not (name in asked or (name == "slow" and "planted" in asked)):
            items[:] = [item for item in items if not item.get_closest_marker(name)]
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker that has no more tests takes half of another's, instead of all in small turns.

    Neighbours, which share fixtures and compiled functions, mostly stay in one process.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="module")
def optimized():
    """Compiles as users do, here and in programs: for numerics of kernels, and for long loops."""
    _forget_compilations()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    _forget_compilations()


def _forget_compilations():
    """What was compiled in one way has other bits than in the other, here and in forked processes.

    The server that processes are forked from keeps the environment that it was started in.
    """
    jax.clear_caches()
    forkserver._forkserver._stop()


@pytest.fixture(scope="session")
def dense():
    """`dense_batches`."""
    return dense_batches


def pytest_terminal_summary(terminalreporter):
    """The planted faults that were run, and the tests that catch them."""
    rows = [
        (report.outcome, *value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "planted"
    ]
    if rows:
        terminalreporter.section("planted faults")
    for outcome, area, name, breaks, tests in rows:
        caught = "caught by" if outcome == "passed" else "NOT CAUGHT by"
        terminalreporter.write_line(f"{area}: {name} ({breaks})")
        terminalreporter.write_line(f"    {caught} {', '.join(tests)}")
