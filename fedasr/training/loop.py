"""A whole run: data, seed, federated rounds, evaluation, checkpoints, summary and report.

A work directory holds one run. Running the same configuration again continues from the last
checkpoint and ends with the same parameters, bit for bit, since everything random is a function of
(seed, round, user) and the noise counter is part of the state.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.audio.features import LogMelConfig
from fedasr.compression import settings as compression
from fedasr.data.batching import (
    Grid,
    LocalBatches,
    Padding,
    Resident,
    make_buckets,
    make_resident,
)
from fedasr.data.corpus import (
    METADATA_FILE,
    Corpus,
    ReshuffledCorpus,
    find_users,
    has_split,
    open_corpus,
    read_metadata,
    shared_users,
)
from fedasr.errors import UserError
from fedasr.federated import chunks, hosts
from fedasr.federated.client import local_training
from fedasr.federated.cohort import client_mesh, replicated
from fedasr.federated.local import (
    SLOTS_FILE,
    Layout,
    LocalStore,
    check_prototype,
    make_layout,
    remove_rows,
)
from fedasr.federated.server import ServerState, constant_then_exponential, make_optimizer
from fedasr.federated.simulation import RoundMetrics, Simulation
from fedasr.federated.subset import keep
from fedasr.models.recogniser import ARRAYS, Recogniser, make_recogniser
from fedasr.models.recurrent import RecurrentConfig
from fedasr.privacy import accounting, clipping, ledger
from fedasr.privacy.ledger import UNKNOWN_USERS, Users
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.settings import make_mechanism, make_sampler
from fedasr.streams import ROOT_WORDS, Stream, make_root, public_name, secret_root, seed_key
from fedasr.text import CharTokenizer, Tokenizer, learned_vocabulary, tokenizer_for
from fedasr.training.central import CentralTraining
from fedasr.training.checkpoint import (
    Checkpointer,
    CheckpointReader,
    has_checkpoint,
    lock_directory,
    restore_params,
)
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.checks import check_optimizer, check_splits
from fedasr.training.config import check_fields, fingerprint
from fedasr.training.evaluation import MULTIPLES as _MULTIPLES
from fedasr.training.evaluation import Evaluator, evaluation_buckets
from fedasr.training.interrupts import StopFlag, graceful_stop
from fedasr.training.logging import RunLogger, say, to_json, write_json_atomic
from fedasr.training.report import write_report
from fedasr.training.sinks import Sink
from fedasr.training.workdir import (
    CONFIG_FILE,
    STATE_ADDED,
    SUMMARY_FILE,
    check_same,
    extended,
    history,
    identity,
    local_path,
    read_existing,
    read_json,
    tree_hash,
)

_HOP_SECONDS = LogMelConfig().hop_ms / 1000
REPORT_FILE = "report.html"
CHUNK_FILE = "chunk.json"  # what chunk="auto" came to, or what fitted: a resumed run takes it again
# Of client updates: with more invalid ones the rest are no cohort any more.
_MOST_INVALID = 0.5
_BAD_ROUNDS = 3  # so many at the end are no accident
_REPORT_SECONDS = 300.0  # that the run waits for its plots
LOCAL_FOLDER = "local"  # of a work directory, the users' local parameters


class Interrupted(Exception):
    """The run was asked to stop; its directory can be resumed."""


@dataclasses.dataclass
class Totals:
    """What a run adds up over its rounds; part of every checkpoint."""

    wall_seconds: float = 0.0
    invalid_client_updates: int = 0
    infeasible_utterances: int = 0
    real: int = 0
    computed: int = 0
    timed_steps: int = 0
    timed_seconds: float = 0.0
    client_updates: int = 0
    loss_is_finite: bool = True  # in the last round with anybody in it, or the last steps
    bad_rounds: int = 0  # in a row, up to the last, in which most updates were invalid

    def add(self, metrics: RoundMetrics, compiled: bool) -> None:
        """Counts a round; one that compiled something says nothing about speed."""
        self.invalid_client_updates += metrics.invalid
        self.client_updates += metrics.clients
        if metrics.clients:
            self.loss_is_finite = math.isfinite(metrics.loss)
            bad = metrics.invalid > _MOST_INVALID * metrics.clients
            self.bad_rounds = self.bad_rounds + 1 if bad else 0
        self.infeasible_utterances += int(metrics.aux.get("infeasible", 0))
        self.real += metrics.padding.real
        self.computed += metrics.padding.computed
        if not compiled:
            self.timed_steps += metrics.steps
            self.timed_seconds += metrics.seconds

    def problem(self) -> str:
        """Why a run that got to its end has not done what it should; "" if it has."""
        invalid, updates = self.invalid_client_updates, self.client_updates
        if invalid > _MOST_INVALID * updates:
            return f"{invalid} of {updates} client updates were not finite and counted as zero"
        if self.bad_rounds >= _BAD_ROUNDS:
            return (
                f"in the last {self.bad_rounds} rounds most client updates were not finite and "
                "counted as zero"
            )
        return "" if self.loss_is_finite else "the last training loss was not finite"


def build_recogniser(config: Mapping[str, Any], augmented: bool = True) -> Recogniser:
    """The recogniser of a configuration.

    Args:
      config: of the run.
      augmented: whether its loss augments, if the configuration says so at all.

    Raises:
      UserError: for an unknown model or option.
    """
    augment = None
    if config["augment"]["enabled"] and augmented:
        options = config["augment"]["options"]
        augment = SpecAugmentConfig(**_known(SpecAugmentConfig, options, "augment.options"))
    return make_recogniser(config["model"]["name"], config["model"]["options"], augment)


def fitting_tokenizer(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of prepared data, if the configured model writes its alphabet.

    Args:
      config: of the run.
      metadata: of the corpus, from `fedasr.data.corpus.read_metadata`.

    Raises:
      UserError: the model has another number of tokens, or was trained for other characters.
    """
    tokenizer = tokenizer_for(metadata)
    trained_for = config["data"].get("characters", tokenizer.characters)
    if trained_for != tokenizer.characters:
        raise UserError(
            f"the model writes the characters {trained_for!r}, the data {tokenizer.characters!r}"
        )
    default = RecurrentConfig.vocab if config["model"]["name"] == "recurrent" else None
    vocab = config["model"]["options"].get("vocab", default or tokenizer.vocab_size)
    if vocab != tokenizer.vocab_size:
        raise UserError(
            f"the data's alphabet has {tokenizer.vocab_size} tokens with the blank, the model "
            f"{vocab}: set model.options.vocab={tokenizer.vocab_size} for it"
        )
    return tokenizer


