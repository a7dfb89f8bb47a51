import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from fedasr.data.neural import (
    Area,
    NeuralSessions,
    parse_areas,
    prepare_sessions,
    z_score_block,
)
from fedasr.data.neural import synthetic as neural_synthetic
from fedasr.data.neural.synthetic import NeuralConfig
from fedasr.data.records import open_corpus, read_metadata
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, pronunciation, sentence_phonemes, tokenizer_for

TINY = NeuralConfig(
    days=2,
    train_sentences=4,
    test_sentences=2,
    holdout_sentences=1,
    blocks=2,
    words=(3, 3),
    electrodes=6,
    informative=4,
)
AREAS = (Area("tx2", 1, 3), Area("spikePow", 0, 2))
TEXTS = ["one two", "three", "four five"]


def write_day(path, texts=TEXTS, seed=0, drop=(), **changes):
    """A file in the competition layout with 4 channels a field; `changes` replace fields."""
    rng = np.random.default_rng(seed)
    bins = [40 + 3 * i for i in range(len(texts))]
    fields = {}
    for name in ("tx1", "tx2", "tx3", "tx4", "spikePow"):
        cells = np.empty((1, len(texts)), object)
        for i, n in enumerate(bins):
            cells[0, i] = rng.poisson(3.0, (n, 4)).astype(np.float64) + rng.random((n, 4))
        fields[name] = cells
    fields["sentenceText"] = np.array(texts)
    fields["blockIdx"] = np.array([[1.0], [1.0], [2.0]][: len(texts)])
    fields |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {k: v for k, v in fields.items() if k not in drop})
    return fields


def prepared(tmp_path, areas=AREAS, **options):
    summary = prepare_sessions(NeuralSessions(tmp_path / "raw", areas), tmp_path / "out", **options)
    skipped = [json.loads(x) for x in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    return summary, {line["id"]: line for line in skipped}


# -------------------------------------------------------------------------------- real layout


def test_features_are_the_chosen_channels_z_scored_by_block(tmp_path):
    fields = write_day(tmp_path / "raw" / "train" / "t1.2022.mat")
    summary, skipped = prepared(tmp_path)
    assert not skipped
    assert (summary["users"], summary["utterances"], summary["notes"]) == (1, 3, {})
    corpus = open_corpus(tmp_path / "out", "train")
    assert list(corpus.users) == ["t1.2022"]
    found = corpus.get(0, range(3))
    for block in ([0, 1], [2]):
        raw = [
            np.concatenate([fields["tx2"][0, i][:, 1:3], fields["spikePow"][0, i][:, :2]], axis=1)
            for i in block
        ]
        joined = np.concatenate(raw)
        for i, one in zip(block, raw, strict=True):
            expected = (one - joined.mean(axis=0)) / joined.std(axis=0)
            assert found[i]["features"].dtype == np.float32
            np.testing.assert_allclose(found[i]["features"], expected, atol=1e-4)
    tokenizer = CharTokenizer(read_metadata(tmp_path / "out")["options"]["characters"])
    assert [tokenizer.decode(x["labels"]) for x in found] == TEXTS


def test_labels_may_be_phonemes(tmp_path):
    write_day(tmp_path / "raw" / "train" / "t1.mat", ["One two.", "three", "two one"])
    lexicon = tmp_path / "dict"
    lexicon.write_text("ONE W AH1 N\nTWO T UW1\n")
    summary, skipped = prepared(tmp_path, lexicon=lexicon)
    assert summary["skipped"] == {"unknown_words": 1}
    assert [line["reason"] for line in skipped.values()] == ["unknown_words"]
    tokenizer = tokenizer_for(read_metadata(tmp_path / "out"))
    found = open_corpus(tmp_path / "out", "train").get(0, range(2))
    texts = [tokenizer.decode(x["labels"]) for x in found]
    assert texts == ["W AH N SIL T UW", "T UW SIL W AH N"]
    # Another dictionary is another corpus.
    lexicon.write_text("ONE W AH1 N\nTWO T UW1\nTHREE TH R IY1\n")
    with pytest.raises(UserError, match="overwrite"):
        prepared(tmp_path, lexicon=lexicon)
    lexicon.write_text("ONE\n")
    with pytest.raises(UserError, match="line 1"):
        prepared(tmp_path, lexicon=lexicon, overwrite=True)


class Reader:
    """Stands in for g2p_en's: three words, one of them a heteronym that the sentence decides."""

    def __call__(self, text):
        said = {"one": ["W", "AH1", "N"], "i": ["AY1"], "read": ["R", "IY1", "D"]}
        if text.startswith("one"):
            said["read"] = ["R", "EH1", "D"]
        found = []
        for word in text.split():
            found += [*said[word], " "]
        return [*found[:-1], "'"]  # punctuation is no phoneme


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setitem(sys.modules, "g2p_en", SimpleNamespace(G2p=Reader))
    pronunciation._g2p.cache_clear()
    yield
    pronunciation._g2p.cache_clear()


def test_phonemes_as_published(tmp_path, reader):
    """Of whole sentences by g2p_en, stress left out, silence after every word."""
    write_day(tmp_path / "raw" / "train" / "t1.mat", ["One read.", "I read"])
    prepared(tmp_path, labels="phonemes", final_silence=True, workers=1)
    tokenizer = tokenizer_for(read_metadata(tmp_path / "out"))
    found = open_corpus(tmp_path / "out", "train").get(0, range(2))
    names = [" ".join(tokenizer.characters[i - 1] for i in x["labels"]) for x in found]
    assert names == ["W AH N SIL R EH D SIL", "AY SIL R IY D SIL"]


def test_words_that_a_dictionary_lacks_may_be_guessed(reader):
    lexicon = {"read": [("L", "EH", "K"), ("R", "EH", "D")]}
    assert sentence_phonemes("i read", lexicon, False, False) == ("", ["i"])
    assert sentence_phonemes("i read", lexicon, True, False) == ("AY SIL L EH K", [])
    assert lexicon.keys() == {"read"}


def test_without_g2p_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "g2p_en", None)
    pronunciation._g2p.cache_clear()
    with pytest.raises(UserError, match=r"fedasr\[g2p\]"):
        sentence_phonemes("i", None, True, True)


