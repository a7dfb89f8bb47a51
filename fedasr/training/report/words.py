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


_NOTHING = 20.0  # an epsilon from which on the protection is not worth the name


def privacy_sentence(summary: Record) -> str:
    """What is guaranteed to users: first to those who trained, then in the deployment."""
    private = is_private(summary)
    if private is None:
        return "Privacy: not known yet."
    if not private:
        return "Trained without differential privacy: no noise was added."
    privacy, deployment = mapping_at(summary, "privacy"), main_deployment(summary)
    users = number_at(summary, "population")
    who = "the users" if users is None else f"the {as_text(int(users))} users"
    text = (
        f"User-level differential privacy: for {who} who trained here ε = {epsilon_text(privacy)} "
        f"at δ = {delta_text(privacy)}"
    )
    own = epsilon_of(privacy)
    if own is not None and own >= _NOTHING:
        text += ", which protects nobody"
    if not deployment:
        return f"{text}."
    return (
        f"{text}; in a deployment with the same noise and {as_text(deployment.get('cohort'))} of "
        f"{as_text(deployment.get('population'))} users a round ε = {epsilon_text(deployment)}."
    )


def headline_text(summary: Record, central: bool = False) -> str:
    """The result in a few sentences."""
    final = final_wer(summary)
    if final is None:
        return f"No final word error rate yet. {privacy_sentence(summary)}"
    split, wer = final
    initial = initial_wer(summary, split)
    result = f"Word error rate {percent_text(wer)} on {split}"
    if initial is not None:
        stage = "central" if central else "federated"
        result += f", from {percent_text(initial)} before {stage} training"
    served = mapping_at(mapping_at(summary, "served"), split)
    worst, users = number_at(served, "worst_decile"), number_at(served, "users")
    if worst is not None and users is not None and users > 1:
        result += f"; {percent_text(worst)} for the worst tenth of its {int(users)} users"
    return f"{result}. {privacy_sentence(summary)}"


def interval_text(found: Record, key: str) -> str:
    """The 95% interval of a statistic of users, in percent; "" where there is none."""
    ends = mapping_at(found, "intervals").get(key)
    return between_text(ends)


def between_text(ends: Any) -> str:
    """An interval's ends, in percent; "" where they are not two numbers."""
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return ""
    low, high = (number_at({"": x}, "") for x in ends)
    return "" if low is None or high is None else f"{low:.1f} to {high:.1f}%"


def missing_text(text: str) -> str:
    """A paragraph on what is not there."""
    return f'<p class="missing">{escaped(text)}</p>'


def note_text(text: str) -> str:
    """How to read what stands above, one click away."""
    return (
        f'<details class="note"><summary>How to read this</summary><p>{escaped(text)}</p></details>'
    )


def warning_text(texts: Sequence[Any]) -> str:
    """What the run warned of."""
    return "".join(f'<p class="warning">Warning: {escaped(text)}.</p>' for text in texts)


def status_text(summary: Record, main: Sequence[Record], unit: str = "round") -> str:
    """A paragraph on how far the run has come."""
    done = int(number_at(main[-1], unit) or 0) if main else 0
    if not summary:
        return missing_text(
            f"This run has no summary.json: it has not ended. The last logged {unit} is {done:,}."
        )
    if unit == "step":
        return f"<p>Status: <b>{escaped(summary.get('status', 'unknown'))}</b>, central.</p>"
    total = number_at(summary, "rounds")
    rounds = f", {int(total):,} rounds" if total is not None else ""
    return f"<p>Status: <b>{escaped(summary.get('status', 'unknown'))}</b>{escaped(rounds)}.</p>"
