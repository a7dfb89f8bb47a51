"""The report holds everything in one file, whatever is missing or hostile in a run."""

import base64
import html.parser
import io
import re
import sys

import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.training.logging import RunLogger, write_json_atomic
from fedasr.training.report import plot_result, write_report
from fedasr.training.report.tables import summary_table

pytest.importorskip("matplotlib")

HOSTILE = (
    '<script>alert(\'x\')</script> & "$x_{\\frac" src="http://evil.example/a.js"\n\x07' + "y" * 90
)
SECTIONS = (
    "Summary",
    "Loss and word error rate",
    "Privacy",
    "Clipping by layer",
    "Time, padding and cohort",
    "Data and updates left out",
    "Configuration",
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
        self.tags, self.references, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data

    @property
    def images(self):
        return [r for r in self.references if r.startswith("data:image/png;base64,")]

    def check(self):
        assert self.references == self.images
        assert not {"script", "link", "iframe", "object"} & set(self.tags)
        for image in self.images:
            assert base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG")
        for section in SECTIONS:
            assert section in self.text


def test_complete_report(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    page.check()
    assert len(page.images) == 4
    assert (
        "Word error rate 9.6% on test, from 41.8% before federated training. User-level "
        "differential privacy: ε = 7.25 at δ = 1e-9 with 1,024 of 1,000,000 users a round "
        "(ε = 4,200,000 for the users simulated here)." in page.text
    )
    for text in ("completed", "as simulated", "extrapolated", "empty text", "1,085,184", "4.0 min"):
        assert text in page.text
    assert re.search(r"counted as zero: *2\.", page.text)
    assert '"seed": 17' in page.text and page.tags.count("details") == 2
    assert page.text.count("How to read this.") == 4
    assert "not known" not in page.text and "not logged" not in page.text


def test_without_privacy(tmp_path):
    privacy = {"enabled": False, "epsilon": None, "noise_multiplier": 0.0}
    write_run(tmp_path, summary=SUMMARY | {"privacy": privacy, "initial_wer": 50}, epsilon=None)
    page = Page(write_report(tmp_path))
    page.check()
    assert "from 50.0% before" in page.text
    assert "Trained without differential privacy" in page.text and "ε =" not in page.text
    assert len(page.images) == 3


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
    assert page.images == []


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
    image = Page(write_report(tmp_path)).images[2]
    data = base64.b64decode(image.partition(",")[2])
    width, height = np.frombuffer(data[16:24], ">u4")
    assert 900 <= width <= 1300 and 1000 <= height <= 1700


def test_without_matplotlib(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(write_report(tmp_path))
    page.check()
    assert page.images == [] and "needs matplotlib" in page.text
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
        "wer_users": {"dev": {"mean": 13.1, "median": 12.0, "worst": 41.2, "interval": 8.4}},
        "simulated_seconds": 7300.0,
    }
    table = summary_table(SUMMARY | more)
    for text in ("remembers of a user", "20,096", "0.788", "0.18", "0.112", "13.1%", "41.2%"):
        assert text in table, text
    assert "simulated devices" in table
    plain = summary_table(SUMMARY)
    for text in ("remembers", "distance", "over users", "simulated"):
        assert text not in plain
