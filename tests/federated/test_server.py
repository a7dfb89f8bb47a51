import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.errors import UserError
from fedasr.federated.server import (
    SERVER_OPTIMIZERS,
    constant_then_exponential,
    init_server,
    make_optimizer,
    server_step,
)
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler
from fedasr.recipes.shared import SERVER_OPTIONS

PARAMS = {"w": np.float32([[1.0, -2.0], [0.5, 3.0]]), "b": np.float32([0.1, 0.2])}
TOTAL = {"w": np.float32([[4.0, 8.0], [-4.0, 2.0]]), "b": np.float32([1.0, -3.0])}


def test_schedule_is_constant_and_then_exponential():
    schedule = jax.jit(constant_then_exponential(0.5, 10, 4))
    for round in (0, 1, 9, 10):
        assert schedule(round) == pytest.approx(0.5)
    for round in (11, 14, 30):
        expected = 0.5 * 0.6 ** ((round - 10) / 4)
        assert float(schedule(round)) == pytest.approx(expected, rel=1e-5)
    assert float(constant_then_exponential(1.0, 0, 2, 0.25)(3)) == pytest.approx(0.125)


@pytest.mark.parametrize("name", sorted(SERVER_OPTIMIZERS))
def test_every_optimizer_by_name_steps_against_the_delta(name):
    chain = make_optimizer(name, constant_then_exponential(0.1, 5, 5))
    state = init_server(PARAMS, chain)
    for _ in range(2):
        state = server_step(state, TOTAL, chain)
    assert int(state.round) == 2
    for key in PARAMS:
        assert np.all(np.isfinite(state.params[key])) and state.params[key].dtype == np.float32
        moved = np.asarray(state.params[key]) - PARAMS[key]
        # lars and lamb rescale a layer but do not turn it.
        assert np.all(np.sign(moved) == -np.sign(TOTAL[key]))


def test_optimizer_options_are_optax_own():
    ours = make_optimizer("sgd", 0.1, momentum=0.9)
    theirs = optax.sgd(0.1, momentum=0.9)
    a, b = init_server(PARAMS, ours), init_server(PARAMS, theirs)
    for _ in range(3):
        a, b = server_step(a, TOTAL, ours), server_step(b, TOTAL, theirs)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_unknown_optimizer_and_option():
    with pytest.raises(UserError, match=r"unknown optimizer 'sgdd'.*adam"):
        make_optimizer("sgdd", 0.1)
    with pytest.raises(UserError, match="betas"):
        make_optimizer("adam", 0.1, betas=(0.9, 0.99))


def test_the_mean_is_over_the_expected_cohort():
    mechanism = Mechanism(1.0, "global", 0.0, FixedSizeSampler(10, 4, seed=0))
    chain = optax.chain(mechanism.server_transform(jax.random.key(0)), optax.sgd(0.5))
    # Whatever number of clients the sum comes from.
    state = server_step(init_server(PARAMS, chain), TOTAL, chain)
    for key in PARAMS:
        np.testing.assert_allclose(state.params[key], PARAMS[key] - 0.5 * TOTAL[key] / 4, rtol=1e-6)


def test_the_chain_equals_adam_by_hand():
    mechanism = Mechanism(1.0, "global", 0.0, FixedSizeSampler(10, 4, seed=0))
    schedule = constant_then_exponential(0.1, 2, 3)
    chain = optax.chain(mechanism.server_transform(jax.random.key(0)), make_optimizer(
        "adam", schedule, b1=0.8, b2=0.9, eps=1e-3))  # fmt: skip
    step = jax.jit(lambda state, total: server_step(state, total, chain))
    state = init_server(PARAMS, chain)
    params = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    first = {k: 0.0 for k in params}
    second = {k: 0.0 for k in params}
    for t in range(5):
        total = {k: v * (t + 1) for k, v in TOTAL.items()}
        state = step(state, total)
        rate = 0.1 * 0.6 ** (max(t - 2, 0) / 3)
        for k in params:
            gradient = total[k].astype(np.float64) / 4
            first[k] = 0.8 * first[k] + 0.2 * gradient
            second[k] = 0.9 * second[k] + 0.1 * gradient**2
            mean, square = first[k] / (1 - 0.8 ** (t + 1)), second[k] / (1 - 0.9 ** (t + 1))
            params[k] = params[k] - rate * mean / (np.sqrt(square) + 1e-3)
    for k in params:
        np.testing.assert_allclose(state.params[k], params[k], rtol=1e-5)


