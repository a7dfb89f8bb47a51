"""The report's plots, drawn by matplotlib where it is installed."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedasr.training.report.read import Record, final_wer, initial_wer
from fedasr.training.report.words import escaped, missing_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MAX_LABELLED_LAYERS = 64


def has_matplotlib() -> bool:
    """Whether there can be plots."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def html_image(draw: Any, alt: str) -> str:
    """The figure that `draw()` returns as an <img> that holds its own data."""
    if not has_matplotlib():
        return missing_text("The plot needs matplotlib: pip install matplotlib.")
    buffer = io.BytesIO()
    draw().savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{data}">'


def new_figure(columns: int, width: float = 10.5, height: float = 3.6) -> tuple[Any, list[Any]]:
    """(figure, axes side by side), with a size in inches."""
    # Not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, all_axes


def colors_from(start: int) -> list[str]:
    """All colours, the one of this number first."""
    return [*COLORS[start:], *COLORS[:start]]


def escape_math(text: str) -> str:
    """Text for matplotlib, which would read dollars as formulas, and on one line."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.replace("$", r"\$")


def shorten(text: str, size: int = 48) -> str:
    """The text without its middle, if it is long."""
    return text if len(text) <= size else f"{text[: size // 2 - 1]}…{text[-size // 2 :]}"


def draw_line(
    axes: Any, x: np.ndarray, y: np.ndarray, *, color: str, label: Any = None, **style
) -> None:
    """A curve, or a point if that is all there is."""
    # One point draws no line.
    style.setdefault("marker", "o" if len(x) == 1 else None)
    # A leading underscore would hide it from the legend.
    label = None if label is None else " " + escape_math(shorten(str(label)))
    axes.plot(x, y, color=color, label=label, markersize=4, linewidth=1.6, **style)


def draw_noisy(axes: Any, x: np.ndarray, y: np.ndarray, label: str | None) -> None:
    """Every value pale, their running mean bold."""
    window = len(x) // 25
    if window < 2:
        draw_line(axes, x, y, color=COLORS[0], label=label)
        return
    axes.plot(x, y, color=COLORS[0], alpha=0.3, linewidth=0.8)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - window, 0)
    draw_line(axes, x, (sums[ends] - sums[starts]) / (ends - starts), color=COLORS[0], label=label)


def draw_legend(axes: Any) -> None:
    """A legend, if any curve has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def draw_wer(axes: Any, curves: dict, summary: Record, annotate: bool = False) -> None:
    """Word error rates by round, with where they began and ended."""
    final = final_wer(summary)
    compared = final[0] if final else next(iter(curves))
    initial = initial_wer(summary, compared)
    top = max(float(y.max()) for _, y in curves.values())
    last = max(float(x.max()) for x, _ in curves.values())
    for color, (split, curve) in zip(colors_from(0), curves.items(), strict=False):
        # A line between a first and a last point would claim what nobody measured.
        style: dict[str, Any] = {} if len(curve[0]) > 2 else {"linestyle": "none"}
        draw_line(axes, *curve, color=color, label=split, marker="o", **style)
    if initial is not None:
        top = max(top, initial)
        axes.axhline(initial, color="#57606a", linestyle="--", linewidth=1.2)
        name = escape_math(shorten(compared, 16))
        text = f"before federated training, {name}: {initial:.1f}%"
        axes.annotate(
            text, (1.0, initial), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="#57606a",
        )  # fmt: skip
    if final is not None:
        split, wer = final
        color = COLORS[1 if split not in curves else list(curves).index(split) % len(COLORS)]
        top = max(top, wer)
        axes.plot([last], [wer], marker="*", markersize=13, color=color, clip_on=False)
        axes.annotate(
            escape_math(f"final, {shorten(split, 16)}: {wer:.1f}%"), (last, wer), xytext=(-2, 24),
            textcoords="offset points", ha="right", va="bottom", color=color,
            fontsize=12 if annotate else 9, fontweight="bold" if annotate else None,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.15 or 1.0)
    axes.set_xlabel("federated round" if annotate else "round")
    if annotate:
        axes.set_ylabel("word error rate, %")
    else:
        axes.set_title("Word error rate, %")
    draw_legend(axes)


def draw_layers(panels: Sequence[tuple]) -> Any:
    """A figure of matrices (layers, rounds, values, title, whether relative to the bounds)."""
    from matplotlib.colors import LogNorm

    count = max(len(panel[0]) for panel in panels)
    figure, all_axes = new_figure(len(panels), height=float(np.clip(1.2 + 0.19 * count, 2.4, 14.0)))
    for column, (axes, (names, rounds, values, title, relative)) in enumerate(
        zip(all_axes, panels, strict=True)
    ):
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if relative is None:  # A share.
            style = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}
        else:
            # A layer that did not move has no logarithm: it is left white, like a missing value.
            values = np.where(values > 0, values, np.nan)
            known = values[np.isfinite(values)]
            low, high = (known.min(), known.max()) if known.size else (0.5, 2.0)
            if relative:
                # Two decades at most: beyond, how far from the bound matters less.
                reach = float(np.clip(max(high, 1.0 / low), 2.0, 100.0))
                style = {"cmap": "RdBu_r", "norm": LogNorm(1.0 / reach, reach)}
            else:
                style = {"cmap": "magma", "norm": LogNorm(low, high * (1.0 + 1e-6))}
        extent = (-0.5, len(rounds) - 0.5, len(names) - 0.5, -0.5)
        image = axes.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            interpolation="nearest",
            extent=extent,
            **style,
        )
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        ticks = np.unique(np.linspace(0, len(rounds) - 1, min(6, len(rounds))).round().astype(int))
        axes.set_xticks(ticks, [f"{rounds[t]:.0f}" for t in ticks])
        every = -(-len(names) // _MAX_LABELLED_LAYERS)
        shown: Sequence[int] = range(0, len(names), every)
        if column and names == panels[0][0]:
            shown = ()
        labels = [escape_math(shorten(names[i])) for i in shown]
        axes.set_yticks(list(shown), labels, fontsize=7.5)
        axes.set_xlabel("round")
        axes.set_title(title)
    return figure
