"""One's own speech: a few hours of a few dozen people, by arguments.

    --config=own_speech:data=data/mine[,rounds=300][,seed_share=20][,language=all|train|seed|none]
                        [,model=conformer|transformer][,train=dev_clean[20%:]]

Augmentation, dropout, the state that is best on dev, decoding with a lexicon and a language model
from transcripts; cohort, local steps and rounds follow from the data, and a line on stderr says so.
The learning rates decay with the rounds, and the noise grows a little with them, so that epsilon as
deployed stays the same: --config.rounds=300 does that, too.

data: a prepared corpus. rounds: 0 for as many as 20 turns of each user take. seed_share: percent of
the training users that the seed is trained on, without privacy for them, where the data has no
split "seed". language: whose transcripts the language model and the lexicon are made from: "all",
those of the training users and of the seed's. model: which encoder, of its default size. train:
the split that trains, where it has another name than "train" or "train_...".

    fedasr sweep --table=own_speech

The recipe on data/mine, and what it is without each of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FieldReference

from fedasr.data.records import has_split, open_corpus, read_metadata
from fedasr.errors import UserError
from fedasr.models.conformer import ConformerConfig
from fedasr.models.transformer import TransformerConfig
from fedasr.recipes import shared
from fedasr.recipes.tables import Row, Table
from fedasr.text import tokenizer_for
from fedasr.training.builders.decoders import FROM, transcripts
from fedasr.training.config import default_config

ARGUMENTS: dict[str, Any] = {
    "data": "",
    "rounds": 0,
    "seed_share": 0,
    "language": "all",
    "model": "conformer",
    "train": "",
}
MODELS: dict[str, Any] = {"transformer": TransformerConfig, "conformer": ConformerConfig}
_COHORT, _BATCH = 8, 4
_TURNS, _FEWEST, _MOST = 20, 120, 600  # of a user; rounds
_PASSES = 80  # of the seed's training
USERS, UTTERANCES = 50, 12.0  # where the data is not there yet
# The quickstart's noise, which makes epsilon 7.3 as deployed at 120 rounds, and the power of the
# rounds that it grows with: fitted to 30 to 1000 rounds of 1024 in a million users, where so few
# are drawn that rounds cost little (docs/decisions/2026-11-30-own-speech.md).
_SIGMA, _ROUNDS, _POWER = 4.5e-4, 120, 0.03
# Shares of held-out words that no training transcript has: up to the first a closed lexicon is
# worth more than it loses; beyond the second what stands between spaces is hardly words.
_CLOSED, _OPEN = 0.05, 0.5


def get_config(arguments: str = "") -> ConfigDict:
    """The settings for a prepared corpus.

    Raises:
      UserError: an unknown argument, no data, or a share of users that cannot be.
    """
    args = shared.parse(arguments, ARGUMENTS)
    if not args["data"]:
        raise UserError(
            "--config=own_speech needs its data: --config=own_speech:data=DIR, a folder written "
            "by fedasr prepare"
        )
    if not 0 <= args["seed_share"] <= 90:
        raise UserError(f"--config: seed_share={args['seed_share']} must be percent, 0 to 90")
    config = default_config()
    config.name = "own-speech"
    config.data.dir = args["data"]
    if args["model"] != config.model.name:
        model = shared.choose(args, "model", MODELS)
        config.model.name = args["model"]
        config.model.options = ConfigDict(dataclasses.asdict(model()))
    if Path(args["data"]).exists():
        _fit(config, args)
    else:  # whoever runs it is told that there is no such corpus
        _set_training(config, USERS, UTTERANCES, args["rounds"])
        _say(f"own_speech: {args['data']} is not there: the settings are for {USERS} users")
    return config


def _fit(config: ConfigDict, args: Mapping[str, Any]) -> None:
    """Chooses what follows from the data, and says so."""
    metadata = read_metadata(args["data"])
    config.data.train = args["train"] or training_split(metadata)
    config.data.eval = held_out(metadata, config.data.train)
    if dev := [split for split in config.data.eval if split.startswith("dev")]:
        config.selection.split = dev[0]
        config.evaluation.while_training = (dev[0],)
        config.selection.patience = 6
    config.model.options.vocab = tokenizer_for(metadata).vocab_size
    seeded = _set_seed(config, metadata, args["seed_share"])
    train = open_corpus(args["data"], config.data.train)
    users, usual = len(train.users), float(np.median(train.sizes))
    _set_training(config, users, usual, args["rounds"])
    words = _set_language(config, metadata, args["language"])
    _say(
        f"own_speech: {users} training users with {usual:g} utterances each (median): cohort "
        f"{config.cohort}, {config.client.steps} steps of {_BATCH} utterances a round, "
        f"{config.rounds} rounds; {seeded}; {words}"
    )


def training_split(metadata: Mapping[str, Any]) -> str:
    """The split that trains: "train", or all "train_..." together, as LibriSpeech names them.

    Raises:
      UserError: there is none.
    """
    if has_split(metadata, "train"):
        return "train"
    parts = sorted(name for name in metadata["splits"] if name.startswith("train_"))
    if not parts:
        first = min(metadata["splits"])
        raise UserError(
            f"the data has no split 'train', only {', '.join(sorted(metadata['splits']))}: name "
            f"what trains, such as train={first}[20%:] in the recipe's arguments"
        )
    return "+".join(parts)


def held_out(metadata: Mapping[str, Any], train: str) -> tuple[str, ...]:
    """Splits of people who do not train: "dev", "test" or "dev_...", "test_..."."""
    trained = {part.partition("[")[0] for part in train.split("+")}
    names = sorted(name for name in metadata["splits"] if name.split("_")[0] in ("dev", "test"))
    return tuple(name for name in names if name not in trained)


def _set_training(config: ConfigDict, users: int, utterances: float, rounds: int) -> None:
    """Cohort, local steps and rounds for so many users with so many utterances each."""
    config.cohort = max(1, min(_COHORT, users // 2))
    config.client.batch_size = _BATCH
    config.client.steps = int(np.clip(np.ceil(utterances / _BATCH), 1, 8))
    turns = int(np.clip(_TURNS * users // config.cohort, _FEWEST, _MOST))
    all_rounds = FieldReference(rounds or turns)
    config.rounds = all_rounds
    # As many utterances as all rounds together have, for who forgets the users.
    in_round = config.cohort * config.client.steps * _BATCH
    config.central.steps = (
        all_rounds * in_round + config.central.batch_size - 1
    ) // config.central.batch_size
    config.server.learning_rate = 0.01
    config.server.decay_start = all_rounds * 2 // 3
    config.server.decay_rounds = (all_rounds + 3) // 4  # at least 1
    config.client.learning_rate = 0.3
    config.privacy.clip_norm = 0.4
    config.privacy.sigma = sigma(all_rounds)
    config.model.options.dropout = 0.1
    config.augment.enabled = True
    config.augment.options.update(frequency_width=20, time_masks=4, time_width=20)
    config.augment.options.update(time_warp=0.1, frequency_warp=0.05)


def sigma(rounds: FieldReference) -> Any:
    """The noise with which epsilon is about 7.3 as deployed, for a clip norm of 0.4."""
    return (rounds.to_float() / _ROUNDS) ** _POWER * _SIGMA


def _set_seed(config: ConfigDict, metadata: Mapping[str, Any], share: int) -> str:
    """The seed's split and steps, and what is said of them."""
    if share:
        if set(config.data.train) & set("[+"):
            raise UserError("--config: seed_share takes a part of one whole split: leave it out")
        config.seed_training.split = f"{config.data.train}[:{share}%]"
        config.data.train = f"{config.data.train}[{share}%:]"
    elif not has_split(metadata, "seed"):
        return (
            "no seed, for the data has no split 'seed': from scratch it takes many more rounds "
            "(seed_share=20 trains one on a fifth of the users, without privacy for them)"
        )
    seed = open_corpus(config.data.dir, config.seed_training.split)
    # So many passes that a small corpus is learned, and no more than a CPU does in minutes.
    passes = _PASSES * int(seed.sizes.sum()) // config.seed_training.batch_size
    config.seed_training.steps = int(np.clip(passes, 250, 1500)) // 10 * 10
    config.seed_training.reuse = True
    return f"a seed of {config.seed_training.steps} steps on {len(seed.users)} users"


