"""What one accelerator does, in at most 12 minutes and without a network: benchmarks in stages.

    experiments/benchmarks/device.sh [--tiny] [--out=DIR] [--stages=ctc,...] [--minutes=12]
        [--data=DIR]

In this order: what device there is; a round of each mode beside what a CPU made of it; the
255M-parameter model's utilisation; small clients, vmapped, against a loop over one after another;
CTC's kernel; fused attention; what chunk=auto chooses; the quickstart. Each stage is a process of
its own with a limit of its own, so that none takes another's time or memory. After every figure
DIR (default: experiments/benchmarks/results) has all so far, as `KIND-OF-DEVICE.json` and as tables
in `KIND-OF-DEVICE.md`: a run that is cut off keeps what it had.

--tiny: sizes that a CPU does in minutes; the files' names then say so. --data: a prepared corpus
for the quickstart, in place of synthetic digits, which are made when first needed.

Needed are jax, flax, optax, orbax-checkpoint, chex, numpy, matplotlib and absl-py; the quickstart
takes all of fedasr's dependencies, and is left out where one is missing. Exit status: 0 if every
stage was done and every check in it held, 1 if not.
"""

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.benchmarks.device import tables
from fedasr.cli import common
from fedasr.errors import UserError

_MODULES = "experiments.benchmarks"
_RESULTS = Path(__file__).parents[1] / "results"
# What the quickstart needs beside what every stage does.
_OF_QUICKSTART = ("ml_collections", "dp_accounting", "array_record", "anyascii", "tensorboardX")
_OF_SUMMARY = (
    "status",
    "parameters",
    "rounds",
    "initial_wer",
    "wer",
    "client_steps_per_second",
    "wall_seconds",
    "chunk",
)


class Stage(NamedTuple):
    """A program that prints rows, each a JSON object in a line.

    title. limit: seconds. command: arguments of Python. tiny: more of them, for small sizes.
    fields: of a row to keep; () for all.
    """

    title: str
    limit: float
    command: list[str]
    tiny: list[str]
    fields: tuple[str, ...] = ()

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a table has of a row."""
        return {name: row[name] for name in self.fields or row if name in row}


def _own(name: str) -> list[str]:
    return ["-m", f"{_MODULES}.device.stages", f"--stage={name}"]


def stages(scratch: str, data: str) -> dict[str, Stage]:
    """All of them, in their order; the limits come to less than 12 minutes.

    Args:
      scratch: a folder for runs. data: of the quickstart; "" for its own.
    """
    large = ["-m", f"{_MODULES}.large", "--json", "--scan_blocks"]
    cohort = ["-m", f"{_MODULES}.cohort", "--json", "--nomemory"]
    train = [
        "-m",
        "experiments.train",
        "--config=quickstart",
        "--json",
        f"--workdir={scratch}/run",
        *([f"--config.data.dir={data}"] if data else []),
    ]
    small = [f"--config.model.options.{x}" for x in ("dim=16", "blocks=1", "heads=2", "mlp=16")]
    small += [f"--config.client.{x}" for x in ("steps=1", "batch_size=2")]
    small += [f"--config.seed_training.{x}" for x in ("steps=2", "batch_size=2")]
    return {
        "device": Stage("The device", 40, _own("device"), []),
        "correctness": Stage(
            "A round of each mode, beside a CPU's", 150, _own("correctness"), ["--tiny"]
        ),
        "utilisation": Stage(
            "Rounds of the 255M-parameter model",
            170,
            [*large, "--cohort=4", "--steps=4", "--rounds=3"],
            ["--cohort=1", "--steps=1"],
        ),
        "small": Stage(
            "Small clients: client steps per second",
            120,
            [*cohort, "--chunks=1,8,all", "--rounds=3"],
            ["--clients=2", "--dim=16", "--blocks=1", "--frames=24", "--chunks=all", "--rounds=1"],
        ),
        "ctc": Stage("CTC: loss and gradient", 45, _own("ctc"), ["--tiny"]),
        "attention": Stage("Attention and its derivatives", 45, _own("attention"), ["--tiny"]),
        "chunk": Stage("chunk=auto", 60, _own("chunk"), ["--tiny"]),
        "quickstart": Stage(
            "The quickstart, cut short",
            80,
            [*train, "--config.rounds=20", "--config.seed_training.steps=100"],
            ["--config.rounds=1", "--config.cohort=2", *small],
            _OF_SUMMARY,
        ),
    }


def run_stage(
    command: list[str], limit: float, each: Callable[[dict[str, Any]], None]
) -> tuple[str, float]:
    """Runs a program and hands on every row that it prints.

    Args:
      command: arguments of Python. limit: seconds; the program and all that it started are then
        ended. each: called with every row as it comes.

    Returns:
      "done", or why not, in a line; and the seconds it took.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            in_time = _read(process, began + limit, each)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - began
        if not in_time:
            return f"cut off after {limit:.0f} s", seconds
        if process.returncode == 0:
            return "done", seconds
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
        return f"failed: {said[-1].strip()[:300] if said else 'it said nothing'}", seconds


def _read(process: Any, end: float, each: Callable[[dict[str, Any]], None]) -> bool:
    """Reads rows until the program has ended; False if it had not by then."""
    text, out = "", process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(out, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                return False
            read = os.read(out, 1 << 16).decode(errors="replace")
            if not read:
                break
            *lines, text = (text + read).split("\n")
            for line in lines:
                if line.startswith("{"):
                    each(json.loads(line))
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _missing() -> list[str]:
    """Packages of the quickstart that are not there."""
    return [name for name in _OF_QUICKSTART if importlib.util.find_spec(name) is None]


def run() -> int:
    """Runs the stages; see the module."""
    options = flags.FLAGS
    # As Ctrl-C does: a stage that is under way is ended, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="fedasr-device-") as scratch:
        every = stages(scratch, options.data)
        if unknown := [name for name in options.stages if name not in every]:
            raise UserError(f"--stages={unknown[0]}: choose from {', '.join(every)}")
        results = tables.Results(Path(options.out or _RESULTS), options.tiny)
        for name, stage in every.items():
            if options.stages and name not in ("device", *options.stages):
                continue
            results.begin(name, stage.title)

            def add(row: dict[str, Any], stage: Stage = stage) -> None:
                results.add(stage.kept(row))

            limit = min(options.stage_seconds or stage.limit, end - time.monotonic())
            if name == "quickstart" and (missing := _missing()):
                results.end(f"left out: {', '.join(missing)} is not installed", 0.0)
            elif limit < 5:
                results.end("left out: no time was left", 0.0)
            else:
                command = [*stage.command, *(stage.tiny if options.tiny else [])]
                results.end(*run_stage(command, limit, add))
            print(f"{stage.title}: {results.status(name)}", file=sys.stderr, flush=True)
    print(results.path)
    return 0 if results.good() else common.FAILED


def _define_flags() -> None:
    flags.DEFINE_bool("tiny", False, "Sizes that a CPU does in minutes.")
    flags.DEFINE_string("out", "", "Folder of the results; default: those of this clone.")
    flags.DEFINE_list("stages", [], "Some of them; default: all.")
    flags.DEFINE_float("minutes", 12.0, "For all stages together.", 0.1, 600.0)
    flags.DEFINE_float("stage_seconds", 0.0, "For each stage, in place of its own limit.", 0.0)
    flags.DEFINE_string("data", "", "A prepared corpus for the quickstart.")


if __name__ == "__main__":
    _define_flags()
    common.main(run, "__main__")