def test_noise_joins_the_mean_before_the_optimizer():
    clip_norm, multiplier, cohort = 2.0, 3.0, 4
    mechanism = Mechanism(clip_norm, "global", multiplier, FixedSizeSampler(10, cohort, seed=0))
    chain = optax.chain(mechanism.server_transform(jax.random.key(1)), optax.sgd(1.0))
    params = {"w": jnp.zeros(100_000)}
    state = init_server(params, chain)
    step = jax.jit(lambda state, total: server_step(state, total, chain))
    after = step(state, {"w": jnp.full(100_000, 8.0)})
    moved = -np.asarray(after.params["w"])
    std = clip_norm * multiplier / cohort
    assert moved.mean() == pytest.approx(8.0 / cohort, abs=5 * std / np.sqrt(100_000))
    assert moved.std() == pytest.approx(std, rel=0.02)


# Formulae of the papers, in float64, with the published recipes' options. Deltas as small as a
# clipped mean's are the hard case: an epsilon or an accumulator's start may swamp them.
def lamb(g, state, p, t):
    """You et al., 2020, algorithm 2, without weight decay."""
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
    return np.linalg.norm(p) / np.linalg.norm(u) * u


def lars(g, state, p, t):
    """You et al., 2017: trust .001, momentum .9."""
    local = 0.001 * np.linalg.norm(p) / (np.linalg.norm(g) + 1e-6)
    state["m"] = 0.9 * state.get("m", 0) + local * g
    return state["m"]


def adagrad(g, state, p, t):
    """Duchi et al., 2011, from nothing, as the authors' programs add their epsilon."""
    total = state["sum"] = state.get("sum", 0) + g**2
    return g * (1 / np.sqrt(total) + 1e-8)


def yogi(g, state, p, t):
    """Zaheer et al., 2018, moments from 1e-6, bias corrected, epsilon .001 (optax's)."""
    m = state["m"] = 0.9 * state.get("m", 1e-6) + 0.1 * g
    before = state.get("v", 1e-6)
    v = state["v"] = before - 0.001 * np.sign(before - g**2) * g**2
    return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3)


def keras_adam(g, state, p, t):
    """Keras' Adam with the published decoders' epsilon, .1: outside of the bias correction."""
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    return np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 0.1)


@pytest.mark.parametrize(
    "oracle", [lamb, lars, adagrad, yogi, keras_adam], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_steps_of_the_published_options_equal_the_formulae(oracle, scale):
    name, rate = oracle.__name__, 0.006
    options = {"eps": 0.1} if oracle is keras_adam else SERVER_OPTIONS.get(name, {})
    chain = make_optimizer(name, rate, **options)
    state = init_server(PARAMS, chain)
    params = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    memory = {k: {} for k in params}
    step = jax.jit(lambda state, total: server_step(state, total, chain))
    for t in range(1, 6):
        total = {k: np.float32(scale * np.cos(3 * t) * v) for k, v in TOTAL.items()}
        state = step(state, total)
        for k, p in params.items():
            params[k] = p - rate * oracle(total[k].astype(np.float64), memory[k], p, t)
    for k, p in params.items():
        np.testing.assert_allclose(state.params[k], p, rtol=1e-6, atol=1e-6)
    moved = max(np.abs(p - PARAMS[k]).max() for k, p in params.items())
    # No bound that nothing would pass, too: epsilons as large leave tiny deltas without effect.
    assert moved > 1e-5 or (scale < 1 and name in ("yogi", "keras_adam"))


def test_the_first_step_of_keras_adam_is_31_times_smaller_than_optax():
    """Of small gradients with an epsilon of .1."""
    total = jax.tree.map(lambda x: 1e-3 * x, TOTAL)
    moved = []
    for name in ("adam", "keras_adam"):
        chain = make_optimizer(name, 0.1, eps=0.1)
        after = server_step(init_server(PARAMS, chain), total, chain)
        moved.append(sum(np.abs(after.params[k] - p).sum() for k, p in PARAMS.items()))
    assert moved[0] / moved[1] == pytest.approx(np.sqrt(1000), rel=0.05)


def test_adagrad_as_published_is_no_sgd():
    """Its first step has the size of the rate whatever the deltas' is."""
    ours = make_optimizer("adagrad", 0.1, **SERVER_OPTIONS["adagrad"])
    for scale in (1.0, 1e-7):
        total = {k: x * np.float32(scale) for k, x in TOTAL.items()}
        after = server_step(init_server(PARAMS, ours), total, ours)
        for k, p in PARAMS.items():
            np.testing.assert_allclose(after.params[k], p - 0.1 * np.sign(TOTAL[k]), rtol=1e-6)
