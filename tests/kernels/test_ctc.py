import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.kernels.ctc import ctc_loss, greedy_decode, is_feasible

pytestmark = pytest.mark.usefixtures("optimized")

B, T, U, V = 3, 9, 5, 6


@jax.jit
def loss_and_gradient(logits, logit_lengths, labels, label_lengths):
    def total(logits):
        loss, feasible = ctc_loss(logits, logit_lengths, labels, label_lengths)
        return loss.sum(), (loss, feasible)

    gradient, (loss, feasible) = jax.grad(total, has_aux=True)(logits)
    return loss, feasible, gradient


jitted_decode = jax.jit(greedy_decode)


def collapse(path):
    return tuple(token for token, _ in itertools.groupby(path) if token)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def brute_force_loss(logits, labels):
    """Minus log of the sum over every path that collapses to the labels."""
    log_probs = log_softmax(logits)
    paths = itertools.product(range(logits.shape[1]), repeat=len(logits))
    scores = [
        sum(log_probs[i, token] for i, token in enumerate(path))
        for path in paths
        if collapse(path) == tuple(labels)
    ]
    return -np.logaddexp.reduce(scores) if scores else np.inf


def forward_loss(logits, labels):
    """The forward algorithm over labels with blanks between, in float64."""
    log_probs = log_softmax(logits)
    states = [0]
    for label in labels:
        states += [int(label), 0]
    alpha = np.full(len(states), -np.inf)
    alpha[0] = 0.0
    first = True
    for row in log_probs:
        new = np.full(len(states), -np.inf)
        for s, token in enumerate(states):
            if first:
                sources = [0.0] if s < 2 else []
            else:
                sources = [alpha[s]] + ([alpha[s - 1]] if s else [])
                if s > 1 and token and token != states[s - 2]:
                    sources.append(alpha[s - 2])
            if sources:
                new[s] = np.logaddexp.reduce(sources) + row[token]
        alpha, first = new, False
    return -np.logaddexp.reduce(alpha[-2:])


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits = (rng.standard_normal((B, T, V)) * scale).astype(np.float32)
    labels = rng.integers(1, draw(st.integers(2, V)), (B, U)).astype(np.int32)
    return logits, rng.integers(0, T + 1, B), labels, rng.integers(0, U + 1, B)


@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_loss_equals_enumeration_of_all_paths(seed, frames, length):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((1, 4, 3)).astype(np.float32) * 2
    labels = rng.integers(1, 3, (1, 3)).astype(np.int32)
    loss, feasible, _ = loss_and_gradient(logits, np.array([frames]), labels, np.array([length]))
    expected = brute_force_loss(logits[0, :frames], labels[0, :length])
    assert feasible[0] == np.isfinite(expected)
    np.testing.assert_allclose(loss[0], expected if feasible[0] else 0, rtol=1e-5, atol=1e-5)