def test_handwriting_has_31_characters(tmp_path):
    texts = ["Don>t>go,>he>said~", "Isn\u2019t it?  No.", "2 of them"]
    write_day(tmp_path / "raw" / "train" / "t1.mat", texts)
    summary, _ = prepared(tmp_path, labels="handwriting", stride=1)
    assert summary["skipped"] == {"unknown_characters": 1}
    tokenizer = tokenizer_for(read_metadata(tmp_path / "out"))
    found = open_corpus(tmp_path / "out", "train").get(0, range(2))
    assert [tokenizer.decode(x["labels"]) for x in found] == ["don t go, he said.", "isn't it? no."]
    assert tokenizer.vocab_size == 32
    # The authors' order, whose blank is the last; ours is the first.
    order = "abcdefghijklmnopqrstuvwxyz>,'~?".replace(">", " ").replace("~", ".")
    assert tokenizer.characters == order
    with pytest.raises(UserError, match="phonemes"):
        prepared(tmp_path, labels="handwriting", final_silence=True)
    with pytest.raises(UserError, match="labels"):
        prepared(tmp_path, labels="letters")


def test_withheld_sentences_are_kept_in_their_order(tmp_path):
    write_day(tmp_path / "raw" / "train" / "t1.mat")
    write_day(tmp_path / "raw" / "competitionHoldOut" / "t2.mat", ["", " ", ""], seed=1)
    write_day(tmp_path / "raw" / "competitionHoldOut" / "t1.mat", ["", "", " "], seed=2)
    summary, _ = prepared(tmp_path)
    assert summary["skipped"] == {} and summary["splits"]["competitionHoldOut"]["utterances"] == 6
    corpus = open_corpus(tmp_path / "out", "competitionHoldOut")
    assert list(corpus.users) == ["t1", "t2"]
    for user in (0, 1):
        examples = corpus.get(user, range(3))
        assert [len(x["features"]) for x in examples] == [40, 43, 46]  # as they lie in the file
        assert all(len(x["labels"]) == 0 for x in examples)


def test_folders_become_splits_and_a_day_is_one_user(tmp_path):
    for split in ("train", "test", "competitionHoldOut"):
        write_day(tmp_path / "raw" / split / "a.mat")
    write_day(tmp_path / "raw" / "train" / "b.mat", seed=1)
    summary, _ = prepared(tmp_path)
    assert {k: v["users"] for k, v in summary["splits"].items()} == {
        "train": 2,
        "test": 1,
        "competitionHoldOut": 1,
    }
    assert summary["users_in_several_splits"] == 1


def cell(*arrays):
    cells = np.empty((1, len(arrays)), object)
    cells[0, :] = [None] * len(arrays)
    for i, array in enumerate(arrays):
        cells[0, i] = array
    return cells


