import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from fedasr.errors import UserError
from fedasr.models import recurrent
from fedasr.models.recogniser import make_recogniser, recurrent_recogniser
from fedasr.models.recurrent import PUBLISHED, SPEECH, RecurrentConfig

TINY = RecurrentConfig(
    vocab=6, features=5, units=4, layers=2, subsample=2, window=3, stride=2, l2=0.0
)
BOTH = dataclasses.replace(TINY, bidirectional=True, day_layer="softsign", day_dropout=0.2)
AS_PUBLISHED = dataclasses.replace(BOTH, **PUBLISHED)
LENGTHS = np.int32([17, 24])


def random_params(config, seed=1):
    shapes = jax.eval_shape(lambda k: recurrent.init(k, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(-0.6, 0.6, x.shape).astype(np.float32), shapes)


def features(time=24, seed=0):
    return np.random.default_rng(seed).normal(size=(2, time, 5)).astype(np.float32)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), 2)


def gru_by_hand(p, x, backwards):
    """One utterance, frame by frame, from the equations."""

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    u = len(p["recurrent_bias"])
    h, out = p.get("initial", np.zeros(u)), np.zeros((len(x), u))
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        w, r = x[t] @ p["input"] + p["bias"], h @ p["recurrent"]
        update, reset = sigmoid(w[:u] + r[:u]), sigmoid(w[u : 2 * u] + r[u : 2 * u])
        new = np.tanh(w[2 * u :] + reset * (r[2 * u :] + p["recurrent_bias"]))
        h = out[t] = update * h + (1 - update) * new
    return out


