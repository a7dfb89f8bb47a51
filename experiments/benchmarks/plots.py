"""What the benchmarks' plots share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.errors import UserError


def define_flag() -> None:
    """The flag --plot; not when a program is imported: others have a flag of that name."""
    flags.DEFINE_string("plot", None, "Draws the figures into this PNG file.")


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of some inches, and axes side by side.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure as a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def bars(axes: Any, values: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Horizontal bars.

    Args:
      axes: of a panel.
      values: {row: {kind: value}}; every row has the same kinds, which get a colour each.
      label: of the values.
    """
    kinds = list(next(iter(values.values())))
    height = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        rows = [position + height * i for position in range(len(values))]
        axes.barh(rows, [row[kind] for row in values.values()], 0.95 * height, label=kind)
    middle = height * (len(kinds) - 1) / 2
    axes.set_yticks([position + middle for position in range(len(values))], list(values))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if len(kinds) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(kinds))
