"""Many runs on one page: a table that sorts, curves, privacy against error."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.cli.sweep.runs import read_json
from fedasr.recipes import tables
from fedasr.recipes.tables import Table
from fedasr.training.logging import read_metrics
from fedasr.training.report import STYLE
from fedasr.training.report.plots import COLORS, draw_legend, draw_line, html_figure, new_figure
from fedasr.training.report.read import (
    epsilon_of,
    evaluation_curves,
    is_central,
    main_deployment,
    mapping_at,
    number_at,
    stages_of,
)
from fedasr.training.report.words import as_text, escaped, missing_text
from fedasr.training.trackers.place import flattened

PAGE_FILE = "report.html"
_CURVES = 12  # runs that are drawn, those with the fewest errors
_NO_SETTINGS = ("name", "start", "data.identity", "data.characters", "data.vocabulary")
# Sorts by a column when its head is pressed; numbers by size, what is missing last.
_SCRIPT = """
for (const head of document.querySelectorAll("th[data-column] button"))
  head.addEventListener("click", () => {
    const cell = head.closest("th"), body = cell.closest("table").tBodies[0];
    const column = Number(cell.dataset.column);
    const up = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of cell.parentNode.children) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.children[column].dataset.value;
    const number = text => text === "" ? NaN : Number(text);
    const order = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      if (isNaN(x) && isNaN(y)) return key(a).localeCompare(key(b)) * (up ? 1 : -1);
      if (isNaN(x)) return 1; if (isNaN(y)) return -1;
      return (x - y) * (up ? 1 : -1); };
    body.append(...[...body.rows].sort(order));
  });
"""
_MORE = """
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; text-align: left; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
"""


def write_page(chosen: Sequence[Table], out: Path) -> Path:
    """Writes `report.html` into a sweep's folder; returns its path."""
    runs = [run for table in chosen for run in _runs_of(table, out)]
    title = ", ".join(table.title for table in chosen)
    body = [
        f"<h1>{escaped(out.resolve().name)}: {len(runs)} runs</h1>",
        f'<p class="headline">{escaped(title)}</p>',
        "<h2>Runs</h2>",
        _table(runs) if runs else missing_text("No run has begun."),
        "<h2>Error while training</h2>",
        _curves(runs),
        "<h2>Privacy against error</h2>",
        _privacy(runs),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Sweep: {escaped(out.resolve().name)}</title>\n<style>{STYLE}{_MORE}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    path, temporary = out / PAGE_FILE, out / f".{PAGE_FILE}.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def _runs_of(table: Table, out: Path) -> list[dict[str, Any]]:
    """What there is of each run that has begun."""
    found = []
    for run in tables.possible(table):
        folder = out / table.name / run.name
        config = read_json(folder / "config.json")
        if not config:
            continue
        summary = read_json(folder / "summary.json")
        central = is_central(summary, config)
        main, _, unit = stages_of(read_metrics(folder), central, config)
        found.append(
            {
                "name": f"{table.name}/{run.name}",
                "summary": summary,
                "settings": {k: v for k, v in flattened(config).items() if k not in _NO_SETTINGS},
                "curves": evaluation_curves(main, "wer", unit),
            }
        )
    return found


def _differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not alike in all runs."""
    names = sorted({name for run in runs for name in run["settings"]})
    return [
        name
        for name in names
        if len({json.dumps(run["settings"].get(name), default=str) for run in runs}) > 1
    ]


def _error(run: Mapping[str, Any]) -> float:
    """By which runs are compared."""
    for split in ("test", "dev"):
        if (rate := number_at(run["summary"], "wer", split)) is not None:
            return rate
    return math.inf


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    splits = sorted({split for run in runs for split in mapping_at(run["summary"], "wer")})
    heads = ["run", "status", *(f"{split} WER, %" for split in splits), "worst tenth, %"]
    heads += ["ε of its users", "ε deployed", "minutes", *_differing(runs)]
    rows = []
    for run in sorted(runs, key=_error):
        summary = run["summary"]
        served = mapping_at(summary, "served")
        worst = number_at(mapping_at(served, "test") or mapping_at(served, "dev"), "worst_decile")
        seconds = number_at(summary, "wall_seconds")
        rows.append(
            [
                run["name"],
                summary.get("status", "begun"),
                *(number_at(summary, "wer", split) for split in splits),
                worst,
                epsilon_of(mapping_at(summary, "privacy")),
                epsilon_of(main_deployment(summary)),
                None if seconds is None else seconds / 60,
                *(run["settings"].get(name) for name in _differing(runs)),
            ]
        )
    head = "".join(
        f'<th data-column="{i}"><button type="button">{escaped(name)}</button></th>'
        for i, name in enumerate(heads)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = "none" if value == math.inf else as_text(value)
    key = "" if value is None else repr(float(value)) if number else str(value)
    key = key.replace("inf", "1e999")
    kind = ' class="number"' if number else ""
    return f'<td{kind} data-value="{escaped(key)}">{escaped(text)}</td>'


def _curves(runs: Sequence[Mapping[str, Any]]) -> str:
    drawn = [(run["name"], next(iter(run["curves"].items()))) for run in sorted(runs, key=_error)
             if run["curves"]][:_CURVES]  # fmt: skip
    if not drawn:
        return missing_text("No run has been evaluated.")

    def draw() -> Any:
        figure, (axes,) = new_figure(1, height=4.2)
        for i, (name, (split, (x, y))) in enumerate(drawn):
            style = {"linestyle": ("-", "--", ":")[i // len(COLORS) % 3]}
            label = f"{name.split('/')[-1]} ({split})"
            draw_line(axes, x, y, color=COLORS[i % len(COLORS)], label=label, **style)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("word error rate, %")
        draw_legend(axes)
        return figure

    return html_figure(draw, "word error rate of the runs while they train")


def _privacy(runs: Sequence[Mapping[str, Any]]) -> str:
    points = [
        (epsilon, _error(run))
        for run in runs
        if (epsilon := epsilon_of(main_deployment(run["summary"]))) and _error(run) < math.inf
    ]
    points = [(epsilon, error) for epsilon, error in points if math.isfinite(epsilon)]
    if not points:
        return missing_text("No run has an epsilon of a deployment.")

    def draw() -> Any:
        figure, (axes,) = new_figure(1, height=3.4)
        axes.plot(*zip(*points, strict=True), linestyle="none", marker="o", color=COLORS[0])
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ε of the deployment")
        axes.set_ylabel("word error rate, %")
        return figure

    return html_figure(draw, "word error rate against epsilon")
