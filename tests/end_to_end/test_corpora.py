"""Published corpora as they lie on disk, from the command line to a prepared corpus."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from fedasr.data.records import open_corpus

DEV_CLEAN = ("dev_clean[:4]", "dev_clean[4:]")  # readers


@pytest.fixture(scope="module")
def recorded():
    """The folder of recorded speech."""
    if "FEDASR_TEST_DATA" not in os.environ:
        pytest.skip("needs recorded speech: set FEDASR_TEST_DATA to its folder")
    return Path(os.environ["FEDASR_TEST_DATA"])


def layout(recorded, name):
    folder = recorded / name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


def prepared(program, dataset, source, out, *flags):
    command = [f"--dataset={dataset}", f"--source={source}", f"--out={out}", "--json", *flags]
    done = program("experiments.prepare_data", *command)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def librispeech_files(folder):
    """{(split, user): files}."""
    files = defaultdict(list)
    for path in folder.rglob("*.flac"):
        files[path.parts[-4].replace("-", "_"), path.parts[-3]].append(path)
    return files


def common_voice_files(folder):
    """{(split, user): files}."""
    files = defaultdict(list)
    for split in ("train", "dev", "test"):
        lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        for user, clip, *_ in (line.split("\t") for line in lines):
            files[split, user].append(folder / "clips" / clip)
    return files


def train_and_evaluate(program, tiny_model, data, train, held_out, workdir):
    """A round on the users of `train`, and the error rates of `held_out` by both programs."""
    flags = (
        f"--config.data.dir={data}",
        f"--config.data.train={train}",
        f"--config.data.eval=('{held_out}',)",
        "--config.rounds=1",
        "--config.cohort=2",
        "--config.client.batch_seconds=8",
        "--config.client.steps=2",
        "--config.seed_training.steps=0",
        *tiny_model,
    )
    done = program("experiments.train", *flags, f"--workdir={workdir}", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["status"] == "completed" and summary["invalid_client_updates"] == 0
    flags = (f"--checkpoint={workdir}", f"--data={data}", f"--split={held_out}")
    done = program("experiments.evaluate", *flags, "--json")
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout.splitlines()[-1])
    assert rates["wer"] == summary["wer"][held_out]
    assert rates["utterances"] == open_corpus(data, held_out).sizes.sum()


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["librispeech", "common_voice"])
def test_counts_and_hours_are_those_of_the_files(recorded, program, tiny_model, tmp_path, dataset):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to read recordings")
    source = layout(recorded, dataset)
    if dataset == "librispeech":
        files = librispeech_files(source)
    else:
        files = common_voice_files(source / "en")
    summary = prepared(program, dataset, source, tmp_path / "out")
    assert summary["skipped"] == {}
    assert summary["users"] == len({user for _, user in files})
    assert summary["utterances"] == sum(map(len, files.values()))
    for split, found in summary["splits"].items():
        minutes = {
            user: sum(soundfile.info(path).duration for path in paths) / 60
            for (name, user), paths in files.items()
            if name == split
        }
        assert found["hours"] == pytest.approx(sum(minutes.values()) / 60, abs=1e-5)
        for name, of in {"mean": np.mean, "std": np.std, "min": min, "max": max}.items():
            expected = of(list(minutes.values()))
            assert found["minutes_per_user"][name] == pytest.approx(expected, abs=1e-3)
        corpus = open_corpus(tmp_path / "out", split)
        assert corpus.users == sorted(minutes)
        assert corpus.sizes.tolist() == [len(files[split, user]) for user in corpus.users]
    train, held_out = ("train", "test") if dataset == "common_voice" else DEV_CLEAN
    data, workdir = tmp_path / "out", tmp_path / "run"
    train_and_evaluate(program, tiny_model, data, train, held_out, workdir)


def test_damaged_copies_are_counted_and_named(recorded, program, tmp_path):
    libri, voice = tmp_path / "dev-clean", tmp_path / "en"
    reader = next(layout(recorded, "librispeech").rglob("*.trans.txt")).parent
    shutil.copytree(reader, libri / reader.parent.name / reader.name)
    flacs = sorted(libri.rglob("*.flac"))
    flacs[0].chmod(0o644)
    flacs[0].write_bytes(flacs[0].read_bytes()[: flacs[0].stat().st_size // 2])
    (transcripts,) = libri.rglob("*.trans.txt")
    lines = transcripts.read_text().splitlines(keepends=True)
    there = [line for line in lines if line.split(" ")[0] in {path.stem for path in flacs}]
    lost = next(line for line in there if line.startswith(flacs[1].stem + " "))
    again = next(line for line in there if line.startswith(flacs[2].stem + " "))
    transcripts.chmod(0o644)
    transcripts.write_text("".join([*there, again]).replace(lost, ""))
    summary = prepared(program, "librispeech", libri, tmp_path / "a")
    damage = {"duplicate_id": 1, "missing_transcript": 1, "unreadable_audio": 1}
    assert summary["skipped"] == damage
    assert summary["utterances"] == len(flacs) - 2
    skipped = (tmp_path / "a" / "skipped.jsonl").read_text()
    assert all(path.stem in skipped for path in flacs[:3])

    source = layout(recorded, "common_voice") / "en"
    (voice / "clips").mkdir(parents=True)
    header, *rows = (source / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    clips = [row.split("\t")[1] for row in rows[:5]]
    (voice / "train.tsv").write_text("".join([header, *rows[:5], rows[4]]), encoding="utf-8")
    for clip in clips[2:]:
        shutil.copy(source / "clips" / clip, voice / "clips" / clip)
    (voice / "clips" / clips[1]).touch()
    summary = prepared(program, "common_voice", voice, tmp_path / "b")
    assert summary["skipped"] == {"duplicate_id": 1, "missing_clip": 1, "unreadable_audio": 1}
    assert summary["utterances"] == 3
    skipped = (tmp_path / "b" / "skipped.jsonl").read_text()
    assert all(clip in skipped for clip in (clips[0], clips[1], clips[4]))


@pytest.mark.parametrize("dataset", ["librispeech", "common_voice"])
def test_a_wrong_folder_is_one_line(program, tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    done = program("experiments.prepare_data", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} is not ") and "give the" in line
    assert not (tmp_path / "out").exists()


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


KILLED = """
import os, signal, sys
from fedasr.data.sources.common_voice import CommonVoice
from fedasr.data.preparation.prepare import prepare

