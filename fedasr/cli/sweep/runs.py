"""One run of a sweep: where it is, its command, and what became of it."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr import recipes
from fedasr.recipes import tables
from fedasr.recipes.tables import Outcome, Run, Table
from fedasr.training.logging import from_json, read_metrics

RECORD_FILE = "sweep.json"
DONE = (tables.COMPLETED, tables.DIVERGED)
_ROOT = Path(__file__).parents[3]  # of a clone
Outcomes = dict[str, Outcome]


def config_path(config: str) -> str:
    """The file of a --config=FILE:ARGUMENTS."""
    return config.partition(":")[0]


def _resolve_config(config: str, arguments: str) -> str:
    """A configuration named from the root of a clone can be used from any folder."""
    path, _, given = config.partition(":")
    if not Path(path).exists() and (_ROOT / path).exists():
        path = str(_ROOT / path)
    return ":".join(filter(None, (path, ",".join(filter(None, (given, arguments))))))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sweep's runs are and how one is launched.

    Attributes:
      out: folder of the sweep.
      launcher: command that takes the flags of `fedasr train`.
      fixed: fields of every run, which win over the table's.
    """

    out: Path
    launcher: tuple[str, ...] = (sys.executable, "-m", "fedasr", "train")
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def workdir(self, run: Run) -> Path:
        """The run's folder."""
        return self.out / run.table / run.name

    def flags(self, table: Table, run: Run) -> list[str]:
        """Flags of the launcher for a run."""
        fields = {**run.overrides}
        if run.start:
            fields["init_from"] = self.out / run.table / run.start
        fields |= self.fixed
        return [
            f"--config={_resolve_config(table.config, run.arguments)}",
            f"--workdir={self.workdir(run)}",
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]

    def command(self, table: Table, run: Run) -> list[str]:
        """The command of a run."""
        return [*self.launcher, *self.flags(table, run)]


def read_outcome(folder: Path, clock: bool = False) -> Outcome:
    """What became of the run in a folder, by its launcher's summary and the sweep's record.

    clock: whether the outcome is to have the simulated clock's.
    """
    summary_path, record_path = folder / "summary.json", folder / RECORD_FILE
    summary, record = read_json(summary_path), read_json(record_path)
    status = summary.get("status")
    # A refusal leaves an older summary, of another configuration, in its place. A summary that is
    # newer than the record comes from a run outside the sweep.
    if record.get("error") and (
        not summary or summary_path.stat().st_mtime_ns <= record_path.stat().st_mtime_ns
    ):
        if status == tables.DIVERGED and not record.get("refused"):
            return Outcome(tables.DIVERGED, summary)
        return Outcome(tables.FAILED, {}, record["error"])
    if status in DONE:
        return Outcome(status, summary, clock=_clock(folder) if clock else ())
    return Outcome(tables.UNFINISHED if (folder / "config.json").exists() else tables.MISSING)


def _clock(folder: Path) -> tuple[tuple[float, dict[str, float]], ...]:
    """See `Outcome.clock`."""
    found = []
    for record in read_metrics(folder):
        seconds = (record.get("participation") or {}).get("clock")
        if seconds is not None and record.get("eval"):
            found.append((seconds, {split: x["wer"] for split, x in record["eval"].items()}))
    return tuple(found)


def read_outcomes(table: Table, out: Path) -> Outcomes:
    """Outcomes of all the runs of a table, by name."""
    clock = bool(table.reach)
    return {
        run.name: read_outcome(out / table.name / run.name, clock) for run in tables.possible(table)
    }


def settled(table: Table, place: Place) -> Outcomes:
    """The outcomes that need no further run: completed or diverged, by the same command.

    Failed runs are tried again. So are runs by another command or by a configuration file that has
    changed since: whether the difference matters is for the launcher to say.
    """
    kept = {}
    for run in tables.possible(table):
        folder = place.workdir(run)
        outcome = read_outcome(folder)
        record = read_json(folder / RECORD_FILE)
        same = not record or record.get("of") == identity(place.flags(table, run))
        if same and outcome.status in DONE:
            kept[run.name] = outcome
    return kept


def outdated(table: Table, place: Place) -> list[str]:
    """Finished runs by another command, or by configuration files that have changed since.

    Fields that were fixed by --set then need not be given again.
    """
    found = []
    for run in tables.possible(table):
        record = read_json(place.workdir(run) / RECORD_FILE).get("of")
        if not record or read_outcome(place.workdir(run)).status not in DONE:
            continue
        now = identity(place.flags(table, run))
        same_files = record["config_sha256"] == now["config_sha256"]
        if not same_files or not set(now["flags"]) <= set(record["flags"]):
            found.append(run.name)
    return found


@functools.cache
def _defaults() -> bytes:
    """What a configuration file starts from, whichever modules say it."""
    from fedasr.training.config import default_config

    return json.dumps(default_config().to_dict(), sort_keys=True, default=str).encode()


def identity(run_flags: Sequence[str]) -> dict[str, Any]:
    """What a run's result depends on, as far as the sweep can see."""
    config = recipes.locate(run_flags[0].removeprefix("--config="))
    # A configuration file builds on these; a table's definition in one of them changes nothing,
    # but then the launcher finds its own result again and says so at once.
    shared = sorted(Path(recipes.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(_defaults())
    for file in [Path(config_path(config)), *shared]:
        digest.update(file.read_bytes() if file.exists() else b"")
    return {"flags": list(run_flags), "config_sha256": digest.hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def environment(out: Path) -> dict[str, str]:
    """A run's environment: all of a sweep's runs share one cache of compiled programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((out / ".compile-cache").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return cache | os.environ
