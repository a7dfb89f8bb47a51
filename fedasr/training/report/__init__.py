"""A run on one page: `report.html` with its result, privacy and plots, and a picture of the result.

Everything is read from the files of a work directory, so a report can be made again at any time,
also of a run that was stopped. Nothing in the page refers to another file or host.
"""

import os
import textwrap
from pathlib import Path

from fedasr.errors import UserError
from fedasr.training.logging import read_metrics
from fedasr.training.report.plots import draw_wer, escape_math, has_matplotlib, new_figure
from fedasr.training.report.read import (
    evaluation_curves,
    existing_folder,
    is_seed,
    mapping_at,
    number_at,
    read_object,
)
from fedasr.training.report.sections import (
    clipping_section,
    cost_section,
    learning_section,
    privacy_section,
)
from fedasr.training.report.tables import (
    clients_table,
    configuration_text,
    left_out_table,
    summary_table,
)
from fedasr.training.report.words import escaped, headline_text, privacy_sentence, status_text

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
    workdir = existing_folder(workdir)
    summary = read_object(workdir / "summary.json")
    config = read_object(workdir / "config.json")
    records = read_metrics(workdir)
    federated = [r for r in records if number_at(r, "round") is not None and not is_seed(r)]
    seed = [r for r in records if number_at(r, "step") is not None and is_seed(r)]

    sections = [
        f"<h1>Training report: {escaped(workdir.resolve().name)}</h1>",
        f'<p class="headline">{escaped(headline_text(summary))}</p>',
        status_text(summary, federated),
        "<h2>Summary</h2>",
        summary_table(summary),
        "<h2>Loss and word error rate</h2>",
        learning_section(federated, seed, summary),
        "<h2>Privacy</h2>",
        privacy_section(federated, summary),
        "<h2>Clipping by layer</h2>",
        clipping_section(federated, mapping_at(mapping_at(summary, "privacy"), "layer_bounds")),
        "<h2>Time, padding and cohort</h2>",
        cost_section(federated),
        "<h2>What a client receives, sends and holds</h2>",
        clients_table(summary),
        "<h2>Data and updates left out</h2>",
        left_out_table(federated, summary),
        "<h2>Configuration</h2>",
        configuration_text(config),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser then refuses anything that is not in the page.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Training report: {escaped(workdir.resolve().name)}</title>\n"
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
    workdir = existing_folder(workdir)
    summary = read_object(workdir / "summary.json")
    curves = evaluation_curves(read_metrics(workdir), "wer")
    if not curves:
        raise UserError(f"{workdir} holds no evaluation to draw: train with evaluation rounds")
    if not has_matplotlib():
        raise UserError("drawing needs matplotlib: pip install matplotlib")
    figure, (axes,) = new_figure(1, width=10.5, height=3.9)
    draw_wer(axes, curves, summary, annotate=True)
    title = "\n".join(textwrap.wrap(escape_math(privacy_sentence(summary)), 110))
    axes.set_title(title, fontsize=11, loc="left")
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160, format="png")
    return out_png
