import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.sources.librispeech import LibriSpeech
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError

soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")

READERS = {"dev-clean": ["84", "174"], "train-clean-100": ["84", "1034"]}


@pytest.fixture
def libri(tmp_path):
    """A LibriSpeech folder: two subsets of two readers with two recordings each."""
    rng = np.random.default_rng(0)
    root = tmp_path / "LibriSpeech"
    for chapter, (subset, readers) in enumerate(READERS.items(), start=10):
        for reader in readers:
            folder = root / subset / reader / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for i in range(2):
                id = f"{reader}-{chapter}-{i:04d}"
                soundfile.write(folder / f"{id}.flac", rng.uniform(-0.5, 0.5, 8000), 16000)
                lines.append(f"{id} GOOD DAY\n")
            (folder / f"{reader}-{chapter}.trans.txt").write_text("".join(lines))
    (root / "SPEAKERS.TXT").write_text("; of no interest\n")
    return root


def packed(root, subset, out):
    out.mkdir(exist_ok=True)
    with tarfile.open(out / f"{subset}.tar.gz", "w:gz") as archive:
        archive.add(root / subset, f"LibriSpeech/{subset}")
        archive.add(root / "SPEAKERS.TXT", "LibriSpeech/SPEAKERS.TXT")
    return out / f"{subset}.tar.gz"


def counts(source):
    items = list(source)
    assert len(items) == source.total
    return Counter(item.reason if isinstance(item, Rejected) else item.split for item in items)


def test_every_way_to_name_it(tmp_path, libri, monkeypatch):
    everything = {"dev_clean": 4, "train_clean_100": 4}
    assert counts(LibriSpeech(libri)) == counts(LibriSpeech(libri.parent)) == everything
    assert counts(LibriSpeech(libri / "dev-clean")) == {"dev_clean": 4}
    monkeypatch.chdir(libri / "dev-clean")
    assert counts(LibriSpeech(".")) == {"dev_clean": 4}
    archives = tmp_path / "archives"
    assert counts(LibriSpeech(packed(libri, "dev-clean", archives))) == {"dev_clean": 4}
    packed(libri, "train-clean-100", archives)
    assert counts(LibriSpeech(archives)) == everything
    item = next(iter(LibriSpeech(libri)))
    assert (item.id, item.user, item.text) == ("174-10-0000", "174", "GOOD DAY")


def test_archives_give_the_same_corpus_as_folders(tmp_path, libri):
    for subset in READERS:
        packed(libri, subset, tmp_path / "archives")
    opened = []
    for name, path in (("f", libri), ("a", tmp_path / "archives")):
        source = LibriSpeech(path)
        prepare(source, tmp_path / name, name=source.name, fingerprint=source.fingerprint)
        opened.append(open_corpus(tmp_path / name, "dev_clean+train_clean_100"))
    assert opened[0].users == opened[1].users == ["1034", "174", "84"]
    for user, size in enumerate(opened[0].sizes):
        for a, b in zip(*(corpus.get(user, range(size)) for corpus in opened), strict=True):
            np.testing.assert_array_equal(a["features"], b["features"])
    assert read_metadata(tmp_path / "f")["summary"] == read_metadata(tmp_path / "a")["summary"]


@pytest.mark.parametrize("archived", [False, True])
def test_damage_is_counted_and_named(tmp_path, libri, archived):
    dev = libri / "dev-clean"
    flac = dev / "174" / "10" / "174-10-0000.flac"
    flac.write_bytes(flac.read_bytes()[:-4000])
    (dev / "174" / "10" / "174-10-0001.flac").unlink()
    transcripts = dev / "84" / "10" / "84-10.trans.txt"
    transcripts.write_bytes(b"84-10-0001 GOOD DAY\n84-10-0001 BAD DAY\n\xff\xfe\n\n")
    (dev / "84" / "11").mkdir()
    shutil.copy(dev / "84" / "10" / "84-10-0001.flac", dev / "84" / "11")
    shutil.copy(dev / "84" / "10" / "84-10-0001.flac", dev / "84" / "11" / "7-11-0001.flac")
    (dev / "84" / "11" / "._84-10-0001.flac").touch()  # macOS
    clean = libri / "train-clean-100" / "84" / "11"
    shutil.copy(dev / "84" / "10" / "84-10-0001.flac", clean)
    with open(clean / "84-11.trans.txt", "a") as file:
        file.write("84-10-0001 GOOD DAY\n")
    source = LibriSpeech(packed(libri, "dev-clean", tmp_path / "a") if archived else libri)
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["skipped"] == {
        "bad_transcript_line": 1,
        # a second line, a second file, and (from the folder) once more in another split
        "duplicate_id": 2 if archived else 3,
        "misplaced_audio": 1,
        "missing_audio": 1,
        "missing_transcript": 1,
        "unreadable_audio": 1,
    }
    assert summary["utterances"] + sum(summary["skipped"].values()) == source.total
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text()
    for name in ("174-10-0000", "174-10-0001", "84-10-0000", "7-11-0001", "84-10.trans.txt line 3"):
        assert f'"{name}"' in skipped


def test_folders_that_are_something_else(tmp_path, libri):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar.gz").write_text("no archive")
    for path in (tmp_path / "empty", tmp_path / "absent", libri / "dev-clean" / "84"):
        with pytest.raises(UserError, match="is not LibriSpeech: give the LibriSpeech folder") as e:
            LibriSpeech(path)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="damaged or incomplete"):
        LibriSpeech(tmp_path / "text.tar.gz")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.9999])
def test_a_truncated_archive_is_said(tmp_path, libri, share):
    archive = packed(libri, "dev-clean", tmp_path)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged or incomplete"):
        list(LibriSpeech(archive))


def test_the_fingerprint_is_of_the_contents(tmp_path, libri):
    before = LibriSpeech(libri).fingerprint
    assert LibriSpeech(libri.parent).fingerprint == before
    moved = shutil.copytree(libri, tmp_path / "moved" / "LibriSpeech")
    assert LibriSpeech(moved).fingerprint == before
    (libri / "dev-clean" / "84" / "10" / "84-10.trans.txt").write_text("84-10-0000 OTHER WORDS\n")
    assert LibriSpeech(libri).fingerprint != before
