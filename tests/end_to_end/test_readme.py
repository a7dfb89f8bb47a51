"""Every command and snippet of README.md works."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "--config.rounds": 1,
    "--config.cohort": 2,
    "--config.client.steps": 1,
    "--config.client.batch_size": 2,
    "--config.seed_training.steps": 0,
    "--config.evaluation.every": 0,
    "--config.model.options.dim": 16,
    "--config.model.options.blocks": 1,
    "--config.model.options.heads": 2,
    "--config.model.options.mlp": 16,
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def console_lines():
    return [line for block in blocks("console") for line in block.splitlines() if line]


def extras(command):
    return [name for found in re.findall(r"\.\[([\w,]+)\]", command) for name in found.split(",")]


@pytest.fixture(scope="module")
def defined_extras():
    import setuptools

    patch = pytest.MonkeyPatch()
    called = {}
    patch.setattr(setuptools, "setup", lambda **arguments: called.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    patch.undo()
    return called["extras_require"]


def test_exactly_two_commands(defined_extras):
    train, test = blocks("bash")
    assert train.count("\n") == test.count("\n") == 1
    for command, module in ((train, "experiments.train"), (test, "pytest")):
        parts = [shlex.split(part) for part in command.split("&&")]
        assert parts[0][1:3] == ["-m", "venv"]
        environment = parts[0][-1]
        assert parts[1][:2] == [f"{environment}/bin/pip", "install"]
        assert parts[2][:3] == [f"{environment}/bin/python", "-m", module]
    assert extras(train) == ["quickstart"]
    assert extras(test) == ["test"]
    assert {"quickstart", "test"} <= defined_extras.keys()


def test_every_installation_names_extras_that_exist(defined_extras):
    named = [
        extra for line in README.splitlines() if "pip install" in line for extra in extras(line)
    ]
    assert {"quickstart", "cuda"} <= set(named)
    assert set(named) <= defined_extras.keys()


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert "docs/quickstart.png" in pictures
    for picture in pictures:
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_python_snippets_run_in_order():
    namespace = {"__name__": "readme"}
    snippets = blocks("python")
    assert len(snippets) >= 3
    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), namespace)


def test_console_lines_are_installations_or_programs():
    programs = {line.split()[2] for line in console_lines() if line.startswith("python -m ")}
    assert programs == {
        "experiments.prepare_data",
        "experiments.train",
        "experiments.evaluate",
        "experiments.sweep",
        "experiments.plan_privacy",
        "experiments.audit_privacy",
        "experiments.benchmarks.memory",
    }
    for line in console_lines():
        assert line.startswith(("python -m experiments.", "pip install "))


@pytest.mark.slow
def test_programs_run(program, recordings, tmp_path):
    """In the order of the README, in one folder; what takes time is made smaller."""
    lines = [json.loads(line) for line in recordings.read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = str(recordings.parent / line["audio_filepath"])
        del line["split"]
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    small = [f"{key}={value}" for key, value in SMALL.items()]  # the last value of a flag counts
    variations = []  # flags of the lines that change the quickstart
    for line in console_lines():
        if not line.startswith("python -m experiments."):
            continue
        module, *flags = shlex.split(line)[2:]
        expected = 0
        if "--dataset=librispeech" in flags or "--dataset=common_voice" in flags:
            # Tested with recorded speech in test_corpora.py; here there is none to prepare.
            expected = 2
        elif module == "experiments.sweep" and "--action" not in line:
            flags.append("--action=list")  # what would be run: the runs themselves take minutes
        elif module == "experiments.benchmarks.memory":
            flags += ["--size=small", "--methods=all together", "--plot=memory.png"]
        elif module == "experiments.audit_privacy":
            flags.append("--trials=2")
        elif module == "experiments.train" and "--dry_run" not in flags:
            if any(flag.startswith("--workdir=") for flag in flags):
                flags += small
            else:  # checked as it is, then run small with the others
                variations += flags
                flags.append("--dry_run")
        done = program(module, *flags, cwd=tmp_path)
        assert done.returncode == expected, f"{line}\n{done.stderr}"
        source = next((flag.split("=")[1] for flag in flags if flag.startswith("--source=")), "")
        assert done.stdout if expected == 0 else source in done.stderr
    flags = [*variations, *small, "--config.data.dir=data/mine", "--workdir=runs/varied"]
    done = program("experiments.train", *flags, cwd=tmp_path)
    assert variations and done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "mine").is_dir()
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
