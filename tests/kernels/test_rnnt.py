import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.kernels.rnnt import greedy_decode, rnnt_loss

B, T, U, V = 3, 7, 4, 5
TORCHAUDIO_LOSS = [12.379673, 9.796044]
TORCHAUDIO_FIRST = [-0.2750168, -0.2997186, 0.3180187, 0.1475155, 0.0601000, 0.0491015]
TORCHAUDIO_INNER = [-0.1596768, 0.0435368, 0.1041148, -0.3253850, 0.2332982, 0.1041117]


@jax.jit
def loss_and_gradient(logits, logit_lengths, labels, label_lengths):
    def total(logits):
        loss, feasible = rnnt_loss(logits, logit_lengths, labels, label_lengths)
        return loss.sum(), (loss, feasible)

    gradient, (loss, feasible) = jax.grad(total, has_aux=True)(logits)
    return loss, feasible, gradient


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def brute_force_loss(logits, labels):
    """Minus log of the sum over every order of blanks and labels that ends with a blank."""
    log_probs, scores = log_softmax(logits), []
    frames, length = len(logits), len(labels)
    for places in itertools.combinations(range(frames - 1 + length), length):
        t = u = score = 0
        for i in range(frames - 1 + length):
            if i in places:
                score += log_probs[t, u, labels[u]]
                u += 1
            else:
                score += log_probs[t, u, 0]
                t += 1
        assert (t, u) == (frames - 1, length)
        scores.append(score + log_probs[t, u, 0])
    return -np.logaddexp.reduce(scores) if scores else np.inf


def forward_backward(logits, labels):
    """Loss and its gradient in the logits, from the probabilities of every move, in float64."""
    log_probs = log_softmax(logits)
    frames, positions, _ = logits.shape
    before = np.full((frames + 1, positions + 1), -np.inf)
    after = np.full((frames + 1, positions + 1), -np.inf)
    before[0, 0] = 0.0
    for t, u in np.ndindex(frames, positions):
        before[t + 1, u] = np.logaddexp(before[t + 1, u], before[t, u] + log_probs[t, u, 0])
        if u < len(labels):
            move = before[t, u] + log_probs[t, u, labels[u]]
            before[t, u + 1] = np.logaddexp(before[t, u + 1], move)
    after[frames, positions - 1] = 0.0
    gradient = np.zeros(logits.shape)
    loss = -before[frames, positions - 1]
    for t, u in itertools.product(range(frames)[::-1], range(positions)[::-1]):
        blank = after[t + 1, u] + log_probs[t, u, 0]
        label = after[t, u + 1] + log_probs[t, u, labels[u]] if u < len(labels) else -np.inf
        after[t, u] = np.logaddexp(blank, label)
        here = before[t, u] + loss
        gradient[t, u] = np.exp(here + after[t, u]) * np.exp(log_probs[t, u])
        gradient[t, u, 0] -= np.exp(here + blank)
        if u < len(labels):
            gradient[t, u, labels[u]] -= np.exp(here + label)
    return loss, gradient


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    logits = (rng.standard_normal((B, T, U + 1, V)) * scale).astype(np.float32)
    labels = rng.integers(1, V, (B, U)).astype(np.int32)
    return logits, rng.integers(0, T + 1, B), labels, rng.integers(0, U + 1, B)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_loss_equals_enumeration_of_all_alignments(seed, frames, length):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((1, 4, 4, 3)).astype(np.float32) * 2
    labels = rng.integers(1, 3, (1, 3)).astype(np.int32)
    loss, feasible, _ = loss_and_gradient(logits, np.array([frames]), labels, np.array([length]))
    expected = brute_force_loss(logits[0, :frames, : length + 1], labels[0, :length])
    assert feasible[0]
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6, atol=1e-5)