def _set_language(config: ConfigDict, metadata: Mapping[str, Any], source: str) -> str:
    """How texts are decoded, and what is said of it."""
    train, seed = config.data.train, config.seed_training.split
    everyone = f"{train}+{seed}" if has_split(metadata, seed) else train
    splits = {"all": everyone, "train": train, "seed": seed, "none": ""}
    split = shared.choose({"language": source}, "language", splits)
    characters = metadata["options"].get("characters")
    spaced = isinstance(characters, str) and " " in characters
    if not split or not spaced or not has_split(metadata, split):
        return "greedy decoding"
    # Nothing is chosen by what tests: without a dev split other words are allowed.
    dev = config.selection.split
    unknown = _unknown(config.data.dir, split, dev) if dev else None
    if unknown is not None and unknown > _OPEN:
        return f"greedy decoding ({unknown:.0%} of {dev}'s words are in no transcript)"
    config.decoding.lm = config.decoding.lexicon = f"{FROM}{split}"
    config.decoding.name = "beam" if unknown is None or unknown > _CLOSED else "lexicon"
    config.decoding.lm_weight, config.decoding.word_bonus = 0.5, 2.0
    share = "no dev" if unknown is None else f"{unknown:.1%} of {dev}'s words are not among them"
    return (
        f"{config.decoding.name} decoding with the words and a language model of {split} ({share})"
    )


