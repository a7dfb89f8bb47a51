"""fedasr beside FedJAX, pfl-research and Flower, and beside plain loops: the same local training.

    python -m experiments.benchmarks.peers --envs=DIR [--peers=fedasr,fedjax jit,...]
        [--sizes=1.1M,50k] [--turns=5] [--rounds=5] [--plot=FILE.png] [--json]

Every other package has a virtual environment of its own under --envs, made from PyPI when first
needed (`REQUIREMENTS`; some GB in all). All are started and warmed up; then they have turns of
several rounds of a kind, one peer at work at a time, so that what else the machine does meets all
alike. (With single rounds in turns, what a peer does beside its rounds, as fedasr reads ahead,
would be counted for the next peer or kind.) A uniform round is 32 clients x 4 steps x 2 utterances
x 200 frames; in a ragged one clients make 1 to 16 steps.

fedasr does more than the others in a round: clipping by layer, noise and LAMB, and it pads and
batches examples in every round, beside the round before ("resident": its devices keep the corpus,
and batches are gathered there). FedJAX runs a model from flax's layers and optax's loss, and beside
it fedasr's own model and loss ("our model"), which it does not come with. Where a peer has several
processes each does its share of the clients, and no time is counted for adding up.

Figures are client steps per second, the median of the rounds; "ratio" is fedasr's over the peer's.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.benchmarks import plots
from experiments.benchmarks.peers.work import KINDS, Work
from fedasr.cli import common
from fedasr.errors import UserError

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
# What a virtual environment needs; "." is this project, "torch" what --torch says.
REQUIREMENTS = {
    "fedjax": ("fedjax==0.0.17", "."),
    "pfl": ("pfl==0.6.0", "torch"),
    "flower": ("flwr[simulation]==1.41.0", "torch"),
}
SIZES = {
    "1.1M": {"dim": 144, "mlp": 576, "blocks": 4, "heads": 4},
    "50k": {"dim": 32, "mlp": 128, "blocks": 1, "heads": 4},
}


class Peer(NamedTuple):
    """env: of `REQUIREMENTS`, "" for the one that this runs in. script: with_<this>.py. mode: see
    there. processes: side by side."""

    env: str
    script: str
    mode: str = ""
    processes: int = 1


def peers(cores: int) -> dict[str, Peer]:
    """All peers, on so many cores."""
    found = {
        "fedasr": Peer("", "fedasr", "rounds"),
        "fedasr resident": Peer("", "fedasr", "rounds resident"),
        "one jitted loop": Peer("", "fedasr", "bound"),
        "one client at a time": Peer("", "fedasr", "loop"),
        "fedjax jit": Peer("fedjax", "fedjax", "jit"),
        "fedjax pmap": Peer("fedjax", "fedjax", "pmap"),
        "fedjax jit (our model)": Peer("fedjax", "fedjax", "jit ours"),
        "fedjax pmap (our model)": Peer("fedjax", "fedjax", "pmap ours"),
        "pfl 1 process": Peer("pfl", "pfl"),
        "flower": Peer("flower", "flower"),
    }
    if cores > 1:
        found[f"pfl {cores} processes"] = Peer("pfl", "pfl", processes=cores)
    return found


def make_env(folder: Path, requirements: Sequence[str]) -> Path:
    """A virtual environment with these packages; returns its Python.

    Raises:
      UserError: they can't be installed.
    """
    python = folder / "bin" / "python"
    done = folder / "installed.json"
    if not done.is_file() or json.loads(done.read_text()) != list(requirements):
        print(f"making {folder}: {' '.join(requirements)}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        wanted = [str(_ROOT) if name == "." else name for name in requirements]
        found = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True
        )
        if found.returncode:
            raise UserError(f"{folder} can't be made: {found.stderr.strip().splitlines()[-1]}")
        done.write_text(json.dumps(list(requirements)))
    return python


class Worker:
    """The processes of a peer, which wait for commands."""

    def __init__(self, python: Path, peer: Peer, work: Work, cores: int, log: Path) -> None:
        environment = dict(os.environ, PYTHONPATH=str(_ROOT), PYTHONUNBUFFERED="1")
        environment.pop("XLA_FLAGS", None)
        if peer.mode.split(" ")[0] in ("rounds", "pmap"):  # a stream of clients for each core
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
        if peer.script in ("pfl", "flower"):
            environment["OMP_NUM_THREADS"] = "1"
        script = _HERE / f"with_{peer.script}.py"
        self._log, self._processes = log, []
        for part in range(peer.processes):
            fields = work.__dict__ | {"mode": peer.mode, "part": part, "parts": peer.processes}
            with log.open("a") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [python, script, json.dumps(fields)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        env=environment,
                    )
                )
        try:
            self._wait("ready")
        except BaseException:
            self.close()
            raise

    def _wait(self, word: str) -> None:
        for process in self._processes:
            for line in process.stdout:
                if line.strip() == word:
                    break
            else:
                raise UserError(f"a worker ended: see {self._log}")

    def round(self, kind: str) -> float:
        """Has a round done; returns seconds."""
        began = time.perf_counter()
        for process in self._processes:
            process.stdin.write(f"{kind}\n")
            process.stdin.flush()
        self._wait("done")
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(
    work: Work, chosen: dict[str, Peer], envs: Path, turns: int, rounds: int, torch: str
) -> dict[str, Any]:
    """{peer: {kind of round: client steps per second}}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers: dict[str, Worker] = {}
    times: dict[str, dict[str, list[float]]] = {}
    try:
        for name, peer in chosen.items():
            python = Path(sys.executable)
            if peer.env:
                wanted = [torch if x == "torch" else x for x in REQUIREMENTS[peer.env]]
                python = make_env(envs / peer.env, wanted)
            print(f"starting {name}", file=sys.stderr, flush=True)
            log = envs / f"{name.replace(' ', '-')}.log"
            workers[name] = Worker(python, peer, work, cores or 1, log)
            times[name] = {kind: [] for kind in KINDS}
        for _ in range(turns):
            for kind in KINDS:
                for name, worker in workers.items():
                    times[name][kind] += [worker.round(kind) for _ in range(rounds)]
    finally:
        for worker in workers.values():
            worker.close()
    return {
        name: {
            kind: sum(work.client_steps(kind)) / statistics.median(seconds)
            for kind, seconds in found.items()
        }
        for name, found in times.items()
    }


