"""Values and results as a person would write them; paragraphs are escaped HTML."""

import html
import math
from collections.abc import Sequence
from typing import Any

from fedasr.privacy.accounting import epsilon_in_words
from fedasr.training.report.read import (
    Record,
    epsilon_of,
    final_wer,
    initial_wer,
    is_private,
    main_deployment,
    mapping_at,
    number_at,
)


def escaped(value: Any) -> str:
    """As HTML has it."""
    return html.escape(str(value), quote=True)


def as_text(value: Any) -> str:
    """A value as a person would write it, not yet escaped."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e9:
            return f"{int(value):,}"
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(as_text(v) for v in value)
    return str(value)


def percent_text(value: float | None) -> str:
    """A rate in percent."""
    return "unknown" if value is None else f"{value:.1f}%"


def duration_text(seconds: float) -> str:
    """Seconds as seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def epsilon_text(record: Any) -> str:
    """The epsilon of a record, whatever it is."""
    value = epsilon_of(record)
    finite = value is not None and math.isfinite(value)
    return as_text(value) if finite else epsilon_in_words(value)


def epsilon_cell(record: Record) -> float | str | None:
    """The same for a table: a number where it is one."""
    value = epsilon_of(record)
    return value if value is None or math.isfinite(value) else epsilon_in_words(value)


def delta_text(privacy: Record) -> str:
    """Delta in powers of ten."""
    delta = number_at(privacy, "delta")
    return "unknown" if delta is None else f"{delta:g}".replace("e-0", "e-")


def privacy_sentence(summary: Record) -> str:
    """What is guaranteed to users."""
    private = is_private(summary)
    if private is None:
        return "Privacy: not known yet."
    if not private:
        return "Trained without differential privacy: no noise was added."
    privacy, deployment = mapping_at(summary, "privacy"), main_deployment(summary)
    delta = delta_text(privacy)
    simulated_text = epsilon_text(privacy)
    if not deployment:
        return f"User-level differential privacy: ε = {simulated_text} at δ = {delta}."
    return (
        f"User-level differential privacy: ε = {epsilon_text(deployment)} at "
        f"δ = {delta} with {as_text(deployment.get('cohort'))} of "
        f"{as_text(deployment.get('population'))} users a round "
        f"(ε = {simulated_text} for the users simulated here)."
    )


def headline_text(summary: Record) -> str:
    """The result in a sentence."""
    final = final_wer(summary)
    if final is None:
        result = "No final word error rate yet"
    else:
        split, wer = final
        initial = initial_wer(summary, split)
        result = f"Word error rate {percent_text(wer)} on {split}"
        if initial is not None:
            result += f", from {percent_text(initial)} before federated training"
    sentence = privacy_sentence(summary)
    return f"{result}. {sentence}"


def missing_text(text: str) -> str:
    """A paragraph on what is not there."""
    return f'<p class="missing">{escaped(text)}</p>'


def note_text(text: str) -> str:
    """A paragraph on how to read what stands above."""
    return f'<p class="note"><b>How to read this.</b> {escaped(text)}</p>'


def status_text(summary: Record, federated: Sequence[Record]) -> str:
    """A paragraph on how far the run has come."""
    done = int(federated[-1]["round"]) if federated else 0
    if not summary:
        return missing_text(
            f"This run has no summary.json: it has not ended. The last logged round is {done:,}."
        )
    total = number_at(summary, "rounds")
    rounds = f", {int(total):,} rounds" if total is not None else ""
    return f"<p>Status: <b>{escaped(summary.get('status', 'unknown'))}</b>{escaped(rounds)}.</p>"
