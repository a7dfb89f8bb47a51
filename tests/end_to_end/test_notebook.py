"""The notebook runs from top to bottom, and is stored without results."""

import json
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
