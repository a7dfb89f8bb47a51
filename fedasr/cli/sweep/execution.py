"""Runs the trainings of tables on this machine, several at a time."""

import contextlib
import dataclasses
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedasr.cli.sweep.runs import (
    DONE,
    RECORD_FILE,
    Outcomes,
    Place,
    environment,
    identity,
    read_json,
    read_outcome,
    settled,
)
from fedasr.errors import UserError
from fedasr.recipes import tables
from fedasr.recipes.tables import Outcome, Run, Table
from fedasr.training.interrupts import StopFlag, graceful_stop
from fedasr.training.logging import write_json_atomic

# In a run's folder; what else is there, but for runs.RECORD_FILE, is the launcher's.
LOG_FILE = "sweep.log"

_POLL_SECONDS = 0.05


class Stopped(Exception):
    """A signal stopped the sweep; its runs can be resumed."""


@dataclasses.dataclass
class Child:
    """A run that is under way."""

    table: Table
    run: Run
    process: subprocess.Popen
    slot: int
    log: Path
    offset: int  # where in the log this attempt begins
    began: float
    before: int  # mtime of the summary that was there, 0 for none
    stopped: bool = False


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
    running: list[Child] = []
    with graceful_stop() as stop:
        try:
            while True:
                if not stop.requested:
                    running += _start(chosen, outcomes, place, jobs, running)
                if not running:
                    break
                for child in _wait(running, stop):
                    running.remove(child)
                    now = time.monotonic()
                    first, _ = spans.get(child.table.name, (child.began, now))
                    spans[child.table.name] = (first, now)
                    # What a signal ended has not failed.
                    if child.process.returncode == 0 or not stop.requested:
                        outcome = finish(child, place)
                        outcomes[child.table.name][child.run.name] = outcome
                        report(child.table, child.run, outcome, now - child.began)
        finally:  # none is left, unless there was an error or a second signal
            for child in running:
                child.process.kill()
                child.process.wait()
    if stop.requested:
        raise Stopped("stopped: run the same command to go on")
    return {name: end - begin for name, (begin, end) in spans.items()}


def _wait(running: Sequence[Child], stop: StopFlag) -> list[Child]:
    """Those that have ended, when there are any; a signal ends all of them, once."""
    while True:
        if stop.requested:
            for child in running:
                if not child.stopped:
                    child.stopped = True
                    child.process.terminate()
        time.sleep(_POLL_SECONDS)
        if ended := [child for child in running if child.process.poll() is not None]:
            return ended


def _start(
    chosen: Sequence[Table],
    outcomes: Mapping[str, Outcomes],
    place: Place,
    jobs: int,
    running: Sequence[Child],
) -> list[Child]:
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
        launch(table, run, place, slot, jobs)
        for slot, (table, run) in zip(free, waiting, strict=False)
    ]


def launch(table: Table, run: Run, place: Place, slot: int, jobs: int) -> Child:
    """Starts a run in one of so many slots, which share out the cores.

    Raises:
      UserError: there is no such launcher.
    """
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
                env=environment(place.out),
                # A terminal's Ctrl-C reaches a whole session: the runs would have it twice, once
                # from the terminal and once from us, and two mean "abort".
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"--launcher={command[0]}: {error.strerror}") from error
    return Child(table, run, process, slot, log_path, offset, time.monotonic(), before)


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


def finish(child: Child, place: Place) -> Outcome:
    """Records how a run ended."""
    folder, status = child.log.parent, child.process.returncode
    summary = folder / "summary.json"
    after = summary.stat().st_mtime_ns if summary.exists() else 0
    error = ""
    if status:
        error = _last_line(child.log, child.offset) or f"exit status {status}"
    elif read_json(summary).get("status") not in DONE:
        error = "exit status 0 without a result"
    record = {
        "of": identity(place.flags(child.table, child.run)),
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
def progress(chosen: Sequence[Table], place: Place) -> Iterator[Report]:
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