def test_gradient_equals_finite_differences_of_the_enumeration():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    lengths, labels = (np.array([4, 3]), np.array([3, 2])), np.array([[1, 1, 2], [2, 1, 0]])
    gradient = loss_and_gradient(logits, lengths[0], labels, lengths[1])[2]
    expected = np.zeros(logits.shape)
    for i, t, u, v in np.ndindex(*logits.shape):
        if t < lengths[0][i] and u <= lengths[1][i]:
            sides = []
            for step in (1e-5, -1e-5):
                moved = logits[i, : lengths[0][i], : lengths[1][i] + 1].astype(np.float64)
                moved[t, u, v] += step
                sides.append(brute_force_loss(moved, labels[i, : lengths[1][i]]))
            expected[i, t, u, v] = (sides[0] - sides[1]) / 2e-5
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@given(batches())
@settings(deadline=None, max_examples=40)
def test_loss_and_gradient_equal_forward_and_backward_passes(batch):
    logits, logit_lengths, labels, label_lengths = batch
    loss, feasible, gradient = loss_and_gradient(*batch)
    assert loss.dtype == jnp.float32
    expected = np.zeros(logits.shape)
    for i in range(B):
        assert feasible[i] == (logit_lengths[i] > 0)
        true = i, slice(logit_lengths[i]), slice(label_lengths[i] + 1)
        if feasible[i]:
            value, expected[true] = forward_backward(logits[true], labels[i, : label_lengths[i]])
            np.testing.assert_allclose(loss[i], value, rtol=1e-6, atol=1e-5)
        else:
            assert loss[i] == 0
    np.testing.assert_allclose(gradient, expected, atol=2e-5)
    assert (np.asarray(gradient)[expected == 0] == 0).all()


