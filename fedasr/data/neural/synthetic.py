"""Synthetic neural recordings of attempted writing, in the files of the competition layout.

Nothing here was recorded. Letters drive a smooth trajectory in a latent space, as the movements of
a hand would; every electrode picks up threshold crossings (Poisson) and band power around a rate
that depends on the trajectory. From day to day

* preferred directions wander and latent dimensions rotate, and some electrodes lose their neuron
  and find another: drift that a linear map of the channels can undo as far as signal is left;
* response curves bend differently, and the trajectories of the letters change a little: drift that
  no linear map undoes;
* some electrodes are dead for a day, and all baselines are new.

Within a day baselines move from block to block. Texts come from a small grammar of a few hundred
words; which of its sentences are for `train`, `test` and `competitionHoldOut` is fixed, and the
language model's text is made of the first kind only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedasr.data.neural.competition import SPLITS
from fedasr.errors import UserError
from fedasr.text import CHARACTERS

DESCRIPTION_FILE = "synthetic.json"
_TAG = 0x4E45_5552  # separates these random numbers from others of the same seed
_TEST_SHARE = 4  # one sentence in so many is not for training, and of these
_HOLDOUT_SHARE = 4  # one in so many is for `competitionHoldOut`, the others for `test`
_VERSION = 2  # of what the same configuration gives
_HEADER = b"MATLAB 5.0 MAT-file, synthetic recordings"
_THINNING = (0.75, 0.6, 0.5)  # of each threshold's crossings that the next, lower one sees, too


@dataclass(frozen=True)
class NeuralConfig:
    """Sizes and difficulty.

    days: recording days. train_sentences, test_sentences, holdout_sentences: of each day, in
    `train`, `test` and `competitionHoldOut`. blocks: of a day's training sentences; the others are
    a block each. words: fewest and most of a sentence. electrodes: channels of each field.
    informative: the first so many see the trajectory, the rest only noise.

    latents: dimensions of the trajectory. letter_bins: mean bins of 20 ms of a letter. rate: mean
    threshold crossings (tx1) per bin. depth: standard deviation of the log rate by tuning.

    tuning_drift: share of a preferred direction's variance that is new each day. replaced: share of
    electrodes with another neuron each day. rotation: standard deviation of the angle in radians by
    which latent dimensions turn into each other each day. bend_drift: standard deviation of the
    daily change in the curvature of response curves. letter_drift: of the daily change of the
    letters' trajectories, relative to their size. dead: share of electrodes that fail on a day.
    baseline: standard deviation of log baselines between blocks.
    """

    days: int = 14
    train_sentences: int = 40
    test_sentences: int = 10
    holdout_sentences: int = 0
    blocks: int = 4
    words: tuple[int, int] = (3, 6)
    electrodes: int = 256
    informative: int = 128
    latents: int = 10
    letter_bins: float = 10.0
    rate: float = 0.4
    depth: float = 0.45
    tuning_drift: float = 0.1
    replaced: float = 0.02
    rotation: float = 0.06
    bend_drift: float = 0.06
    letter_drift: float = 0.05
    dead: float = 0.03
    baseline: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("days", "train_sentences", "blocks", "electrodes", "informative", "latents")
        if small := [name for name in sizes if getattr(self, name) < 1]:
            raise UserError(f"the recordings' {', '.join(small)} must be at least 1")
        if self.informative > self.electrodes or min(self.words) < 2:
            raise UserError("informative must be at most electrodes, and words at least 2")


# ------------------------------------------------------------------------------------- texts

_PEOPLE = "i we you they she he".split()
_OWNERS = "my your our her his their".split()
_RELATIVES = (
    "mother father sister brother friend doctor teacher neighbor daughter son cousin boss uncle "
    "aunt nurse partner grandfather grandmother"
).split()
_TIMES = (
    "today tomorrow tonight again later soon now often early together outside inside alone "
    "quickly slowly already"
).split()
# verb classes: verbs in two forms, what they are done to, and adjectives of that
_CLASSES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("eat", "want", "cook", "order", "share", "taste", "prepare"),
        ("eats", "wants", "cooks", "orders", "shares", "tastes", "prepares"),
        tuple(
            "bread soup rice dinner breakfast lunch cake cheese fish chicken salad fruit pizza "
            "pasta eggs apples potatoes".split()
        ),
        tuple("fresh warm cold sweet good more some hot spicy".split()),
    ),
    (
        ("drink", "like", "need", "pour", "bring", "spill"),
        ("drinks", "likes", "needs", "pours", "brings", "spills"),
        tuple("water coffee tea milk juice wine beer lemonade".split()),
        tuple("hot cold black clean green iced strong".split()),
    ),
    (
        ("read", "write", "finish", "open", "find", "lose", "send"),
        ("reads", "writes", "finishes", "opens", "finds", "loses", "sends"),
        tuple("letters books stories papers messages poems reports notes emails lists".split()),
        tuple("long short new old funny boring important secret".split()),
    ),
    (
        ("drive", "buy", "sell", "wash", "repair", "park", "rent"),
        ("drives", "buys", "sells", "washes", "repairs", "parks", "rents"),
        tuple("cars trucks bikes boats buses trains vans tractors".split()),
        tuple("red blue fast slow big small broken shiny yellow".split()),
    ),
    (
        ("play", "hear", "love", "enjoy", "learn", "practice", "sing"),
        ("plays", "hears", "loves", "enjoys", "learns", "practices", "sings"),
        tuple("music songs guitar piano games drums tunes jazz".split()),
        tuple("loud quiet happy sad classic modern soft difficult".split()),
    ),
    (
        ("see", "feed", "follow", "watch", "call", "chase", "brush"),
        ("sees", "feeds", "follows", "watches", "calls", "chases", "brushes"),
        tuple("dogs cats birds horses ducks rabbits puppies kittens goats sheep".split()),
        tuple("young hungry sleepy wild brown white friendly noisy tiny".split()),
    ),
    (
        ("clean", "paint", "build", "visit", "leave", "enter", "describe"),
        ("cleans", "paints", "builds", "visits", "leaves", "enters", "describes"),
        tuple("houses rooms kitchens gardens offices bridges towers churches museums".split()),
        tuple("large empty dark bright beautiful ancient modern wooden tall".split()),
    ),
)
_PLACES = (
    "at home",
    "in the city",
    "at work",
    "near the river",
    "in the park",
    "at school",
    "by the sea",
    "in the hospital",
    "on the mountain",
    "behind the station",
    "at the market",
    "in the forest",
    "under the bridge",
    "across the street",
)
_CLAUSES = ("i think", "she said", "he knows", "we hope", "they believe", "you know")


def _picked(rng: np.random.Generator, items: tuple | list) -> str:
    """One of them, the first ones most often, as words are in texts."""
    weights = 1.0 / np.arange(2, len(items) + 2)
    return items[int(rng.choice(len(items), p=weights / weights.sum()))]


def _sentence(rng: np.random.Generator) -> str:
    """A sentence of the grammar, of any length."""
    plain, third, objects, adjectives = _CLASSES[int(rng.integers(len(_CLASSES)))]
    kind = rng.random()
    if kind < 0.55:
        subject = _picked(rng, _PEOPLE)
        verbs = third if subject in ("she", "he") else plain
    else:
        subject, verbs = f"{_picked(rng, _OWNERS)} {_picked(rng, _RELATIVES)}", third
    parts = [subject, _picked(rng, verbs)]
    if rng.random() < 0.4:
        parts.append(_picked(rng, adjectives))
    parts.append(_picked(rng, objects))
    if rng.random() < 0.2:
        parts.append(_picked(rng, _TIMES))
    elif rng.random() < 0.25:
        parts.append(_picked(rng, _PLACES))
    if rng.random() < 0.08:
        parts.insert(0, _picked(rng, _CLAUSES))
    return " ".join(parts)


def split_of(sentence: str) -> str:
    """Which of `SPLITS` a sentence of the grammar may be in, by a hash of its text."""
    digest = hashlib.sha256(sentence.encode()).digest()
    if digest[0] % _TEST_SHARE:
        return "train"
    return "test" if digest[1] % _HOLDOUT_SHARE else "competitionHoldOut"


def sentences(
    rng: np.random.Generator, count: int, words: tuple[int, int], split: str
) -> list[str]:
    """So many different sentences of a split, with a number of words within `words`."""
    found: dict[str, None] = {}
    for _ in range(1000 * max(count, 1)):
        if len(found) == count:
            break
        text = _sentence(rng)
        if words[0] <= len(text.split()) <= words[1] and split_of(text) == split:
            found[text] = None
    if len(found) < count:
        raise UserError(f"the grammar has too few sentences of {words[0]} to {words[1]} words")
    return list(found)


def language_text(
    count: int,
    seed: int = 0,
    words: tuple[int, int] = (2, 12),
    exclude: Collection[str] = (),
    withheld: float = 0.0,
) -> list[str]:
    """Text for a language model: sentences that may be in `train`, with repetitions.

    Args:
      count: of sentences. seed: of their choice. words: fewest and most.
      exclude: sentences that must not be among them.
      withheld: share of the grammar's words, by a hash, that no sentence has: a model of this text
        does not know them.
    """
    rng = np.random.default_rng([_TAG, seed, 1])
    exclude = frozenset(exclude)
    found: list[str] = []
    while len(found) < count:
        text = _sentence(rng)
        if not words[0] <= len(text.split()) <= words[1] or split_of(text) != "train":
            continue
        if text not in exclude and not any(_hash(word) < withheld for word in text.split()):
            found.append(text)
    return found


def _hash(word: str) -> float:
    """In [0, 1)."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") / 2**32


