"""What may not change when code is moved: short runs in every mode, as hashes.

    python -m experiments.goldens --record=before.json
    python -m experiments.goldens --compare=before.json [--modes=dense,local]

Each mode trains three rounds on a small generated corpus. Kept are a hash of all bits of the
parameters, the run's identity, what the run would be (`--dry_run`, whole), and the tree of default
settings. Bits are the same only with the same JAX on the same kind of processor: record and
compare on one machine.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in half the time
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.modes import MODES, TRANSFORMER, model
from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.fusion import methods
from fedasr.fusion.run import run as fuse
from fedasr.training import loop
from fedasr.training.builders.identities import run_identity
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

RATE = 16_000
FUSION = "fusion step"


def make_data(folder: Path) -> None:
    """6 users, each with 3 or 4 utterances of tones of half a second; others in "dev" and "seed".

    The last user's are twice as long: two padded lengths are few programs to compile.
    """
    rng = np.random.default_rng(0)

    def utterance(user: int, number: int, split: str) -> Utterance:
        samples = int(RATE * rng.uniform(0.5, 0.6) * (2 if user == 5 else 1))
        tone = np.sin(np.arange(samples) * rng.uniform(0.05, 0.6))
        sound = (0.2 * tone + 0.02 * rng.standard_normal(samples)).astype(np.float32)
        text = " ".join(rng.choice(["one", "two", "six"], rng.integers(1, 3)))
        return Utterance(f"{split}-{user}-{number}", f"{user}", text, split, lambda: (sound, RATE))

    said = [utterance(u, i, "train") for u in range(6) for i in range(3 + u % 2)]
    said += [utterance(u, i, "dev") for u in range(6, 8) for i in range(2)]
    said += [utterance(8, i, "seed") for i in range(3)]
    prepare(said, folder, name="goldens")


def configuration(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The small run of a mode."""
    config = default_config()
    changes = copy.deepcopy(changes)
    changes = model("transformer", TRANSFORMER) | changes
    config.model.name = changes.pop("model.name")
    config.model.options = changes.pop("model.options")
    config.data.update(dir=str(folder), eval=("dev",))
    config.update(rounds=3, cohort=3, devices=1, chunk=1)
    config.client.update(steps=2, batch_size=2)
    config.privacy.update(clip_norm=0.1, sigma=1e-3, delta=1e-6, deployments=((64, 1000),))
    config.checkpoint.every = 3
    config.evaluation.every = 3
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


def digest(params: Any) -> str:
    """Of the names, shapes and bits of all leaves."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        found.update(value.tobytes())
    return found.hexdigest()[:16]


def measure(folder: Path, workdir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a mode."""
    config = configuration(folder, changes)
    would_be = loop.dry_run(config)
    del would_be["config"]["data"]["dir"], would_be["device"]
    summary = loop.run(config, workdir)
    assert summary["status"] == "completed", summary
    params = restore_params(workdir)
    return {
        "parameters": digest(params),
        "identity": run_identity(Config.of(config)),
        "dry_run": would_be,
        "wer": summary["wer"],
    }


def fusion_step() -> dict[str, Any]:
    """Of ten evaluations of evolution, two seeds."""
    task = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    method = methods.evolve(
        lambda params: jax.nn.sigmoid(jnp.sum(task * params, 1)),
        methods.Evolution(population=4, mutation=0.2),
    )
    found = fuse(method, lambda key: jax.random.normal(key, (2, 6)), [0, 1], 10, every=5)
    return {"parameters": digest(found.best)}


def defaults() -> Any:
    """The tree of default settings."""
    return to_json(default_config().to_dict())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Runs say much."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Lines that say what is not equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{where}/{key}")
        ]
    return [] if before == after else [f"{where}: {before!r} became {after!r}"]


_RECORD = flags.DEFINE_string("record", None, "file to write")
_COMPARE = flags.DEFINE_string("compare", None, "file to compare with")
_MODES = flags.DEFINE_list("modes", [], f"some of {[*MODES, FUSION]}; default all")


def main(argv: list[str]) -> None:
    """Records or compares; exit status 1 if anything differs."""
    if len(argv) > 1 or bool(_RECORD.value) == bool(_COMPARE.value):
        raise app.UsageError("give either --record or --compare, and nothing else")
    wanted = _MODES.value or [*MODES, FUSION]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        make_data(Path(scratch) / "data")
        for name in wanted:
            if name == FUSION:
                found[name] = fusion_step()
            else:
                found[name] = measure(
                    Path(scratch) / "data", Path(scratch) / f"run {name}", MODES[name]
                )
            sys.__stderr__.write(f"{name}: {found[name]['parameters']}\n")
    found = json.loads(json.dumps({"modes": found, "defaults": defaults()}))
    if _RECORD.value:
        Path(_RECORD.value).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    before = json.loads(Path(_COMPARE.value).read_text())
    before["modes"] = {name: before["modes"].get(name) for name in wanted}
    lines = differences(before, found)
    print("\n".join(lines) or f"all equal ({len(wanted)} modes)")
    sys.exit(bool(lines))


if __name__ == "__main__":
    app.run(main)
