"""The report's tables, as HTML."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedasr.privacy import ledger
from fedasr.training.logging import from_json
from fedasr.training.report.meanings import MEANINGS
from fedasr.training.report.read import (
    Record,
    is_private,
    main_deployment,
    mapping_at,
    number_at,
)
from fedasr.training.report.words import (
    as_text,
    between_text,
    delta_text,
    duration_text,
    epsilon_cell,
    escaped,
    interval_text,
    missing_text,
    note_text,
    percent_text,
)


def html_table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Rows of a name and values; numbers align to the right."""
    head = "<tr>" + "".join(f"<th>{escaped(h)}</th>" for h in header) + "</tr>" if header else ""
    body = []
    for name, *values in rows:
        cells = "".join(
            f'<td class="number">{escaped(as_text(v))}</td>'
            if isinstance(v, int | float)
            else f"<td>{escaped(as_text(v))}</td>"
            for v in values
        )
        body.append(f"<tr><th>{escaped(name)}</th>{cells}</tr>")
    return f"<table>{head}{''.join(body)}</table>"


def meaning_table(rows: Iterable[tuple[str, str, Any, str]]) -> str:
    """Rows of (key of the meaning, name, value, interval); the meaning is one click away."""
    body = []
    for key, name, value, interval in rows:
        shown = f"<b>{escaped(as_text(value))}</b>"
        if interval:
            shown += f' <span class="interval">{escaped(interval)}</span>'
        label = escaped(name)
        if meaning := MEANINGS.get(key):
            label = f"<details><summary>{label}</summary><p>{escaped(meaning)}</p></details>"
        body.append(f'<tr><th>{label}</th><td class="value">{shown}</td></tr>')
    return f"<table>{''.join(body)}</table>"


def summary_table(summary: Record) -> str:
    """The summary's results: how good, for whom, how private, at what cost."""
    if not summary:
        return missing_text("No summary.json.")
    rows = [*_error_rows(summary), *_privacy_rows(summary), *_size_rows(summary)]
    return meaning_table(rows)


def _error_rows(summary: Record) -> Iterator[tuple[str, str, Any, str]]:
    served = mapping_at(summary, "served")
    for key, name in (
        ("wer", "Word error rate"),
        ("wer_published", "Word error rate as published, by utterance"),
        ("cer", "Character error rate"),
    ):
        for split in mapping_at(summary, key):
            interval = interval_text(mapping_at(served, split), "all") if key == "wer" else ""
            yield key, f"{name}, {split}", percent_text(number_at(summary, key, split)), interval
    for split in served:
        found = mapping_at(served, split)
        worst = number_at(found, "worst_decile")
        if worst is not None:
            text = interval_text(found, "worst_decile")
            yield "worst_decile", f"Worst tenth of users, {split}", percent_text(worst), text
        yield from _gap_rows(found, split)
    initial = summary.get("initial_wer")
    initial = initial if isinstance(initial, Mapping) else {"": initial}
    for split, value in initial.items():
        if value is not None:
            name = "Word error rate before training" + (f", {split}" if split else "")
            yield "initial_wer", name, percent_text(number_at({"": value}, "")), ""


def _gap_rows(found: Record, split: str) -> Iterator[tuple[str, str, Any, str]]:
    for column in mapping_at(found, "gaps"):
        gap = mapping_at(mapping_at(found, "gaps"), column)
        if (size := number_at(gap, "gap")) is not None:
            name = f"Gap by {column}, {split}: {as_text(gap.get('worst'))}"
            name += f" over {as_text(gap.get('best'))}"
            yield "gap", name, f"{size:.1f} points", between_text(gap.get("gap_interval"))


def _privacy_rows(summary: Record) -> Iterator[tuple[str, str, Any, str]]:
    privacy, deployed = mapping_at(summary, "privacy"), main_deployment(summary)
    if is_private(summary):
        yield "epsilon", "ε of the users who trained", epsilon_cell(privacy), ""
        if deployed:
            yield "deployed", "ε of the deployment it stands for", epsilon_cell(deployed), ""
    elif is_private(summary) is False:
        yield "epsilon", "ε of the users who trained", "none: no noise", ""


