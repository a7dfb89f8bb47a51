"""Transcripts of files are what evaluation writes of them; exported models transcribe alike."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.recordings import Recording
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.utterances import Utterance
from fedasr.decoding.ngram import estimate, write_arpa
from fedasr.errors import UserError
from fedasr.models import peft
from fedasr.models.recogniser import Recogniser
from fedasr.privacy import ledger
from fedasr.text import CharTokenizer, tokenizer_for
from fedasr.training import exported, starts, transcription
from fedasr.training.builders import decoders, models
from fedasr.training.checkpoint import Checkpointer, restore_params
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.config import Config, default_config
from fedasr.training.evaluation import Evaluator, evaluation_buckets
from fedasr.training.exporting import export
from fedasr.training.logging import to_json
from fedasr.training.transcription import Transcriber, load

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

RATES = {"a": 16_000, "b": 8_000, "c": 44_100}
MODEL = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of two or three users, of several rates, in a folder."""
    out, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for user, rate in RATES.items():
        for i in range(3):
            times = np.arange(round(rate * rng.uniform(0.5, 1.6))) / rate
            pitch = rng.uniform(100, 900, 4)
            tones = np.sin(2 * np.pi * np.cumsum(np.repeat(pitch, -(-len(times) // 4))) / rate)
            noise = 0.1 * rng.standard_normal(len(times))
            soundfile.write(out / f"{user}{i}.wav", 0.3 * tones[: len(times)] + noise, rate)
    return out


@pytest.fixture(scope="module", params=["features", "audio"])
def corpus(request, folder, tmp_path_factory):
    utterances = [
        Utterance(path.stem, path.stem[0], "one two", "test", Recording(path))
        for path in sorted(folder.iterdir())
    ]
    out = tmp_path_factory.mktemp(request.param) / "data"
    prepare(utterances, out, name="tones", store=request.param)
    return out


def config_for(corpus, **changes):
    tree = to_json(default_config().to_dict())
    tree["data"]["dir"] = str(corpus)
    tree["model"]["options"] |= MODEL
    for section, values in changes.items():
        tree[section] |= values
    config = Config.of(tree)
    tokenizer = tokenizer_for(read_metadata(corpus))
    return config.with_data(characters=tokenizer.characters, identity="0" * 16)


def initial(config):
    return jax.device_get(models.initial_params(models.build_recogniser(config), config))


def talkative(params):
    """A model that is sure of something in each frame, so that rounding changes no text."""
    params = copy.deepcopy(params)
    rng = np.random.default_rng(1)
    params["output"]["kernel"] = 8 * rng.standard_normal(params["output"]["kernel"].shape)
    params["output"]["kernel"] = params["output"]["kernel"].astype(np.float32)
    return params


def saved(config, params, out, entries=()):
    metadata = {
        "stage": "main",
        "units": 3,
        "config": config.tree(),
        "ledger": {"known": True, "earlier": [], "own": ledger.to_data(entries)},
    }
    with Checkpointer(out / "checkpoints") as writer:
        writer.save(3, {"params": params}, metadata)
        writer.wait()
    return out


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    config = config_for(corpus)
    params = talkative(initial(config))
    users = ledger.Users.of(["anna", "bob"])
    entries = [ledger.without_privacy("the run", "central", 3, users)]
    return saved(config, params, tmp_path_factory.mktemp("run"), entries)


def scored(workdir, corpus, decoding):
    """{user: sorted hypotheses} of evaluation."""
    opened = open_corpus(corpus, "test")
    config = Config.of(checkpoint_metadata(workdir)["config"])
    tokenizer = tokenizer_for(read_metadata(corpus))
    decoder = decoders.make_run_decoder(decoding, corpus, tokenizer, ["test"])
    evaluator = Evaluator(
        models.build_recogniser(config),
        evaluation_buckets([opened]),
        4,
        jax.devices()[:1],
        tokenizer=tokenizer,
        decoder=decoder,
    )
    decoded, _ = evaluator.decoded(restore_params(workdir), opened)
    assert sorted((one.user, one.number) for one in decoded) == [
        (user, i) for user in range(3) for i in range(3)
    ]
    found = {}
    for one in decoded:
        assert one.reference == "one two"
        found.setdefault(opened.users[one.user], []).append(one.hypothesis)
    return {user: sorted(texts) for user, texts in found.items()}


@pytest.mark.parametrize("name", ["greedy", "beam", "beam with a language model"])
def test_texts_are_what_evaluation_scored(workdir, corpus, folder, name, tmp_path):
    decoding = Config().decoding
    if name != "greedy":
        write_arpa(estimate(["one six"], 2), tmp_path / "lm.arpa")
        lm = str(tmp_path / "lm.arpa") if "language" in name else ""
        decoding = dataclasses.replace(decoding, name="beam", beam=4, lm=lm)
    model = load(workdir, decoding=decoding)
    found = {}
    for path in sorted(folder.iterdir()):
        transcript = model.transcribe(path)
        found.setdefault(path.stem[0], []).append(transcript.text)
        assert [word.word for word in transcript.words] == transcript.text.split()
        assert abs(transcript.seconds - soundfile.info(path).duration) < 1e-3
        times = [time for word in transcript.words for time in (word.start, word.end)]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= transcript.seconds + 0.05
    expected = scored(workdir, corpus, decoding)
    assert {user: sorted(texts) for user, texts in found.items()} == expected
    assert all(text for texts in expected.values() for text in texts)


def test_arrays_and_contents_are_transcribed_alike(workdir, folder):
    model, path = load(workdir), folder / "b0.wav"
    samples, rate = soundfile.read(path, dtype="float32")
    texts = {
        model.transcribe(path).text,
        model.transcribe(path.read_bytes()).text,
        model.transcribe(samples, rate).text,
    }
    assert len(texts) == 1
    with pytest.raises(UserError, match="floating-point"):
        model.transcribe(np.zeros(100, np.int16))
    assert model.transcribe(np.zeros(10, np.float32)) == ("", (), 0.001)


def test_long_recordings_come_in_parts(workdir, folder):
    """Three recordings with pauses between, in parts: what is said in each is found in order."""
    if (
        read_metadata(Config.of(checkpoint_metadata(workdir)["config"]).data.dir)["options"][
            "store"
        ]
        == "audio"
    ):
        pytest.skip("one form of the features is enough")
    pieces = []
    for name in ("a0", "a1", "a2"):
        samples, _ = soundfile.read(folder / f"{name}.wav", dtype="float32")
        pieces += [samples[:16_000], np.zeros(6_000, np.float32)]
    audio = np.concatenate(pieces)
    model = load(workdir, longest=1.5)
    found = model.transcribe(audio)
    starts_of = [word.start for word in found.words]
    assert starts_of == sorted(starts_of) and found.seconds == round(len(audio) / 16_000, 3)
    assert 0 <= starts_of[0] < 1.5 and starts_of[-1] > 2.5
    assert found.text == " ".join(word.word for word in found.words)


def test_parts_are_heard_once_and_have_the_times_of_the_whole():
    """By a model that writes the letters that blocks of samples are: one every half second."""
    letters = "abcdefghijkl"
    audio = np.zeros((50 * len(letters), 160), np.float32)
    audio[25::50] = np.arange(1, 1 + len(letters))[:, None] / 32768

    def scores(params, batch):
        tokens = batch["features"][..., 0].astype(int)
        found = jax.nn.log_softmax(30.0 * jax.nn.one_hot(tokens, 1 + len(letters)))
        return found, batch["features_length"], None, None

    recogniser = Recogniser(None, None, None, scores)
    model = Transcriber(recogniser, {}, CharTokenizer(letters), takes_audio=True, longest=1.8)
    found = model.transcribe(audio.reshape(-1))
    assert found.text.replace(" ", "") == letters and len(found.words) > 2
    for word in found.words:
        places = [letters.index(word.word[0]), letters.index(word.word[-1])]
        expected = [0.25 + 0.5 * places[0], 0.26 + 0.5 * places[1]]
        np.testing.assert_allclose(word[1:], expected, atol=0.011)


def test_whisper_hears_its_window_with_the_context():
    def seconds(longest, **options):
        tree = to_json(default_config().to_dict())
        tree["model"] = {"name": "whisper", "options": options}
        return transcription._bounded(Config.of(tree), longest)

    assert seconds(40.0) == 30.0 and seconds(8.0) == 8.0
    assert seconds(40.0, positions=500) == 10.0
    assert seconds(40.0, objective="ctc") == 28.0


def test_what_cannot_be_read_does_not_stop_the_others(workdir, folder, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    good = folder / "a0.wav"
    model = load(workdir)
    first, broken, second = model.transcribe_all([good, tmp_path / "broken.wav", good])
    assert first == second and isinstance(broken, UserError) and "\n" not in str(broken)


def test_exported_and_read_again(workdir, corpus, folder, tmp_path):
    out = tmp_path / "model"
    export(workdir, out)
    params, again = restore_params(workdir), restore_params(out)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    content = (out / "config.json").read_text()
    assert str(corpus) not in content
    kept = json.loads(content)["ledger"]["own"][0]["users"]
    assert kept == {"count": 2, "digest": "", "hashes": None}
    path = folder / "c1.wav"
    assert load(out, data=corpus).transcribe(path) == load(workdir).transcribe(path)
    card = (out / "README.md").read_text()
    assert "2 users, 3 steps (central): epsilon infinite" in card
    assert "Not covered" in card and "'tones'" in card and str(corpus) not in card
    with pytest.raises(UserError, match="is not empty"):
        export(workdir, out)
    # A run may start from it, with its ledger.
    config = dataclasses.replace(config_for(corpus), init_from=str(out))
    start = starts.read_start(config, None, tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(start), params)


def test_damaged_exports_are_one_line(workdir, tmp_path):
    out = tmp_path / "model"
    export(workdir, out)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        restore_params(out)
    weights.write_bytes(whole)
    content = json.loads((out / "config.json").read_text())
    content["shapes"]["output/kernel"] = [1, 1]
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="output/kernel is"):
        restore_params(out)
    (out / "config.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        restore_params(out)
    assert not exported.is_exported(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        restore_params(tmp_path)


def test_adapted_models_are_exported_merged(corpus, tmp_path):
    """And a run starts from an adapted model, a base, or one that is adapted in another way."""
    plain = config_for(corpus)
    lora = config_for(corpus, peft={"kind": "lora", "rank": 2})
    base = talkative(initial(plain))
    params = jax.device_get(models.completed(base, lora))
    qkv = params["block_0"]["attention"]["qkv"]
    qkv["kernel_lora_b"] = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
    workdir = saved(lora, params, tmp_path / "run")
    export(workdir, tmp_path / "merged")
    merged = restore_params(tmp_path / "merged")
    moved = qkv["kernel"] + 16 / 2 * qkv["kernel_lora_a"] @ qkv["kernel_lora_b"]
    np.testing.assert_allclose(merged["block_0"]["attention"]["qkv"]["kernel"], moved, atol=1e-5)
    kept = Config.of(checkpoint_metadata(tmp_path / "merged")["config"]).peft
    assert kept.kind == "full"
    assert "adapted by lora (rank 2" in (tmp_path / "merged" / "README.md").read_text()
    export(workdir, tmp_path / "factors", merge=False)
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "factors"), params)

    def begun(config, path):
        config = dataclasses.replace(config, init_from=str(path))
        return jax.device_get(starts.read_start(config, None, tmp_path / "new"))

    jax.tree.map(np.testing.assert_array_equal, begun(lora, workdir), params)  # goes on
    other = begun(config_for(corpus, peft={"kind": "ffa_lora", "rank": 3}), workdir)
    found = other["block_0"]["attention"]["qkv"]
    np.testing.assert_allclose(found["kernel"], moved, atol=1e-5)
    assert found["kernel_lora_b"].shape == (3, 48) and not found["kernel_lora_b"].any()
    assert begun(plain, workdir).keys() == base.keys()
    half = begun(config_for(corpus, peft={"kind": "lora", "frozen_dtype": "bfloat16"}), workdir)
    assert half["output"]["kernel"].dtype == jax.numpy.bfloat16

    adapter = config_for(corpus, peft={"kind": "adapter"})
    bottleneck = saved(adapter, models.completed(base, adapter), tmp_path / "adapter")
    with pytest.raises(UserError, match="layers of their own"):
        export(bottleneck, tmp_path / "no")
    export(bottleneck, tmp_path / "kept", merge=False)
    assert peft.kind_of(peft.PeftConfig("adapter")).reads  # what the card tells
    assert "adapted by adapter (bottleneck 32)" in (tmp_path / "kept" / "README.md").read_text()


def test_formats_that_do_not_fit(workdir, tmp_path):
    with pytest.raises(UserError, match="--format=gguf: choose one of fedasr"):
        export(workdir, tmp_path / "x", "gguf")
    with pytest.raises(UserError, match="huggingface"):
        export(workdir, tmp_path / "y", "huggingface")


def test_models_that_cannot_transcribe(workdir, corpus, tmp_path):
    with pytest.raises(UserError, match="longest=0"):
        load(workdir, longest=0)
    with pytest.raises(UserError, match="decoding: "):
        load(workdir, decoding={"nosuch": 1})
    with pytest.raises(UserError, match="no checkpoint in"):
        load(tmp_path)
    tree = checkpoint_metadata(workdir)["config"]
    elsewhere = copy.deepcopy(tree)
    elsewhere["data"]["dir"] = str(tmp_path / "gone")
    params = restore_params(workdir)
    moved = saved(Config.of(elsewhere), params, tmp_path / "moved")
    assert load(moved).tokenizer.characters == tree["data"]["characters"]
    with pytest.raises(UserError, match="from_train is made from the prepared data"):
        load(moved, decoding={"name": "beam", "lm": "from_train"})
    elsewhere["data"]["characters"] = ["▁one", "▁two"]
    subwords = saved(Config.of(elsewhere), params, tmp_path / "subwords")
    with pytest.raises(UserError, match="the model writes subwords"):
        load(subwords)
