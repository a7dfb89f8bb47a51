"""What the published settings share (arXiv 2310.00098): models, arguments, and their meaning.

Figures are the paper's and those of its public programs. Where they give none, the choice is ours
and the comment says so. Each item beside what was published: `fedasr.recipes.fidelity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedasr.errors import UserError
from fedasr.training.config import default_config

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# The widths of "narrow" and "wide" are inferred from their sizes, 114M and 450M parameters.
MODELS: dict[str, dict[str, Any]] = {
    "base": {"dim": 768, "mlp": 3072, "blocks": 36, "layer_drop": 0.3},
    "narrow": {"dim": 512, "mlp": 2048, "blocks": 36, "layer_drop": 0.1},
    "wide": {"dim": 1024, "mlp": 4096, "blocks": 36, "layer_drop": 0.1},
    "shallow": {"dim": 768, "mlp": 3072, "blocks": 16, "layer_drop": 0.1},
    "deep": {"dim": 768, "mlp": 3072, "blocks": 72, "layer_drop": 0.1},
}

# How the authors' programs build and train the model, where ours have another default.
MODEL_AS_PUBLISHED: dict[str, Any] = {
    "heads": 4,
    "dropout": 0.3,
    "cape_shift": 30.0,
    "dtype": "bfloat16",
    "branch_dropout": False,
    "front_end": "same",
    "init": "lecun",
    "layer_drop_per": "batch",
    "stream_dtype": "float32",
}
# In place of these, what accelerators compute, and have compiled, in less time: one block for all,
# dropout by a cheaper generator (as good, other numbers), and sums of blocks in their own dtype.
MODEL_ON_ACCELERATORS: dict[str, Any] = {
    "scan_blocks": True,
    "generator": "hashed",
    "stream_dtype": "",
}


class Baseline(NamedTuple):
    """A central training as published: a seed, or what federated training is compared with.

    rate: of LARS. start: steps at the constant rate, which is then halved and again every `every`
    steps; or, if `smooth`, halved gradually within `every` steps. dtype: of the compute. drop:
    dropout, and of layers; None for the model's. seconds: of audio on each of 8 devices.
    """

    start: int
    rate: float = 0.5
    every: int = 50_000
    smooth: bool = False
    dtype: str = "bfloat16"
    drop: float | None = None
    seconds: float = 240.0


_TENTH = Baseline(100_000, every=25_000, smooth=True, drop=0.4, seconds=216.0)
# By the names of the authors' configurations.
BASELINES = {
    "ls": Baseline(250_000, smooth=True),
    "ls_100": Baseline(330_000),
    "ls_100_to_860": Baseline(150_000),
    "cv_to_ls": Baseline(250_000, smooth=True),
    "cv_en_to_ls": Baseline(100_000),
    "cv_en": Baseline(330_000, dtype="float32"),
    "cv_en_10": _TENTH,
    "cv_en_10_to_90": Baseline(150_000, rate=0.2),
    "ls_100_to_cv": Baseline(40_000),
    "ls_to_cv": Baseline(150_000),
    "cv_fr": Baseline(200_000),
    "cv_fr_10": _TENTH,
    "cv_fr_10_to_90": Baseline(150_000, rate=0.2),
    "cv_de": Baseline(150_000, rate=0.2),
    "cv_de_10": _TENTH,
    "cv_de_10_to_90": Baseline(200_000),
}
# The options of server optimisers as published, where they are not optax's defaults. The authors'
# AdaGrad adds its epsilon, 1e-8, after the division: to what is added before it, 0 comes nearest.
SERVER_OPTIONS: dict[str, dict[str, float]] = {
    "lamb": {"eps": 1e-6},
    "lars": {"eps": 1e-6},
    "adagrad": {"initial_accumulator_value": 0.0, "eps": 0.0},
}
# What every published setting takes, beside its own arguments.
ARGUMENTS: dict[str, Any] = {
    "data": "",  # folder of the prepared corpus
    "init_from": "",  # work directory of the seed's training
    "training": "federated",  # or "central": seeds and baselines
    "baseline": "",  # whose schedule a central training has; "": that of its data
    "seed": "none",
    "cohort": 16,
    "rounds": 0,  # 0: as published
    "model": "base",
    "optimizer": "lamb",
    "server_lr": 0.0,  # 0: as published
    "clipping": "none",  # "global", "uniform", "dim"; "none" is training without privacy
    "sigma": 0.0,
    "normalise": False,
    "fedprox": 0.0,
    "specaugment": True,
    "specaugment_start": 1,  # rounds before it begins
    "iid": False,
    "chunk": 1,
    "max_steps": 0,  # of a client in a round; 0: no limit, as published
    "accelerator": False,  # the model as `MODEL_ON_ACCELERATORS` has it
}


def parse(arguments: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a --config=FILE.py:key=value,key=value, typed like their defaults.

    Raises:
      UserError: an unknown key or a value of another type.
    """
    values = dict(known)
    for part in filter(None, (arguments or "").split(",")):
        key, equals, text = part.partition("=")
        if key not in known or not equals:
            raise UserError(f"--config: no argument {part!r}; it takes {', '.join(sorted(known))}")
        default = known[key]
        try:
            if isinstance(default, bool):
                values[key] = {"true": True, "false": False}[text.lower()]
            else:
                values[key] = type(default)(text)
        except (KeyError, ValueError) as error:
            kind = type(default).__name__
            raise UserError(f"--config: {key}={text!r} is not of type {kind}") from error
    return values


def choose(arguments: Mapping[str, Any], key: str, options: Mapping[str, Any]) -> Any:
    """options[arguments[key]], or a UserError that lists the options."""
    if arguments[key] not in options:
        raise UserError(f"--config: {key}={arguments[key]!r}: choose one of {', '.join(options)}")
    return options[arguments[key]]


