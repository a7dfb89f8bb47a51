"""The sections of a run's configuration: frozen dataclasses whose fields declare what they hold.

`fedasr.training.config` makes one configuration of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedasr.fields import (
    checked,
    choice,
    flag,
    real,
    section,
    setting,
    several,
    whole,
)
from fedasr.training import values

NEVER = 1_000_000_000  # a round that no run gets to
_BITS = 6, 20  # as `fedasr.privacy.secure_aggregation` has them, which takes JAX to import
_MOST_RATE = 1e4  # of learning: two decades more than any optimiser here has been of use at


def _model_options() -> dict[str, Any]:
    from fedasr.models.transformer import TransformerConfig

    return dataclasses.asdict(TransformerConfig())


def _augment_options() -> dict[str, Any]:
    from fedasr.audio.augment import SpecAugmentConfig

    return dataclasses.asdict(SpecAugmentConfig())


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained and evaluated on.

    Attributes:
      identity, characters, vocabulary, knowledge: no settings, but what a run records of its data
        and of the files that it decodes with (`knowledge`, a hash of their content): the hash of
        its content, its alphabet, and what the privacy says nothing of where that was learned; None
        for what is not known.
    """

    dir: str = setting(
        checked("", values.check_place, "path"),
        'a prepared corpus; "": the synthetic one, made when first needed',
    )
    task: str = setting(choice("digits", values.tasks), "the synthetic corpus's")
    train: str = setting(checked("train", values.check_split, "split"))
    eval: tuple[str, ...] = setting(several(("dev", "test"), values.check_split, what="splits"))
    buckets: int = setting(
        whole(2, 1, 64),
        "padded lengths of clients' batches to each doubling: the same whatever the data is (see "
        "`fedasr.data.batching.Grid`); those that occur are compiled",
    )
    labels_per_frame: float = setting(
        real(0.2, above=0, most=10), "room in padded batches; who needs more is padded as longer"
    )
    resident: bool = setting(
        flag(False),
        "clients' examples are read once and kept on every device: for corpora that fit there",
    )
    iid: bool = setting(
        flag(False),
        "IID control: utterances dealt out afresh over the users, whose numbers are kept",
    )
    skew: str = setting(
        choice("", values.skews),
        'what users differ in: "words" (the first of a transcript), "voices" or "lengths"; the '
        "summary says how much",
    )
    skew_alpha: float = setting(
        real(0.0, most=1e9),
        "above 0 the training utterances are dealt out afresh, each user's shares of those classes "
        "drawn from a Dirichlet distribution; large: alike, small: apart; 0: as they are",
    )
    quantity_skew: float = setting(
        real(0.0, most=10),
        "with skew_alpha, standard deviation of the logarithm of users' numbers of utterances",
    )
    population: int = setting(
        whole(0, unit="users"), "training users, for --dry_run before the data is there"
    )
    identity: str | None = None
    characters: str | None = None
    vocabulary: str | None = None
    knowledge: str | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """The recogniser."""

    name: str = setting(choice("transformer", values.models))
    options: Mapping[str, Any] = setting(
        checked(_model_options, values.check_options, "options"),
        "fields of the model's configuration class; a file for another model replaces them",
    )


@dataclasses.dataclass(frozen=True)
class Augment:
    """SpecAugment of training features."""

    enabled: bool = setting(flag(False))
    start_round: int = setting(
        whole(0, unit="rounds"), "federated rounds done before SpecAugment begins"
    )
    options: Mapping[str, Any] = setting(checked(_augment_options, values.check_options, "options"))


@dataclasses.dataclass(frozen=True)
class Central:
    """The central baseline, when algorithm is "central"."""

    steps: int = setting(whole(500, most=100_000_000, unit="steps"))
    batch_size: int = setting(whole(16, 1, 65_536, "utterances"))
    batch_seconds: float = setting(
        real(0.0, most=1e6, unit="seconds"),
        "audio in a batch; above 0 it replaces batch_size",
    )
    optimizer: str = setting(choice("adamw", values.optimizers))
    options: Mapping[str, Any] = setting(
        checked(dict, values.check_options, "options"),
        "optax's own for this optimiser, such as eps; set in a file, as those of the server",
    )
    learning_rate: float = setting(real(1e-3, most=_MOST_RATE))
    decay_start: int = setting(
        whole(0, unit="steps"),
        "at the constant rate; the first decay is then, the others every decay_steps; 0: it is "
        "after decay_steps, too",
    )
    decay_steps: int = setting(
        whole(0, unit="steps"), "every so many times decay_rate; 0: constant"
    )
    decay_rate: float = setting(real(0.5, above=0, most=1))
    decay_smooth: bool = setting(
        flag(False), "from decay_start on a little in every step, decay_rate in decay_steps of them"
    )
    decay_linear: bool = setting(
        flag(False), "from decay_start on linearly, to 0 after decay_steps of them"
    )
    grad_clip: float = setting(real(1.0, above=0, most=1e12))