def _size_rows(summary: Record) -> Iterator[tuple[str, str, Any, str]]:
    for key, name in (
        ("rounds", "Rounds"),
        ("central_steps", "Central steps"),
        ("cohort", "Users a round (expected cohort)"),
        ("population", "Users that train (population)"),
        ("parameters", "Model parameters"),
    ):
        if summary.get(key) or (summary.get(key) == 0 and key == "rounds"):
            yield key, name, summary[key], ""
    if local := mapping_at(summary, "local"):
        text = "Of these local to every user (never sent, summed or covered by epsilon)"
        yield "local", text, local.get("parameters"), ""
        yield "local_users", "Users with local parameters of their own", local.get("users"), ""
    seconds = number_at(summary, "wall_seconds")
    for key, name, value in (
        ("wall_seconds", "Wall time", None if seconds is None else duration_text(seconds)),
        ("client_steps_per_second", "Client steps per second",
         number_at(summary, "client_steps_per_second")),
        ("device", "Device", summary.get("device")),
    ):  # fmt: skip
        if value is not None:
            yield key, name, value, ""


def clients_table(summary: Record) -> str:
    """Bytes of a client, by method."""
    rows = summary.get("clients") if isinstance(summary, Mapping) else None
    if not rows:
        return missing_text("The summary does not say.")
    names = {
        "down_bytes": "received (MB)",
        "up_bytes": "sent (MB)",
        "parameter_bytes": "parameters held (MB)",
        "peak_bytes": "peak memory (MB)",
    }
    shown = [key for key in names if any(row.get(key) is not None for row in rows)]
    table = html_table(
        ((row["method"], *(f"{row[key] / 1e6:,.2f}" for key in shown)) for row in rows),
        ("per client and round", *(names[key] for key in shown)),
    )
    return table + note_text(
        "Bytes are expected values over random subsets. Memory is the compiler's figure for the "
        "program of one client and one gradient."
    )


def privacy_tables(summary: Record, privacy: Record) -> str:
    """The guarantee as simulated and as deployed, and what it rests on."""
    explanation = (
        "As simulated: the guarantee to the users whose speech really trained this model. With few "
        "users a round, noise that lets a model learn gives a weak one. Extrapolated: what the "
        "same clipping and the same noise on the mean (sigma) would guarantee in a deployment with "
        "the cohort, population and rounds in that line. It assumes that users are sampled at "
        "random in that proportion and that the model learns there as it did here."
    )
    if isinstance(privacy.get("not_covered"), list):
        explanation += " Not covered: " + as_text("; ".join(map(str, privacy["not_covered"]))) + "."
    described = from_json(dict(mapping_at(privacy, "ledger")))
    return (
        _guarantees_table(summary, privacy)
        + f'<p class="note">{escaped(explanation)}</p><p>{escaped(_basis_in_words(privacy))}</p>'
        + "".join(f"<p>{escaped(line)}</p>" for line in ledger.in_words(described))
        + _ledger_table(described)
        + html_table(_mechanism_settings(privacy))
    )


def _extrapolations(privacy: Record) -> list[Record]:
    found = privacy.get("extrapolations")
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _guarantees_table(summary: Record, privacy: Record) -> str:
    keys = ("cohort", "population", "rounds")
    rows: list[tuple[Any, ...]]
    rows = [("as simulated", *(summary.get(key) for key in keys), epsilon_cell(privacy))]
    for item in _extrapolations(privacy):
        rows.append(("extrapolated", *(item.get(key) for key in keys), epsilon_cell(item)))
    header = ("", "users a round", "population", "rounds", f"ε at δ = {delta_text(privacy)}")
    return html_table(rows, header)


