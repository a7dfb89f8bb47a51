"""The published comparisons of arXiv 2310.00098, small: spoken digits on two CPU cores in minutes.

    fedasr sweep --table=mini_optimizers --jobs=2

A 0.17M-parameter Transformer on the synthetic corpus. Every row of a table chooses its learning
rate from the same grid, on the dev split and the first seed.
"""

import dataclasses
import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from fedasr.recipes.shared import SERVER_OPTIONS, choose, parameter_count, parse
from fedasr.recipes.tables import Row, Table
from fedasr.training.config import default_config

_PARAMETERS = 172_704
# The noise's norm relative to the clip norm is sigma * sqrt(parameters): with this factor ours is
# that of the published 255M-parameter model.
SIGMA_SCALE = math.sqrt(parameter_count("base") / _PARAMETERS)
_FILE = "mini"
_ADAGRAD: dict[str, dict[str, float]] = {"optax": {}, "published": SERVER_OPTIONS["adagrad"]}


def get_config(arguments: str = "") -> ConfigDict:
    """Without privacy, 60 rounds of 8 users from scratch; the tables change what they compare."""
    args = parse(arguments, {"adagrad": "optax"})
    config = default_config()
    config.name = "mini"
    config.server.options = choose(args, "adagrad", _ADAGRAD)
    config.rounds = 60
    config.cohort = 8
    config.model.options.update({"dim": 64, "mlp": 256, "blocks": 2})
    config.client.learning_rate = 0.3
    config.server.learning_rate = 0.02
    config.central.steps = 250
    config.privacy.enabled = False
    config.privacy.clip_norm = 0.01
    config.privacy.sampler = "poisson"
    config.evaluation.every = 0
    config.checkpoint.every = 1000
    config.checkpoint.seed_every = 1000
    return config


_RATES = {"server.learning_rate": (0.003, 0.01, 0.03)}
_TWO_RATES = {"server.learning_rate": (0.01, 0.03)}
_SEEDS = (0, 1, 2)
_START = Row("seed model", {"algorithm": "central", "data.train": "seed"})


def _optimizers() -> Table:
    published: dict[str, tuple[float | None, float]]
    published = {"LAMB": (6.6, 62.9), "LARS": (13.7, 70.4), "Adam": (14.1, 68.9)}
    published |= {"AdaGrad": (None, 84.3), "SGD": (None, 83.8)}
    return Table(
        name="mini_optimizers",
        title="Server optimisers from scratch (published: Common Voice, 8 users a round, dev)",
        config=_FILE,
        rows=tuple(
            Row(
                name,
                {"server.optimizer": name.lower()},
                {"dev": cv},
                arguments="adagrad=published" if name == "AdaGrad" else "",
            )
            for name, (_, cv) in published.items()
        ),
        # Half decades from LAMB's published rate past federated averaging's 1 to where LARS, whose
        # steps are a thousandth of a parameter's norm in optax, has its best.
        grid={"server.learning_rate": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)},
        seeds=_SEEDS,
        expected="LAMB < Adam < LARS < SGD < AdaGrad on Common Voice (on LibriSpeech LARS < Adam)",
        better=(
            ("LAMB", "Adam"),
            ("LAMB", "LARS"),
            ("Adam", "LARS"),
            ("Adam", "SGD"),
            ("LARS", "SGD"),
            ("LAMB", "AdaGrad"),
            ("SGD", "AdaGrad"),
        ),
    )