@dataclasses.dataclass(frozen=True)
class SeedTraining(Central):
    """Central training before the federated rounds, on its own split."""

    steps: int = setting(whole(0, most=100_000_000, unit="steps"), "0: none")
    split: str = setting(checked("seed", values.check_split, "split"))
    reuse: bool = setting(
        flag(False),
        "keep the seed in .seeds beside the work directory, and take the one there if all that "
        "makes it is the same",
    )


@dataclasses.dataclass(frozen=True)
class Client:
    """What a client does in a round."""

    optimizer: str = setting(choice("sgd", values.optimizers))
    learning_rate: float = setting(real(0.3, most=_MOST_RATE))
    decay_start: int = setting(whole(NEVER, unit="rounds"), "at the constant rate, then")
    decay_rounds: int = setting(whole(500, 1, unit="rounds"), "times decay_rate every so many")
    decay_rate: float = setting(real(0.6, above=0, most=1))
    batch_size: int = setting(whole(4, 1, 65_536, "utterances"))
    batch_seconds: float = setting(
        real(0.0, most=1e6, unit="seconds"),
        "audio in a batch; above 0 it replaces batch_size",
    )
    steps: int = setting(whole(4, most=1_000_000, unit="steps"), "0: use epochs")
    epochs: int = setting(whole(0, most=1_000_000, unit="passes"), "0: use steps")
    max_steps: int = setting(whole(0, unit="steps"), "with epochs, at most so many; 0: no limit")
    batch_buffer: int = setting(
        whole(0, most=1_000_000, unit="utterances"),
        "with batch_seconds; above 0 so many utterances at a time are put in the order of their "
        "lengths before batches are cut, and batch_seconds bounds the padded audio, as published",
    )
    micro_batch: int = setting(
        whole(0, most=65_536, unit="utterances"),
        "utterances computed together; above 0 a batch's gradient is summed over parts of at most "
        "so many utterances of like length. Their shapes are compiled into one program for each "
        "doubling of the users' longest utterances; with data.buckets=4 they are 15",
    )
    grad_clip: float = setting(real(1.0, above=0, most=1e12))
    proximal: float = setting(real(0.0), "FedProx's mu")
    weighting: str = setting(
        choice("uniform", ("uniform", "examples")), 'or "examples", without privacy only'
    )


@dataclasses.dataclass(frozen=True)
class Compression:
    """Online model compression: float formats such as "S1E3M7" or "bfloat16"; "": float32."""

    download: str = setting(
        checked("", values.check_format, "float format"), "of what clients receive and keep"
    )
    upload: str = setting(checked("", values.check_format, "float format"), "of their updates")
    share: float = setting(
        real(0.9, most=1), "of the weight matrices, drawn by every client and round"
    )
    align: bool = setting(flag(True), "scale variables to the format's range; False: the paper's")
    measure: bool = setting(
        flag(False),
        "measure a client's peak memory on its compiled program (for FedSGD; takes a while)",
    )


@dataclasses.dataclass(frozen=True)
class Partial:
    """Partial model training.

    Of "all" variables, or a subset that is "fixed" by patterns, or drawn for every "round" (one of
    so many groups) or for every "user" (a share).
    """

    mode: str = setting(choice("all", ("all", "fixed", "round", "user")))
    patterns: tuple[str, ...] = setting(
        several((".",), values.check_pattern, 1, "regular expressions"), "searched for in paths"
    )
    groups: int = setting(whole(10, 1, 1_000_000))
    share: float = setting(real(0.1, above=0, most=1))


@dataclasses.dataclass(frozen=True)
class Peft:
    """Adapting a model: what is trained of it, and what is added for that."""

    kind: str = setting(
        choice("full", values.adaptations),
        'everything; or "head", "bitfit", "lora", "ffa_lora", "adapter" (see '
        "`fedasr.models.peft`), in place of `partial`",
    )
    rank: int = setting(whole(8, 1, 65_536), "of LoRA's factors")
    alpha: float = setting(real(16.0, above=0, most=1e6), "their product counts alpha/rank times")
    patterns: tuple[str, ...] = setting(
        several((), values.check_pattern, what="regular expressions"),
        "searched for in paths: matrices that get factors, blocks that get adapters, or what the "
        "head is; (): the kind's own",
    )
    bottleneck: int = setting(whole(32, 1, 65_536, "units"), "of an adapter")
    also: tuple[str, ...] = setting(
        several((), values.check_pattern, what="regular expressions"),
        "variables trained beside, such as a new head",
    )
    frozen_dtype: str = setting(
        choice("float32", values.frozen_dtypes), 'of the matrices that are not trained; "bfloat16"'
    )


