"""Writes what is left to be run for a cluster: Slurm job arrays, a SkyPilot task."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedasr.cli.sweep.runs import Place, settled
from fedasr.recipes import tables
from fedasr.recipes.tables import Table

_PHASES = {tables.STARTS: "starts", tables.FIRST: "phase1", tables.SECOND: "phase2"}


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
