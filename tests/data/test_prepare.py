import functools
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.audio.features import extract
from fedasr.data.preparation import parts
from fedasr.data.preparation.division import held_out
from fedasr.data.preparation.folder import cache_dir
from fedasr.data.preparation.prepare import prepare
from fedasr.data.recordings import read_audio
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.synthetic import preparation, prepare_synthetic
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, normalize_text, tokenizer_for

RATE = 16000


def wave(seconds=0.4, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


def utterance(id, user="u", text="hi", split=None, audio=None, rate=RATE):
    samples = wave() if audio is None else audio
    return Utterance(id, user, text, split, lambda: (samples, rate))


def people(number, each=1, **options):
    return [
        utterance(f"{i}-{j}", f"user {i}", **options) for i in range(number) for j in range(each)
    ]


def broken():
    raise RuntimeError("no\nsuch codec")


def skipped_lines(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_features_and_labels_are_stored(tmp_path):
    audio = wave(0.7, seed=3)
    summary = prepare(
        [utterance("b", text="No, it's Zoë!", audio=audio), utterance("a")], tmp_path, name="x"
    )
    corpus = open_corpus(tmp_path, "train")
    first, second = corpus.get(0, [0, 1])  # by id, whatever the order of the input
    assert CharTokenizer().decode(first["labels"]) == "hi"
    assert CharTokenizer().decode(second["labels"]) == "no it's zoe"
    assert second["labels"].dtype == np.int32
    np.testing.assert_array_equal(second["features"], extract(audio).astype(np.float16))
    assert summary["splits"] == {
        "train": {
            "users": 1,
            "utterances": 2,
            "hours": pytest.approx(1.1 / 3600, abs=1e-6),
            "minutes_per_user": {
                "mean": pytest.approx(1.1 / 60, abs=1e-4),
                "std": 0.0,
                "min": pytest.approx(1.1 / 60, abs=1e-4),
                "max": pytest.approx(1.1 / 60, abs=1e-4),
            },
        }
    }
    assert summary == read_metadata(tmp_path)["summary"]
    assert read_metadata(tmp_path)["options"]["features"]["num_mels"] == 80


def test_labels_have_a_space_on_both_sides_unless_told_otherwise(tmp_path):
    for pad in (True, False):
        out = tmp_path / str(pad)
        prepare([utterance("a", text="hi")], out, name="x", pad_space=pad)
        (example,) = open_corpus(out, "train").get(0, [0])
        expected = CharTokenizer().encode(normalize_text("hi")[0], pad_space=pad)
        np.testing.assert_array_equal(example["labels"], expected)


def test_every_kind_of_bad_input_is_counted_under_its_reason(tmp_path):
    nan = wave()
    nan[7] = np.nan
    bad = {
        "unreadable_audio": [
            Utterance("bad 1", "u", "hi", None, broken),
            utterance("bad 2", audio=np.zeros(0, np.float32)),
            utterance("bad 3", audio=np.zeros((0, 2), np.float32)),
            utterance("bad 4", rate=0),
        ],
        "non_finite_audio": [
            utterance("bad 5", audio=nan),
            utterance("bad 6", audio=np.array([np.inf] * 5000, np.float32)),
            utterance("bad 7", audio=wave() * np.float32(1e38)),
        ],
        "empty_text": [utterance("bad 8", text=" ,.! "), utterance("bad 9", text="")],
        "unknown_characters": [utterance("bad 10", text="room 7"), utterance("bad 11", text="да")],
        # 6 frames: 400 samples and 5 hops
        "too_short": [utterance("bad 12", audio=wave()[: 400 + 5 * 160 + 159])],
        "too_long": [utterance("bad 13", audio=wave(2.01))],
        "infeasible": [utterance("bad 14", text="a" * 40)],
        "bad_split": [utterance("bad 15", split="all"), utterance("bad 16", split="a/b")],
        "duplicate_id": [utterance("good")],
        "bad_manifest_line": [Rejected("line 3", "bad_manifest_line", "not JSON")],
        "from_elsewhere": [Rejected("line 4", "from_elsewhere", "")],
    }
    lonely = utterance("bad 17", user="lonely", text="")
    inputs = [utterance("good"), *(u for kind in bad.values() for u in kind), lonely]
    summary = prepare(inputs, tmp_path, name="x", max_seconds=2.0)
    expected = {reason: len(kind) for reason, kind in bad.items()}
    expected["empty_text"] += 1
    assert summary["skipped"] == dict(sorted(expected.items()))
    assert summary["utterances"] == 1 == len(inputs) - sum(expected.values())
    assert summary["users"] == 1
    assert summary["users_without_utterances"] == 1
    lines = skipped_lines(tmp_path)
    assert {(x["id"], x["reason"]) for x in lines} == {
        ("bad 17", "empty_text"),
        *((u.id, reason) for reason, kind in bad.items() for u in kind),
    }
    assert lines[0]["detail"] == "RuntimeError: no such codec"


@pytest.mark.parametrize(("text", "needed"), [("abcd", 6), ("aabb", 8)])
def test_infeasible_is_decided_at_the_last_output_frame(tmp_path, text, needed):
    def samples(frames):
        return wave(1)[: 400 + (frames - 1) * 160]

    # ceil(frames / 3) output frames: just enough, and one too few
    enough, short = 3 * needed - 2, 3 * needed - 3
    summary = prepare(
        [
            utterance("enough", text=text, audio=samples(enough)),
            utterance("short", text=text, audio=samples(short)),
        ],
        tmp_path,
        name="x",
    )
    assert summary["skipped"] == {"infeasible": 1}
    assert open_corpus(tmp_path, "train").lengths(0)["features"].tolist() == [enough]


def test_stereo_and_other_rates_are_converted(tmp_path):
    stereo = np.stack([wave(), wave(seed=1)], axis=1)
    slow = wave()[:4000]  # half a second at 8 kHz
    prepare(
        [utterance("a", audio=stereo), utterance("b", audio=slow, rate=8000)], tmp_path, name="x"
    )
    corpus = open_corpus(tmp_path, "train")
    a, b = corpus.get(0, [0, 1])
    expected = extract(stereo.mean(axis=1)).astype(np.float16)
    np.testing.assert_array_equal(a["features"], expected)
    assert len(b["features"]) == 48


def test_a_missing_package_stops_the_preparation(tmp_path):
    def missing():
        raise UserError("install soundfile")

    with pytest.raises(UserError, match="install soundfile"):
        prepare([Utterance("a", "u", "hi", None, missing)], tmp_path, name="x")


def test_nothing_stored_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match="2 empty_text"):
        prepare([utterance("a", text=""), utterance("b", text="")], tmp_path, name="x")
    with pytest.raises(UserError, match="no input"):
        prepare([], tmp_path, name="x")
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(tmp_path, "train")


@settings(deadline=None, max_examples=200)
@given(
    st.sets(st.text(max_size=4), max_size=40),
    st.floats(0, 0.6),
    st.floats(0, 0.39),
    st.integers(0, 5),
)
def test_held_out_users(users, dev, test, seed):
    division = held_out(users, dev, test, seed)
    assert division == held_out(sorted(users, reverse=True), dev, test, seed)
    assert set(division) == users
    counts = {split: list(division.values()).count(split) for split in ("train", "dev", "test")}
    if users:
        assert counts["train"] >= 1
    for split, fraction in (("dev", dev), ("test", test)):
        if len(users) < 3 or fraction == 0:
            assert counts[split] == 0
        else:
            assert counts[split] >= 1
            assert abs(counts[split] - fraction * len(users)) <= 1


def test_held_out_depends_on_the_seed():
    users = [str(i) for i in range(50)]
    assert held_out(users, 0.2, 0.2, 0) != held_out(users, 0.2, 0.2, 1)


def test_whole_users_are_held_out(tmp_path):
    summary = prepare(people(10, each=2), tmp_path, name="x", dev_fraction=0.2)
    members = {split: set(open_corpus(tmp_path, split).users) for split in summary["splits"]}
    assert {split: len(users) for split, users in members.items()} == {
        "train": 7,
        "dev": 2,
        "test": 1,
    }
    assert len(set.union(*members.values())) == 10
    assert summary["utterances"] == 20


def test_named_splits_are_kept(tmp_path):
    summary = prepare(
        [
            *people(4, split="train"),
            utterance("x", "other", split="my_eval"),
            utterance("y", "other"),  # joins the split that its user names
            utterance("z", "user 0", split="my_eval"),
        ],
        tmp_path,
        name="x",
    )
    assert {k: v["utterances"] for k, v in summary["splits"].items()} == {"train": 4, "my_eval": 3}
    assert open_corpus(tmp_path, "my_eval").users == ("other", "user 0")
    assert summary["users_in_several_splits"] == 1


def test_a_finished_corpus_is_used_again(tmp_path):
    first = prepare(people(3), tmp_path, name="x", fingerprint="f")
    stamp = (tmp_path / "corpus.json").stat().st_mtime_ns

    def untouched():
        raise AssertionError("read again")
        yield

    assert prepare(untouched(), tmp_path, name="x", fingerprint="f") == first
    assert (tmp_path / "corpus.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change", [{"fingerprint": "g"}, {"seed": 1}, {"max_seconds": 9}, {"fingerprint": None}]
)
def test_another_corpus_in_the_folder_is_refused_unless_overwritten(tmp_path, change):
    options = {"name": "x", "fingerprint": "f"}
    prepare(people(3), tmp_path, **options)
    with pytest.raises(UserError, match="holds another corpus"):
        prepare(people(4), tmp_path, **options | change)
    assert len(open_corpus(tmp_path, "train").users) == 1
    prepare(people(4), tmp_path, **options | change, overwrite=True)
    assert len(open_corpus(tmp_path, "train").users) == 2


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"other files \('thesis.tex'\)"):
            prepare(people(3), tmp_path, name="x", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="not a folder"):
        prepare(people(3), tmp_path / "thesis.tex", name="x")