def test_sentences_that_cannot_be_used_are_counted_and_named(tmp_path):
    good = np.random.default_rng(0).random((60, 4))
    broken = good.copy()
    broken[5, 2:] = np.nan  # the channels 2 and 3: tx2[2], half of what spikePow[2:4] gives
    texts = ["yes", " ", "narrow", "longer", "empty", "nan", "nine 9", "much too long a text"]
    tx2 = [good, good, good[:, :2], good, good[:0], broken, good, good[:8]]
    power = [good, good, good, good[:50], good[:0], broken, good, good[:8]]
    write_day(
        tmp_path / "raw" / "train" / "d.mat",
        texts,
        blockIdx=np.ones((8, 1)),
        tx2=cell(*tx2),
        spikePow=cell(*power),
    )
    areas = (Area("tx2", 1, 3), Area("spikePow", 2, 4))
    summary, skipped = prepared(tmp_path, areas)
    reasons = {id[-1]: line["reason"] for id, line in skipped.items()}
    assert reasons == {
        "1": "empty_text",
        "2": "wrong_shape",
        "3": "wrong_shape",
        "4": "wrong_shape",
        "5": "non_finite_channels",
        "6": "unknown_characters",
        "7": "infeasible",
    }
    assert summary["utterances"] == 1
    assert summary["skipped"]["wrong_shape"] == 3
    assert "tx2 has 2 channels" in skipped["train/d/00002"]["detail"]
    assert "[50, 60] bins" in skipped["train/d/00003"]["detail"]
    assert "3 of 4 channels" in skipped["train/d/00005"]["detail"]


def test_a_dead_or_broken_channel_is_zero_in_its_block_counted_and_named(tmp_path):
    fields = write_day(tmp_path / "raw" / "train" / "d.mat")
    fields["tx2"][0, 1][7, 1] = np.nan  # in block 1
    fields["spikePow"][0, 2][:, 1] = 0.1  # in block 2
    write_day(tmp_path / "raw" / "train" / "d.mat", tx2=fields["tx2"], spikePow=fields["spikePow"])
    summary, _ = prepared(tmp_path)
    assert summary["notes"] == {"nan_channels": 1, "constant_channels": 1}
    named = json.loads((tmp_path / "out" / "channels.json").read_text())
    assert named == {
        "train/d block 1.0": {"nan": [0], "constant": []},
        "train/d block 2.0": {"nan": [], "constant": [3]},
    }
    found = [x["features"] for x in open_corpus(tmp_path / "out", "train").get(0, range(3))]
    dead = [(np.abs(x).max(axis=0) == 0).tolist() for x in found]
    assert dead == [[True, False, False, False]] * 2 + [[False, False, False, True]]
    assert all(np.isfinite(x).all() for x in found)


def test_large_offsets_and_tiny_variances_survive_z_scoring():
    rng = np.random.default_rng(0)
    x = np.stack([1e4 + rng.normal(0, 0.5, 500), rng.normal(0, 1e-3, 500)], axis=1)
    (scored,), report = z_score_block([x])
    assert report == ((), ())
    np.testing.assert_allclose(scored.std(axis=0), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["blockIdx"]}, "no field blockIdx"),
        ({"drop": ["tx2", "sentenceText"]}, "no field sentenceText, tx2"),
        ({"tx2": np.zeros((3, 4))}, "tx2 is no cell array"),
        ({"blockIdx": np.ones((2, 1))}, "differ in their number of sentences"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, changes, message):
    write_day(tmp_path / "raw" / "test" / "d.mat", **changes)
    with pytest.raises(UserError, match=rf"d\.mat.*{message}"):
        prepared(tmp_path)


def test_files_that_are_no_matlab_files(tmp_path):
    path = tmp_path / "raw" / "train" / "d.mat"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file, damaged" + bytes(40))
    with pytest.raises(UserError, match=r"d\.mat cannot be read"):
        prepared(tmp_path)
    with pytest.raises(UserError, match="no MATLAB files"):
        NeuralSessions(tmp_path)


@pytest.mark.parametrize("text", ["tx1", "tx1[4:4]", "tx1[0:2]spikePow[0:2]", ""])
def test_areas_are_checked(text):
    with pytest.raises(UserError, match="write them as"):
        parse_areas(text)
    assert parse_areas("tx2[1:3], spikePow[0:2]") == AREAS


# ----------------------------------------------------------------------------------- manifest


