"""sdist and wheel: what they hold, and the programs of a wheel far from any clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="70.1", reason="building needs setuptools")

ROOT = Path(__file__).parents[2]
TINY = (
    "--config=quickstart",
    "--config.model.options.dim=16",
    "--config.model.options.blocks=1",
    "--config.model.options.heads=2",
    "--config.rounds=1",
    "--config.cohort=2",
)
BUILD = """
import setuptools.build_meta as build
build.build_wheel("dist"), build.build_sdist("dist")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tracked files in which wheel and sdist were built: (wheel, sdist)."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("fedasr", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel, installed for itself: (folder, run), run(program, *flags) -> CompletedProcess."""
    folder = tmp_path_factory.mktemp("site")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(folder), str(built[0])], capture_output=True, text=True
    )
    if "No module named pip" in done.stderr:
        with zipfile.ZipFile(built[0]) as wheel:
            wheel.extractall(folder)
    else:
        assert done.returncode == 0, done.stderr

    def run(program, *flags):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-P", "-m", "fedasr", program, *map(str, flags)]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True
        )

    return folder, run


@pytest.mark.slow
def test_what_is_in_them(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "fedasr = fedasr.cli.main:main" in archive.read(entry).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedasr"}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "fedasr").rglob("*.py")}
    assert {"fedasr/py.typed", *tracked} <= set(names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "fedasr/py.typed", *tracked} <= held


@pytest.mark.slow
def test_programs_run_far_from_a_clone(installed, recordings):
    folder, run = installed
    listed = run("--help")
    assert listed.returncode == 0 and "rnnt" in listed.stdout
    looked = run("prepare", f"--inspect={recordings}", "--json")
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout.splitlines()[-1])
    assert found["users"] == 12 and found["command"].startswith("fedasr prepare ")
    made = run("prepare", "--dataset=manifest", f"--source={recordings}", "--out=mine", "--json")
    assert made.returncode == 0, made.stderr
    planned = run("train", *TINY, "--config.data.dir=mine", "--dry_run", "--json")
    assert planned.returncode == 0, planned.stderr
    summary = json.loads(planned.stdout.splitlines()[-1])
    assert summary["parameters"] > 0 and summary["population"] == 6
    swept = run("sweep", "--table=mini_optimizers", "--action=list")
    assert swept.returncode == 0 and "fedasr train --config=mini " in swept.stdout
    code = "import fedasr; print(fedasr.__file__)"
    where = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(folder)
