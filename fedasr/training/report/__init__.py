"""A run on one page: `report.html` with its result, privacy and plots, and a picture of the result.

Everything is read from the files of a work directory, so a report can be made again at any time,
also of a run that was stopped. Nothing in the page refers to another file or host.
"""

import os
import textwrap
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.training.logging import read_metrics
from fedasr.training.report.attacks import attacks_section
from fedasr.training.report.beside import keep_beside, read_beside
from fedasr.training.report.plots import (
    colors_of,
    draw_wer,
    escape_math,
    has_matplotlib,
    new_figure,
)
from fedasr.training.report.read import (
    all_splits,
    evaluation_curves,
    existing_folder,
    is_central,
    is_private,
    mapping_at,
    read_object,
    stages_of,
)
from fedasr.training.report.sections import (
    clipping_section,
    cost_section,
    learning_section,
    norms_section,
    privacy_section,
)
from fedasr.training.report.served import served_section, unseen_text
from fedasr.training.report.tables import (
    clients_table,
    configuration_text,
    left_out_table,
    summary_table,
)
from fedasr.training.report.words import escaped, headline_text, privacy_sentence, status_text
from fedasr.training.workdir import COMMAND_FILE

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --faint: #57606a;
  --grid: #d0d7de; --soft: #f0f4f8; --mark: #0072B2; --alarm: #a33b00;
  --series-0: #0072B2; --series-1: #D55E00; --series-2: #009E73; --series-3: #B5568C;
  --series-4: #B07A00; --series-5: #3C92C4; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --ink: #e6e9ed; --faint: #a2abb5;
  --grid: #38414b; --soft: #1c232b; --mark: #56B4E9; --alarm: #ff9d5c;
  --series-0: #4FA8E0; --series-1: #F08A3C; --series-2: #2BC59A; --series-3: #E29BC5;
  --series-4: #F0B93A; --series-5: #8CCBF2; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; padding: 1.5rem 1.2rem; max-width: 62rem; }
h1 { font-size: 1.5rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--grid);
  padding-bottom: .2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
.headline { font-size: 1.15rem; background: var(--soft); border-left: 4px solid var(--mark);
  padding: .8rem 1rem; margin: 0; overflow-wrap: anywhere; }
.warning { color: var(--alarm); font-weight: 600; }
.note, .missing, .interval, th details p { color: var(--faint); }
.missing { font-style: italic; } .interval { white-space: nowrap; }
th details p { font-weight: 400; margin: .2rem 0 .4rem; max-width: 34rem; }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .4rem 0; overflow-x: auto; } figure svg { max-width: 100%; min-width: 34rem;
  height: auto; display: block; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_report(workdir: str | Path, against: str | Path | None = None) -> Path:
    """Writes `report.html` into a work directory and returns its path.

    Reads `summary.json`, `metrics.jsonl`, `config.json`, `users.json`, `worst.json`, `attacks.json`
    and `command.txt`; what is missing in them is said in the page. Without matplotlib the page has
    no plots.

    Args:
        workdir: of the run.
        against: of another run, whose users stand beside this one's, here and in later reports of
            this run; without, those of an earlier report.

    Raises:
        UserError: if a folder does not exist, or the other run has no errors by user.
    """
    workdir = existing_folder(workdir)
    if against is not None and not keep_beside(workdir, existing_folder(against)):
        raise UserError(f"{against} has no users.json: let its run end with this release")
    page = _page(workdir)
    path = workdir / "report.html"
    temporary = workdir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def _page(workdir: Path) -> str:
    summary = read_object(workdir / "summary.json")
    config = read_object(workdir / "config.json")
    users, attacks = read_object(workdir / "users.json"), read_object(workdir / "attacks.json")
    records = read_metrics(workdir)
    central = is_central(summary, config)
    main, seed, unit = stages_of(records, central, config)
    splits = all_splits(main, summary)

    sections = [
        f"<h1>Training report: {escaped(workdir.resolve().name)}</h1>",
        f'<p class="headline">{escaped(headline_text(summary, central))}</p>',
        status_text(summary, main, unit),
        "<h2>Summary</h2>",
        summary_table(summary),
        "<h2>Who is served</h2>",
        served_section(users, splits, read_beside(workdir), read_object(workdir / "worst.json")),
        "<h2>Loss and word error rate</h2>",
        learning_section(main, seed, summary, unit, unseen_text(users)),
        "<h2>Privacy</h2>",
        privacy_section([] if central else main, summary),
        "<h2>Attacks</h2>",
        attacks_section(attacks),
    ]
    if not central:
        sections += _federated_sections(main, summary)
    sections += [
        "<h2>Data and updates left out</h2>",
        left_out_table(main, summary),
        "<h2>Settings and command</h2>",
        configuration_text(config, _command(workdir)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser then refuses anything that is not in the page.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; media-src data:; "
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Training report: {escaped(workdir.resolve().name)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _federated_sections(main: Any, summary: Any) -> list[str]:
    """What only rounds over users have."""
    bounds = mapping_at(mapping_at(summary, "privacy"), "layer_bounds")
    if is_private(summary) is False:
        clipping = ["<h2>Update norms</h2>", norms_section(main)]
    else:
        clipping = ["<h2>Clipping by layer</h2>", clipping_section(main, bounds)]
    return [
        *clipping,
        "<h2>Time, padding and cohort</h2>",
        cost_section(main),
        "<h2>What a client receives, sends and holds</h2>",
        clients_table(summary),
    ]


def _command(workdir: Path) -> str:
    """That made the run; "" if it is not known."""
    try:
        return (workdir / COMMAND_FILE).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def plot_result(workdir: str | Path, out_png: str | Path) -> Path:
    """Draws the word error rate by round, with the seed's, the final one and epsilon, as a PNG.

    Returns:
        The path written.

    Raises:
        UserError: if the folder does not exist, the run has not evaluated anything or matplotlib
            is not installed.
    """
    workdir = existing_folder(workdir)
    summary = read_object(workdir / "summary.json")
    config = read_object(workdir / "config.json")
    central = is_central(summary, config)
    main, _, unit = stages_of(read_metrics(workdir), central, config)
    curves = evaluation_curves(main, "wer", unit)
    if not curves:
        raise UserError(f"{workdir} holds no evaluation to draw: train with evaluation rounds")
    if not has_matplotlib():
        raise UserError("drawing needs matplotlib: pip install matplotlib")
    figure, (axes,) = new_figure(1, width=10.5, height=3.9)
    colors = colors_of(all_splits(main, summary))
    draw_wer(axes, curves, summary, colors, unit, annotate=True)
    title = "\n".join(textwrap.wrap(escape_math(privacy_sentence(summary)), 110))
    axes.set_title(title, fontsize=11, loc="left")
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160, format="png")
    return out_png