def _cohorts() -> Table:
    none = {8: 66.7, 16: 56.5, 32: 46.3}
    seed = {8: 28.8, 16: 26.3, 32: 23.9}
    rows = []
    sizes = {"no seed": (8,), "seed": (4, 8, 16, 32)}
    for series, start, figures in (("no seed", "", none), ("seed", "seed model", seed)):
        for cohort in sizes[series]:
            rows.append(
                Row(
                    f"{series}, cohort {cohort}",
                    {"cohort": cohort, "rounds": 40},
                    {"test": figures[cohort]} if cohort in figures else {},
                    start=start,
                    series=series,
                    x=cohort,
                )
            )
    pairs = [(f"seed, cohort {b}", f"seed, cohort {a}") for a, b in ((4, 8), (8, 16), (16, 32))]
    pairs += [("seed, cohort 32", "seed, cohort 4"), ("seed, cohort 8", "no seed, cohort 8")]
    return Table(
        name="mini_cohorts",
        title="Seed and cohort size (published: Common Voice, LibriSpeech-100 seed, test)",
        config=_FILE,
        rows=tuple(rows),
        grid=_TWO_RATES,
        seeds=_SEEDS,
        starts=(_START,),
        expected="a larger cohort is better; a seed is better",
        better=tuple(pairs),
        x_label="users a round",
        log_x=True,
    )


def _privacy() -> Table:
    published: dict[int, dict[str, float | None]] = {
        3: {"global": 31.1, "uniform": 21.2, "dim": 20.4},
        10: {"global": 35.2, "uniform": 25.0, "dim": 23.7},
        30: {"global": None, "uniform": 29.3, "dim": 28.2},
        # Not published: where noise is felt beside the differences between 8 users a round.
        100: {"global": None, "uniform": None, "dim": None},
        300: {"global": None, "uniform": None, "dim": None},
    }
    rows = []
    for sigma, figures in published.items():
        for budget, figure in figures.items():
            rows.append(
                Row(
                    f"{budget}, sigma {sigma}e-6",
                    {
                        "privacy.enabled": True,
                        "privacy.budget": budget,
                        "privacy.sigma": round(sigma * 1e-6 * SIGMA_SCALE, 7),
                        "rounds": 40,
                    },
                    {} if figure is None else {"test": figure},
                    start="seed model",
                    series=budget,
                    x=sigma * 1e-6,
                )
            )
    pairs = []
    for sigma in published:
        pairs += [
            (f"uniform, sigma {sigma}e-6", f"global, sigma {sigma}e-6"),
            (f"dim, sigma {sigma}e-6", f"uniform, sigma {sigma}e-6"),
        ]
    for budget in ("global", "uniform", "dim"):
        pairs += [
            (f"{budget}, sigma {a}e-6", f"{budget}, sigma {b}e-6")
            for a, b in itertools.pairwise(published)
        ]
    return Table(
        name="mini_privacy",
        title="Clipping and noise (published: Common Voice, LibriSpeech-100 seed, test; sigma is "
        "of the 255M-parameter model, ours has the same noise norm over clip norm)",
        config=_FILE,
        rows=tuple(rows),
        grid=_RATES,
        seeds=_SEEDS,
        starts=(_START,),
        expected="dim < uniform < global at every noise level; less noise is better",
        better=tuple(pairs),
        x_label="sigma of the published model with the same noise-to-clip ratio",
        log_x=True,
    )


def _variations() -> Table:
    return Table(
        name="mini_variations",
        title="IID users, FedProx, SpecAugment, from scratch; without SpecAugment but for its row "
        "(published: LibriSpeech, 8 users a round, test-other)",
        config=_FILE,
        rows=(
            Row("users", {}, {"test": 17.5}),
            Row("IID", {"data.iid": True}, {"test": 14.0}),
            Row("FedProx 0.01", {"client.proximal": 0.01}),
            Row("FedProx 0.1", {"client.proximal": 0.1}),
            Row("SpecAugment", {"augment.enabled": True}),
        ),
        grid=_TWO_RATES,
        seeds=_SEEDS,
        expected="IID is better than users in small cohorts; FedProx gains marginally in 8 of 10 "
        "settings; SpecAugment helps LibriSpeech and hurts Common Voice",
        better=(
            ("IID", "users"),
            ("FedProx 0.01", "users"),
            ("FedProx 0.1", "users"),
        ),
    )


