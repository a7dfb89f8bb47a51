"""A search by Optuna: settings chosen one by one, by what earlier ones have come to."""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedasr.cli.sweep.definitions import ad_hoc, check, parse_fields
from fedasr.cli.sweep.execution import Child, Stopped, finish, launch
from fedasr.cli.sweep.runs import Place
from fedasr.errors import UserError
from fedasr.recipes import tables
from fedasr.recipes.tables import Run, Table
from fedasr.streams import make_root
from fedasr.training.interrupts import StopFlag, graceful_stop
from fedasr.training.logging import read_metrics, say

STUDY_FILE = "search.db"
_POLL_SECONDS = 0.5
# Trials, and evaluations of a trial, before any is ended early.
_STARTUP, _WARMUP = 5, 1
_RANDOM = 3  # trials at random, at least, before what they came to is used


class Search(NamedTuple):
    """config: of all trials. space: see `parse_space`. trials: how many in all.

    select: split whose word error rate is to be low. seed: of the trainings and of the search.
    """

    config: str
    space: str
    trials: int
    select: str
    seed: int


def parse_space(text: str) -> dict[str, Any]:
    """Optuna's distributions by field.

    Args:
      text: "section.field=low..high" with ":log" for a range on a logarithmic scale, whole numbers
        where both ends are; "section.field=a,b,c" for a choice.

    Raises:
      UserError: a range that is none, or Optuna is missing.
    """
    optuna = _optuna()
    found: dict[str, Any] = {}
    for field, value in parse_fields(text, "--space").items():
        if ".." not in value:
            choices = [part.strip() for part in value.split(",")]
            found[field] = optuna.distributions.CategoricalDistribution(choices)
            continue
        low, _, rest = value.partition("..")
        high, _, scale = rest.partition(":")
        log = scale == "log"
        if scale and not log:
            raise UserError(f"--space: {field}={value} is not low..high or low..high:log")
        try:
            if all(re.fullmatch(r"-?\d+", end) for end in (low, high)):
                whole = optuna.distributions.IntDistribution
                found[field] = whole(int(low), int(high), log=log)
            else:
                real = optuna.distributions.FloatDistribution
                found[field] = real(float(low), float(high), log=log)
        except ValueError as error:
            raise UserError(f"--space: {field}={value}: {error}") from error
    if not found:
        raise UserError("--space names no field")
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("--search=optuna needs a package: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def run_search(search: Search, place: Place, jobs: int) -> Table:
    """Runs the trials that are missing; the same call goes on where it was stopped.

    Args:
      search: what to look for.
      place: where and how; the study is kept in its folder, beside the trials.
      jobs: trials at a time.

    Returns:
      A table with a row for each trial.

    Raises:
      UserError: for a space that makes no sense, or a study of another space.
      Stopped: on SIGTERM or SIGINT, when all trials have saved a checkpoint and ended.
    """
    optuna, space = _optuna(), parse_space(search.space)
    name = ad_hoc(search.config, "", [search.seed]).name + "_search"
    folder = place.out / name
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY_FILE).resolve()}",
        study_name=name,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(_STARTUP, _WARMUP),
    )
    if any(set(trial.distributions) - set(space) for trial in study.trials):
        raise UserError(f"{folder} holds a search of another space: choose another --out")
    check(_table(name, search, study), place.fixed)
    with graceful_stop() as stop:
        _Trials(optuna, study, space, search, place, jobs, name).loop(stop)
    if stop.requested:
        raise Stopped("stopped: run the same command to go on")
    return _table(name, search, study)


