"""The privacy planner as a program."""

import json


def test_the_program(program, tmp_path):
    flags = ("--cohort=512,1024", "--population=1e6,2e6", "--rounds=100", "--delta=1e-7")
    plot = tmp_path / "plan.png"
    done = program("experiments.plan_privacy", *flags, "--sigma=1e-3", f"--plot={plot}", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(r["cohort"], r["population"]) for r in rows] == [
        (512, 1_000_000),
        (512, 2_000_000),
        (1024, 1_000_000),
        (1024, 2_000_000),
    ]
    assert rows[0]["epsilon"] > rows[1]["epsilon"]
    assert plot.read_bytes().startswith(b"\x89PNG")

    summary = {
        "rounds": 100,
        "wer": {"test": 9.5},
        "privacy": {"enabled": True, "sigma": 1e-3, "delta": 1e-7},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    done = program(
        "experiments.plan_privacy", f"--workdir={tmp_path}", "--target_epsilon=3", "--cohort=1024"
    )
    assert done.returncode == 0, done.stderr
    assert "1,024" in done.stdout and "9.5" in done.stdout
    summary["privacy"]["noise"] = "banded, 8 bands"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    done = program("experiments.plan_privacy", f"--workdir={tmp_path}", "--target_epsilon=3")
    assert done.returncode == 2 and "independent noise" in done.stderr
    done = program("experiments.plan_privacy", "--workdir=nowhere")
    assert done.returncode == 2 and "no finished run" in done.stderr
