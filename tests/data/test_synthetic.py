import collections
import ctypes.util
import dataclasses
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from fedasr.data import synthetic
from fedasr.data.synthetic import config as config_lib
from fedasr.data.synthetic import espeak, sentences
from fedasr.data.synthetic import voices as voices_lib
from fedasr.errors import UserError

TINY = synthetic.SyntheticConfig(
    seed_users=2,
    train_users=4,
    dev_users=1,
    test_users=2,
    seed_utterances=(3, 5),
    train_utterances=(3, 5),
    dev_utterances=(2, 3),
    test_utterances=(2, 3),
)

# Prints one hash over ids, users, splits, texts and samples of the corpus.
HASH_PROGRAM = """
import hashlib, sys
from fedasr.data import synthetic
config = eval(sys.argv[1], vars(synthetic))
digest = hashlib.sha256()
for utterance in synthetic.synthetic_utterances(config):
    digest.update(repr((utterance.id, utterance.user, utterance.split, utterance.text)).encode())
    digest.update(utterance.audio()[0].tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("soxr", reason="soxr is not installed")
    try:
        return espeak.engine()
    except UserError as error:
        pytest.skip(f"no speech engine: {error}")


@pytest.fixture
def no_engine(monkeypatch):
    """A machine without espeakng-loader and without a system library."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    espeak.engine_of.cache_clear()
    yield
    espeak.engine_of.cache_clear()


def corpus(config):
    return list(synthetic.synthetic_utterances(config))


def sentences_by_user(config):
    """Texts alone, which need no engine: {user: (split, [text])}."""
    return {
        user: (split, sentences.sentences_of(config, user, split))
        for user, split in config_lib.users_of(config)
    }


