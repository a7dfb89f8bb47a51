"""A run on one page: `report.html` with its result, privacy and plots, and a picture of the result.

Everything is read from the files of a work directory, so a report can be made again at any time,
also of a run that was stopped. Nothing in the page refers to another file or host.
"""

import base64
import html
import io
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy import ledger
from fedasr.privacy.accounting import epsilon_in_words
from fedasr.training.logging import from_json, read_metrics

Record = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MAX_COLUMNS = 240
_MAX_LABELLED_LAYERS = 64

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 0 auto; padding: 2rem 1.2rem;
  max-width: 62rem; }
h1 { font-size: 1.5rem; margin: 0 0 .6rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }
.headline { font-size: 1.15rem; background: #f0f6fc; border-left: 4px solid #0072B2;
  padding: .8rem 1rem; margin: 0; }
.note, .missing { color: #57606a; } .missing { font-style: italic; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid #eaeef2; overflow-wrap: anywhere; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; display: block; margin: .4rem 0; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html` into a work directory and returns its path.

    Reads `summary.json`, `metrics.jsonl` and `config.json`; what is missing in them is said in the
    page. Without matplotlib the page has no plots.

    Raises:
        UserError: if the folder does not exist.
    """
    workdir = _existing(workdir)
    summary = _read_json(workdir / "summary.json")
    config = _read_json(workdir / "config.json")
    records = read_metrics(workdir)
    federated = [r for r in records if _number(r, "round") is not None and not _is_seed(r)]
    seed = [r for r in records if _number(r, "step") is not None and _is_seed(r)]

    sections = [
        f"<h1>Training report: {_escape(workdir.resolve().name)}</h1>",
        f'<p class="headline">{_escape(_headline(summary))}</p>',
        _status(summary, federated),
        "<h2>Summary</h2>",
        _summary_table(summary),
        "<h2>Loss and word error rate</h2>",
        _learning(federated, seed, summary),
        "<h2>Privacy</h2>",
        _privacy(federated, summary),
        "<h2>Clipping by layer</h2>",
        _clipping(federated, _mapping(_mapping(summary, "privacy"), "layer_bounds")),
        "<h2>Time, padding and cohort</h2>",
        _cost(federated),
        "<h2>What a client receives, sends and holds</h2>",
        _clients(summary),
        "<h2>Data and updates left out</h2>",
        _left_out(federated, summary),
        "<h2>Configuration</h2>",
        _configuration(config),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser then refuses anything that is not in the page.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Training report: {_escape(workdir.resolve().name)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    path = workdir / "report.html"
    temporary = workdir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def plot_result(workdir: str | Path, out_png: str | Path) -> Path:
    """Draws the word error rate by round, with the seed's, the final one and epsilon, as a PNG.

    Returns:
        The path written.

    Raises:
        UserError: if the folder does not exist, the run has not evaluated anything or matplotlib
            is not installed.
    """
    workdir = _existing(workdir)
    summary = _read_json(workdir / "summary.json")
    curves = _evaluations(read_metrics(workdir), "wer")
    if not curves:
        raise UserError(f"{workdir} holds no evaluation to draw: train with evaluation rounds")
    if not _has_matplotlib():
        raise UserError("drawing needs matplotlib: pip install matplotlib")
    figure, (axes,) = _figure(1, width=10.5, height=3.9)
    _draw_wer(axes, curves, summary, annotate=True)
    title = "\n".join(textwrap.wrap(_escape_math(_privacy_sentence(summary)), 110))
    axes.set_title(title, fontsize=11, loc="left")
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160, format="png")
    return out_png


# Reading -----------------------------------------------------------------------------------------


def _existing(workdir: str | Path) -> Path:
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"there is no work directory {workdir}")
    return workdir


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if it is missing or no JSON object."""
    try:
        value = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _mapping(record: Any, key: str) -> Mapping[str, Any]:
    value = record.get(key) if isinstance(record, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _number(record: Any, *keys: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(record, bool) or not isinstance(record, int | float):
        return None
    return float(record) if math.isfinite(record) else None


def _is_seed(record: Record) -> bool:
    return record.get("phase") == "seed"


def _series(records: Iterable[Record], x: str, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 arrays: `x` and the values at `keys` of the records that hold both."""
    pairs = [(_number(r, x), _number(r, *keys)) for r in records]
    kept = np.array([p for p in pairs if None not in p], np.float64).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def _evaluations(records: Sequence[Record], metric: str) -> dict[str, tuple]:
    """`(rounds, values)` of a metric by split, `test` first."""
    records = [r for r in records if not _is_seed(r)]
    splits = sorted(
        {s for r in records for s in _mapping(r, "eval")}, key=lambda s: (s != "test", s)
    )
    curves = {s: _series(records, "round", "eval", s, metric) for s in splits}
    return {s: curve for s, curve in curves.items() if curve[0].size}


# Text --------------------------------------------------------------------------------------------


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _text(value: Any) -> str:
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
        return ", ".join(_text(v) for v in value)
    return str(value)


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _missing(text: str) -> str:
    return f'<p class="missing">{_escape(text)}</p>'


def _note(text: str) -> str:
    return f'<p class="note"><b>How to read this.</b> {_escape(text)}</p>'


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Rows of a name and values; numbers align to the right."""
    head = "<tr>" + "".join(f"<th>{_escape(h)}</th>" for h in header) + "</tr>" if header else ""
    body = []
    for name, *values in rows:
        cells = "".join(
            f'<td class="number">{_escape(_text(v))}</td>'
            if isinstance(v, int | float)
            else f"<td>{_escape(_text(v))}</td>"
            for v in values
        )
        body.append(f"<tr><th>{_escape(name)}</th>{cells}</tr>")
    return f"<table>{head}{''.join(body)}</table>"


def _clients(summary: Record) -> str:
    """Bytes of a client, by method."""
    rows = summary.get("clients") if isinstance(summary, Mapping) else None
    if not rows:
        return _missing("The summary does not say.")
    names = {
        "down_bytes": "received (MB)",
        "up_bytes": "sent (MB)",
        "parameter_bytes": "parameters held (MB)",
        "peak_bytes": "peak memory (MB)",
    }
    shown = [key for key in names if any(row.get(key) is not None for row in rows)]
    table = _table(
        ((row["method"], *(f"{row[key] / 1e6:,.2f}" for key in shown)) for row in rows),
        ("per client and round", *(names[key] for key in shown)),
    )
    return table + _note(
        "Bytes are expected values over random subsets. Memory is the compiler's figure for the "
        "program of one client and one gradient."
    )


def _is_private(summary: Record) -> bool | None:
    """Whether noise was added; None if the summary does not say, as that of a stopped run."""
    privacy = _mapping(summary, "privacy")
    if privacy.get("enabled") is False:
        return False
    noise = [_number(privacy, key) for key in ("noise_multiplier", "sigma")]
    known = [value for value in noise if value is not None]
    return any(value > 0 for value in known) if known else None


def _final_wer(summary: Record) -> tuple[str, float] | None:
    """The split that counts most and its final word error rate."""
    for split in ("test", "dev", *_mapping(summary, "wer")):
        value = _number(summary, "wer", split)
        if value is not None:
            return split, value
    return None


def _initial_wer(summary: Record, split: str | None) -> float | None:
    """Word error rate before federated training: one number, or one for each split."""
    value = _number(summary, "initial_wer")
    return value if value is not None else _number(summary, "initial_wer", str(split))


def _deployment(summary: Record) -> Record:
    """The extrapolation that the run stands for: the first with an epsilon, maybe infinite."""
    found = _mapping(summary, "privacy").get("extrapolations")
    found = found if isinstance(found, list) else []
    return next((e for e in found if _epsilon(e) is not None), {})


def _epsilon(record: Any) -> float | None:
    """Its epsilon, which may be infinite, or None."""
    value = record.get("epsilon") if isinstance(record, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and not math.isnan(value) else None


def _epsilon_text(record: Any) -> str:
    value = _epsilon(record)
    finite = value is not None and math.isfinite(value)
    return _text(value) if finite else epsilon_in_words(value)


def _delta(privacy: Record) -> str:
    delta = _number(privacy, "delta")
    return "unknown" if delta is None else f"{delta:g}".replace("e-0", "e-")


def _privacy_sentence(summary: Record) -> str:
    private = _is_private(summary)
    if private is None:
        return "Privacy: not known yet."
    if not private:
        return "Trained without differential privacy: no noise was added."
    privacy, deployment = _mapping(summary, "privacy"), _deployment(summary)
    delta = _delta(privacy)
    simulated_text = _epsilon_text(privacy)
    if not deployment:
        return f"User-level differential privacy: ε = {simulated_text} at δ = {delta}."
    return (
        f"User-level differential privacy: ε = {_epsilon_text(deployment)} at "
        f"δ = {delta} with {_text(deployment.get('cohort'))} of "
        f"{_text(deployment.get('population'))} users a round "
        f"(ε = {simulated_text} for the users simulated here)."
    )


def _headline(summary: Record) -> str:
    final = _final_wer(summary)
    if final is None:
        result = "No final word error rate yet"
    else:
        split, wer = final
        initial = _initial_wer(summary, split)
        result = f"Word error rate {_percent(wer)} on {split}"
        if initial is not None:
            result += f", from {_percent(initial)} before federated training"
    sentence = _privacy_sentence(summary)
    return f"{result}. {sentence}"


def _status(summary: Record, federated: Sequence[Record]) -> str:
    done = int(federated[-1]["round"]) if federated else 0
    if not summary:
        return _missing(
            f"This run has no summary.json: it has not ended. The last logged round is {done:,}."
        )
    total = _number(summary, "rounds")
    rounds = f", {int(total):,} rounds" if total is not None else ""
    return f"<p>Status: <b>{_escape(summary.get('status', 'unknown'))}</b>{_escape(rounds)}.</p>"


# Sections ----------------------------------------------------------------------------------------


def _summary_table(summary: Record) -> str:
    if not summary:
        return _missing("No summary.json.")
    rows = []
    for key, name in (
        ("rounds", "Rounds"),
        ("cohort", "Users a round (expected cohort)"),
        ("population", "Users that train (population)"),
        ("parameters", "Model parameters"),
    ):
        if summary.get(key) is not None:
            rows.append((name, summary[key]))
    if local := _mapping(summary, "local"):
        rows.append(
            (
                "Of these local to every user (never sent, summed or covered by epsilon)",
                local.get("parameters"),
            )
        )
        rows.append(("Users with local parameters of their own", local.get("users")))
    for key, name in (("wer", "Word error rate"), ("cer", "Character error rate")):
        for split in _mapping(summary, key):
            rows.append((f"{name}, {split}", _percent(_number(summary, key, split))))
    initial = summary.get("initial_wer")
    initial = initial if isinstance(initial, Mapping) else {"": initial}
    for split, value in initial.items():
        if value is not None:
            name = "Word error rate before federated training" + (f", {split}" if split else "")
            rows.append((name, _percent(_number({"": value}, ""))))
    seconds = _number(summary, "wall_seconds")
    for name, value in (
        ("Wall time", None if seconds is None else _duration(seconds)),
        ("Client steps per second", _number(summary, "client_steps_per_second")),
        ("Device", summary.get("device")),
    ):
        if value is not None:
            rows.append((name, value))
    return _table(rows)


def _learning(federated: Sequence[Record], seed: Sequence[Record], summary: Record) -> str:
    loss = _series(federated, "round", "loss")
    eval_loss = _evaluations(federated, "loss")
    curves = _evaluations(federated, "wer")
    seed_loss = _series(seed, "step", "loss")
    panels = []
    if seed_loss[0].size:
        panels.append(("seed", seed_loss))
    if loss[0].size or eval_loss:
        panels.append(("loss", loss))
    if curves:
        panels.append(("wer", curves))
    parts = [] if loss[0].size or eval_loss else [_missing("No federated round is logged yet.")]
    if not curves:
        parts.append(_missing("No evaluation is logged yet, so there is no word error rate."))

    def draw() -> Any:
        figure, all_axes = _figure(len(panels))
        for axes, (kind, data) in zip(all_axes, panels, strict=True):
            if kind == "wer":
                _draw_wer(axes, data, summary)
                continue
            _draw_noisy(axes, *data, label="training" if kind == "loss" else None)
            if kind == "loss":
                for color, (split, curve) in zip(_cycle(1), eval_loss.items(), strict=False):
                    _line(axes, *curve, color=color, label=split, marker="o")
                _legend(axes)
            axes.set_xlabel("round" if kind == "loss" else "step")
            axes.set_title("Federated loss" if kind == "loss" else "Seed: central training loss")
        return figure

    if panels:
        parts.append(_image(draw, "loss and word error rate by round"))
        parts.append(
            _note(
                "Training loss is the mean over the clients of a round: pale for each round, bold "
                "for its running mean. It wanders because each round draws other users. The word "
                "error rate is measured on users and sentences that never train; it may pass 100%."
            )
        )
    return "".join(parts)


def _privacy(federated: Sequence[Record], summary: Record) -> str:
    privacy = _mapping(summary, "privacy")
    parts = []
    private = _is_private(summary)
    if private:
        parts.append(_privacy_tables(summary, privacy))
    elif private is None:
        parts.append(_missing("The privacy spent is known when the run has ended."))
    else:
        parts.append(
            _missing("Differential privacy was off: no noise was added, so there is no epsilon.")
        )
    rounds, epsilons = _series(federated, "round", "epsilon")
    if rounds.size:

        def draw() -> Any:
            figure, (axes,) = _figure(1, height=3.0)
            _line(axes, rounds, epsilons, color=_COLORS[0])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("round")
            axes.set_title("ε spent in the deployment that the run stands for")
            return figure

        parts.append(_image(draw, "epsilon by round"))
        parts.append(
            _note(
                "ε bounds how much the presence of one user can change what the training "
                "reveals: likelihood ratios are at most e^ε, up to δ. Smaller is more "
                "private. It grows with every round, and stopping earlier spends less. This curve "
                "is by Rényi DP, which is quick; the figures above may be tighter."
            )
        )
    elif private:
        parts.append(_missing("Epsilon by round is not logged in this run."))
    return "".join(parts)


def _privacy_tables(summary: Record, privacy: Record) -> str:
    delta = _delta(privacy)
    sampling, accountant = privacy.get("sampling"), privacy.get("accountant")
    rows = [
        (
            "as simulated",
            summary.get("cohort"),
            summary.get("population"),
            summary.get("rounds"),
            _epsilon_cell(privacy),
        )
    ]
    extrapolations = privacy.get("extrapolations")
    for item in extrapolations if isinstance(extrapolations, list) else []:
        if isinstance(item, Mapping):
            keys = ("cohort", "population", "rounds")
            rows.append(("extrapolated", *(item.get(key) for key in keys), _epsilon_cell(item)))
    settings = [
        (name, privacy[key])
        for key, name in (
            ("clip_norm", "Clip norm C of a user's update"),
            ("budget", "Clipping budget across layers"),
            ("sigma", "Noise on the mean, in units of C (sigma)"),
            ("noise_multiplier", "Noise multiplier (noise on the sum, in units of C)"),
            (
                "noise_over_sensitivity",
                "Noise on the sum, in units of what one user can change in it",
            ),
        )
        if privacy.get(key) is not None
    ]
    adaptive = _mapping(privacy, "adaptive")
    if adaptive:
        bounds = (
            f"adaptive: they follow the {_text(adaptive.get('quantile'))} quantile of the users' "
            "norms, from C on; noise on the votes, in units of what one user can change: "
            f"{_text(adaptive.get('noise_multiplier'))}, part of ε"
        )
        settings.append(("Clipping bounds", bounds))
    header = ("", "users a round", "population", "rounds", f"ε at δ = {delta}")
    explanation = (
        "As simulated: the guarantee to the users whose speech really trained this model. With few "
        "users a round, noise that lets a model learn gives a weak one. Extrapolated: what the "
        "same clipping and the same noise on the mean (sigma) would guarantee in a deployment with "
        "the cohort, population and rounds in that line. It assumes that users are sampled at "
        "random in that proportion and that the model learns there as it did here."
    )
    if isinstance(privacy.get("not_covered"), list):
        explanation += " Not covered: " + _text("; ".join(map(str, privacy["not_covered"]))) + "."
    compared = _text(privacy.get("neighbours"))
    for item in extrapolations if isinstance(extrapolations, list) else []:
        theirs = _text(item.get("neighbours")) if isinstance(item, Mapping) else compared
        if theirs not in compared:
            compared += f"; extrapolated: {theirs}"
    how = (
        f"ε compares: {compared}. "
        f"Sampling: {_text(sampling)}. Accountant: {_text(accountant)}. δ = {delta}."
    )
    if (tails := _number(privacy, "delta_at_tails")) is not None:
        how += f" What lies beyond the end of the noise's tails adds at most {tails:.1g} to δ."
    if shares := _mapping(privacy, "secure_aggregation"):
        central = _number(_mapping(shares, "central"), "epsilon")
        how += (
            f" The noise is Skellam, in shares that clients add before they send "
            f"{_text(shares.get('bits'))} bits a coordinate; with Gaussian noise of the same "
            f"variance, added by a trusted server, ε would be {_text(central)}."
        )
    described = from_json(dict(_mapping(privacy, "ledger")))
    return (
        _table(rows, header)
        + f'<p class="note">{_escape(explanation)}</p><p>{_escape(how)}</p>'
        + "".join(f"<p>{_escape(line)}</p>" for line in ledger.in_words(described))
        + _ledger_table(described)
        + _table(settings)
    )


def _ledger_table(described: Record) -> str:
    """The runs behind the model that the run started from."""
    earlier = described.get("earlier") or []
    keys = ("run", "stage", "rounds", "users", "epsilon")
    rows = [[_epsilon_cell(e) if key == "epsilon" else e.get(key) for key in keys] for e in earlier]
    header = ("earlier run", "stage", "rounds or steps", "users", "ε of its own")
    return _table(rows, header) if rows else ""


def _epsilon_cell(record: Record) -> float | str | None:
    value = _epsilon(record)
    return value if value is None or math.isfinite(value) else epsilon_in_words(value)


def _clipping(federated: Sequence[Record], bounds: Record) -> str:
    norms = _layer_matrix(federated, "update_norm")
    shares = _layer_matrix(federated, "clipped_share")
    if norms is None and shares is None:
        return _missing("Update norms by layer are not logged in this run.")
    panels, parts = [], []
    if norms is not None:
        names, rounds, values = norms
        limits = np.array([_number(bounds, name) or np.nan for name in names])
        if np.isfinite(limits).any():
            values, title = values / limits[:, None], "Norm before clipping / bound"
        else:
            title = "Norm before clipping"
        panels.append((names, rounds, values, title, np.isfinite(limits).any()))
    if shares is not None:
        panels.append((*shares, "Share of clients clipped", None))
    parts.append(_image(lambda: _draw_layers(panels), "update norms and share clipped by layer"))
    parts.append(
        _note(
            "One row a layer, one column a round (or the mean of a few). Left: the mean norm of "
            "the clients' updates before clipping; where the bounds are known it is divided by "
            "them, so red is above the bound and blue below. Right: the share of clients that were "
            "clipped in that layer. All ones is normal under strong privacy; all zeros means that "
            "a smaller clip norm would add less noise at no cost."
        )
    )
    latest = next((r for r in reversed(federated) if _mapping(r, "update_norm")), {})
    rows = [
        (
            layer,
            _number(latest, "update_norm", layer),
            _number(bounds, layer),
            _number(latest, "clipped_share", layer),
        )
        for layer in _mapping(latest, "update_norm")
    ]
    if rows:
        table = _table(rows, ("layer", "norm", "bound", "share clipped"))
        title = f"All {len(rows)} layers at round {_text(latest.get('round'))}"
        parts.append(f"<details><summary>{_escape(title)}</summary>{table}</details>")
    return "".join(parts)


def _layer_matrix(
    records: Sequence[Record], key: str
) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """`(layers, rounds [r], values [layers, r])`; neighbouring rounds are averaged to fit."""
    records = [r for r in records if _mapping(r, key)]
    if not records:
        return None
    names = list(dict.fromkeys(name for r in records for name in r[key]))
    values = np.array([[_number(r, key, n) for n in names] for r in records], np.float64).T
    rounds = np.array([_number(r, "round") for r in records], np.float64)
    size = -(-len(rounds) // _MAX_COLUMNS)
    groups = [slice(i, i + size) for i in range(0, len(rounds), size)]
    known = np.isfinite(values)
    sums = np.stack([np.where(known, values, 0.0)[:, g].sum(1) for g in groups], 1)
    counts = np.stack([known[:, g].sum(1) for g in groups], 1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return names, np.array([rounds[g].mean() for g in groups]), means


def _cost(federated: Sequence[Record]) -> str:
    panels = []
    seconds = {
        name: _series(federated, "round", "seconds", key)
        for key, name in (("round", "whole round"), ("data", "waiting for data"))
    }
    if any(curve[0].size for curve in seconds.values()):
        panels.append(("Seconds a round", seconds, 1.0))
    padding = _series(federated, "round", "padding_fraction")
    if padding[0].size:
        panels.append(("Padding, % of the frames computed", {"": padding}, 100.0))
    cohort = _series(federated, "round", "cohort")
    if cohort[0].size:
        panels.append(("Users in the round", {"": cohort}, 1.0))
    if not panels:
        return _missing("Time and padding are not logged in this run.")

    def draw() -> Any:
        figure, all_axes = _figure(len(panels), height=3.0)
        for axes, (title, curves, scale) in zip(all_axes, panels, strict=True):
            for color, (label, (x, y)) in zip(_cycle(0), curves.items(), strict=False):
                _line(axes, x, y * scale, color=color, label=label or None)
            top = max((y * scale).max() for _, y in curves.values() if y.size)
            # The first rounds compile: they would flatten the rest.
            usual = max(np.quantile(y * scale, 0.98) for _, y in curves.values() if y.size)
            axes.set_ylim(0, 1.15 * (usual if top > 3 * usual > 0 else top) or 1.0)
            axes.set_title(title)
            axes.set_xlabel("round")
            _legend(axes)
        return figure

    return _image(draw, "time, padding and cohort by round") + _note(
        "Waiting for data should be a small part of a round. Padding is work spent on empty frames "
        "and empty places in a chunk. Under Poisson sampling the number of users varies from round "
        "to round; the mean is still taken over the expected number. Rounds that compile may "
        "exceed the frame."
    )


def _left_out(federated: Sequence[Record], summary: Record) -> str:
    parts = []
    skipped = _mapping(summary, "skipped_utterances")
    if skipped and any(skipped.values()):
        parts.append(_table(skipped.items(), ("utterances skipped because", "number")))
    elif "skipped_utterances" in summary:
        parts.append("<p>No utterance was skipped.</p>")
    else:
        parts.append(_missing("Skipped utterances are not known yet."))
    invalid = _number(summary, "invalid_client_updates")
    if invalid is None:
        counts = [_number(r, "invalid_client_updates") for r in federated]
        counts = [c for c in counts if c is not None]
        invalid = sum(counts) if counts else None
    if invalid is None:
        parts.append(_missing("Invalid client updates are not known yet."))
    else:
        parts.append(
            "<p>Client updates that were not finite and so counted as zero: "
            f"<b>{int(invalid):,}</b>.</p>"
        )
    return "".join(parts)


def _configuration(config: Record) -> str:
    if not config:
        return _missing("No config.json.")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return f"<details><summary>All fields</summary><pre>{_escape(text)}</pre></details>"


# Drawing -----------------------------------------------------------------------------------------


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _image(draw: Any, alt: str) -> str:
    """The figure that `draw()` returns as an <img> that holds its own data."""
    if not _has_matplotlib():
        return _missing("The plot needs matplotlib: pip install matplotlib.")
    buffer = io.BytesIO()
    draw().savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{_escape(alt)}" src="data:image/png;base64,{data}">'


def _figure(columns: int, width: float = 10.5, height: float = 3.6) -> tuple[Any, list[Any]]:
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


def _cycle(start: int) -> list[str]:
    return [*_COLORS[start:], *_COLORS[:start]]


def _escape_math(text: str) -> str:
    """Text for matplotlib, which would read dollars as formulas, and on one line."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.replace("$", r"\$")


def _shorten(text: str, size: int = 48) -> str:
    return text if len(text) <= size else f"{text[: size // 2 - 1]}…{text[-size // 2 :]}"


def _line(
    axes: Any, x: np.ndarray, y: np.ndarray, *, color: str, label: Any = None, **style
) -> None:
    # One point draws no line.
    style.setdefault("marker", "o" if len(x) == 1 else None)
    # A leading underscore would hide it from the legend.
    label = None if label is None else " " + _escape_math(_shorten(str(label)))
    axes.plot(x, y, color=color, label=label, markersize=4, linewidth=1.6, **style)


def _draw_noisy(axes: Any, x: np.ndarray, y: np.ndarray, label: str | None) -> None:
    window = len(x) // 25
    if window < 2:
        _line(axes, x, y, color=_COLORS[0], label=label)
        return
    axes.plot(x, y, color=_COLORS[0], alpha=0.3, linewidth=0.8)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - window, 0)
    _line(axes, x, (sums[ends] - sums[starts]) / (ends - starts), color=_COLORS[0], label=label)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _draw_wer(axes: Any, curves: dict, summary: Record, annotate: bool = False) -> None:
    final = _final_wer(summary)
    compared = final[0] if final else next(iter(curves))
    initial = _initial_wer(summary, compared)
    top = max(float(y.max()) for _, y in curves.values())
    last = max(float(x.max()) for x, _ in curves.values())
    for color, (split, curve) in zip(_cycle(0), curves.items(), strict=False):
        # A line between a first and a last point would claim what nobody measured.
        style = {} if len(curve[0]) > 2 else {"linestyle": "none"}
        _line(axes, *curve, color=color, label=split, marker="o", **style)
    if initial is not None:
        top = max(top, initial)
        axes.axhline(initial, color="#57606a", linestyle="--", linewidth=1.2)
        name = _escape_math(_shorten(compared, 16))
        text = f"before federated training, {name}: {initial:.1f}%"
        axes.annotate(
            text, (1.0, initial), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="#57606a",
        )  # fmt: skip
    if final is not None:
        split, wer = final
        color = _COLORS[1 if split not in curves else list(curves).index(split) % len(_COLORS)]
        top = max(top, wer)
        axes.plot([last], [wer], marker="*", markersize=13, color=color, clip_on=False)
        axes.annotate(
            _escape_math(f"final, {_shorten(split, 16)}: {wer:.1f}%"), (last, wer), xytext=(-2, 24),
            textcoords="offset points", ha="right", va="bottom", color=color,
            fontsize=12 if annotate else 9, fontweight="bold" if annotate else None,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.15 or 1.0)
    axes.set_xlabel("federated round" if annotate else "round")
    if annotate:
        axes.set_ylabel("word error rate, %")
    else:
        axes.set_title("Word error rate, %")
    _legend(axes)


def _draw_layers(panels: Sequence[tuple]) -> Any:
    from matplotlib.colors import LogNorm

    count = max(len(panel[0]) for panel in panels)
    figure, all_axes = _figure(len(panels), height=float(np.clip(1.2 + 0.19 * count, 2.4, 14.0)))
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
        shown = range(0, len(names), every)
        if column and names == panels[0][0]:
            shown = ()
        labels = [_escape_math(_shorten(names[i])) for i in shown]
        axes.set_yticks(list(shown), labels, fontsize=7.5)
        axes.set_xlabel("round")
        axes.set_title(title)
    return figure
