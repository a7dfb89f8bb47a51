import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.sources.common_voice import CommonVoice
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError
from fedasr.text import tokenizer_for

soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")

HEADER = "client_id\tpath\tsentence\tup_votes\tlocale\n"


def row(user, clip, sentence="Guten Tag", locale="de"):
    return f"{user}\t{clip}\t{sentence}\t2\t{locale}\n"


@pytest.fixture
def release(tmp_path):
    """A release with one language: two users in train, one each in dev and test."""
    folder = tmp_path / "cv-corpus-13.0" / "de"
    (folder / "clips").mkdir(parents=True)
    rng = np.random.default_rng(0)
    users = {"train": ["anna", "bert"], "dev": ["carl"], "test": ["dora"]}
    for split, names in users.items():
        lines = [HEADER]
        for name in names:
            for i in range(2):
                clip = f"{name}_{i}.mp3"
                samples = rng.uniform(-0.5, 0.5, 36000)
                soundfile.write(folder / "clips" / clip, samples, 24000)
                lines.append(row(name, clip, 'Sie sagte: "Süße Grüße'))  # a lone quotation mark
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def packed(folder, out):
    with tarfile.open(out, "w:gz") as archive:
        archive.add(folder, f"cv-corpus-13.0/{folder.name}")
    return out


def counts(source):
    items = list(source)
    assert len(items) == source.total
    return Counter(item.reason if isinstance(item, Rejected) else item.split for item in items)


def test_every_way_to_name_it(tmp_path, release):
    archive = packed(release, tmp_path / "cv.tar.gz")
    for path in (release, release.parent, archive):
        for language in (None, "de"):
            source = CommonVoice(path, language)
            assert counts(source) == {"train": 4, "dev": 2, "test": 2}
            assert (source.language, source.name, source.notes) == ("de", "Common Voice de", {})
    items = {item.id: item for item in CommonVoice(release)}
    assert items["bert_1.mp3"].user == "bert"
    assert items["bert_1.mp3"].text == 'Sie sagte: "Süße Grüße'


def test_the_language_must_be_clear(tmp_path, release):
    shutil.copytree(release, release.parent / "xy")
    with pytest.raises(UserError, match=r"which language.*de, xy"):
        CommonVoice(release.parent)
    with pytest.raises(UserError, match=r"no language 'fr'.*de, xy"):
        CommonVoice(release.parent, "fr")
    assert CommonVoice(release.parent, "de").language == "de"
    with pytest.raises(UserError, match="holds 'de', not the language 'fr'"):
        CommonVoice(release, "fr")


def test_archive_and_folder_give_the_same_corpus(tmp_path, release):
    archive = packed(release, tmp_path / "cv.tar.gz")
    opened = []
    for name, path in (("f", release), ("a", archive)):
        source = CommonVoice(path)
        prepare(source, tmp_path / name, name="x", language="de", keep_letters=True)
        opened.append(open_corpus(tmp_path / name, "train"))
    assert opened[0].users == opened[1].users == ["anna", "bert"]
    for a, b in zip(*(corpus.get(0, [0, 1]) for corpus in opened), strict=True):
        np.testing.assert_array_equal(a["features"], b["features"])
    labels = opened[0].get(0, [0])[0]["labels"]
    text = tokenizer_for(read_metadata(tmp_path / "f")).decode(labels)
    assert text == "sie sagte süße grüße"


@pytest.mark.parametrize("archived", [False, True])
def test_damage_is_counted_and_named(tmp_path, release, archived):
    clips = release / "clips"
    (clips / "anna_0.mp3").write_bytes(b"")
    content = (clips / "anna_1.mp3").read_bytes()
    (clips / "anna_1.mp3").write_bytes(content[: len(content) // 2])
    (clips / "carl_0.mp3").unlink()
    for name in ("extra", "other", "carl_2"):
        shutil.copy(clips / "bert_0.mp3", clips / f"{name}.mp3")
    (release / "validated.tsv").write_text(HEADER + row("otto", "other.mp3"))
    (release / "clip_durations.tsv").write_text("clip\tduration[ms]\nextra.mp3\t500\n")
    with open(release / "train.tsv", "ab") as file:
        file.write(row("bert", "bert_0.mp3").encode())  # twice in train
        file.write(b"bert\tcarl_2.mp3\ttoo few columns\n")
        file.write(row("", "carl_2.mp3").encode())
        file.write(row("bert", "").encode())
        file.write(row("bert", "../de/clips/bert_0.mp3").encode())
        file.write(b"bert\t\xff\xfe.mp3\ta\t2\tde\n")
    with open(release / "test.tsv", "a") as file:
        file.write(row("dora", "bert_1.mp3"))  # of train
        file.write(row("dora", "never.mp3"))
    source = CommonVoice(packed(release, tmp_path / "cv.tar.gz") if archived else release)
    summary = prepare(source, tmp_path / "out", name="x", language="de", notes=source.notes)
    assert summary["skipped"] == {
        "duplicate_id": 2,
        "malformed_row": 5,
        "missing_clip": 2,
        "unreadable_audio": 2,
    }
    assert summary["notes"] == {"unlisted_clips": 1}  # extra.mp3
    assert summary["utterances"] == 5
    assert summary["utterances"] + sum(summary["skipped"].values()) == source.total
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text()
    for name in ("anna_0.mp3", "anna_1.mp3", "carl_0.mp3", "never.mp3", "train.tsv line 7"):
        assert f'"{name}"' in skipped


def test_windows_line_ends_and_missing_splits(release):
    for split in ("train", "dev"):
        path = release / f"{split}.tsv"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    (release / "test.tsv").unlink()
    source = CommonVoice(release)
    assert counts(source) == {"train": 4, "dev": 2}
    assert source.notes == {"unlisted_clips": 2} and source.language == "de"


def test_folders_that_are_something_else(tmp_path, release):
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.add(release / "train.tsv", "train.tsv")
    for path in (tmp_path / "empty", tmp_path / "absent", release / "clips"):
        with pytest.raises(UserError, match="is not a release of Common Voice: give") as error:
            CommonVoice(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a release"):
        CommonVoice(tmp_path / "other.tar.gz")
    (release / "dev.tsv").write_text("client_id\tsentence\n")
    with pytest.raises(UserError, match=r"dev\.tsv of .* has no column path"):
        CommonVoice(release)


def test_the_fingerprint_is_of_the_contents(tmp_path, release):
    before = CommonVoice(release).fingerprint
    assert CommonVoice(release.parent).fingerprint == before
    with open(release / "dev.tsv", "a") as file:
        file.write(row("carl", "new.mp3"))
    assert CommonVoice(release).fingerprint != before