@dataclasses.dataclass(frozen=True)
class Local:
    """Local parameters (federated only).

    Variables that belong to each user, are trained with the rest, and are never sent, summed or
    covered by the privacy.
    """

    patterns: tuple[str, ...] = setting(
        several((), values.check_pattern, what="regular expressions"),
        'searched for in paths: ("^input_layer/",)',
    )
    prototype: str = setting(
        choice("init", values.prototypes),
        'what a new user starts from: "init", the model\'s; without privacy also the "mean" of '
        "the other users', or that of the \"last\" user before in the corpus's order",
    )


@dataclasses.dataclass(frozen=True)
class Participation:
    """Simulated devices, and who of the users drawn gets an update back (federated only).

    The server divides by the expected cohort whoever is missing; epsilon stays that of the users
    drawn.
    """

    enabled: bool = setting(flag(False), "False: everybody drawn takes part, at once")
    trace: str = setting(
        checked("", values.check_place, "path"),
        "CSV file of the users' devices: user, seconds_per_step, and if wanted transfer_seconds, "
        'from_hour, to_hour; "": drawn, by the next three',
    )
    seconds_per_step: float = setting(real(1.0, most=1e6, unit="seconds"), "in the median")
    transfer_seconds: float = setting(
        real(0.0, most=1e6, unit="seconds"), "of down- and upload together, in the median"
    )
    spread: float = setting(
        real(0.0, most=10), "standard deviation of the logarithm of devices' speeds"
    )
    jitter: float = setting(real(0.0, most=10), "likewise of a round's, beside the device's own")
    available: float = setting(real(1.0, most=1), "mean chance that a device is there")
    diurnal: float = setting(real(0.0, most=1), "amplitude of that chance over the day")
    round_hours: float = setting(real(0.1, most=1e6, unit="hours"), "for a round's time of day")
    dropout_before: float = setting(real(0.0, most=1), "chance to drop out before training")
    dropout_after: float = setting(real(0.0, most=1), "and after it, before the update arrives")
    deadline: float = setting(
        real(0.0, most=1e9, unit="seconds"), "the server waits no longer; 0: until all are there"
    )
    first: int = setting(
        whole(0, unit="users"),
        "so many updates end a round (over-selection: cohort asks more); 0: all. Without privacy "
        "only",
    )
    concurrency: int = setting(
        whole(0, unit="users"), 'who train at a time, with algorithm="fedbuff"; 0: cohort'
    )


