"""From a table to its runs, and which of them are needed next."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fedasr.errors import UserError
from fedasr.recipes.tables.definition import (
    COMPLETED,
    FIRST,
    NOT_RUN,
    SECOND,
    STARTS,
    Outcomes,
    Row,
    Run,
    Table,
    grid_of,
    short_name,
)


def check(table: Table) -> None:
    """Raises UserError for a table that contradicts itself."""
    if what := next(_contradictions(table), ""):
        raise UserError(f"table {table.name!r}: {what}")


def _contradictions(table: Table) -> Iterator[str]:
    if not re.fullmatch(r"\w+", table.name, re.ASCII):
        yield "its name must consist of letters, digits and underscores"
    if not table.rows or not table.seeds or not table.report:
        yield "it needs a row, a seed and a split to report"
    if len(set(table.seeds)) < len(table.seeds):
        yield f"seeds={table.seeds} holds one of them twice"
    starts = {row.name for row in table.starts}
    for row in (*table.starts, *table.rows):
        yield from _contradictions_of(table, row, starts)
    rows = {row.name for row in table.rows}
    for name in itertools.chain.from_iterable(table.better):
        if name not in rows:
            yield f"`better` names {name!r}, which is no row"
    # Folders that differ in case only are one folder on some systems.
    names = [run.name.casefold() for run in possible(table)]
    if twice := {name for name in names if names.count(name) > 1}:
        yield f"two runs would be called {min(twice)}: choose names that differ more"


def _contradictions_of(table: Table, row: Row, starts: Collection[str]) -> Iterator[str]:
    """A row's own; `starts` are the names of the rows to start from."""
    grid = {} if row.name in starts else grid_of(table, row)
    if row.start and (row.start not in starts or row.name in starts):
        yield f"row {row.name!r} cannot start from {row.start!r}"
    if empty := [field for field, values in grid.items() if not values]:
        yield f"the grid has no value for {empty[0]}"
    taken = ("seed", *(("init_from",) if row.start else ()), *grid)
    if both := [field for field in taken if field in row.overrides]:
        yield f"row {row.name!r} sets {both[0]}, which the sweep sets"


def possible(table: Table) -> list[Run]:
    """Every run that the table may come to need, whatever the grid's choices will be."""
    runs = [_run(table, row, {}, seed, STARTS) for row in table.starts for seed in table.seeds]
    for row in table.rows:
        points = _points(table, row)
        for point, seed in itertools.product(points, table.seeds):
            second = len(points) > 1 and seed != table.seeds[0]
            runs.append(_run(table, row, point, seed, SECOND if second else FIRST))
    return sorted(runs, key=lambda run: run.phase)


def expand(table: Table) -> list[Run]:
    """The runs that can be known beforehand, in order: starts, then the first phase."""
    return [run for run in possible(table) if run.phase != SECOND]


def choose(table: Table, row: Row, outcomes: Outcomes) -> dict[str, Any] | None:
    """The row's best grid point by the `select` split at the first seed.

    The first of equals; failed, diverged and missing runs do not count; None if no run does. A row
    without a choice has its only point.
    """
    runs = [run for run in runs_of(table, row) if run.seed == table.seeds[0]]
    if len(runs) == 1:
        return dict(runs[0].point)
    rates = [outcomes.get(run.name, NOT_RUN).wer(table.select) for run in runs]
    best = min(rates)
    return None if best == math.inf else dict(runs[rates.index(best)].point)


def pending(table: Table, outcomes: Outcomes) -> list[Run]:
    """The runs that are known to be needed and have not finished, in the order of phases.

    A row's second phase is known when all of its first phase has finished.
    """
    runs = expand(table)
    for row in table.rows:
        if _decided(table, row, outcomes):
            runs += second_phase(table, row, choose(table, row, outcomes))
    return [run for run in runs if not outcomes.get(run.name, NOT_RUN).finished]


def ready(table: Table, outcomes: Outcomes) -> list[Run]:
    """Those of `pending` that have what they start from."""
    return [
        run
        for run in pending(table, outcomes)
        if not run.start or outcomes.get(run.start, NOT_RUN).status == COMPLETED
    ]


def size(table: Table) -> int:
    """How many runs the whole table takes."""
    second = sum(len(table.seeds) - 1 for row in table.rows if len(_points(table, row)) > 1)
    return len(expand(table)) + second


def undecided(table: Table, outcomes: Outcomes) -> list[str]:
    """Names of the rows whose second phase waits for their first."""
    return [
        row.name
        for row in table.rows
        if any(run.phase == SECOND for run in runs_of(table, row))
        and not _decided(table, row, outcomes)
    ]


def _points(table: Table, row: Row) -> list[dict[str, Any]]:
    grid = grid_of(table, row)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _run(table: Table, row: Row, point: Mapping[str, Any], seed: int, phase: int) -> Run:
    return Run(
        table=table.name,
        name=_run_name(row.name, point, seed),
        phase=phase,
        row=row.name,
        point=point,
        seed=seed,
        overrides={**row.overrides, **point, "seed": seed},
        start=_run_name(row.start, {}, seed) if row.start else "",
        arguments=row.arguments,
    )


def _run_name(row: str, point: Mapping[str, Any], seed: int) -> str:
    parts = [row, *(f"{short_name(field, point)}-{value}" for field, value in point.items())]
    return "__".join(_slug(part) for part in (*parts, f"seed-{seed}"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.") or "_"


def runs_of(table: Table, row: Row) -> list[Run]:
    return [run for run in possible(table) if run.row == row.name and run.phase != STARTS]


def _decided(table: Table, row: Row, outcomes: Outcomes) -> bool:
    first = [run for run in runs_of(table, row) if run.phase == FIRST]
    return all(outcomes.get(run.name, NOT_RUN).finished for run in first)


def second_phase(table: Table, row: Row, point: Mapping[str, Any] | None) -> list[Run]:
    runs = runs_of(table, row)
    return [run for run in runs if run.phase == SECOND and dict(run.point) == point]