def _correlated() -> Table:
    """Equal sigma is equal epsilon: bands within the users' separation change no sensitivity."""
    private = {
        "privacy.enabled": True,
        "privacy.sampler": "shuffled",
        "privacy.sigma": round(300e-6 * SIGMA_SCALE, 7),
        "rounds": 200,
    }
    kinds: dict[str, dict[str, Any]] = {
        "independent": {"privacy.noise": "independent"},
        "banded": {"privacy.noise": "banded", "privacy.bands": 8},
    }
    return Table(
        name="mini_correlated",
        title="Noise correlated over rounds, users in turn 8 rounds apart, 200 rounds from a seed",
        config=_FILE,
        rows=tuple(Row(name, private | kind, start="seed model") for name, kind in kinds.items()),
        grid=_RATES,
        seeds=(0, 1, 2, 3, 4),
        starts=(_START,),
        expected="banded noise is at least as good as independent noise of the same epsilon",
        better=(("banded", "independent"),),
    )


def _adaptive() -> Table:
    private = {
        "privacy.enabled": True,
        "privacy.budget": "global",
        "privacy.sigma": round(30e-6 * SIGMA_SCALE, 7),
        "server.learning_rate": 0.03,
        "rounds": 100,
        # At a constant rate the last round's error is a matter of luck, by several points.
        "server.decay_start": 60,
        "server.decay_rounds": 10,
    }
    adaptive = private | {
        "privacy.adaptive.enabled": True,
        "privacy.adaptive.quantile": 0.25,
        "privacy.adaptive.rate": 0.5,
        "privacy.adaptive.warmup": 4,
    }
    return Table(
        name="mini_adaptive",
        title="Adaptive against fixed clipping, from scratch",
        config=_FILE,
        rows=(
            Row("fixed, tuned", private, grid={"privacy.clip_norm": (0.03, 0.1, 0.3, 1.0, 3.0)}),
            Row("adaptive from 30", adaptive | {"privacy.clip_norm": 30.0}),
            Row("adaptive from 0.003", adaptive | {"privacy.clip_norm": 0.003}),
        ),
        seeds=_SEEDS,
        expected="wherever it begins, the adaptive bound does as well as the tuned one",
    )


def _devices() -> Table:
    """What compression and partial training cost: a model of 0.4M parameters, adapted to users.

    The server trains on four users in ten, rounds are on the others. Partial training is of
    attention and the small variables, 27% of the model, for twice the rounds, at its own rate.
    """
    model = {
        "model.options.dim": 96,
        "model.options.mlp": 384,
        "model.options.blocks": 3,
        "evaluation.every": 0,
    }
    base = model | {
        "data.train": "train[40%:]",
        "privacy.enabled": False,
        "seed_training.steps": 0,
        "rounds": 100,
        "server.learning_rate": 0.01,
        "server.decay_start": 50,
        "server.decay_rounds": 12,
    }
    compressed = {"compression.download": "S1E3M7", "compression.upload": "S1E3M7"}
    half = {name: "bfloat16" for name in compressed} | {"compression.share": 1.0}
    partial = {
        "partial.mode": "fixed",
        "partial.patterns": ("attention/", "norm", "output", "front_end/bias"),
        "rounds": 200,
        "server.learning_rate": 0.02,
        "server.decay_start": 100,
        "server.decay_rounds": 24,
    }
    rows: dict[str, dict[str, Any]] = {
        "FedAvg": {},
        "16-bit storage": half,
        "OMC S1E3M7 on 90%": compressed,
        "27% trained": partial,
        "all together": compressed | partial,
    }
    start = model | {
        "algorithm": "central",
        "data.train": "train[:40%]",
        "seed_training.steps": 0,
        "central.steps": 500,
        "central.decay_steps": 250,
    }
    return Table(
        name="mini_devices",
        title="What saves memory and transport, without privacy, from a model of other users",
        config="quickstart",
        rows=tuple(Row(name, base | row, start="seed model") for name, row in rows.items()),
        seeds=_SEEDS,
        starts=(Row("seed model", start),),
        expected="nothing is lost by compression, and little by partial training",
        better=tuple((name, "FedAvg") for name in list(rows)[1:]),
    )


