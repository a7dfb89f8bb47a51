"""One small corpus in every layout is the same corpus; and what each layout cannot use is named."""

import csv
import gzip
import json
import os
import tarfile

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.sources import LAYOUTS, SourceOptions, detect_layout, find_layout
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError
from fedasr.text import tokenizer_for

soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")

RATE = 16000
TEXTS = ["turn on the light", "call my sister", "the boat left", "good day"]


def speech():
    """[(split, user, text, samples int16)]; users are numbers, for LibriSpeech."""
    rng = np.random.default_rng(0)
    made = []
    for user, split in (("101", "train"), ("102", "train"), ("103", "dev"), ("104", "test")):
        for text in TEXTS[: 2 + int(user) % 2]:
            length = int(rng.integers(20000, 32000))
            made.append((split, user, text, rng.integers(-9000, 9000, length).astype(np.int16)))
    return made


def write(path, samples, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE, **options)
    return path


def names():
    """(name of the file, split, user, text, samples)."""
    return [(f"{u}-7-{i:04d}", s, u, t, x) for i, (s, u, t, x) in enumerate(speech())]


def as_manifest(root, kind="jsonl"):
    entries = []
    for name, split, user, text, samples in names():
        write(root / f"clips/{name}.wav", samples)
        entries.append(
            {"audio_filepath": f"clips/{name}.wav", "text": text, "user": user, "split": split}
        )
    if kind == "jsonl":
        (root / "m.jsonl").write_text("".join(json.dumps(x) + "\n" for x in entries))
        return root / "m.jsonl"
    if kind == "json":
        (root / "m.json").write_text(json.dumps(entries, indent=1))
        return root / "m.json"
    if kind == "jsonl.gz":
        with gzip.open(root / "m.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(x) + "\n" for x in entries)
        return root / "m.jsonl.gz"
    path = root / f"m.{kind}"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        writer.writerow(["speaker_id", "path", "sentence", "split"])
        for x in entries:
            writer.writerow([x["user"], x["audio_filepath"], x["text"], x["split"]])
    return path


def as_librispeech(root):
    for name, split, user, text, samples in names():
        folder = root / "LibriSpeech" / split / user / "7"
        write(folder / f"{name}.flac", samples)
        with open(folder / f"{user}-7.trans.txt", "a") as file:
            file.write(f"{name} {text.upper()}\n")
    return root


def as_common_voice(root):
    folder = root / "en"
    for name, split, user, text, samples in names():
        write(folder / "clips" / f"{name}.wav", samples)
        new = not (folder / f"{split}.tsv").exists()
        with open(folder / f"{split}.tsv", "a") as file:
            file.write("client_id\tpath\tsentence\tage\tlocale\n" if new else "")
            file.write(f"{user}\t{name}.wav\t{text}\t\ten\n")
    return folder


def long_recordings(ending, folder_of):
    """One recording for each user, and [(name, split, user, text, path, start, stop)] in it."""
    parts, found = {}, []
    for name, split, user, text, samples in names():
        before = sum(len(x) for x in parts.get(user, []))
        parts.setdefault(user, []).append(samples)
        path = folder_of(split) / f"talk{user}{ending}"
        stop = (before + len(samples)) / RATE
        found.append((name, split, user, text, path, before / RATE, stop))
    for _, _, user, _, path, _, _ in found:
        if not path.exists():
            options = {"format": "NIST"} if ending == ".sph" else {}
            write(path, np.concatenate(parts[user]), **options)
    return found


def as_kaldi(root, segments=True):
    lines = {}

    def add(split, name, line):
        lines.setdefault((split, name), {})[line] = None

    for name, split, user, text, path, start, stop in long_recordings(".wav", lambda s: root / "w"):
        if segments:
            add(split, "segments", f"{user}-{name} talk{user} {start:.6f} {stop:.6f}")
            add(split, "wav.scp", f"talk{user} {path.relative_to(root)}")
        add(split, "text", f"{user}-{name} {text}")
        add(split, "utt2spk", f"{user}-{name} {user}")
        add(split, "spk2gender", f"{user} f")
    if not segments:
        for name, split, user, _, samples in names():
            write(root / "w" / f"{name}.wav", samples)
            add(split, "wav.scp", f"{user}-{name} w/{name}.wav")
    for (split, name), found in lines.items():
        (root / "data" / split).mkdir(parents=True, exist_ok=True)
        (root / "data" / split / name).write_text("".join(f"{line}\n" for line in found))
    return root / "data"


def as_tedlium(root):
    for _, split, user, text, path, start, stop in long_recordings(
        ".sph", lambda split: root / split / "sph"
    ):
        stm = root / split / "stm" / f"talk{user}.stm"
        stm.parent.mkdir(parents=True, exist_ok=True)
        with open(stm, "a") as file:
            file.write(f"{path.stem} 1 {user} {start:.6f} {stop:.6f} <o,f0,male> {text}\n")
    return root


def lhotse_recording(path, seconds):
    source = {"type": "file", "channels": [0], "source": str(path)}
    return {
        "id": path.stem,
        "sources": [source],
        "sampling_rate": RATE,
        "num_samples": round(seconds * RATE),
        "duration": seconds,
    }


def as_lhotse(root, cuts=True):
    found = long_recordings(".flac", lambda split: root / "audio")
    ends = {}
    for _, _, user, _, _, _, stop in found:
        ends[user] = max(ends.get(user, 0), stop)
    files = {}
    for name, split, user, text, path, start, stop in found:
        recording = lhotse_recording(path.relative_to(root), ends[user])
        supervision = {
            "id": name,
            "recording_id": path.stem,
            "start": 0.0 if cuts else start,
            "duration": stop - start,
            "channel": 0,
            "text": text,
            "speaker": user,
            "gender": "female",
        }
        if cuts:
            cut = {"id": f"cut-{name}", "start": start, "duration": stop - start, "channel": 0}
            cut |= {"supervisions": [supervision], "recording": recording, "type": "MonoCut"}
            files.setdefault(f"cuts_{split}.jsonl.gz", {})[json.dumps(cut)] = None
        else:
            files.setdefault(f"recordings_{split}.jsonl.gz", {})[json.dumps(recording)] = None
            files.setdefault(f"supervisions_{split}.jsonl.gz", {})[json.dumps(supervision)] = None
    for name, lines in files.items():
        with gzip.open(root / name, "wt") as file:
            file.writelines(f"{line}\n" for line in lines)
    return root


def as_parquet(root):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is needed to write parquet files")
    from pyarrow import parquet

    rows = {}
    for name, split, user, text, samples in names():
        content = write(root / "made.wav", samples).read_bytes()
        row = {"audio": {"bytes": content, "path": f"{name}.wav"}, "text": text}
        rows.setdefault(split, []).append({**row, "speaker_id": int(user)})
    (root / "data").mkdir()
    (root / "made.wav").unlink()
    for split, found in rows.items():
        table = pyarrow.Table.from_pylist(found)
        parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def as_audiofolder(root):
    for name, split, user, text, samples in names():
        write(root / split / f"{name}.flac", samples)
        with open(root / split / "metadata.jsonl", "a") as file:
            line = {"file_name": f"{name}.flac", "transcription": text, "speaker_id": user}
            file.write(json.dumps(line) + "\n")
    return root


WRITERS = {
    "manifest": as_manifest,
    "manifest json": lambda root: as_manifest(root, "json"),
    "manifest gz": lambda root: as_manifest(root, "jsonl.gz"),
    "manifest csv": lambda root: as_manifest(root, "csv"),
    "manifest tsv": lambda root: as_manifest(root, "tsv"),
    "librispeech": as_librispeech,
    "common_voice": as_common_voice,
    "kaldi": as_kaldi,
    "kaldi whole": lambda root: as_kaldi(root, segments=False),
    "tedlium": as_tedlium,
    "lhotse": as_lhotse,
    "lhotse pairs": lambda root: as_lhotse(root, cuts=False),
    "huggingface": as_parquet,
    "huggingface folder": as_audiofolder,
}


def stored(out):
    """{(split, user, text): features} of a prepared corpus."""
    metadata = read_metadata(out)
    tokenizer = tokenizer_for(metadata)
    found = {}
    for split in metadata["splits"]:
        corpus = open_corpus(out, split)
        for i, user in enumerate(corpus.users):
            for example in corpus.get(i, range(int(corpus.sizes[i]))):
                found[split, user, tokenizer.decode(example["labels"])] = example["features"]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the manifest gives."""
    root = tmp_path_factory.mktemp("expected")
    source = find_layout("manifest").open(as_manifest(root))
    prepare(source, root / "out", name="x", language="en")
    return stored(root / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_one_corpus_in_every_layout(tmp_path, expected, writer):
    assert len(expected) == len(speech())
    root = tmp_path / "in"
    root.mkdir()
    path = WRITERS[writer](root)
    layout = detect_layout(path)
    assert layout.name == writer.split()[0]
    source = layout.open(path)
    assert len(list(source)) == source.total
    assert layout.open(path).fingerprint == source.fingerprint
    summary = prepare(source, tmp_path / "out", name=source.name, notes=source.notes)
    assert summary["skipped"] == {} and summary["notes"] == {}
    found = stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, features in expected.items():
        np.testing.assert_array_equal(found[key], features, str(key))


def test_every_layout_refuses_another_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_bytes(b"\x00\x01")
    for layout in LAYOUTS:
        for path in (tmp_path / "empty", tmp_path / "absent", tmp_path / "text.bin"):
            assert layout.detect(path) is False
            with pytest.raises(UserError) as error:
                list(layout.open(path)) if layout.name != "manifest" else layout.open(path)
                raise UserError("a manifest of bad lines")
            assert "\n" not in str(error.value)


def rejections(source):
    return sorted((x.reason, x.id) for x in source if isinstance(x, Rejected))


def test_kaldi_names_what_it_cannot_use(tmp_path):
    folder = as_kaldi(tmp_path, segments=False) / "train"
    lines = (folder / "wav.scp").read_text().splitlines()
    text = (folder / "text").read_text().splitlines()
    (folder / "wav.scp").write_text(
        "\n".join([*lines, lines[0], "p touch ran |", "q w/q.wav", "r"])
    )
    (folder / "text").write_text("\n".join([*text[1:], "p hi", "q hi", "z no sound"]))
    with open(folder / "utt2spk", "a") as file:
        file.write("p anna\n")
    source = find_layout("kaldi").open(folder)
    assert rejections(source) == [
        ("bad_line", "train/wav.scp line 9"),
        ("duplicate_id", lines[0].split()[0]),
        ("missing_audio", "z"),
        ("missing_transcript", text[0].split()[0]),
        ("missing_user", "q"),
        ("pipe_refused", "p"),
    ]
    assert not (tmp_path / "ran").exists()
    name = lines[1].split()[1]
    (folder / "wav.scp").write_text(f"p cat {tmp_path / name} |\nx false |\n")
    (folder / "text").write_text("p hi\nx hi\n")
    (folder / "utt2spk").write_text("p anna\nx anna\n")
    run, fails = list(find_layout("kaldi").open(folder, SourceOptions(pipes=True)))
    assert run.split is None  # a single directory says no split
    np.testing.assert_array_equal(
        run.audio()[0], soundfile.read(tmp_path / name, dtype="float32")[0]
    )
    with pytest.raises(ValueError, match="exit status 1"):
        fails.audio()


def test_kaldi_segments_must_be_times(tmp_path):
    folder = as_kaldi(tmp_path) / "dev"
    talk = (folder / "wav.scp").read_text().split()[0]
    (folder / "segments").write_text(
        f"a {talk} 0.5 -1\nb {talk} 2 1\nc {talk} x 1\n"
        f"d nowhere 0 1\ne {talk} nan 1\nf {talk} 0 99\n"
    )
    (folder / "text").write_text("".join(f"{id} good day\n" for id in "abcdef"))
    (folder / "utt2spk").write_text("".join(f"{id} u\n" for id in "abcdef"))
    source = find_layout("kaldi").open(folder)
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["utterances"] == 1
    assert summary["skipped"] == {"bad_line": 3, "duration_mismatch": 1, "missing_audio": 1}


def test_tedlium_names_what_it_cannot_use(tmp_path):
    root = as_tedlium(tmp_path)
    (root / "train" / "sph" / "other.sph").write_bytes(b"")
    stm = root / "train" / "stm" / "talk101.stm"
    stm.write_text(
        ";; a comment\n"
        "talk101 1 101 0.0 1.0 <o,f0,male> ignore_time_segment_in_scoring\n"
        "talk101 1 101 1.0 0.5 <o,f0,male> backwards\n"
        "talk101 1 101\n"
        "absent 1 101 0.0 1.0 <o,f0,male> no sound\n"
        "talk101 1 101 0.0 1.2 <o,f0,male> that 's {NOISE} all(2) <unk>\n"
        "talk101 1 101 0.0 1.2 it isn 't\n"
    )
    source = find_layout("tedlium").open(root)
    assert [reason for reason, _ in rejections(source)] == [
        *("bad_line", "bad_line", "missing_audio", "not_transcribed")
    ]
    assert source.notes == {"marks_left_out": 2, "recordings_without_lines": 1}
    texts = [x.text for x in source if not isinstance(x, Rejected) and x.user == "101"]
    assert texts == ["that's all <unk>", "it isn't"]


def test_lhotse_names_what_it_cannot_use(tmp_path):
    root = as_lhotse(tmp_path)
    with gzip.open(root / "cuts_test.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    good = lines[0]
    changes = [
        lambda cut: cut.update(type="MixedCut"),
        lambda cut: cut.pop("recording"),
        lambda cut: cut.update(supervisions=[]),
        lambda cut: cut["supervisions"][0].pop("speaker"),
        lambda cut: cut["supervisions"][0].pop("text"),
        lambda cut: cut["supervisions"][0].update(duration=99),
        lambda cut: cut["recording"].update(transforms=[{"name": "Speed"}]),
        lambda cut: cut["recording"]["sources"][0].update(type="url"),
        lambda cut: cut["recording"]["sources"][0].update(type="command"),
        lambda cut: cut.update(start="soon"),
    ]
    path = root / "bad_cuts.jsonl"
    with open(path, "w") as file:
        for change in changes:
            cut = json.loads(json.dumps(good))
            change(cut)
            file.write(json.dumps(cut) + "\n")
        file.write("{\n[1]\n" + json.dumps(good) + "\n")
    reasons = [reason for reason, _ in rejections(find_layout("lhotse").open(path))]
    assert reasons == [
        *["bad_line"] * 5,
        *["missing_transcript"] * 2,
        *["missing_user", "pipe_refused", "unsupported", "unsupported", "unsupported"],
    ]


def test_huggingface_names_what_it_cannot_use(tmp_path):
    root = as_audiofolder(tmp_path)
    (root / "train" / "stray.flac").write_bytes(b"x")
    with open(root / "train" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "x.flac", "text": "no user"}\n')
    source = find_layout("huggingface").open(root)
    assert [reason for reason, _ in rejections(source)] == ["bad_manifest_line", "unlisted_audio"]


def test_parquet_columns_are_named_by_options(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is needed to write parquet files")
    from pyarrow import parquet

    _, _, user, text, samples = names()[0]
    content = write(tmp_path / "a.wav", samples).read_bytes()
    rows = [
        {"sound": {"bytes": content, "path": None}, "words": text, "who": user, "age": "old"},
        {"sound": {"bytes": None, "path": "a.wav"}, "words": text, "who": user, "age": None},
        {"sound": {"bytes": None, "path": None}, "words": text, "who": user, "age": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    layout = find_layout("huggingface")
    with pytest.raises(UserError, match="--text_key"):
        prepare(layout.open(tmp_path / "train.parquet"), tmp_path / "out", name="x")
    options = SourceOptions(audio_key="sound", text_key="words", user_key="who")
    first, second, third = layout.open(tmp_path / "train.parquet", options)
    assert (first.split, first.user, first.text, first.metadata) == (
        "train",
        user,
        text,
        {"age": "old"},
    )
    np.testing.assert_array_equal(first.audio()[0], second.audio()[0])
    assert third.reason == "bad_manifest_line"
    with pytest.raises(UserError, match="choose one of sound"):
        layout.open(tmp_path / "train.parquet", SourceOptions(audio_key="voice"))
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        layout.open(tmp_path / "train.parquet", options)


# ------------------------------------------------------------------- what is visited, archives


def test_linked_folders_of_librispeech_are_visited(tmp_path):
    root = as_librispeech(tmp_path / "in")
    readers = root / "LibriSpeech" / "train"
    disk = tmp_path / "disk"
    disk.mkdir()
    (readers / "101").rename(disk / "101")
    (readers / "101").symlink_to(disk / "101")
    (readers / "102" / "7").rename(disk / "7")
    (readers / "102" / "7").symlink_to(disk / "7")
    (readers / "loop").symlink_to(readers)
    (readers / "105").symlink_to(tmp_path / "unmounted")
    write(root / "LibriSpeech" / "extra" / "deep" / "a.wav", np.zeros(100))
    source = find_layout("librispeech").open(root)
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["splits"]["train"]["users"] == 2
    assert summary["utterances"] == len(speech())
    assert summary["skipped"] == {"broken_link": 1, "misplaced_audio": 1}
    all_linked = tmp_path / "linked" / "LibriSpeech" / "train"
    all_linked.mkdir(parents=True)
    (all_linked / "101").symlink_to(disk / "101")
    assert len(list(find_layout("librispeech").open(tmp_path / "linked"))) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_read_are_named(tmp_path):
    root = as_librispeech(tmp_path)
    folder = root / "LibriSpeech" / "train" / "101"
    folder.chmod(0)
    try:
        source = find_layout("librispeech").open(root)
        assert ("unreadable_folder", str(folder)) in rejections(source)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("prefix", ["", "./", "cv/en/"])
def test_archives_of_common_voice_with_any_root(tmp_path, prefix):
    folder = as_common_voice(tmp_path / "in")
    archive = tmp_path / "cv.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, f"{prefix}{path.relative_to(folder)}", recursive=False)
    assert detect_layout(archive).name == "common_voice"
    source = find_layout("common_voice").open(archive)
    assert source.language == "en" and source.total == len(speech())
    assert sum(not isinstance(x, Rejected) for x in source) == len(speech())
