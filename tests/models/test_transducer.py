import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.errors import UserError
from fedasr.kernels.ctc import ctc_loss
from fedasr.kernels.rnnt import rnnt_loss
from fedasr.models.conformer import ConformerConfig
from fedasr.models.recogniser import MODELS, make_recogniser
from fedasr.models.transducer import Transducer
from fedasr.models.transformer import TransformerConfig
from fedasr.recipes import rnnt as rnnt_configuration

OPTIONS = {
    "vocab": 6,
    "features": 8,
    "dim": 16,
    "blocks": 1,
    "heads": 2,
    "mlp": 16,
    "stride": 2,
    "objective": "rnnt",
    "prediction_dim": 12,
    "joint_dim": 10,
}
HEAD = TransformerConfig(**OPTIONS)
# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def jit(function):
    return jax.jit(function, compiler_options=COMPILER)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.uniform(-0.5, 0.5, x.shape)), shapes)


def parameters(model):
    return random_like(jax.eval_shape(model.init, jax.random.key(0)))


def batch(seed=0):
    """Utterances of 9, 20, 0 and 6 frames; the last has more labels than encoder frames."""
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(4, 20, 8)).astype(np.float16),
        "features_length": np.int32([9, 20, 0, 6]),
        "labels": np.int32([[1, 2, 3, 0], [4, 5, 5, 1], [1, 0, 0, 0], [5, 3, 3, 2]]),
        "labels_length": np.int32([3, 4, 1, 4]),
        "mask": np.ones(4, bool),
    }


@pytest.fixture(scope="module")
def head():
    """A transducer: its parameters and encoder outputs [2, 5, joint_dim]."""
    encoded = np.random.default_rng(1).normal(size=(2, 5, 10)).astype(np.float32)
    shapes = jax.eval_shape(
        Transducer(HEAD).init, jax.random.key(0), encoded, jnp.zeros((2, 3), int)
    )
    return random_like(shapes), encoded


def test_scores_depend_on_the_frame_and_the_last_labels_alone(head):
    params, encoded = head
    labels = np.int32([[1, 2, 3, 4], [5, 4, 3, 2]])
    score = jit(Transducer(HEAD).apply)
    scores = np.asarray(score(params, encoded, labels))
    assert scores.shape == (2, 5, 5, 6)
    for changed in range(4):
        other = labels.copy()
        other[0, changed] = 5
        differs = np.abs(np.asarray(score(params, encoded, other)) - scores).max((1, 3))
        expected = np.zeros((2, 5), bool)
        expected[0, changed + 1 : changed + 3] = True  # what has written it, and the one after
        np.testing.assert_array_equal(differs > 1e-4, expected)
    moved = encoded.copy()
    moved[1, 3] += 1.0
    differs = np.abs(np.asarray(score(params, moved, labels)) - scores).max((2, 3))
    np.testing.assert_array_equal(np.argwhere(differs > 1e-4), [[1, 3]])