def test_a_manifest_gives_what_the_layout_gives(tmp_path):
    fields = write_day(tmp_path / "raw" / "train" / "d.mat")
    prepared(tmp_path, [Area("tx1", 0, 4)])
    expected = open_corpus(tmp_path / "out", "train").get(0, range(3))
    cube = np.full((3, 50, 4), np.nan)
    for i in range(3):
        cube[i, : len(fields["tx1"][0, i])] = fields["tx1"][0, i]
    folder = tmp_path / "other"
    folder.mkdir()
    np.save(folder / "cube.npy", cube)
    savemat(folder / "cube.mat", {"cube": cube})
    np.savez(folder / "cube.npz", cube=cube)
    for suffix in ("npy", "mat", "npz"):
        lines = [
            {
                "session": "d",
                "block": int(fields["blockIdx"][i, 0]),
                "text": TEXTS[i],
                "features": f"cube.{suffix}",
                "array": "cube",
                "row": i,
                "bins": len(fields["tx1"][0, i]),
            }
            for i in range(3)
        ]
        manifest = folder / f"{suffix}.jsonl"
        manifest.write_text("\n".join(map(json.dumps, [*lines, {"text": "no session"}])))
        summary = prepare_sessions(NeuralSessions(manifest), folder / suffix)
        assert summary["skipped"] == {"bad_manifest_line": 1}
        found = open_corpus(folder / suffix, "train").get(0, range(3))
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a["features"], b["features"])
            np.testing.assert_array_equal(a["labels"], b["labels"])
    lines[0]["row"], lines[1]["bins"] = 3, 60
    manifest.write_text("\n".join(map(json.dumps, lines)))
    summary = prepare_sessions(NeuralSessions(manifest), folder / "wrong")
    assert summary["skipped"] == {"wrong_shape": 2}
    manifest.write_text(json.dumps(lines[2] | {"array": "tube"}))
    with pytest.raises(UserError, match=r"cube\.npz has no array 'tube'"):
        NeuralSessions(manifest)


# ---------------------------------------------------------------------------------- generator


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return neural_synthetic.generate(TINY, tmp_path_factory.mktemp("neural") / "raw")


def test_generated_files_have_the_competition_layout(recordings):
    counts = {"train": 4, "test": 2, "competitionHoldOut": 1}
    assert {p.name for p in recordings.iterdir()} == {*counts, "synthetic.json"}
    assert json.loads((recordings / "synthetic.json").read_text())["synthetic"] is True
    for split, count in counts.items():
        files = sorted((recordings / split).iterdir())
        assert len(files) == TINY.days
        content = loadmat(files[0])
        assert content["sentenceText"].shape == (count,)
        assert content["blockIdx"].shape == (count, 1)
        for i in range(count):
            shapes = {content[f][0, i].shape for f in ("tx1", "tx2", "tx3", "tx4", "spikePow")}
            assert len(shapes) == 1 and shapes.pop()[1] == TINY.electrodes
            # Lower thresholds see no crossing that the higher ones do not.
            assert (content["tx4"][0, i] <= content["tx1"][0, i]).all()
    assert len(np.unique(loadmat(recordings / "train" / "synthetic.day000.mat")["blockIdx"])) == 2