def _mechanism_settings(privacy: Record) -> list[tuple[str, Any]]:
    """Names and values of clipping and noise, as far as they are known."""
    names = {
        "clip_norm": "Clip norm C of a user's update",
        "budget": "Clipping budget across layers",
        "sigma": "Noise on the mean, in units of C (sigma)",
        "noise_multiplier": "Noise multiplier (noise on the sum, in units of C)",
        "noise_over_sensitivity": "Noise on the sum, in units of what one user can change in it",
    }
    settings = [(name, privacy[key]) for key, name in names.items() if privacy.get(key) is not None]
    if adaptive := mapping_at(privacy, "adaptive"):
        bounds = (
            f"adaptive: they follow the {as_text(adaptive.get('quantile'))} quantile of the users' "
            "norms, from C on; noise on the votes, in units of what one user can change: "
            f"{as_text(adaptive.get('noise_multiplier'))}, part of ε"
        )
        settings.append(("Clipping bounds", bounds))
    return settings


def _basis_in_words(privacy: Record) -> str:
    """What epsilon compares, and what it follows from."""
    compared = as_text(privacy.get("neighbours"))
    for item in _extrapolations(privacy):
        theirs = as_text(item.get("neighbours"))
        if theirs not in compared:
            compared += f"; extrapolated: {theirs}"
    sampling, accountant = privacy.get("sampling"), privacy.get("accountant")
    how = (
        f"ε compares: {compared}. "
        f"Sampling: {as_text(sampling)}. Accountant: {as_text(accountant)}. "
        f"δ = {delta_text(privacy)}."
    )
    if (tails := number_at(privacy, "delta_at_tails")) is not None:
        how += f" What lies beyond the end of the noise's tails adds at most {tails:.1g} to δ."
    if shares := mapping_at(privacy, "secure_aggregation"):
        central = number_at(mapping_at(shares, "central"), "epsilon")
        how += (
            f" The noise is Skellam, in shares that clients add before they send "
            f"{as_text(shares.get('bits'))} bits a coordinate; with Gaussian noise of the same "
            f"variance, added by a trusted server, ε would be {as_text(central)}."
        )
    return how


def _ledger_table(described: Record) -> str:
    """The runs behind the model that the run started from."""
    earlier = described.get("earlier") or []
    keys = ("run", "stage", "rounds", "users", "epsilon")
    rows = [[epsilon_cell(e) if key == "epsilon" else e.get(key) for key in keys] for e in earlier]
    header = ("earlier run", "stage", "rounds or steps", "users", "ε of its own")
    return html_table(rows, header) if rows else ""


def left_out_table(federated: Sequence[Record], summary: Record) -> str:
    """Utterances and updates that do not count."""
    parts = []
    skipped = mapping_at(summary, "skipped_utterances")
    if skipped and any(skipped.values()):
        parts.append(html_table(skipped.items(), ("utterances skipped because", "number")))
    elif "skipped_utterances" in summary:
        parts.append("<p>No utterance was skipped.</p>")
    else:
        parts.append(missing_text("Skipped utterances are not known yet."))
    invalid = number_at(summary, "invalid_client_updates")
    if invalid is None:
        counts = [number_at(r, "invalid_client_updates") for r in federated]
        known = [c for c in counts if c is not None]
        invalid = sum(known) if known else None
    if invalid is None:
        parts.append(missing_text("Invalid client updates are not known yet."))
    else:
        parts.append(
            "<p>Client updates that were not finite and so counted as zero: "
            f"<b>{int(invalid):,}</b>.</p>"
        )
    return "".join(parts)


def configuration_text(config: Record, command: str = "") -> str:
    """The command that made the run, and all fields, folded."""
    made = (
        f"<pre>{escaped(command)}</pre>"
        if command
        else missing_text("No command is kept: the run was made from Python, or earlier.")
    )
    if not config:
        return made + missing_text("No config.json.")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return f"{made}<details><summary>All fields</summary><pre>{escaped(text)}</pre></details>"
