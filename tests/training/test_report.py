"""The report holds everything in one file, whatever is missing or hostile in a run."""

import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.training.logging import RunLogger, write_json_atomic
from fedasr.training.report import plot_result, plots, sections, served, write_report
from fedasr.training.report.tables import summary_table

pytest.importorskip("matplotlib")

HOSTILE = (
    '<script>alert(\'x\')</script> & "$x_{\\frac" src="http://evil.example/a.js"\n\x07' + "y" * 90
)
SECTIONS = (
    "Summary",
    "Who is served",
    "Loss and word error rate",
    "Privacy",
    "Attacks",
    "Data and updates left out",
    "Settings and command",
)
PRIVACY = {
    "clip_norm": 0.05,
    "budget": "dim",
    "sigma": 3e-4,
    "noise_multiplier": 0.0096,
    "sampling": "Poisson",
    "epsilon": 4.2e6,
    "delta": 1e-9,
    "accountant": "RDP",
    "layer_bounds": {"a/kernel": 0.04, "b": 0.03},
    "extrapolations": [{"cohort": 1024, "population": 1_000_000, "rounds": 4, "epsilon": 7.25}],
}
SUMMARY = {
    "status": "completed",
    "rounds": 4,
    "cohort": 8,
    "population": 96,
    "parameters": 1_085_184,
    "wer": {"dev": 9.1, "test": 9.6},
    "cer": {"test": 3.2},
    "initial_wer": {"test": 41.8},
    "privacy": PRIVACY,
    "skipped_utterances": {"empty text": 3},
    "invalid_client_updates": 2,
    "wall_seconds": 241.3,
    "device": "cpu",
}


def write_run(workdir, rounds=4, layers=("a/kernel", "b"), summary=SUMMARY, config=None, **changes):
    with RunLogger(workdir, tensorboard=False, stream=io.StringIO()) as log:
        for step in (10, 20):
            log.step(step, {"loss": 30.0 / step})
        for r in range(rounds + 1):
            metrics = {
                "loss": float("nan") if r == 2 else 3.0 / (r + 1),
                "update_norm": {layer: 0.02 * (r + 1) for layer in layers},
                "clipped_share": {layer: 0.5 for layer in layers},
                "cohort": 7 + r,
                "seconds": {"round": 1.0, "data": 0.1},
                "padding_fraction": 0.1,
                "epsilon": 2.0 * r,
                "invalid_client_updates": 0,
            }
            if r % 2 == 0:
                metrics["eval"] = {"dev": {"wer": 40.0 - r, "cer": 9.0, "loss": 2.0}}
            log.round(r, metrics | changes)
    if summary is not None:
        write_json_atomic(workdir / "summary.json", summary)
    write_json_atomic(workdir / "config.json", config or {"seed": 17, "model": {"name": "tiny"}})