def test_a_damaged_corpus_is_made_again(tmp_path):
    prepare(people(3), tmp_path, name="x", fingerprint="f")
    victim = next((tmp_path / "records").rglob("*train.array_record*"))
    victim.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_corpus(tmp_path, "train")
    prepare(people(3), tmp_path, name="x", fingerprint="f")
    open_corpus(tmp_path, "train").get(0, [0])


def test_an_interrupted_preparation_of_other_input_is_redone(tmp_path):
    def interrupted():
        yield from people(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), tmp_path, name="x", fingerprint="f")
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(tmp_path, "train")
    assert prepare(people(5), tmp_path, name="x", fingerprint="f")["users"] == 5


@pytest.mark.parametrize("change", [{}, {"fingerprint": "g"}, {"fingerprint": None}, {"stride": 2}])
def test_an_interrupted_preparation_goes_on_if_it_is_the_same(tmp_path, monkeypatch, change):
    monkeypatch.setattr(parts, "PART", 2)
    heard = []

    def inputs(stop=None):
        for i in range(5):
            if i == stop:
                raise KeyboardInterrupt
            audio = lambda i=i: (heard.append(i), (wave(seed=i), RATE))[1]  # noqa: E731
            yield Utterance(str(i), f"user {i}", "hi", None, audio)

    options = {"name": "x", "fingerprint": "f"} | change
    with pytest.raises(KeyboardInterrupt):
        prepare(inputs(stop=4), tmp_path / "a", name="x", fingerprint=options["fingerprint"])
    assert heard == [0, 1, 2, 3]
    calls = []
    prepare(inputs(), tmp_path / "a", progress=lambda *call: calls.append(call), **options)
    kept = change == {}
    same = kept or change == {"fingerprint": "g"}
    assert heard[4:] == ([4] if same else [0, 1, 2, 3, 4])
    assert calls[-1] == (5, None) and len(calls) == (3 if same else 5)
    prepare(inputs(), tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_parts_of_other_input_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)

    def failing(ids):
        yield from (utterance(id, user=id) for id in ids)
        raise UserError("the archive ends here")

    for ids in ("abcd", "abxy"):
        with pytest.raises(UserError, match="ends here"):
            prepare(failing(ids), tmp_path, name="x", fingerprint="f")
    prepare([utterance(id, user=id) for id in "abcd"], tmp_path, name="x", fingerprint="f")
    found = [u for split in ("train", "dev", "test") for u in open_corpus(tmp_path, split).users]
    assert sorted(found) == list("abcd")