class Data:
    """The corpora of a run and the shapes that hold them.

    Attributes: train; seed (None if there is none); evaluation {split: corpus}; grid of clients'
    padded lengths; buckets, which hold all of `train`; tokenizer;
    skipped {reason: count} of the preparation.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any], log: Any = print) -> None:
        settings = config["data"]
        metadata = read_metadata(directory)
        check_splits(config, metadata["splits"], directory, log)
        self.tokenizer = fitting_tokenizer(config, metadata)
        _check_features(config, metadata)
        self.train = open_corpus(directory, settings["train"])
        if settings["iid"]:
            self.train = ReshuffledCorpus(self.train, config["seed"])
        if (published := settings["population"]) and published != len(self.train.users):
            log(f"{published} training users were expected, there are {len(self.train.users)}")
        self.seed: Corpus | None = None
        seed_split = config["seed_training"]["split"]
        if config["seed_training"]["steps"] and not config["init_from"]:
            if has_split(metadata, seed_split):
                self.seed = open_corpus(directory, seed_split)
            else:
                log(f"no split {seed_split!r} in {directory}: training starts from scratch")
        self.evaluation = {
            split: open_corpus(directory, split)
            for split in settings["eval"]
            if has_split(metadata, split)
        }
        if missing := [split for split in settings["eval"] if not has_split(metadata, split)]:
            log(f"no split {missing} in {directory}: not evaluated")
        _check_users(self, config["privacy"]["enabled"], log)
        options = config["model"]["options"]
        stride = options.get("stride", 0) if options.get("objective", "ctc") == "ctc" else 0
        if stride > metadata["options"]["stride"]:
            log(
                f"the model's stride is {stride}, the data was prepared for "
                f"{metadata['options']['stride']}: transcripts too long for it are left out"
            )
        self.skipped = dict(metadata["summary"]["skipped"])
        self.grid = client_grid(config)
        self.buckets = make_buckets([self.train], 1, _MULTIPLES)
        self._keep_on_devices = settings["resident"]
        self._resident: tuple[Corpus, Any, Resident] | None = None

    def resident(self, sharding: Any) -> Resident | None:
        """All examples of `train` on the devices, if the configuration wants that.

        Read and placed once: what is placed already is not copied for another simulation.
        """
        if not self._keep_on_devices:
            return None
        if self._resident is None or self._resident[:2] != (self.train, sharding):
            self._resident = None  # not two at once
            found = make_resident(self.train, self.buckets, ARRAYS)
            self._resident = (self.train, sharding, hosts.place(found, sharding))
        return self._resident[2]


def client_grid(config: Mapping[str, Any]) -> Grid:
    """The padded lengths of clients' batches, which no data has a say in."""
    settings = config["data"]
    room = {"labels": settings["labels_per_frame"]}
    return Grid(settings["buckets"], _MULTIPLES, room)