def kill(done, total):  # called when the first part is finished
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    voice = CommonVoice(sys.argv[1])
    facts = {key: getattr(voice, key) for key in ("name", "fingerprint", "notes")}
    prepare(voice, sys.argv[2], workers=2, progress=kill, **facts)
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on(recorded, program, program_environment, tmp_path):
    release = layout(recorded, "common_voice") / "en"
    source = tmp_path / "en"
    source.mkdir()
    for name in ("dev.tsv", "test.tsv", "clips"):
        (source / name).symlink_to(release / name)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(source), str(tmp_path / "a")]
    done = subprocess.run(command, env=program_environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "a" / "corpus.json").exists()
    assert list((tmp_path / "a" / ".unfinished" / "parts").glob("*.json"))
    prepared(program, "common_voice", source, tmp_path / "a")
    prepared(program, "common_voice", source, tmp_path / "b", "--workers=1")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.long
def test_scaling_benchmark_prints_its_figures(program, tmp_path):
    flags = ("--users=40", "--cohorts=2,32,64", "--rounds=1", "--chunk=2")
    plot = tmp_path / "plot.png"
    done = program("experiments.benchmarks.scaling", *flags, f"--plot={plot}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["cohort"] for row in found["rows"]] == [2, 32]  # 64 are not there
    assert all(row["round_seconds"] > 0 and row["peak_mb"] > 50 for row in found["rows"])
    # Memory does not grow with the cohort: chunks are streamed.
    assert found["growth"]["40"] < 1.2
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_population_benchmark_prints_its_figures(program):
    flags = ("--users=500", "--cohort=8", "--rounds=1", "--chunk=1", "--json")
    done = program("experiments.benchmarks.population", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    seconds = ("open_seconds", "sample_seconds", "batch_seconds", "round_seconds", "rss_mb")
    assert figures["users"] == 500 and all(figures[key] > 0 for key in seconds)
    parts = figures["sample_seconds"] + figures["batch_seconds"]
    assert figures["share"] == pytest.approx(parts / figures["round_seconds"])