def _central() -> Table:
    """On the quickstart's configuration and size: as many utterances as the federated rounds."""
    central = {"algorithm": "central", "central.steps": 960, "central.decay_steps": 400}
    rates = {"central.learning_rate": (3e-4, 1e-3, 3e-3)}
    return Table(
        name="mini_central",
        title="Federated without privacy against tuned central training on the same users' data",
        config="quickstart",
        rows=(
            Row("federated", {"privacy.enabled": False}),
            Row("central", central, grid=rates),
        ),
        seeds=_SEEDS,
        expected="federated training is within 2 points of central training",
        better=(("central", "federated"),),
    )


_KNOWN = "train[:16][75%:]"  # a quarter of the utterances of the users who train on the rest


def _local() -> Table:
    """Few users, so that each has some thirty turns; the seed has the input layer, too."""
    layer: dict[str, Any] = {"model.options.input_layer": True}
    base = layer | {"data.train": "train[:16][:75%]", "data.eval": (_KNOWN, "dev", "test")}
    base |= {"rounds": 60}
    local = {"local.patterns": ("^input_layer/",)}
    return Table(
        name="mini_local",
        title="An input layer for each user or one for all: users who train, unseen utterances",
        config=_FILE,
        rows=(
            Row("shared input layer", base, start="seed model"),
            Row("local input layers", base | local, start="seed model"),
        ),
        seeds=_SEEDS,
        report=("dev", "test", _KNOWN),
        starts=(dataclasses.replace(_START, overrides={**_START.overrides, **layer}),),
        expected="users who train gain from layers of their own",
        better=(("local input layers", "shared input layer"),),
    )


def _peft() -> Table:
    """Equal sigma is equal epsilon, whatever is trained; the noise in all grows with its size.

    The seed is of four users in ten, rounds are on the others: each has an accent and a voice of
    its own. At this sigma the norm of the noise on the mean is twelve times the bound where all is
    trained. (The corpus's own seed has voices so unlike these that nothing is left to adapt.)
    """
    private = {
        "data.train": "train[40%:]",
        "privacy.enabled": True,
        "privacy.sigma": round(800e-6 * SIGMA_SCALE, 7),
        "server.optimizer": "adam",
        "rounds": 40,
    }
    kinds: dict[str, dict[str, Any]] = {
        "full": {"peft.kind": "full"},
        "head": {"peft.kind": "head"},
        "BitFit": {"peft.kind": "bitfit"},
        "LoRA": {"peft.kind": "lora", "peft.rank": 4},
        "FFA-LoRA": {"peft.kind": "ffa_lora", "peft.rank": 4},
    }
    start = {
        "algorithm": "central",
        "data.train": "train[:40%]",
        "central.steps": 600,
        "central.decay_steps": 250,
    }
    return Table(
        name="mini_peft",
        title="Adapting a model to other users, a part of it or all, at equal epsilon",
        config=_FILE,
        rows=tuple(Row(name, private | kind, start="seed model") for name, kind in kinds.items()),
        grid={"server.learning_rate": (0.001, 0.003, 0.01)},
        seeds=_SEEDS,
        starts=(Row("seed model", start),),
        expected="at equal epsilon LoRA and FFA-LoRA are no worse than all, FFA-LoRA than LoRA",
        better=(("LoRA", "full"), ("FFA-LoRA", "full"), ("FFA-LoRA", "LoRA"), ("full", "head")),
    )


TABLES = {
    table.name: table
    for table in (
        _optimizers(),
        _cohorts(),
        _privacy(),
        _variations(),
        _correlated(),
        _adaptive(),
        _devices(),
        _central(),
        _local(),
        _peft(),
    )
}
