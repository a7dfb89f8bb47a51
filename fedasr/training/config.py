"""The configuration of a run: one tree of fields, each of which a flag can override."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """Every field with its default; a file under experiments/configs changes what it must.

    Rounds, steps and users are counts, `sigma` and `clip_norm` are as in arXiv 2310.00098
    (noise of std clip_norm * sigma on the mean client update), learning rates belong to optax
    optimisers named in `fedasr.federated.server.SERVER_OPTIMIZERS`.
    """
    from ml_collections import ConfigDict, FieldReference

    from fedasr.audio.augment import SpecAugmentConfig
    from fedasr.models.transformer import TransformerConfig

    config = ConfigDict()
    config.name = "default"
    config.seed = 0
    config.algorithm = "federated"  # or "central": the same data with the users forgotten
    config.rounds = 100  # federated rounds; unused by "central"
    config.cohort = 8  # expected number of users in a round
    # Users vmapped together on a device; 0: the whole cohort; "auto": as many as its memory holds,
    # but 1 on a CPU, where that is fastest.
    config.chunk = FieldReference("auto", field_type=object)
    config.devices = 0  # 0: all; on a CPU, one for each core
    config.model_devices = 1  # so many train a client together, for models too large for one
    config.init_from = ""  # work directory or checkpoint to start from; it replaces the seed

    config.data = ConfigDict()
    config.data.dir = ""  # a prepared corpus; "": the synthetic corpus, made when first needed
    config.data.task = "digits"  # the synthetic corpus's: "digits" or "commands"
    config.data.train = "train"
    config.data.eval = ("dev", "test")
    # Padded lengths of clients' batches to each doubling: the same whatever the data is (see
    # `fedasr.data.batching.Grid`). Those that occur are compiled.
    config.data.buckets = 2
    config.data.labels_per_frame = 0.2  # room in padded batches; who needs more is padded as longer
    # Clients' examples are read once and kept on every device: for corpora that fit there.
    config.data.resident = False
    # IID control: utterances dealt out afresh over the users, whose numbers of them are kept.
    config.data.iid = False
    config.data.population = 0  # training users, for --dry_run before the data is there

    config.model = ConfigDict()
    config.model.name = "transformer"
    # Fields of the model's configuration class; a file for another model replaces them.
    config.model.options = ConfigDict(dataclasses.asdict(TransformerConfig()))

    config.augment = ConfigDict()
    config.augment.enabled = False
    config.augment.start_round = 0  # federated rounds done before SpecAugment begins
    config.augment.options = ConfigDict(dataclasses.asdict(SpecAugmentConfig()))

    # Central training before the federated rounds, on its own split; steps 0: none.
    config.seed_training = ConfigDict()
    config.seed_training.split = "seed"
    config.seed_training.steps = 0
    config.seed_training.batch_size = 16
    config.seed_training.batch_seconds = 0.0  # audio in a batch; above 0 it replaces batch_size
    config.seed_training.optimizer = "adamw"
    config.seed_training.learning_rate = 1e-3
    config.seed_training.decay_steps = 0  # every so many steps times decay_rate; 0: constant
    config.seed_training.decay_rate = 0.5
    config.seed_training.grad_clip = 1.0

    # The central baseline, when algorithm is "central".
    config.central = ConfigDict()
    config.central.steps = 500
    config.central.batch_size = 16
    config.central.batch_seconds = 0.0
    config.central.optimizer = "adamw"
    config.central.learning_rate = 1e-3
    config.central.decay_steps = 0
    config.central.decay_rate = 0.5
    config.central.grad_clip = 1.0

    config.client = ConfigDict()
    config.client.optimizer = "sgd"
    config.client.learning_rate = 0.3
    config.client.decay_start = 1_000_000_000  # rounds at the constant rate, then
    config.client.decay_rounds = 500  # times decay_rate every so many rounds
    config.client.decay_rate = 0.6
    config.client.batch_size = 4
    config.client.batch_seconds = 0.0  # audio in a batch; above 0 it replaces batch_size
    config.client.steps = 4  # 0: use epochs
    config.client.epochs = 0  # 0: use steps
    config.client.max_steps = 0  # with epochs, at most so many steps; 0: no limit
    # Utterances computed together; above 0 a batch's gradient is summed over parts of at most so
    # many utterances of like length. Their shapes are compiled into one program for each doubling
    # of the users' longest utterances; with data.buckets=4 they are 15.
    config.client.micro_batch = 0
    config.client.grad_clip = 1.0
    config.client.proximal = 0.0  # FedProx's mu
    config.client.weighting = "uniform"  # or "examples", without privacy only

    # Online model compression: float formats such as "S1E3M7" or "bfloat16"; "": float32.
    config.compression = ConfigDict()
    config.compression.download = ""  # of the parameters that clients receive and keep
    config.compression.upload = ""  # of their updates
    config.compression.share = 0.9  # of the weight matrices, drawn by every client and round
    config.compression.align = True  # scale variables to the format's range; False: the paper's
    # Measure a client's peak memory on its compiled program (for FedSGD; it takes a while).
    config.compression.measure = False

    # Partial model training: "all" variables, or a subset that is "fixed" by patterns, or drawn
    # for every "round" (one of so many groups) or for every "user" (a share).
    config.partial = ConfigDict()
    config.partial.mode = "all"
    config.partial.patterns = (".",)  # regular expressions, searched for in paths
    config.partial.groups = 10
    config.partial.share = 0.1

    # Local parameters (federated only): variables that belong to each user, are trained with the
    # rest, and are never sent, summed or covered by the privacy.
    config.local = ConfigDict()
    config.local.patterns = ()  # regular expressions, searched for in paths: ("^input_layer/",)
    # What a new user starts from: "init", the model's; without privacy also the "mean" of the other
    # users', or that of the "last" user before in the corpus's order.
    config.local.prototype = "init"

    config.server = ConfigDict()
    config.server.optimizer = "lamb"
    # Optax's own for this optimiser, such as b1; set in a file, there is nothing to override here.
    config.server.options = ConfigDict()
    config.server.learning_rate = 0.01
    config.server.decay_start = 1_000_000_000  # rounds at the constant rate, then
    config.server.decay_rounds = 500  # times decay_rate every so many rounds
    config.server.decay_rate = 0.6

    config.privacy = ConfigDict()
    config.privacy.enabled = True  # False: no clipping of client updates, no noise
    config.privacy.clip_norm = 0.01
    config.privacy.budget = "uniform"  # per layer: "uniform" or "dim"; or one "global" clip
    # False: clip; True: rescale every layer as the paper's public code does.
    config.privacy.normalise = False
    config.privacy.sigma = 1e-5
    # "poisson"; "fixed": so many without replacement; "shuffled": in turn; "everyone": cohort=0.
    config.privacy.sampler = "poisson"
    config.privacy.slots = 0  # largest Poisson cohort; 0: so many that a round is hardly ever full
    config.privacy.cycle = 1  # groups of users that Poisson sampling takes in turn
    # "independent" from round to round, or correlated: "banded" or "buffered" (linear Toeplitz).
    config.privacy.noise = "independent"
    # "run": all that is random follows from the run, and whoever has its configuration, data and
    # start can compute the noise; "secret": from the operating system, kept in checkpoints alone.
    config.privacy.noise_seed = "run"
    config.privacy.bands = 0  # 0: as many as rounds lie between a user's turns, at most 32
    config.privacy.buffers = 2
    config.privacy.adaptive = ConfigDict()  # bounds that follow a quantile of the update norms
    config.privacy.adaptive.enabled = False
    config.privacy.adaptive.quantile = 0.5
    config.privacy.adaptive.rate = 0.2
    config.privacy.adaptive.warmup = 0  # rounds at first that move the bounds alone, and fast
    config.privacy.adaptive.warmup_rate = 4.0
    # Noise on the mean of the users' votes over what one user changes in their sum.
    config.privacy.adaptive.sigma = 0.1
    config.privacy.delta = 1e-9
    # Deployments that the run stands for: (cohort, population) with the same sigma.
    config.privacy.deployments = ((1024, 1_000_000),)

    config.evaluation = ConfigDict()
    config.evaluation.every = 10  # rounds; 0: only before and after
    config.evaluation.batch_size = 32
    config.evaluation.while_training = ("dev",)

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # rounds
    config.checkpoint.seed_every = 100  # steps of central training
    config.checkpoint.keep = 2
    config.lock()  # a misspelt field in a file is then an error
    config.server.options.unlock()
    return config


def fingerprint(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration (a plain dict of JSON values)."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