class _Trials(NamedTuple):
    """What the trials of a search share; see `run_search`."""

    optuna: Any
    study: Any
    space: Mapping[str, Any]
    search: Search
    place: Place
    jobs: int
    name: str

    def loop(self, stop: StopFlag) -> None:
        """Until all trials have ended, or a signal has ended them."""
        # Those that an earlier process left: their runs go on from their checkpoints.
        waiting = [
            self.optuna.trial.Trial(self.study, trial._trial_id)
            for trial in self.study.trials
            if trial.state == self.optuna.trial.TrialState.RUNNING
        ]
        running: dict[int, tuple[Any, Child]] = {}
        try:
            while True:
                if not stop.requested:
                    self._fill(waiting, running)
                if not running:
                    return
                time.sleep(_POLL_SECONDS)
                for number in list(running):
                    if self._look_after(*running[number], stop):
                        del running[number]
        finally:
            for _, child in running.values():
                child.process.kill()
                child.process.wait()

    def _fill(self, waiting: list[Any], running: dict[int, tuple[Any, Child]]) -> None:
        """Starts trials in the free slots."""
        while len(running) < self.jobs:
            if not waiting and len(self.study.trials) < self.search.trials:
                self.study.sampler = self._sampler(len(self.study.trials))
                waiting.append(self.study.ask(dict(self.space)))
            if not waiting:
                return
            trial = waiting.pop(0)
            table = _table(self.name, self.search, self.study)
            taken = {child.slot for _, child in running.values()}
            slot = next(i for i in range(self.jobs) if i not in taken)
            child = launch(table, _run(table, trial.number), self.place, slot, self.jobs)
            running[trial.number] = trial, child

    def _sampler(self, number: int) -> Any:
        """Of a trial: one for all would draw again what it drew before the search was stopped."""
        return self.optuna.samplers.TPESampler(
            # Optuna's own 10 at random leave short searches nothing to choose.
            n_startup_trials=max(_RANDOM, min(10, self.search.trials // 3)),
            seed=int(make_root("search", self.search.seed, number)[0]),
            constant_liar=self.jobs > 1,
        )

    def _look_after(self, trial: Any, child: Child, stop: StopFlag) -> bool:
        """Reports or ends a running trial; whether it has ended."""
        if child.process.poll() is None:
            hopeless = not child.stopped and _is_hopeless(trial, child, self.search.select)
            if (hopeless or stop.requested) and not child.stopped:
                child.stopped = True
                child.process.terminate()
            return False
        if not (stop.requested and child.process.returncode):
            self._tell(trial, child)
        return True

    def _tell(self, trial: Any, child: Child) -> None:
        """What became of a trial."""
        states, number = self.optuna.trial.TrialState, trial.number
        said = f"[{number + 1}/{self.search.trials}] trial {number}"
        if child.stopped and child.process.returncode:
            self.study.tell(trial, state=states.PRUNED)
            say(f"{said}: ended early")
            return
        outcome = finish(child, self.place)
        rate = outcome.wer(self.search.select)
        if math.isfinite(rate):
            self.study.tell(trial, rate)
            say(f"{said}: {self.search.select} {rate:.1f}%")
        else:
            self.study.tell(trial, state=states.FAIL)
            what = outcome.message or f"no error rate on {self.search.select}"
            say(f"{said}: {outcome.status}: {what}")


def _is_hopeless(trial: Any, child: Child, split: str) -> bool:
    """Reports a running trial's error rates; whether Optuna would end it."""
    told = False
    for place, rate in _rates(child.log.parent, split):
        if place > trial.user_attrs.get("told", 0):
            trial.report(rate, place)
            trial.set_user_attr("told", place)
            told = True
    return told and trial.should_prune()


def _rates(workdir: Path, split: str) -> list[tuple[int, float]]:
    """(round or step, word error rate in percent) so far; without the start."""
    found = []
    for record in read_metrics(workdir):
        rate = ((record.get("eval") or {}).get(split) or {}).get("wer")
        place = record.get("round", record.get("step"))
        if place and isinstance(rate, int | float) and math.isfinite(rate):
            found.append((int(place), float(rate)))
    return found


def _table(name: str, search: Search, study: Any) -> Table:
    """A row for each trial."""
    rows = tuple(
        tables.Row(f"trial {trial.number}", {k: str(v) for k, v in trial.params.items()})
        for trial in study.trials
    ) or (tables.Row("trial 0", {}),)
    return Table(
        name,
        f"Search of {search.config} by Optuna: {search.space}",
        search.config,
        rows,
        seeds=(search.seed,),
        select=search.select,
    )


def _run(table: Table, number: int) -> Run:
    return next(run for run in tables.possible(table) if run.row == f"trial {number}")
