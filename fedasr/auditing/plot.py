"""ROC curves of an audit's attacks."""

import math

import numpy as np

from fedasr.auditing.bounds import Audit
from fedasr.errors import UserError


def write_roc(audit: Audit, path: str) -> None:
    """Draws the attacks' ROC curves, on logarithmic axes, with what (epsilon, delta)-DP allows.

    Args:
      audit: what is drawn.
      path: of the picture; its suffix names the format.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in audit.scores.items():
        fpr, tpr = scores.roc()
        axes.step(fpr, tpr, where="post", label=f"{name}: epsilon >= {audit.bounds[name]:.3g}")
    least = 0.5 / max(len(s.absent) for s in audit.scores.values())
    rates = np.geomspace(least, 1, 200)
    axes.plot(rates, rates, color="grey", linewidth=0.8, linestyle=":", label="guessing blindly")
    if math.isfinite(audit.epsilon_claimed):
        exponential = np.exp(min(audit.epsilon_claimed, 700.0))
        allowed = np.min(
            [
                exponential * rates + audit.delta,
                1 - (1 - audit.delta - rates) / exponential,
                np.ones_like(rates),
            ],
            axis=0,
        )
        label = f"most that epsilon {audit.epsilon_claimed:.3g} allows"
        axes.plot(rates, allowed, color="black", linewidth=1, linestyle="--", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1.05),
        xlabel="false positive rate (absent canaries taken for present)",
        ylabel="true positive rate",
    )
    axes.set_title(
        f"{audit.canaries:,} canaries, {audit.rounds:,} rounds, delta {audit.delta:g}: "
        f"epsilon >= {audit.epsilon_lower:.3g} ({audit.confidence:.0%} confidence)",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path}: {error}") from error
