"""The notebook runs from top to bottom, and is stored without results."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "quickstart.ipynb"


def test_notebook_is_valid_and_clean():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is needed to read the notebook")
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def code(name):
    """Of a cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if cell["id"] == name)
    return "".join(cell["source"])


@pytest.mark.parametrize(
    ("there", "extras"),
    [
        ({"nvidia-smi": "/usr/bin/nvidia-smi"}, "quickstart,cuda"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-1"}, "quickstart,tpu"),
        ({}, "quickstart"),
    ],
)
def test_what_a_runtime_installs(monkeypatch, there, extras):
    """Colab's runtimes have JAX, and not fedasr: a T4, a TPU v5e, a CPU."""
    for name in [name for name in os.environ if "TPU" in name]:
        monkeypatch.delenv(name)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", there.get)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append((command, check)))
    names = {}
    exec(code("parameters"), names)
    exec(code("install"), names)
    ((command, check),) = ran
    assert check and command[1:5] == ["-m", "pip", "install", "-q"]
    assert command[5] == f"fedasr[{extras}] @ git+{names['REPOSITORY']}"
    known = (NOTEBOOK.parents[2] / "setup.py").read_text()
    assert all(f'"{extra}":' in known for extra in extras.split(","))


def test_nothing_is_installed_where_fedasr_is(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    exec(code("install"), {"os": os, "REPOSITORY": ""})


AS_COLAB = """
import json, sys
import matplotlib
matplotlib.use("agg")
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


@pytest.mark.slow
def test_cells_run_without_jupyter(corpus_dir, program_environment, tmp_path):
    """One after another in a fresh interpreter, whatever Python and JAX there are."""
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        pytest.skip("test_notebook_runs runs the same cells, in a kernel")
    small = {"FEDASR_NOTEBOOK_SMALL": "1", "FEDASR_NOTEBOOK_DATA": str(corpus_dir)}
    done = subprocess.run(
        [sys.executable, "-c", AS_COLAB, str(NOTEBOOK)],
        env=program_environment | small,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("sigma 0.00045: epsilon")
    assert len(list((tmp_path / "fedasr-notebook").glob("*/report.html"))) == 3


@pytest.mark.slow
def test_notebook_runs(corpus_dir, program_environment, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is needed to run the notebook")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is needed to run the notebook")
    pytest.importorskip("ipykernel", reason="ipykernel is needed to run the notebook")
    for name, value in program_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FEDASR_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("FEDASR_NOTEBOOK_DATA", str(corpus_dir))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = {
        cell.id: cell.outputs
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.outputs
    }
    for name in ("layers", "budgets", "privacy"):
        assert any("image/png" in one.get("data", {}) for one in outputs[name]), name
    printed = "".join(
        one.text for one in outputs["privacy"] if one.get("name") == "stdout"
    ).splitlines()
    assert [line.split(":")[0] for line in printed] == ["sigma 0.00045"]
    assert len(list((tmp_path / "fedasr-notebook").glob("*/report.html"))) == 3
