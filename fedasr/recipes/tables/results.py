"""From the outcomes of a table's runs to results and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedasr.recipes.tables.definition import (
    COMPLETED,
    DIVERGED,
    FAILED,
    NOT_RUN,
    SECOND,
    STARTS,
    Outcome,
    Outcomes,
    Row,
    Run,
    Table,
    describe_point,
)
from fedasr.recipes.tables.expansion import choose, expand, possible, runs_of, second_phase, size

Results = dict[str, Any]


def collect(table: Table, outcomes: Outcomes) -> Results:
    """Everything that can be said of a table from the runs there are, as JSON can hold it.

    Returns:
      "rows" and "starts" (see `_row_results`), "verdicts" (see `verdict`), and "runs": how many
      have completed, have failed (or diverged), and are missing (or unfinished).
    """
    rows = [_row_results(table, row, outcomes) for row in table.rows]
    starts = [_row_results(table, row, outcomes, start=True) for row in table.starts]
    by_name = {row["name"]: row for row in rows}
    split = table.report[-1]
    needed = expand(table)
    for row in table.rows:
        needed += second_phase(table, row, choose(table, row, outcomes))
    statuses = [outcomes.get(run.name, NOT_RUN).status for run in needed]
    completed = statuses.count(COMPLETED)
    failed = statuses.count(FAILED) + statuses.count(DIVERGED)
    return {
        "table": table.name,
        "title": table.title,
        "runs": {
            "completed": completed,
            "failed": failed,
            "missing": size(table) - completed - failed,
        },
        "starts": starts,
        "rows": rows,
        "expected": table.expected,
        "verdicts": [
            verdict(by_name[better], by_name[worse], split) for better, worse in table.better
        ],
    }


def verdict(better: Results, worse: Results, split: str) -> Results:
    """Whether two rows' results are ordered as published.

    Args:
      better, worse: results of the two rows.
      split: whose word error rates are compared.

    Returns:
      "better", "worse", "split", "verdict" in words, "difference" of the means (positive if ordered
      as published) and its "standard_error" by Welch, None where not known. A difference of more
      than two standard errors is called separable.
    """
    result: Results = {
        "better": better["name"],
        "worse": worse["name"],
        "split": split,
        "difference": None,
        "standard_error": None,
    }
    ours, theirs = better["wer"].get(split), worse["wer"].get(split)
    if ours is None or theirs is None:
        return result | {"verdict": "no result"}
    difference = theirs["mean"] - ours["mean"]
    result["difference"] = difference
    if ours["std"] is None or theirs["std"] is None:
        return result | {"verdict": "one seed, not judged"}
    error = math.sqrt(
        ours["std"] ** 2 / len(ours["values"]) + theirs["std"] ** 2 / len(theirs["values"])
    )
    if abs(difference) <= 2 * error:
        words = "not separable"
    else:
        words = "agrees" if difference > 0 else "disagrees"
    return result | {"verdict": words, "standard_error": error}


def _row_results(table: Table, row: Row, outcomes: Outcomes, start: bool = False) -> Results:
    """One row: its chosen grid point, rates over the seeds, published figures, notes.

    "wer" has "mean", "std" (of the sample; None for one seed) and "values" by split; "epsilon" is
    of the first deployment: a number, infinite without a guarantee, or None without privacy.
    "sent" are bytes of a client's update, "simulated" seconds of the simulated clock, "until" those
    until each of the table's `reach`, infinite if a run has not got there; "users": `_over_users`.
    """
    point = {} if start else choose(table, row, outcomes)
    if start:
        runs = [run for run in possible(table) if run.phase == STARTS and run.row == row.name]
    else:
        runs = runs_of(table, row)
    completed = _completed([run for run in runs if dict(run.point) == point], outcomes)
    wer = _rates(table.report, [outcome for _, outcome in completed])
    return {
        "name": row.name,
        "series": row.series,
        "x": row.x,
        "point": point,
        "seeds": [seed for seed, _ in completed],
        "wer": wer,
        "epsilon": _epsilon(completed[0][1].summary) if completed else None,
        "sent": _sent(completed[0][1].summary) if completed else None,
        "simulated": _mean([o.summary.get("simulated_seconds") for _, o in completed]),
        "until": {
            f"{rate:g}": _mean([o.seconds_until(table.select, rate) for _, o in completed])
            for rate in table.reach
        },
        "users": _over_users(table.report, [o for _, o in completed]) if table.users else {},
        "published": dict(row.published),
        "difference": {
            split: wer[split]["mean"] - figure
            for split, figure in row.published.items()
            if split in wer
        },
        "notes": _notes(table, runs, point, outcomes),
    }


def _completed(runs: Sequence[Run], outcomes: Outcomes) -> list[tuple[int, Outcome]]:
    """(seed, outcome) of the runs that are done."""
    found = [(run.seed, outcomes.get(run.name, NOT_RUN)) for run in runs]
    return [(seed, outcome) for seed, outcome in found if outcome.status == COMPLETED]


def _rates(splits: Sequence[str], completed: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Word error rates by split, of those that have any."""
    wer: dict[str, dict[str, Any]] = {}
    for split in splits:
        values = [rate for outcome in completed if (rate := outcome.wer(split)) < math.inf]
        if values:
            wer[split] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
    return wer


