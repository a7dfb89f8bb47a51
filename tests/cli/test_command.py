"""The command `fedasr`: its programs, recipes by name, and what stays valid in a clone."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fedasr import recipes
from fedasr.cli import main as command
from fedasr.errors import UserError

ROOT = Path(__file__).parents[2]
SHIMS = {
    "train": "train",
    "evaluate": "evaluate",
    "attack": "attack",
    "compare": "compare",
    "decode": "decode",
    "transcribe": "transcribe",
    "export": "export",
    "prepare_data": "prepare",
    "plan_privacy": "plan",
    "audit_privacy": "audit",
    "sweep": "sweep",
    "fuse": "fuse",
    "benchmarks.compile": "compile",
}
# Reads --config as the programs do, in the folder that is given, and prints what came out.
READ = """
import json, os, sys
from absl import flags
from fedasr.cli import common
from fedasr.training.config import fingerprint, resolve
folder, *texts = sys.argv[1:]
os.chdir(folder)
for text in texts:
    sys.argv = ["program", f"--config={text}", "--config.rounds=7"]
    for name in [name for name in flags.FLAGS if name.startswith("config")]:
        delattr(flags.FLAGS, name)
    values = flags.FLAGS
    common.define_config("quickstart")
    values(sys.argv)
    config = resolve(values.config.to_dict())
    print(config["name"], config["rounds"], fingerprint(config))
"""


def called(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["fedasr", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_what_there_is(monkeypatch, capsys):
    for flag in ("--help", "-h", "help"):
        status, said, _ = called(monkeypatch, capsys, flag)
        assert status == 0
        assert all(name in said for name in (*command.PROGRAMS, *recipes.NAMES))
    status, said, _ = called(monkeypatch, capsys, "--version")
    assert (status, said.split()[0]) == (0, "fedasr")
    for arguments in ((), ("trian",), ("--json",), ("common",), ("main",)):
        status, said, complaint = called(monkeypatch, capsys, *arguments)
        assert status == 2 and not said and complaint.count("\n") == 1
        assert complaint.startswith("error: ") and "train|evaluate|" in complaint


def test_programs_define_no_flags_when_they_are_imported():
    """So that all of them can be: flags of the same names would be refused."""
    code = f"""
import importlib, sys
from absl import flags
from fedasr.cli import common
for name in {list(command.PROGRAMS)}:
    module = importlib.import_module("fedasr.cli." + name)
    assert module.__doc__ and module.main.__doc__, name
