"""Runs tables of results: many trainings by `fedasr train`, then one table from all of them.

    fedasr sweep --table=NAME[,NAME...] [--tables=FILE.py] [--jobs=N] [--json]
    fedasr sweep --config=FILE[:ARGUMENTS] --seeds=0,1,2
                                --grid="server.learning_rate=0.003,0.01;privacy.sigma=1e-5,3e-5"

Tables are those of the recipes `published` and `mini`, or of --tables=FILE.py, by the name in its
`TABLES`. --set="data.dir=DIR;..." fixes fields of every run.

  --action=run        runs what is not done yet, then collects (the default)
  --action=collect    makes the tables from whatever runs there are
  --action=list       prints the commands that would be run; --validate checks each of them
  --action=slurm      writes the same commands as Slurm array jobs
  --action=skypilot   writes them as a SkyPilot task, for --accelerators=A100:1 or tpu-v5e-8

Runs live in OUT/TABLE/RUN, results in OUT/TABLE.md, .csv, .json and .png. The same command again
goes on where it stopped. Exit status: 0 when every run has completed, 1 when one has failed or
diverged, 2 for a mistake that the user can mend, 3 when stopped by a signal (resumable).

With --jobs=N each run sees one N-th of the processor's cores. On a CPU `fedasr train` makes a
device of each core that it sees, and float additions are ordered by device: results are
bit-identical among runs with the same number of cores for each.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from absl import flags

from fedasr import recipes
from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.privacy.accounting import epsilon_in_words
from fedasr.recipes import tables
from fedasr.recipes.tables import Outcome, Run, Table
from fedasr.training.interrupts import graceful_stop
from fedasr.training.logging import from_json, write_json_atomic

# Every one of these in a run's folder is the sweep's; the rest is the launcher's.
LOG_FILE, RECORD_FILE, TABLE_FILE = "sweep.log", "sweep.json", "table.json"
_DONE = (tables.COMPLETED, tables.DIVERGED)
_ROOT = Path(__file__).parents[2]  # of a clone
_REGISTRIES = ("fedasr.recipes.published", "fedasr.recipes.mini")
_PHASES = {tables.STARTS: "starts", tables.FIRST: "phase1", tables.SECOND: "phase2"}
_POLL_SECONDS = 0.05

Outcomes = dict[str, Outcome]


class Stopped(Exception):
    """A signal stopped the sweep; its runs can be resumed."""


# Which tables ------------------------------------------------------------------------------------


def registry(path: str = "") -> dict[str, Table]:
    """The tables that are defined, by name.

    Args:
      path: a Python file with `TABLES`; "" for those of `fedasr.recipes`.

    Raises:
      UserError: if the file cannot be read or defines no tables.
    """
    if path:
        try:
            return dict(runpy.run_path(path)["TABLES"])
        except (OSError, SyntaxError, KeyError) as error:
            raise UserError(f"--tables={path}: no TABLES ({error})") from error
    found: dict[str, Table] = {}
    for name in _REGISTRIES:
        try:
            found |= importlib.import_module(name).TABLES
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return found


def ad_hoc(config: str, grid: str, seeds: Sequence[int]) -> Table:
    """A table with a row for each point of a grid, named by its configuration file."""
    name = re.sub(r"\W", "_", Path(_config_path(config)).stem, flags=re.ASCII)
    values = parse_grid(grid)
    points = [dict(zip(values, point, strict=True)) for point in product(*values.values())]
    rows = tuple(tables.Row(tables.describe_point(point) or name, point) for point in points)
    return Table(name, f"Grid of {config}", config, rows, seeds=tuple(seeds))


def parse_grid(text: str) -> dict[str, tuple[str, ...]]:
    """{"a.b": ("1", "2")} of "a.b=1,2;..."; values stay as the launcher's flags will read them."""
    fields = parse_fields(text, "--grid")
    return {field: tuple(map(str.strip, values.split(","))) for field, values in fields.items()}


def parse_fields(text: str, flag: str) -> dict[str, str]:
    """{"a.b": "value"} of "a.b=value;...".

    Raises:
      UserError: for a part without "=" or a field that is named twice.
    """
    fields: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        field, equals, value = part.partition("=")
        if not equals or not field.strip():
            raise UserError(f"{flag}: {part!r} is not section.field=value")
        if field.strip() in fields:
            raise UserError(f"{flag}: {field.strip()} is named twice")
        fields[field.strip()] = value.strip()
    return fields


