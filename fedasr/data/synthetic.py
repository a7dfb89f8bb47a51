"""The embedded default corpus: spoken English made on this machine by eSpeak NG.

Every user has a voice of its own (accent, pitch, vocal tract, rate, microphone tone) and a mix of
words or topics of its own. Two domains differ in accent and in voice: split "seed" (low voices,
General American and Received Pronunciation) and splits "train", "dev" and "test" (higher voices,
eight other accents). Task "fresh" has one domain of all voices; there the splits differ in words:
`FRESH_WORDS` are in all but "seed". All splits are disjoint in users and in sentences.

A recording is a pure function of (text, voice) for one version of eSpeak NG: bit for bit the same
in any process and after any other synthesis.
"""

import contextlib
import ctypes
import ctypes.util
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedasr.data import splits
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.data.conversion import Utterance

SAMPLE_RATE = 16_000  # Hz
SPLITS = ("seed", "train", "dev", "test")

# Raised by hand whenever the same config would give other sentences, voices or samples.
_GENERATOR_VERSION = 1

_REMEDY = "`pip install 'fedasr[quickstart]'` or `apt-get install libespeak-ng1 espeak-ng-data`"

# Share of all sentences that belongs to each split, by a hash of the sentence.
_SENTENCE_SHARES = {"seed": 0.25, "train": 0.5, "dev": 0.1, "test": 0.15}