def test_bits_are_equal_in_two_processes(engine):
    printed = {
        subprocess.run(
            [sys.executable, "-c", HASH_PROGRAM, repr(TINY)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    digest = hashlib.sha256()
    for utterance in corpus(TINY):
        described = (utterance.id, utterance.user, utterance.split, utterance.text)
        digest.update(repr(described).encode())
        digest.update(utterance.audio()[0].tobytes())
    assert printed == {digest.hexdigest() + "\n"}


def test_audio_does_not_depend_on_what_was_spoken_before(engine):
    """Every accent, since some engine state shows only in the phonemes of one of them."""
    config = synthetic.SyntheticConfig()
    voices = [synthetic.speaker_voice(config, f"target-{i:03d}") for i in range(8)]
    voices += [synthetic.speaker_voice(config, f"seed-{i:03d}") for i in range(2)]
    assert {voice.accent for voice in voices} == set(voices_lib.ACCENTS)
    text = "seven three nine zero four two"
    first = [synthetic.synthesize(text, voice) for voice in voices]
    for other in ("five", "one three", "zero zero zero eight"):
        for index in reversed(range(len(voices))):
            synthetic.synthesize(other, voices[index - 3])
            np.testing.assert_array_equal(synthetic.synthesize(text, voices[index]), first[index])


def test_audio_does_not_depend_on_the_order(engine):
    """Whole corpus backwards; the ends of short utterances once showed traces of longer ones."""
    utterances = corpus(TINY)
    forwards = [utterance.audio()[0].tobytes() for utterance in utterances]
    backwards = [utterance.audio()[0].tobytes() for utterance in reversed(utterances)]
    assert forwards == backwards[::-1]


def test_audio_survives_pickling(engine):
    utterance = corpus(TINY)[3]
    samples, rate = pickle.loads(pickle.dumps(utterance.audio))()
    assert rate == 16_000
    np.testing.assert_array_equal(samples, utterance.audio()[0])


def test_samples_are_sane(engine):
    config = synthetic.SyntheticConfig(seed_utterances=(1, 1), train_utterances=(1, 1))
    for utterance in corpus(config)[::5]:
        samples, rate = utterance.audio()
        seconds = len(samples) / rate
        words = len(utterance.text.split())
        assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, 16_000)
        assert 0.2 * words < seconds < 0.75 * words
        peak = np.abs(samples).max()
        assert 0.2 < peak < 0.85
        assert np.sqrt(np.mean(samples**2)) > 0.02 * peak  # speech, not one click
        assert np.abs(samples.mean()) < 0.02
        # On the 16-bit grid: an int16 copy loses nothing.
        np.testing.assert_array_equal(samples, np.rint(samples * 32768) / 32768)


def test_pitch_of_the_voice_is_heard(engine):
    """The strongest autocorrelation lag of a vowel lies within the voice's pitch range."""
    config = synthetic.SyntheticConfig()
    for user in ("seed-000", "target-003"):
        voice = synthetic.speaker_voice(config, user)
        samples = synthetic.synthesize("four", voice).astype(np.float64)
        start = int(np.argmax(np.convolve(samples**2, np.ones(1600), "valid")))
        window = samples[start : start + 1600]
        correlation = np.correlate(window, window, "full")[1599:]
        lag = 40 + int(np.argmax(correlation[40:320]))  # 50 to 400 Hz
        assert 0.8 * voice.pitch[0] < 16_000 / lag < 1.25 * voice.pitch[1]


def test_voices_differ(engine):
    config = synthetic.SyntheticConfig()
    users = [user for user, _ in config_lib.users_of(config)]
    voices = [synthetic.speaker_voice(config, user) for user in users]
    assert len(set(voices)) == len(users) == 120
    spoken = {synthetic.synthesize("two five", voice).tobytes() for voice in voices[::12]}
    assert len(spoken) == 10


def test_accents_differ(engine):
    """One voice in each accent; digits hold every phoneme that the accents replace."""
    base = synthetic.speaker_voice(synthetic.SyntheticConfig(), "seed-000")
    spoken = {}
    for accent in voices_lib.ACCENTS:
        voice = dataclasses.replace(base, accent=accent)
        spoken[synthetic.synthesize(" ".join(sentences.DIGITS), voice).tobytes()] = accent
    assert len(spoken) == len(voices_lib.ACCENTS)


def test_accents_keep_every_phoneme(engine):
    """The engine drops a phoneme that it does not know, so each replacement must sound."""
    base = synthetic.speaker_voice(synthetic.SyntheticConfig(), "seed-000")
    for accent, rules in voices_lib.ACCENTS.items():
        if isinstance(rules, str):
            continue
        for word in sentences.DIGITS:
            plain = synthetic.synthesize(word, base)
            spoken = synthetic.synthesize(word, dataclasses.replace(base, accent=accent))
            assert 0.6 < len(spoken) / len(plain) < 1.6, (accent, word)


def test_domains_differ_in_accent_and_voice():
    config = synthetic.SyntheticConfig()
    voices = collections.defaultdict(list)
    for user, split in config_lib.users_of(config):
        voices[split].append(synthetic.speaker_voice(config, user))
    accents = {split: {voice.accent for voice in voices[split]} for split in synthetic.SPLITS}
    assert accents["seed"] == {"en-us", "en-gb-x-rp"}
    assert accents["train"] == accents["dev"] == accents["test"]
    assert not accents["seed"] & accents["train"]
    assert max(v.pitch[0] for v in voices["seed"]) < min(v.pitch[0] for v in voices["test"])


@pytest.mark.parametrize("task", ["digits", "commands", "fresh"])
def test_splits_share_no_user_and_no_sentence(task):
    config = synthetic.SyntheticConfig(task=task)
    by_user = sentences_by_user(config)
    users, sentences = collections.Counter(), collections.defaultdict(set)
    for split, texts in by_user.values():
        users[split] += 1
        sentences[split] |= set(texts)
    assert users == {"seed": 24, "train": 68, "dev": 12, "test": 16}
    assert len(by_user) == 120
    for split in synthetic.SPLITS:
        others = [sentences[other] for other in synthetic.SPLITS if other != split]
        assert sentences[split].isdisjoint(set().union(*others))
        for own, texts in by_user.values():
            low, high = config.utterances(own)
            assert low <= len(texts) <= high
            assert len(set(texts)) == len(texts)
    total = sum(len(texts) for _, texts in by_user.values())
    assert total == synthetic.total_utterances(config)


def test_vocabularies():
    def words(task):
        by_user = sentences_by_user(synthetic.SyntheticConfig(task=task))
        return collections.Counter(
            word for _, texts in by_user.values() for text in texts for word in text.split()
        )

    digits = words("digits")
    assert set(digits) == set(sentences.DIGITS)
    assert min(digits.values()) > 0.05 * sum(digits.values())
    assert 90 <= len(words("commands")) <= 130


@pytest.mark.parametrize(
    ("task", "expected"),
    [("digits", "9c1c49813dac6bab"), ("commands", "34c9196185f526c1")],
)
def test_sentences_and_voices_never_change(task, expected):
    """Corpora that were made before must stay what they are."""
    config = synthetic.SyntheticConfig(task=task)
    content = [
        (user, split, texts, synthetic.speaker_voice(config, user))
        for user, (split, texts) in sentences_by_user(config).items()
    ]
    assert hashlib.sha256(repr(content).encode()).hexdigest()[:16] == expected


def test_fresh_words_are_fresh_and_rare_ones_rare():
    config = synthetic.SyntheticConfig(task="fresh", train_users=200)
    holders = collections.Counter()
    said = collections.defaultdict(collections.Counter)
    for split, texts in sentences_by_user(config).values():
        words = [word for text in texts for word in text.split()]
        said[split].update(words)
        if split == "train":
            holders.update(set(words))
    fresh = set(synthetic.FRESH_WORDS)
    assert not fresh & set(said["seed"]) and set(said["seed"]) == set(said["train"]) - fresh
    for split in ("train", "dev", "test"):
        share = sum(said[split][word] for word in fresh) / (said[split].total() / 4)
        assert 0.4 < share < 0.6
    rare = [holders[word] for word in synthetic.RARE_FRESH_WORDS]
    common = [holders[word] for word in synthetic.COMMON_FRESH_WORDS]
    assert 2 <= min(rare) and max(rare) < 40 and min(common) > 100
    # Everybody else's words are no guide: seven in ten have none of the rare ones.
    assert (
        0.2 * 200
        < len(
            {
                u
                for u, (s, t) in sentences_by_user(config).items()
                if s == "train" and set(" ".join(t).split()) & set(synthetic.RARE_FRESH_WORDS)
            }
        )
        < 0.4 * 200
    )
    voices = [synthetic.speaker_voice(config, user) for user, _ in config_lib.users_of(config)]
    for domain in (voices[:24], voices[24:]):
        assert {voice.accent for voice in domain} == set(voices_lib.ACCENTS)


def test_digit_strings_have_three_to_five_words():
    texts = [text for _, texts in sentences_by_user(TINY).values() for text in texts]
    assert {len(text.split()) for text in texts} == {3, 4, 5}


def test_users_differ_in_size_and_in_words():
    """Not IID: pooled sentences dealt at random to the same users would differ far less."""
    config = synthetic.SyntheticConfig()
    texts = [texts for split, texts in sentences_by_user(config).values() if split == "train"]
    assert len({len(user) for user in texts}) > 10

    def spread(groups):
        counts = np.array(
            [[sum(t.split().count(d) for t in g) for d in sentences.DIGITS] for g in groups]
        )
        return (counts / counts.sum(1, keepdims=True)).std(0).mean()

    pooled = np.random.default_rng(0).permutation([text for user in texts for text in user])
    dealt = np.split(pooled, np.cumsum([len(user) for user in texts])[:-1])
    assert spread(texts) > 1.5 * spread([list(group) for group in dealt])


def test_ids_are_stable_and_other_seeds_differ(engine):
    utterances = corpus(TINY)
    assert utterances[0].id == "seed-000-0000"
    assert utterances[-1].user == "target-006"
    assert len({u.id for u in utterances}) == len(utterances) == synthetic.total_utterances(TINY)
    other = dataclasses.replace(TINY, seed=1)
    assert [u.text for u in corpus(other)] != [u.text for u in utterances]
    # More users leave the others as they were.
    more = dataclasses.replace(TINY, test_users=3)
    assert [u.text for u in corpus(more)][: len(utterances)] == [u.text for u in utterances]


def test_fingerprint_covers_config_and_engine(engine, monkeypatch):
    first = synthetic.fingerprint(TINY)
    assert first == synthetic.fingerprint(dataclasses.replace(TINY))
    assert int(first, 16) >= 0
    assert first != synthetic.fingerprint(dataclasses.replace(TINY, seed=1))
    monkeypatch.setattr(engine, "version", "0.0")
    assert first != synthetic.fingerprint(TINY)


def test_missing_engine_names_the_remedy(no_engine):
    pytest.importorskip("soxr")
    for call in (synthetic.synthetic_utterances, synthetic.fingerprint):
        with pytest.raises(UserError, match=r"fedasr\[quickstart\].*libespeak-ng1") as caught:
            call(TINY)
        assert "\n" not in str(caught.value)


def test_missing_resampler_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match=r"soxr.*fedasr\[quickstart\]"):
        synthetic.synthetic_utterances(TINY)


def test_unusable_system_library_names_the_remedy(no_engine, monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "no-such-library.so")
    with pytest.raises(UserError, match=r"cannot be loaded.*apt-get install"):
        synthetic.fingerprint(TINY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "poems"}, "task must be one of"),
        ({"concentration": 0.0}, "concentration"),
        ({"dev_users": -1}, "dev_users"),
        ({"train_utterances": (5, 4)}, "train_utterances"),
        ({f"{split}_users": 0 for split in synthetic.SPLITS}, "no users"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        synthetic.SyntheticConfig(**fields)
