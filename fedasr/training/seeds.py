"""Seeds that are trained once: kept beside the work directories, and found by what makes them.

A seed lies in `.seeds/IDENTITY/` in the folder of the work directories, a checkpoint that
`init_from` takes, too. Its identity is of all that its bits follow from: its settings, the model,
the data, this program's source, JAX and the devices.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.privacy import ledger
from fedasr.training import exactness
from fedasr.training.builders.devices import device_name
from fedasr.training.checkpoint import Checkpointer
from fedasr.training.config import Config
from fedasr.training.session import Session
from fedasr.training.stored import find_step, fit, has_checkpoint, verify

FOLDER = ".seeds"  # beside the work directories


def identity(config: Config, devices: Any) -> str:
    """Sixteen hexadecimal digits that name a seed.

    Args:
      config: of a run, with what it records of its data.
      devices: that train the seed.
    """
    tree = config.tree()
    training = {k: v for k, v in tree["seed_training"].items() if k != "reuse"}
    augment = {k: v for k, v in tree["augment"].items() if k != "start_round"}
    data = {k: tree["data"].get(k) for k in ("identity", "characters")}
    made_by = [exactness.machine(devices), device_name(devices), len(devices)]
    parts = [tree["seed"], tree["model"], tree["model_devices"], training, augment, data, made_by]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(session: Session, workdir: Path) -> Path:
    """Where the seed of a run lies, or would."""
    parts = session.parts
    return workdir.absolute().parent / FOLDER / identity(parts.config, parts.process_devices)


def find(folder: Path, like: Any) -> Any | None:
    """The parameters of a kept seed; None if there is none that can be read, on any process.

    Args:
      folder: of `folder_of`.
      like: parameters of the model.
    """
    found = _read(folder, like)
    return None if hosts.any_process(found is None) else found


def _read(folder: Path, like: Any) -> Any | None:
    if not has_checkpoint(folder):
        return None
    try:
        verify(find_step(folder))
        return fit(find_step(folder), {"params": like})["params"]
    except UserError:  # damaged: it is trained again, and replaced
        return None


def save(session: Session, folder: Path, params: Any) -> None:
    """Keeps a seed, in place of one that cannot be read.

    Raises:
      UserError: it cannot be written.
    """
    if not hosts.is_leader():
        return
    parts = session.parts
    folder.parent.mkdir(parents=True, exist_ok=True)
    entries = session.run_entries("seed", parts.seed_steps)
    metadata = {
        "stage": "seed",
        "units": parts.seed_steps,
        "config": parts.config.tree(),
        "ledger": {"known": True, "earlier": [], "own": ledger.to_data(entries)},
    }
    # Another run may be at the same: whoever is done first has its folder renamed.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        with Checkpointer(Path(scratch) / "seed", 1) as writer:
            writer.save(parts.seed_steps, {"params": params}, metadata)
            writer.wait()
        if folder.exists() and _read(folder, params) is None:
            shutil.rmtree(folder)
        if not folder.exists():
            os.rename(Path(scratch) / "seed", folder)
