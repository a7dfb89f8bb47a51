"""The report's figures, drawn by matplotlib where it is installed, as SVG within the page."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.training.report.read import Record, final_wer, initial_wer
from fedasr.training.report.words import escaped, missing_text

# Of Okabe and Ito, who chose them for all kinds of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT, GRID = "#1b1f24", "#57606a", "#d0d7de"
# What a figure's colours are called in the page's style, which knows both colour schemes.
_VARIABLES = {
    INK: "--ink", FAINT: "--faint", GRID: "--grid",
    **{color: f"--series-{i}" for i, color in enumerate(COLORS)},
}  # fmt: skip
_MAX_LABELLED_LAYERS = 64
_ORDER = ("test", "dev")


def colors_of(splits: Sequence[str]) -> dict[str, str]:
    """The colour of each split, the same in all figures: test's, dev's, then the others by name."""
    names = sorted(set(splits), key=lambda s: (_ORDER.index(s) if s in _ORDER else 9, s))
    free = [name for name in names if name not in _ORDER]
    fixed = {name: COLORS[i] for i, name in enumerate(_ORDER)}
    others = {name: COLORS[2 + i % (len(COLORS) - 2)] for i, name in enumerate(free)}
    return {name: {**fixed, **others}[name] for name in names}


def has_matplotlib() -> bool:
    """Whether there can be plots."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def html_figure(draw: Any, alt: str) -> str:
    """The figure that `draw()` returns as SVG that follows the page's colours."""
    if not has_matplotlib():
        return missing_text("The plot needs matplotlib: pip install matplotlib.")
    with _style(alt):
        buffer = io.StringIO()
        figure = draw()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(buffer.getvalue(), alt)


@contextlib.contextmanager
def _style(name: str) -> Iterator[None]:
    """Text as text, colours that `_inline` knows, and ids that are of this figure alone."""
    import matplotlib

    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = {key: INK for key in (*inks, "axes.edgecolor")}
    settings |= {"grid.color": GRID, "svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        yield


def _inline(svg: str, alt: str) -> str:
    """An SVG file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    for color, variable in _VARIABLES.items():
        svg = re.sub(re.escape(color) + r"\b", f"var({variable})", svg, flags=re.IGNORECASE)
    # Ids of elements that nothing refers to would be the same in all figures.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda x: x.group(0) if x.group(1) in used else "", svg)
    head, rest = svg.split(">", 1)
    return f'<figure>{head} role="img" aria-label="{escaped(alt)}">{rest}</figure>'


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
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, all_axes


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
    """Every value pale, their running mean bold; in a colour that no split has."""
    window = len(x) // 25
    if window < 2:
        draw_line(axes, x, y, color=FAINT, label=label)
        return
    axes.plot(x, y, color=FAINT, alpha=0.3, linewidth=0.8)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - window, 0)
    draw_line(axes, x, (sums[ends] - sums[starts]) / (ends - starts), color=FAINT, label=label)


def draw_legend(axes: Any) -> None:
    """A legend, if any curve has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def draw_wer(
    axes: Any,
    curves: Mapping[str, tuple],
    summary: Record,
    colors: Mapping[str, str],
    unit: str = "round",
    annotate: bool = False,
) -> None:
    """Word error rates by round or step, with where they began and ended.

    Args:
      axes: of a figure.
      curves: (x, percent) by split.
      summary: of the run.
      colors: of the splits.
      unit: "round" or "step".
      annotate: for a figure that stands alone.
    """
    final = final_wer(summary)
    compared = final[0] if final else next(iter(curves))
    initial = initial_wer(summary, compared)
    top = max(float(y.max()) for _, y in curves.values())
    last = max(float(x.max()) for x, _ in curves.values())
    for split, curve in curves.items():
        # A line between a first and a last point would claim what nobody measured.
        style: dict[str, Any] = {} if len(curve[0]) > 2 else {"linestyle": "none"}
        draw_line(axes, *curve, color=colors[split], label=split, marker="o", **style)
    if initial is not None:
        top = max(top, initial)
        axes.axhline(initial, color=FAINT, linestyle="--", linewidth=1.2)
        name = escape_math(shorten(compared, 16))
        stage = "federated training" if unit == "round" else "central training"
        axes.annotate(
            f"before {stage}, {name}: {initial:.1f}%", (1.0, initial),
            xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color=FAINT,
        )  # fmt: skip
    if final is not None:
        split, wer = final
        color = colors.get(split, COLORS[0])
        top = max(top, wer)
        axes.plot([last], [wer], marker="*", markersize=13, color=color, clip_on=False)
        axes.annotate(
            escape_math(f"final, {shorten(split, 16)}: {wer:.1f}%"), (last, wer), xytext=(-2, 24),
            textcoords="offset points", ha="right", va="bottom", color=color,
            fontsize=12 if annotate else 9, fontweight="bold" if annotate else None,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.15 or 1.0)
    axes.set_xlabel(f"federated {unit}" if annotate and unit == "round" else unit)
    if annotate:
        axes.set_ylabel("word error rate, %")
    else:
        axes.set_title("Word error rate, %")
    draw_legend(axes)


def draw_users(
    axes: Any, sides: Sequence[tuple[str, np.ndarray, str]], order: np.ndarray, what: str
) -> None:
    """Users side by side, in one order, each run or split a colour.

    Args:
      axes: of a figure.
      sides: (name, percent of each user, colour); all of the same users.
      order: of the users.
      what: label of the ordinate.
    """
    places = np.arange(1, len(order) + 1)
    width = 0.8 / len(sides)
    for i, (name, rates, color) in enumerate(sides):
        x = places + (i - (len(sides) - 1) / 2) * width
        label = " " + escape_math(shorten(name))
        if len(order) <= 120:
            axes.bar(x, rates[order], width=width, color=color, label=label)
        else:
            axes.plot(places, rates[order], color=color, label=label, linewidth=1.4)
        mean = float(rates.mean())
        axes.axhline(mean, color=color, linestyle="--", linewidth=1.0)
    axes.set_xlabel("user, in order of error")
    axes.set_ylabel(what)
    axes.set_xlim(0.2, len(order) + 0.8)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    draw_legend(axes)


def draw_groups(
    axes: Any, names: Sequence[str], rates: np.ndarray, intervals: np.ndarray, color: str
) -> None:
    """Groups one below the other: a point each, with its interval [groups, 2] where it has one."""
    places = np.arange(len(names))[::-1]
    for place, (low, high) in zip(places, intervals, strict=True):
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [place, place], color=color, linewidth=2.0)
    axes.plot(rates, places, linestyle="none", marker="o", color=color, markersize=6)
    axes.set_yticks(places, [escape_math(shorten(name, 32)) for name in names], fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


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
