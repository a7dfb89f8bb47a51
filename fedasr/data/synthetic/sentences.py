"""What the users of a synthetic corpus say, by task."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedasr.data.synthetic import draws

if TYPE_CHECKING:
    from fedasr.data.synthetic.config import SyntheticConfig


SPLITS = ("seed", "train", "dev", "test")
# Share of all sentences that belongs to each split, by a hash of the sentence.
_SENTENCE_SHARES = {"seed": 0.25, "train": 0.5, "dev": 0.1, "test": 0.15}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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
    return " ".join(generator.choices(DIGITS, mix, k=generator.randint(3, 5)))


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
SENTENCE_MAKERS: dict[str, tuple[int, Callable[[random.Random, tuple[float, ...]], str]]] = {
    "digits": (len(DIGITS), _digit_string),
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


def sentences_of(config: SyntheticConfig, user: str, split: str) -> list[str]:
    """A user's sentences, all of `split`; distinct unless the user's mix offers too few."""
    weights, make = SENTENCE_MAKERS[config.task]
    generator = draws.random_of(config, user, "text")
    shares = [generator.gammavariate(config.concentration, 1.0) for _ in range(weights)]
    # The small constant keeps every word possible for every user.
    mix = tuple(share / sum(shares) + 0.2 / weights for share in shares)
    if config.task == "fresh":
        mix = _fresh_mix(mix, split, generator)
    sentences: list[str] = []
    said: set[str] = set()
    misses = 0
    while len(sentences) < draws.utterance_count(config, user, split):
        text = make(generator, mix)
        if sentence_split(text) != split or (text in said and misses < 1000):
            misses += 1
            continue
        misses = 0
        said.add(text)
        sentences.append(text)
    return sentences
