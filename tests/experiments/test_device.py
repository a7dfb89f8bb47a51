"""The device script: what it keeps of stages that end badly, its goldens, and a run in small."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks.device import __main__ as device
from experiments.benchmarks.device import goldens, tables
from experiments.modes import MODES

ROOT = Path(__file__).parents[2]
# Of a machine with an accelerator that has JAX and little else.
ABSENT = (
    "ml_collections", "dp_accounting", "jax_privacy", "array_record", "tensorflow_datasets",
    "anyascii", "ftfy", "rapidfuzz", "tensorboardX", "soundfile", "soxr", "espeakng_loader",
)  # fmt: skip


def test_all_stages_have_time():
    limits = [stage.limit for stage in device.stages("folder", "").values()]
    assert sum(limits) <= 12 * 60 and min(limits) >= 30
    order = ["device", "correctness", "utilisation", "small", "ctc", "attention", "chunk"]
    assert list(device.stages("folder", "")) == [*order, "quickstart"]


def printing(rows, then=""):
    lines = "".join(f"print('{json.dumps(row)}', flush=True);" for row in rows)
    return ["-c", f"import subprocess, sys, time; {lines} print('not a row'); {then}"]


def test_rows_come_as_they_are_printed():
    rows = []
    status, seconds = device.run_stage(printing([{"a": 1}, {"a": 2}]), 60, rows.append)
    assert status == "done" and rows == [{"a": 1}, {"a": 2}] and 0 < seconds < 60


def test_a_stage_without_end_is_cut_off_with_what_it_started(tmp_path):
    """Its figures are kept."""
    pid = tmp_path / "pid"
    then = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    rows, began = [], time.monotonic()
    status, _ = device.run_stage(printing([{"a": 1}], then), 6, rows.append)
    assert status == "cut off after 6 s" and rows == [{"a": 1}]
    assert time.monotonic() - began < 60
    deadline = time.monotonic() + 30
    while (stat := Path(f"/proc/{pid.read_text()}/stat")).exists():
        if stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_that_fails_says_why():
    rows = []
    status, _ = device.run_stage(printing([{"a": 1}], "sys.exit('no device')"), 60, rows.append)
    assert status == "failed: no device" and rows == [{"a": 1}]


def test_results_are_there_after_every_figure(tmp_path):
    results = tables.Results(tmp_path, tiny=False)
    results.begin("device", "The device")
    results.add({"kind": "NVIDIA H200", "memory_gb": None})
    results.end("done", 2.0)
    results.begin("ctc", "CTC")
    for count, size in enumerate(("a", "b"), 1):
        results.add({"size": size, "ms": 0.123456, "of": {"x": 1}, "ok": True})
        kept = json.loads((tmp_path / "nvidia-h200.json").read_text())
        assert [len(s["rows"]) for s in kept["stages"].values()] == [1, count]
        assert kept["stages"]["ctc"]["status"] == "running"
    results.end("cut off after 3 s", 3.0)
    assert not results.good()
    text = (tmp_path / "nvidia-h200.md").read_text()
    assert "| size | ms | of x | ok |" in text and "| b | 0.1235 | 1 | True |" in text
    assert "cut off after 3 s, 3.0 s." in text and "| kind | NVIDIA H200 |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nvidia-h200.json",
        "nvidia-h200.md",
    ]


@pytest.mark.parametrize(("held", "good"), [(True, True), (False, False)])
def test_a_check_that_fails_is_no_good_run(tmp_path, held, good):
    results = tables.Results(tmp_path, tiny=True)
    results.begin("device", "The device")
    results.add({"kind": "cpu", "ok": held})
    results.end("done", 1.0)
    assert results.good() is good and results.path == tmp_path / "cpu-tiny.json"


def test_distances_of_sketches_are_those_of_updates():
    rng = np.random.default_rng(0)
    before = {str(i): np.zeros((30, 40), np.float32) for i in range(20)}
    update = {name: rng.standard_normal((30, 40)) for name in before}
    for apart in (1e-4, 1e-2):
        other = {name: x + apart * rng.standard_normal((30, 40)) for name, x in update.items()}
        found = [goldens.sketch(before, x) for x in (other, update)]
        assert goldens.distance(*found) == pytest.approx(apart, rel=0.3)
    assert goldens.distance(found[0][1:], found[1]) == np.inf
    assert goldens.distance([[np.nan] * 4] * 20, found[1]) == np.inf


def test_a_golden_that_one_parameter_misses_is_not_met():
    """An update of which one matrix has moved by a hundredth of all."""
    kept = json.loads(goldens.FILE.read_text())
    assert kept.keys() == set(goldens.NAMES) and kept.keys() | set(goldens.OTHERS) == set(MODES)
    for name, golden in kept.items():
        assert goldens.compare(name, golden, golden)["ok"]
        whole = np.linalg.norm(golden["sketch"])
        moved = [list(row) for row in golden["sketch"]]
        moved[1][0] += 0.01 * whole
        assert not goldens.compare(name, golden | {"sketch": moved}, golden)["ok"]
        assert not goldens.compare(name, golden | {"loss": 1.01 * golden["loss"]}, golden)["ok"]


def test_stages_import_with_little_installed():
    """All that they measure, but the quickstart, which is left out and says why."""
    modules = ["device.stages", "device.goldens", "device.simulations", "large", "plots"]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({ABSENT}))
for name in {modules}:
    importlib.import_module("experiments.benchmarks." + name)
for name in ("recipes.shared", "training.loop", "training.builders.simulations"):
    importlib.import_module("fedasr." + name)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_every_golden_is_met_here():
    import jax

    rows = list(goldens.rows(goldens.NAMES, jax.devices()[0]))
    assert [row for row in rows if not row["ok"]] == []