def test_decoding_scores_are_those_of_the_lattice(head):
    params, encoded = head
    labels = np.int32([[1, 2, 3, 4], [5, 4, 3, 2]])
    model = Transducer(HEAD)
    lattice = jit(model.apply)(params, encoded, labels)
    score = jit(lambda p, *args: model.apply(p, *args, method="score"))
    for u in range(5):
        last = np.concatenate([np.zeros((2, 2), np.int32), labels], axis=1)[:, u : u + 2]
        for t in range(5):
            np.testing.assert_allclose(
                score(params, encoded[:, t], last), lattice[:, t, u], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_encoder_keeps_its_parameters(name):
    shapes = {
        objective: jax.eval_shape(
            make_recogniser(name, OPTIONS | {"objective": objective}).init, jax.random.key(0)
        )
        for objective in ("ctc", "rnnt")
    }
    own = shapes["rnnt"].pop("transducer")
    assert shapes["rnnt"].pop("output")["kernel"].shape == (16, 10)
    assert shapes["ctc"].pop("output")["kernel"].shape == (16, 6)
    assert shapes["rnnt"] == shapes["ctc"]
    count = sum(leaf.size for leaf in jax.tree.leaves(own))
    assert count == (2 * 6 * 12 + 12) + 12 * 10 + (10 * 6 + 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("float32")}


def test_loss_of_each_utterance_and_the_share_of_ctc():
    options = OPTIONS | {"ctc_weight": 0.25}
    model = make_recogniser("transformer", options)
    params, data = parameters(model), batch()
    config_type, encoder = MODELS["transformer"]
    rest = {name: value for name, value in params.items() if name != "transducer"}

    def by_hand(params, data):
        features = data["features"].astype(jnp.float32)
        encoded, frames = encoder(config_type(**options)).apply(
            {"params": rest}, features, data["features_length"]
        )
        head = Transducer(config_type(**options))
        own = {"params": params["transducer"]}
        labels = data["labels"], data["labels_length"]
        rnnt, feasible = rnnt_loss(head.apply(own, encoded, labels[0]), frames, *labels)
        ctc, alignable = ctc_loss(
            head.apply(own, encoded, method="ctc_scores"), frames, *labels
        )  # fmt: skip
        return rnnt, feasible, ctc, alignable

    rnnt, feasible, ctc, alignable = jit(by_hand)(params, data)
    np.testing.assert_array_equal(feasible, [True, True, False, True])
    np.testing.assert_array_equal(alignable, [True, True, False, False])
    mean, aux = jit(model.loss)(params, data, jax.random.key(0))
    assert aux == {"utterances": 3, "infeasible": 1}
    assert mean == pytest.approx(float(np.sum(0.75 * rnnt + 0.25 * ctc) / 3), rel=1e-5)
    # Evaluation reports RNN-T alone.
    _, _, losses, valid = jit(model.evaluate)(params, data)
    np.testing.assert_array_equal(valid, feasible)
    np.testing.assert_allclose(losses, rnnt, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_padding_and_other_clients_do_not_matter(name):
    """As training sees it: gradients of clients side by side, one of them padded with garbage."""
    model = make_recogniser(name, OPTIONS | {"ctc_weight": 0.25})
    params, data = parameters(model), batch()
    wide = {
        "features": np.full((5, 28, 8), np.nan, np.float16),
        "features_length": np.int32([9, 20, 0, 6, 28]),
        "labels": np.full((5, 7), 4, np.int32),
        "labels_length": np.int32([3, 4, 1, 4, 7]),
        "mask": np.array([True, True, True, True, False]),
    }
    for i, (frames, length) in enumerate(zip([9, 20, 0, 6], [3, 4, 1, 4], strict=True)):
        wide["features"][i, :frames] = data["features"][i, :frames]
        wide["labels"][i, :length] = data["labels"][i, :length]
    wide["features"][4] = 3.0
    other = wide | {"labels": wide["labels"] % 5 + 1}
    gradient = jax.value_and_grad(model.loss, has_aux=True)
    key = jax.random.key(3)
    (loss, _), alone = jit(gradient)(params, data, key)
    clients = jax.tree.map(lambda *x: np.stack(x), wide, other)
    each = jax.tree.map(lambda x: np.stack([x, x]), params)
    together = jit(jax.vmap(gradient, in_axes=(0, 0, None)))(each, clients, key)
    assert together[0][0][0] == pytest.approx(float(loss), rel=1e-5)
    assert abs(together[0][0][1] - loss) > 1e-2
    for got, expected in zip(*map(jax.tree.leaves, (together[1], alone)), strict=True):
        assert np.abs(expected).max() > 1e-5
        np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_but_does_not_store(head):
    model, exact = (make_recogniser("conformer", OPTIONS | {"dtype": d}) for d in DTYPES)
    params, data = parameters(exact), batch()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    losses = [jit(m.evaluate)(params, data)[2] for m in (model, exact)]
    assert losses[0].dtype == jnp.float32
    assert 0 < np.abs(losses[0] - losses[1]).max() < 0.05 * np.max(losses[1])
    scores = jax.eval_shape(
        Transducer(dataclasses.replace(HEAD, dtype="bfloat16")).apply,
        *head,
        jax.ShapeDtypeStruct((2, 3), jnp.int32),
    )
    assert scores.dtype == jnp.bfloat16


DTYPES = ("bfloat16", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_learns_to_write_what_it_hears(name):
    """Repeats, more labels than frames, a silent utterance: what CTC could not write in part."""
    model = make_recogniser(name, OPTIONS)
    params, data = model.init(jax.random.key(0)), batch()
    data["labels_length"][0] = 0
    optimizer = optax.adam(0.02)

    @jit
    def train(params):
        def step(carry, _):
            params, state = carry
            gradients, _ = jax.grad(model.loss, has_aux=True)(params, data, jax.random.key(0))
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[0][0]

    tokens, counts, losses, valid = jit(model.evaluate)(train(params), data)
    written = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    assert written == [[], [4, 5, 5, 1], [], [5, 3, 3, 2]]
    assert losses.max() < 0.5 and losses[2] == 0 and not valid[2]


def test_configurations():
    for name, config_type in (("transformer", TransformerConfig), ("conformer", ConformerConfig)):
        config = rnnt_configuration.get_config(f"model={name}")
        assert config.model.name == name
        assert config_type(**config.model.options).objective == "rnnt"
        make_recogniser(config.model.name, config.model.options)
    with pytest.raises(UserError, match=r"model='rnn'"):
        rnnt_configuration.get_config("model=rnn")


@pytest.mark.parametrize("config_type", [TransformerConfig, ConformerConfig])
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"objective": "las"}, "one of"),
        ({"context": 0}, "context must be at least 1"),
        ({"max_symbols": 0}, "max_symbols must be at least 1"),
        ({"joint_dim": 0}, "joint_dim must be at least 1"),
        ({"ctc_weight": 1.0}, "ctc_weight"),
        ({"ctc_weight": -0.1}, "ctc_weight"),
    ],
)
def test_mistaken_options(config_type, mistake, message):
    with pytest.raises(UserError, match=message):
        config_type(**mistake)