@functools.cache
def _unknown(directory: str, split: str, held_out: str) -> float:
    """The share of a split's words, as they are said, that another split's transcripts lack."""
    tokenizer = tokenizer_for(read_metadata(directory))

    def words(name: str) -> list[str]:
        texts = transcripts(open_corpus(directory, name), tokenizer)
        return [word for text in texts for word in text.split()]

    known, said = set(words(split)), words(held_out)
    return sum(word not in known for word in said) / max(len(said), 1)


@functools.cache
def _say(text: str) -> None:
    """Once: a configuration may be made several times for one command."""
    print(text, file=sys.stderr)


def _table() -> Table:
    """The recipe, and what it is without each of its parts, on data/mine."""
    data = "data=data/mine"
    greedy = {"decoding.name": "greedy", "decoding.lm": "", "decoding.lexicon": ""}
    last = {"selection.split": "", "selection.patience": 0}
    plain = {"augment.enabled": False, "model.options.dropout": 0.0}
    unwarped = {"augment.options.time_warp": 0.0, "augment.options.frequency_warp": 0.0}
    constant = {"server.decay_start": 1_000_000_000}
    without: dict[str, dict[str, Any]] = {
        "without augmentation": {"augment.enabled": False},
        "without warps": unwarped,
        "without dropout": {"model.options.dropout": 0.0},
        "without decay": constant,
        "the last state": last,
        "without a language model": {"decoding.lm": ""},
        "greedy decoding": greedy,
    }
    quickstart = {**plain, **last, **greedy, "seed_training.steps": 250}
    off = {"privacy.enabled": False}
    return Table(
        name="own_speech",
        title="The recipe own_speech on data/mine, and without each of its parts",
        config="own_speech",
        rows=(
            Row("private", {}, arguments=data),
            Row("federated", off, arguments=data),
            Row("central", {"algorithm": "central"}, arguments=data),
            *(Row(name, off | fields, arguments=data) for name, fields in without.items()),
            Row("Transformer", off, arguments=f"{data},model=transformer"),
            Row("as the quickstart", off | quickstart, arguments=f"{data},model=transformer"),
        ),
        seeds=(0, 1, 2),
        expected="each part helps",
        better=tuple(
            ("federated", name)
            for name in ("private", *without, "Transformer", "as the quickstart")
        ),
    )


TABLES = {table.name: table for table in (_table(),)}
