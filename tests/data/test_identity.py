"""One user is one unit, one file one recording, however they are spelled; what is odd is noted."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedasr.data import inspection, verification
from fedasr.data.identity import case_variants, normalised_user, resolved
from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.sources import SourceOptions, find_layout
from fedasr.data.sources.manifest import Manifest, read_manifest
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")


def tone(path, seconds=0.6, seed=0, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.4, 0.4, int(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def manifest(path, *entries):
    path.write_text("".join(json.dumps({"text": "hi", **entry}) + "\n" for entry in entries))
    return path


@given(st.text())
def test_a_user_has_one_spelling(user):
    once = normalised_user(user)
    assert normalised_user(once) == once
    for form in ("NFC", "NFD"):
        assert normalised_user(unicodedata.normalize(form, user)) == once
    for other in (f" {user}", f"{user}\u00a0", f"\t{user}\n", f"\ufeff{user}\u200b"):
        assert normalised_user(other) == once


def test_users_that_look_different_stay_apart():
    assert normalised_user("Anna") != normalised_user("anna")
    assert normalised_user("José  García ") == "José García"
    assert normalised_user("\uff41") != "a"  # no compatibility forms: they may be two users
    assert case_variants({"Anna", "anna", "ANNA", "bert"}) == 3


def test_spellings_of_a_user_are_one_user_and_said(tmp_path):
    spelled = ["Zoë", unicodedata.normalize("NFD", "Zoë"), "Zoë ", "\ufeffZoë", "zoë"]
    entries = [
        {"audio_filepath": tone(tmp_path / f"{i}.wav", seed=i).name, "user": user}
        for i, user in enumerate(spelled)
    ]
    entries.append({"audio_filepath": "0.wav", "user": "\u200b", "id": "nobody"})
    summary = prepare(read_manifest(manifest(tmp_path / "m", *entries)), tmp_path / "out", name="x")
    assert list(open_corpus(tmp_path / "out", "train").users) == ["Zoë", "zoë"]
    assert summary["notes"] == {"user_ids_normalised": 3, "users_differing_by_case_only": 2}
    assert summary["skipped"] == {"bad_user": 1}


def test_a_file_is_what_it_resolves_to(tmp_path):
    tone(tmp_path / "clips" / "a.wav")
    os.symlink("clips", tmp_path / "linked")
    os.symlink("a.wav", tmp_path / "clips" / "b.wav")
    os.link(tmp_path / "clips" / "a.wav", tmp_path / "hard.wav")
    names = ["clips/a.wav", "./clips/a.wav", "clips/../clips/a.wav", str(tmp_path / "clips/a.wav")]
    names += ["linked/a.wav", "clips/b.wav", "hard.wav"]
    entries = [
        {"audio_filepath": name, "user": f"u{i % 2}", "split": ["train", "test"][i % 2]}
        for i, name in enumerate(names)
    ]
    source = read_manifest(manifest(tmp_path / "m", *entries))
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["utterances"] == 1
    assert summary["skipped"] == {"duplicate_recording": len(names) - 1}
    assert summary["skipped_examples"]["duplicate_recording"].endswith("'clips/a.wav' of 'u0'")
    assert summary["notes"]["recordings_in_several_splits"] == 1
    assert summary["notes"]["recordings_of_several_users"] == 1


def test_parts_and_other_transcripts_of_a_file_are_other_utterances(tmp_path):
    tone(tmp_path / "a.wav", 2.0)
    entries = [
        {"start": 0.0, "end": 0.7},
        {"start": 0.7, "end": 1.4},
        {"start": 0.7, "end": 1.4, "id": "again"},
        {"start": 0.7, "end": 1.4, "id": "other", "text": "ho"},
        {"start": 0.7, "end": 1.4, "id": "as written", "text": "Hi!"},
        {"duration": 2.05},
        {"duration": 1.5, "id": "wrong"},
        {"offset": 1.5, "duration": 0.7, "id": "outside"},
    ]
    entries = [{"audio_filepath": "a.wav", "user": "u", **entry} for entry in entries]
    source = read_manifest(manifest(tmp_path / "m", *entries))
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["utterances"] == 5
    assert summary["skipped"] == {"duplicate_recording": 1, "duration_mismatch": 2}
    assert summary["notes"] == {
        "recordings_stored_several_times": 1,
        "recordings_with_several_transcripts": 1,
    }


def test_equal_sound_in_other_files_is_noted(tmp_path):
    tone(tmp_path / "a.wav")
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    soundfile.write(tmp_path / "a.flac", samples, rate)
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    entries = [
        {"audio_filepath": name, "user": name[-6:], "split": split}
        for name, split in (("a.wav", "train"), ("a.flac", "test"), ("copy.wav", "train"))
    ]
    source = read_manifest(manifest(tmp_path / "m", *entries))
    summary = prepare(source, tmp_path / "out", name="x")
    assert summary["utterances"] == 3 and summary["skipped"] == {}
    assert summary["notes"] == {
        "recordings_stored_several_times": 1,
        "recordings_in_several_splits": 1,
        "recordings_of_several_users": 1,
    }


def test_names_are_found_in_the_spelling_of_the_disk(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "Zoë.wav")).touch()
    found = resolved(tmp_path, unicodedata.normalize("NFC", "Zoë.wav"))
    assert found.exists()


# --------------------------------------------------------------------------------- fields


def read_one(tmp_path, **entry):
    path = manifest(tmp_path / "m", {"audio_filepath": "a.wav", "user": "u", **entry})
    (item,) = read_manifest(path)
    return item


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, (0.0, None, None)),
        ({"offset": 0}, (0.0, None, None)),
        ({"offset": 0, "duration": 0.6}, (0.0, 0.6, None)),
        ({"offset": 1.5, "duration": 0.6}, (1.5, 2.1, None)),
        ({"offset_ms": 1500, "duration_ms": 600}, (1.5, 2.1, None)),
        ({"start": 4, "end": 4.5}, (4.0, 4.5, None)),
        ({"start_time": "4", "end_time": "4.5"}, (4.0, 4.5, None)),
        ({"end": 4.5}, (0.0, 4.5, None)),
        ({"start": 4}, (4.0, None, None)),
        ({"start": 4, "end": 4.5, "duration": 0.55}, (4.0, 4.5, None)),
        ({"offset": 4, "start": 4, "end": 5}, (4.0, 5.0, None)),
        ({"duration": 3.2}, (0.0, None, 3.2)),
    ],
)
def test_times_say_which_part(tmp_path, fields, part):
    audio = read_one(tmp_path, **fields).audio
    assert (audio.start, audio.stop, audio.stated) == pytest.approx(part)


@pytest.mark.parametrize(
    "fields",
    [
        {"start": 2, "end": 1},
        {"start": 1, "end": 1},
        {"offset": -0.1},
        {"duration": 0},
        {"duration": "long"},
        {"offset": True},
        {"offset": [1]},
        {"duration": 1e999},
        {"start": 1, "end": 2, "duration": 3},
        {"offset": 1, "start": 2, "duration": 1},
        {"channel": -1},
        {"channel": 0.5},
        {"seg_start": 1.0},
        {"crop_to": 1.0},
    ],
)
def test_times_that_make_no_sense_are_rejected(tmp_path, fields):
    item = read_one(tmp_path, **fields)
    assert isinstance(item, Rejected) and item.reason == "bad_manifest_line"


def test_unknown_fields_are_listed_and_metadata_carried(tmp_path):
    tone(tmp_path / "a.wav")
    entry = {"audio_filepath": "a.wav", "mood": "good", "age": 30, "locale": "en", "room": "7"}
    path = manifest(tmp_path / "m", {**entry, "speaker_id": 7}, {**entry, "nobody": "u"})
    source = Manifest(path, SourceOptions(metadata=("room",)))
    assert source.notes == {"lines with the unused field 'mood'": 1}
    first, second = source
    assert first.user == "7" and first.metadata == {"age": "30", "locale": "en", "room": "7"}
    assert "--user_key" in second.detail and "nobody" in second.detail
    assert isinstance(list(Manifest(path, SourceOptions(user_key="nobody")))[1], Utterance)
    prepare(source, tmp_path / "out", name="x")
    (line,) = map(json.loads, open(tmp_path / "out" / "utterances.jsonl"))
    assert line["metadata"] == first.metadata and line["user"] == "7" and line["id"] == "a.wav"


def test_a_field_twice_is_a_mistake(tmp_path):
    (tmp_path / "m").write_text('{"audio_filepath": "a", "text": "x", "text": "y", "user": "u"}\n')
    (item,) = read_manifest(tmp_path / "m")
    assert "stands twice" in item.detail


def test_quotation_marks_in_tables_swallow_no_line(tmp_path):
    (tmp_path / "m.csv").write_text(
        'audio_filepath,text,user\na.wav,"one, two",u\nb.wav,"never closed,u\n'
        "c.wav,three,u\nd.wav,x\n"
    )
    items = list(read_manifest(tmp_path / "m.csv"))
    assert [getattr(x, "text", x.id) for x in items] == ["one, two", "line 3", "three", "line 5"]
    (tmp_path / "m.tsv").write_text(
        'audio_filepath\ttext\tuser\na.wav\t"He said ""no"""\tu\nb.wav\tsay "no"\tu\n'
    )
    assert [x.text for x in read_manifest(tmp_path / "m.tsv")] == ['He said "no"', 'say "no"']


