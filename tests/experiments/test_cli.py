import os
import platform
import subprocess
import sys

import pytest

CODE = """
import sys
from pathlib import Path

import jax

from fedasr.cli import common

common.LARGE_PROGRAM = common.LONG_COMPILATION = 0.0
common.configure_compilation(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def doubled(x):
    return 2 * x


print(jax.jit(doubled)(jax.numpy.arange(3)).sum())
"""


def test_compiled_programs_are_kept_and_named(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    for own in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path)],
            env=environment | own,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "compiling jit(doubled) ..." in done.stderr
        assert "compiled jit(doubled) in " in done.stderr
        folder = tmp_path / ("own" if own else ".compile-cache")
        assert any("doubled" in path.name for path in folder.rglob("*"))


FAULTS = """
import resource, sys
import numpy as np
from fedasr.cli import common
if sys.argv[1] == "keep":
    common.keep_memory()
for step in range(6):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(6_000_000) for _ in range(3)]  # above what glibc keeps by itself
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of glibc's")
def test_memory_is_kept_between_steps():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}

    def faults(mode, **extra):
        command = [sys.executable, "-c", FAULTS, mode]
        found = subprocess.run(
            command, env=environment | extra, capture_output=True, text=True, check=True
        )
        return int(found.stdout)

    plain = faults("plain")
    assert faults("keep") < plain / 10
    assert faults("keep", MALLOC_ARENA_MAX="2") > plain / 2  # the user's own settings come first