def check(table: Table, fixed: Mapping[str, str]) -> None:
    """Raises UserError for a table, or fixed fields, that cannot be run."""
    tables.check(table)
    if "seed" in fixed:
        raise UserError("--set: the seed is set by --seeds")
    for run in tables.possible(table):
        if taken := sorted(fixed.keys() & run.point.keys()):
            raise UserError(f"--set: {taken[0]} is in the grid of table {table.name!r}")


def _config_path(config: str) -> str:
    """The file of a --config=FILE:ARGUMENTS."""
    return config.partition(":")[0]


def _resolve_config(config: str, arguments: str) -> str:
    """A configuration named from the root of a clone can be used from any folder."""
    path, _, own = config.partition(":")
    if not Path(path).exists() and (_ROOT / path).exists():
        path = str(_ROOT / path)
    return ":".join(filter(None, (path, ",".join(filter(None, (own, arguments))))))


# From a run to its command, and to what became of it ---------------------------------------------


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


def read_outcome(folder: Path) -> Outcome:
    """What became of the run in a folder, by its launcher's summary and the sweep's record."""
    summary_path, record_path = folder / "summary.json", folder / RECORD_FILE
    summary, record = _read_json(summary_path), _read_json(record_path)
    status = summary.get("status")
    # A refusal leaves an older summary, of another configuration, in its place. A summary that is
    # newer than the record comes from a run outside the sweep.
    if record.get("error") and (
        not summary or summary_path.stat().st_mtime_ns <= record_path.stat().st_mtime_ns
    ):
        if status == tables.DIVERGED and not record.get("refused"):
            return Outcome(tables.DIVERGED, summary)
        return Outcome(tables.FAILED, {}, record["error"])
    if status in _DONE:
        return Outcome(status, summary)
    return Outcome(tables.UNFINISHED if (folder / "config.json").exists() else tables.MISSING)


def read_outcomes(table: Table, out: Path) -> Outcomes:
    """Outcomes of all the runs of a table, by name."""
    return {run.name: read_outcome(out / table.name / run.name) for run in tables.possible(table)}


def settled(table: Table, place: Place) -> Outcomes:
    """The outcomes that need no further run: completed or diverged, by the same command.

    Failed runs are tried again. So are runs by another command or by a configuration file that has
    changed since: whether the difference matters is for the launcher to say.
    """
    kept = {}
    for run in tables.possible(table):
        folder = place.workdir(run)
        outcome = read_outcome(folder)
        record = _read_json(folder / RECORD_FILE)
        same = not record or record.get("of") == _identity(place.flags(table, run))
        if same and outcome.status in _DONE:
            kept[run.name] = outcome
    return kept


def outdated(table: Table, place: Place) -> list[str]:
    """Finished runs by another command, or by configuration files that have changed since.

    Fields that were fixed by --set then need not be given again.
    """
    found = []
    for run in tables.possible(table):
        record = _read_json(place.workdir(run) / RECORD_FILE).get("of")
        if not record or read_outcome(place.workdir(run)).status not in _DONE:
            continue
        now = _identity(place.flags(table, run))
        same_files = record["config_sha256"] == now["config_sha256"]
        if not same_files or not set(now["flags"]) <= set(record["flags"]):
            found.append(run.name)
    return found


@functools.cache
def _defaults() -> bytes:
    """What a configuration file starts from, whichever modules say it."""
    from fedasr.training.config import default_config

    return json.dumps(default_config().to_dict(), sort_keys=True, default=str).encode()