# ---------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What to generate.

    Attributes:
      task: "digits" (3 to 5 spoken digits), "commands" (short home commands, about 100 words) or
        "fresh" (errands of four words: 48 general ones and the `FRESH_WORDS`, absent from "seed").
      seed_users, train_users, dev_users, test_users: number of users of each split.
      seed_utterances, train_utterances, dev_utterances, test_utterances: least and greatest number
        of utterances of a user; users draw theirs uniformly.
      concentration: Dirichlet concentration of a user's mix of digits or topics; small is non-IID.
      seed: of all random choices.

    Raises:
      UserError: for an unknown task, no users, or an impossible range.
    """

    task: str = "digits"
    seed_users: int = 24
    train_users: int = 68
    dev_users: int = 12
    test_users: int = 16
    seed_utterances: tuple[int, int] = (30, 50)
    train_utterances: tuple[int, int] = (30, 60)
    dev_utterances: tuple[int, int] = (8, 16)
    test_utterances: tuple[int, int] = (8, 16)
    concentration: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in _SENTENCE_MAKERS:
            raise UserError(f"task must be one of {sorted(_SENTENCE_MAKERS)}, not {self.task!r}")
        if not self.concentration > 0:
            raise UserError(f"concentration must be above 0, not {self.concentration}")
        for split in SPLITS:
            users, (low, high) = self.users(split), self.utterances(split)
            if users < 0:
                raise UserError(f"{split}_users must be at least 0, not {users}")
            if not 1 <= low <= high <= 500:
                raise UserError(
                    f"{split}_utterances must be (least, greatest) within 1 to 500, not {low, high}"
                )
        if not any(self.users(split) for split in SPLITS):
            raise UserError("the corpus has no users: raise train_users")

    def users(self, split: str) -> int:
        """Number of users of `split`."""
        return getattr(self, f"{split}_users")

    def utterances(self, split: str) -> tuple[int, int]:
        """Least and greatest number of utterances of a user of `split`."""
        return tuple(getattr(self, f"{split}_utterances"))


def tasks() -> list[str]:
    """What the users of a synthetic corpus may say."""
    return sorted(_SENTENCE_MAKERS)


def expected_users(config: SyntheticConfig, split: str) -> int:
    """Number of users of a split, or of a part of splits (see `fedasr.data.splits`); no engine.

    Raises:
      UserError: it is no split.
    """
    users: dict[str, list[str]] = {name: [] for name in SPLITS if config.users(name)}
    for user, name in _users(config):
        users[name].append(user)

    def open_split(name):
        sizes = [_utterance_count(config, user, name) for user in users[name]]
        return types.SimpleNamespace(users=users[name], sizes=np.array(sizes))

    return len(splits.resolve(split, list(users), open_split, "the synthetic corpus").users)


def total_utterances(config: SyntheticConfig) -> int:
    """Number of utterances that `synthetic_utterances(config)` yields; needs no engine."""
    return sum(_utterance_count(config, user, split) for user, split in _users(config))


def fingerprint(config: SyntheticConfig) -> str:
    """Hexadecimal name of the corpus: covers the config, the generator and the engine's version.

    Raises:
      UserError: if eSpeak NG is not installed.
    """
    described = dataclasses.asdict(config) | {
        "generator": _GENERATOR_VERSION,
        "engine": _engine().version,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def synthetic_utterances(config: SyntheticConfig) -> Iterator["Utterance"]:
    """Yields the corpus user by user, in the order of `SPLITS`.

    Nothing is synthesised until an utterance's `audio()` is called, which gives float32 [samples]
    in [-1, 1] at 16 kHz. `audio` can be pickled and called in any process and any order.

    Raises:
      UserError: at once, if eSpeak NG or soxr is not installed.
    """
    _require_soxr()
    _engine()
    return _utterances(config)


def _utterances(config: SyntheticConfig) -> Iterator["Utterance"]:
    from fedasr.data.conversion import Utterance

    for user, split in _users(config):
        voice = speaker_voice(config, user)
        for index, text in enumerate(_sentences(config, user, split)):
            name = f"{user}-{index:04d}"
            spoken = _vary(voice, _random(config, name))
            audio = functools.partial(_audio, text, spoken)
            yield Utterance(id=name, user=user, text=text, split=split, audio=audio)


def _users(config: SyntheticConfig) -> Iterator[tuple[str, str]]:
    """(user, split) pairs; target users are numbered through train, dev and test."""
    numbers = {"seed": 0, "target": 0}
    for split in SPLITS:
        domain = "seed" if split == "seed" else "target"
        for _ in range(config.users(split)):
            yield f"{domain}-{numbers[domain]:03d}", split
            numbers[domain] += 1


def _random(config: SyntheticConfig, *purpose: str) -> random.Random:
    # A string seed goes through SHA-512: the same stream in every process and Python version.
    return random.Random("/".join((str(config.seed), *purpose)))


def _utterance_count(config: SyntheticConfig, user: str, split: str) -> int:
    return _random(config, user, "count").randint(*config.utterances(split))


# ---------------------------------------------------------------------------- sentences

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ROOM = ("kitchen", "bedroom", "bathroom", "garden", "office", "hall")
_COUNT = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
_TENS = ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "ninety")
_WHO = ("anna", "david", "maria", "mum", "dad", "the doctor", "my sister", "my brother")
_FOOD = ("milk", "bread", "eggs", "apples", "coffee", "sugar", "rice", "butter", "cheese", "tea")
_DISH = ("pasta", "rice", "eggs", "cake", "bread")
_MUSIC = ("jazz", "rock", "piano", "dance", "quiet")

# Topic -> patterns; a pattern is a sequence of slots, a slot the choices for one place.
_TOPICS: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "lights": (
        (("turn", "switch"), ("on", "off"), ("the",), _ROOM, ("light", "lights", "lamp")),
        (("dim", "set"), ("the",), _ROOM, ("light", "lights", "lamp"), ("to",), _TENS),
    ),
    "music": (
        (("play",), ("some", "more"), _MUSIC, ("music",), ("in the",), _ROOM),
        (("turn the music", "turn the radio"), ("up", "down", "off"), ("in the",), _ROOM),
    ),
    "timers": (
        (("set", "start"), ("a timer for",), (*_COUNT, *_TENS[1:]), ("minutes", "hours")),
        (("set a timer for the",), _DISH, ("to",), (*_COUNT, *_TENS[1:]), ("minutes",)),
    ),
    "heating": (
        (("turn", "switch"), ("the heating", "the fan"), ("on", "off"), ("in the",), _ROOM),
        (("make the",), _ROOM, _COUNT, ("degrees",), ("warmer", "cooler")),
    ),
    "calls": (
        (
            ("call", "text"),
            _WHO,
            ("now", "tonight"),
            ("and say",),
            ("hello", "i am late", "good night"),
        ),
        (("remind me to call",), _WHO, ("at", "before"), _COUNT),
    ),
    "shopping": (
        (("add",), _FOOD, ("and",), _FOOD, ("to the list", "to the basket")),
        (("put",), _FOOD, ("and",), _FOOD, ("on the list",)),
        (("buy", "order"), _COUNT, ("bags of", "boxes of"), _FOOD),
    ),
    "blinds": (
        (
            ("open", "close", "shut"),
            ("the",),
            _ROOM,
            ("blinds", "window", "door"),
            ("now", "tonight"),
        ),
        (("open", "close"), ("the",), _ROOM, ("blinds", "window"), ("at", "before"), _COUNT),
    ),
    "television": (
        (("turn", "switch"), ("the television",), ("on", "off"), ("at", "before"), _COUNT),
        (("put", "show"), ("channel",), (*_COUNT, *_TENS[1:]), ("on",), ("in the",), _ROOM),
    ),
}


def _digit_string(generator: random.Random, mix: tuple[float, ...]) -> str:
    return " ".join(generator.choices(_DIGITS, mix, k=generator.randint(3, 5)))


def _command(generator: random.Random, mix: tuple[float, ...]) -> str:
    (topic,) = generator.choices(tuple(_TOPICS), mix)
    words = [generator.choice(slot) for slot in generator.choice(_TOPICS[topic])]
    if generator.random() < 0.25:
        words.insert(0, "please")
    return " ".join(words)


# Task "fresh": the general nouns offer the sounds and spellings that the fresh ones are made of.
_VERBS = ("buy", "bring", "find", "sell", "paint", "wash", "move", "count")
_NOUNS = (
    *("candles", "lanterns", "baskets", "windows", "carpets", "mirrors", "pillows", "buttons"),
    *("ladders", "hammers", "blankets", "bottles", "carrots", "peppers", "onions", "bananas"),
    *("cherries", "kettles", "jackets", "gloves", "umbrellas", "tomatoes", "shelves", "flowers"),
)
_WHEN = ("today", "tomorrow", "tonight", "again", "please", "instead")
COMMON_FRESH_WORDS = (
    *("mangoes", "curtains", "sandals", "trumpets", "pancakes", "marbles", "tablets", "cushions"),
)
RARE_FRESH_WORDS = (
    *("turnips", "saddles", "compasses", "mandolins", "lemons", "pistons", "walnuts", "kimonos"),
)
FRESH_WORDS = COMMON_FRESH_WORDS + RARE_FRESH_WORDS
_NAMED = (*_NOUNS, *FRESH_WORDS)


def _errand(generator: random.Random, mix: tuple[float, ...]) -> str:
    (noun,) = generator.choices(_NAMED, mix)
    words = (generator.choice(_VERBS), generator.choice(_COUNT), noun, generator.choice(_WHEN))
    return " ".join(words)


def _fresh_mix(mix: tuple[float, ...], split: str, generator: random.Random) -> tuple[float, ...]:
    """The nouns of a user of task "fresh": who says which fresh words, and how often.

    Nobody in "seed" says any. In "train" everybody says the common ones by a mix of their own, and
    three users in ten say two of the rare ones. In "dev" and "test" half of the sentences have a
    fresh word, any as often as another.
    """
    general = _scaled(mix[: len(_NOUNS)], 0.5)
    count = len(RARE_FRESH_WORDS)
    if split == "seed":
        return (*general, *(0.0,) * len(FRESH_WORDS))
    if split != "train":
        return (*general, *(0.5 / len(FRESH_WORDS),) * len(FRESH_WORDS))
    rare = set(generator.sample(range(count), 2) if generator.random() < 0.3 else ())
    common = _scaled(mix[len(_NOUNS) : -count], 0.25 if rare else 0.5)
    return (*general, *common, *(0.25 / 2 if i in rare else 0.0 for i in range(count)))


def _scaled(weights: tuple[float, ...], total: float) -> tuple[float, ...]:
    return tuple(weight * total / sum(weights) for weight in weights)


# Task -> (number of weights in a user's mix, sentence from a generator and a mix).
_SENTENCE_MAKERS: dict[str, tuple[int, Callable[[random.Random, tuple[float, ...]], str]]] = {
    "digits": (len(_DIGITS), _digit_string),
    "commands": (len(_TOPICS), _command),
    "fresh": (len(_NAMED), _errand),
}


def sentence_split(text: str) -> str:
    """The split that owns a sentence: a stable hash of the text, so that splits share none."""
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for split in SPLITS[:-1]:
        edge += _SENTENCE_SHARES[split]
        if point < edge:
            return split
    return SPLITS[-1]


def _sentences(config: SyntheticConfig, user: str, split: str) -> list[str]:
    """A user's sentences, all of `split`; distinct unless the user's mix offers too few."""
    weights, make = _SENTENCE_MAKERS[config.task]
    generator = _random(config, user, "text")
    shares = [generator.gammavariate(config.concentration, 1.0) for _ in range(weights)]
    # The small constant keeps every word possible for every user.
    mix = tuple(share / sum(shares) + 0.2 / weights for share in shares)
    if config.task == "fresh":
        mix = _fresh_mix(mix, split, generator)
    sentences: list[str] = []
    said: set[str] = set()
    misses = 0
    while len(sentences) < _utterance_count(config, user, split):
        text = make(generator, mix)
        if sentence_split(text) != split or (text in said and misses < 1000):
            misses += 1
            continue
        misses = 0
        said.add(text)
        sentences.append(text)
    return sentences


# ---------------------------------------------------------------------------- voices


@dataclasses.dataclass(frozen=True)
class Voice:
    """How a text is spoken.

    Attributes:
      accent: a key of the accent table below.
      pitch: lowest and highest pitch, Hz.
      speed: percent of the engine's 175 words per minute.
      formants: (frequency, height, width) percent of each of the nine formants.
      consonants: loudness of the consonants, percent.
      tone: (Hz, amplitude) pairs, the spectral tilt.
      level: peak of the recording, in (0, 1].
    """

    accent: str
    pitch: tuple[int, int]
    speed: int
    formants: tuple[tuple[int, int, int], ...]
    consonants: int
    tone: tuple[tuple[int, int], ...]
    level: float


# Accent -> lines of the voice file, or the name of a voice file of the engine. The accents of the
# second kind differ mostly in vowel length and colour; those spelt out here replace phonemes.
_ACCENTS: dict[str, str | tuple[str, ...]] = {
    "en-us": "en-US",
    "en-gb-x-rp": "en-GB-x-rp",
    "en-gb-scotland": "en-GB-scotland",
    "en-029": "en-029",
    "en-gb-x-gbclan": "en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "en-GB-x-gbcwmd",
    "en-x-southern": ("eI aI", "aI OI", "E I", "I @", "i: eI"),
    "en-x-alpine": ("T s", "w v", "v f", "z s", "r R", "oU o:", "eI e:"),
    "en-x-iberian": ("T t", "v b", "I i:", "z s", "V a", "r *", "eI e:", "oU o"),
    "en-x-dental": ("T t[", "w v", "V a", "r *", "eI e:", "oU o:"),
}
_SEED_ACCENTS = ("en-us", "en-gb-x-rp")
_TARGET_ACCENTS = tuple(accent for accent in _ACCENTS if accent not in _SEED_ACCENTS)

# Domain -> accents, range of the lowest pitch in Hz, range of the formants in percent (of an adult
# male vocal tract).
_DOMAINS = {
    "seed": (_SEED_ACCENTS, (75, 115), (92, 104)),
    "target": (_TARGET_ACCENTS, (120, 200), (100, 116)),
}
_ONE_DOMAIN = (tuple(_ACCENTS), (75, 200), (92, 116))  # of task "fresh"


def speaker_voice(config: SyntheticConfig, user: str) -> Voice:
    """The voice of `user` ("seed-000", "target-000", ...), drawn from its domain's ranges."""
    generator = _random(config, user, "voice")
    domain, number = user.split("-")
    accents, pitches, tracts = _ONE_DOMAIN if config.task == "fresh" else _DOMAINS[domain]
    pitch = generator.uniform(*pitches)
    tract = generator.uniform(*tracts)
    return Voice(
        # In turn rather than at random, so that every accent is in every split.
        accent=accents[int(number) % len(accents)],
        pitch=(round(pitch), round(pitch * generator.uniform(1.1, 1.6))),
        speed=generator.randint(66, 86),
        formants=tuple(
            (
                round(tract * generator.uniform(0.96, 1.04)),
                generator.randint(85, 115),
                generator.randint(90, 120),
            )
            for _ in range(9)
        ),
        consonants=generator.randint(70, 120),
        tone=tuple((hertz, generator.randint(100, 200)) for hertz in (300, 1000, 2500, 5000)),
        level=round(generator.uniform(0.25, 0.8), 3),
    )


