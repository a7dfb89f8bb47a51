"""The sweep's search, and its page of all runs, with a launcher that only pretends to train."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fedasr.cli.sweep import page
from fedasr.cli.sweep.search import parse_space
from fedasr.errors import UserError
from fedasr.recipes.tables import Row, Table

# The error is the distance of the rate from 0.1, in decades; it falls in five evaluations.
LAUNCHER = """
import json, math, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
rate = float(flags["config.server.learning_rate"])
error = 1 + 20 * abs(math.log10(rate / 0.1))
(workdir / "config.json").write_text(json.dumps({"server": {"learning_rate": rate}}))
with open(workdir.parent / "launched", "a") as file:
    file.write(workdir.name + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
with open(workdir / "metrics.jsonl", "w") as file:
    for i in range(5):
        rates = {"dev": {"wer": error + 50 - 10 * i}}
        record = {"phase": "federated", "round": i + 1, "eval": rates}
        file.write(json.dumps(record) + "\\n")
        file.flush()
        time.sleep(PAUSE)
summary = {"status": "completed", "wer": {"dev": error}, "wall_seconds": 60 * rate}
(workdir / "summary.json").write_text(json.dumps(summary))
"""


def command(tmp_path, pause, *flags):
    (tmp_path / "launcher.py").write_text(LAUNCHER.replace("PAUSE", str(pause)))
    (tmp_path / "config.py").touch()
    return [
        f"--config={tmp_path / 'config.py'}",
        "--search=optuna",
        "--space=server.learning_rate=1e-4..10:log",
        f"--launcher={sys.executable} {tmp_path / 'launcher.py'}",
        f"--out={tmp_path / 'out'}",
        *flags,
    ]


@pytest.mark.slow
def test_a_search_is_resumed_and_finds_what_is_good(program, program_environment, tmp_path):
    pytest.importorskip("optuna", reason="optuna is an extra")
    flags = command(tmp_path, 0.3, "--trials=14", "--jobs=2", "--json")
    out = tmp_path / "out" / "config_search"
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *flags],
        env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while not (out / "launched").exists() or (out / "launched").read_text().count("\n") < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and "run the same command to go on" in errors
    done = program("experiments.sweep", *flags)
    assert done.returncode == 0, done.stderr
    launched = (out / "launched").read_text().split()
    names = {f"trial_{i}__seed-0" for i in range(14)}
    assert set(launched) == names and len(launched) <= 16  # those that were stopped, again
    rows = json.loads(done.stdout.splitlines()[-1])["config_search"]["rows"]
    assert len(rows) == 14
    rates = [(out / name / "config.json").read_text() for name in names]
    assert len(set(rates)) == 14  # what was tried before the stop is not drawn again
    best = min(row["wer"]["dev"]["mean"] for row in rows if row["wer"])
    first = min(row["wer"]["dev"]["mean"] for row in rows[:5] if row["wer"])
    assert best <= first and best < 15
    # Some are ended early; those have no result.
    assert "ended early" in errors + done.stderr
    assert sum(not row["wer"] for row in rows) == (errors + done.stderr).count("ended early")
    again = program("experiments.sweep", *flags)
    assert again.returncode == 0 and (out / "launched").read_text().split() == launched
    other = [flag.replace("learning_rate=1e-4", "momentum=1e-4") for flag in flags]
    refused = program("experiments.sweep", *other)
    assert refused.returncode == 2 and "another space" in refused.stderr


def test_spaces():
    pytest.importorskip("optuna", reason="optuna is an extra")
    found = parse_space("a.b=1e-3..10:log; c=1..8 ;d=lamb, adam;e=0.5..2.0")
    assert (found["a.b"].low, found["a.b"].high, found["a.b"].log) == (1e-3, 10, True)
    assert type(found["c"]).__name__ == "IntDistribution" and found["c"].high == 8
    assert found["d"].choices == ("lamb", "adam")
    assert not found["e"].log
    for text in ("a=1..2:cube", "a=x..2", "a=3..1", "", "a=-1..1:log"):
        with pytest.raises(UserError, match="--space"):
            parse_space(text)


def write_runs(out):
    table = Table("tiny", "<i>Tiny</i>", "mini", tuple(Row(f"row {i}", {}) for i in range(3)))
    for i, (wer, epsilon) in enumerate(((30.0, 2.0), (9.5, None), (100.0, 8.0))):
        folder = out / "tiny" / f"row_{i}__seed-0"
        folder.mkdir(parents=True)
        config = {"server": {"learning_rate": 0.1 * i, "optimizer": "lamb"}, "rounds": 3}
        (folder / "config.json").write_text(json.dumps(config))
        deployed = {"cohort": 9, "population": 99, "epsilon": epsilon}
        summary = {
            "status": "completed", "wer": {"test": wer}, "wall_seconds": 90.0,
            "privacy": {"enabled": True, "epsilon": 1e6, "extrapolations": [deployed]},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = [{"round": r, "eval": {"test": {"wer": wer + 3 - r}}} for r in range(4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def test_a_page_of_all_runs(tmp_path):
    text = page.write_page([write_runs(tmp_path)], tmp_path).read_text()
    assert text.index("row_1") < text.index("row_0") < text.index("row_2")  # the best first
    assert "server.learning_rate" in text and "server.optimizer" not in text
    assert "&lt;i&gt;Tiny" in text and "<i>" not in text
    assert text.count("<svg") == 2 and "http" not in text.replace("http://www.w3.org", "").replace(
        "http-equiv", ""
    )
    empty = page.write_page([Table("x", "X", "mini", (Row("a", {}),))], tmp_path / "new")
    assert "No run has begun." in empty.read_text()


def test_a_browser_sorts_the_page(tmp_path):
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no Chromium (Debian: chromium-headless-shell)")
    text = page.write_page([write_runs(tmp_path)], tmp_path).read_text()
    script = """<script>
const heads = [...document.querySelectorAll("th button")], seen = {};
const order = () => [...document.querySelectorAll("tbody tr")].map(r => r.cells[0].textContent);
for (const head of heads) { head.click(); seen[head.textContent] = [order()];
  head.click(); seen[head.textContent].push(order()); }
seen.width = document.documentElement.scrollWidth;
document.title = "MEASURED " + JSON.stringify(seen);</script></body>"""
    (tmp_path / "copy.html").write_text(
        "<script>onerror = m => { document.title = 'FAILED ' + m; };</script>"
        + text.replace("</body>", script)
    )
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800",
         "--dump-dom", (tmp_path / "copy.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seen = json.loads(re.search(r"<title>MEASURED (.*?)</title>", done.stdout)[1])
    runs = [f"tiny/row_{i}__seed-0" for i in range(3)]
    assert seen["test WER, %"] == [[runs[1], runs[0], runs[2]], [runs[2], runs[0], runs[1]]]
    assert seen["run"] == [runs, runs[::-1]]
    assert seen["ε deployed"][0] == [runs[0], runs[2], runs[1]]  # not known: last
    assert seen["width"] <= 500