class Page(html.parser.HTMLParser):
    """Collects tags, references to anywhere, and the text that a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.references, self.text, self.inner, self.ids = [], [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        sounds = [v for k, v in attributes if tag == "audio" and k == "src"]
        asked = [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        inside = [v for v in sounds if v.startswith("data:audio/wav;base64,")]
        self.references += [v for v in asked if v not in inside]
        self.inner += inside + [v for k, v in attributes if k == "xlink:href"]
        self.ids += [v for k, v in attributes if k == "id"]
        self.inner += [u for _, v in attributes for u in re.findall(r"url\((.*?)\)", v or "")]

    def handle_data(self, data):
        self.text += data

    @property
    def figures(self):
        return self.tags.count("svg")

    def check(self):
        """Whole, nothing from elsewhere, no id twice and none that is referred to in vain."""
        assert not self.references
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        assert self.figures == self.tags.count("figure")
        for reference in self.inner:
            if not reference.startswith(("data:image/png;base64,", "data:audio/wav;base64,")):
                assert reference.startswith("#") and reference[1:] in self.ids, reference
        assert len(set(self.ids)) == len(self.ids)
        for section in SECTIONS:
            assert section in self.text


def test_complete_report(tmp_path):
    write_run(tmp_path)
    (tmp_path / "command.txt").write_text("fedasr train --config.name='<i>'\n")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    page.check()
    assert page.figures == 4
    assert (
        "Word error rate 9.6% on test, from 41.8% before federated training. User-level "
        "differential privacy: for the 96 users who trained here ε = 4,200,000 at δ = 1e-9, which "
        "protects nobody; in a deployment with the same noise and 1,024 of 1,000,000 users a round "
        "ε = 7.25." in page.text
    )
    for text in ("completed", "as simulated", "extrapolated", "empty text", "1,085,184", "4.0 min"):
        assert text in page.text
    assert "Clipping by layer" in page.text and "Time, padding and cohort" in page.text
    assert re.search(r"counted as zero: *2\.", page.text)
    assert '"seed": 17' in page.text and "--config.name='<i>'" in page.text
    assert page.text.count("How to read this") == 4
    assert "not known" not in page.text and "not logged" not in page.text
    # Every number of the summary has its meaning one click away.
    summary = path.read_text().split("<h2>Summary</h2>")[1].split("<h2>")[0]
    assert summary.count("<tr>") == summary.count("<details>") > 8


def test_without_privacy(tmp_path):
    """Total norms in place of clipping that there was not."""
    privacy = {"enabled": False, "epsilon": None, "noise_multiplier": 0.0}
    write_run(tmp_path, summary=SUMMARY | {"privacy": privacy, "initial_wer": 50}, epsilon=None)
    page = Page(write_report(tmp_path))
    page.check()
    assert "from 50.0% before" in page.text
    assert "Trained without differential privacy" in page.text and "ε =" not in page.text
    assert page.figures == 3
    assert "Clipping by layer" not in page.text and "clipped" not in page.text.replace(
        "Nothing was clipped here", ""
    )
    # Two layers of 0.02 (r + 1), r from 0 to 4: the middle one is 0.06 sqrt(2).
    assert "Total norm of a client's update" in page.text and "0.0849" in page.text


def write_central(workdir, stages=True):
    with RunLogger(workdir, tensorboard=False, stream=io.StringIO()) as log:
        for step in range(1, 13):
            main = step > 4
            record = {"loss": 30.0 / step} | ({"stage": "main"} if main and stages else {})
            if main and step % 4 == 0:
                record["eval"] = {"dev": {"wer": 40.0 - step, "cer": 9.0, "loss": 2.0 + step}}
            log.step(step, record)
    privacy = {"enabled": False, "epsilon": None, "extrapolations": []}
    summary = SUMMARY | {
        "rounds": 0, "central_steps": 12, "privacy": privacy, "algorithm": "central",
        "cohort": None, "clients": [], "warnings": ["the loss on 'dev' has risen"],
    }  # fmt: skip
    write_json_atomic(workdir / "summary.json", summary)
    config = {"algorithm": "central", "seed_training": {"steps": 4}, "central": {"steps": 8}}
    write_json_atomic(workdir / "config.json", config)


@pytest.mark.parametrize("stages", [True, False])
def test_central_run(tmp_path, monkeypatch, stages):
    """It is not called federated, its seed is a curve of its own, and it says that it overfits."""
    write_central(tmp_path, stages)
    curves = {}
    real = sections.draw_noisy

    def note(axes, x, y, label):
        curves[label] = x.tolist()
        real(axes, x, y, label)

    monkeypatch.setattr(sections, "draw_noisy", note)
    page = Page(write_report(tmp_path))
    page.check()
    assert curves == {None: [1, 2, 3, 4], "training": list(range(5, 13))}
    assert "from 41.8% before central training" in page.text
    assert "ederated" not in page.text.replace("before any federated", "")
    assert "No evaluation is logged" not in page.text and "Clipping" not in page.text
    assert "Warning: the loss on 'dev' has risen." in page.text
    assert page.figures == 1
    plot_result(tmp_path, tmp_path / "result.png")


def test_a_split_has_one_colour_everywhere(tmp_path, monkeypatch):
    evaluation = {s: {"wer": 40.0, "loss": 2.0} for s in ("other", "dev", "test", "extra")}
    write_run(tmp_path, eval=evaluation)
    write_json_atomic(tmp_path / "users.json", USERS)
    drawn = []
    for module, name in ((sections, "draw_line"), (plots, "draw_line")):
        real = getattr(module, name)

        def note(axes, x, y, *, color, label=None, real=real, **style):
            drawn.append((label, color))
            real(axes, x, y, color=color, label=label, **style)

        monkeypatch.setattr(module, name, note)
    users = served.draw_users
    monkeypatch.setattr(
        served, "draw_users",
        lambda axes, sides, *rest: (drawn.append(("test", sides[0][2])), users(axes, sides, *rest)),
    )  # fmt: skip
    write_report(tmp_path)
    colors = {split: {c for s, c in drawn if s == split} for split in evaluation}
    assert all(len(found) == 1 for found in colors.values()), colors
    assert len(set.union(*colors.values())) == 4
    assert sum(label == "test" for label, _ in drawn) == 3


USERS = {
    "test": {
        "wer": {
            "users": 3,
            "mean": 40.0,
            "worst_decile": 81.0,
            "intervals": {"mean": [30.0, 50.0]},
        },
        "columns": {
            "gender": {
                "groups": {
                    "f": {"users": 2, "rate": 20.0, "interval": [10.0, 30.0]},
                    "m": {"users": 1, "rate": 81.0, "interval": [None, None]},
                },
                "gap": None,
            }
        },
        "confusions": {"words": [{"reference": "a", "hypothesis": "", "count": 3, "of": 5}]},
        "by_user": [
            {"user": u, "wer": w, "words": 10, "training_minutes": 0.0, "metadata": {"gender": "f"}}
            for u, w in (("anne", 12.0), ("<b>", 81.0), ("carl", 28.0))
        ],
    }
}


def test_who_is_served(tmp_path):
    served = {
        "users": 3, "all": 40.0, "worst_decile": 81.0, "intervals": {"all": [30.0, 50.0]},
        "gaps": {"accent": {"gap": 21.5, "gap_interval": [2.0, 41.0], "worst": "x", "best": "y"}},
    }  # fmt: skip
    write_run(tmp_path / "run", summary=SUMMARY | {"served": {"test": served}})
    write_json_atomic(tmp_path / "run" / "users.json", USERS)
    page = Page(write_report(tmp_path / "run"))
    page.check()
    assert page.figures == 6
    for text in (
        "81.0% for the worst tenth of its 3 users",
        "30.0 to 50.0%",
        "Gap by accent, test: x over y",
        "21.5 points",
        "gender: f (2)",
        "<b>",
        "(nothing)",
        "Test has 3 users, none of whom trained",
    ):
        assert text in page.text, text
    # Another run beside it.
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"no users\.json"):
        write_report(tmp_path / "run", tmp_path / "other")
    theirs = json.loads(json.dumps(USERS))
    theirs["test"]["by_user"][0]["wer"] = 20.0
    theirs["test"]["wer"] |= {"mean": 43.5, "worst_decile": None}
    theirs["test"]["columns"]["gender"] |= {"gap": 7.5, "worst": "f", "best": "m",
                                            "gap_interval": [1.0, 9.0]}  # fmt: skip
    write_json_atomic(tmp_path / "other" / "users.json", theirs)
    write_report(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    page = Page(write_report(tmp_path / "run"))  # also of a later report, as after attacks
    page.check()
    assert "0 of 3 users have more errors here than in other, 1 fewer" in page.text
    beside = page.text.split("this run95% intervalother95% interval")[1].split("How to read")[0]
    assert "Mean over users40.0%30.0 to 50.0%43.5%30.0 to 50.0%" in beside
    assert "Worst tenth81.0%unknown" in beside
    assert "Gap by genderunknown7.5 points, f over m1.0 to 9.0%" in beside
    write_json_atomic(tmp_path / "run" / "beside.json", {"name": 3, "users": {"test": [1]}})
    Page(write_report(tmp_path / "run")).check()


def test_the_worst_are_heard(tmp_path):
    write_run(tmp_path)
    write_json_atomic(tmp_path / "users.json", USERS)
    row = {"user": "anne", "id": "a/<1>", "reference": "x y", "hypothesis": "", "errors": 2,
           "words": 2, "seconds": 1.25, "wav": "UklGRg=="}  # fmt: skip
    rows = [row, row | {"wav": '"><script>'}, row | {"wav": ""}, 3]
    write_json_atomic(
        tmp_path / "worst.json", {"test": {"why": "Too <large>.", "utterances": rows}}
    )
    page = Page(write_report(tmp_path))
    page.check()
    assert page.tags.count("audio") == 1 and "data:audio/wav;base64,UklGRg==" in page.inner
    for text in ("2 of 2 words", "a/<1>", "(nothing)", "1.2 s", "Too <large>."):
        assert text in page.text, text
    assert "media-src data:" in (tmp_path / "report.html").read_text()  # or nothing is played
    write_json_atomic(tmp_path / "worst.json", {"test": {"why": 1, "utterances": {}}})
    page = Page(write_report(tmp_path))
    page.check()
    assert "utterances with the most errors" not in page.text


def test_attacks_are_told_and_alarms_first(tmp_path):
    write_run(tmp_path)
    row = {
        "attack": "speaker", "setting": "no noise", "success": 0.5, "interval": [0.4, 0.6],
        "chance": 0.1, "bound": 0.3, "exceeds": True,
    }  # fmt: skip
    write_json_atomic(tmp_path / "attacks.json", {"results": [row, row | {"exceeds": False}, 3]})
    page = Page(write_report(tmp_path))
    page.check()
    assert "Warning: speaker does better than the claimed privacy allows" in page.text
    assert "40.0 to 60.0%" in page.text and page.figures == 5
    many = [row | {"attack": f"attack {i}"} for i in range(4)]
    write_json_atomic(tmp_path / "attacks.json", {"results": many})
    page = Page(write_report(tmp_path))
    page.check()
    assert page.figures == 6  # three side by side


def test_a_browser_shows_it_in_both_schemes(tmp_path):
    """Headless Chromium: every figure has its size, and text is legible on its background."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no Chromium (Debian: chromium-headless-shell)")
    write_run(tmp_path)
    write_json_atomic(tmp_path / "users.json", USERS)
    page = write_report(tmp_path).read_text()
    # The page forbids scripts: the test's copy may have one, which measures.
    page = re.sub(r"<meta http-equiv=.*?>", "", page, flags=re.DOTALL)
    page = page.replace("</body>", f"<script>{MEASURE}</script></body>")
    (tmp_path / "copy.html").write_text(page)
    found = {}
    for scheme in ("light", "dark"):
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            "--dump-dom", (tmp_path / "copy.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found[scheme] = json.loads(re.search(r"<title>MEASURED (.*?)</title>", done.stdout)[1])
    assert found["light"]["background"] != found["dark"]["background"]
    for scheme, measured in found.items():
        assert measured["figures"] and min(measured["figures"]) > 50, scheme
        assert measured["contrast"] >= 4.5 and measured["figure_contrast"] >= 4.5, (
            scheme,
            measured,
        )
        assert measured["width"] <= 500, scheme  # nothing makes a phone's page wide


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MEASURE = """
function light(c) { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; }
function contrast(a, b) { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); }
const page = getComputedStyle(document.body).backgroundColor;
const least = (all, of) => Math.min(...[...all].map(e => contrast(getComputedStyle(e)[of], page)));
document.title = "MEASURED " + JSON.stringify({
  background: page,
  figures: [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect().height),
  contrast: least(document.querySelectorAll("p:not(.headline), td, summary"), "color"),
  figure_contrast: least(document.querySelectorAll("svg text"), "fill"),
  width: document.documentElement.scrollWidth,
});
"""


def test_empty_work_directory(tmp_path):
    page = Page(write_report(tmp_path))
    page.check()
    for text in (
        "No final word error rate yet. Privacy: not known yet.",
        "it has not ended",
        "No summary.json.",
        "No federated round is logged yet.",
        "No evaluation is logged yet",
        "The privacy spent is known when the run has ended.",
        "Update norms by layer are not logged",
        "Time and padding are not logged",
        "Skipped utterances are not known yet.",
        "Invalid client updates are not known yet.",
        "No config.json.",
    ):
        assert text in page.text
    assert page.figures == 0


def test_stopped_run_without_evaluation_or_summary(tmp_path):
    write_run(tmp_path, summary=None, eval=None)
    page = Page(write_report(tmp_path))
    page.check()
    assert "The last logged round is 4." in page.text
    assert "No evaluation is logged yet" in page.text
    with pytest.raises(UserError, match="no evaluation to draw"):
        plot_result(tmp_path, tmp_path / "result.png")


@pytest.mark.parametrize(
    "privacy", [None, {}, {"enabled": True}, {"noise_multiplier": None, "sigma": "much"}]
)
def test_unknown_privacy_is_not_called_absent(tmp_path, privacy):
    summary = {"status": "interrupted", "wall_seconds": 3.0, "privacy": privacy}
    write_json_atomic(tmp_path / "summary.json", summary)
    page = Page(write_report(tmp_path))
    page.check()
    assert "interrupted" in page.text and "Privacy: not known yet." in page.text
    assert "no noise" not in page.text


def test_zero_noise_is_not_private(tmp_path):
    privacy = PRIVACY | {"noise_multiplier": 0.0, "sigma": 0.0, "epsilon": float("inf")}
    write_json_atomic(tmp_path / "summary.json", SUMMARY | {"privacy": privacy})
    page = Page(write_report(tmp_path))
    assert "Trained without differential privacy: no noise was added." in page.text


def test_hostile_strings_and_wrong_types(tmp_path):
    workdir = tmp_path / "<img src=http:a>"
    summary = SUMMARY | {
        "status": HOSTILE,
        "device": HOSTILE,
        "wer": {HOSTILE: 3.0},
        "rounds": HOSTILE,
        "skipped_utterances": {HOSTILE: HOSTILE},
        "privacy": PRIVACY | {"sampling": HOSTILE, "delta": HOSTILE, "extrapolations": [HOSTILE]},
    }
    evaluation = {HOSTILE: {"wer": 3.0, "loss": HOSTILE}, "_hidden": {"wer": 2}, "x": 3}
    write_run(
        workdir, layers=[HOSTILE, "$"], summary=summary, config={HOSTILE: HOSTILE}, eval=evaluation,
        cohort=HOSTILE, padding_fraction=[1],
    )  # fmt: skip
    page = Page(write_report(workdir))
    page.check()
    assert page.text.count("<script>alert('x')</script>") >= 6
    assert not [t for t in page.tags if t == "script"]
    plot_result(workdir, tmp_path / "result.png")


def test_damaged_json_counts_as_missing(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": ')
    (tmp_path / "config.json").write_text("[1]")
    page = Page(write_report(tmp_path))
    assert "No summary.json." in page.text and "No config.json." in page.text


def test_layers_stay_within_the_picture(tmp_path):
    """Hundreds of layers and rounds, one without any movement, make one bounded picture."""
    layers = [f"block_{i}/kernel" for i in range(300)]
    norms = {layer: 0.01 * i for i, layer in enumerate(layers)}
    write_run(tmp_path, rounds=250, layers=layers, update_norm=norms, eval=None)
    page = write_report(tmp_path).read_text()
    sizes = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*aria-label="update norms', page)
    width, height = map(float, sizes[0])  # points
    assert 600 <= width <= 900 and 700 <= height <= 1200 and len(page) < 3e6


def test_without_matplotlib(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(write_report(tmp_path))
    page.check()
    assert page.figures == 0 and "needs matplotlib" in page.text
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_result(tmp_path, tmp_path / "result.png")


def test_plot_result_draws_a_wide_picture(tmp_path):
    write_run(tmp_path / "run")
    path = plot_result(tmp_path / "run", tmp_path / "figures" / "result.png")
    data = path.read_bytes()
    width, height = np.frombuffer(data[16:24], ">u4")
    assert data.startswith(b"\x89PNG") and width > 2 * height


def test_plot_result_names_the_split_of_every_number(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []

    def collect(figure, *_, **__):
        texts.extend(text.get_text() for text in figure.axes[0].texts)

    monkeypatch.setattr(Figure, "savefig", collect)
    write_run(tmp_path)  # Evaluates dev by round, test at the end.
    plot_result(tmp_path, tmp_path / "result.png")
    assert texts == ["before federated training, test: 41.8%", "final, test: 9.6%"]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="there is no work directory"):
        write_report(tmp_path / "absent")


def test_users_devices_and_memory_are_told():
    more = {
        "memory": {"parameters": 20_096, "users": 4},
        "skew": {"distance": 0.788, "iid_distance": 0.18, "gini": 0.112, "classes": 10},
        "simulated_seconds": 7300.0,
    }
    table = summary_table(SUMMARY | more)
    for text in ("remembers of a user", "20,096", "0.788", "0.18", "0.112", "simulated devices"):
        assert text in table, text
    plain = summary_table(SUMMARY)
    for text in ("remembers", "distance from all", "simulated"):
        assert text not in plain
