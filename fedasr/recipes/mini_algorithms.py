"""Federated algorithms compared, small: spoken digits on two CPU cores.

    fedasr sweep --table=mini_algorithms --jobs=2

Every row may choose from six configurations, by the dev split and the first seed, so that none is
tuned more than another: six learning rates of the server, or three and two values of the
algorithm's own option. Users differ as they are, in the words they say, or in how much they say.
"""

import itertools
from typing import Any

from ml_collections import ConfigDict

from fedasr.recipes import mini
from fedasr.recipes.shared import choose, parse
from fedasr.recipes.tables import Row, Table

_FILE = "mini_algorithms"
_SEEDS = (0, 1, 2)
# Options that the tables, or flags, may set: they have to be there to be overridden.
_OPTIONS: dict[str, dict[str, float]] = {
    "federated": {},
    "ditto": {"attraction": 0.1},
    "fedbuff": {"versions": 16.0, "power": 0.5},
    "feddyn": {"alpha": 0.1},
    "fedexp": {"eps": 1e-3},
    "fednova": {"steps": 0.0},
    "fedrep": {},
    "fomaml": {},
    "mime": {"momentum": 0.9},
    "mimelite": {"momentum": 0.9},
    "pfedme": {"attraction": 1.0, "rate": 1.0},
    "reptile": {"anneal": 0.0},
    "scaffold": {"unit": 1.0},
}


def get_config(arguments: str = "") -> ConfigDict:
    """As `mini`, a pass over each user's speech a round, by `algorithm=NAME` with its options."""
    args = parse(arguments, {"algorithm": "federated"})
    config = mini.get_config()
    config.name = _FILE
    config.algorithm = args["algorithm"]
    config.algorithm_options.update(choose(args, "algorithm", _OPTIONS))
    config.rounds = 40
    config.client.steps = 0
    config.client.epochs = 1
    config.client.max_steps = 8
    return config


# Every user is waited for: the clock is told, and changes nothing. Link's seconds are those of the
# numbers sent and received, a model each for most.
_CLOCK: dict[str, Any] = {
    "participation.enabled": True,
    "participation.spread": 1.0,
    "participation.transfer_seconds": 2.0,
    "evaluation.every": 5,
}
_TWICE_SENT = {"participation.transfer_seconds": 4.0}
_SKEWS: dict[str, dict[str, Any]] = {
    "natural": {"data.skew": "words"},
    "words": {"data.skew": "words", "data.skew_alpha": 0.1},
    "quantity": {"data.skew": "voices", "data.skew_alpha": 1.0, "data.quantity_skew": 1.0},
}
_PRIVACY: dict[str, dict[str, Any]] = {
    "no DP": {},
    "DP": {
        "privacy.enabled": True,
        "privacy.budget": "dim",
        "privacy.sigma": round(30e-6 * mini.SIGMA_SCALE, 7),
    },
}
_RATE = "server.learning_rate"
_THREE, _SIX = (0.003, 0.01, 0.03), (0.001, 0.003, 0.01, 0.02, 0.03, 0.1)
# name: (algorithm, own fields, grid)
_ALGORITHMS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "FedAvg": ("federated", {}, {_RATE: _SIX}),
    "FedProx": ("federated", {}, {_RATE: _THREE, "client.proximal": (0.01, 0.1)}),
    "SCAFFOLD": ("scaffold", _TWICE_SENT, {_RATE: _THREE, "algorithm_options.unit": (0.3, 3.0)}),
    "FedNova": ("fednova", {}, {_RATE: _SIX}),
    "FedDyn": ("feddyn", {}, {_RATE: _THREE, "algorithm_options.alpha": (0.01, 0.1)}),
    "MimeLite": (
        "mimelite",
        _TWICE_SENT | {"participation.seconds_per_step": 2.0},  # it goes over the batches twice
        {_RATE: _THREE, "algorithm_options.momentum": (0.5, 0.9)},
    ),
    "FedExP": ("fedexp", {}, {_RATE: _SIX}),
}
_ONLY_WITHOUT = ("FedExP",)  # it is refused with noise
_WITH_NOISE: dict[str, dict[str, Any]] = {"FedNova": {"algorithm_options.steps": 4.0}}


