"""What a table of results is: rows of runs, and the grid that each row may choose from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Phases of a table: the runs that rows start from, the grid (or all seeds), the chosen's seeds.
STARTS, FIRST, SECOND = 0, 1, 2


COMPLETED, DIVERGED, FAILED, UNFINISHED, MISSING = (
    "completed",
    "diverged",
    "failed",
    "unfinished",
    "missing",
)

_FINISHED = (COMPLETED, DIVERGED, FAILED)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a configuration, and what was published for it.

    Attributes:
      name: of the line, unique in its table, such as "LAMB" or "sigma 10e-6, dim".
      overrides: configuration fields by dotted name, such as {"server.optimizer": "lamb"}.
      published: published word error rates in percent by split, such as {"test": 23.7}.
      start: name of the `Table.starts` row whose run with the same seed this one starts from
        (`init_from`); "" for none.
      series: lines of one series are joined in the plot.
      x: horizontal position in the plot; None in tables drawn as bars.
      grid: replaces the table's grid for this row; None keeps the table's.
      arguments: of the table's configuration file, such as "seed=ls100,cohort=16".
    """

    name: str
    overrides: Mapping[str, Any]
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: str = ""
    series: str = ""
    x: float | None = None
    grid: Mapping[str, tuple[Any, ...]] | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A published comparison, or our small version of one.

    Attributes:
      name: letters, digits and underscores; names folders and files.
      title: one line for people, with the source of the published figures.
      config: --config of every run, such as "mini".
      rows: in the order of presentation.
      grid: fields and the values that every row (without a grid of its own) chooses from by the
        word error rate of `select` at the first seed; {} for none. The other seeds run with the
        row's choice only.
      seeds: training seeds.
      select: split whose word error rate chooses from the grid.
      report: splits whose word error rates are reported; verdicts are of the last, and the plot is
        of the last with published figures.
      starts: runs, one for each seed, that rows start from. They take no part in the grid.
      expected: the published ordering in words.
      better: pairs of row names (better, worse) that put `expected` so that it can be checked.
      x_label, log_x: of the plot.
      users: whether the figures over users are reported, too, of each of `report`.
      reach: word error rates in percent on `select`: when by the simulated clock a row's runs were
        first evaluated at each, or below, is reported.
    """

    name: str
    title: str
    config: str
    rows: tuple[Row, ...]
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    select: str = "dev"
    report: tuple[str, ...] = ("dev", "test")
    starts: tuple[Row, ...] = ()
    expected: str = ""
    better: tuple[tuple[str, str], ...] = ()
    x_label: str = ""
    log_x: bool = False
    users: bool = False
    reach: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a table.

    Attributes:
      table: name of the table.
      name: of the run's folder, unique in the table.
      phase: STARTS, FIRST or SECOND.
      row: name of its row.
      point: its grid point, {} for none.
      seed: of the training.
      overrides: every configuration field that differs from the configuration file.
      start: name of the run it starts from, "" for none.
      arguments: of the configuration file.
    """

    table: str
    name: str
    phase: int
    row: str
    point: Mapping[str, Any]
    seed: int
    overrides: Mapping[str, Any]
    start: str = ""
    arguments: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
      status: COMPLETED, DIVERGED (parameters not finite), FAILED (the launcher's exit status said
        so), UNFINISHED (begun, can be resumed) or MISSING.
      summary: the run's `summary.json`, {} without one.
      message: of a failure, one line.
      clock: of each evaluation on the way, in order, the seconds of the simulated clock and the
        word error rates in percent by split; () where none was asked for.
    """

    status: str
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""
    clock: tuple[tuple[float, Mapping[str, float]], ...] = ()

    @property
    def finished(self) -> bool:
        """Whether running it again at once would be of no use."""
        return self.status in _FINISHED

    def wer(self, split: str) -> float:
        """Final word error rate in percent; infinite for a run that has none."""
        rate = (self.summary.get("wer") or {}).get(split) if self.status == COMPLETED else None
        return math.inf if rate is None else float(rate)

    def seconds_until(self, split: str, rate: float) -> float:
        """Of the simulated clock, until `split` was at a word error rate, or below; or infinite."""
        found = (at for at, rates in self.clock if rates.get(split, math.inf) <= rate)
        return next(found, math.inf)


Outcomes = Mapping[str, Outcome]  # by the run's name
NOT_RUN = Outcome(MISSING)


def describe_point(point: Mapping[str, Any]) -> str:
    """A grid point for people: "learning_rate=0.01, sigma=1e-05"; "" for none."""
    return ", ".join(f"{short_name(field, point)}={value}" for field, value in point.items())


def grid_of(table: Table, row: Row) -> Mapping[str, tuple[Any, ...]]:
    return table.grid if row.grid is None else row.grid


def short_name(field: str, fields: Iterable[str]) -> str:
    """The last part of a dotted name, or all of it where that is not unique among `fields`."""
    last = field.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in fields) == 1 else field
