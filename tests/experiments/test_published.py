"""Every published row, built and held against a table of facts typed in by hand."""

import functools
import importlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.privacy import accounting
from fedasr.recipes import adapted, mini, own_speech, published, shared
from fedasr.training import loop
from fedasr.training.builders import models
from fedasr.training.config import Config
from fedasr.training.logging import to_json

ROWS = [(table, row) for table in published.TABLES.values() for row in table.rows + table.starts]

# (client rate, server rate, t0, tau, seconds of audio in a client's batch)
RATES = {
    ("librispeech", "none"): (0.4, 0.006, 1000, 500, 360),
    ("librispeech", "seed"): (0.2, 0.003, 1000, 250, 360),
    ("common_voice", "none"): (0.4, 0.006, 1000, 500, 120),
    ("common_voice", "seed"): (0.2, 0.002, 750, 750, 120),
}
USERS = {
    "ls100": 251,
    "ls860": 2087,
    "ls960": 2338,
    ("en", "train"): 34753,
    ("en", "train[:10%]"): 3475,
    ("en", "train[10%:]"): 31278,
    ("en", "train[:5%]"): 1737,
    ("en", "train[5%:]"): 33016,
    ("fr", "train"): 6856,
    ("fr", "train[:10%]"): 685,
    ("fr", "train[10%:]"): 6171,
    ("de", "train"): 7127,
    ("de", "train[:10%]"): 712,
    ("de", "train[10%:]"): 6415,
}
# Of central training, by what trains on what: steps at the constant rate, the rate, steps of a
# halving, whether it is smooth; compute; dropout and layer drop, None for the model's; seconds.
HALF, SMOOTH = (
    (0.5, 50_000, False, "bfloat16", None, 240),
    (0.5, 50_000, True, "bfloat16", None, 240),
)
TENTH = (100_000, 0.5, 25_000, True, "bfloat16", 0.4, 216)
FIFTH = (0.2, 50_000, False, "bfloat16", None, 240)
CENTRAL = {
    "ls": (250_000, *SMOOTH),
    "ls_100": (330_000, *HALF),
    "cv_en": (330_000, 0.5, 50_000, False, "float32", None, 240),
    ("librispeech", "en", "none", ""): (250_000, *SMOOTH),
    ("librispeech", "en", "none", "ls100"): (330_000, *HALF),
    ("librispeech", "en", "ls100", ""): (150_000, *HALF),
    ("librispeech", "en", "cv", ""): (100_000, *HALF),
    ("common_voice", "en", "none", ""): (330_000, 0.5, 50_000, False, "float32", None, 240),
    ("common_voice", "en", "ls100", ""): (40_000, *HALF),
    ("common_voice", "en", "ls960", ""): (150_000, *HALF),
    ("common_voice", "en", "cv10", ""): (150_000, *FIFTH),
    ("common_voice", "en", "none", "cv10"): TENTH,
    ("common_voice", "en", "none", "cv05"): TENTH,
    ("common_voice", "fr", "none", ""): (200_000, *HALF),
    ("common_voice", "fr", "none", "cv10"): TENTH,
    ("common_voice", "fr", "cv10", ""): (150_000, *FIFTH),
    ("common_voice", "de", "none", ""): (150_000, *FIFTH),
    ("common_voice", "de", "none", "cv10"): TENTH,
    ("common_voice", "de", "cv10", ""): (200_000, *HALF),
}
# blocks, width, heads, layer drop, millions of parameters as published
SIZES = {
    "base": (36, 768, 0.3, 255),
    "narrow": (36, 512, 0.1, 114),
    "wide": (36, 1024, 0.1, 450),
    "shallow": (16, 768, 0.1, 114),
    "deep": (72, 768, 0.1, 510),
}


def build(table, row):
    """The configuration of a row, as a plain dict."""
    module = importlib.import_module(f"fedasr.recipes.{table.config}")
    config = module.get_config(row.arguments) if row.arguments else module.get_config()
    for name, value in row.overrides.items():
        *path, last = name.split(".")
        part = config
        for key in path:
            part = part[key]
        assert last in part
        part[last] = value
    return to_json(config.to_dict())


def argument(row, name, default):
    found = re.search(rf"(?:^|,){name}=([^,]*)", row.arguments)
    return found.group(1) if found else default


