"""Runs programs in processes forked from this one, which has imported what they import.

A line of JSON on stdin asks for a program: its module, arguments, folder, environment and the files
for its output. A line on stdout tells its exit status.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys

PRELOADED = (
    "fedasr.training.loop",
    "fedasr.training.evaluation",
    "dp_accounting.pld",
    "dp_accounting.rdp",
    "matplotlib.backends.backend_agg",
    "ml_collections.config_flags",
    "orbax.checkpoint",
    "tensorboardX",
    "tensorflow_datasets",
)


def run(request):
    """Becomes the program: never returns."""
    import jax

    os.environ.clear()
    os.environ.update(request["environment"])
    # Read by jax when it was imported, and different from one test to another.
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", quick not in ("", "0"))
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or None)
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


def main():
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # a program that needs it will say so
            importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            run(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    main()