def by_hand(params, x, config):
    """Scores of one utterance [time, channels], without noise, in numpy."""
    p = jax.tree.map(np.asarray, params)
    radius = 6
    if config.taps:  # those of the public code: of at least a hundredth, from a filter of one
        one = gaussian_filter1d(np.eye(100)[50], config.smoothing)
        assert (one > 0.01).sum() == config.taps
        radius = config.taps // 2
    x = gaussian_filter1d(x, config.smoothing, axis=0, mode="constant", radius=radius)
    x = x[:: config.subsample] @ p["day"]["kernel"] + p["day"]["bias"]
    if config.day_layer == "softsign":
        x = x / (1 + np.abs(x))
    if config.windows == "inside":
        starts = range(0, len(x) - config.window + 1, config.stride)
        padded = x
    else:
        starts = range(0, len(x), config.stride)
        padded = np.pad(x, (((config.window - 1) // 2, config.window), (0, 0)))
    x = np.stack([padded[i : i + config.window].ravel() for i in starts])
    for i in range(config.layers):
        states = [gru_by_hand(p["shared"][f"gru_{i}"], x, False)]
        if config.bidirectional:
            states.append(gru_by_hand(p["shared"][f"gru_{i}_back"], x, True))
        x = np.concatenate(states, axis=1)
    return x @ p["shared"]["head"]["kernel"] + p["shared"]["head"]["bias"]


@pytest.mark.parametrize("config", [TINY, BOTH, AS_PUBLISHED])
def test_scores_agree_with_the_equations_whatever_the_padding_holds(config):
    params, x = random_params(config), features(40)
    run = jax.jit(lambda p, x, n: recurrent.forward(p, x, n, None, config))
    for time in (24, 40):
        logits, lengths = run(params, x[:, :time], LENGTHS)
        assert lengths.tolist() == ([4, 5] if config is AS_PUBLISHED else [5, 6])
        for i, n in enumerate(LENGTHS):
            expected = by_hand(params, x[i, :n], config)
            np.testing.assert_allclose(logits[i, : lengths[i]], expected, atol=2e-6)


def test_training_does_not_depend_on_padding():
    params, x = random_params(BOTH), features(40)
    run = jax.jit(lambda p, x, n, k: recurrent.forward(p, x, n, k, BOTH))
    short, _ = run(params, x[:, :24], LENGTHS, keys())
    long, _ = run(params, np.where(np.arange(40)[:, None] < 24, x, 9.0), LENGTHS, keys())
    np.testing.assert_allclose(short[1], long[1, :6], atol=1e-6)
    assert np.abs(short - run(params, x[:, :24], LENGTHS, keys(1))[0]).max() > 1e-2


def test_noise_has_the_stated_sizes():
    x = jnp.zeros((2, 4000, 3))
    only = dict.fromkeys(("white_noise", "offset_noise", "walk_noise"), 0.0)
    draw = {
        name: np.asarray(
            recurrent.noisy(x, keys(), dataclasses.replace(TINY, **only | {name: 0.5}))
        )
        for name in only
    }
    assert draw["white_noise"].std(axis=1) == pytest.approx(np.full((2, 3), 0.5), rel=0.1)
    assert np.ptp(draw["offset_noise"], axis=1).max() == 0
    assert len(np.unique(draw["offset_noise"])) == 6
    steps = np.diff(draw["walk_noise"], axis=1)
    assert steps.std(axis=1) == pytest.approx(np.full((2, 3), 0.5), rel=0.1)
    assert np.abs(np.corrcoef(steps[0].T) - np.eye(3)).max() < 0.1


def test_drift_mixes_an_utterances_channels_by_one_matrix():
    quiet = dict.fromkeys(("white_noise", "offset_noise", "walk_noise"), 0.0)
    config = dataclasses.replace(TINY, **quiet, drift_noise=0.5)
    size = 40
    x = jnp.broadcast_to(jnp.eye(size), (2, size, size))  # what comes out is the matrix itself
    mixing = np.asarray(recurrent.noisy(x, keys(), config)) - np.eye(size)
    assert mixing.std(axis=(1, 2)) == pytest.approx(np.full(2, 0.5 / np.sqrt(size)), rel=0.05)
    assert np.abs(mixing.mean(axis=(1, 2))).max() < 0.01
    assert np.abs(mixing[0] - mixing[1]).max() > 0.1  # each utterance has its own
    # The same matrix for every bin, however many there are.
    y = np.random.default_rng(0).normal(size=(2, 7, size)).astype(np.float32)
    expected = y @ (np.eye(size) + mixing)
    np.testing.assert_allclose(recurrent.noisy(y, keys(), config), expected, atol=1e-5)


def test_channels_are_dropped_for_a_whole_utterance():
    quiet = dict.fromkeys(("white_noise", "offset_noise", "walk_noise"), 0.0)
    config = dataclasses.replace(TINY, **quiet, channel_dropout=0.25)
    kept = np.asarray(recurrent.noisy(jnp.ones((2, 3, 4000)), keys(), config))
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert np.ptp(kept, axis=1).max() == 0
    assert kept.mean(axis=(1, 2)) == pytest.approx(np.full(2, 0.75), abs=0.03)
    assert (kept[0] != kept[1]).any()


def test_noise_comes_before_smoothing():
    noisy = dataclasses.replace(TINY, white_noise=1.0, offset_noise=0.0, walk_noise=0.0, dropout=0)
    plain = dataclasses.replace(noisy, smoothing=0.0, subsample=1, white_noise=0.0)
    params = random_params(TINY)
    lengths = np.int32([24, 24])
    noise_keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys())
    smoothed = recurrent.smooth(recurrent.noisy(jnp.zeros((2, 24, 5)), noise_keys, noisy), 2.0, 2)
    expected, _ = recurrent.forward(params, smoothed, np.int32([12, 12]), None, plain)
    found, _ = recurrent.forward(params, np.zeros((2, 24, 5)), lengths, keys(), noisy)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_initial_parameters():
    params = recurrent.init(jax.random.key(0), BOTH)
    np.testing.assert_array_equal(params["day"]["kernel"], np.eye(5))
    for name in ("gru_0", "gru_0_back", "gru_1", "gru_1_back"):
        gates = np.split(np.asarray(params["shared"][name]["recurrent"]), 3, axis=1)
        for gate in gates:
            np.testing.assert_allclose(gate @ gate.T, np.eye(4), atol=1e-6)
        assert np.abs(gates[0] - gates[1]).max() > 0.1
    np.testing.assert_array_equal(
        recurrent.init(jax.random.key(0), BOTH)["shared"]["head"]["kernel"],
        params["shared"]["head"]["kernel"],
    )


@pytest.mark.slow
def test_every_parameter_learns_and_clients_can_be_mapped():
    config = dataclasses.replace(BOTH, layers=1, l2=1e-3)
    recogniser = recurrent_recogniser(config)
    batch = {
        "features": features(),
        "features_length": LENGTHS,
        "labels": np.int32([[1, 2], [3, 0]]),
        "labels_length": np.int32([2, 1]),
        "mask": np.array([True, True]),
    }
    clients = [random_params(config, seed) for seed in (1, 2)]
    gradient = jax.jit(jax.grad(lambda p, b, k: recogniser.loss(p, b, k)[0]))
    each = [gradient(p, batch, jax.random.key(3)) for p in clients]
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(each[0]))
    stacked = jax.tree.map(lambda *a: np.stack(a), *clients)
    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(stacked, batch, jax.random.key(3))
    for i, alone in enumerate(each):
        jax.tree.map(
            lambda m, a: np.testing.assert_allclose(m[i], a, atol=2e-5),  # noqa: B023
            mapped,
            alone,
        )
    # The penalty is in the loss that is trained, not in the one that is reported.
    quiet = dataclasses.replace(
        config, dropout=0, day_dropout=0, white_noise=0, offset_noise=0, walk_noise=0
    )
    recogniser = recurrent_recogniser(quiet)
    trained, _ = recogniser.loss(clients[0], batch, jax.random.key(0))
    reported = recogniser.evaluate(clients[0], batch)[2]
    squares = sum(np.sum(a**2) for a in jax.tree.leaves(clients[0]) if a.ndim == 2)
    assert float(trained) == pytest.approx(float(reported.mean() + 1e-3 * squares), rel=1e-5)


def test_initial_parameters_as_published():
    """As Keras draws them: one orthogonal matrix for all gates, the first layer's initial state."""
    config = dataclasses.replace(AS_PUBLISHED, units=16)
    shared = recurrent.init(jax.random.key(0), config)["shared"]
    for name in ("gru_0", "gru_0_back", "gru_1", "gru_1_back"):
        matrix = np.asarray(shared[name]["recurrent"])
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-5)
        assert np.linalg.norm(matrix) == pytest.approx(4)  # sqrt(u), not sqrt(3 u)
    assert [name for name, part in shared.items() if "initial" in part] == ["gru_0", "gru_0_back"]
    start = np.asarray(shared["gru_0"]["initial"])
    assert 0.2 < np.abs(start).max() <= np.sqrt(6 / 17)
    assert not np.array_equal(start, shared["gru_0_back"]["initial"])


