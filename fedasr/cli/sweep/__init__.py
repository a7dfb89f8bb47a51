"""Runs tables of results: many trainings by `fedasr train`, then one table from all of them.

    fedasr sweep --table=NAME[,NAME...] [--tables=FILE.py] [--jobs=N] [--json]
    fedasr sweep --config=FILE[:ARGUMENTS] --seeds=0,1,2
                                --grid="server.learning_rate=0.003,0.01;privacy.sigma=1e-5,3e-5"

Tables are those of the recipes `published` and `mini`, or of --tables=FILE.py, by the name in its
`TABLES`. --set="data.dir=DIR;..." fixes fields of every run.

    fedasr sweep --config=FILE[:ARGUMENTS] --search=optuna --trials=20
                 --space="server.learning_rate=1e-3..10:log;client.steps=1..8;server.optimizer=lamb,adam"

--search=optuna tries so many settings, each chosen from what the ones before have come to on
--select (TPE, pip install optuna), and ends runs early that are worse than half of them were at
that time. The privacy of all of them is told, of those that were ended early, too.

  --action=run        runs what is not done yet, then collects (the default)
  --action=collect    makes the tables from whatever runs there are
  --action=report     a page with all runs: sortable, with curves, privacy and settings that differ
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

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags

from fedasr.cli import common
from fedasr.cli.sweep import search
from fedasr.cli.sweep.clusters import write_skypilot, write_slurm
from fedasr.cli.sweep.definitions import (
    ad_hoc,
    check,
    find_tables,
    parse_fields,
    registry,
    save_table,
)
from fedasr.cli.sweep.execution import Stopped, execute, progress
from fedasr.cli.sweep.page import write_page
from fedasr.cli.sweep.results import write_results
from fedasr.cli.sweep.runs import Place, environment, outdated, settled
from fedasr.errors import UserError
from fedasr.recipes import tables
from fedasr.recipes.tables import Run, Table


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_list("table", [], "Names of tables.")
    flags.DEFINE_string("tables", "", "A Python file whose TABLES to take instead of ours.")
    flags.DEFINE_string("config", "", "Instead of a table: the configuration of a grid.")
    flags.DEFINE_string("grid", "", "With --config: 'section.field=value,value;...'.")
    flags.DEFINE_list("seeds", None, "Training seeds; default: the table's, or 0.")
    flags.DEFINE_string("set", "", "'section.field=value;...' for every run.")
    flags.DEFINE_string("out", "runs/sweeps", "Folder of runs and results.")
    flags.DEFINE_enum("search", None, ["optuna"], "With --config: choose settings one by one.")
    flags.DEFINE_string("space", "", "Of the search: 'section.field=low..high[:log];field=a,b'.")
    flags.DEFINE_integer("trials", 20, "Of the search.", lower_bound=1)
    flags.DEFINE_string("select", "dev", "Split of the search's word error rate.")
    actions = ["run", "collect", "report", "list", "slurm", "skypilot"]
    flags.DEFINE_enum("action", "run", actions, "What to do.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; the cores are shared out.", lower_bound=1)
    flags.DEFINE_bool("validate", False, "With --action=list: check each run by --dry_run.")
    flags.DEFINE_string("accelerators", "", "Of a cluster's task; default A100:1 (Slurm: 1).")
    flags.DEFINE_string("launcher", "", "Command for one run; default: fedasr train")


def _chosen() -> list[Table]:
    """The tables that the flags name."""
    values = flags.FLAGS
    seeds = None if values.seeds is None else tuple(common.seeds(values.seeds))
    needed = values.action not in ("collect", "report")
    if (values.table and values.config) or (needed and not values.table and not values.config):
        names = ", ".join(registry(values.tables)) or "none is defined"
        raise UserError(f"give either --table (known: {names}) or --config")
    if values.config:
        return [ad_hoc(values.config, values.grid, (0,) if seeds is None else seeds)]
    if values.grid:
        raise UserError("--grid goes with --config: a table has a grid of its own")
    found = find_tables(values.table, values.tables, values.out)
    return found if seeds is None else [dataclasses.replace(one, seeds=seeds) for one in found]


def program() -> int | None:
    """Does what the flags ask for; returns the exit status if not 0."""
    values = flags.FLAGS
    place = Place(Path(values.out), fixed=parse_fields(values.set, "--set"))
    if values.launcher:
        place = dataclasses.replace(place, launcher=tuple(shlex.split(values.launcher)))
    if values.search:
        return _search(place)
    chosen = _chosen()
    if values.action == "report":
        path = write_page(chosen, place.out)
        print(f"report: {path}", file=sys.stderr)
        if common.JSON.value:
            common.show({"report": str(path)})
        return None
    for table in chosen:
        check(table, place.fixed)
    if values.action == "list":
        return _list(chosen, place)
    if values.action in ("slurm", "skypilot"):
        _write_cluster(chosen, place)
        return None
    if values.action == "collect":
        _show(chosen, place, {})
        return None
    for table in chosen:
        save_table(table, place.out)
    try:
        with progress(chosen, place) as report:
            seconds = execute(chosen, place, values.jobs, report)
    except Stopped as stopped:
        return common.fail(stopped, common.STOPPED)
    return None if _show(chosen, place, seconds) else common.FAILED


def _search(place: Place) -> int | None:
    """Searches, then shows all trials as a table."""
    values = flags.FLAGS
    if not values.config or not values.space or values.grid or values.action != "run":
        raise UserError("--search goes with --config and --space, without --grid or --action")
    seeds = [0] if values.seeds is None else common.seeds(values.seeds)
    if len(seeds) > 1:
        raise UserError("--search takes one of --seeds: try the best with others by --grid")
    wanted = search.Search(values.config, values.space, values.trials, values.select, seeds[0])
    try:
        table = search.run_search(wanted, place, values.jobs)
    except Stopped as stopped:
        return common.fail(stopped, common.STOPPED)
    save_table(table, place.out)
    _show([table], place, {})
    return None


def _show(chosen: Sequence[Table], place: Place, seconds: Mapping[str, float]) -> bool:
    """Writes the results and prints them; whether no run has failed."""
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
    return not any(one["runs"]["failed"] for one in results.values())


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
            command, capture_output=True, text=True, env=environment(place.out), check=False
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