# ---------------------------------------------------------------------------------- recordings


class Electrodes(NamedTuple):
    """What a day's recording depends on.

    tuning [electrodes, latents], bend [electrodes] (curvature of response curves), base
    [electrodes] (log crossings per bin), floor [electrodes] (band power without activity), alive
    bool [electrodes], letters [characters, 3, latents] (points that a letter's trajectory passes).
    """

    tuning: np.ndarray
    bend: np.ndarray
    base: np.ndarray
    floor: np.ndarray
    alive: np.ndarray
    letters: np.ndarray


def electrodes_of_days(config: NeuralConfig) -> Iterator[Electrodes]:
    """The electrodes on each day, in order; a day depends on those before it only."""
    n, k = config.electrodes, config.latents
    first = np.random.default_rng([_TAG, config.seed, 2])

    def new_tuning(rng: np.random.Generator) -> np.ndarray:
        directions = rng.normal(0.0, config.depth / np.sqrt(k), (n, k))
        directions[config.informative :] = 0.0
        return directions

    letters = first.normal(size=(len(CHARACTERS), 3, k))
    tuning, bend = new_tuning(first), first.normal(0.0, 0.1, n)
    for day in range(config.days):
        rng = np.random.default_rng([_TAG, config.seed, 3, day])
        if day:
            new = config.tuning_drift
            tuning = np.sqrt(1 - new) * tuning + np.sqrt(new) * new_tuning(rng)
            tuning = np.where(rng.random((n, 1)) < config.replaced, new_tuning(rng), tuning)
            tuning = tuning @ _rotation(rng, k, config.rotation)
            bend = np.clip(bend + rng.normal(0.0, config.bend_drift, n), -0.4, 0.4)
            letters = letters + config.letter_drift * rng.normal(size=letters.shape)
            letters = letters / np.sqrt(1 + config.letter_drift**2)
        base = np.log(config.rate) + rng.normal(0.0, 0.4, n)
        floor = np.exp(rng.normal(3.0, 0.3, n))
        alive = rng.random(n) >= config.dead
        yield Electrodes(tuning, bend, base, floor, alive, letters)


