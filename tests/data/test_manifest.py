import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.sources.manifest import manifest_fingerprint, read_manifest
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, normalize_text

soundfile = pytest.importorskip("soundfile")


def tone(seconds, rate, channels=1):
    time = np.arange(int(seconds * rate)) / rate
    samples = 0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(2 * np.pi * 3 * time)
    return np.stack([samples] * channels, axis=1) if channels > 1 else samples


def write_manifest(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def recordings(tmp_path):
    """Good files of every kind, then bad ones; returns the manifest's entries."""
    folder = tmp_path / "clips"
    folder.mkdir()
    kinds = [("a.wav", 8000, 1), ("b.wav", 44100, 2), ("c.flac", 16000, 1), ("d.mp3", 24000, 1)]
    for name, rate, channels in kinds:
        soundfile.write(folder / name, tone(1, rate, channels), rate)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio")
    content = (folder / "c.flac").read_bytes()
    (folder / "cut.flac").write_bytes(content[:30])
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", tone(0.05, 16000), 16000)
    names = [name for name, _, _ in kinds]
    names += ["empty.wav", "text.wav", "cut.flac", "no_samples.wav", "absent.wav"]
    names += ["nan.wav", "short.wav"]
    return [
        {"audio_filepath": f"clips/{name}", "text": "hello", "user": f"user {i % 3}"}
        for i, name in enumerate(names)
    ]


def test_every_format_rate_and_number_of_channels(tmp_path, recordings):
    good = recordings[:4]
    good[1]["audio_filepath"] = str(tmp_path / good[1]["audio_filepath"])  # absolute
    manifest = write_manifest(tmp_path / "m.jsonl", [{**x, "user": "me"} for x in good])
    summary = prepare(read_manifest(manifest), tmp_path / "out", name="x")
    assert summary["utterances"] == 4 and summary["skipped"] == {}
    assert summary["hours"] == pytest.approx(4 / 3600, rel=0.05)
    corpus = open_corpus(tmp_path / "out", "train")
    frames = corpus.lengths(0)["features"]
    assert ((frames >= 98) & (frames <= 106)).all()  # one second; MP3 pads a little
    by_id = sorted(x["audio_filepath"] for x in good)
    features = {
        Path(path).name: x["features"].astype(np.float32)
        for path, x in zip(by_id, corpus.get(0, range(4)), strict=True)
    }
    for name in ("a.wav", "b.wav"):  # the same sound, whatever the file
        inner = np.s_[5:90, 8:18]  # around the tone
        difference = features[name][inner] - features["c.flac"][inner]
        assert np.abs(difference - difference.mean()).mean() < 0.1


def test_broken_recordings_are_counted(tmp_path, recordings):
    manifest = write_manifest(tmp_path / "m.jsonl", recordings)
    summary = prepare(read_manifest(manifest), tmp_path / "out", name="x")
    assert summary["skipped"] == {"non_finite_audio": 1, "too_short": 1, "unreadable_audio": 5}
    assert summary["utterances"] + sum(summary["skipped"].values()) == len(recordings)


def test_fields(tmp_path):
    line = {"audio_filepath": "a.wav", "text": "Hi", "user": 7, "speaker_age": 30, "offset": 0}
    named = {**line, "user": "u", "split": "dev", "id": "mine", "text": ""}
    first, second = read_manifest(write_manifest(tmp_path / "m.jsonl", [line, named]))
    assert (first.id, first.user, first.text, first.split) == ("a.wav", "7", "Hi", None)
    assert (second.id, second.user, second.text, second.split) == ("mine", "u", "", "dev")
    with pytest.raises(soundfile.SoundFileError):
        first.audio()


def test_bad_lines_are_rejected_one_by_one(tmp_path):
    good = {"audio_filepath": "a.wav", "text": "hi", "user": "u"}
    bad = [
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        *(json.dumps({k: v for k, v in good.items() if k != key}).encode() for key in good),
        *(json.dumps({**good, key: None}).encode() for key in good),
        *(json.dumps({**good, key: " "}).encode() for key in ("audio_filepath", "user")),
        json.dumps({**good, "user": True}).encode(),
        json.dumps({**good, "split": "all"}).encode(),
        json.dumps({**good, "split": 3}).encode(),
        json.dumps({**good, "id": 3}).encode(),
        json.dumps({**good, "offset": -1.5}).encode(),
    ]
    line = json.dumps(good).encode()
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + b"\n".join(bad) + b"\n" + line)
    items = list(read_manifest(path))
    rejected = [item for item in items if isinstance(item, Rejected)]
    assert len(items) == len(bad) + 2 and len(rejected) == len(bad)
    assert {item.reason for item in rejected} == {"bad_manifest_line"}
    assert rejected[0].id == "line 4"  # blank lines are counted as lines, not as input
    assert manifest_fingerprint(path)[1] == len(items)


