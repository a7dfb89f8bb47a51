import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.training.config import default_config, fingerprint, resolve
from fedasr.training.logging import to_json

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