def _mean(values: Sequence[float | None]) -> float | None:
    """None if there are none, or not all."""
    there = [x for x in values if x is not None]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def _over_users(splits: Sequence[str], completed: Sequence[Outcome]) -> dict[str, Any]:
    """Means over the seeds of what runs tell of a split's users, in percent.

    "mean" over users with "low" and "high", the ends of its 95% interval over users, and
    "worst_tenth", the mean of the worst tenth of them.
    """
    found = {}
    for split in splits:
        told = [(outcome.summary.get("served") or {}).get(split) or {} for outcome in completed]
        ends = [(one.get("intervals") or {}).get("mean") or (None, None) for one in told]
        found[split] = {
            "mean": _mean([one.get("mean") for one in told]),
            "low": _mean([low for low, _ in ends]),
            "high": _mean([high for _, high in ends]),
            "worst_tenth": _mean([one.get("worst_decile") for one in told]),
        }
    return found


def _epsilon(summary: Mapping[str, Any]) -> float | None:
    privacy = summary.get("privacy") or {}
    if not privacy.get("enabled") or not privacy.get("extrapolations"):
        return None
    epsilon = privacy["extrapolations"][0]["epsilon"]
    return math.inf if epsilon is None else epsilon  # older summaries: null alone


def _sent(summary: Mapping[str, Any]) -> float | None:
    """Bytes that a client sends in a round; None of central training."""
    clients = summary.get("clients") or [{}]
    return clients[-1].get("up_bytes")


def _notes(
    table: Table, runs: Sequence[Run], point: Mapping[str, Any] | None, outcomes: Outcomes
) -> list[str]:
    """What is wrong with any of a row's runs that should have been made."""
    notes = []
    for run in runs:
        if run.phase == SECOND and dict(run.point) != point:
            continue
        outcome = outcomes.get(run.name, NOT_RUN)
        if outcome.status == COMPLETED:
            continue
        where = f"seed {run.seed}"
        if len({tuple(other.point.values()) for other in runs}) > 1:
            where = f"{describe_point(run.point)}, {where}"
        what = outcome.status
        if outcome.message:
            what += f": {outcome.message}"
        elif run.start and outcomes.get(run.start, NOT_RUN).status in (FAILED, DIVERGED):
            what += f": its start {run.start} failed"
        notes.append(f"{where} {what}")
    if any(run.phase == SECOND for run in runs) and point is None:
        notes.append(f"{len(table.seeds) - 1} further seeds wait for the grid")
    return notes
