"""Sections of the report that have plots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedasr.training.report.plots import (
    COLORS,
    colors_of,
    draw_layers,
    draw_legend,
    draw_line,
    draw_noisy,
    draw_wer,
    html_figure,
    new_figure,
)
from fedasr.training.report.read import (
    Record,
    all_splits,
    evaluation_curves,
    is_private,
    layer_matrix,
    mapping_at,
    number_at,
    series_of,
)
from fedasr.training.report.tables import html_table, privacy_tables
from fedasr.training.report.words import as_text, escaped, missing_text, note_text, warning_text


def learning_section(
    main: Sequence[Record],
    seed: Sequence[Record],
    summary: Record,
    unit: str = "round",
    unseen: str = "",
) -> str:
    """Loss and word error rate by round or step.

    Args:
      main, seed: records of both stages.
      summary: of the run.
      unit: that the main stage counts.
      unseen: whose error rates they are, "" if that is not known.
    """
    central = unit == "step"
    loss = series_of(main, unit, "loss")
    eval_loss = evaluation_curves(main, "loss", unit)
    curves = evaluation_curves(main, "wer", unit)
    colors = colors_of(all_splits(main, summary))
    seed_loss = series_of(seed, "step", "loss")
    panels: list[tuple[str, Any]] = []
    if seed_loss[0].size:
        panels.append(("seed", seed_loss))
    if loss[0].size or eval_loss:
        panels.append(("loss", loss))
    if curves:
        panels.append(("wer", curves))
    stage = "central step" if central else "federated round"
    parts = [warning_text(_warnings(summary))]
    if not (loss[0].size or eval_loss):
        parts.append(missing_text(f"No {stage} is logged yet."))
    if not curves and not mapping_at(summary, "wer"):
        parts.append(missing_text("No evaluation is logged yet, so there is no word error rate."))
    elif not curves:
        parts.append(missing_text("Only the first and the last state were evaluated."))

    def draw() -> Any:
        figure, all_axes = new_figure(len(panels))
        for axes, (kind, data) in zip(all_axes, panels, strict=True):
            if kind == "wer":
                draw_wer(axes, data, summary, colors, unit)
                continue
            x, y = data
            draw_noisy(axes, x, y, label="training" if kind == "loss" else None)
            if kind == "loss":
                for split, curve in eval_loss.items():
                    style: Any = {} if len(curve[0]) > 2 else {"linestyle": "none"}
                    draw_line(axes, *curve, color=colors[split], label=split, marker="o", **style)
                draw_legend(axes)
            axes.set_xlabel(unit if kind == "loss" else "step")
            title = "Central loss" if central else "Federated loss"
            axes.set_title(title if kind == "loss" else "Seed: central training loss")
        return figure

    if panels:
        over = "the examples of a step" if central else "the clients of a round"
        wanders = "batch has other examples" if central else "round draws other users"
        parts.append(html_figure(draw, "loss and word error rate over training"))
        parts.append(
            note_text(
                f"Training loss is the mean over {over}: pale for each, bold for its running "
                f"mean. It wanders because each {wanders}. A split's loss that rises while the "
                "training loss falls means that training users are learned by heart. "
                f"{unseen or 'The word error rate is measured on the splits that the legend names'}"
                "; it may pass 100%."
            )
        )
    return "".join(parts)


def _warnings(summary: Record) -> list[Any]:
    found = summary.get("warnings")
    return found if isinstance(found, list) else []


def privacy_section(federated: Sequence[Record], summary: Record) -> str:
    """The guarantee, and epsilon by round."""
    privacy = mapping_at(summary, "privacy")
    parts = []
    private = is_private(summary)
    if private:
        parts.append(privacy_tables(summary, privacy))
    elif private is None:
        parts.append(missing_text("The privacy spent is known when the run has ended."))
    else:
        parts.append(
            missing_text(
                "Differential privacy was off: no noise was added, so there is no epsilon."
            )
        )
    rounds, epsilons = series_of(federated, "round", "epsilon")
    if rounds.size:

        def draw() -> Any:
            figure, (axes,) = new_figure(1, height=3.0)
            draw_line(axes, rounds, epsilons, color=COLORS[3])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("round")
            axes.set_title("ε spent in the deployment that the run stands for")
            return figure

        parts.append(html_figure(draw, "epsilon by round"))
        parts.append(
            note_text(
                "ε bounds how much the presence of one user can change what the training "
                "reveals: likelihood ratios are at most e^ε, up to δ. Smaller is more "
                "private. It grows with every round, and stopping earlier spends less. This curve "
                "is by Rényi DP, which is quick; the figures above may be tighter."
            )
        )
    elif private:
        parts.append(missing_text("Epsilon by round is not logged in this run."))
    return "".join(parts)


def norms_section(federated: Sequence[Record]) -> str:
    """Total norms of what clients send, where nothing is clipped."""
    found = layer_matrix(federated, "update_norm")
    if found is None:
        return missing_text("Update norms by layer are not logged in this run.")
    _, rounds, values = found
    totals = np.sqrt(np.nansum(values**2, axis=0))

    def draw() -> Any:
        figure, (axes,) = new_figure(1, height=3.0)
        draw_line(axes, rounds, totals, color=COLORS[3])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("round")
        axes.set_title("Total norm of a client's update")
        return figure

    known = totals[np.isfinite(totals) & (totals > 0)]
    usual = float(np.median(known)) if len(known) else None
    text = (
        "The root of the summed squares of the layers' mean norms; the mean of the clients' own "
        "total norms is at least that. Nothing was clipped here. A private run would begin with a "
        "clip norm of about the median"
    )
    text += "." if usual is None else f", {usual:.3g}, or well below it."
    return html_figure(draw, "total update norm by round") + note_text(text)


def clipping_section(federated: Sequence[Record], bounds: Record) -> str:
    """Update norms and shares clipped, by layer and round."""
    norms = layer_matrix(federated, "update_norm")
    shares = layer_matrix(federated, "clipped_share")
    if norms is None and shares is None:
        return missing_text("Update norms by layer are not logged in this run.")
    panels: list[Any] = []
    parts = []
    if norms is not None:
        names, rounds, values = norms
        limits = np.array([number_at(bounds, name) or np.nan for name in names])
        if np.isfinite(limits).any():
            values, title = values / limits[:, None], "Norm before clipping / bound"
        else:
            title = "Norm before clipping"
        panels.append((names, rounds, values, title, np.isfinite(limits).any()))
    if shares is not None:
        panels.append((*shares, "Share of clients clipped", None))
    parts.append(
        html_figure(lambda: draw_layers(panels), "update norms and share clipped by layer")
    )
    parts.append(
        note_text(
            "One row a layer, one column a round (or the mean of a few). Left: the mean norm of "
            "the clients' updates before clipping; where the bounds are known it is divided by "
            "them, so red is above the bound and blue below. Right: the share of clients that were "
            "clipped in that layer. All ones is normal under strong privacy; all zeros means that "
            "a smaller clip norm would add less noise at no cost."
        )
    )
    latest = next((r for r in reversed(federated) if mapping_at(r, "update_norm")), {})
    rows = [
        (
            layer,
            number_at(latest, "update_norm", layer),
            number_at(bounds, layer),
            number_at(latest, "clipped_share", layer),
        )
        for layer in mapping_at(latest, "update_norm")
    ]
    if rows:
        table = html_table(rows, ("layer", "norm", "bound", "share clipped"))
        title = f"All {len(rows)} layers at round {as_text(latest.get('round'))}"
        parts.append(f"<details><summary>{escaped(title)}</summary>{table}</details>")
    return "".join(parts)


def cost_section(federated: Sequence[Record]) -> str:
    """Time, padding and cohort by round."""
    panels = []
    seconds = {
        name: series_of(federated, "round", "seconds", key)
        for key, name in (("round", "whole round"), ("data", "waiting for data"))
    }
    if any(curve[0].size for curve in seconds.values()):
        panels.append(("Seconds a round", seconds, 1.0))
    padding = series_of(federated, "round", "padding_fraction")
    if padding[0].size:
        panels.append(("Padding, % of the frames computed", {"": padding}, 100.0))
    cohort = series_of(federated, "round", "cohort")
    if cohort[0].size:
        panels.append(("Users in the round", {"": cohort}, 1.0))
    if not panels:
        return missing_text("Time and padding are not logged in this run.")

    def draw() -> Any:
        figure, all_axes = new_figure(len(panels), height=3.0)
        for axes, (title, curves, scale) in zip(all_axes, panels, strict=True):
            for color, (label, (x, y)) in zip(COLORS[3:], curves.items(), strict=False):
                draw_line(axes, x, y * scale, color=color, label=label or None)
            top = max(np.max(y * scale) for _, y in curves.values() if y.size)
            # The first rounds compile: they would flatten the rest.
            usual = max(np.quantile(y * scale, 0.98) for _, y in curves.values() if y.size)
            axes.set_ylim(0, 1.15 * (usual if top > 3 * usual > 0 else top) or 1.0)
            axes.set_title(title)
            axes.set_xlabel("round")
            draw_legend(axes)
        return figure

    return html_figure(draw, "time, padding and cohort by round") + note_text(
        "Waiting for data should be a small part of a round. Padding is work spent on empty frames "
        "and empty places in a chunk. Under Poisson sampling the number of users varies from round "
        "to round; the mean is still taken over the expected number. Rounds that compile may "
        "exceed the frame."
    )
