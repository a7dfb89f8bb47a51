"""The report's section on who is served: users by error, groups, confusions, another run beside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.training.report.beside import beside_table
from fedasr.training.report.heard import heard_section
from fedasr.training.report.plots import (
    COLORS,
    colors_of,
    draw_groups,
    draw_users,
    html_figure,
    new_figure,
)
from fedasr.training.report.read import Record, mapping_at, number_at
from fedasr.training.report.tables import html_table, meaning_table
from fedasr.training.report.words import (
    as_text,
    between_text,
    escaped,
    interval_text,
    missing_text,
    note_text,
    percent_text,
)

_WORST = 10
_MOST_GROUPS = 30  # lines of the figure


def unseen_text(users: Record) -> str:
    """Whose error rates the report has: "" where it is not known who trained."""
    parts = []
    for split in users:
        rows = _rows(users, split)
        known = [row for row in rows if row.get("training_minutes") is not None]
        if not rows or len(known) != len(rows):
            return ""
        seen = sum(bool(row.get("training_minutes")) for row in rows)
        trained = "none of whom trained" if not seen else f"{seen} of whom trained"
        parts.append(f"{split} has {len(rows)} users, {trained}")
    return "; ".join(parts).capitalize() if parts else ""


def served_section(
    users: Record,
    splits: Sequence[str],
    against: tuple[str, Record] | None = None,
    worst: Record | None = None,
) -> str:
    """Errors by user and group of each split.

    Args:
      users: what `users.json` holds.
      splits: of the run, for their colours.
      against: name and `users.json` of another run, whose users stand beside.
      worst: what `worst.json` holds.
    """
    if not any(_rows(users, split) for split in users):
        return missing_text("Errors by user are not kept in this run.")
    parts = []
    for split in users:
        if _rows(users, split):
            color = colors_of([*splits, split])[split]
            parts.append(_of_split(users, split, color, against))
            parts.append(heard_section(mapping_at(worst, split)))
    return "".join(parts)


def _rows(users: Record, split: str) -> list[Record]:
    found = mapping_at(users, split).get("by_user")
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, Mapping) and number_at(row, "wer") is not None]


def _of_split(users: Record, split: str, color: str, against: tuple[str, Record] | None) -> str:
    rows = _rows(users, split)
    found = mapping_at(mapping_at(users, split), "wer")
    names = {
        "mean": "Mean over users",
        "sd": "Standard deviation over users",
        "p10": "10th percentile",
        "p50": "Median",
        "p90": "90th percentile",
        "worst_decile": "Worst tenth",
    }
    table = meaning_table(
        (key, name, percent_text(number_at(found, key)), interval_text(found, key))
        for key, name in names.items()
        if number_at(found, key) is not None
    )
    parts = [
        f"<h3>{escaped(split)}: {len(rows)} users</h3>",
        table,
        beside_table(users, split, *against) if against else "",
        _users_figure(rows, split, color, against),
        _groups(mapping_at(mapping_at(users, split), "columns"), split, color),
        _worst(rows),
        _confusions(mapping_at(mapping_at(users, split), "confusions")),
    ]
    return "".join(parts)


def _users_figure(
    rows: Sequence[Record], split: str, color: str, against: tuple[str, Record] | None
) -> str:
    rates = {str(row.get("user")): number_at(row, "wer") or 0.0 for row in rows}
    sides = [("this run", np.array(list(rates.values())), color)]
    said = ""
    if against is not None:
        name, theirs = against
        other = {str(r.get("user")): number_at(r, "wer") or 0.0 for r in _rows(theirs, split)}
        shared = [user for user in rates if user in other]
        if shared:
            sides = [
                ("this run", np.array([rates[user] for user in shared]), color),
                (name, np.array([other[user] for user in shared]), COLORS[4]),
            ]
            change = sides[0][1] - sides[1][1]
            said = (
                f" {int((change > 0).sum())} of {len(shared)} users have more errors here than in "
                f"{name}, {int((change < 0).sum())} fewer; the mean is {change.mean():+.1f} points."
            )
    order = np.argsort(sides[-1][1], kind="stable")

    def draw() -> Any:
        figure, (axes,) = new_figure(1, height=3.2)
        draw_users(axes, sides, order, "word error rate, %")
        axes.set_title(f"Users of {split}"[:60])
        return figure

    return html_figure(draw, f"word error rate of each user of {split}, sorted") + note_text(
        "Each user a bar, from the best to the worst; dashed is the mean over users." + said
    )


def _groups(columns: Record, split: str, color: str) -> str:
    """A line for each group of each column, as figure and table."""
    lines = []
    for column in columns:
        for value, group in mapping_at(mapping_at(columns, column), "groups").items():
            rate, users = number_at(group, "rate"), number_at(group, "users")
            if rate is not None and users is not None:
                ends = group.get("interval")
                lines.append((f"{column}: {value}", int(users), rate, ends))
    if not lines:
        return missing_text("The data says nothing by which users could be grouped.")
    shown = lines[:_MOST_GROUPS]
    intervals = np.array([_ends(ends) for *_, ends in shown])

    def draw() -> Any:
        figure, (axes,) = new_figure(1, height=0.9 + 0.24 * len(shown))
        names = [f"{name} ({users})" for name, users, *_ in shown]
        draw_groups(axes, names, np.array([rate for *_, rate, _ in shown]), intervals, color)
        axes.set_xlabel("mean word error rate of the users, %, with 95% intervals over users")
        return figure

    rows = [(name, users, percent_text(rate), between_text(e)) for name, users, rate, e in lines]
    table = html_table(rows, ("group", "users", "word error rate", "95% interval"))
    return (
        html_figure(draw, f"word error rate of groups of users of {split}")
        + f"<details><summary>All {len(lines)} groups in numbers</summary>{table}</details>"
    )


def _ends(ends: Any) -> tuple[float, float]:
    if isinstance(ends, list) and len(ends) == 2:
        low, high = (number_at({"": x}, "") for x in ends)
        if low is not None and high is not None:
            return low, high
    return float("nan"), float("nan")


def _worst(rows: Sequence[Record]) -> str:
    """The users with the most errors."""
    worst = sorted(rows, key=lambda row: -(number_at(row, "wer") or 0.0))[:_WORST]
    table = html_table(
        (
            (
                row.get("user"),
                percent_text(number_at(row, "wer")),
                row.get("words"),
                row.get("training_minutes"),
                ", ".join(f"{k}: {v}" for k, v in mapping_at(row, "metadata").items()),
            )
            for row in worst
        ),
        ("user", "word error rate", "words", "minutes trained on", "of whom is known"),
    )
    return (
        f"<details><summary>The {len(worst)} users with the most errors</summary>{table}</details>"
    )


def _confusions(found: Record) -> str:
    """What is taken for what."""
    parts = []
    for kind in ("words", "characters"):
        rows = found.get(kind)
        rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        if rows:
            table = html_table(
                (
                    (
                        as_text(row.get("reference") or "(nothing)"),
                        as_text(row.get("hypothesis") or "(nothing)"),
                        row.get("count"),
                        row.get("of"),
                    )
                    for row in rows[:20]
                ),
                ("said", "recognised", "times", "of so often said"),
            )
            parts.append(f"<details><summary>Confusions of {kind}</summary>{table}</details>")
    return "".join(parts)