def test_missing_and_empty_manifests(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_manifest(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_manifest(tmp_path))
    for content in ("", "\n \n"):
        (tmp_path / "m.jsonl").write_text(content)
        with pytest.raises(UserError, match="is empty"):
            list(read_manifest(tmp_path / "m.jsonl"))


def test_missing_soundfile_is_not_a_broken_recording(tmp_path, recordings, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    manifest = write_manifest(tmp_path / "m.jsonl", recordings)
    with pytest.raises(UserError, match="install it"):
        prepare(read_manifest(manifest), tmp_path / "out", name="x")


def test_fingerprint_changes_with_the_lines_and_with_the_audio(tmp_path, recordings):
    manifest = write_manifest(tmp_path / "m.jsonl", recordings)
    digest = manifest_fingerprint(manifest)[0]
    assert manifest_fingerprint(manifest)[0] == digest
    clip = tmp_path / "clips" / "a.wav"
    before = clip.stat()
    clip.write_bytes(clip.read_bytes() + b"\0\0")
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    resized = manifest_fingerprint(manifest)[0]
    os.utime(clip, ns=(0, 0))
    touched = manifest_fingerprint(manifest)[0]
    recordings[0]["text"] = "goodbye"
    write_manifest(manifest, recordings)
    assert len({digest, resized, touched, manifest_fingerprint(manifest)[0]}) == 4


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_command_line(tmp_path, recordings):
    manifest = write_manifest(tmp_path / "m.jsonl", recordings)
    arguments = ["--dataset=manifest", f"--source={manifest}", f"--out={tmp_path / 'out'}"]
    first = command(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    (line,) = first.stdout.splitlines()
    summary = json.loads(line)
    assert summary["utterances"] == 4 and summary["users"] == 3
    assert sum(summary["skipped"].values()) == 7
    assert "preparing speech" in first.stderr
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert "unreadable_audio: 5" in again.stdout
    refused = command(*arguments, "--seed=1")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "another corpus" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=foo"], "--dataset=foo"),
        (["--dataset=manifest", "--source=absent", "--out=x"], "cannot be read"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_command_line_mistakes(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_real_recordings(tmp_path):
    data = os.environ.get("FEDASR_TEST_DATA")
    if not data:
        pytest.skip("needs recorded speech: set FEDASR_TEST_DATA to its folder")
    folder = Path(data) / "common_voice" / "en"
    rows = {}
    for split in ("train", "dev", "test"):
        with open(folder / f"{split}.tsv", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows[split] = list(reader)[::5]  # of every reader
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {
                "audio_filepath": str(folder / "clips" / row["path"]),
                "text": row["sentence"],
                "user": row["client_id"],
                "split": split,
            }
            for split in rows
            for row in rows[split]
        ],
    )
    summary = prepare(read_manifest(manifest), tmp_path / "out", name="x")
    given = sum(map(len, rows.values()))
    assert summary["utterances"] + sum(summary["skipped"].values()) == given > 140
    skipped = [json.loads(x)["id"] for x in open(tmp_path / "out" / "skipped.jsonl")]
    assert len(skipped) == sum(summary["skipped"].values())
    for split in rows:
        kept = [r for r in rows[split] if str(folder / "clips" / r["path"]) not in skipped]
        corpus = open_corpus(tmp_path / "out", split)
        counts = Counter(row["client_id"] for row in kept)
        assert dict(zip(corpus.users, corpus.sizes.tolist(), strict=True)) == counts
        user = corpus.users[0]
        texts = sorted(normalize_text(r["sentence"])[0] for r in kept if r["client_id"] == user)
        labels = [example["labels"] for example in corpus.get(0, range(corpus.sizes[0]))]
        assert sorted(CharTokenizer().decode(x) for x in labels) == texts