print([flag.name for name, found in flags.FLAGS.flags_by_module_dict().items() for flag in found
       if name.startswith("fedasr")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['json']", done.stderr


@pytest.mark.parametrize("shim,name", SHIMS.items())
def test_launchers_in_a_clone(shim, name):
    theirs = importlib.import_module(f"experiments.{shim}")
    ours = importlib.import_module(f"fedasr.cli.{name}")
    assert theirs.main is ours.main
    text = (ROOT / "experiments" / f"{shim.replace('.', '/')}.py").read_text()
    assert 'if __name__ == "__main__":\n    main()\n' in text and len(text.splitlines()) <= 8
    assert set(SHIMS.values()) == command.PROGRAMS.keys()


def test_recipes_are_the_modules_with_a_configuration():
    folder = Path(recipes.__file__).parent
    modules = [
        importlib.import_module(f"fedasr.recipes.{path.stem}") for path in folder.glob("[a-z]*.py")
    ]
    with_config = {
        module.__name__.split(".")[-1] for module in modules if hasattr(module, "get_config")
    }
    assert with_config == set(recipes.NAMES)
    for name in recipes.NAMES:
        shim = importlib.import_module(f"experiments.configs.{name}")
        ours = importlib.import_module(f"fedasr.recipes.{name}")
        assert shim.get_config is ours.get_config


def test_where_a_configuration_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # such as a folder of runs
    (tmp_path / "mine").write_text("")
    file = recipes.locate("rnnt:model=conformer,x=a:b")
    assert Path(file.partition(":")[0]).is_file() and file.endswith("rnnt.py:model=conformer,x=a:b")
    assert Path(recipes.locate("quickstart")).name == "quickstart.py"
    for path in ("a/b.py", "./rnnt", "rnnt.py:model=x", "mine", "mine:x", "", ":x"):
        assert recipes.locate(path) == path
    for wrong in ("rnt", "shared", "published", "tables:x"):
        with pytest.raises(UserError, match="no such recipe: choose one of quickstart, own_speech"):
            recipes.locate(wrong)


def test_names_and_paths_are_the_same_configuration(tmp_path):
    """And so the same work directory, whichever way it is named and wherever from."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    pairs = [
        ("quickstart", "experiments/configs/quickstart.py"),
        ("rnnt:model=conformer", "experiments/configs/rnnt.py:model=conformer"),
        ("large_asr:size=small,cohort=16", "experiments/configs/large_asr.py:size=small,cohort=16"),
        ("mini", str(ROOT / "experiments" / "configs" / "mini.py")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), *(text for pair in pairs for text in pair)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(pairs), done.stderr
    assert lines[::2] == lines[1::2] and len(set(lines)) == len(pairs)
    assert all(line.split()[1] == "7" for line in lines)


@pytest.mark.parametrize(
    "config,message",
    [
        ("rnt", "--config=rnt: there is no such recipe: choose one of quickstart,"),
        ("rnnt:model=lstm", "--config: model='lstm': choose one of transformer, conformer"),
        ("rnnt:modl=conformer", "--config: no argument 'modl=conformer'; it takes model"),
        ("librispeech:cohort=many", "--config: cohort='many' is not of type int"),
        ("nowhere.py", "--config: [Errno 2] No such file or directory: 'nowhere.py'"),
    ],
)
def test_a_mistaken_configuration_is_one_line(config, message):
    done = subprocess.run(
        [sys.executable, "-m", "fedasr", "train", f"--config={config}", "--dry_run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_help_is_the_program_s_own():
    for command_line in (("-m", "fedasr", "plan"), ("-m", "experiments.plan_privacy")):
        done = subprocess.run(
            [sys.executable, *command_line, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        module = importlib.import_module("fedasr.cli.plan")
        assert done.stdout.startswith(module.__doc__.splitlines()[0])
        for flag in ("--target_epsilon", "--[no]json", "--population"):
            assert flag in done.stdout


def test_two_runs_are_compared(monkeypatch, capsys, tmp_path):
    from absl import flags

    from fedasr.evaluation.hypotheses import Hypothesis, write_hypotheses

    for name, heard in (("a", "one two"), ("b", "one")):
        (tmp_path / name).mkdir()
        found = [Hypothesis("test", user, 0, "one two", heard) for user in ("u", "v")]
        write_hypotheses(tmp_path / name / "hypotheses.jsonl", found)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]

    def compared(*arguments):
        for flag in ("split", "report"):
            if flag in flags.FLAGS:
                delattr(flags.FLAGS, flag)
        return called(monkeypatch, capsys, "compare", *arguments)

    status, said, _ = compared(*both)
    assert status == 0 and "0 users gain, 2 lose" in said
    for arguments, why in (
        (both[:1], "give two runs"),
        ([*both, "--split=dev"], "has test"),
        ([both[0], str(tmp_path / "no")], "--hypotheses=FILE"),
    ):
        status, said, complaint = compared(*arguments)
        assert status == 2 and not said and why in complaint and complaint.count("\n") == 1


def test_attacks_are_told_and_kept(monkeypatch, capsys, tmp_path):
    """Without a model: which attacks are tried, what is written, and the exit status."""
    import json

    from absl import flags

    from fedasr import attacks
    from fedasr.attacks.results import Result
    from fedasr.cli import attack, common
    from fedasr.training.config import Config

    seen = []

    def tried(target, settings):
        seen.append(settings)
        return [
            Result(
                "names", f"noise {z}", 0.9, 10, (0.6, 1.0), 0.1, 0.5 if z else 1.0, z, 1.0, 0.1, ""
            )
            for z in settings.noise
        ]

    config = Config()
    target = attacks.Target(config, None, None, None, ())
    monkeypatch.setattr(attacks, "load_target", lambda workdir: target)
    monkeypatch.setitem(attacks.ATTACKS, "names", tried)
    monkeypatch.setattr(common, "configure_compilation", lambda folder: None)
    (tmp_path / "attacks.json").write_text(
        json.dumps({"results": [{"attack": "names"}, {"attack": "speaker"}]})
    )

    def attacked(*arguments):
        for flag in ("workdir", "attacks", "noise", "users", "draws", "rounds", "shadows",
                     "candidates", "seed"):  # fmt: skip
            if flag in flags.FLAGS:
                delattr(flags.FLAGS, flag)
        return called(monkeypatch, capsys, "attack", *arguments)

    workdir = f"--workdir={tmp_path}"
    status, said, _ = attacked(workdir, "--attacks=names", "--noise=0", "--users=3")
    assert status == 0 and "90.0%" in said and seen[-1].users == 3
    kept = json.loads((tmp_path / "attacks.json").read_text())["results"]
    assert [row["attack"] for row in kept] == ["speaker", "names"]
    assert "Attacks" in (tmp_path / "report.html").read_text()
    status, _, complaint = attacked(workdir, "--attacks=names")
    assert seen[-1].noise == attack.noise_of(config)
    assert seen[-1].noise[1] == pytest.approx(config.privacy.sigma * config.cohort, rel=1e-3)
    assert status == 1 and "less privacy than it says" in complaint  # 0.6 above 0.5
    for arguments, why in (
        ((), "--workdir is needed"),
        ((workdir, "--attacks=guess"), "there are speaker"),
        ((workdir, "--noise=much"), "must be numbers"),
        ((workdir, "--noise=-1"), "must be numbers"),
    ):
        status, _, complaint = attacked(*arguments)
        assert status == 2 and why in complaint and complaint.count("\n") == 1
