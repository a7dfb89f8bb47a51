"""What a table of results is: rows of runs, the grid that each row may choose from, and a plot.

`fedasr sweep` runs tables and collects them; `published` and `mini` beside this hold definitions.
Nothing here starts a run or reads a run's files: tables are expanded into `Run`s, and `Outcome`s
are put together into results, verdicts, Markdown, CSV and a picture.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.errors import UserError

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

Results = dict[str, Any]


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
    """

    status: str
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether running it again at once would be of no use."""
        return self.status in _FINISHED

    def wer(self, split: str) -> float:
        """Final word error rate in percent; infinite for a run that has none."""
        rate = (self.summary.get("wer") or {}).get(split) if self.status == COMPLETED else None
        return math.inf if rate is None else float(rate)


Outcomes = Mapping[str, Outcome]  # by the run's name
_MISSING = Outcome(MISSING)


# From a table to its runs ------------------------------------------------------------------------


def check(table: Table) -> None:
    """Raises UserError for a table that contradicts itself."""

    def refuse(what: str) -> None:
        raise UserError(f"table {table.name!r}: {what}")

    if not re.fullmatch(r"\w+", table.name, re.ASCII):
        refuse("its name must consist of letters, digits and underscores")
    if not table.rows or not table.seeds or not table.report:
        refuse("it needs a row, a seed and a split to report")
    if len(set(table.seeds)) < len(table.seeds):
        refuse(f"seeds={table.seeds} holds one of them twice")
    starts = {row.name for row in table.starts}
    rows = {row.name for row in table.rows}
    for row in (*table.starts, *table.rows):
        grid = {} if row.name in starts else _grid(table, row)
        if row.start and (row.start not in starts or row.name in starts):
            refuse(f"row {row.name!r} cannot start from {row.start!r}")
        if empty := [field for field, values in grid.items() if not values]:
            refuse(f"the grid has no value for {empty[0]}")
        taken = ("seed", *(("init_from",) if row.start else ()), *grid)
        if both := [field for field in taken if field in row.overrides]:
            refuse(f"row {row.name!r} sets {both[0]}, which the sweep sets")
    for name in itertools.chain.from_iterable(table.better):
        if name not in rows:
            refuse(f"`better` names {name!r}, which is no row")
    # Folders that differ in case only are one folder on some systems.
    names = [run.name.casefold() for run in possible(table)]
    if twice := {name for name in names if names.count(name) > 1}:
        refuse(f"two runs would be called {min(twice)}: choose names that differ more")


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
    runs = [run for run in _runs_of(table, row) if run.seed == table.seeds[0]]
    if len(runs) == 1:
        return dict(runs[0].point)
    rates = [outcomes.get(run.name, _MISSING).wer(table.select) for run in runs]
    best = min(rates)
    return None if best == math.inf else dict(runs[rates.index(best)].point)


def pending(table: Table, outcomes: Outcomes) -> list[Run]:
    """The runs that are known to be needed and have not finished, in the order of phases.

    A row's second phase is known when all of its first phase has finished.
    """
    runs = expand(table)
    for row in table.rows:
        if _decided(table, row, outcomes):
            runs += _second_phase(table, row, choose(table, row, outcomes))
    return [run for run in runs if not outcomes.get(run.name, _MISSING).finished]


def ready(table: Table, outcomes: Outcomes) -> list[Run]:
    """Those of `pending` that have what they start from."""
    return [
        run
        for run in pending(table, outcomes)
        if not run.start or outcomes.get(run.start, _MISSING).status == COMPLETED
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
        if any(run.phase == SECOND for run in _runs_of(table, row))
        and not _decided(table, row, outcomes)
    ]


def describe_point(point: Mapping[str, Any]) -> str:
    """A grid point for people: "learning_rate=0.01, sigma=1e-05"; "" for none."""
    return ", ".join(f"{_short(field, point)}={value}" for field, value in point.items())


def _grid(table: Table, row: Row) -> Mapping[str, tuple[Any, ...]]:
    return table.grid if row.grid is None else row.grid


def _points(table: Table, row: Row) -> list[dict[str, Any]]:
    grid = _grid(table, row)
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
    parts = [row, *(f"{_short(field, point)}-{value}" for field, value in point.items())]
    return "__".join(_slug(part) for part in (*parts, f"seed-{seed}"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.") or "_"


def _short(field: str, fields: Iterable[str]) -> str:
    """The last part of a dotted name, or all of it where that is not unique among `fields`."""
    last = field.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in fields) == 1 else field


def _runs_of(table: Table, row: Row) -> list[Run]:
    return [run for run in possible(table) if run.row == row.name and run.phase != STARTS]


def _decided(table: Table, row: Row, outcomes: Outcomes) -> bool:
    first = [run for run in _runs_of(table, row) if run.phase == FIRST]
    return all(outcomes.get(run.name, _MISSING).finished for run in first)


def _second_phase(table: Table, row: Row, point: Mapping[str, Any] | None) -> list[Run]:
    runs = _runs_of(table, row)
    return [run for run in runs if run.phase == SECOND and dict(run.point) == point]


# From outcomes to results ------------------------------------------------------------------------


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
        needed += _second_phase(table, row, choose(table, row, outcomes))
    statuses = [outcomes.get(run.name, _MISSING).status for run in needed]
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
    """
    point = {} if start else choose(table, row, outcomes)
    if start:
        runs = [run for run in possible(table) if run.phase == STARTS and run.row == row.name]
    else:
        runs = _runs_of(table, row)
    chosen = [run for run in runs if dict(run.point) == point]
    completed = [
        (run.seed, outcome)
        for run in chosen
        if (outcome := outcomes.get(run.name, _MISSING)).status == COMPLETED
    ]
    wer: dict[str, dict[str, Any]] = {}
    for split in table.report:
        values = [rate for _, outcome in completed if (rate := outcome.wer(split)) < math.inf]
        if values:
            wer[split] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
    return {
        "name": row.name,
        "series": row.series,
        "x": row.x,
        "point": point,
        "seeds": [seed for seed, _ in completed],
        "wer": wer,
        "epsilon": _epsilon(completed[0][1].summary) if completed else None,
        "published": dict(row.published),
        "difference": {
            split: wer[split]["mean"] - figure
            for split, figure in row.published.items()
            if split in wer
        },
        "notes": _notes(table, runs, point, outcomes),
    }