@given(batches())
@settings(deadline=None, max_examples=50)
def test_loss_equals_forward_algorithm(batch):
    logits, logit_lengths, labels, label_lengths = batch
    loss, feasible, gradient = loss_and_gradient(*batch)
    assert loss.dtype == jnp.float32
    for i in range(B):
        expected = forward_loss(logits[i, : logit_lengths[i]], labels[i, : label_lengths[i]])
        if logit_lengths[i] == 0:
            expected = 0.0 if label_lengths[i] == 0 else np.inf
        assert feasible[i] == np.isfinite(expected)
        if feasible[i]:
            np.testing.assert_allclose(loss[i], expected, rtol=1e-5, atol=1e-4)
        else:
            assert loss[i] == 0
            assert (gradient[i] == 0).all()
        assert (gradient[i, logit_lengths[i] :] == 0).all()
    assert np.isfinite(gradient).all()


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((B, T, V)).astype(np.float32)
    logit_lengths, label_lengths = np.array([9, 7, 8]), np.array([5, 3, 0])
    labels = np.array([[1, 1, 2, 2, 3], [4, 5, 4, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    gradient = loss_and_gradient(logits, logit_lengths, labels, label_lengths)[2]
    expected = np.zeros((B, T, V))
    for i, t, v in np.ndindex(B, T, V):
        if t < logit_lengths[i]:
            sides = []
            for step in (1e-5, -1e-5):
                moved = logits[i, : logit_lengths[i]].astype(np.float64)
                moved[t, v] += step
                sides.append(forward_loss(moved, labels[i, : label_lengths[i]]))
            expected[i, t, v] = (sides[0] - sides[1]) / 2e-5
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@given(batches(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
@settings(deadline=None, max_examples=30)
def test_padding_changes_nothing(batch, garbage):
    logits, logit_lengths, labels, label_lengths = batch
    loss, feasible, gradient = loss_and_gradient(*batch)
    wide = np.full((B + 1, T + 3, V), garbage, np.float32)
    wide_labels = np.full((B + 1, U + 2), 3, np.int32)
    for i in range(B):
        wide[i, : logit_lengths[i]] = logits[i, : logit_lengths[i]]
        wide_labels[i, : label_lengths[i]] = labels[i, : label_lengths[i]]
    padded = loss_and_gradient(
        wide, np.append(logit_lengths, 0), wide_labels, np.append(label_lengths, 0)
    )
    np.testing.assert_allclose(padded[0][:B], loss, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(padded[1][:B], feasible)
    np.testing.assert_allclose(padded[2][:B, :T], gradient, atol=1e-5)
    assert (padded[2][:, T:] == 0).all()
    assert padded[0][B] == 0
    assert (padded[2][B] == 0).all()


def test_infeasible_utterance_is_masked_even_if_not_finite():
    logits = np.zeros((B, T, V), np.float32)
    logits[0] = np.nan
    labels = np.ones((B, U), np.int32)
    label_lengths, logit_lengths = np.array([5, 5, 5]), np.array([8, 9, 9])
    loss, feasible, gradient = loss_and_gradient(logits, logit_lengths, labels, label_lengths)
    np.testing.assert_array_equal(feasible, [False, True, True])
    assert loss[0] == 0
    assert (gradient[0] == 0).all()
    assert (loss[1:] > 0).all()
    assert (gradient[1:] != 0).any()


def test_feasible_utterance_does_not_hide_a_nan():
    logits = np.zeros((B, T, V), np.float32)
    logits[0, 2, 1] = np.nan
    batch = (logits, np.full(B, T), np.full((B, U), 2, np.int32), np.full(B, 2))
    loss = loss_and_gradient(*batch)[0]
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1:]).all()


def test_long_confident_utterance_stays_accurate():
    """300 frames with probabilities down to exp(-200): no underflow, float32 accuracy."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((1, 300, V)) * 50).astype(np.float32)
    labels = rng.integers(1, V, (1, 80)).astype(np.int32)
    loss, _, gradient = loss_and_gradient(logits, np.array([300]), labels, np.array([80]))
    np.testing.assert_allclose(loss[0], forward_loss(logits[0], labels[0]), rtol=1e-5)
    # The gradient is softmax - posterior: two distributions over the classes of every frame.
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-3)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, V)), jnp.bfloat16)
    rest = (np.full(B, T), np.full((B, U), 2, np.int32), np.full(B, 3))
    loss, _, gradient = loss_and_gradient(logits, *rest)
    expected, _, _ = loss_and_gradient(logits.astype(jnp.float32), *rest)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loss, expected)


def test_vmap_equals_single():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((2, B, T, V)).astype(np.float32)
    labels = rng.integers(1, V, (2, B, U)).astype(np.int32)
    logit_lengths, label_lengths = rng.integers(0, T + 1, (2, B)), rng.integers(0, U + 1, (2, B))
    batch = (logits, logit_lengths, labels, label_lengths)
    mapped = jax.vmap(loss_and_gradient)(*batch)
    for i in range(2):
        single = loss_and_gradient(*(x[i] for x in batch))
        for got, expected in zip(mapped, single, strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-5)


@pytest.mark.parametrize(
    "labels, length, frames, expected",
    [
        ([1, 1, 1, 2], 4, 5, False),
        ([1, 1, 1, 2], 4, 6, True),
        ([1, 1, 1, 2], 2, 3, True),
        ([1, 1, 1, 2], 2, 2, False),
        ([1, 2, 1, 2], 4, 4, True),
        ([1, 2, 1, 2], 4, 3, False),
        ([0, 0, 0, 0], 0, 0, True),
    ],
)
def test_feasibility(labels, length, frames, expected):
    result = is_feasible(jnp.array([labels]), jnp.array([length]), jnp.array([frames]))
    assert bool(result[0]) is expected


@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=2, max_size=2))
@settings(deadline=None, max_examples=60)
def test_greedy_decode_collapses_repeats_then_blanks(paths):
    lengths = np.array([8, 5])
    logits = np.eye(4, dtype=np.float32)[np.array(paths)]
    tokens, counts = jitted_decode(logits, lengths)
    assert tokens.dtype == counts.dtype == jnp.int32
    assert tokens.shape == (2, 8)
    for path, length, row, count in zip(paths, lengths, tokens, counts, strict=True):
        expected = collapse(path[:length])
        assert tuple(row[:count].tolist()) == expected
        assert (row[count:] == 0).all()


def test_greedy_decode_ignores_padding():
    logits = np.full((1, 6, 4), np.nan, np.float32)
    logits[0, :3] = np.eye(4)[[2, 0, 2]]
    tokens, counts = greedy_decode(jnp.asarray(logits), jnp.array([3]))
    np.testing.assert_array_equal(tokens, [[2, 2, 0, 0, 0, 0]])
    assert counts[0] == 2


def test_long_utterances_equal_optax_in_float64():
    """Where scores are thousands of nats, of which float32 holds seven digits."""
    frames, labels = 400, 60
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((2, frames, 30)) * 2).astype(np.float32)
    tokens = rng.integers(1, 30, (2, labels)).astype(np.int32)
    lengths, label_lengths = np.array([frames, frames - 50]), np.array([labels, labels - 9])

    def oracle(logits):
        return optax.ctc_loss(
            logits,
            np.float64(np.arange(frames) >= lengths[:, None]),
            tokens,
            np.float64(np.arange(labels) >= label_lengths[:, None]),
        ).sum()

    loss, _, gradient = loss_and_gradient(logits, lengths, tokens, label_lengths)
    with jax.enable_x64(True):
        expected, expected_gradient = jax.value_and_grad(oracle)(np.float64(logits))
        assert expected_gradient.dtype == jnp.float64
        expected, expected_gradient = float(expected), np.asarray(expected_gradient)
    np.testing.assert_allclose(loss.sum(), expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-4)
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-5)