def test_the_penalty_is_on_the_published_matrices():
    config = dataclasses.replace(AS_PUBLISHED, l2=0.5)
    params = random_params(config)
    matrices = [params["day"]["kernel"]]
    matrices += [
        params["shared"][f"gru_{i}{end}"]["input"] for i in (0, 1) for end in ("", "_back")
    ]
    expected = 0.5 * sum((a**2).sum() for a in matrices)
    assert float(recurrent.penalty(params, config)) == pytest.approx(float(expected), rel=1e-6)


def test_the_published_walk_is_over_the_channels():
    quiet = {"white_noise": 0.0, "offset_noise": 0.0, "walk_noise": 0.5}
    config = dataclasses.replace(TINY, **quiet, walk_axis="channels")
    walk = np.asarray(recurrent.noisy(jnp.zeros((2, 4000, 3)), keys(), config))
    spread = walk.std(axis=1)
    assert spread == pytest.approx(np.tile(0.5 * np.sqrt([1, 2, 3]), (2, 1)), rel=0.1)
    assert np.abs(np.corrcoef(walk[0, :-1, 0], walk[0, 1:, 0])[0, 1]) < 0.1  # bins are independent


def test_an_even_number_of_taps_is_that_of_the_pytorch_port():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = np.random.default_rng(0).normal(size=(1, 30, 1)).astype(np.float32)
    at = np.arange(20) - 9.5
    weights = np.exp(-((at / 2) ** 2) / 2)
    kernel = torch.tensor(weights / weights.sum(), dtype=torch.float32)[None, None]
    expected = torch.nn.functional.conv1d(torch.tensor(x[:, :, 0])[:, None], kernel, padding="same")
    found = recurrent.smooth(jnp.asarray(x), 2.0, taps=20)
    np.testing.assert_allclose(found[0, :, 0], expected[0, 0].numpy(), atol=1e-6)


def test_a_sentence_shorter_than_a_window_has_no_frames():
    params = random_params(AS_PUBLISHED)
    logits, lengths = recurrent.forward(params, features(4), np.int32([4, 3]), None, AS_PUBLISHED)
    assert logits.shape[1] == 1 and lengths.tolist() == [0, 0]


def test_published_sizes():
    def count(config):
        return sum(
            x.size
            for x in jax.tree.leaves(
                jax.eval_shape(lambda k: recurrent.init(k, config), jax.random.key(0))
            )
        )

    def layer(inputs, u):
        return 3 * u * (inputs + u + 1) + 2 * u

    n = 192
    assert count(RecurrentConfig()) == n * n + n + layer(n, 512) + layer(512, 512) + 513 * 32
    expected = 256 * 257 + layer(32 * 256, 1024) + 4 * layer(1024, 1024) + 1025 * 41
    assert count(SPEECH) == expected
    assert count(dataclasses.replace(SPEECH, **PUBLISHED)) == expected - 4 * 1024


def test_mistakes():
    with pytest.raises(UserError, match="day_layer"):
        make_recogniser("recurrent", {"day_layer": "deep"})
    with pytest.raises(UserError, match="no option"):
        make_recogniser("recurrent", {"depth": 3})
    for name in ("recurrent_init", "initial_states", "walk_axis", "l2_on", "windows"):
        with pytest.raises(UserError, match=name):
            RecurrentConfig(**{name: "other"})
    with pytest.raises(UserError, match="taps"):
        RecurrentConfig(taps=-1)
    with pytest.raises(UserError, match="units"):
        RecurrentConfig(units=0)
    with pytest.raises(UserError, match="white_noise"):
        RecurrentConfig(white_noise=-1.0)