def base_config(
    name: str, arguments: Mapping[str, Any], batch_seconds: float, baseline: str
) -> ConfigDict:
    """The paper's model, augmentation, client and central settings.

    Args:
      name: of the run.
      arguments: see `ARGUMENTS`.
      batch_seconds: audio in a client's batch.
      baseline: of `BASELINES`, for central training where the arguments name none.
    """
    config = default_config()
    config.name = name
    config.rounds = arguments["rounds"] or 2000
    config.cohort = arguments["cohort"]
    config.chunk = arguments["chunk"]
    config.algorithm = choose(
        arguments, "training", {"federated": "federated", "central": "central"}
    )
    config.init_from = arguments["init_from"]
    config.data.iid = arguments["iid"]
    config.data.buckets = 4  # ours

    config.model.options.update(choose(arguments, "model", MODELS))
    config.model.options.update(MODEL_AS_PUBLISHED)
    if arguments["accelerator"]:
        config.model.options.update(MODEL_ON_ACCELERATORS)
    config.augment.enabled = arguments["specaugment"]
    config.augment.start_round = arguments["specaugment_start"] if arguments["specaugment"] else 0
    config.augment.options.inclusive = False

    config.client.batch_seconds = batch_seconds
    config.client.batch_buffer = 64
    config.client.micro_batch = 2 if arguments["chunk"] == 1 else 0  # ours
    config.client.steps, config.client.epochs = 0, 10
    config.client.max_steps = arguments["max_steps"]
    config.client.proximal = arguments["fedprox"]
    config.server.optimizer = arguments["optimizer"]
    config.server.options = SERVER_OPTIONS.get(arguments["optimizer"], {})

    if arguments["baseline"]:
        baseline = arguments["baseline"]
    set_baseline(config, choose({"baseline": baseline}, "baseline", BASELINES))
    config.evaluation.published = True
    config.evaluation.every = 100  # ours
    config.checkpoint.every = 50  # ours
    config.checkpoint.seed_every = 1000  # ours

    private = arguments["clipping"] != "none"
    if config.algorithm != "central":
        _refuse(arguments, ("baseline",), "training=federated")
    else:
        unused = ("cohort", "rounds", "optimizer", "server_lr", "clipping", "fedprox", "iid")
        _refuse(arguments, unused, "training=central")
    if not private:
        _refuse(arguments, ("sigma", "normalise"), "clipping=none")
    if not arguments["specaugment"]:
        _refuse(arguments, ("specaugment_start",), "specaugment=false")
    config.privacy.enabled = private
    # The paper draws a fixed number of users, and accounts as if it were Poisson; we do what we
    # account for. Without noise there is nothing to account for.
    config.privacy.sampler = "poisson" if private and arguments["sigma"] else "fixed"
    if private:
        budgets = {"global": "global", "uniform": "uniform", "dim": "dim"}
        config.privacy.budget = choose(arguments, "clipping", budgets)
        config.privacy.normalise = arguments["normalise"]
        config.privacy.clip_norm = 0.01
        config.privacy.sigma = arguments["sigma"]
        config.client.steps, config.client.epochs, config.client.max_steps = 10, 0, 0
    return config


def set_baseline(config: ConfigDict, baseline: Baseline) -> None:
    """The central section as a baseline has it and, of a central training, what its model drops."""
    central = config.central
    central.optimizer, central.options = "lars", {"eps": 1e-8}
    central.learning_rate, central.batch_seconds = baseline.rate, 8 * baseline.seconds
    central.decay_start, central.decay_steps = baseline.start, baseline.every
    central.decay_rate, central.decay_smooth = 0.5, baseline.smooth
    # Published: 300,000 to 600,000, not which has how many; ours: about four halvings.
    central.steps = min(max(baseline.start + 200_000, 300_000), 600_000)
    if config.algorithm == "central":
        config.model.options.dtype = baseline.dtype
        if baseline.drop is not None:
            config.model.options.update({"dropout": baseline.drop, "layer_drop": baseline.drop})


def clip_without_noise(config: ConfigDict) -> None:
    """Large cohorts as published: 10 local steps, and updates clipped to .01, but no noise."""
    config.privacy.enabled, config.privacy.budget = True, "global"
    config.privacy.clip_norm, config.privacy.sigma = 0.01, 0.0
    config.privacy.deployments = ()
    config.client.steps, config.client.epochs, config.client.max_steps = 10, 0, 0


def _refuse(arguments: Mapping[str, Any], keys: Sequence[str], why: str) -> None:
    """Raises UserError for an argument that would be ignored."""
    for key in keys:
        if arguments[key] != ARGUMENTS[key]:
            raise UserError(f"--config: {key}={arguments[key]} has no meaning with {why}")


def set_rates(
    config: ConfigDict, client: float, server: float, decay_start: int, decay_rounds: int
) -> None:
    """Learning rates and the server's schedule, constant and then times 0.6 every decay_rounds."""
    config.client.learning_rate = client
    config.server.learning_rate = server
    config.server.decay_start = decay_start
    config.server.decay_rounds = decay_rounds
    config.server.decay_rate = 0.6


def parameter_count(model: str) -> int:
    """The parameters of a published model by the formula of its layers (vocabulary 30).

    Front end 7 x 80 -> 2d with bias; blocks of 12 d^2 + 4d (attention 4 d^2, MLP 2 x 4 d^2, two
    layer norms); final norm 2d; output 30 x d with bias; the input norm's 2.
    """
    d, blocks = MODELS[model]["dim"], MODELS[model]["blocks"]
    front = 7 * 80 * 2 * d + 2 * d
    return front + blocks * (12 * d * d + 4 * d) + 2 * d + 30 * d + 30 + 2
