"""The command-line contract of experiments.transcribe, experiments.export and hypotheses."""

import json

import pytest


def lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_transcripts_and_hypotheses_agree(finished, recordings, corpus_dir, program, tmp_path):
    """Of a run of six rounds, which writes little; and of its export."""
    workdir, folder = finished[0], recordings.parent
    rows = tmp_path / "hypotheses.jsonl"
    done = program(
        "experiments.evaluate",
        f"--checkpoint={workdir}",
        f"--data={corpus_dir}",
        f"--hypotheses={rows}",
        "--json",
    )
    assert json.loads(lines(done)[-1])["utterances"] == 6
    scored = {}
    for row in map(json.loads, rows.read_text().splitlines()):
        assert row.keys() >= {"user", "utterance", "reference", "hypothesis", "id"}
        scored.setdefault(row["user"], {})[row["id"]] = row["hypothesis"]
    assert {user: len(texts) for user, texts in scored.items()} == {"test 0": 3, "test 1": 3}

    exported = tmp_path / "exported"
    done = program("experiments.export", f"--model={workdir}", f"--out={exported}", "--json")
    files = json.loads(lines(done)[-1])["files"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    card = (exported / "README.md").read_text()
    assert "epsilon" in card and "WER test" in card and str(corpus_dir) not in card

    wavs = sorted(folder.glob("test-*.wav"))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    for model in (workdir, exported):
        flags = (f"--model={model}", "--format=json", f"--data={corpus_dir}")
        done = program("experiments.transcribe", *flags, *wavs, tmp_path / "broken.wav")
        assert done.returncode == 1
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "broken.wav" in error and "Traceback" not in done.stderr
        found = {}
        for row in map(json.loads, done.stdout.splitlines()):
            name = row["file"].split("/")[-1]
            user = name[: len("test-0")].replace("-", " ")
            found.setdefault(user, {})[name] = row["text"]
            assert [word["word"] for word in row["words"]] == row["text"].split()
        assert found == scored


def test_a_folder_into_files(finished, recordings, program, tmp_path):
    out = tmp_path / "out"
    flags = (f"--model={finished[0]}", "--format=srt", f"--out={out}", "--decoder=beam", "--beam=2")
    assert lines(program("experiments.transcribe", *flags, recordings.parent)) == []
    assert len(list(out.iterdir())) == len(list(recordings.parent.glob("*.wav")))
    assert all(path.name.endswith(".wav.srt") for path in out.iterdir())
    done = program("experiments.transcribe", *flags, recordings.parent)
    assert done.returncode == 2 and "is there already" in done.stderr


@pytest.mark.parametrize("name", ["transcribe", "export"])
def test_mistakes_are_one_line(name, finished, program, tmp_path):
    there = str(finished[0])
    cases = {
        "are needed": (),
        "no checkpoint in": (f"--model={tmp_path}", f"--out={tmp_path}/x"),
        "unexpected" if name == "export" else "no such file": (
            f"--model={there}",
            f"--out={tmp_path}/y",
            "nosuch.wav",
        ),
    }
    for match, flags in cases.items():
        extra = (finished[0] / "config.json",) if name == "transcribe" and len(flags) == 2 else ()
        done = program(f"experiments.{name}", *flags, *extra)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert match in error, error
