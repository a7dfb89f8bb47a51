"""A table's results as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.recipes.tables.definition import Table
from fedasr.recipes.tables.results import Results

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
    for y, row in enumerate(rows):
        color = _COLORS[series.index(row["series"]) % len(_COLORS)]
        if rates := row["wer"].get(split):
            axes.barh(y, rates["mean"], xerr=rates["std"], height=0.6, color=color, alpha=0.75,
                      error_kw={"capsize": 3, "elinewidth": 1})  # fmt: skip
        else:
            axes.annotate("no result", (0, y), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=9, color="#57606a")  # fmt: skip
        if (published := row["published"].get(split)) is not None:
            first = not any(other["published"].get(split) for other in rows[:y])
            axes.vlines(published, y - 0.42, y + 0.42, color=color, linestyles="dashed",
                        label="published (dashed)" if first else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [_plain(row["name"]) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)


def _draw_lines(axes: Any, rows: Sequence[Results], split: str, log_x: bool) -> None:
    placed = [row for row in rows if row["x"] is not None]
    position = _x_positions(axes, [row["x"] for row in placed], log_x)
    series = list(dict.fromkeys(row["series"] for row in placed))
    for number, name in enumerate(series):
        line = sorted((row for row in placed if row["series"] == name), key=lambda row: row["x"])
        _draw_series(axes, line, position, split, _plain(name), _COLORS[number % len(_COLORS)])
    for number, row in enumerate((row for row in rows if row["x"] is None), len(series)):
        color, name = _COLORS[number % len(_COLORS)], _plain(row["name"])
        if split in row["wer"]:
            axes.axhline(row["wer"][split]["mean"], color=color, linewidth=1, label=name)
        if split in row["published"]:
            axes.axhline(row["published"][split], color=color, linewidth=1, linestyle="--",
                         label=f"{name} published")  # fmt: skip
    axes.set_ylim(bottom=0)


def _x_positions(axes: Any, values: Sequence[float], log_x: bool) -> dict[float, float]:
    """Where each x lies on the axis, which gets its ticks."""
    positive = [x for x in values if x > 0]
    # A logarithmic axis has no zero: it gets a place to the left of the others.
    zero = min(positive) / 3 if log_x and positive else 0.0
    position = {x: x if x > 0 or not log_x else zero for x in values}
    if log_x and positive:
        axes.set_xscale("log")
    ticks = sorted(position)
    axes.set_xticks([position[x] for x in ticks], [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    return position


def _draw_series(
    axes: Any,
    line: Sequence[Results],
    position: Mapping[float, float],
    split: str,
    name: str,
    color: str,
) -> None:
    """What was found, with its spread, and dashed what was published."""
    if ours := [row for row in line if split in row["wer"]]:
        axes.errorbar(
            [position[row["x"]] for row in ours],
            [row["wer"][split]["mean"] for row in ours],
            yerr=[row["wer"][split]["std"] or 0.0 for row in ours],
            color=color, marker="o", markersize=5, capsize=3, label=name or "here",
        )  # fmt: skip
    if published := [row for row in line if split in row["published"]]:
        axes.plot(
            [position[row["x"]] for row in published],
            [row["published"][split] for row in published],
            color=color, linestyle="--", marker="D", markersize=4, markerfacecolor="none",
            label=f"{name} published".strip(),
        )  # fmt: skip


def _plain(text: str) -> str:
    """matplotlib would take a pair of dollars for mathematics."""
    return text.replace("$", r"\$")