def _epsilon(summary: Mapping[str, Any]) -> float | None:
    privacy = summary.get("privacy") or {}
    if not privacy.get("enabled") or not privacy.get("extrapolations"):
        return None
    epsilon = privacy["extrapolations"][0]["epsilon"]
    return math.inf if epsilon is None else epsilon  # older summaries: null alone


def _notes(
    table: Table, runs: Sequence[Run], point: Mapping[str, Any] | None, outcomes: Outcomes
) -> list[str]:
    """What is wrong with any of a row's runs that should have been made."""
    notes = []
    for run in runs:
        if run.phase == SECOND and dict(run.point) != point:
            continue
        outcome = outcomes.get(run.name, _MISSING)
        if outcome.status == COMPLETED:
            continue
        where = f"seed {run.seed}"
        if len({tuple(other.point.values()) for other in runs}) > 1:
            where = f"{describe_point(run.point)}, {where}"
        what = outcome.status
        if outcome.message:
            what += f": {outcome.message}"
        elif run.start and outcomes.get(run.start, _MISSING).status in (FAILED, DIVERGED):
            what += f": its start {run.start} failed"
        notes.append(f"{where} {what}")
    if any(run.phase == SECOND for run in runs) and point is None:
        notes.append(f"{len(table.seeds) - 1} further seeds wait for the grid")
    return notes


# Presentation ------------------------------------------------------------------------------------


