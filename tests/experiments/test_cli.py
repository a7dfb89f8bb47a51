import os
import subprocess
import sys

CODE = """
import sys
from pathlib import Path

import jax

from experiments import cli

cli.LARGE_PROGRAM = cli.LONG_COMPILATION = 0.0
cli.configure_compilation(Path(sys.argv[1]))
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
