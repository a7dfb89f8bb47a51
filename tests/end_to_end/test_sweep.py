"""The sweep as a program: a table of real trainings, signals, mistakes."""

import json
import signal
import subprocess
import sys
import time

import pytest

TABLES = """
from fedasr.recipes.tables import Row, Table

TABLES = {
    "tiny": Table(
        name="tiny",
        title="A tiny table",
        config="experiments/configs/quickstart.py",
        rows=(
            Row("quiet", {"rounds": 1}, {"test": 99.0}, start="start"),
            Row("loud", {"rounds": 1, "privacy.sigma": 1e-3}, start="start"),
        ),
        starts=(Row("start", {"rounds": 0}),),
        expected="noise costs something",
        better=(("quiet", "loud"),),
    ),
}
"""
# Ends when it is told to, then when it is launched again.
PATIENT = """
import json, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
def stop(number, frame):
    (workdir / "saved").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
(workdir / "config.json").touch()
if not (workdir / "saved").exists():
    time.sleep(60)
(workdir / "summary.json").write_text(json.dumps({"status": "completed", "wer": {"dev": 1.0}}))
"""


@pytest.mark.long
def test_a_table_of_real_runs(program, tiny_flags, tmp_path):
    (tmp_path / "tables.py").write_text(TABLES)
    fields = [flag.removeprefix("--config.") for flag in tiny_flags]
    fixed = [field for field in fields if not field.startswith("rounds=")]
    out = tmp_path / "out"
    done = program(
        "experiments.sweep",
        "--table=tiny",
        f"--tables={tmp_path / 'tables.py'}",
        f"--set={';'.join(fixed)}",
        f"--out={out}",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["tiny"]
    assert result["runs"] == {"completed": 3, "failed": 0, "missing": 0}
    quiet, loud = result["rows"]
    assert quiet["epsilon"] > loud["epsilon"] > 0
    assert quiet["wer"].keys() == {"dev", "test"}
    assert quiet["difference"]["test"] == quiet["wer"]["test"]["mean"] - 99.0
    assert result["seconds"] > 0
    for kind in ("markdown", "csv", "json", "plot"):
        assert (out / result[kind]).exists()
    start = out / "tiny" / "start__seed-0"
    config = json.loads((out / "tiny" / "loud__seed-0" / "config.json").read_text())
    assert (config["init_from"], config["privacy"]["sigma"]) == (str(start), 1e-3)

    (out / "tiny.md").unlink()
    collected = program("experiments.sweep", f"--out={out}", "--action=collect")
    assert collected.returncode == 0, collected.stderr
    assert collected.stdout.startswith("# A tiny table\n")
    assert "one seed, not judged" in (out / "tiny.md").read_text()
    assert "warning" not in collected.stderr

    # A run of another configuration file is shown, but not without a word.
    record = out / "tiny" / "loud__seed-0" / "sweep.json"
    record.write_text(record.read_text().replace('"config_sha256": "', '"config_sha256": "0'))
    collected = program("experiments.sweep", f"--out={out}", "--action=collect")
    assert "tiny: 1 runs are of another" in collected.stderr
    assert "loud__seed-0" in collected.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs_and_the_same_command_resumes(
    program, program_environment, tmp_path, number
):
    (tmp_path / "patient.py").write_text(PATIENT)
    (tmp_path / "config.py").touch()
    flags = [
        f"--config={tmp_path / 'config.py'}",
        "--grid=server.learning_rate=1,2",
        f"--launcher={sys.executable} {tmp_path / 'patient.py'}",
        f"--out={tmp_path / 'out'}",
        "--jobs=2",
        "--json",
    ]
    runs = [tmp_path / "out" / "config" / f"learning_rate_{n}__seed-0" for n in (1, 2)]
    command = [sys.executable, "-m", "experiments.sweep", *flags]
    with subprocess.Popen(
        command, env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not all((run / "config.json").exists() for run in runs):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert output == "" and "run the same command to go on" in errors
    assert all((run / "saved").exists() for run in runs)

    done = program("experiments.sweep", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["runs"]["completed"] == 2
    assert "[2/2] config/learning_rate_" in done.stderr


def test_a_failed_run_is_status_1(program, tmp_path):
    flags = [
        "--config=quickstart.py",
        f"--launcher={sys.executable} -c 'import sys; sys.exit(\"error: no luck\")'",
        f"--out={tmp_path / 'out'}",
    ]
    listed = program("experiments.sweep", *flags, "--action=list", "--json")
    (command,) = json.loads(listed.stdout)["quickstart"]["commands"]
    folder = tmp_path / "out" / "quickstart" / "quickstart__seed-0"
    assert command[-2:] == [f"--workdir={folder}", "--config.seed=0"]
    checked = program("experiments.sweep", *flags, "--action=list", "--validate")
    assert checked.returncode == 2 and "seed-0: no luck" in checked.stderr
    assert list(tmp_path.iterdir()) == []

    done = program("experiments.sweep", *flags)
    assert done.returncode == 1, done.stderr
    assert "seed 0 failed: no luck" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--table"),
        (["--table=none"], "--table"),
        (["--config=a.py", "--grid=a"], "--grid"),
        (["--config=a.py", "--seeds=x"], "--seeds"),
        (["--config=a.py", "--set=seed=1"], "--set"),
        (["--config=a.py", "--jobs=0"], "jobs"),
        (["--tables=missing.py", "--table=a"], "missing.py"),
        (["--action=collect", "--out=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(program, tmp_path, flags, words):
    done = program("experiments.sweep", *flags, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert list(tmp_path.iterdir()) == []
