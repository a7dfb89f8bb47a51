"""A table's results as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

from fedasr.recipes.tables.definition import Table, describe_point, grid_of
from fedasr.recipes.tables.results import Results

_SENT = "sent (kB)"  # a client's update
_SIMULATED = "simulated (min)"


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
    if table.users:
        lines += [
            "Users: the mean over a split's users with its 95% interval by bootstrap over them and "
            "the mean of the worst tenth; means over seeds, also of the interval's ends.",
            "",
        ]
    lines += _grid_lines(table, results)
    if table.expected or table.better:
        whose = "Published" if any(row.published for row in table.rows) else "Expected"
        lines += ["", f"{whose} ordering: {table.expected or 'by the pairs below'}"]
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


def _grid_lines(table: Table, results: Results) -> list[str]:
    """The rows, without the columns that would be empty."""
    rows = [_cells(table, row) for row in (*results["starts"], *results["rows"])]
    for key, column in (("sent", _SENT), ("simulated", _SIMULATED)):
        if len({row.get(key) for row in results["rows"]}) == 1:  # tells nothing
            rows = [row | {column: ""} for row in rows]
    always = ("", "seeds", *(f"{split} WER" for split in table.report))
    columns = [name for name in rows[0] if name in always or any(row[name] for row in rows)]
    body = [[row[name].replace("|", "\\|") for name in columns] for row in rows]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]


def to_csv(table: Table, results: Results) -> str:
    """One line a row: grid point, word error rates, published figures, epsilon, notes.

    Behind the rates, of rows that know them: of users, the bytes that a client sends, seconds of
    the simulated clock.
    """
    fields = list(dict.fromkeys(f for row in table.rows for f in grid_of(table, row)))
    header = ["row", *fields, "seeds"]
    for split in table.report:
        header += [f"{split}_{what}" for what in ("mean", "std", "published", "difference")]
    rows = [*results["starts"], *results["rows"]]
    header += dict.fromkeys(name for row in rows for name in _more(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*header, "epsilon", "notes"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line = {
            "row": row["name"],
            "seeds": " ".join(map(str, row["seeds"])),
            "epsilon": "infinite" if row["epsilon"] == math.inf else row["epsilon"],
            "notes": "; ".join(row["notes"]),
            **(row["point"] or {}),
            **_more(row),
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


def _more(row: Results) -> dict[str, Any]:
    """What not every row knows, by column; nothing where it does not."""
    found = {
        f"{split}_users_{what}": value
        for split, told in (row.get("users") or {}).items()
        for what, value in told.items()
    }
    found |= {"sent_bytes": row.get("sent"), "simulated_seconds": row.get("simulated")}
    for rate, seconds in (row.get("until") or {}).items():
        found[f"seconds_to_{rate}"] = "not reached" if seconds == math.inf else seconds
    return {name: value for name, value in found.items() if value is not None}


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
    for split, told in (row.get("users") or {}).items():
        cells[f"{split} users"] = _with_interval(told)
        worst = told["worst_tenth"]
        cells[f"{split} worst tenth"] = "" if worst is None else f"{worst:.1f}"
    epsilon = row["epsilon"]
    sent = row.get("sent")
    cells[_SENT] = "" if sent is None else f"{sent / 1000:,.1f}"
    cells[_SIMULATED] = _minutes(row.get("simulated"))
    for rate, seconds in (row.get("until") or {}).items():
        cells[f"min to {rate}% {table.select}"] = _minutes(seconds)
    cells["epsilon"] = "" if epsilon is None else f"{epsilon:.3g}".replace("inf", "infinite")
    for split in table.report:
        published, difference = row["published"].get(split), row["difference"].get(split)
        cells[f"published {split}"] = "" if published is None else f"{published:.1f}"
        cells[f"{split} difference"] = "" if difference is None else f"{difference:+.1f}"
    cells["notes"] = "; ".join(row["notes"])
    return cells


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return "not reached" if seconds == math.inf else f"{seconds / 60:.1f}"


def _with_interval(told: Mapping[str, Any]) -> str:
    if told["mean"] is None:
        return ""
    ends = "" if told["low"] is None else f" [{told['low']:.1f}, {told['high']:.1f}]"
    return f"{told['mean']:.1f}{ends}"


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
