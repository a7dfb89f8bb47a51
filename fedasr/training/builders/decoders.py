"""How a run's texts are found in its model's scores: a decoder, and what it knows of the language.

A language model or a lexicon is a file, or made from the transcripts of a split of the data:
"from_train", "from_seed", "from_train+seed". Of training users' transcripts it tells as much as
they hold; the report says so (see `not_covered`).
"""

from __future__ import annotations

from collections.abc import Collection
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
    texts: dict[str, list[str]] = {}

    def of_split(field: str, value: str) -> list[str]:
        split = value.removeprefix(FROM)
        stored = read_metadata(directory)["splits"]
        if seen := _named(split, stored) & {x for e in evaluated for x in _named(e, stored)}:
            raise UserError(
                f"{field}={value}: the texts of {sorted(seen)[0]!r} are what its error rate is "
                "measured with: make it from another split (from_train), or decode without"
            )
        if split not in texts:
            texts[split] = transcripts(open_corpus(directory, split), tokenizer)
        return texts[split]

    model: NGram | None = None
    words: frozenset[str] | None = None
    if settings.lexicon.startswith(FROM):
        said = of_split("decoding.lexicon", settings.lexicon)
        words = frozenset(word for text in said for word in text.split())
    elif settings.lexicon:
        words = read_words(settings.lexicon)
    if settings.lm.startswith(FROM):
        model = estimate(of_split("decoding.lm", settings.lm), settings.order, words)
    elif settings.lm:
        model = read_arpa(settings.lm)
    beam = BeamConfig(
        beam=settings.beam,
        lm_weight=settings.lm_weight,
        word_bonus=settings.word_bonus,
        unknown_penalty=settings.unknown_penalty,
    )
    return Knowledge(model, words, beam)


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
    if settings.name != GREEDY and config.model.options.get("objective", "ctc") != "ctc":
        raise UserError(
            f"decoding.name={settings.name!r} searches scores of CTC: set decoding.name='greedy' "
            "for model.options.objective='rnnt'"
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
