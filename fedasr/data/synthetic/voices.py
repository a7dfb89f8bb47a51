"""The voices of a synthetic corpus, and the files that have eSpeak NG speak with them."""

import dataclasses
import random
from pathlib import Path

from fedasr.data.synthetic import draws
from fedasr.data.synthetic.config import SyntheticConfig


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
ACCENTS: dict[str, str | tuple[str, ...]] = {
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
TARGET_ACCENTS = tuple(accent for accent in ACCENTS if accent not in _SEED_ACCENTS)
# Domain -> accents, range of the lowest pitch in Hz, range of the formants in percent (of an adult
# male vocal tract).
_DOMAINS = {
    "seed": (_SEED_ACCENTS, (75, 115), (92, 104)),
    "target": (TARGET_ACCENTS, (120, 200), (100, 116)),
}
MIDDLE = 140  # Hz: lowest pitches from here on are called high
_ONE_DOMAIN = (tuple(ACCENTS), (75, 200), (92, 116))  # of task "fresh"


def speaker_voice(config: SyntheticConfig, user: str) -> Voice:
    """The voice of `user` ("seed-000", "target-000", ...), drawn from its domain's ranges."""
    generator = draws.random_of(config, user, "voice")
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


def vary(voice: Voice, generator: random.Random) -> Voice:
    """One utterance's voice: nobody speaks twice at quite the same pitch and rate."""
    pitch = generator.uniform(0.95, 1.05)
    speed = generator.uniform(0.94, 1.06)
    return dataclasses.replace(
        voice,
        pitch=(round(voice.pitch[0] * pitch), round(voice.pitch[1] * pitch)),
        speed=round(voice.speed * speed),
    )


def voice_file(voice: Voice, accents: Path) -> str:
    """Contents of an eSpeak NG voice file; `accents` holds the engine's own English voices."""
    accent = ACCENTS[voice.accent]
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