def draw(results: dict[str, Any], path: str) -> None:
    """Bars of client steps per second, a panel for each size of model."""
    figure, axes = plots.panels(len(results), 9, 4)
    for panel, (size, found) in zip(axes, results.items(), strict=True):
        plots.bars(panel, found, "client steps per second")
        panel.set_title(f"{size} parameters")
    plots.save(figure, path)


def run() -> None:
    """Measures and prints."""
    options = flags.FLAGS
    if not options.envs:
        raise UserError("--envs=DIR says where the peers' virtual environments are")
    if unknown := [size for size in options.sizes if size not in SIZES]:
        raise UserError(f"--sizes: {unknown[0]!r} is none of {', '.join(SIZES)}")
    known = peers(os.cpu_count() or 1)
    if unknown := [name for name in options.peers or () if name not in known]:
        raise UserError(f"--peers: {unknown[0]!r} is none of {', '.join(known)}")
    chosen = {name: known[name] for name in options.peers or known}
    envs = Path(options.envs).absolute()
    envs.mkdir(parents=True, exist_ok=True)
    results, ratios = {}, {}
    for size in options.sizes:
        work = Work(clients=options.clients, frames=options.frames, **SIZES[size])
        results[size] = found = measure(
            work, chosen, envs, options.turns, options.rounds, options.torch
        )
        if "fedasr" in found:
            ratios[size] = {
                name: {kind: found["fedasr"][kind] / speeds[kind] for kind in KINDS}
                for name, speeds in found.items()
                if name != "fedasr"
            }
    if options.plot:
        draw(results, options.plot)
    common.show({"client_steps_per_second": results, "ratio": ratios, "cores": os.cpu_count()})


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_string("envs", None, "Where the virtual environments are, or are made.")
    flags.DEFINE_list("peers", None, "Which; default all.")
    flags.DEFINE_list("sizes", list(SIZES), "Of the model.")
    flags.DEFINE_integer("turns", 5, "Of each peer, with each kind of round.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Of a turn, timed.", lower_bound=1)
    flags.DEFINE_integer("clients", 32, "In a round.", lower_bound=1)
    flags.DEFINE_integer("frames", 200, "Of an utterance.", lower_bound=100)
    flags.DEFINE_string("torch", "torch", "The requirement of PyTorch, such as torch==2.13.0+cpu.")
    plots.define_flag()


if __name__ == "__main__":
    _define_flags()
    common.main(run)