def _check_features(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raises UserError for a recurrent model of another number of channels than the data has."""
    if config["model"]["name"] != "recurrent":
        return
    channels = metadata["options"].get("channels", LogMelConfig().num_mels)
    if config["model"]["options"].get("features", RecurrentConfig.features) != channels:
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


def data_directory(config: Mapping[str, Any]) -> Path:
    """The prepared corpus of a configuration; makes the synthetic one when first needed."""
    if config["data"]["dir"]:
        return Path(config["data"]["dir"])
    return _synthetic(config["data"]["task"])


def _identity(directory: Path) -> str:
    """Names the prepared data: a run must not go on, or be taken for done, with other data."""
    read_metadata(directory)  # a clear error if it is no corpus
    return hashlib.sha256((directory / METADATA_FILE).read_bytes()).hexdigest()[:16]


def _synthetic(task: str) -> Path:
    from fedasr.data.prepare import prepare_synthetic
    from fedasr.data.synthetic import SyntheticConfig

    return prepare_synthetic(SyntheticConfig(task=task))


def _central(
    config: Mapping[str, Any], section: str, corpus: Corpus, loss: Any, devices: Any
) -> CentralTraining:
    settings = config[section]
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings["grad_clip"]),
        make_optimizer(settings["optimizer"], _central_schedule(settings)),
    )
    batch = _batch(settings)
    return CentralTraining(
        corpus,
        loss,
        optimizer,
        batch["batch_size"],
        frames=batch["frames"],
        seed=config["seed"],
        stream=Stream.SEED_TRAINING if section == "seed_training" else Stream.CENTRAL,
        # Those of its own corpus: others' lengths would say how the seed is rounded.
        multiples=_MULTIPLES,
        steps_per_report=math.gcd(10, config["checkpoint"]["seed_every"]),  # saved when reported
        devices=devices,
        keep=ARRAYS,
        model_devices=config["model_devices"],
    )


def _central_schedule(settings: Mapping[str, Any]) -> float | optax.Schedule:
    if not settings["decay_steps"]:
        return settings["learning_rate"]
    return optax.exponential_decay(
        settings["learning_rate"], settings["decay_steps"], settings["decay_rate"], staircase=True
    )


def _batch(settings: Mapping[str, Any]) -> dict[str, int | None]:
    """How large a batch is: examples, or frames where it is given in seconds of audio."""
    if not settings["batch_seconds"]:
        return {"batch_size": settings["batch_size"], "frames": None}
    return {"batch_size": None, "frames": round(settings["batch_seconds"] / _HOP_SECONDS)}


def make_simulation(
    config: Mapping[str, Any],
    data: Data,
    loss: Any,
    devices: Sequence[jax.Device],
    store: LocalStore | None = None,
    chunk: int | None = None,
) -> Simulation:
    """The federated rounds of a configuration.

    Args:
      config, data, loss, devices: of the run.
      store: the users' local parameters, if the configuration has any.
      chunk: in place of the configuration's. That may be "auto": 1 on a CPU, where it is fastest,
        otherwise as many clients as the devices' memory holds.

    Raises:
      UserError: for settings that make no sense together.
    """
    if config["local"]["patterns"] and store is None:
        raise UserError("local.patterns: this program keeps no local parameters")
    client, server = config["client"], config["server"]
    sampler = make_sampler(config, len(data.train.users))
    schedule = constant_then_exponential(
        server["learning_rate"],
        server["decay_start"],
        server["decay_rounds"],
        server["decay_rate"],
    )
    decays = client["decay_start"] < config["rounds"]
    factor = constant_then_exponential(
        1.0, client["decay_start"], client["decay_rounds"], client["decay_rate"]
    )

    def make_update(loss):
        return local_training(
            loss,
            make_optimizer(client["optimizer"], client["learning_rate"]),
            grad_clip=client["grad_clip"],
            proximal=client["proximal"],
            schedule=factor if decays else None,
        )

    def build(chunk: int) -> Simulation:
        return Simulation(
            data.train,
            make_mechanism(config, sampler, sent_parameters(config)),
            compression.make_client_update(config, make_update, loss),
            make_optimizer(server["optimizer"], schedule, **server["options"]),
            _local_batches(config),
            seed=config["seed"],
            identity=run_identity(config),
            chunk=chunk,
            buckets=data.grid,
            devices=devices,
            model_devices=config["model_devices"],
            keep=ARRAYS,
            trained=trained_variables(config),
            store=store,
            micro_batch=client["micro_batch"],
            resident=data.resident(replicated(client_mesh(devices, config["model_devices"]))),
        )

    chunk = config["chunk"] if chunk is None else chunk
    if chunk == chunks.AUTO and client["micro_batch"]:
        return build(1)
    if chunk != chunks.AUTO:
        return build(chunk)
    if (budget := chunks.device_budget(devices)) is None:
        return build(1)
    shapes = jax.eval_shape(build_recogniser(config).init, jax.random.key(0))
    most = -(-sampler.slots * config["model_devices"] // len(devices))

    def memory(chunk: int) -> int:
        try:
            return build(chunk).chunk_bytes(shapes)
        except jax.errors.JaxRuntimeError as error:
            if not chunks.is_out_of_memory(error):
                raise
            return 2 * budget  # some compilers refuse what does not fit

    return build(chunks.fit_chunk(memory, most, budget))


def local_layout(config: Mapping[str, Any]) -> Layout | None:
    """Which variables are local to the users; None if none are.

    Raises:
      UserError: see `fedasr.federated.local.make_layout`.
    """
    if config["algorithm"] != "federated" or not (patterns := config["local"]["patterns"]):
        return None
    shapes = jax.eval_shape(build_recogniser(config).init, jax.random.key(0))
    return make_layout(shapes, patterns, trained_variables(config))


def _check_rows(store: LocalStore, path: str | Path) -> None:
    """Raises UserError unless a checkpoint's users have their rows in the store."""
    expected = checkpoint_metadata(path)["local_users"]
    if (found := int(store.known.sum())) != expected:
        raise UserError(
            f"{store.folder} has the local parameters of {found} users, the checkpoint {path} "
            f"was saved with those of {expected}: they belong together"
        )


def local_rows(
    path: str | Path, params: Any, corpus: Corpus, directory: str | Path
) -> tuple[Layout | None, Any]:
    """The local parameters of a corpus's users, as they were at a checkpoint.

    Args:
      path: of the checkpoint, as for `fedasr.training.checkpoint.restore_params`.
      params: its parameters.
      corpus: whose users.
      directory: of the corpus.

    Returns:
      What `Evaluator` takes: their layout, and from users to rows. (None, None) if the run had
      none, if they do not lie beside the checkpoint, or if it was trained on other data, whose
      users may have the same names.

    Raises:
      UserError: rows that are not those of the checkpoint.
    """
    metadata, step = checkpoint_metadata(path), path
    path = Path(path).absolute()
    config = {"local": {"patterns": []}} | metadata["config"]
    folders = [folder / LOCAL_FOLDER for folder in (path, path.parent, path.parent.parent)]
    folder = next((folder for folder in folders if (folder / SLOTS_FILE).is_file()), None)
    if folder is None or metadata["stage"] != "main" or (layout := local_layout(config)) is None:
        return None, None
    if _identity(Path(directory)) != config["data"]["identity"]:
        return None, None
    trained = open_corpus(data_directory(config), config["data"]["train"])
    prototype = config["local"]["prototype"]
    store = LocalStore(folder, layout, len(trained.users), prototype, read_only=True)
    store.restore(metadata["units"])
    _check_rows(store, step)
    return layout, store.rows_of(find_users(trained, corpus), params)


def shared_variables(config: Mapping[str, Any]) -> list[bool] | None:
    """For each of the model's variables, whether users send updates of it; None if of all."""
    layout = local_layout(config)
    return trained_variables(config) if layout is None else layout.shared


def sent_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters that users send updates of."""
    shapes = jax.eval_shape(build_recogniser(config).init, jax.random.key(0))
    layout = local_layout(config)
    return compression.sent_size(shapes, trained_variables(config), layout and layout.local)


def trained_variables(config: Mapping[str, Any]) -> list[bool] | None:
    """For each of the model's variables, whether it is ever trained; None if all are.

    Raises:
      UserError: for a pattern of `partial.patterns` that matches no variable.
    """
    subset = compression.make_subset(config)
    if subset is None:
        return None
    return subset.trained(jax.eval_shape(build_recogniser(config).init, jax.random.key(0)))


def _local_batches(config: Mapping[str, Any]) -> LocalBatches:
    client = config["client"]
    return LocalBatches(
        **_batch(client),
        steps=client["steps"] or None,
        epochs=client["epochs"] or None,
        max_steps=client["max_steps"] or None,
    )


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON holds it, which has no NaN and no infinity: checked before."""
    check_fields(config)
    config = to_json(config)
    _check(config)
    return config


def _check(config: Mapping[str, Any]) -> None:
    """Raises UserError for mistakes that would otherwise show late, or not at all."""
    compression.check(config)
    _check_local(config)
    for section in ("seed_training", "central", "client", "server"):
        settings = config[section]
        options = settings.get("options", {})
        check_optimizer(settings["optimizer"], options, f"{section}.options")
    _local_batches(config)
    options = config["model"]["options"]
    mels = LogMelConfig().num_mels
    if config["model"]["name"] == "recurrent":
        sections = ("seed_training", "central", "client")
        if timed := [name for name in sections if config[name]["batch_seconds"]]:
            raise UserError(f"{timed[0]}.batch_seconds counts audio: a recurrent model has none")
    # The channels of neural recordings are known with the data (`Data`).
    elif options.get("features", mels) != mels:
        raise UserError(f"the data needs model.options.features={mels}")
    SpecAugmentConfig(**_known(SpecAugmentConfig, config["augment"]["options"], "augment.options"))
    if config["devices"] > len(jax.local_devices()):
        raise UserError(f"devices={config['devices']}: only {len(jax.local_devices())} are here")
    if (count := config["devices"] or len(jax.devices())) % config["model_devices"]:
        raise UserError(
            f"{count} devices cannot be grouped by model_devices={config['model_devices']}"
        )
    if jax.process_count() > 1:
        if config["devices"]:
            raise UserError("devices must be 0, all of them, with several processes")
        if config["algorithm"] != "federated" or config["local"]["patterns"]:
            raise UserError("central training and local parameters need a single process")
        if config["model_devices"] > 1:
            raise UserError("model_devices above 1 needs a single process")


def _known(kind: type, options: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The options; raises UserError for one that the dataclass does not have."""
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(options.keys() - set(names)):
        raise UserError(f"{where} has no {unknown[0]}: it has {', '.join(names)}")
    return options


def _check_local(config: Mapping[str, Any]) -> None:
    check_prototype(config["local"]["prototype"])
    local_layout(config)


def initial_params(recogniser: Recogniser, config: Mapping[str, Any]) -> Any:
    """The untrained model of a configuration: the same for all runs of one seed."""
    return recogniser.init(seed_key(config["seed"], Stream.INIT))


def run_identity(config: Mapping[str, Any]) -> str:
    """What tells a run from all others, beside the parameters that it starts from.

    All of the configuration, with what names its data: where things lie is left out, and so is the
    number of rounds where a longer run goes through the same rounds as a shorter one. Under
    correlated noise it does not: the noise is made for so many rounds.
    """
    config = copy.deepcopy(dict(config))
    config["data"].pop("dir")
    config.pop("init_from")
    config.pop("start", None)  # the root has the parameters themselves
    if config["privacy"]["noise"] not in ("banded", "buffered"):
        config.pop("rounds")
    return json.dumps(config, sort_keys=True)


def parameter_count(recogniser: Recogniser) -> int:
    """Number of parameters, without allocating them."""
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def earlier_runs(config: Mapping[str, Any]) -> tuple[list[ledger.Entry], bool]:
    """What the ledger of `init_from` holds, and whether it has one (so has a start from nothing).

    Raises:
      UserError: the ledger cannot be read.
    """
    if not config["init_from"]:
        return [], True
    data = checkpoint_metadata(config["init_from"]).get("ledger")
    if data is None:
        return [], False
    return ledger.from_data([*data["earlier"], *data["own"]]), bool(data["known"])


def _runs_before(
    config: Mapping[str, Any], started: str | Path | None
) -> tuple[list[ledger.Entry], bool]:
    """The ledger that a run starts with: its own checkpoint's, if it has one already.

    The model that it started from need not be there any more.

    Args:
      config: of the run.
      started: its work directory or checkpoint; None if there is none.
    """
    if started is None or not has_checkpoint(started):
        return earlier_runs(config)
    kept = checkpoint_metadata(started).get("ledger")
    if kept is None:
        return [], False
    return ledger.from_data(kept["earlier"]), bool(kept["known"])


def run_entry(
    name: str,
    config: Mapping[str, Any],
    mechanism: Mechanism,
    rounds: int,
    users: Users,
    deployments: Sequence[tuple[float, int]] = (),
) -> ledger.Entry:
    """The ledger's entry of a run's federated rounds."""
    if not config["privacy"]["enabled"]:
        return ledger.without_privacy(name, "rounds", rounds, users)
    return ledger.of_mechanism(name, mechanism, rounds, users, deployments)


def describe_ledger(
    entries: Sequence[ledger.Entry],
    known: bool,
    spent: accounting.Epsilon,
    extrapolations: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The summary's "ledger": what this run's users are charged over all runs behind the model.

    Args:
      entries: of all of them, this run's own last.
      known: whether the model that it started from had a ledger.
      spent: by this run alone. extrapolations: the summary's, of this run alone.
    """
    delta = spent.delta
    *earlier, _ = entries
    runs = [
        {
            "run": entry.run,
            "stage": entry.stage,
            "rounds": entry.rounds,
            "sampling": entry.sampling,
            "users": entry.users.count,
            "epsilon": ledger.composed([(entry.event, entry.relation)], delta)[0],
        }
        for entry in earlier
    ]
    described: dict[str, Any] = {"known": known, "earlier": runs, "delta": delta}
    if not known:
        return described | {"total_epsilon": None, "total_deployed": []}
    total = ledger.Total(spent.epsilon, delta, spent.accountant, 0, ())
    if earlier:
        total = ledger.total(entries, delta)
    deployed = []
    for one in extrapolations:
        case, epsilon = (one["cohort"], one["population"]), one["epsilon"]
        if earlier:
            epsilon = ledger.total_deployed(entries, case, delta)
        deployed.append({"cohort": case[0], "population": case[1], "epsilon": epsilon})
    return described | {
        "total_epsilon": total.epsilon,
        "accountant": total.accountant,
        "shared_users": total.shared,
        "users_assumed_shared": list(total.assumed),
        "total_deployed": deployed,
    }


def describe_privacy(
    mechanism: Mechanism,
    config: Mapping[str, Any],
    rounds: int,
    params: Any,
    entries: Sequence[ledger.Entry] = (),
    ledger_known: bool = True,
) -> dict[str, Any]:
    """The summary's "privacy": the mechanism, and epsilon as simulated and as deployed.

    Args:
      mechanism: of the run.
      config: for delta and the deployments.
      rounds: so many were, or would be, run.
      params: parameters or their shapes, for the bounds by layer.
      entries: of all runs behind the model, this one's last.
      ledger_known: whether the model that it started from had a ledger.
    """
    privacy = config["privacy"]
    if not privacy["enabled"]:
        return {"enabled": False, "epsilon": None, "extrapolations": []}
    spent = mechanism.epsilon(rounds, privacy["delta"])
    extrapolations = []
    for cohort, population in privacy["deployments"]:
        deployed = mechanism.deployed(cohort, population)
        figure = deployed.epsilon(rounds, privacy["delta"])
        extrapolations.append(
            {
                "cohort": cohort,
                "population": population,
                "rounds": rounds,
                **_multipliers(deployed),
                **_figure(figure),
                **_shares(deployed, rounds, privacy["delta"]),
                "neighbours": deployed.sampler.neighbours,
            }
        )
    bounds = {}
    if mechanism.budget != "global":
        names = clipping.layer_names(params, mechanism.layers)
        values = clipping.layer_bounds(
            params, mechanism.clip_norm, mechanism.budget, mechanism.layers
        )
        bounds = dict(zip(names, map(float, values), strict=True))
    return {
        "enabled": True,
        "clip_norm": mechanism.clip_norm,
        "budget": privacy["budget"],
        "sigma": mechanism.sigma,
        **_multipliers(mechanism),
        "delta": privacy["delta"],
        "delta_at_tails": mechanism.tail_delta(rounds),
        **_noise(mechanism, params),
        "layer_bounds": bounds,
        "not_covered": _not_covered(config, ledger_known),
        "ledger": describe_ledger(entries, ledger_known, spent, extrapolations)
        if entries
        else None,
        **_figure(spent),
        **_shares(mechanism, rounds, privacy["delta"]),
        "neighbours": mechanism.sampler.neighbours,
        "extrapolations": extrapolations,
    }


def _noise_words(mechanism: Mechanism) -> str:
    if mechanism.secure is not None:
        return f"Skellam in shares, {mechanism.secure.bits} bits"
    return "independent" if mechanism.correlation is None else mechanism.correlation.description


def _multipliers(mechanism: Mechanism) -> dict[str, float]:
    """Noise on the sum, over the clip norm and over how far one user can move the sum."""
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_over_sensitivity": mechanism.noise_over_sensitivity,
    }


def _noise(mechanism: Mechanism, params: Any) -> dict[str, Any]:
    """How the noise hangs together over rounds, what remembering it costs, and adaptive bounds."""
    correlation, adaptive = mechanism.correlation, mechanism.adaptive
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    described = {
        "noise": _noise_words(mechanism),
        "noise_state_bytes": correlation.buffers * size if correlation and mechanism.sigma else 0,
    }
    if adaptive is not None:
        described["adaptive"] = dataclasses.asdict(adaptive)
    return described


def _shares(mechanism: Mechanism, rounds: int, delta: float) -> dict[str, Any]:
    """Of noise in shares: what it costs beside Gaussian noise of the same variance; else nothing.

    `bits` of each of `coordinates` that a client sends, `wrapped`, the share of the sum's
    coordinates that are expected to wrap around, without signal and with the most there can be,
    `sensitivity`, what rounding makes of the clip norm, over it, and `central`, epsilon under that
    Gaussian noise.
    """
    if mechanism.secure is None:
        return {}
    encoding = mechanism.encoding
    length = encoding.l2 / (mechanism.clip_norm * encoding.scale)
    most = encoding.shares * mechanism.clip_norm
    return {
        "secure_aggregation": {
            "bits": encoding.bits,
            "coordinates": encoding.dimension,
            "wrapped": [encoding.wrapped(), encoding.wrapped(most)],
            "sensitivity": length,
            "rounding": math.sqrt(encoding.rounding_variance / encoding.variance),
            "central": _figure(mechanism.central().epsilon(rounds, delta)),
        }
    }


def _not_covered(config: Mapping[str, Any], ledger_known: bool) -> list[str]:
    """What the epsilons say nothing about."""
    limits = ["choices made by looking at the metrics of this or other runs"]
    if config["local"]["patterns"]:
        limits.append(
            "the users' local parameters, which are never sent: the guarantee is about the shared "
            "part of the model alone, and says nothing to who sees a user's own"
        )
    if vocabulary := config["data"].get("vocabulary"):
        limits.append(vocabulary)
    if config["data"]["iid"]:
        limits.append("anybody (data.iid: utterances were dealt out over users that do not exist)")
    if config["init_from"] and not ledger_known:
        limits.append(
            f"whatever init_from={config['init_from']} was trained on, and its rounds: it has no "
            "ledger, so that no total can be given"
        )
    elif config["init_from"]:
        limits.append(
            "users of the runs behind init_from who are not in this one: 'ledger' has their epsilon"
        )
    elif config["seed_training"]["steps"]:
        limits.append("the seed's own training data")
    return limits


def _figure(epsilon: Any) -> dict[str, Any]:
    return {
        "epsilon": epsilon.epsilon,
        "epsilon_rdp": epsilon.epsilon_rdp,
        "epsilon_pld": epsilon.epsilon_pld,
        "accountant": epsilon.accountant,
        "sampling": epsilon.sampling,
    }


def _user_names(settings: Mapping[str, Any]) -> Sequence[str] | None:
    """Ids of the training users, if the data is there."""
    if not settings["dir"] or not Path(settings["dir"]).exists():
        return None
    return open_corpus(settings["dir"], settings["train"]).users


def _dry_chunk(config: Mapping[str, Any]) -> int | str:
    """As far as it is known without compiling."""
    automatic = config["chunk"] == chunks.AUTO
    return 1 if automatic and chunks.device_budget(jax.devices()) is None else config["chunk"]


def dry_run(
    config: Mapping[str, Any], workdir: str | Path | None = None, extend: int | None = None
) -> dict[str, Any]:
    """What a run would be: resolves the configuration, trains nothing, makes no data.

    Args:
      config, extend: see `run`.
      workdir: where it would be, to find out whether it may; None for anywhere.

    Returns:
      The keys of a summary that can be known beforehand, and `bytes_per_client` {"down", "up"}.

    Raises:
      UserError: as the run itself would.
    """
    config = _checked(config)
    with _one_line(workdir):
        config = _rehearse_place(config, workdir, extend)
    recogniser = build_recogniser(config)
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    count = parameter_count(recogniser)
    settings = config["data"]
    if settings["dir"] and settings["population"] and not Path(settings["dir"]).exists():
        population = settings["population"]
    elif settings["dir"]:
        population = _rehearse(config, Path(settings["dir"]))
        if vocabulary := learned_vocabulary(read_metadata(settings["dir"])):
            settings["vocabulary"] = vocabulary
    else:
        population = _rehearse_synthetic(config)
    summary = {
        "status": "dry_run",
        "name": config["name"],
        "algorithm": config["algorithm"],
        "parameters": count,
        "population": population,
        "device": _device(jax.devices()),
        "config": config,
    }
    if config["algorithm"] == "federated":
        sampler = make_sampler(config, population)
        mechanism = make_mechanism(config, sampler, sent_parameters(config))
        mechanism.client_transform()
        shared = keep(shapes, shared_variables(config))
        layout = local_layout(config)
        if layout is not None:
            mechanism.check_local(config["local"]["prototype"])
        clients = compression.describe_client(config, shapes, local=layout and layout.local)
        earlier, known = _runs_before(config, workdir)
        names = _user_names(settings)
        entries = [
            *earlier,
            run_entry(
                "this run",
                config,
                mechanism,
                config["rounds"],
                Users.of(names) if names else UNKNOWN_USERS,
                config["privacy"]["deployments"],
            ),
        ]
        summary |= {
            "rounds": config["rounds"],
            "cohort": config["cohort"] or population,
            "chunk": _dry_chunk(config),
            "bytes_per_client": {"down": clients[-1]["down_bytes"], "up": clients[-1]["up_bytes"]},
            "clients": clients,
            "privacy": describe_privacy(
                mechanism, config, config["rounds"], shared, entries, known
            ),
        }
        if layout is not None:
            summary["local"] = {"parameters": layout.size}
    return to_json(summary)


def _rehearse_place(
    config: dict[str, Any], workdir: str | Path | None, extend: int | None
) -> dict[str, Any]:
    """The configuration that would be run in a directory, refused if that is another's."""
    existing = None if workdir is None else read_existing(local_path(workdir))
    if extend is not None:
        config = extended(Path(workdir or "?"), existing, config, extend)
    start = _start(config, existing, Path(workdir or "?"))
    if existing is None:
        return config
    ours = {**config, "data": dict(config["data"])}
    ours["start"] = tree_hash(start) if start is not None else existing.get("start", "")
    theirs = existing.get("data")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    recorded = {name: theirs.get(name) for name in ("identity", "characters")}
    if config["data"]["dir"] and (directory := Path(config["data"]["dir"])).exists():
        recorded["identity"] = _identity(directory)
        recorded["characters"] = tokenizer_for(read_metadata(directory)).characters
    ours["data"] |= recorded
    rounds = {} if extend is None else {"rounds": extend}
    check_same(Path(workdir), {**existing, **rounds}, ours)
    return config


def _rehearse(config: Mapping[str, Any], directory: Path) -> int:
    """Makes all that a run on this data would train with, and nothing of it on disk.

    Returns:
      The number of training users.

    Raises:
      UserError: as the run would.
    """
    small = {**config, "data": {**config["data"], "resident": False}}  # not the data itself
    data = Data(directory, small, lambda text: None)
    devices = jax.devices()[: config["devices"] or None]
    _check_central(config, data, devices)
    if config["algorithm"] == "federated":
        with tempfile.TemporaryDirectory() as folder:
            store = None
            if layout := local_layout(config):
                users, prototype = len(data.train.users), config["local"]["prototype"]
                store = LocalStore(folder, layout, users, prototype)
            chunk = _dry_chunk(config)
            chunk = 1 if chunk == chunks.AUTO else chunk
            simulation = make_simulation(
                config, data, build_recogniser(config).loss, devices, store, chunk
            )
        _check_deployments(config, simulation.mechanism)
    return len(data.train.users)


def _rehearse_synthetic(config: Mapping[str, Any]) -> int:
    """Likewise as far as is known of the synthetic corpus before it is made."""
    from fedasr.data import synthetic

    settings = synthetic.SyntheticConfig(task=config["data"]["task"])
    where = f"the synthetic corpus {settings.task!r}"
    check_splits(config, synthetic.SPLITS, where, lambda text: None)
    fitting_tokenizer(config, {"options": {"characters": CharTokenizer().characters}})
    _check_features(config, {"options": {}})
    population = synthetic.expected_users(settings, config["data"]["train"])
    if config["algorithm"] == "federated":
        _check_deployments(
            config,
            make_mechanism(config, make_sampler(config, population), sent_parameters(config)),
        )
    return population


def _check_deployments(config: Mapping[str, Any], mechanism: Mechanism) -> None:
    """Raises UserError for what cannot be claimed, before anything is trained."""
    if config["privacy"]["enabled"]:
        rounds, delta = config["rounds"], config["privacy"]["delta"]
        mechanism.check_delta(rounds, delta)
        for case in config["privacy"]["deployments"]:
            mechanism.deployed(*case).check_delta(rounds, delta)


def _check_central(config: Mapping[str, Any], data: Data, devices: Sequence[jax.Device]) -> None:
    """Raises UserError for central training that could not begin, before something else does."""
    loss = build_recogniser(config).loss
    stages = {"seed_training": data.seed}
    if config["algorithm"] == "central":
        stages["central"] = data.train
    for section, corpus in stages.items():
        if corpus is not None:
            _central(config, section, corpus, loss, devices)


def run(
    config: Mapping[str, Any], workdir: str | Path, extend: int | None = None
) -> dict[str, Any]:
    """Trains as `config` says, from the last checkpoint in `workdir` if there is one.

    Args:
      config: a plain mapping with the fields of `default_config`.
      workdir: made if missing.
      extend: rounds to go on to instead of the configuration's, in a directory that holds a run.

    Returns:
      The summary, also in `workdir/summary.json`.

    Raises:
      UserError: for a mistake in the configuration or data, a `workdir` of another configuration,
        or a disk that does not take what must not be lost.
      Interrupted: on SIGTERM or SIGINT, after saving a checkpoint.
    """
    workdir, config = local_path(workdir), _checked(config)
    with _one_line(workdir):
        return _run(config, workdir, extend)


@contextlib.contextmanager
def _one_line(workdir: str | Path | None) -> Iterator[None]:
    """Turns what a disk does not do into a UserError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        what = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(
            f"the run in --workdir={workdir} cannot go on: {what}{where}: what was saved is "
            "intact; mend that, and the same command goes on"
        ) from error


def _run(config: dict[str, Any], workdir: Path, extend: int | None) -> dict[str, Any]:
    if hosts.is_leader():
        data_directory(config)  # the others find it made
    hosts.wait_for_all("data")
    directory = data_directory(config)
    config["data"]["identity"] = _identity(directory)
    # What the model's outputs mean: of the checkpoints, too.
    metadata = read_metadata(directory)
    config["data"]["characters"] = tokenizer_for(metadata).characters
    if vocabulary := learned_vocabulary(metadata):
        config["data"]["vocabulary"] = vocabulary
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --workdir={workdir}: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        if hosts.is_leader():
            lock = stack.enter_context(lock_directory(workdir))
            if lock.warning:
                say(lock.warning)
        stop = stack.enter_context(graceful_stop())
        hosts.wait_for_all("locked")
        existing = read_existing(workdir)
        if extend is not None:
            config = extended(workdir, existing, config, extend)
        start = _start(config, existing, workdir)
        config["start"] = tree_hash(start) if start is not None else (existing or {}).get("start")
        config["start"] = config["start"] or ""
        if existing is not None:
            rounds = {} if extend is None else {"rounds": extend}
            check_same(workdir, {**existing, **rounds}, config)
        before = read_json(workdir / SUMMARY_FILE)
        if before and _is_done(before, config):
            if hosts.is_leader() and not (workdir / REPORT_FILE).exists():  # killed between the two
                _report(workdir)
            return before
        if existing is None and local_layout(config) is not None:  # rows of a mistake
            remove_rows(workdir / LOCAL_FOLDER)
        scratch = workdir
        if not hosts.is_leader():
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        this = _Run(config, directory, workdir, scratch, stop, start)
        this.history = history(before, config["rounds"])
        # Before anything is written all have read, and the same.
        hosts.wait_for_all("begun")
        hosts.check_alike("configuration, data or work directory", f"{config} {this.latest}")
        hosts.connect()
        # Not before: a mistake must not claim the directory.
        if hosts.is_leader() and read_json(workdir / CONFIG_FILE) != config:
            write_json_atomic(workdir / CONFIG_FILE, config)
        summary = this.run()
        hosts.wait_for_all("ended")  # who leaves before would end the others
        return summary


def _read_chunk(path: Path) -> dict[str, Any]:
    """What `chunk="auto"` came to; {} if nothing was written.

    Raises:
      UserError: the file is damaged.
    """
    kept = read_json(path)
    said = {name: kept.get(name) for name in ("chunk", "device")} if kept else {}
    # Files of releases before 2026-12 have no check.
    damaged = kept and (
        not isinstance(said["chunk"], int)
        or not isinstance(said["device"], str)
        or kept.get("check", "") not in ("", fingerprint(said))
    )
    if damaged or (kept is None and path.exists()):
        raise UserError(
            f"{path} is damaged: remove it, and chunk is found anew (another one adds in another "
            "order: the last bits may then differ)"
        )
    return kept or {}


def _is_done(summary: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a summary is that of the whole of this run."""
    if summary.get("status") != "completed":
        return False
    if summary.get("configuration", identity(config)) != identity(config):
        return False
    return config["algorithm"] == "central" or summary.get("rounds") == config["rounds"]


def _start(
    config: Mapping[str, Any], existing: Mapping[str, Any] | None, workdir: Path
) -> dict[str, Any] | None:
    """The parameters that a run starts from; None without init_from, or if it has started.

    What a run has started from may be gone once there is a checkpoint, or have been trained on.
    """
    if not config["init_from"]:
        return None
    same = existing is not None and existing.get("init_from") == config["init_from"]
    if same and has_checkpoint(workdir):
        return None
    return _read_start(config)


def _read_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError if there is none, or it is of another model or alphabet."""
    path = config["init_from"]
    shapes = jax.eval_shape(build_recogniser(config).init, jax.random.key(0))
    start = _loaded(path, shapes)
    theirs = checkpoint_metadata(path).get("config", {}).get("data", {}).get("characters")
    ours = config["data"].get("characters", theirs)
    if theirs not in (None, ours):
        raise UserError(f"init_from={path} writes the characters {theirs!r}, the data {ours!r}")
    return start


def _report(workdir: Path) -> str:
    """Writes the report; returns what is wrong if it cannot be written, or takes too long."""
    problems: dict[str, str] = {}
    sink = Sink("report", problems.__setitem__, _REPORT_SECONDS)
    sink(write_report, workdir)
    if problems:
        say(f"warning: no report: {problems['report']}")
    return problems.get("report", "")


def _device(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"


class _Run:
    """The state of one process's part of a run."""

    def __init__(
        self,
        config: dict[str, Any],
        directory: Path,
        workdir: Path,
        logs: Path,
        stop: StopFlag,
        start: Any = None,
    ) -> None:
        # `logs` is the work directory in the leader; what others write is for nobody.
        self.config, self.logs, self.stop = config, logs, stop
        self.began = time.monotonic()
        self.totals = Totals()
        self.initial: dict[str, Any] = {}
        self.final: dict[str, Any] | None = None
        self.recogniser = build_recogniser(config)
        self.start = start
        self.history: list[dict[str, Any]] = []
        self.run_name = public_name(make_root(run_identity(config)))
        self.devices = jax.devices()[: config["devices"] or None]
        # What is not spread over processes is done by each, and alike.
        self.own_devices = [d for d in self.devices if d.process_index == jax.process_index()]
        self.data = Data(directory, config, self._message)
        self.users = Users.of(self.data.train.users)
        self.seed_steps = config["seed_training"]["steps"] if self.data.seed else 0
        _check_central(config, self.data, self.own_devices)
        self.evaluator = Evaluator(
            self.recogniser,
            evaluation_buckets(list(self.data.evaluation.values())),
            config["evaluation"]["batch_size"],
            self.own_devices,
            self.data.tokenizer,
            layout := local_layout(config),
            config["model_devices"],
        )
        self.store: LocalStore | None = None
        self.known: dict[str, np.ndarray] = {}
        if layout is not None:
            self.store = LocalStore(
                workdir / LOCAL_FOLDER,
                layout,
                len(self.data.train.users),
                config["local"]["prototype"],
            )
        # (rounds until which it runs, simulation): SpecAugment may begin later than round 0.
        self.simulations: list[tuple[int, Simulation]] = []
        if config["algorithm"] == "federated":
            losses = [(config["rounds"], self.recogniser.loss)]
            if config["augment"]["enabled"] and (start := config["augment"]["start_round"]):
                plain = build_recogniser(config, augmented=False)
                losses.insert(0, (min(start, config["rounds"]), plain.loss))
            self.losses, self.chunk_file = losses, workdir / CHUNK_FILE
            kept = _read_chunk(self.chunk_file)
            same = kept.get("device") == _device(self.devices)
            self.simulations = self._simulations(kept["chunk"] if same else None)
            _check_deployments(config, self.simulations[0][1].mechanism)
        checkpoints = workdir / "checkpoints"
        if hosts.is_leader():
            self.checkpointer = Checkpointer(checkpoints, config["checkpoint"]["keep"])
        else:
            self.checkpointer = CheckpointReader(checkpoints)
        self.latest = self.checkpointer.latest_step()
        for folder, why in getattr(self.checkpointer, "damaged", {}).items():
            self._message(f"warning: {why}; it was set aside as {folder.name}")
        newest = None if self.latest is None else checkpoints / str(self.latest)
        self.earlier, self.ledger_known = _runs_before(config, newest)

    def _simulations(self, chunk: int | None) -> list[tuple[int, Simulation]]:
        """(rounds until which it runs, simulation), in order."""
        made: list[tuple[int, Simulation]] = []
        for until, loss in self.losses:
            made.append(
                (
                    until,
                    make_simulation(self.config, self.data, loss, self.devices, self.store, chunk),
                )
            )
            chunk = made[0][1].chunk
        return made

    def _keep_chunk(self, chunk: int | None = None) -> None:
        """The float additions of a resumed run are in the order of the first."""
        chunk = chunk or self.simulations[0][1].chunk
        if hosts.is_leader() and chunk != self.config["chunk"]:
            kept = {"chunk": chunk, "device": _device(self.devices)}
            write_json_atomic(self.chunk_file, kept | {"check": fingerprint(kept)})

    def _message(self, text: str) -> None:
        if not hosts.is_leader():
            return
        if logger := getattr(self, "logger", None):
            logger.message(text)
        else:
            say(text)

    # Checkpoints are numbered by the steps of the seed plus the units (rounds, or steps of the
    # central baseline) of the main stage; `stage` tells which state they hold.

    def _save(self, stage: str, units: int, state: ServerState) -> None:
        number = units if stage == "seed" else self.seed_steps + units
        totals = dataclasses.asdict(self.totals)
        totals["wall_seconds"] += time.monotonic() - self.began
        metadata = {
            "stage": stage,
            "units": units,
            "config": self.config,
            "ledger": {
                "known": self.ledger_known,
                "earlier": ledger.to_data(self.earlier),
                "own": ledger.to_data(self._own_entries(stage, units)),
            },
            "totals": totals,
            "initial": to_json(self.initial),
        }
        if self.store is not None:
            metadata["local_users"] = int(self.store.known.sum())
            self.store.flush()
        self.checkpointer.save(number, state, metadata)
        if self.store is not None and (oldest := self.checkpointer.oldest_step()) is not None:
            self.store.release(oldest - self.seed_steps)

    def _own_entries(self, stage: str, units: int) -> list[ledger.Entry]:
        """What this run's users have been charged for, by stage."""
        entries = []
        if self.data.seed is not None and self.seed_steps:
            steps = units if stage == "seed" else self.seed_steps
            seed = Users.of(self.data.seed.users)
            entries.append(ledger.without_privacy(self.run_name, "seed", steps, seed))
        if stage == "seed":
            return entries
        if not self.simulations:
            entries.append(ledger.without_privacy(self.run_name, "central", units, self.users))
        else:
            mechanism = self.simulations[0][1].mechanism
            cases = self.config["privacy"]["deployments"]
            entries.append(
                run_entry(self.run_name, self.config, mechanism, units, self.users, cases)
            )
        return entries

    def _check_stop(self, stage: str, units: int, state: ServerState) -> None:
        if hosts.any_process(self.stop.requested):
            self._save(stage, units, state)
            self.checkpointer.wait()
            hosts.wait_for_all("stopped")
            raise Interrupted(f"stopped in {stage} at {units}: run the same command to go on")

    def run(self) -> dict[str, Any]:
        """All the stages from wherever the last checkpoint is."""
        latest = self.latest
        stage, units = "seed", 0
        if latest is not None:
            metadata = checkpoint_metadata(self.checkpointer.directory / str(latest))
            stage, units = metadata["stage"], metadata["units"]
            self.totals = Totals(**metadata["totals"])
            self.initial = metadata["initial"]
        # -1: in the seed, not even round 0 (the evaluation before the first round) is done.
        rounds_done = units if stage == "main" else -1
        steps_done = units if stage == "seed" else self.seed_steps
        if self.config["algorithm"] == "central" and stage == "main":
            rounds_done, steps_done = 0, self.seed_steps + units
        resume = (None, None) if latest is None else (rounds_done, steps_done)
        stream = None if hosts.is_leader() else io.StringIO()
        self.logger = RunLogger(self.logs, *resume, stream=stream)
        try:
            with self.logger, self.checkpointer:
                if latest is not None:
                    self._message(f"resuming in stage {stage!r} at {units}")
                if stage == "seed":
                    params = self._seed(latest, units)
                    latest, units = None, 0
                else:
                    params = None
                summary = self._main(params, latest, units)
        except Interrupted:
            partial = {
                "status": "interrupted",
                "wall_seconds": self._wall_seconds(),
                "history": self.history,
                "side_channel_failures": self.logger.failures,
            }
            write_json_atomic(self.logs / SUMMARY_FILE, partial)
            raise
        write_json_atomic(self.logs / SUMMARY_FILE, summary)
        if hosts.is_leader() and (problem := _report(self.logs)):
            summary["side_channel_failures"]["report"] = problem
            write_json_atomic(self.logs / SUMMARY_FILE, summary)
        return summary

    def _wall_seconds(self) -> float:
        return self.totals.wall_seconds + time.monotonic() - self.began

    def _seed(self, latest: int | None, units: int) -> Any:
        """Central training on the seed's split; returns parameters to start the main stage."""
        config = self.config
        if self.start is not None:
            return self.start
        params = initial_params(self.recogniser, config)
        if not self.seed_steps:
            return params
        trainer = self._central_training("seed_training")
        state = self._central_steps("seed", trainer, params, latest, units, self.seed_steps)
        return hosts.leaders(state.params)

    def _central_training(self, section: str) -> CentralTraining:
        """Of the seed, or of the central baseline."""
        seed = section == "seed_training"
        corpus, devices = (
            (self.data.seed, self.own_devices) if seed else (self.data.train, self.devices)
        )
        return _central(self.config, section, corpus, self.recogniser.loss, devices)

    def _padding(self, federated: bool) -> dict[str, float | None]:
        """Shares of padding: of the main stage, and of the seed if there was one."""
        totals, seed = self.totals, None
        if federated:
            main = Padding(totals.real, totals.computed)
        else:
            main = self._central_training("central").padding(self.config["central"]["steps"])
        if self.seed_steps and self.start is None:
            seed = self._central_training("seed_training").padding(self.seed_steps).fraction
        return {"padding_fraction": main.fraction, "seed_padding_fraction": seed}

    def _central_steps(
        self,
        stage: str,
        trainer: CentralTraining,
        params: Any,
        latest: int | None,
        units: int,
        total: int,
    ) -> ServerState:
        state = trainer.init(params)
        if latest is not None:
            state = trainer.place(self.checkpointer.restore(latest, jax.device_get(state))[0])
        before = 0 if stage == "seed" else self.seed_steps
        every = self.config["checkpoint"]["seed_every"]
        self.logger.start(before + total, before + units, "seed")
        for state, done, loss in trainer.run(state, total - units):
            self.logger.step(before + done, {"loss": loss})
            self.totals.loss_is_finite = math.isfinite(loss)
            if every and done % every == 0 and done < total:
                self._save(stage, done, state)
            self._check_stop(stage, done, state)
        return state

    def _evaluate(self, params: Any, splits: Sequence[str]) -> dict[str, dict[str, float]]:
        if jax.process_count() > 1:
            params = hosts.on_host(params)
        return {
            split: self.evaluator(params, self.data.evaluation[split], self._rows(params, split))
            for split in splits
            if split in self.data.evaluation
        }

    def _rows(self, params: Any, split: str) -> Any:
        """From a split's users to their local parameters; None if there are none."""
        if self.store is None:
            return None
        if split not in self.known:
            self.known[split] = find_users(self.data.train, self.data.evaluation[split])
        return self.store.rows_of(self.known[split], params)

    def _main(self, params: Any, latest: int | None, units: int) -> dict[str, Any]:
        """Federated rounds, or the central baseline; then the summary."""
        if self.store is not None:
            self.store.restore(units)
            if latest is not None:
                _check_rows(self.store, self.checkpointer.directory / str(latest))
        like = params
        if like is None:
            like = initial_params(self.recogniser, self.config)
        if latest is None:
            self.initial = self._evaluate(like, list(self.data.evaluation))
            self._message("before: " + _wer_line(self.initial))
        if not self.simulations:
            trainer = self._central_training("central")
            total = self.config["central"]["steps"]
            if latest is None:
                self._save("main", 0, trainer.init(like))
            state = self._central_steps("main", trainer, like, latest, units, total)
            self._save("main", total, state)
            mechanism = None
        else:
            mechanism = self.simulations[0][1].mechanism
            state = self._rounds(like, latest, units)
        self.checkpointer.wait()
        return self._summary(state, mechanism)

    def _train(
        self, state: ServerState, done: int
    ) -> Iterator[tuple[ServerState, RoundMetrics, bool]]:
        """(state, metrics, whether something was compiled) of the rounds after the first `done`."""
        self._keep_chunk()
        shrunk, number = False, 0
        while number < len(self.simulations):
            until, simulation = self.simulations[number]
            compiled = 0
            try:
                for state, metrics in simulation.run(state, max(until - done, 0)):
                    done = metrics.round
                    yield state, metrics, simulation.compilations() > compiled
                    compiled = simulation.compilations()
                number += 1
            except jax.errors.JaxRuntimeError as error:
                chunk = simulation.chunk
                if not chunks.is_out_of_memory(error) or jax.process_count() > 1:
                    raise
                if shrunk or chunk == 1:
                    self._keep_chunk(max(1, chunk // 2))
                    raise UserError(
                        f"out of memory on {_device(self.devices)} with chunk={chunk}: the same "
                        "command tries half of that; or take smaller batches or gradient "
                        "checkpointing"
                    ) from error
                self._message(
                    f"out of memory on {_device(self.devices)} with chunk={chunk}: going on with "
                    f"chunk={chunk // 2}"
                )
                shrunk = True
                self.simulations = self._simulations(chunk // 2)
                state = self.simulations[number][1].place(state)
                self._keep_chunk()

    def _rounds(self, params: Any, latest: int | None, units: int) -> ServerState:
        config, total = self.config, self.config["rounds"]
        simulation = self.simulations[0][1]
        state = simulation.init(params, self._secret() if latest is None else None)
        names = simulation.layer_names(params)
        if latest is None:
            # In this order: a run that resumes from this checkpoint does not log round 0 again.
            self.logger.round(0, {"eval": self.initial})
            self._save("main", 0, state)
        else:
            nothing = np.zeros(ROOT_WORDS, np.uint32)
            like = jax.device_get(state)._replace(root=nothing)
            restored, _ = self.checkpointer.restore(latest, like, STATE_ADDED)
            if not restored.root.any():
                # Of a release whose rounds had other streams. Not the root of a run that would
                # begin now: the rounds to come would share its noise.
                root = self._secret()
                root = simulation.root_of(restored.params) if root is None else root
                restored = restored._replace(root=root)
            state = simulation.place(restored)
        self.run_name = public_name(state.root)
        self.logger.start(total, units)
        every = config["evaluation"]["every"]
        for state, metrics, compiled in self._train(state, units):
            self.totals.add(metrics, compiled)
            record = _record(metrics, names)
            last = metrics.round == total
            if last:
                self.final = self._evaluate(state.params, list(self.data.evaluation))
                record["eval"] = self.final
            elif every and metrics.round % every == 0:
                splits = config["evaluation"]["while_training"]
                record["eval"] = self._evaluate(state.params, splits)
            if "eval" in record and (epsilon := self._epsilon(simulation, metrics.round)):
                record["epsilon"] = epsilon
            self.logger.round(metrics.round, record)
            if last or metrics.round % config["checkpoint"]["every"] == 0:
                self._save("main", metrics.round, state)
            if not last:
                self._check_stop("main", metrics.round, state)
        return state

    def _secret(self) -> np.ndarray | None:
        """A root that nobody can compute, if the configuration wants one."""
        secret = self.config["privacy"]["noise_seed"] == "secret"
        return hosts.leaders(secret_root()) if secret else None

    def _epsilon(self, simulation: Simulation, round: int) -> float | None:
        privacy = self.config["privacy"]
        if not privacy["enabled"] or not privacy["deployments"]:
            return None
        deployed = simulation.mechanism.deployed(*privacy["deployments"][0])
        # The quicker of the two accountants: a round should not wait seconds for the other.
        relation = deployed.sampler.neighboring_relation
        return accounting.rdp_epsilon(deployed.event(round), privacy["delta"], relation)

    def _clients(self, params: Any) -> list[dict[str, Any]]:
        """What a client receives, sends and, if asked for, needs in memory."""
        if not self.config["compression"]["measure"]:
            local = self.store and self.store.layout.local
            return compression.describe_client(self.config, params, local=local)
        batch = _batch_shapes(self.config, self.data.buckets[-1])
        return compression.describe_client(self.config, params, self.recogniser.loss, batch)

    def _summary(self, state: ServerState, mechanism: Mechanism | None) -> dict[str, Any]:
        totals, config = self.totals, self.config
        final = self.final or self._evaluate(state.params, list(self.data.evaluation))
        self._message("after: " + _wer_line(final))
        federated = mechanism is not None
        leaves = jax.tree.leaves(state.params)
        finite = bool(jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])))
        problem = "" if finite else "parameters are not finite"
        if not all(math.isfinite(rates["loss"]) for rates in final.values()):
            problem = problem or "the loss of the trained model is not finite"
        problem = problem or totals.problem()
        if problem:
            self._message(f"the result is worth nothing: {problem}")
        return to_json(
            {
                "status": "diverged" if problem else "completed",
                "problem": problem or None,
                "configuration": identity(config),
                "history": self.history,
                "side_channel_failures": self.logger.failures,
                "name": config["name"],
                "run": self.run_name,
                "algorithm": config["algorithm"],
                "rounds": int(state.round) if federated else 0,
                "central_steps": self.seed_steps + (0 if federated else int(state.round)),
                "cohort": config["cohort"] or len(self.data.train.users) if federated else None,
                "population": len(self.data.train.users),
                "parameters": sum(x.size for x in leaves),
                "wer": {split: rates["wer"] for split, rates in final.items()},
                "cer": {split: rates["cer"] for split, rates in final.items()},
                "initial_wer": {split: rates["wer"] for split, rates in self.initial.items()},
                "privacy": describe_privacy(
                    mechanism,
                    config,
                    int(state.round),
                    keep(state.params, shared_variables(config)),
                    [*self.earlier, self._own_entries("main", int(state.round))[-1]],
                    self.ledger_known,
                )
                if federated
                else {"enabled": False, "epsilon": None, "extrapolations": []},
                "local": self.store.summary() if self.store is not None else None,
                "clients": self._clients(state.params) if federated else [],
                "client_steps_per_second": totals.timed_steps / totals.timed_seconds
                if totals.timed_seconds
                else None,
                **self._padding(federated),
                "skipped_utterances": self.data.skipped,
                "infeasible_utterances": totals.infeasible_utterances,
                "invalid_client_updates": totals.invalid_client_updates,
                "client_updates": totals.client_updates if federated else None,
                "wall_seconds": self._wall_seconds(),
                "chunk": self.simulations[0][1].chunk if federated else None,
                "device": _device(self.devices),
            }
        )


def _batch_shapes(config: Mapping[str, Any], bucket: Mapping[str, int]) -> dict[str, Any]:
    """Shapes of a client's largest batch."""
    size = config["client"]["batch_size"]
    mels = config["model"]["options"].get("features", LogMelConfig().num_mels)
    shapes = {
        "features": ((size, bucket["features"], mels), jnp.float32),
        "features_length": ((size,), jnp.int32),
        "labels": ((size, bucket["labels"]), jnp.int32),
        "labels_length": ((size,), jnp.int32),
        "mask": ((size,), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _wer_line(rates: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{split} WER {value['wer']:.1f}%" for split, value in rates.items())


def _record(metrics: RoundMetrics, names: Sequence[str]) -> dict[str, Any]:
    norms = metrics.norms if len(metrics.norms) else np.full(len(names), np.nan)
    clipped = metrics.clipped if len(metrics.clipped) else np.full(len(names), np.nan)
    return {
        "loss": metrics.loss,
        "cohort": metrics.clients,
        "client_steps": metrics.steps,
        "update_norm": dict(zip(names, norms, strict=True)),
        "clipped_share": dict(zip(names, clipped, strict=True)),
        **_scales(metrics, names),
        "seconds": {"round": metrics.seconds, "data": metrics.waiting},
        "padding_fraction": metrics.padding.fraction,
        "invalid_client_updates": metrics.invalid,
    }


def _scales(metrics: RoundMetrics, names: Sequence[str]) -> dict[str, Any]:
    scales = metrics.clip_scales
    if not len(scales):
        return {}
    return {
        "clip_scale": dict(
            zip(names, scales, strict=True) if len(scales) > 1 else [("all", scales[0])]
        )
    }


def _loaded(path: str, like: Any) -> Any:
    """Parameters of a checkpoint, checked against the model's shapes."""
    params = restore_params(path)
    theirs = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    ours = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(like)}
    if theirs != ours:
        name = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))[0]
        raise UserError(
            f"init_from={path} holds another model: {name} is {theirs.get(name)} there, "
            f"{ours.get(name)} here"
        )
    return jax.tree.map(jnp.asarray, params)
