"""The notebook's round compiles for what Colab lends, and fits there."""

import json
import os
from pathlib import Path

import pytest

from fedasr.compiling import figures, targets
from fedasr.training import loop
from fedasr.training.config import Config, resolve

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "quickstart.ipynb"
LONGEST = 4.0  # seconds of an utterance of the synthetic digits


def first_run(monkeypatch):
    """The configuration that the notebook trains with on an accelerator, from its own cells."""
    found = []
    monkeypatch.delenv("FEDASR_NOTEBOOK_SMALL", raising=False)
    monkeypatch.setattr(loop, "run", lambda config, workdir: found.append(config))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells}
    names = {}
    exec(code["parameters"], names)
    (line,) = (line for line in code["device"].splitlines() if line.startswith("CHUNK = "))
    names["CHUNK"] = int(line.rsplit(" ", 1)[1])
    exec(code["train"], names)
    names["train"](names["ROUNDS"], privacy__sigma=names["SIGMA"])
    return Config.of(resolve(found[0])), names["CHUNK"]


def test_the_notebook_trains_a_cohort_at_once(monkeypatch):
    config, chunk = first_run(monkeypatch)
    assert chunk == config.chunk == config.cohort == 8 and config.name == "quickstart"


@pytest.mark.slow
@pytest.mark.accelerator
@pytest.mark.parametrize("name", ["v5e", "t4"])
def test_it_fits_what_colab_lends(name, monkeypatch):
    target = targets.TARGETS[name]
    if requirement := targets.missing_wheel(target):
        pytest.skip(f"{requirement} is not installed: pip install -e '.[compilers]'")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("the compilers load with JAX_PLATFORMS=cpu in the environment only")
    targets.prepare([target])
    config, chunk = first_run(monkeypatch)
    (found,) = figures.measure(
        config, target, targets.devices(target), chunk, ["clients"], seconds=LONGEST
    )
    taken = sum(size for kind, size in found.memory.items() if kind != "device")
    assert found.fits and taken < 4 * 2**30  # of 16 and 15
    assert not found.from_host and not found.float64
