"""A round in every mode, beside what a CPU made of it.

    python -m experiments.benchmarks.device.goldens --record=FILE    # on a CPU, after a change

Kept is a sketch of a round's update: products of each parameter's with four fixed vectors of signs,
from which the relative distance of two updates in L2 is estimated without either being at hand. The
modes are those of `experiments.modes` that need neither several devices nor what users keep between
rounds. Products of float32 are not rounded to fewer bits (`jax_default_matmul_precision`).
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks.device import simulations
from experiments.benchmarks.workload import RandomSpeech
from experiments.modes import MODES, TRANSFORMER, model

FILE = Path(__file__).with_name("goldens.json")
OTHERS = ("local", "central", "seed first", "two devices", "augmented later")
NAMES = tuple(name for name in MODES if name not in OTHERS)
# Of distances of updates and of losses: far above the rounding of float32, far below a step.
TOLERANCE = 1e-3
_SIGNS = 4
_BASE = {
    "cohort": 3,
    "rounds": 2,
    "chunk": 1,
    "client.steps": 2,
    "client.batch_size": 2,
    "client.learning_rate": 0.1,
    "privacy.clip_norm": 0.1,
    "privacy.sigma": 1e-3,
    "privacy.delta": 1e-6,
    "privacy.deployments": (),
}


def round_of(name: str, device: jax.Device) -> dict[str, Any]:
    """A round of a mode on one device: its "loss", and a "sketch" (see `sketch`) of the update."""
    changes = {**_BASE, **model("transformer", TRANSFORMER), **MODES[name]}
    config = simulations.configuration(changes)
    train = RandomSpeech([3, 4, 3, 4, 3, 4], frames=48, labels=4)
    simulation = simulations.make(config, train, [device], 1)
    before = simulations.parameters(config)
    state = simulation.init(before, simulations.ROOT)
    ((state, metrics),) = simulation.run(state, 1)
    after = jax.device_get(state.params)
    return {"loss": metrics.loss, "sketch": sketch(before, after)}


def sketch(before: Any, after: Any) -> list[list[float]]:
    """Products of a change with fixed vectors of signs, by parameter."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    rows = []
    for i, (old, new) in enumerate(pairs):
        change = np.asarray(new, np.float64).ravel() - np.asarray(old, np.float64).ravel()
        signs = 2 * np.random.default_rng(i).integers(0, 2, (_SIGNS, change.size)) - 1
        rows.append([float(f"{x:.9g}") for x in signs @ change])
    return rows


def distance(found: list[list[float]], expected: list[list[float]]) -> float:
    """The relative distance of two changes in L2, estimated; infinite for other parameters."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if one.shape != other.shape or not np.all(np.isfinite(one)):
        return math.inf
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))


def compare(name: str, found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of modes."""
    update = distance(found["sketch"], expected["sketch"])
    loss = abs(found["loss"] - expected["loss"]) / max(abs(expected["loss"]), 1e-30)
    return {
        "mode": name,
        "ok": bool(update <= TOLERANCE and loss <= TOLERANCE),
        "update's distance": update,
        "loss's distance": float(loss),
        "tolerance": TOLERANCE,
    }


def rows(names: Iterable[str], device: jax.Device, workers: int = 1) -> Iterator[dict[str, Any]]:
    """Each mode beside its golden, as they are done.

    Args:
      names: of modes. device: to run on. workers: modes that are compiled at a time.
    """
    expected = json.loads(FILE.read_text())
    jax.config.update("jax_default_matmul_precision", "highest")

    def one(name: str) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            row = compare(name, round_of(name, device), expected[name])
        except Exception as error:  # the other modes go on
            said = " ".join(f"{type(error).__name__}: {error}".split())
            row = {"mode": name, "ok": False, "error": said[:300]}
        return row | {"seconds": time.perf_counter() - began}

    with futures.ThreadPoolExecutor(workers) as pool:
        for done in futures.as_completed([pool.submit(one, name) for name in names]):
            yield done.result()


_RECORD = flags.DEFINE_string("record", None, "File to write what this machine's CPU makes.")


def main(argv: list[str]) -> None:
    """Records the goldens."""
    if len(argv) > 1 or not _RECORD.value:
        raise app.UsageError("give --record=FILE, and nothing else")
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices("cpu")[0]
    found = {}
    for name in NAMES:
        found[name] = round_of(name, device)
        print(name, found[name]["loss"], flush=True)
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()]
    Path(_RECORD.value).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    app.run(main)