def _algorithms() -> Table:
    rows = []
    for (skew, users), (privacy, noise) in itertools.product(_SKEWS.items(), _PRIVACY.items()):
        for name, (algorithm, own, grid) in _ALGORITHMS.items():
            if noise and name in _ONLY_WITHOUT:
                continue
            more = _WITH_NOISE.get(name, {}) if noise else {}
            if not noise and name == "SCAFFOLD":  # in which units does not matter without clipping
                grid = {_RATE: _SIX}
            rows.append(
                Row(
                    f"{name}, {skew}, {privacy}",
                    {**users, **_CLOCK, **noise, **own, **more},
                    start="seed model",
                    series=name,
                    grid=grid,
                    arguments=f"algorithm={algorithm}",
                )
            )
    names = [row.name for row in rows]
    pairs = [(name, "FedAvg, " + name.split(", ", 1)[1]) for name in names if "FedAvg" not in name]
    return Table(
        name="mini_algorithms",
        title="Federated algorithms under three skews, with and without privacy, from a seed "
        "model, each row's best of six configurations",
        config=_FILE,
        rows=tuple(rows),
        seeds=_SEEDS,
        starts=(_start(),),
        expected="what corrects for drift is better than FedAvg, most where users differ most",
        better=tuple(pairs),
        users=True,
        reach=(50.0, 40.0),
    )


def _start(**more: Any) -> Row:
    """Trained centrally on the seed's users."""
    return Row("seed model", {"algorithm": "central", "data.train": "seed", **more})


# Of the users who train on the rest, an eighth of the utterances to choose by and one to report.
_CHOOSE, _KNOWN = "train[:16][75%:88%]", "train[:16][88%:]"


def _personal() -> Table:
    layer: dict[str, Any] = {"model.options.input_layer": True}
    base = layer | {"data.train": "train[:16][:75%]", "data.eval": (_CHOOSE, _KNOWN, "dev", "test")}
    base |= {"rounds": 60}
    local = {"local.patterns": ("^input_layer/",)}
    own = "algorithm_options.attraction"
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = {
        "shared": ("federated", {}, {_RATE: _SIX}),
        "FedPer, input layer": ("federated", local, {_RATE: _SIX}),
        "FedRep, input layer": ("fedrep", local, {_RATE: _SIX}),
        "Ditto": ("ditto", {}, {_RATE: _THREE, own: (0.03, 0.3)}),
        "pFedMe": ("pfedme", {}, {_RATE: _THREE, own: (0.3, 1.0)}),
    }
    return Table(
        name="mini_personal",
        title="Models of users' own: unseen utterances of users who train, and new users",
        config=_FILE,
        rows=tuple(
            Row(name, base | fields, start="seed model", grid=grid, arguments=f"algorithm={kind}")
            for name, (kind, fields, grid) in kinds.items()
        ),
        seeds=_SEEDS,
        select=_CHOOSE,
        report=("dev", "test", _KNOWN),
        users=True,
        starts=(_start(**layer),),
        expected="known users gain by models of their own, new ones lose nothing",
        better=tuple((name, "shared") for name in kinds if name != "shared"),
    )


def _participation() -> Table:
    devices = {
        "participation.enabled": True,
        "participation.spread": 1.0,
        "participation.transfer_seconds": 2.0,
        "client.steps": 4,
        "client.epochs": 0,
        "client.max_steps": 0,
        "rounds": 80,
        "evaluation.every": 4,
    }
    drop = {"participation.dropout_before": 0.1, "participation.dropout_after": 0.1}
    queue = {"privacy.sampler": "asynchronous", "participation.concurrency": 16}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "all, waited for": ("federated", {}),
        "deadline 8 s": ("federated", {"participation.deadline": 8.0}),
        "deadline 8 s, a fifth drops out": ("federated", {"participation.deadline": 8.0} | drop),
        "12 asked, first 8": ("federated", {"cohort": 12, "participation.first": 8}),
        "FedBuff": ("fedbuff", queue),
        "FedBuff, twice the steps": ("fedbuff", queue | {"rounds": 160}),
    }
    return Table(
        name="mini_participation",
        title="Slow and missing devices: rounds that wait, deadlines, over-selection, buffers",
        config=_FILE,
        rows=tuple(
            Row(name, devices | own, start="seed model", arguments=f"algorithm={kind}")
            for name, (kind, own) in kinds.items()
        ),
        grid={_RATE: _THREE},
        seeds=_SEEDS,
        starts=(_start(),),
        expected="deadlines and buffers cost little accuracy and save most of the simulated time",
        better=(("FedBuff", "deadline 8 s"),),
        reach=(50.0, 40.0),
    )


TABLES = {table.name: table for table in (_algorithms(), _personal(), _participation())}