def recorded(folder, number):
    """Utterances that other processes can read, some of them bad."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")
    for i in range(number):
        path = folder / f"{i}.wav"
        if i % 7 == 3:
            path.touch()
        else:
            soundfile.write(path, wave(0.3 + 0.05 * (i % 5), seed=i), RATE)
        audio = functools.partial(read_audio, path)
        yield Utterance(str(i % 20), f"user {i % 4}", "7" if i % 11 == 5 else "hi", None, audio)


def test_the_corpus_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 4)
    (tmp_path / "wav").mkdir()
    inputs = list(recorded(tmp_path / "wav", 22))
    calls = []
    for workers in (1, 2):
        prepare(
            inputs,
            tmp_path / str(workers),
            name="x",
            fingerprint="f",
            workers=workers,
            progress=lambda *call: calls.append(call),
            total=22,
        )
        assert calls[-1] == (22, 22)
    one, two = (contents(tmp_path / name) for name in "12")
    assert one == two
    summary = read_metadata(tmp_path / "2")["summary"]
    assert summary["skipped"].keys() == {"unreadable_audio", "unknown_characters", "duplicate_id"}
    assert summary["utterances"] + sum(summary["skipped"].values()) == 22


def test_what_cannot_be_sent_to_processes_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    with pytest.raises(UserError, match="use workers=1"):
        prepare(people(5), tmp_path, name="x", workers=2)


def test_a_process_that_dies_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    exits = functools.partial(os._exit, 1)
    inputs = [Utterance(str(i), "u", "hi", None, exits) for i in range(5)]
    with pytest.raises(UserError, match="goes on where it was"):
        prepare(inputs, tmp_path, name="x", workers=2)


def test_audio_can_be_stored_instead_of_features(tmp_path):
    quantised = np.round(wave(0.5) * 32768) / np.float32(32768)
    inputs = [utterance("a", audio=quantised), utterance("b", audio=3 * wave(0.4, seed=1))]
    features = prepare(inputs, tmp_path / "f", name="x")
    audio = prepare(inputs, tmp_path / "a", name="x", store="audio")
    assert audio == features | {"notes": {"saturated_utterances": 1}}
    assert read_metadata(tmp_path / "a")["arrays"]["audio"]["dtype"] == "int16"
    stored, computed = (open_corpus(tmp_path / name, "train") for name in "fa")
    assert list(computed.users) == list(stored.users)
    for key, values in stored.lengths(0).items():
        np.testing.assert_array_equal(computed.lengths(0)[key], values)
        np.testing.assert_array_equal(computed.all_lengths()[key], values)
    for a, b in zip(stored.get(0, [0, 1]), computed.get(0, [0, 1]), strict=True):
        assert a.keys() == b.keys()
        assert (
            a["features"].dtype == b["features"].dtype
            and a["features"].shape == b["features"].shape
        )
        np.testing.assert_array_equal(a["labels"], b["labels"])
    first, again = (c.get(0, [0])[0]["features"] for c in (stored, computed))
    np.testing.assert_array_equal(first, again)  # 16-bit recordings lose nothing
    assert pickle.loads(pickle.dumps(computed)).get(0, [0])[0]["features"].shape == first.shape


def test_audio_is_rounded_to_16_bits(tmp_path):
    inputs = [utterance("a", audio=wave(0.5))]
    prepare(inputs, tmp_path / "f", name="x")
    prepare(inputs, tmp_path / "a", name="x", store="audio")
    stored, computed = (open_corpus(tmp_path / name, "train") for name in "fa")
    first, again = (c.get(0, [0])[0]["features"] for c in (stored, computed))
    np.testing.assert_allclose(first, again, atol=0.02)


def test_letters_of_the_language_can_be_kept(tmp_path):
    for keep in (True, False):
        out = tmp_path / str(keep)
        options = {"name": "x", "language": "de", "keep_letters": keep}
        prepare([utterance("a", text="Süßes Café", audio=wave(1))], out, **options)
        (example,) = open_corpus(out, "train").get(0, [0])
        text = tokenizer_for(read_metadata(out)).decode(example["labels"])
        assert text == ("süßes cafe" if keep else "susses cafe")


def contents(folder):
    """Every file of a corpus but its lock, by name; tfds's own metadata says when it was made."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_failed_overwrite_leaves_no_corpus(tmp_path):
    prepare(people(3), tmp_path, name="x")
    with pytest.raises(UserError, match="no input"):
        prepare([], tmp_path, name="x", overwrite=True)
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(tmp_path, "train")


