"""A pretrained recogniser, adapted to one's own speech by private rounds of FFA-LoRA.

    --config=adapted:data=data/audio,model=models/wav2vec2-base-960h[,rounds=40][,kind=ffa_lora]
                     [,window=10][,train=dev_clean[20%:]]
    --config=adapted:data=data/audio,size=whisper-small --dry_run

data: a corpus prepared with the model's tokenizer and --store=audio. model: the model's folder, or
"hf-encoder:FOLDER" for its encoder with a new output layer. rounds: 0 for as many as three turns of
each user take, 20 to 200. kind: which part is trained, see `fedasr.models.peft`. window: seconds
that Whisper hears, in place of the 30 that it was trained with; longer utterances are not trained
on. train: the split that trains, where it has another name than "train" or "train_...". size: in
place of a model, random weights of a known size (`SIZES`), for what a run would send and hold.
Cohort and local steps follow from the data as in the recipe `own_speech`.

    fedasr sweep --table=adapted

The recipe on data/audio with models/whisper-tiny.en: central, federated and private.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FieldReference

from fedasr.data.records import open_corpus, read_metadata
from fedasr.errors import UserError
from fedasr.models.pretrained import FAMILIES
from fedasr.models.pretrained.folders import open_source
from fedasr.recipes import own_speech, shared
from fedasr.recipes.tables import Row, Table
from fedasr.training.config import default_config
from fedasr.training.values import WHOLE, parse_start

ARGUMENTS: dict[str, Any] = {
    "data": "",
    "model": "",
    "size": "",
    "rounds": 0,
    "kind": "ffa_lora",
    "window": 0,
    "train": "",
}
# The family and where it differs from the family's defaults.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2-base": ("wav2vec2", {}),
    "whisper-tiny.en": ("whisper", {}),
    "whisper-small": (
        "whisper",
        {
            **{"vocab": 51866, "dim": 768, "mlp": 3072, "decoder_mlp": 3072},
            **{"blocks": 12, "decoder_blocks": 12, "heads": 12, "decoder_heads": 12},
        },
    ),
}
_BATCH = 4
_TURNS, _FEWEST, _MOST = 3, 20, 200  # of a user; rounds


def get_config(arguments: str = "") -> ConfigDict:
    """The settings for a prepared corpus and a model's folder.

    Raises:
      UserError: an unknown argument, or no such data or model.
    """
    args = shared.parse(arguments, ARGUMENTS)
    for name, example in {"data": "data/audio", "model": "models/wav2vec2-base-960h"}.items():
        if not args[name] and not (name == "model" and args["size"]):
            raise UserError(f"--config=adapted needs {name}=, such as {name}={example}")
    config = default_config()
    config.name = "adapted"
    config.data.dir = args["data"]
    _set_model(config, args)
    users, usual = own_speech.USERS, own_speech.UTTERANCES
    if Path(args["data"]).exists():
        metadata = read_metadata(args["data"])
        config.data.train = args["train"] or own_speech.training_split(metadata)
        config.data.eval = own_speech.held_out(metadata, config.data.train)
        if dev := [split for split in config.data.eval if split.startswith("dev")]:
            config.selection.split = dev[0]
            config.evaluation.while_training = (dev[0],)
        train = open_corpus(args["data"], config.data.train)
        if config.model.name == "whisper":  # no text is twice as long as all that are known
            lengths = [train.lengths(user)["labels"].max() for user in range(len(train.users))]
            config.model.options.most_tokens = 2 * int(max(lengths))
        users, usual = len(train.users), float(np.median(train.sizes))
    config.cohort, config.client.batch_size = max(1, min(8, users // 2)), _BATCH
    config.client.steps = int(np.clip(np.ceil(usual / _BATCH), 1, 2))
    turns = int(np.clip(_TURNS * users // config.cohort, _FEWEST, _MOST))
    rounds = FieldReference(args["rounds"] or turns)
    config.rounds = rounds
    config.central.batch_size = _BATCH
    config.central.steps = rounds * config.cohort * config.client.steps
    config.central.learning_rate = 0.001
    config.evaluation.every = (rounds + 3) // 4
    config.evaluation.every_steps = (config.central.get_ref("steps") + 3) // 4
    config.peft.kind = args["kind"]
    # The output of a factor that is frozen at random is small: local steps are long.
    config.client.learning_rate = 0.1
    config.server.optimizer, config.server.learning_rate = "adam", 0.002
    config.server.decay_start = rounds * 2 // 3
    config.server.decay_rounds = (rounds + 3) // 4
    config.privacy.clip_norm = 0.4
    config.privacy.sigma = own_speech.sigma(rounds)
    return config


def _set_model(config: ConfigDict, args: Mapping[str, Any]) -> None:
    """The model's section, of a folder or of a known size."""
    if args["size"]:
        if args["model"]:
            raise UserError("--config=adapted takes a model's folder or a size: leave one out")
        config.model.name, options = shared.choose(args, "size", SIZES)
        family = dataclasses.asdict(FAMILIES[config.model.name].config(**options))
        config.model.options = ConfigDict(family)
    else:
        start: str = args["model"] if ":" in args["model"] else WHOLE + args["model"]
        scheme, place = parse_start(start)
        config.init_from = start
        if not Path(place).exists():  # whoever runs it is told that there is none
            return
        source = open_source(place, scheme == WHOLE)
        config.model.name = source.name
        config.model.options = ConfigDict(dict(source.options))
    if args["window"]:
        config.model.options.window = str(args["window"])


def _table() -> Table:
    """The recipe on data/audio with models/whisper-tiny.en, and the same without its privacy."""
    arguments = "data=data/audio,model=models/whisper-tiny.en,window=10,rounds=8"
    seldom: dict[str, Any] = {"evaluation.every": 4, "evaluation.every_steps": 64}
    off = {"privacy.enabled": False}
    return Table(
        name="adapted",
        title="Whisper tiny.en adapted to the speakers of data/audio",
        config="adapted",
        rows=(
            Row("central", {"algorithm": "central", **seldom}, arguments=arguments),
            Row("federated", off | seldom, arguments=arguments),
            Row("private", seldom, arguments=arguments),
        ),
        seeds=(0, 1, 2),
        expected="federated comes near central, private near federated",
        better=(("federated", "private"), ("central", "federated")),
    )


TABLES = {table.name: table for table in (_table(),)}
