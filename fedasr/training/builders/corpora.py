"""The corpora of a run, their shapes and their alphabet."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedasr.audio.features import LogMelConfig
from fedasr.data import skew
from fedasr.data.batching import (
    Grid,
    Resident,
    make_buckets,
    make_resident,
)
from fedasr.data.corpus import Corpus, all_lengths, shared_users
from fedasr.data.records import METADATA_FILE, has_split, open_corpus, read_metadata
from fedasr.data.views import ReshuffledCorpus
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.models.recogniser import INPUTS, takes_audio
from fedasr.models.recurrent import RecurrentConfig
from fedasr.text import NormalisedTokenizer, SubwordTokenizer, Tokenizer, tokenizer_for
from fedasr.training.builders.splits import check_splits
from fedasr.training.config import Config
from fedasr.training.evaluation import MULTIPLES


def data_directory(config: Config) -> Path:
    """The prepared corpus of a configuration; makes the synthetic one when first needed."""
    if config.data.dir:
        return Path(config.data.dir)
    return _synthetic(config.data.task, "audio" if takes_audio(config.model.name) else "features")


def _synthetic(task: str, store: str) -> Path:
    from fedasr.data.synthetic import SyntheticConfig, prepare_synthetic

    return prepare_synthetic(SyntheticConfig(task=task), store=store)


def open_split(directory: str | Path, split: str, config: Config) -> Corpus:
    """A split as the configured model hears it: `fedasr.data.records.open_corpus`."""
    return open_corpus(directory, split, takes_audio(config.model.name))


def content_hash(directory: Path) -> str:
    """Names the prepared data: a run must not go on, or be taken for done, with other data."""
    read_metadata(directory)  # a clear error if it is no corpus
    return hashlib.sha256((directory / METADATA_FILE).read_bytes()).hexdigest()[:16]


def fitting_tokenizer(config: Config, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of prepared data, if the configured model writes its alphabet.

    Args:
      config: of the run.
      metadata: of the corpus, from `fedasr.data.records.read_metadata`.

    Raises:
      UserError: the model has another number of tokens, or was trained for other characters.
    """
    tokenizer = tokenizer_for(metadata)
    trained_for = tokenizer.characters if config.data.characters is None else config.data.characters
    if trained_for != tokenizer.characters:
        raise UserError(
            f"the model writes the characters {trained_for!r}, the data {tokenizer.characters!r}"
        )
    if takes_audio(config.model.name):
        return _fitting_pretrained(config, tokenizer)
    default = RecurrentConfig.vocab if config.model.name == "recurrent" else None
    vocab = config.model.options.get("vocab", default or tokenizer.vocab_size)
    if vocab != tokenizer.vocab_size:
        raise UserError(
            f"the data's alphabet has {tokenizer.vocab_size} tokens with the blank, the model "
            f"{vocab}: set model.options.vocab={tokenizer.vocab_size} for it"
        )
    return tokenizer