def test_generated_files_are_the_same_again_and_others_for_another_seed(recordings, tmp_path):
    again = neural_synthetic.generate(TINY, tmp_path / "again")
    other = neural_synthetic.generate(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    for path in recordings.rglob("*.mat"):
        name = path.relative_to(recordings)
        assert path.read_bytes() == (again / name).read_bytes()
        assert path.read_bytes() != (other / name).read_bytes()
    with pytest.raises(UserError, match="other synthetic recordings"):
        neural_synthetic.generate(TINY, other)
    # A day does not depend on how many follow.
    fewer = neural_synthetic.generate(dataclasses.replace(TINY, days=1), tmp_path / "fewer")
    first = "train/synthetic.day000.mat"
    assert (fewer / first).read_bytes() == (recordings / first).read_bytes()


def test_generated_recordings_are_prepared_like_real_ones(recordings, tmp_path):
    areas = parse_areas("tx1[0:6],spikePow[0:6]")
    summary = prepare_sessions(NeuralSessions(recordings, areas), tmp_path / "out")
    assert summary["utterances"] + sum(summary["skipped"].values()) == 2 * 7
    assert summary["utterances"] >= 12
    corpus = open_corpus(tmp_path / "out", "train")
    assert list(corpus.users) == ["synthetic.day000", "synthetic.day001"]
    assert corpus.get(1, [0])[0]["features"].shape[1] == 12


def test_no_sentence_for_testing_is_in_any_training_text(recordings):
    def texts(split):
        files = (recordings / split).iterdir()
        return {str(t).strip() for f in files for t in loadmat(f)["sentenceText"]}

    heard = texts("train") | set(neural_synthetic.language_text(3000))
    tested = texts("test") | texts("competitionHoldOut")
    assert not heard & tested and not texts("test") & texts("competitionHoldOut")
    excluded = set(neural_synthetic.language_text(300))
    without = neural_synthetic.language_text(300, exclude=excluded, withheld=0.1)
    assert not excluded & set(without)
    words, fewer = ({w for t in part for w in t.split()} for part in (heard, without))
    assert 0.02 < len(words - fewer) / len(words) < 0.3
    # All the words of the tests are known, or a language model could not help.
    assert {w for t in tested for w in t.split()} <= {w for t in heard for w in t.split()}


def test_drift_leaves_less_of_the_tuning_every_day():
    config = NeuralConfig(days=16, electrodes=200, informative=150)
    days = list(neural_synthetic.electrodes_of_days(config))

    def alike(a, b):
        x, y = a.tuning[:150].ravel(), b.tuning[:150].ravel()
        return x @ y / np.sqrt((x @ x) * (y @ y))

    kept = [alike(days[0], day) for day in days]
    assert kept[0] == pytest.approx(1)
    assert 0.85 < kept[1] < 0.98 and 0.35 < kept[5] < 0.8 and kept[15] < 0.4
    # Nothing grows: a later day is as hard as an early one by itself.
    sizes = [day.tuning[:150].std() for day in days]
    assert sizes[15] == pytest.approx(sizes[0], rel=0.15)
    assert days[15].letters.std() == pytest.approx(days[0].letters.std(), rel=0.15)
    assert all((day.tuning[150:] == 0).all() for day in days)
    still = dataclasses.replace(
        config, tuning_drift=0.0, replaced=0.0, rotation=0.0, bend_drift=0.0, letter_drift=0.0
    )
    first, *_, last = neural_synthetic.electrodes_of_days(still)
    np.testing.assert_allclose(first.tuning, last.tuning)
    np.testing.assert_allclose(first.letters, last.letters)


def test_crossings_and_power_have_the_rates_that_the_trajectory_asks_for():
    day = next(neural_synthetic.electrodes_of_days(NeuralConfig(days=1, dead=0.0)))
    day = day._replace(bend=np.zeros(256))
    rng = np.random.default_rng(0)
    path = neural_synthetic.trajectory(rng, "we eat fresh bread" * 40, day.letters, 10.0)
    found = neural_synthetic.record(rng, path, day, np.zeros(256))
    drive = path @ day.tuning.T
    rate = np.exp(day.base + drive)
    high = drive > 0.3
    for part in (high[:, :128], (drive < -0.3)[:, :128]):
        assert part.sum() > 10_000
        expected = rate[:, :128][part].sum()
        # Six standard deviations of a Poisson count.
        assert found["tx1"][:, :128][part].sum() == pytest.approx(expected, abs=6 * expected**0.5)
        power = (day.floor * (0.3 + rate))[:, :128][part].sum()
        assert found["spikePow"][:, :128][part].sum() == pytest.approx(power, rel=0.04)
    assert not high[:, 128:].any()  # electrodes that see nothing of it


@pytest.mark.slow
def test_the_program_prepares_days_that_a_simulation_trains_on(recordings, tmp_path):
    command = [sys.executable, "-m", "experiments.prepare_data", "--dataset=neural", "--json"]
    command += [f"--source={recordings}", f"--out={tmp_path / 'out'}", "--stride=4"]
    narrow = subprocess.run(command, capture_output=True, text=True, check=False)
    # No sentence has 128 channels.
    assert narrow.returncode == 2 and "14 wrong_shape" in narrow.stderr
    command.append("--areas=tx1[0:6],spikePow[0:6]")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["splits"]["train"]["users"] == 2

    import jax
    import optax

    from fedasr.data.batching import Batching
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import PoissonSampler

    options = {"vocab": 30, "features": 12, "units": 4, "layers": 1, "window": 2, "stride": 2}
    recogniser = make_recogniser("recurrent", options)
    corpus = open_corpus(tmp_path / "out", "train")
    simulation = Simulation(
        corpus,
        Mechanism(1.0, "global", 0.0, PoissonSampler(2, 2, 0)),
        FedAvg(local_training(recogniser.loss, optax.sgd(0.1)), optax.sgd(1.0)),
        Batching(2, steps=2, select=ARRAYS),
    )
    start = simulation.init(recogniser.init(jax.random.key(0)))
    first = jax.device_get(start.params)
    for state, metrics in simulation.run(start, 1):  # noqa: B007
        assert (metrics.clients, metrics.invalid, metrics.aux["infeasible"]) == (2, 0, 0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, state.params)
    assert all(value > 0 for value in jax.tree.leaves(moved))