@dataclasses.dataclass(frozen=True)
class Server:
    """What the server does with the mean client update."""

    optimizer: str = setting(choice("lamb", values.optimizers))
    options: Mapping[str, Any] = setting(
        checked(dict, values.check_options, "options"),
        "optax's own for this optimiser, such as b1; set in a file, there is nothing to override "
        "here",
    )
    learning_rate: float = setting(real(0.01, most=_MOST_RATE))
    decay_start: int = setting(whole(NEVER, unit="rounds"), "at the constant rate, then")
    decay_rounds: int = setting(whole(500, 1, unit="rounds"), "times decay_rate every so many")
    decay_rate: float = setting(real(0.6, above=0, most=1))


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Bounds that follow a quantile of the update norms."""

    enabled: bool = setting(flag(False))
    quantile: float = setting(real(0.5, above=0, below=1))
    rate: float = setting(real(0.2, above=0, most=10))
    warmup: int = setting(
        whole(0, unit="rounds"), "rounds at first that move the bounds alone, and fast"
    )
    warmup_rate: float = setting(real(4.0, above=0, most=10))
    sigma: float = setting(
        real(0.1),
        "noise on the mean of the users' votes over what one user changes in their sum",
    )


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The mechanism, and what is claimed of it.

    `sigma` and `clip_norm` are as in arXiv 2310.00098: noise of std clip_norm * sigma on the mean
    client update.
    """

    enabled: bool = setting(flag(True), "False: no clipping of client updates, no noise")
    clip_norm: float = setting(real(0.01, above=0, most=1e9))
    budget: str = setting(
        choice("uniform", ("uniform", "dim", "global")),
        'per layer: "uniform" or "dim"; or one "global" clip',
    )
    normalise: bool = setting(
        flag(False), "False: clip; True: rescale every layer as the paper's public code does"
    )
    sigma: float = setting(real(1e-5))
    sampler: str = setting(
        choice("poisson", ("poisson", "fixed", "shuffled", "everyone", "asynchronous")),
        '"fixed": so many without replacement; "shuffled": in turn; "everyone": cohort=0; '
        '"asynchronous": as they are done, with algorithm="fedbuff"',
    )
    slots: int = setting(
        whole(0, unit="users"),
        "largest Poisson cohort; 0: so many that a round is hardly ever full",
    )
    cycle: int = setting(whole(1, 1), "groups of users that Poisson sampling takes in turn")
    noise: str = setting(
        choice("independent", ("independent", "banded", "buffered", "skellam")),
        '"independent" from round to round, or correlated: "banded" or "buffered" (linear '
        'Toeplitz); or "skellam": integers, in shares that clients add themselves, for secure '
        "aggregation",
    )
    bits: int = setting(
        whole(16, *_BITS, "bits"), 'of a coordinate that a client sends, with "skellam"'
    )
    noise_seed: str = setting(
        choice("run", ("run", "secret")),
        '"run": all that is random follows from the run, and whoever has its configuration, data '
        'and start can compute the noise; "secret": from the operating system, kept in '
        "checkpoints alone",
    )
    bands: int = setting(
        whole(0, most=10_000, unit="rounds"),
        "0: as many as rounds lie between a user's turns, at most 32",
    )
    buffers: int = setting(whole(2, 1, 10))
    adaptive: Adaptive = section(Adaptive)
    delta: float = setting(real(1e-9, above=0, below=1))
    deployments: tuple[tuple[float, int], ...] = setting(
        several(((1024, 1_000_000),), values.check_deployment, what="pairs"),
        "deployments that the run stands for: (cohort, population) with the same sigma",
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When and on what error rates are measured."""

    every: int = setting(whole(10, unit="rounds"), "0: only before and after")
    every_steps: int = setting(
        whole(100, unit="steps"), "of the central baseline; 0: only before and after"
    )
    batch_size: int = setting(whole(32, 1, 65_536, "utterances"))
    while_training: tuple[str, ...] = setting(several(("dev",), values.check_split, what="splits"))
    published: bool = setting(
        flag(False),
        "also report wer_published, the rate as arXiv 2310.00098 computes it: of utterances up to "
        "30 s, each one's own rate weighted by its words and two more",
    )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are found in the scores, while training and by `fedasr evaluate`."""

    name: str = setting(
        choice("greedy", values.decoders),
        'each frame\'s likeliest token; or "beam", with a language model, or "lexicon", words of '
        "a list alone",
    )
    lm: str = setting(
        checked("", values.check_place, "path"),
        'ARPA file of words (KenLM); or made from transcripts: "from_train", "from_seed", or of '
        'any split; "": none',
    )
    lexicon: str = setting(
        checked("", values.check_place, "path"),
        'file, a word a line; or "from_train" and so on; "": the language model\'s words',
    )
    order: int = setting(whole(3, 1, 10, "words"), "of a language model that is made")
    beam: int = setting(whole(32, 1, 100_000, "hypotheses"), "kept after each frame")
    lm_weight: float = setting(real(1.0, most=1000), "times the words' log probability")
    word_bonus: float = setting(real(0.0, -1000, 1000, unit="nats"), "for every word")
    unknown_penalty: float = setting(
        real(6.0, unit="nats"), 'taken by "beam" for every word that the lexicon lacks'
    )
    blank_penalty: float = setting(
        real(0.0, most=1000, unit="nats"), "taken by a search from the blank in every frame"
    )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which state of the main training is kept and reported, and when there will be no better."""

    split: str = setting(
        checked("", values.check_optional_split, "split"),
        'the state with the lowest word error rate on it, of those evaluated; "": the last',
    )
    patience: int = setting(
        whole(0, unit="evaluations"), "training ends after so many without a lower one; 0: never"
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How often a run is saved."""

    every: int = setting(whole(10, 1, unit="rounds"))
    every_seconds: float = setting(
        real(0.0, most=1e7, unit="seconds"),
        "above 0: also after a round or step by which the last checkpoint is so old, unless it is "
        "still being written; no round waits for these",
    )
    deadline: float = setting(
        real(30.0, most=1e7, unit="seconds"),
        "that the machine gives a process between SIGTERM and its end, as spot machines do: where "
        "a round and a checkpoint take longer, the run says so; 0: it does not matter",
    )
    seed_every: int = setting(whole(100, unit="steps"), "of central training")
    keep: int = setting(whole(2, 1, 100_000))