def _fitting_pretrained(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """Likewise of a pretrained model: its output may have signs that no text holds, and more."""
    options, needed = config.model.options, tokenizer.vocab_size
    # The file's last signs, such as its blank, may be among the tokens of a tokenizer.
    needed -= getattr(tokenizer, "unwritten", 0)
    words = options.get("objective", "ctc") != "ctc"
    if (vocab := options["vocab"]) < needed or (vocab > tokenizer.vocab_size and not words):
        raise UserError(
            f"the data's alphabet has {tokenizer.vocab_size} tokens with the blank, the model "
            f"{vocab}: prepare the data with --tokenizer=FOLDER of the model, or begin with a new "
            f"output layer: init_from=hf-encoder:FOLDER, model.options.vocab={tokenizer.vocab_size}"
        )
    if words and isinstance(tokenizer, SubwordTokenizer):
        return NormalisedTokenizer(tokenizer)
    return tokenizer


class Data:
    """The corpora of a run and the shapes that hold them.

    Attributes: directory; train; spoken, which is `train` by who spoke, whoever its utterances were
    dealt out to; seed (None if there is none); evaluation {split: corpus}; grid of
    clients' padded lengths; buckets, which hold all of `train`; tokenizer;
    skipped {reason: count} of the preparation; skew (see `skew.measure`; None if not asked for).
    """

    def __init__(self, directory: str | Path, config: Config, log: Any = print) -> None:
        settings = config.data
        self.directory = Path(directory)
        metadata = read_metadata(directory)
        check_splits(config, metadata["splits"], directory, log)
        self.tokenizer = fitting_tokenizer(config, metadata)
        check_features(config, metadata)
        self.train = self.spoken = open_split(directory, settings.train, config)
        if settings.iid:
            self.train = ReshuffledCorpus(self.train, config.seed)
        self.skew: dict[str, float] | None = None
        if settings.skew:
            self._deal_out(config)
        if (published := settings.population) and published != len(self.train.users):
            log(f"{published} training users were expected, there are {len(self.train.users)}")
        self.seed: Corpus | None = None
        seed_split = config.seed_training.split
        if config.seed_training.steps and not config.init_from:
            if has_split(metadata, seed_split):
                self.seed = open_split(directory, seed_split, config)
            else:
                log(f"no split {seed_split!r} in {directory}: training starts from scratch")
        self.evaluation = {
            split: open_split(directory, split, config)
            for split in settings.eval
            if has_split(metadata, split)
        }
        if missing := [split for split in settings.eval if not has_split(metadata, split)]:
            log(f"no split {missing} in {directory}: not evaluated")
        _check_users(self, config.privacy.enabled, log)
        options = config.model.options
        stride = options.get("stride", 0) if options.get("objective", "ctc") == "ctc" else 0
        if stride > metadata["options"]["stride"]:
            lengths = all_lengths(self.train)
            frames = -(-lengths["features"].astype(int) // stride)
            log(
                f"the model's stride is {stride}, the data was prepared for "
                f"{metadata['options']['stride']}: {(lengths['labels'] > frames).sum()} of "
                f"{len(frames)} training transcripts are too long for it and left out (and such "
                "with doubled letters that nearly are)"
            )
        self.skipped = dict(metadata["summary"]["skipped"])
        self.grid = client_grid(config)
        self.buckets = make_buckets([self.train], 1, MULTIPLES)
        self._keep_on_devices = settings.resident
        self._resident: tuple[Corpus, Any, Resident] | None = None

    def _deal_out(self, config: Config) -> None:
        """Has training users differ as the configuration says, and measures how they do."""
        settings = config.data
        args = settings.skew, self.tokenizer.decode
        classes = skew.classes_of(self.train, *args)
        if settings.skew_alpha:
            more = settings.skew_alpha, settings.quantity_skew, config.seed
            dealt = skew.skewed(self.train, classes, *more)
            self.train, classes = dealt, classes[dealt.rows]
        self.skew = skew.measure(classes, self.train.sizes)

    def resident(self, sharding: Any) -> Resident | None:
        """All examples of `train` on the devices, if the configuration wants that.

        Read and placed once: what is placed already is not copied for another simulation.
        """
        if not self._keep_on_devices:
            return None
        if self._resident is None or self._resident[:2] != (self.train, sharding):
            self._resident = None  # not two at once
            found = make_resident(self.train, self.buckets, INPUTS)
            self._resident = (self.train, sharding, hosts.transfer(found, sharding))
        return self._resident[2]


def client_grid(config: Config) -> Grid:
    """The padded lengths of clients' batches, which no data has a say in."""
    settings = config.data
    room = {"labels": settings.labels_per_frame}
    return Grid(settings.buckets, MULTIPLES, room)


def check(config: Config) -> None:
    """Raises UserError for utterances that would be dealt out in two ways, or in none."""
    data = config.data
    if data.skew_alpha and not data.skew:
        raise UserError("data.skew_alpha needs data.skew: name what users are to differ in")
    if data.quantity_skew and not data.skew_alpha:
        raise UserError("data.quantity_skew needs data.skew_alpha: set it, large for users alike")
    if data.skew_alpha and data.iid:
        raise UserError("data.iid and data.skew_alpha both deal utterances out: unset one of them")


def check_features(config: Config, metadata: Mapping[str, Any]) -> None:
    """Raises UserError for a recurrent model of another number of channels than the data has."""
    if config.model.name != "recurrent":
        return
    channels = metadata["options"].get("channels", LogMelConfig().num_mels)
    if config.model.options.get("features", RecurrentConfig.features) != channels:
        raise UserError(f"the data needs model.options.features={channels}")


def _check_users(data: Data, private: bool, log: Any) -> None:
    """No epsilon for users whom the seed has seen without noise; no "unseen voices" that train."""
    if data.seed is not None and private and (shared := shared_users(data.train, data.seed)):
        raise UserError(
            f"{len(shared)} users ({shared[0]}...) are in the seed's split and in the training "
            "split: the seed is trained without noise, so they would have no privacy"
        )
    for split, corpus in data.evaluation.items():
        if shared := shared_users(data.train, corpus):
            log(f"{len(shared)} users of the split {split!r} are training users too")
