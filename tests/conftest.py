"""Two CPU devices, and one cache of compiled programs for all the processes of a test session."""

import atexit
import os
import shutil
import tempfile

# With pytest-xdist the controller gets here first: its workers, and the programs that tests start,
# inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = tempfile.mkdtemp(prefix="fedasr-tests-")
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax

jax.config.update("jax_num_cpu_devices", 2)