def test_loss_equals_that_of_torchaudio():
    """Figures of torchaudio 2.11's rnnt_loss on a CPU, rounded to its float32 accuracy."""
    logits = np.sin(np.arange(2 * 5 * 4 * 6)).reshape(2, 5, 4, 6).astype(np.float32)
    labels = np.array([[1, 5, 2], [3, 3, 0]], np.int32)
    batch = (logits, np.array([5, 4]), labels, np.array([3, 2]))
    loss, _, gradient = loss_and_gradient(*batch)
    np.testing.assert_allclose(loss, TORCHAUDIO_LOSS, atol=1e-5)
    np.testing.assert_allclose(gradient[0, 0, 0], TORCHAUDIO_FIRST, atol=1e-6)
    np.testing.assert_allclose(gradient[1, 2, 1], TORCHAUDIO_INNER, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_long_utterance_stays_accurate(scale):
    """300 frames and 80 labels, alignments with probabilities down to exp(-20,000)."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((1, 300, 81, V)) * scale).astype(np.float32)
    labels = rng.integers(1, V, (1, 80)).astype(np.int32)
    loss, _, gradient = loss_and_gradient(logits, np.array([300]), labels, np.array([80]))
    value, expected = forward_backward(logits[0], labels[0])
    np.testing.assert_allclose(loss[0], value, rtol=1e-6)
    np.testing.assert_allclose(gradient[0], expected, atol=1e-4)


@given(batches(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
@settings(deadline=None, max_examples=30)
def test_padding_changes_nothing(batch, garbage):
    logits, logit_lengths, labels, label_lengths = batch
    loss, feasible, gradient = loss_and_gradient(*batch)
    wide = np.full((B + 1, T + 3, U + 3, V), garbage, np.float32)
    wide_labels = np.full((B + 1, U + 2), -7, np.int32)
    for i in range(B):
        true = i, slice(logit_lengths[i]), slice(label_lengths[i] + 1)
        wide[true] = logits[true]
        wide_labels[i, : label_lengths[i]] = labels[i, : label_lengths[i]]
    padded = loss_and_gradient(
        wide, np.append(logit_lengths, 0), wide_labels, np.append(label_lengths, 0)
    )
    np.testing.assert_allclose(padded[0][:B], loss, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(padded[1], np.append(feasible, False))
    np.testing.assert_allclose(padded[2][:B, :T, : U + 1], gradient, atol=1e-5)
    assert (padded[2][:, T:] == 0).all() and (padded[2][:, :, U + 1 :] == 0).all()
    assert padded[0][B] == 0 and (padded[2][B] == 0).all()


def test_utterance_without_frames_is_masked_even_if_not_finite():
    logits = np.zeros((B, T, U + 1, V), np.float32)
    logits[0] = np.nan
    batch = (logits, np.array([0, T, 1]), np.ones((B, U), np.int32), np.array([2, 2, U]))
    loss, feasible, gradient = loss_and_gradient(*batch)
    np.testing.assert_array_equal(feasible, [False, True, True])
    assert loss[0] == 0 and (gradient[0] == 0).all()
    assert (loss[1:] > 0).all() and np.isfinite(gradient).all()
    # One frame holds any number of labels: a single alignment of them and a blank.
    np.testing.assert_allclose(loss[2], (U + 1) * np.log(V), rtol=1e-6)


def test_feasible_utterance_does_not_hide_a_nan():
    logits = np.zeros((B, T, U + 1, V), np.float32)
    logits[0, 2, 1, 1] = np.nan
    batch = (logits, np.full(B, T), np.full((B, U), 2, np.int32), np.full(B, 2))
    loss = loss_and_gradient(*batch)[0]
    assert np.isnan(loss[0]) and np.isfinite(loss[1:]).all()


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, U + 1, V)), jnp.bfloat16)
    rest = (np.full(B, T), np.full((B, U), 2, np.int32), np.full(B, 3))
    loss, _, gradient = loss_and_gradient(logits, *rest)
    expected, _, _ = loss_and_gradient(logits.astype(jnp.float32), *rest)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loss, expected)


def test_vmap_equals_single():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((2, B, T, U + 1, V)).astype(np.float32)
    labels = rng.integers(1, V, (2, B, U)).astype(np.int32)
    logit_lengths, label_lengths = rng.integers(0, T + 1, (2, B)), rng.integers(0, U + 1, (2, B))
    batch = (logits, logit_lengths, labels, label_lengths)
    mapped = jax.jit(jax.vmap(loss_and_gradient))(*batch)
    for i in range(2):
        single = loss_and_gradient(*(x[i] for x in batch))
        for got, expected in zip(mapped, single, strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-5)


CONTEXT, BOUND = 2, 3
# Scores by frame, for every two last labels: what a joint network might give.
TABLE = (T, V, V, V)


@functools.partial(jax.jit, static_argnames=("bound",))
def decode(table, lengths, bound=BOUND):
    """Utterance i's frame t is the number i * T + t, which looks up its scores."""
    b = len(table)
    frames = jnp.arange(b * T, dtype=jnp.float32).reshape(b, T, 1)
    flat = table.reshape(b * T, V, V, V)

    def score(frame, last):
        return flat[frame[:, 0].astype(int), last[:, 0], last[:, 1]]

    return greedy_decode(score, frames, lengths, CONTEXT, bound)


def slow_decode(table, length, bound=BOUND):
    written = []
    for t in range(length):
        for _ in range(bound):
            before = [0, 0, *written]
            best = int(np.argmax(table[t, before[-2], before[-1]]))
            if best == 0:
                break
            written.append(best)
    return written


@given(st.integers(0, 2**31), st.floats(-1, 2))
@settings(deadline=None, max_examples=40)
def test_greedy_decode_equals_a_plain_loop(seed, for_blank):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((B, *TABLE)).astype(np.float32)
    table[..., 0] += for_blank
    lengths = rng.integers(0, T + 1, B)
    tokens, counts = decode(table, lengths)
    assert tokens.shape == (B, T * BOUND) and tokens.dtype == counts.dtype == jnp.int32
    for i in range(B):
        expected = slow_decode(table[i], lengths[i])
        assert tokens[i, : counts[i]].tolist() == expected
        assert (tokens[i, counts[i] :] == 0).all()
    apart = jax.vmap(lambda t, n: decode(t[None], n[None]))(table, lengths)
    np.testing.assert_array_equal(apart[0][:, 0], tokens)
    np.testing.assert_array_equal(apart[1][:, 0], counts)


def test_greedy_decode_writes_no_more_than_its_bound_and_ignores_padding():
    table = np.zeros((1, *TABLE), np.float32)
    table[..., 3] = 1.0  # never a blank
    table[0, 4:] = np.nan
    for bound in (1, 3):
        tokens, counts = decode(table, np.array([4]), bound=bound)
        assert counts[0] == 4 * bound and tokens.shape == (1, T * bound)
        assert (tokens[0, : counts[0]] == 3).all() and (tokens[0, counts[0] :] == 0).all()