# ------------------------------------------------------------------------- messages, inspection


def test_nothing_stored_says_why_and_where(tmp_path):
    path = manifest(tmp_path / "m", *[{"audio_filepath": "a.wav"}] * 3)
    with pytest.raises(UserError) as error:
        prepare(read_manifest(path), tmp_path / "out", name="x")
    message = str(error.value)
    assert "3 bad_manifest_line" in message and "line 1: user is missing" in message
    assert str(tmp_path / "out" / "skipped.jsonl") in message
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def odd(tmp_path):
    """A manifest with something of everything."""
    entries = []
    for i in range(20):
        tone(tmp_path / f"{i}.wav", 1.0, seed=i)
        text = "turn on the light"
        entries.append({"audio_filepath": f"{i}.wav", "user": f"u{i % 4}", "text": text})
    soundfile.write(tmp_path / "3.wav", np.zeros(16000), 16000)
    (tmp_path / "5.wav").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(40))
    shutil.copy(tmp_path / "6.wav", tmp_path / "7.wav")
    entries[8]["text"] = "room 7"
    entries[9]["text"] = "turn on the light " * 9
    entries[10]["user"] = None
    entries[11]["audio_filepath"] = "./12.wav"
    entries[13]["user"] = "U1"
    return manifest(tmp_path / "m.jsonl", *entries)


