"""What an audit found beside what is claimed, for people and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.auditing import Audit
    from fedasr.privacy.mechanism import Mechanism


CENTRAL, DISTRIBUTED = "central", "distributed"


class Report(NamedTuple):
    """What was audited and what is claimed.

    audits: (noise, audit), the configuration's own by the method asked for first; noise is
      "central", of the server, or "distributed", in shares.
    figures: by noise, what is claimed for the configuration's own: see `figure_of`.
    canaries: "updates" or "users".
    """

    audits: list[tuple[str, Audit]]
    figures: dict[str, dict[str, Any]]
    canaries: str


def both_noises(mechanism: Mechanism, bits: int, dimension: int) -> dict[str, Mechanism | str]:
    """The mechanism with noise of the server and with noise of equal variance in shares.

    Args:
      mechanism: with either.
      bits, dimension: of `SecureAggregation`, where the mechanism has none.

    Returns:
      {"central": mechanism, "distributed": mechanism, or why there is none}.
    """
    from fedasr.privacy.secure_aggregation import SecureAggregation

    if mechanism.secure is not None:
        return {CENTRAL: mechanism.central(), DISTRIBUTED: mechanism}
    try:
        secure = SecureAggregation(dimension, bits)
        return {CENTRAL: mechanism, DISTRIBUTED: dataclasses.replace(mechanism, secure=secure)}
    except UserError as error:
        return {CENTRAL: mechanism, DISTRIBUTED: str(error)}


def figure_of(mechanism: Mechanism | str, rounds: int, delta: float) -> dict[str, Any]:
    """What is claimed: `epsilon` (`math.inf` for no guarantee, None if there is no such mechanism),
    `accountant`, `epsilon_rdp`, `bits` and expected share of coordinates that wrap around of noise
    in shares, and `why_not`.
    """
    figure: dict[str, Any] = {"epsilon": None, "accountant": None, "epsilon_rdp": None}
    if isinstance(mechanism, str):
        return figure | {"why_not": mechanism}
    try:
        found = mechanism.epsilon(rounds, delta)
    except UserError as error:
        return figure | {"why_not": str(error)}
    figure |= {
        "epsilon": found.epsilon,
        "accountant": found.accountant,
        "epsilon_rdp": found.epsilon_rdp,
    }
    if mechanism.secure is not None:
        encoding = mechanism.encoding
        figure |= {"bits": encoding.bits, "wrapped": encoding.wrapped()}
    return figure


def to_row(noise: str, audit: Audit) -> dict[str, Any]:
    """One audit, before infinities (a claim without a guarantee) become JSON."""
    return {
        "noise": noise,
        "method": audit.method,
        "epsilon_lower": audit.epsilon_lower,
        "epsilon_lower_strict": audit.strict,
        "epsilon_claimed": audit.epsilon_claimed,
        "neighbours": audit.neighbours,
        "exceeds": audit.exceeds,
        "confidence": audit.confidence,
        "delta": audit.delta,
        "canary_count": audit.canaries,
        "trials": audit.trials,
        "rounds": audit.rounds,
        "attack": audit.statistic,
        "auroc": audit.auroc,
    }


def to_summary(report: Report) -> dict[str, Any]:
    """The JSON object: the first audit, `figures` claimed by noise, and all `audits`."""
    rows = [to_row(noise, audit) for noise, audit in report.audits]
    return {
        **rows[0],
        "canaries": report.canaries,
        "exceeds": any(row["exceeds"] for row in rows),
        "figures": report.figures,
        "audits": rows,
    }


def describe(report: Report) -> Iterator[str]:
    """The audits for people."""
    (_, audit), canaries = report.audits[0], report.canaries
    yield (
        f"{audit.canaries:,} canary {canaries} in {audit.trials:,} x {audit.rounds:,} rounds, "
        f"{audit.method}: AUROC {audit.auroc:.3f} ({audit.statistic})"
    )
    yield (
        f"epsilon is at least {audit.epsilon_lower:.3g} at delta {audit.delta:g} with "
        f"{audit.confidence:.0%} confidence"
    )
    if audit.method == "one_run":
        yield (
            f"(for Gaussian trade-off curves; {audit.strict:.3g} whatever the mechanism, a much "
            "looser bound)"
        )
    yield f"claimed: {_claim(audit.epsilon_claimed)}"
    yield f"the claim compares: {audit.neighbours}"
    yield ""
    lines = [("noise", "claimed", "by", "RDP", *(_head(method) for method in _methods(report)))]
    for noise, figure in report.figures.items():
        bounds = [_bound(report, noise, method) for method in _methods(report)]
        claims = ["-", "-", "-"]
        if figure["epsilon"] is not None:
            claims = [_claim(figure["epsilon"]), figure["accountant"]]
            claims.append(_claim(figure["epsilon_rdp"]))
        lines.append((noise, *claims, *bounds))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    for noise, figure in report.figures.items():
        if "why_not" in figure:
            yield f"{noise}: {figure['why_not']}"
        if "bits" in figure:
            yield f"{noise}: {figure['bits']} bits, {figure['wrapped']:.2g} of coordinates wrap"


def _claim(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite (no guarantee)"


def _methods(report: Report) -> list[str]:
    return list(dict.fromkeys(audit.method for _, audit in report.audits))


def _head(method: str) -> str:
    return f"at least, by {method}"


def _bound(report: Report, noise: str, method: str) -> str:
    for name, audit in report.audits:
        if (name, audit.method) == (noise, method):
            return f"{audit.epsilon_lower:.3g}{' (exceeds)' if audit.exceeds else ''}"
    return "not run"