def _vary(voice: Voice, generator: random.Random) -> Voice:
    """One utterance's voice: nobody speaks twice at quite the same pitch and rate."""
    pitch = generator.uniform(0.95, 1.05)
    speed = generator.uniform(0.94, 1.06)
    return dataclasses.replace(
        voice,
        pitch=(round(voice.pitch[0] * pitch), round(voice.pitch[1] * pitch)),
        speed=round(voice.speed * speed),
    )


def _voice_file(voice: Voice, accents: Path) -> str:
    """Contents of an eSpeak NG voice file; `accents` holds the engine's own English voices."""
    accent = _ACCENTS[voice.accent]
    if isinstance(accent, str):
        lines = [(accents / accent).read_text()]
    else:
        lines = ["name speaker", "language en", "phonemes en"]
        lines += [f"replace 00 {rule}" for rule in accent]
    lines.append(f"pitch {voice.pitch[0]} {voice.pitch[1]}")
    lines.append(f"speed {voice.speed}")
    lines += [f"formant {i} {f} {h} {w}" for i, (f, h, w) in enumerate(voice.formants)]
    lines.append(f"consonants {voice.consonants} {voice.consonants}")
    lines.append("tone " + " ".join(f"{hertz} {amplitude}" for hertz, amplitude in voice.tone))
    # What follows keeps the samples a function of this file alone. Flutter runs on from the last
    # utterance; so does the count of glottal cycles by which roughness 0 to 7 modulates some
    # phonemes (a trilled r), and above 7 the engine modulates none.
    lines += ["flutter 0", "roughness 8", "echo 0 0"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- engine

_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback alone, before the call returns
_DONT_EXIT = 0x8000  # espeakINITIALIZE: report a bad data folder instead of ending the process
_UTF8 = 1  # espeakCHARS
_VOLUME = 2  # espeak_PARAMETER

# eSpeak NG 1.51 reads past the end of its list of phonemes what longer speech left there earlier.
# Begun before every utterance and broken off at its first samples, this text fills the list further
# than any sentence of the corpus.
_PRIMER = b"four " * 30

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """Speaks `text` silently: float32 [samples] at 16 kHz, peak `voice.level`, on a 16-bit grid.

    Raises:
      UserError: if eSpeak NG or soxr is not installed.
    """
    soxr = _require_soxr()
    engine = _engine()
    samples = soxr.resample(engine.speak(text, voice), engine.rate, SAMPLE_RATE)
    # On the 16-bit grid the last float bits of the resampler cannot matter, and a WAV or int16
    # copy loses nothing.
    peak = max(float(np.abs(samples).max(initial=0.0)), 1e-9)
    steps = np.rint(samples * (voice.level * 32767.0 / peak))
    return (steps / 32768.0).astype(np.float32)


def _audio(text: str, voice: Voice) -> tuple[np.ndarray, int]:
    return synthesize(text, voice), SAMPLE_RATE


def _require_soxr() -> Any:
    try:
        import soxr
    except ImportError as error:
        raise UserError(
            "the synthetic corpus needs soxr: `pip install 'fedasr[quickstart]'`"
        ) from error
    return soxr


def _find_engine() -> tuple[ctypes.CDLL, Path]:
    """eSpeak NG's library and data folder: of espeakng-loader, or else of the system."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        return library, Path(espeakng_loader.get_data_path())
    name = ctypes.util.find_library("espeak-ng")
    if name is None:
        raise UserError(f"the synthetic corpus needs eSpeak NG: {_REMEDY}")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise UserError(f"eSpeak NG ({name}) cannot be loaded ({error}): {_REMEDY}") from error
    if library.espeak_Initialize(_SYNCHRONOUS, 0, None, _DONT_EXIT) <= 0:
        raise UserError(f"eSpeak NG ({name}) finds no data: {_REMEDY}")
    data = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(data))
    return library, Path(os.fsdecode(data.value or b""))


class _Engine:
    """eSpeak NG on a private data folder with a single voice, "speaker", rewritten every time.

    One voice file needs no room in the engine's table of at most 349 voices. The engine's state is
    global to the process: hence one engine a process (see `_engine`) and a lock.
    """

    def __init__(self) -> None:
        self._library, source = _find_engine()
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]
        self.version = self._library.espeak_Info(None).decode()
        self._folder = tempfile.TemporaryDirectory(prefix="fedasr-voices-")
        data = Path(self._folder.name, "espeak-ng-data")
        self._accents = source / "lang" / "gmw"
        self._voice = data / "lang" / "gmw" / "speaker"
        self._voice.parent.mkdir(parents=True)
        try:
            for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
                shutil.copyfile(source / name, data / name)
        except OSError as error:
            raise UserError(f"eSpeak NG's data in {source} is incomplete: {_REMEDY}") from error
        self._heard: list[bytes] = []
        self._listening = True
        self._callback = _CALLBACK(self._hear)  # kept: the engine holds only a pointer
        self._lock = threading.Lock()
        # Never terminated, here or later: that hangs on the idle threads of eSpeak NG 1.51.
        folder = os.fsencode(self._folder.name)
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, folder, _DONT_EXIT)  # Hz
        if self.rate <= 0:
            raise UserError(f"eSpeak NG {self.version} rejects its data: {_REMEDY}")
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if not self._listening:
            return 1  # stop here
        if samples and count > 0:
            self._heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32 [samples] at `rate`, in [-1, 1]."""
        with self._lock:
            self._voice.write_text(_voice_file(voice, self._accents))
            if self._library.espeak_SetVoiceByName(b"speaker") != 0:
                raise UserError(f"eSpeak NG {self.version} rejects its voice: {_REMEDY}")
            # Far from overload: the gain control that prevents it carries over to later speech.
            self._library.espeak_SetParameter(_VOLUME, 40, 0)
            self._heard.clear()
            for self._listening, spoken in ((False, _PRIMER), (True, text.encode())):
                self._library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, _UTF8, None, None)
            samples = np.frombuffer(b"".join(self._heard), np.int16)
        return samples.astype(np.float32) / 32768.0


def _engine() -> _Engine:
    # By process id: a forked child must not write into its parent's folder.
    return _engine_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _engine_of(process: int) -> _Engine:
    del process
    return _Engine()