def to_markdown(table: Table, results: Results, plot: str = "") -> str:
    """The table for people, with the published ordering and whether it was found.

    Args:
      table: what was run.
      results: of `collect`.
      plot: relative path of the picture; "" for none.
    """
    lines = [f"# {table.title}", ""]
    runs = results["runs"]
    lines += [
        f"Word error rates in percent, mean ± sample standard deviation over {len(table.seeds)} "
        f"seed{'s' if len(table.seeds) > 1 else ''}. Runs: {runs['completed']} completed, "
        f"{runs['failed']} failed, {runs['missing']} missing.",
        "",
    ]
    rows = [_cells(table, row) for row in (*results["starts"], *results["rows"])]
    always = ("", "seeds", *(f"{split} WER" for split in table.report))
    columns = [name for name in rows[0] if name in always or any(row[name] for row in rows)]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(row[name].replace("|", "\\|") for name in columns) + " |")
    if table.expected or table.better:
        lines += ["", f"Published ordering: {table.expected or 'by the pairs below'}"]
    if table.better:
        lines += [
            "",
            f"Found on {table.report[-1]} (separable: the means differ by more than two standard "
            "errors of the difference):",
            "",
        ]
        lines += [f"* {_verdict_line(item)}" for item in results["verdicts"]]
    if plot:
        lines += ["", f"![{table.title}]({plot})"]
    return "\n".join(lines) + "\n"


def to_csv(table: Table, results: Results) -> str:
    """One line a row: grid point, word error rates, published figures, epsilon, notes."""
    fields = list(dict.fromkeys(f for row in table.rows for f in _grid(table, row)))
    header = ["row", *fields, "seeds"]
    for split in table.report:
        header += [f"{split}_{what}" for what in ("mean", "std", "published", "difference")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*header, "epsilon", "notes"], lineterminator="\n")
    writer.writeheader()
    for row in (*results["starts"], *results["rows"]):
        line = {
            "row": row["name"],
            "seeds": " ".join(map(str, row["seeds"])),
            "epsilon": "infinite" if row["epsilon"] == math.inf else row["epsilon"],
            "notes": "; ".join(row["notes"]),
            **(row["point"] or {}),
        }
        for split in table.report:
            rates = row["wer"].get(split, {})
            line |= {
                f"{split}_mean": rates.get("mean"),
                f"{split}_std": rates.get("std"),
                f"{split}_published": row["published"].get(split),
                f"{split}_difference": row["difference"].get(split),
            }
        writer.writerow(line)
    return text.getvalue()


def _cells(table: Table, row: Results) -> dict[str, str]:
    """Every cell that a line may have, by column."""
    missing = len(table.seeds) - len(row["seeds"])
    cells = {
        "": row["name"],
        "chosen": describe_point(row["point"]) if row["point"] else "",
        "seeds": f"{len(row['seeds'])} of {len(table.seeds)}" if missing else str(len(table.seeds)),
    }
    for split in table.report:
        cells[f"{split} WER"] = _rate(row["wer"].get(split))
    epsilon = row["epsilon"]
    cells["epsilon"] = "" if epsilon is None else f"{epsilon:.3g}".replace("inf", "infinite")
    for split in table.report:
        published, difference = row["published"].get(split), row["difference"].get(split)
        cells[f"published {split}"] = "" if published is None else f"{published:.1f}"
        cells[f"{split} difference"] = "" if difference is None else f"{difference:+.1f}"
    cells["notes"] = "; ".join(row["notes"])
    return cells


def _rate(rates: Mapping[str, Any] | None) -> str:
    if rates is None:
        return "-"
    spread = "" if rates["std"] is None else f" ± {rates['std']:.1f}"
    return f"{rates['mean']:.1f}{spread}"


def _verdict_line(item: Results) -> str:
    detail = ""
    if item["difference"] is not None:
        detail = f" (difference {item['difference']:.1f}"
        if item["standard_error"] is not None:
            detail += f", standard error {item['standard_error']:.1f}"
        detail += ")"
    return f"{item['better']} better than {item['worse']}: {item['verdict']}{detail}"


# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write_plot(table: Table, results: Results, path: Path) -> Path:
    """Draws word error rates: lines by series against x, or bars; published ones are dashed.

    Rows without x among others that have one, such as central training, are horizontal lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    bars = all(row["x"] is None for row in rows)
    # The last split with something to compare with, if there is any.
    published = [split for split in table.report if any(split in row["published"] for row in rows)]
    split = (published or table.report)[-1]
    figure = Figure(
        figsize=(8.0, 1.5 + 0.4 * len(table.rows) if bars else 4.4), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_plain(table.title), fontsize=10, loc="left", wrap=True)
    label = f"{split} word error rate, %"
    if bars:
        _draw_bars(axes, rows, split)
        axes.set_xlabel(label)
    else:
        _draw_lines(axes, rows, split, table.log_x)
        axes.set_ylabel(label)
        axes.set_xlabel(_plain(table.x_label))
    axes.set_axisbelow(True)
    axes.grid(axis="x" if bars else "y", color="#e6e6e6", linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=9, ncols=1 + len(labels) // 7)
    figure.savefig(path, dpi=150, format="png")
    return path


def _draw_bars(axes: Any, rows: Sequence[Results], split: str) -> None:
    series = list(dict.fromkeys(row["series"] for row in rows))
    for place, row in enumerate(rows):
        color = _COLORS[series.index(row["series"]) % len(_COLORS)]
        if rates := row["wer"].get(split):
            axes.barh(place, rates["mean"], xerr=rates["std"], height=0.6, color=color, alpha=0.75,
                      error_kw={"capsize": 3, "elinewidth": 1})  # fmt: skip
        else:
            axes.annotate("no result", (0, place), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=9, color="#57606a")  # fmt: skip
        if (published := row["published"].get(split)) is not None:
            first = not any(other["published"].get(split) for other in rows[:place])
            axes.vlines(published, place - 0.42, place + 0.42, color=color, linestyles="dashed",
                        label="published (dashed)" if first else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [_plain(row["name"]) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)


def _draw_lines(axes: Any, rows: Sequence[Results], split: str, log_x: bool) -> None:
    placed = [row for row in rows if row["x"] is not None]
    positive = [row["x"] for row in placed if row["x"] > 0]
    # A logarithmic axis has no zero: it gets a place to the left of the others.
    zero = min(positive) / 3 if log_x and positive else 0.0
    place = {row["x"]: row["x"] if row["x"] > 0 or not log_x else zero for row in placed}
    if log_x and positive:
        axes.set_xscale("log")
    ticks = sorted(place)
    axes.set_xticks([place[x] for x in ticks], [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    series = list(dict.fromkeys(row["series"] for row in placed))
    for number, name in enumerate(series):
        color = _COLORS[number % len(_COLORS)]
        line = sorted((row for row in placed if row["series"] == name), key=lambda row: row["x"])
        if ours := [row for row in line if split in row["wer"]]:
            axes.errorbar(
                [place[row["x"]] for row in ours],
                [row["wer"][split]["mean"] for row in ours],
                yerr=[row["wer"][split]["std"] or 0.0 for row in ours],
                color=color, marker="o", markersize=5, capsize=3, label=_plain(name) or "here",
            )  # fmt: skip
        if published := [row for row in line if split in row["published"]]:
            axes.plot(
                [place[row["x"]] for row in published],
                [row["published"][split] for row in published],
                color=color, linestyle="--", marker="D", markersize=4, markerfacecolor="none",
                label=f"{_plain(name)} published".strip(),
            )  # fmt: skip
    for number, row in enumerate((row for row in rows if row["x"] is None), len(series)):
        color, name = _COLORS[number % len(_COLORS)], _plain(row["name"])
        if split in row["wer"]:
            axes.axhline(row["wer"][split]["mean"], color=color, linewidth=1, label=name)
        if split in row["published"]:
            axes.axhline(row["published"][split], color=color, linewidth=1, linestyle="--",
                         label=f"{name} published")  # fmt: skip
    axes.set_ylim(bottom=0)


def _plain(text: str) -> str:
    """matplotlib would take a pair of dollars for mathematics."""
    return text.replace("$", r"\$")
