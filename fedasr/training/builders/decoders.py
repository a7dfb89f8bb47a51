"""How a run's texts are found in its model's scores: a decoder, and what it knows of the language.

A language model or a lexicon is a file, or made from the transcripts of a split of the data:
"from_train", "from_seed", "from_train+seed". Of training users' transcripts it tells as much as
they hold; the report says so (see `not_covered`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fedasr.data.corpus import Corpus
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.splits import can_open
from fedasr.decoding.beam import BeamConfig
from fedasr.decoding.language import Knowledge, read_words
from fedasr.decoding.ngram import NGram, estimate, read_arpa
from fedasr.decoding.registry import GREEDY, Decoder, make_decoder
from fedasr.errors import UserError
from fedasr.text import Tokenizer
from fedasr.training.config import Config
from fedasr.training.sections import Decoding

FROM = "from_"  # how what is made from a split begins


def transcripts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """The texts of all of a corpus's examples, user by user.

    Args:
      corpus: has "labels".
      tokenizer: that wrote them.
    """
    return [
        tokenizer.decode(example["labels"])
        for user, size in enumerate(corpus.sizes)
        for example in corpus.get(user, range(int(size)))
    ]


def make_knowledge(
    settings: Decoding, directory: str | Path, tokenizer: Tokenizer, evaluated: Collection[str]
) -> Knowledge:
    """The language model and lexicon of a configuration.

    Args:
      settings: see there.
      directory: of the prepared data, whose splits "from_..." names.
      tokenizer: that wrote its labels.
      evaluated: splits that are decoded: nothing is made from these.

    Raises:
      UserError: a file that cannot be read, a split that there is not, or one that is evaluated.
    """
    check_splits(settings, read_metadata(directory)["splits"], evaluated)
    texts: dict[str, list[str]] = {}

    def of_split(value: str) -> list[str]:
        split = value.removeprefix(FROM)
        if split not in texts:
            texts[split] = transcripts(open_corpus(directory, split), tokenizer)
        return texts[split]

    model: NGram | None = None
    words: frozenset[str] | None = None
    if settings.lexicon.startswith(FROM):
        words = frozenset(word for text in of_split(settings.lexicon) for word in text.split())
    elif settings.lexicon:
        words = _read("decoding.lexicon", read_words, settings.lexicon)
    if settings.lm.startswith(FROM):
        model = estimate(of_split(settings.lm), settings.order, words)
    elif settings.lm:
        model = _read("decoding.lm", read_arpa, settings.lm)
    beam = BeamConfig(
        beam=settings.beam,
        lm_weight=settings.lm_weight,
        word_bonus=settings.word_bonus,
        unknown_penalty=settings.unknown_penalty,
        blank_penalty=settings.blank_penalty,
    )
    return Knowledge(model, words, beam)


def _read(field: str, read: Callable[[str], Any], place: str) -> Any:
    try:
        return read(place)
    except UserError as error:
        raise UserError(f"{field}={place}: {error}") from error


def check_files(settings: Decoding) -> None:
    """Raises UserError for a file that cannot be read; where there is no data yet."""
    if settings.lexicon and not settings.lexicon.startswith(FROM):
        _read("decoding.lexicon", read_words, settings.lexicon)
    if settings.lm and not settings.lm.startswith(FROM):
        _read("decoding.lm", read_arpa, settings.lm)


def check_splits(settings: Decoding, stored: Collection[str], evaluated: Collection[str]) -> None:
    """Raises UserError for a split that there is not, or one that is evaluated.

    Args:
      settings: whose "from_..." name splits.
      stored: splits of the data.
      evaluated: splits that are decoded: nothing is made from these.
    """
    seen = {x for e in evaluated for x in _named(e, stored)}
    for field in ("lexicon", "lm"):
        value: str = getattr(settings, field)
        if not value.startswith(FROM):
            continue
        split = value.removeprefix(FROM)
        if not can_open(split, stored):
            raise UserError(
                f"decoding.{field}={value}: there is no split {split!r}: choose one of "
                f"{', '.join(stored)}"
            )
        if both := _named(split, stored) & seen:
            raise UserError(
                f"decoding.{field}={value}: the texts of {sorted(both)[0]!r} are what its error "
                "rate is measured with: make it from another split (from_train), or decode without"
            )


def knowledge_hash(settings: Decoding) -> str | None:
    """Names the content of the files that are decoded with, sixteen hexadecimal digits.

    None if there are none, or one is not there: whoever reads it says so.
    """
    files = [place for place in (settings.lm, settings.lexicon) if place]
    files = [place for place in files if not place.startswith(FROM)]
    if not files or not all(map(os.path.isfile, files)):
        return None
    found = hashlib.sha256()
    for place in files:
        with open(place, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def _named(expression: str, stored: Collection[str]) -> set[str]:
    """Those of the stored splits that a split's expression names."""
    if not can_open(expression, stored):
        return set()  # whoever opens it says so
    return {name for name in stored if not can_open(expression, set(stored) - {name})}


def make_run_decoder(
    settings: Decoding, directory: str | Path, tokenizer: Tokenizer, evaluated: Collection[str]
) -> Decoder | None:
    """The decoder of a configuration; None for greedy decoding, which the devices do.

    Args:
      settings, directory, tokenizer, evaluated: see `make_knowledge`.

    Raises:
      UserError: see `make_knowledge` and `fedasr.decoding.registry.make_decoder`.
    """
    if settings.name == GREEDY and not (settings.lm or settings.lexicon):
        return None
    knowledge = make_knowledge(settings, directory, tokenizer, evaluated)
    return make_decoder(settings.name, tokenizer, knowledge)


def check(config: Config) -> None:
    """Raises UserError for settings of decoding that make no sense, before data is looked at."""
    settings = config.decoding
    if settings.name == GREEDY and (settings.lm or settings.lexicon):
        raise UserError(
            "decoding.name='greedy' has no use for decoding.lm or lexicon: set "
            "decoding.name='beam' or 'lexicon'"
        )
    if settings.name == "lexicon" and not (settings.lm or settings.lexicon):
        raise UserError("decoding.name='lexicon' needs decoding.lexicon or lm, such as from_train")
    for field in ("lm", "lexicon"):
        value = getattr(settings, field)
        if value.startswith(FROM):
            try:
                can_open(value.removeprefix(FROM), ())
            except UserError as error:
                raise UserError(f"decoding.{field}={value}: {error}") from error
    objective = config.model.options.get("objective", "ctc")
    if settings.name != GREEDY and objective != "ctc":
        raise UserError(
            f"decoding.name={settings.name!r} searches scores of CTC: set decoding.name='greedy' "
            f"for model.options.objective={objective!r}"
        )


def not_covered(config: Config) -> list[str]:
    """What decoding tells of transcripts, which no epsilon is about."""
    names: dict[str, list[str]] = {}
    for field, name in (("lm", "language model"), ("lexicon", "lexicon")):
        value: Any = getattr(config.decoding, field)
        if value and value != FROM + config.seed_training.split:
            names.setdefault(value, []).append(name)
    found = []
    for value, made in names.items():
        knowledge = " and ".join(made)
        if value.startswith(FROM):
            found.append(
                f"the transcripts of {value.removeprefix(FROM)!r}, which the decoder's {knowledge} "
                f"{'were' if len(made) > 1 else 'was'} made from without noise: "
                f"{'they tell' if len(made) > 1 else 'it tells'} which words were said, and how "
                "often"
            )
        else:
            found.append(
                f"the texts behind the decoder's {knowledge} {value}, if they are of users"
            )
    return found