def _identity(run_flags: Sequence[str]) -> dict[str, Any]:
    """What a run's result depends on, as far as the sweep can see."""
    config = recipes.locate(run_flags[0].removeprefix("--config="))
    # A configuration file builds on these; a table's definition in one of them changes nothing,
    # but then the launcher finds its own result again and says so at once.
    shared = sorted(Path(recipes.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(_defaults())
    for file in [Path(_config_path(config)), *shared]:
        digest.update(file.read_bytes() if file.exists() else b"")
    return {"flags": list(run_flags), "config_sha256": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# Running here ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Child:
    table: Table
    run: Run
    process: subprocess.Popen
    slot: int
    log: Path
    offset: int  # where in the log this attempt begins
    began: float
    before: int  # mtime of the summary that was there, 0 for none


Report = Callable[[Table, Run, Outcome, float], None]


def execute(
    chosen: Sequence[Table],
    place: Place,
    jobs: int = 1,
    report: Report = lambda table, run, outcome, seconds: None,
) -> dict[str, float]:
    """Runs everything that the tables need and that is not done.

    Args:
      chosen: tables, in order of preference for what is run first.
      place: where and how.
      jobs: runs at a time.
      report: called with (table, run, outcome, seconds) after each run.

    Returns:
      By table, the seconds from its first run's beginning to its last one's end.

    Raises:
      Stopped: on SIGTERM or SIGINT, when all runs have saved a checkpoint and ended.
    """
    outcomes = {table.name: settled(table, place) for table in chosen}
    spans: dict[str, tuple[float, float]] = {}
    running: list[_Child] = []
    stopping, changed = False, True
    with graceful_stop() as stop:
        try:
            while True:
                if changed and not stop.requested:
                    running += _start(chosen, outcomes, place, jobs, running)
                if stop.requested and not stopping:
                    stopping = True
                    for child in running:
                        child.process.terminate()
                if not running:
                    break
                time.sleep(_POLL_SECONDS)
                ended = [child for child in running if child.process.poll() is not None]
                changed = bool(ended)
                for child in ended:
                    running.remove(child)
                    now = time.monotonic()
                    first, _ = spans.get(child.table.name, (child.began, now))
                    spans[child.table.name] = (first, now)
                    # What a signal ended has not failed.
                    if child.process.returncode == 0 or not stop.requested:
                        outcome = _finish(child, place)
                        outcomes[child.table.name][child.run.name] = outcome
                        report(child.table, child.run, outcome, now - child.began)
        finally:  # none is left, unless there was an error or a second signal
            for child in running:
                child.process.kill()
                child.process.wait()
    if stop.requested:
        raise Stopped("stopped: run the same command to go on")
    return {name: end - begin for name, (begin, end) in spans.items()}


def _start(
    chosen: Sequence[Table],
    outcomes: Mapping[str, Outcomes],
    place: Place,
    jobs: int,
    running: Sequence[_Child],
) -> list[_Child]:
    """Fills the free slots."""
    free = [slot for slot in range(jobs) if slot not in {child.slot for child in running}]
    busy = {(child.run.table, child.run.name) for child in running}
    waiting = (
        (table, run)
        for table in chosen
        for run in tables.ready(table, outcomes[table.name])
        if (run.table, run.name) not in busy
    )
    if not free:
        return []
    return [
        _launch(table, run, place, slot, jobs)
        for slot, (table, run) in zip(free, waiting, strict=False)
    ]


def _launch(table: Table, run: Run, place: Place, slot: int, jobs: int) -> _Child:
    folder = place.workdir(run)
    folder.mkdir(parents=True, exist_ok=True)
    summary, log_path = folder / "summary.json", folder / LOG_FILE
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    command = place.command(table, run)
    with log_path.open("ab") as log, _cores(slot, jobs):
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        offset = log.tell()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=_environment(place.out),
                # A terminal's Ctrl-C reaches a whole session: the runs would have it twice, once
                # from the terminal and once from us, and two mean "abort".
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"--launcher={command[0]}: {error.strerror}") from error
    return _Child(table, run, process, slot, log_path, offset, time.monotonic(), before)


def _environment(out: Path) -> dict[str, str]:
    """A run's environment: all of a sweep's runs share one cache of compiled programs."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((out / ".compile-cache").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return cache | os.environ


@contextlib.contextmanager
def _cores(slot: int, jobs: int) -> Iterator[None]:
    """What is started in the block sees its slot's share of the cores."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):  # Linux only
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share_of_cores(sorted(mine), slot, jobs))
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def share_of_cores(cores: Sequence[int], slot: int, jobs: int) -> list[int]:
    """Equal shares, disjoint as long as there are enough cores; the rest stays unused."""
    each = max(1, len(cores) // jobs)
    first = slot * each % len(cores)
    return list(cores[first : first + each])


def _finish(child: _Child, place: Place) -> Outcome:
    """Records how a run ended."""
    folder, status = child.log.parent, child.process.returncode
    summary = folder / "summary.json"
    after = summary.stat().st_mtime_ns if summary.exists() else 0
    error = ""
    if status:
        error = _last_line(child.log, child.offset) or f"exit status {status}"
    elif _read_json(summary).get("status") not in _DONE:
        error = "exit status 0 without a result"
    record = {
        "of": _identity(place.flags(child.table, child.run)),
        "error": error,
        "refused": child.before == after,
        "seconds": time.monotonic() - child.began,
    }
    write_json_atomic(folder / RECORD_FILE, record)
    return read_outcome(folder)


def _last_line(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ")


@contextlib.contextmanager
def _progress(chosen: Sequence[Table], place: Place) -> Iterator[Report]:
    """A bar on a terminal, and a line on stderr for each run that has ended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = sum(tables.size(table) for table in chosen)
    done = sum(len(settled(table, place)) for table in chosen)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("runs", total=total, completed=done)

        def report(table: Table, run: Run, outcome: Outcome, seconds: float) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            rates = ", ".join(
                f"{split} {outcome.wer(split):.1f}%"
                for split in table.report
                if outcome.wer(split) < math.inf
            )
            what = ": ".join(filter(None, (outcome.status, outcome.message or rates)))
            bar.console.print(
                f"[{done}/{total}] {table.name}/{run.name}: {what} ({seconds:.0f} s)",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        yield report


# Running elsewhere -------------------------------------------------------------------------------


def plan(table: Table, place: Place) -> dict[str, list[str]]:
    """Commands that are known to be needed and not done, as shell lines by phase."""
    commands: dict[str, list[str]] = {name: [] for name in _PHASES.values()}
    for run in tables.pending(table, settled(table, place)):
        commands[_PHASES[run.phase]].append(shlex.join(place.command(table, run)))
    return commands


def write_slurm(
    chosen: Sequence[Table], place: Place, accelerators: str, jobs: int, again: str
) -> list[Path]:
    """Writes OUT/slurm/PHASE.txt, commands, and PHASE.sh, a job array of them.

    Args:
      chosen: tables.
      place: where and how.
      accelerators: of a task, as in --gpus.
      jobs: tasks at a time; 1 for no limit.
      again: the sweep's command, for the comments.

    Returns:
      The scripts.
    """
    folder = place.out / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.sh"), *folder.glob("*.txt")):
        old.unlink()  # of phases that are done
    plans = [plan(table, place) for table in chosen]
    scripts = []
    for phase in _PHASES.values():
        commands = [command for one in plans for command in one[phase]]
        if not commands:
            continue
        (folder / f"{phase}.txt").write_text("".join(f"{line}\n" for line in commands))
        script = folder / f"{phase}.sh"
        script.write_text(
            _SLURM.format(
                phase=phase,
                again=again,
                folder=shlex.quote(str(folder)),
                cache=_cluster_cache(place.out),
                count=len(commands),
                limit=f"%{jobs}" if jobs > 1 else "",
                accelerators=accelerators.lower(),
            )
        )
        scripts.append(script)
    return scripts


_SLURM = """\
#!/bin/bash
#SBATCH --job-name=fedasr-{phase}
#SBATCH --array=1-{count}{limit}
#SBATCH --gpus={accelerators}
#SBATCH --output=%x-%A-%a.log
#
# One array task for each line of {phase}.txt. Submit from the folder in which this was written:
#
#   starts=$(sbatch --parsable {folder}/starts.sh)                  # if there is a starts.sh
#   sbatch --dependency=afterok:$starts {folder}/phase1.sh          # or without a dependency
#
# Phase 2 runs each row's best grid point with the other seeds, which is known only when phase 1 is
# done. Write it then, and submit it, by
#
#   {again}
#   sbatch {folder}/phase2.sh
#
# The same command writes whatever is not done yet: a task that was stopped is resumed by its line.
# The tables are made, also from some of the runs, by the command with --action=collect.

set -euo pipefail
export JAX_COMPILATION_CACHE_DIR={cache}
command=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {folder}/{phase}.txt)
echo "$command"
eval "exec $command"
"""


def _cluster_cache(out: Path) -> str:
    """The folder of compiled programs, as a shell word."""
    folder = shlex.quote(str(out / ".compile-cache"))
    return folder if out.is_absolute() else f'"$PWD"/{folder}'


def write_skypilot(
    chosen: Sequence[Table], place: Place, accelerators: str, again: str
) -> list[Path]:
    """Writes OUT/skypilot.yaml: one task that runs all the commands in order.

    Args:
      chosen: tables.
      place: where and how.
      accelerators: such as "A100:1" or "tpu-v5e-8".
      again: the sweep's command, for the comments.
    """
    extra = "tpu" if accelerators.lower().startswith("tpu") else "cuda"
    plans = [plan(table, place) for table in chosen]
    phases = [one[phase] for phase in _PHASES.values() for one in plans]
    lines = [f"{command} || status=1" for commands in phases for command in commands]
    text = _SKYPILOT.format(
        again=again,
        name="fedasr-" + "-".join(table.name.replace("_", "-") for table in chosen),
        accelerators=accelerators,
        extra=extra,
        cache=_cluster_cache(place.out),
        commands="\n".join(f"  {line}" for line in lines),
    )
    place.out.mkdir(parents=True, exist_ok=True)
    path = place.out / "skypilot.yaml"
    path.write_text(text)
    return [path]


_SKYPILOT = """\
# Launch from the root of the repository: sky launch -c fedasr THIS_FILE
# Phase 2 runs each row's best grid point with the other seeds, which is known only when phase 1 is
# done. Copy the results back, write the rest and launch again:
#   rsync -a fedasr:sky_workdir/runs/ runs/
#   {again}
# The tables are made by the same command with --action=collect.
name: {name}

resources:
  accelerators: {accelerators}

workdir: .

setup: |
  pip install -e '.[quickstart,{extra}]'

run: |
  export JAX_COMPILATION_CACHE_DIR={cache}
  status=0
{commands}
  exit $status
"""


# Results -----------------------------------------------------------------------------------------


def write_results(table: Table, out: Path) -> dict[str, Any]:
    """Collects a table and writes it as Markdown, CSV, JSON and a picture.

    Returns:
      The results of `tables.collect`, and the paths by "markdown", "csv", "json" and "plot".
    """
    results = tables.collect(table, read_outcomes(table, out))
    if search := search_cost(table, out):
        results["search"] = search
    paths = {
        "markdown": out / f"{table.name}.md",
        "csv": out / f"{table.name}.csv",
        "json": out / f"{table.name}.json",
        "plot": out / f"{table.name}.png",
    }
    out.mkdir(parents=True, exist_ok=True)
    tables.write_plot(table, results, paths["plot"])
    markdown = tables.to_markdown(table, results, paths["plot"].name) + _search_in_words(search)
    paths["markdown"].write_text(markdown, encoding="utf-8")
    paths["csv"].write_text(tables.to_csv(table, results), encoding="utf-8")
    write_json_atomic(paths["json"], results)
    return results | {kind: str(path) for kind, path in paths.items()}


def search_cost(table: Table, out: Path) -> dict[str, Any]:
    """What trying all the private runs of a table costs their users; empty if there are none.

    See `fedasr.privacy.ledger.search_cost`. Delta is the largest of the runs'; with "deployed", the
    first deployment that all of them stand for.
    """
    from fedasr.privacy import ledger
    from fedasr.training.checkpoint import read_metadata

    entries, deltas = [], []
    for name, outcome in read_outcomes(table, out).items():
        privacy = outcome.summary.get("privacy") or {}
        if not privacy.get("enabled"):
            continue
        try:
            kept = read_metadata(out / table.name / name).get("ledger")
        except UserError:  # its checkpoints are gone
            kept = None
        if kept is None:
            return {"unknown": f"the run {name} has no ledger"}
        entries.append(ledger.from_data(kept["own"])[-1])
        deltas.append(privacy["delta"])
    if not entries:
        return {}
    delta = max(deltas)
    found = {"delta": delta, **ledger.search_cost(entries, delta)}
    said = [{tuple(case): (event, relation) for case, event, relation in e.deployed}
            for e in entries]  # fmt: skip
    common = [case for case in said[0] if all(case in one for one in said)]
    if common:
        epsilon, accountant = ledger.composed([one[common[0]] for one in said], delta)
        cohort, population = common[0]
        found["deployed"] = {"cohort": cohort, "population": population, "epsilon": epsilon}
        found["deployed"]["accountant"] = accountant
    return found


def _search_in_words(search: Mapping[str, Any]) -> str:
    """A paragraph of Markdown."""
    if not search:
        return ""
    if "unknown" in search:
        return f"\nPrivacy of the search: unknown, {search['unknown']}.\n"
    text = (
        f"\nPrivacy of the search: choosing among {search['runs']} private runs by what they show "
        f"costs epsilon {epsilon_in_words(search['epsilon'])} at delta {search['delta']:g} (all "
        f"composed, {search['accountant']})"
    )
    if (selected := search["repeat_and_select"]) is not None:
        text += (
            f"; {epsilon_in_words(selected)} for the best alone, had their number been drawn from "
            "a Poisson distribution with that mean (arXiv 2110.03620)"
        )
    if case := search.get("deployed"):
        text += (
            f". As deployed with {case['cohort']:,} of {case['population']:,} users a round: "
            f"{epsilon_in_words(case['epsilon'])}"
        )
    return text + ".\n"


def save_table(table: Table, out: Path) -> None:
    """Keeps the definition beside the runs, so that they can be collected without it."""
    (out / table.name).mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / table.name / TABLE_FILE, dataclasses.asdict(table))


def load_table(path: Path) -> Table:
    """The table that `save_table` kept.

    Raises:
      UserError: if the file is not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for part in ("rows", "starts"):
            rows = fields[part]
            for row in rows:
                row["grid"] = None if row["grid"] is None else _tuples(row["grid"])
            fields[part] = tuple(tables.Row(**row) for row in rows)
        fields["better"] = tuple(tuple(pair) for pair in fields["better"])
        fields["grid"] = _tuples(fields["grid"])
        return Table(**(fields | {name: tuple(fields[name]) for name in ("seeds", "report")}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table: {error}") from error


def _tuples(grid: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    return {field: tuple(values) for field, values in grid.items()}


# The program -------------------------------------------------------------------------------------


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_list("table", [], "Names of tables.")
    flags.DEFINE_string("tables", "", "A Python file whose TABLES to take instead of ours.")
    flags.DEFINE_string("config", "", "Instead of a table: the configuration of a grid.")
    flags.DEFINE_string("grid", "", "With --config: 'section.field=value,value;...'.")
    flags.DEFINE_list("seeds", None, "Training seeds; default: the table's, or 0.")
    flags.DEFINE_string("set", "", "'section.field=value;...' for every run.")
    flags.DEFINE_string("out", "runs/sweeps", "Folder of runs and results.")
    actions = ["run", "collect", "list", "slurm", "skypilot"]
    flags.DEFINE_enum("action", "run", actions, "What to do.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; the cores are shared out.", lower_bound=1)
    flags.DEFINE_bool("validate", False, "With --action=list: check each run by --dry_run.")
    flags.DEFINE_string("accelerators", "", "Of a cluster's task; default A100:1 (Slurm: 1).")
    flags.DEFINE_string("launcher", "", "Command for one run; default: fedasr train")


def _chosen() -> list[Table]:
    """The tables that the flags name."""
    values = flags.FLAGS
    seeds = None if values.seeds is None else tuple(common.seeds(values.seeds))
    needed = values.action != "collect"
    if (values.table and values.config) or (needed and not values.table and not values.config):
        names = ", ".join(registry(values.tables)) or "none is defined"
        raise UserError(f"give either --table (known: {names}) or --config")
    if values.config:
        return [ad_hoc(values.config, values.grid, (0,) if seeds is None else seeds)]
    if values.grid:
        raise UserError("--grid goes with --config: a table has a grid of its own")
    found = _found(values.table, values.tables, values.out)
    return found if seeds is None else [dataclasses.replace(one, seeds=seeds) for one in found]


def _found(names: Sequence[str] | None, tables: Any, out: str) -> list[Table]:
    """The tables of these names, or, without names, those whose runs are in a folder."""
    known = registry(tables)
    if names:
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--table={unknown[0]} is unknown: choose of {', '.join(known)}")
        return [known[name] for name in names]
    saved = sorted(Path(out).glob(f"*/{TABLE_FILE}"))
    if not saved:
        raise UserError(f"--out={out} holds no runs of a sweep")
    return [known.get(path.parent.name) or load_table(path) for path in saved]


def program() -> int | None:
    """Does what the flags ask for; returns the exit status if not 0."""
    values = flags.FLAGS
    chosen = _chosen()
    place = Place(Path(values.out), fixed=parse_fields(values.set, "--set"))
    if values.launcher:
        place = dataclasses.replace(place, launcher=tuple(shlex.split(values.launcher)))
    for table in chosen:
        check(table, place.fixed)
    if values.action == "list":
        return _list(chosen, place)
    if values.action in ("slurm", "skypilot"):
        _write_cluster(chosen, place)
        return None
    seconds: dict[str, float] = {}
    if values.action == "run":
        for table in chosen:
            save_table(table, place.out)
        try:
            with _progress(chosen, place) as report:
                seconds = execute(chosen, place, values.jobs, report)
        except Stopped as stopped:
            return common.fail(stopped, common.STOPPED)
    results = {table.name: write_results(table, place.out) for table in chosen}
    if common.JSON.value:
        kept = ("runs", "rows", "verdicts", "markdown", "csv", "json", "plot")
        shown = {
            name: {key: one[key] for key in kept} | {"seconds": round(seconds.get(name, 0.0), 1)}
            for name, one in results.items()
        }
        common.show(shown)
    else:
        for one in results.values():
            print(Path(one["markdown"]).read_text(encoding="utf-8"))
    for table in chosen:
        if old := outdated(table, place):
            which = f"{', '.join(old[:3])}{' ...' if len(old) > 3 else ''}"
            print(
                f"warning: {table.name}: {len(old)} runs are of another command or of older "
                f"configuration files than the table has now: {which}",
                file=sys.stderr,
            )
        print(f"results: {results[table.name]['markdown']}", file=sys.stderr)
    complete = not any(one["runs"]["failed"] for one in results.values())
    return None if complete or values.action == "collect" else common.FAILED


def _list(chosen: Sequence[Table], place: Place) -> int | None:
    """Prints the commands that would be run, and checks them if asked to."""
    shown, failed = {}, False
    for table in chosen:
        outcomes = settled(table, place)
        runs = tables.pending(table, outcomes)
        shown[table.name] = {"commands": [place.command(table, run) for run in runs]}
        problems = list(_problems(table, runs, place)) if flags.FLAGS.validate else []
        failed |= bool(problems)
        for problem in problems:
            common.fail(problem)
        if not common.JSON.value:
            print(f"# {table.name}: {tables.size(table)} runs, {len(outcomes)} done")
            for run in runs:
                print(shlex.join(place.command(table, run)))
            for name in tables.undecided(table, outcomes):
                rest = ", ".join(map(str, table.seeds[1:]))
                print(f"# {name}: then the best grid point with seeds {rest}")
    if common.JSON.value:
        common.show(shown)
    return common.MISTAKE if failed else None


def _problems(table: Table, runs: Sequence[Run], place: Place) -> Iterator[str]:
    """What the launcher has against the runs' configurations."""
    for run in runs:
        # What it starts from is not there yet.
        command = [*place.command(table, dataclasses.replace(run, start="")), "--dry_run"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=_environment(place.out), check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            yield f"{table.name}/{run.name}: {last.removeprefix('error: ')}"


def _write_cluster(chosen: Sequence[Table], place: Place) -> None:
    values = flags.FLAGS
    # The cluster's Python is not at our path.
    if not values.launcher:
        place = dataclasses.replace(place, launcher=("python", "-m", "fedasr", "train"))
    for table in chosen:
        save_table(table, place.out)
    again = shlex.join(["fedasr", "sweep", *sys.argv[1:]])
    if values.action == "slurm":
        paths = write_slurm(chosen, place, values.accelerators or "1", values.jobs, again)
    else:
        paths = write_skypilot(chosen, place, values.accelerators or "A100:1", again)
    if common.JSON.value:
        common.show({"files": [str(path) for path in paths]})
    else:
        print("\n".join(map(str, paths)) or "nothing is left to be run")


def main() -> None:
    """The command `fedasr sweep`: parses the flags, runs and exits."""
    _define_flags()
    common.main(program, __name__)


if __name__ == "__main__":
    main()