@pytest.mark.parametrize("table,row", ROWS, ids=lambda x: x.name.replace(" ", "-"))
def test_a_published_row_has_its_published_setting(table, row):
    config = build(table, row)
    corpus = "librispeech" if "librispeech" in table.config else "common_voice"
    model = config["model"]["options"]
    blocks, width, drop, _ = SIZES[argument(row, "model", "base")]
    assert (model["blocks"], model["dim"], model["mlp"]) == (blocks, width, 4 * width)
    language, seed = argument(row, "language", "en"), argument(row, "seed", "none")
    central, dropout = None, 0.3
    if config["algorithm"] == "central":
        key = (corpus, language, seed, argument(row, "split", ""))
        central = CENTRAL[argument(row, "baseline", "") or key]
        drop, dropout = (drop, dropout) if central[5] is None else (central[5], central[5])
    assert model["layer_drop"] == drop and model["dropout"] == dropout and model["heads"] == 4
    assert (model["front_end"], model["init"]) == ("same", "lecun")
    assert model["branch_dropout"] is False and model["layer_drop_per"] == "batch"
    assert model["stream_dtype"] == "float32"
    assert (model["kernel"], model["stride"], model["cape_shift"]) == (7, 3, 30.0)
    assert model["norm"] == "pre" and model["dtype"] == (central[4] if central else "bfloat16")
    assert model["frame_seconds"] == 0.03 and model["position_scale"] == 30.0
    spec = config["augment"]
    assert spec["enabled"] == ("specaugment=false" not in row.arguments)
    assert spec["start_round"] == int(spec["enabled"])
    assert spec["options"] == {
        "frequency_masks": 2,
        "frequency_width": 30,
        "time_masks": 10,
        "time_width": 50,
        "time_fraction": 0.1,
        "inclusive": False,
        "time_warp": 0.0,
        "frequency_warp": 0.0,
    }
    assert config["evaluation"]["published"]
    split = config["data"]["train"]
    assert config["data"]["population"] == USERS.get(split, USERS.get((language, split)))
    if central is not None:
        found = config["central"]
        names = ("decay_start", "learning_rate", "decay_steps", "decay_smooth")
        assert tuple(found[name] for name in names) == central[:4]
        assert found["optimizer"] == "lars" and found["options"] == {"eps": 1e-8}
        assert found["batch_seconds"] == 8 * central[6] and found["grad_clip"] == 1.0
        assert found["decay_rate"] == 0.5
        assert max(300_000, found["decay_start"]) <= found["steps"] <= 600_000
        return
    client, server, privacy = config["client"], config["server"], config["privacy"]
    private = "clipping=" in row.arguments
    kind = "none" if seed == "none" and not private else "seed"
    rates = (
        client["learning_rate"],
        server["learning_rate"],
        server["decay_start"],
        server["decay_rounds"],
        client["batch_seconds"],
    )
    assert rates == RATES[corpus, kind]
    assert server["decay_rate"] == 0.6
    assert client["optimizer"] == "sgd" and client["grad_clip"] == 1.0
    assert client["decay_start"] > config["rounds"]  # a constant rate
    assert client["proximal"] == float(argument(row, "fedprox", 0))
    assert server["optimizer"] == argument(row, "optimizer", "lamb")
    assert client["batch_buffer"] == 64
    nothing = {"initial_accumulator_value": 0.0, "eps": 0.0}
    options = {"lamb": {"eps": 1e-6}, "lars": {"eps": 1e-6}, "adagrad": nothing}
    assert server["options"] == options.get(server["optimizer"], {})
    assert config["cohort"] == int(argument(row, "cohort", 16))
    assert config["data"]["iid"] == ("iid=true" in row.arguments)
    assert (row.start != "") == (seed != "none")
    large = not private and config["cohort"] > 256  # clipped, but without noise
    assert privacy["enabled"] == (private or large)
    # Ours: the paper draws a fixed number with privacy too, and accounts as if it were Poisson.
    noisy = private and privacy["sigma"] > 0
    assert privacy["sampler"] == ("poisson" if noisy else "fixed")
    if large:
        assert (client["steps"], client["epochs"]) == (10, 0) and privacy["sigma"] == 0
        assert (privacy["clip_norm"], privacy["budget"]) == (0.01, "global")
    elif private:
        assert config["rounds"] == 2006 and (client["steps"], client["epochs"]) == (10, 0)
        assert privacy["clip_norm"] == 0.01 and privacy["delta"] == 1e-9
        assert privacy["budget"] == argument(row, "clipping", "")
        assert privacy["sigma"] == float(argument(row, "sigma", 0))
        assert config["cohort"] == 1024 and not privacy["normalise"]
    else:
        assert config["rounds"] == int(argument(row, "rounds", 2000))
        assert (client["steps"], client["epochs"]) == (0, 10)


def test_the_tables_hold_the_published_figures():
    figures = {(table.name, row.name): dict(row.published) for table, row in ROWS if row.published}
    ls = "published_librispeech"
    assert figures[ls, "seed none, cohort 8"] == {"test_clean": 6.7, "test_other": 17.5}
    assert figures[ls, "seed ls100, cohort 64"] == {"test_clean": 2.9, "test_other": 7.1}
    assert figures[ls, "seed cv, central"] == {"test_clean": 3.2, "test_other": 7.2}
    cv = "published_common_voice"
    assert figures[cv, "seed none, cohort 8"] == {"test": 66.7}
    assert figures[cv, "seed ls960, cohort 256"] == {"test": 16.6}
    assert figures[cv, "seed cv10, central"] == {"test": 17.6}
    assert figures["published_privacy", "dim, sigma 10e-6"] == {"dev": 20.1, "test": 23.7}
    assert figures["published_privacy", "global, sigma 3e-6"] == {"dev": 27.0, "test": 31.1}
    assert figures["published_optimizers_common_voice", "adagrad"] == {"dev": 84.3}
    assert figures["published_variations", "IID"] == {"test_other": 14.0}
    assert len([1 for name, _ in figures if name == "published_privacy"]) == 15
    assert figures[cv, "seed ls100, cohort 256"] == {"test": 18.9}
    assert figures[ls, "seed cv, cohort 16"] == {"test_clean": 3.8, "test_other": 9.4}
    assert figures["published_privacy", "uniform, sigma 50e-6"] == {"dev": 27.1, "test": 31.3}
    assert figures["published_optimizers_librispeech", "lars"] == {"dev_clean": 13.7}
    tables = (published.TABLES, mini.TABLES, own_speech.TABLES, adapted.TABLES)
    for table in (table for found in tables for table in found.values()):
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert {name for pair in table.better for name in pair} <= set(names)
        assert {row.start for row in table.rows} - {""} <= {row.name for row in table.starts}