def _rotation(rng: np.random.Generator, size: int, angle: float) -> np.ndarray:
    """A random rotation, orthogonal [size, size], that turns about `angle` in every plane."""
    skew = np.triu(rng.normal(0.0, angle, (size, size)), 1)
    skew = (skew - skew.T) / 2
    # Cayley's transform.
    return np.linalg.solve(np.eye(size) + skew, np.eye(size) - skew)


def trajectory(
    rng: np.random.Generator, text: str, letters: np.ndarray, letter_bins: float
) -> np.ndarray:
    """The latent path of a sentence, float64 [bins, latents], at rest at both ends."""
    speed = letter_bins * np.exp(rng.normal(0.0, 0.12))
    times, points, now = [0.0], [np.zeros(letters.shape[2])], float(rng.integers(4, 10))
    times.append(now)
    points.append(points[0])
    for character in text:
        length = speed * np.exp(rng.normal(0.0, 0.15))
        for share, point in zip((0.2, 0.5, 0.8), letters[CHARACTERS.index(character)], strict=True):
            times.append(now + share * length)
            points.append(point)
        now += length
    end = now + float(rng.integers(4, 10))
    times += [now + 2.0, end]
    points += [points[0], points[0]]
    bins = np.arange(int(end))
    path = np.stack([np.interp(bins, times, column) for column in np.transpose(points)], axis=1)
    width = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    smoothed = [np.convolve(c, width / width.sum(), mode="same") for c in path.T]
    return np.stack(smoothed, axis=1)