def test_a_killed_preparation_is_redone(tmp_path):
    code = f"""
        import os
        import numpy as np
        from fedasr.data import writing
        from fedasr.data.preparation.prepare import prepare
        from fedasr.data.utterances import Utterance
        audio = np.random.default_rng(0).uniform(-0.5, 0.5, 6400).astype(np.float32)
        def killed(*args):  # the example files are complete, the index is not
            os.kill(os.getpid(), 9)
        writing._write_index = killed
        prepare([Utterance("a", "u", "hi", None, lambda: (audio, 16000))],
                {str(tmp_path)!r}, name="x", fingerprint="f")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list((tmp_path / "records").rglob("*.array_record*"))
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(tmp_path, "train")
    assert prepare(people(3), tmp_path, name="x", fingerprint="f")["users"] == 3
    assert len(open_corpus(tmp_path, "train").get(0, [0])) == 1
    assert not (tmp_path / ".unfinished").exists()


def test_two_at_once_do_the_work_once(tmp_path):
    made = []
    barrier = threading.Barrier(2)

    def utterances(name):
        for item in people(4):
            made.append(name)
            yield item

    def work(name):
        barrier.wait()
        return prepare(utterances(name), tmp_path / "out", name="x", fingerprint="f")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, "ab")
    assert first == second
    assert len(made) == 4 and len(set(made)) == 1


def test_progress_reports_every_input(tmp_path):
    calls = []
    prepare(
        [*people(3), utterance("x", text="")],
        tmp_path,
        name="x",
        total=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"dev_fraction": -0.1},
        {"dev_fraction": 0.5, "test_fraction": 0.5},
        {"stride": 0},
        {"min_frames": 0},
        {"max_seconds": 0},
        {"store": "mp3"},
        {"workers": -1},
        {"language": "xx"},
    ],
)
def test_senseless_options_are_refused(tmp_path, options):
    with pytest.raises(UserError):
        prepare(people(3), tmp_path / "out", name="x", **options)
    assert not (tmp_path / "out").exists()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FEDASR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fedasr"


@pytest.fixture
def fake_synthetic(monkeypatch, tmp_path):
    """A stand-in for the speech synthesiser, which needs a native library."""
    module = types.ModuleType("fedasr.data.synthetic.speech")
    module.made = 0

    def synthetic_utterances(config):
        for item in people(config.users):
            module.made += 1
            yield item

    module.SyntheticConfig = lambda task="digits", users=4, seed=0: types.SimpleNamespace(
        task=task, users=users, seed=seed
    )
    module.synthetic_utterances = synthetic_utterances
    module.total_utterances = lambda config: config.users
    module.fingerprint = lambda config: f"{config.task}{config.users}{config.seed}".ljust(64, "0")
    monkeypatch.setattr(preparation, "speech", module)
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "cache"))
    return module


def test_synthetic_speech_is_made_once(fake_synthetic, capfd):
    small, large = fake_synthetic.SyntheticConfig(), fake_synthetic.SyntheticConfig(users=6)
    folder = prepare_synthetic(small)
    assert folder.parent == cache_dir()
    assert prepare_synthetic(small) == folder
    assert fake_synthetic.made == 4
    other = prepare_synthetic(large)
    assert other != folder
    assert read_metadata(other)["summary"]["users"] == 6
    out, err = capfd.readouterr()
    assert out == "" and "preparing speech" in err


def test_synthetic_speech_in_a_folder_of_ones_own(fake_synthetic, tmp_path):
    calls = []
    out = prepare_synthetic(
        fake_synthetic.SyntheticConfig(), tmp_path / "mine", lambda *call: calls.append(call)
    )
    assert out == tmp_path / "mine"
    assert calls == [(i, 4) for i in (1, 2, 3, 4)]
    with pytest.raises(UserError, match="another corpus"):
        prepare_synthetic(fake_synthetic.SyntheticConfig(users=5), out)
    prepare_synthetic(fake_synthetic.SyntheticConfig(users=5), out, overwrite=True)
    assert read_metadata(out)["summary"]["users"] == 5


def test_a_test_set_keeps_its_long_utterances(tmp_path):
    long = wave(1.5)
    inputs = [
        utterance(f"{split}-{n}", split, split=split, audio=audio)
        for split in ("train", "test_other")
        for n, audio in enumerate((wave(0.5), long))
    ]
    summary = prepare(inputs, tmp_path, name="x", max_seconds=1.0)
    assert summary["skipped"] == {"too_long": 1}
    assert summary["splits"]["test_other"]["utterances"] == 2
