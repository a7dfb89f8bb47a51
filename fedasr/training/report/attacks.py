"""The report's section on attacks: what `fedasr attack` found, from `attacks.json`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.training.report.plots import COLORS, html_figure, new_figure
from fedasr.training.report.read import Record, number_at
from fedasr.training.report.tables import html_table
from fedasr.training.report.words import as_text, escaped, missing_text, note_text

_COMMAND = "fedasr attack --workdir=DIR"
_PANELS = 3  # side by side


def attacks_section(found: Record) -> str:
    """Each attack's success beside chance and the bound of the run's privacy."""
    rows = found.get("results")
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    if not rows:
        return missing_text(f"No attack was tried on this run: {_COMMAND} tries them.")
    parts = []
    exposed = [row for row in rows if row.get("exceeds") is True]
    for row in exposed:
        parts.append(
            f'<p class="warning">Warning: {escaped(row.get("attack"))} does better than the '
            "claimed privacy allows: the run has less than it says.</p>"
        )
    parts.append(
        html_table(
            (
                (
                    f"{row.get('attack')}: {row.get('setting')}",
                    _share(row, "success"),
                    _between(row.get("interval")),
                    _share(row, "chance"),
                    _share(row, "bound"),
                )
                for row in rows
            ),
            ("attack", "success", "95% interval", "chance", "at most, by ε"),
        )
    )
    names = list(dict.fromkeys(str(row.get("attack")) for row in rows))
    for some in (names[i : i + _PANELS] for i in range(0, len(names), _PANELS)):
        said = f"success by noise: {', '.join(some)}"
        parts.append(html_figure(functools.partial(_panels, some, rows), said))
    parts.append(
        note_text(
            "Success is the share of targets that the attack gets right; each attack says what "
            "that is. Chance is what guessing gives. The bound is what no attack can pass if the "
            "claimed ε holds; 100% where ε says nothing. A success within its bound is no proof "
            "of privacy: a better attack may exist."
        )
    )
    return "".join(parts)


def _panels(names: Sequence[str], rows: list[Record]) -> Any:
    figure, all_axes = new_figure(_PANELS, height=3.2)
    for axes in all_axes[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(all_axes, names, strict=False):
        _draw(axes, name, [row for row in rows if str(row.get("attack")) == name])
    return figure


def _share(row: Record, key: str) -> str:
    value = number_at(row, key)
    return "—" if value is None else f"{100 * value:.1f}%"


def _between(ends: Any) -> str:
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return "—"
    low, high = (number_at({"": x}, "") for x in ends)
    return "—" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def _draw(axes: Any, name: str, rows: list[Record]) -> None:
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        ends = row.get("interval")
        if isinstance(ends, list | tuple) and len(ends) == 2 and None not in ends:
            axes.plot([place, place], [100 * float(e) for e in ends], color=COLORS[1], linewidth=2)
    for key, style in (("success", "o"), ("chance", "_"), ("bound", "v")):
        values = [number_at(row, key) for row in rows]
        y = np.array([np.nan if v is None else 100 * v for v in values])
        color = {"success": COLORS[1], "chance": COLORS[5], "bound": COLORS[2]}[key]
        axes.plot(places, y, linestyle="none", marker=style, markersize=8, color=color, label=key)
    settings = [as_text(row.get("setting"))[:24].replace("$", "") for row in rows]
    axes.set_xticks(places, settings, rotation=30, ha="right", fontsize=7)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(-3, 105)
    axes.set_title(name[:32].replace("$", ""), fontsize=9)
    axes.legend(frameon=False, fontsize=7)