def record(
    rng: np.random.Generator, path: np.ndarray, day: Electrodes, baseline: np.ndarray
) -> dict[str, np.ndarray]:
    """What the electrodes pick up along a path.

    Args:
      path: [bins, latents]. baseline: log change of the rates [electrodes].

    Returns:
      "tx1".."tx4" uint8 and "spikePow" float32, [bins, electrodes].
    """
    drive = path @ day.tuning.T
    drive = drive + day.bend * (drive**2 - np.mean(day.tuning**2, axis=1) * path.shape[1])
    rate = np.exp(np.clip(day.base + baseline + drive, -8.0, 2.0)) * day.alive
    crossings = np.minimum(rng.poisson(rate), 255).astype(np.uint8)
    fields = {"tx1": crossings}
    for number, share in enumerate(_THINNING, start=2):
        crossings = rng.binomial(crossings, share).astype(np.uint8)
        fields[f"tx{number}"] = crossings
    # Power is that of noise, chi-squared around a mean that rises with the rate.
    power = day.floor * (0.3 + rate) * rng.gamma(2.0, 1 / 2.0, rate.shape)
    fields["spikePow"] = power.astype(np.float32)
    return fields


def generate(config: NeuralConfig, out: str | os.PathLike[str]) -> Path:
    """Writes the days' MATLAB files, the same bytes for the same configuration and numpy.

    Args:
      config: sizes, difficulty and the seed.
      out: folder, new or empty, or holding the recordings of the same configuration, which stay.

    Returns:
      The folder.

    Raises:
      UserError: scipy is missing, or the folder holds something else.
    """
    try:
        from scipy.io import savemat
    except ImportError:
        raise UserError("MATLAB files need scipy: install it (pip install scipy)") from None
    out = Path(out)
    described = {"synthetic": True, "version": _VERSION, "config": dataclasses.asdict(config)}
    content = json.dumps(described, indent=1)
    if (out / DESCRIPTION_FILE).is_file():
        if (out / DESCRIPTION_FILE).read_text() == content:
            return out
        raise UserError(f"{out} holds other synthetic recordings: choose another folder")
    if out.exists() and any(p.name not in SPLITS for p in out.iterdir()):
        raise UserError(f"{out} holds other files: choose an empty or new folder")
    for day, electrodes in enumerate(electrodes_of_days(config)):
        for split, count, blocks in (
            ("train", config.train_sentences, config.blocks),
            ("test", config.test_sentences, 1),
            ("competitionHoldOut", config.holdout_sentences, 1),
        ):
            if not count:
                continue
            number = SPLITS.index(split)
            rng = np.random.default_rng([_TAG, config.seed, 4, day, number])
            texts = sentences(rng, count, config.words, split)
            file = out / split / f"synthetic.day{day:03d}.mat"
            file.parent.mkdir(parents=True, exist_ok=True)
            block_of = np.arange(count) * blocks // count
            baselines = rng.normal(0.0, config.baseline, (blocks, config.electrodes))
            recorded = [
                record(
                    rng,
                    trajectory(rng, text, electrodes.letters, config.letter_bins),
                    electrodes,
                    baselines[block],
                )
                for text, block in zip(texts, block_of, strict=True)
            ]
            fields = {name: _cells([one[name] for one in recorded]) for name in recorded[0]}
            fields["sentenceText"] = np.array(texts)
            fields["blockIdx"] = (1.0 + block_of)[:, None]
            savemat(file, fields)
            # The first 116 bytes are free text, in which scipy writes the time of day.
            with open(file, "r+b") as written:
                written.write(_HEADER.ljust(116))
    (out / DESCRIPTION_FILE).write_text(content)
    return out


def _cells(arrays: list[np.ndarray]) -> np.ndarray:
    """A MATLAB cell array of one row."""
    cells = np.empty((1, len(arrays)), object)
    for i, array in enumerate(arrays):
        cells[0, i] = array
    return cells