def test_inspection_names_what_is_suspicious(odd):
    found = inspection.inspect(odd)
    assert found["layout"] == "manifest" and found["inputs"] == 20 and found["utterances"] == 19
    assert found["users"] == 5 and found["rejected"] == {"bad_manifest_line": 1}
    assert found["notes"] == {"users_differing_by_case_only": 2}
    assert found["hours"] == pytest.approx(19 / 3600, rel=0.1)
    assert found["unknown_characters"] == {"7": 1}
    assert found["coverage"]["--language=en"] == pytest.approx(18 / 19, abs=1e-3)
    why = {item["id"]: item["why"] for item in found["suspicious"]}
    assert len(found["suspicious"]) <= 10
    assert {"3.wav", "5.wav", "7.wav", "8.wav", "9.wav", "line 11", "12.wav"} <= set(why)
    assert "silence" in why["3.wav"] and "AAC" in why["5.wav"] and "'6.wav'" in why["7.wav"]
    assert not (odd.parent / "data").exists()
    fewer = inspection.inspect(odd, recordings=10)
    assert fewer["decoded"] + fewer["unreadable"] == 10
    assert fewer["hours"] == pytest.approx(19 / 3600, rel=0.2)


def test_inspection_proposes_an_alphabet_that_can_write_the_transcripts(tmp_path):
    for i, text in enumerate(("включи свет", "allume la lumière", "turn on the light")):
        tone(tmp_path / "a.wav", 1.0)
        entry = {"audio_filepath": "a.wav", "user": "u", "text": text}
        found = inspection.inspect(manifest(tmp_path / f"{i}.jsonl", entry))
        assert ("--alphabet=from_data" in found["command"]) == (i == 0)
        assert found["coverage"]["--alphabet=from_data"] == 1.0


def test_inspection_of_nothing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        inspection.inspect(tmp_path / "absent")
    with pytest.raises(UserError, match="none of the layouts"):
        inspection.inspect(tmp_path)


def test_verification_finds_every_difference(tmp_path, odd):
    def again():
        return find_layout("manifest").open(odd)

    prepare(again(), tmp_path / "out", name="x")
    report = verification.verify(tmp_path / "out", again())
    assert verification.is_same(report) and report["stored"] == report["same"] == 15
    tone(tmp_path / "0.wav", 1.0, seed=99)
    tone(tmp_path / "1.wav", 0.9)
    (tmp_path / "2.wav").unlink()
    lines = odd.read_text().splitlines()
    lines[4] = lines[4].replace("turn on", "turn off")
    del lines[14]
    lines.append(lines[0].replace("0.wav", "new.wav"))
    odd.write_text("\n".join(lines))
    report = verification.verify(tmp_path / "out", again())
    why = {item["id"]: item["why"] for item in report["different"]}
    assert set(why) == {"0.wav", "1.wav", "2.wav", "4.wav"}
    assert "differ by up to" in why["0.wav"] and "instead of" in why["1.wav"]
    assert "no such file" in why["2.wav"] and why["4.wav"] == "another transcript"
    assert report["no_longer_there"] == ["14.wav"] and report["new"] == ["new.wav"]
    records = next((tmp_path / "out").rglob("*.array_record*"))
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 0xFF
    records.write_bytes(content)
    assert verification.verify(tmp_path / "out", None)["damaged"]