@pytest.mark.parametrize("model", SIZES)
def test_parameters_are_counted_without_allocating_them(model):
    *_, millions = SIZES[model]
    config = build(published.TABLES["published_sizes"], row := size_row(model))
    assert f"model={model}" in row.arguments
    recogniser = models.build_recogniser(Config.of(config))
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == shared.parameter_count(model)
    # "450M" is rounded more coarsely than the others: 36 blocks of width 1024 make 454M.
    assert abs(count / 1e6 - millions) < (5 if model == "wide" else 1)


def size_row(model):
    rows = published.TABLES["published_sizes"].rows
    return next(row for row in rows if row.name == f"{model}, no privacy")


def test_a_dry_run_needs_no_data():
    table = published.TABLES["published_privacy"]
    row = next(row for row in table.rows if row.name == "dim, sigma 3e-6")
    summary = loop.dry_run(build(table, row))
    assert summary["parameters"] == 255_800_864
    assert summary["population"] == 34753 and summary["cohort"] == 1024
    assert summary["config"]["privacy"]["budget"] == "dim"
    deployed = {
        (case["cohort"], case["population"]): case["epsilon_rdp"]
        for case in summary["privacy"]["extrapolations"]
    }
    # The paper's headline, 7.2 (its T is 2034, ours 2006).
    assert deployed[204_800, 69_506_000] == pytest.approx(7.2, rel=0.02)


@pytest.mark.slow
def test_every_published_row_can_be_tried_dry(monkeypatch):
    """To JSON, those without noise (whose epsilon is infinite) as well.

    Models are laid out once for each size, and the accountants answer roughly: that they are right
    is tested elsewhere.
    """

    def empty(shapes, key):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    known = {}
    build_recogniser = models.build_recogniser

    def shared(config):
        key = repr(config.model)
        if key not in known:
            whole = build_recogniser(config)
            shapes = jax.eval_shape(whole.init, jax.random.key(0))
            known[key] = whole._replace(init=functools.partial(empty, shapes))
        return known[key]

    monkeypatch.setattr(models, "build_recogniser", shared)
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *_: None)
    monkeypatch.setattr(accounting, "_POISSON_ORDERS", np.array([1.5, 4.0, 16.0]))
    infinite = 0
    for table, row in ROWS:
        summary = loop.dry_run(build(table, row))
        privacy = json.loads(json.dumps(to_json(summary), allow_nan=False)).get("privacy", {})
        if not privacy.get("enabled"):
            continue
        for case in (privacy, *privacy["extrapolations"]):
            without_noise = privacy["sigma"] == 0
            assert case.get("epsilon_infinite", False) == without_noise, row.name
            assert (case["epsilon"] is None) == without_noise
            infinite += without_noise
    assert infinite > 0 and len(ROWS) >= 135 and len(known) >= len(SIZES)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("cohorts=8", "no argument 'cohorts=8'"),
        ("cohort=many", "not of type int"),
        ("iid=perhaps", "not of type bool"),
        ("seed=ls9", "choose one of"),
        ("clipping=soft", "choose one of"),
        ("sigma=1e-6", "no meaning with clipping=none"),
        ("training=central,clipping=dim", "no meaning with training=central"),
        ("specaugment=false,specaugment_start=5", "no meaning with specaugment=false"),
        ("model=huge", "choose one of"),
        ("training=alone", "choose one of"),
        ("split=none", "choose one of"),
    ],
)
def test_mistaken_arguments(arguments, message):
    for name in ("librispeech", "common_voice"):
        module = importlib.import_module(f"fedasr.recipes.{name}")
        with pytest.raises(UserError, match=message):
            module.get_config(arguments)


def test_mini_noise_has_the_published_ratio_to_the_clip_norm():
    config = mini.get_config()
    recogniser = models.build_recogniser(Config.of(to_json(config.to_dict())))
    count = models.parameter_count(recogniser)
    row = mini.TABLES["mini_privacy"].rows[0]
    ours = row.overrides["privacy.sigma"] * math.sqrt(count)
    assert ours == pytest.approx(row.x * math.sqrt(255_800_864), rel=1e-2)
