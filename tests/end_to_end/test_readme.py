"""Every command and snippet of README.md and of the documentation works.

What a block is called says how it is tested: `console` is run, made small, or dry-run; of `bash`
and README's `sh`, which take long or need what is not here, each program's own flags are parsed,
and so are those of commands within a sentence; `python` is run. README's two `bash` blocks are what
a newcomer runs.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "BUILD_NOTES.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
SMALL = {
    "--config.rounds": 1,
    "--config.cohort": 2,
    "--config.client.steps": 1,
    "--config.client.batch_size": 2,
    "--config.seed_training.steps": 0,
    "--config.evaluation.every": 0,
    "--config.selection.split": "",
    "--config.selection.patience": 0,
    "--config.model.options.dim": 16,
    "--config.model.options.blocks": 1,
    "--config.model.options.heads": 2,
    "--config.model.options.mlp": 16,
}
# Other programs than ours, as a contributor starts them.
TOOLS = {
    "python -m fedasr.recipes.fidelity",  # its page is compared in test_fidelity.py
    "ruff check . && ruff format .",
    "mkdocs build --strict",
    "pre-commit install",
}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines_of(language, pages=PAGES):
    """Commands of all blocks of a language, once each: {command: page where it stands first}."""
    found = {}
    for page, text in pages.items():
        for block in blocks(language, text):
            for line in block.replace("\\\n", " ").splitlines():
                if line:
                    found.setdefault(line, page)
    return found


def sentences(text):
    """The text without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_commands():
    """Commands within a sentence; what stands for a number becomes one."""
    found = {}
    for page, text in PAGES.items():
        for command in re.findall(r"`(python -m [^`]+)`", sentences(text)):
            command = re.sub(r"[\[\]]", "", " ".join(command.split()))
            if "experiments.PROGRAM" not in command:  # any of them
                found.setdefault(re.sub(r"=N\b", "=1", command), page)
    return found


def extras(command):
    named = re.findall(r"(?:\.|fedasr)\[([\w,]+)\]", command)
    return [name for found in named for name in found.split(",")]


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
    named = {
        extra
        for text in PAGES.values()
        for line in text.splitlines()
        if "pip install" in line
        for extra in extras(line)
    }
    assert {"quickstart", "cuda", "fusion", "neural", "docs"} <= named
    assert named <= defined_extras.keys()


def test_pictures_exist():
    shown = {
        (ROOT / page).parent / picture
        for page, text in PAGES.items()
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    }
    assert ROOT / "docs" / "quickstart.png" in shown
    for picture in shown:
        assert picture.read_bytes().startswith(b"\x89PNG"), picture


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks("python", text)])
def test_python_snippets_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for number, snippet in enumerate(blocks("python", PAGES[page]), 1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), namespace)


def test_console_lines_are_installations_or_programs():
    lines = lines_of("console")
    programs = {line.split()[2] for line in lines if line.startswith("python -m ")}
    assert programs == {
        "experiments.prepare_data",
        "experiments.train",
        "experiments.evaluate",
        "experiments.sweep",
        "experiments.plan_privacy",
        "experiments.audit_privacy",
        "experiments.benchmarks.memory",
    }
    for line in lines:
        assert line.startswith(("python -m experiments.", "pip install ")), line


def environment():
    """Of a subprocess that imports this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def is_program(command):
    return command.startswith("python -m experiments.")


def test_other_commands_are_known():
    """Of `bash` blocks: installations as in README, runs of tests, tools of contributors."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    markers = {text.split(":")[0] for text in settings["ini_options"]["markers"]}
    newcomers = {block.strip() for block in blocks("bash")}
    for command, page in (lines_of("bash") | lines_of("sh") | inline_commands()).items():
        command = command.partition("  #")[0].strip()
        if command.startswith("python -m pytest"):
            words = iter(shlex.split(command)[3:])
            for word in words:
                if word == "-m":
                    named = set(re.findall(r"\w+", next(words))) - {"and", "or", "not"}
                    assert named <= markers, f"{page}: {command}"
                elif word == "-n":
                    assert next(words).isdigit(), f"{page}: {command}"
                else:
                    assert (ROOT / word.partition("::")[0]).exists(), f"{page}: {command}"
        elif not is_program(command):
            known = command in newcomers | TOOLS or command.startswith("pip install -e '.[")
            assert known, f"{page}: {command}"


def taken(commands):
    """[status, errors] of each command: 0 where the program has all of the flags."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("parsing.py")],
        input=json.dumps([shlex.split(command)[2:] for command in commands]),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


MISSPELT = [
    "python -m experiments.train --dry_runs",
    "python -m experiments.train --config.client.stepz=8",
    "python -m experiments.train --config.client.steps=-8",
    "python -m experiments.train --config=experiments/configs/no_such_file.py",
    "python -m experiments.train dry_run",
    "python -m experiments.fuse --evaluations=many",
    "python -m experiments.no_such_program",
]


def test_programs_take_the_flags():
    """A misspelt flag, field or program anywhere in the documentation is found here."""
    commands = lines_of("bash") | lines_of("sh") | inline_commands() | lines_of("console")
    commands = {command: page for command, page in commands.items() if is_program(command)}
    assert len(commands) > 40
    found = taken([*commands, *MISSPELT])
    assert len(found) == len(commands) + len(MISSPELT)
    for (command, page), (status, errors) in zip(commands.items(), found, strict=False):
        assert status == 0, f"{page}: {command}\n{errors}"
    for command, (status, _) in zip(MISSPELT, found[len(commands) :], strict=True):
        assert status != 0, command


def test_fields_and_flags_within_sentences_exist():
    from fedasr.fields import flatten
    from fedasr.training.config import fields

    declared = flatten(fields())
    sources = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "fedasr").rglob("*.py")]
    names = {"config", "help"}
    for source in sources:
        names |= set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source.read_text(encoding="utf-8")))
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`]+)`", sentences(text)):
            for path in re.findall(r"--config\.([\w.]+)", code):
                known = path in declared or path.rpartition(".")[0] in declared
                assert known or path.startswith("section."), f"{page}: {code}"
            if not code.startswith(("mkdocs", "pytest", "python -m pytest")):
                for name in re.findall(r"(?<!\S)--(\w+)", code):
                    assert name in names, f"{page}: {code}"


@pytest.mark.slow
def test_programs_run(program, recordings, tmp_path):
    """In the order of the pages, in one folder; what takes time is made smaller."""
    lines = [json.loads(line) for line in recordings.read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = str(recordings.parent / line["audio_filepath"])
        del line["split"]
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    small = [f"{key}={value}" for key, value in SMALL.items()]  # the last value of a flag counts
    variations = []  # flags of the lines that change the quickstart
    for line in lines_of("console"):
        if not is_program(line):
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
                if not any(flag.startswith("--config.algorithm=") for flag in flags):
                    variations += flags  # another algorithm is none of many changes
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
