import dataclasses
import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.fields import flatten
from fedasr.privacy.secure_aggregation import MAX_BITS, MIN_BITS
from fedasr.training.config import Config, default_config, fields, fingerprint, resolve
from fedasr.training.logging import to_json
from fedasr.training.sections import Compression, Local, Privacy
from fedasr.training.workdir import ADDED, recorded_config

pytest.importorskip("ml_collections")


def test_fields_that_scripts_rely_on():
    config = default_config()
    for name in ("seed", "rounds", "cohort", "chunk", "init_from", "data", "model", "privacy"):
        assert name in config
    assert "dir" in config.data and "name" in config.model
    assert {"enabled", "sigma", "clip_norm", "budget"} <= set(config.privacy.keys())


def test_default_config_is_fresh_each_time():
    first = default_config()
    first.model.options.dim = 1
    assert default_config().model.options.dim != 1


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1))
def test_fingerprint_depends_on_the_values_alone(tree):
    backwards = dict(reversed(tree.items()))
    assert fingerprint(tree) == fingerprint(backwards)
    key = next(iter(tree))
    assert fingerprint({**tree, key: "something else"}) != fingerprint(tree)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], {"x": float("-inf")}])
def test_sections_of_a_program_hold_finite_numbers(value):
    config = default_config().to_dict()
    assert resolve(config) == to_json(config)
    config["mine"] = {"numbers": value}
    with pytest.raises(UserError, match=r"no such field in the configuration: mine"):
        resolve(config)
    for own in (("mine",), None):
        with pytest.raises(UserError, match=r"mine\.numbers.*must be a finite number"):
            resolve(config, own)


def test_fingerprints_are_short_and_differ_between_configurations():
    config = to_json(default_config().to_dict())
    assert len(fingerprint(config)) == 8
    assert int(fingerprint(config), 16) >= 0
    assert fingerprint({**config, "seed": 1}) != fingerprint(config)


DEFAULTS = Path(__file__).parent / "fixtures" / "defaults.json"


def test_the_tree_of_defaults_is_the_recorded_one():
    """Fingerprints name work directories by it: a field that is added goes into the file, too."""
    recorded = json.loads(DEFAULTS.read_text())
    assert to_json(default_config().to_dict()) == Config().tree() == recorded
    assert fingerprint(recorded) == fingerprint(Config().tree())


def test_every_field_says_what_it_may_hold():
    for name, field in flatten(fields()).items():
        assert field.kind and field.check(field.default) is None, name
        assert field.kind not in ("number", "whole number") or field.span, name
    bits = fields()["privacy"]["bits"]
    assert bits.span == f"{MIN_BITS} to {MAX_BITS}"


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "chunk": st.integers(0, 9) | st.just("auto"),
        "data.eval": st.lists(st.sampled_from(["dev", "test"]), max_size=2).map(tuple),
        "privacy.sigma": st.floats(0, 10) | st.integers(0, 3),
        "privacy.adaptive.warmup": st.integers(0, 5),
        "privacy.deployments": st.lists(st.tuples(st.integers(1, 9), st.integers(9, 99))).map(
            tuple
        ),
        "local.patterns": st.sampled_from([(), ("^a/", "b")]),
        "model.options": st.dictionaries(st.text(max_size=3), st.integers() | st.booleans()),
    },
)
RECORDED = st.fixed_dictionaries(
    {}, optional={name: st.text(max_size=3) for name in ("identity", "characters", "knowledge")}
)


def changed(tree, changes):
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        functools.reduce(dict.__getitem__, sections, tree)[leaf] = value
    return tree


@settings(deadline=None, max_examples=50)
@given(CHANGES, RECORDED, st.none() | st.text(max_size=3))
def test_a_tree_and_the_typed_configuration_are_the_same(changes, recorded, start):
    tree = to_json(changed(Config().tree(), changes))
    tree["data"] |= recorded
    tree |= {} if start is None else {"start": start}
    typed = Config.of(tree)
    # Bit by bit, as it is hashed: 1 stays 1, and 1.0 stays 1.0.
    assert json.dumps(typed.tree(), sort_keys=True) == json.dumps(tree, sort_keys=True)
    assert Config.of(typed.tree()) == typed
    for name, value in changes.items():
        assert functools.reduce(getattr, name.split("."), typed) == value


def test_a_configuration_cannot_be_changed():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 3
    other = config.with_data(identity="x")
    assert config.data.identity is None and other.data.identity == "x"
    assert Config().model.options is not Config().model.options


def test_a_checkpoint_of_an_earlier_release_is_read_with_what_it_did():
    tree = Config(privacy=Privacy(bits=12)).tree()
    tree["data"]["characters"] = "ab"
    for name in ADDED.keys() - {"start", "compression.align"}:
        *sections, leaf = name.split(".")
        inner = functools.reduce(dict.__getitem__, sections, tree)
        assert leaf in inner or name.startswith("model.options.")  # some are another model's
        inner.pop(leaf, None)
    del tree["local"]
    before = json.dumps(tree)
    config = recorded_config(tree)
    assert json.dumps(tree) == before
    assert config.privacy.bits == 16 and config.data.characters == "ab"
    assert config.local == Local() and config.compression == Compression()
    # A model's options are its own affair: what is not there is its class's default.
    assert "attention" not in config.model.options


def test_options_that_a_release_removed_are_left_out_where_they_meant_nothing():
    tree = default_config().to_dict()
    tree["model"]["options"] = {**tree["model"]["options"], "frozen_dtype": "float32"}
    assert Config.of(tree) == Config.of(default_config().to_dict())
    tree["model"]["options"]["frozen_dtype"] = "bfloat16"  # which the model's check refuses
    assert "frozen_dtype" in Config.of(tree).model.options
