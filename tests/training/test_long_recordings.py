"""Recordings of ten minutes: memory by the compiled program, values as without the detours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import PooledBatcher, bucket_padding, fewest_buckets, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.kernels import attention, ctc
from fedasr.models import transducer
from fedasr.models.recogniser import Recogniser, make_recogniser
from fedasr.text import CharTokenizer
from fedasr.training import central, evaluation
from fedasr.training.evaluation import Evaluator, evaluation_buckets

FRAMES, LABELS = 60_000, 9_000  # of ten minutes of read speech
SMALL = dict(dim=16, blocks=1, heads=2, mlp=32)


def shapes_of(frames, labels, batch=1):
    arrays = {
        "features": ((batch, frames, 80), jnp.float16),
        "features_length": ((batch,), jnp.int32),
        "labels": ((batch, labels), jnp.int32),
        "labels_length": ((batch,), jnp.int32),
        "mask": ((batch,), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in arrays.items()}


@pytest.mark.parametrize(
    ("name", "options"), [("transformer", {}), ("conformer", dict(dim=32, blocks=1, heads=4))]
)
def test_ten_minutes_are_evaluated_in_little_memory(name, options):
    recogniser = make_recogniser(name, options)
    params = jax.eval_shape(recogniser.init, jax.random.key(0))
    program = jax.jit(recogniser.evaluate).lower(params, shapes_of(FRAMES, LABELS)).compile()
    analysis = program.memory_analysis()
    assert analysis.temp_size_in_bytes + analysis.argument_size_in_bytes < 1 << 30


def test_a_streamed_loss_is_the_loss():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 40, 6)) * 3, jnp.float32)
    labels = jnp.asarray(rng.integers(1, 6, (5, 12)), jnp.int32).at[1].set(2)
    lengths, counts = jnp.array([40, 30, 7, 0, 21]), jnp.array([12, 12, 6, 0, 0])
    loss = jax.jit(ctc.ctc_loss, static_argnums=4)
    whole, feasible = loss(logits, lengths, labels, counts, False)
    streamed, same = loss(logits, lengths, labels, counts, True)
    np.testing.assert_array_equal(feasible, same)
    assert feasible.sum() >= 3
    np.testing.assert_allclose(whole, streamed, rtol=1e-5)


def test_detours_change_no_transcript(monkeypatch):
    recogniser = make_recogniser("transformer", SMALL)
    params = recogniser.init(jax.random.key(1))
    rng = np.random.default_rng(0)
    batch = {
        "features": rng.normal(size=(2, 90, 80)).astype(np.float32),
        "features_length": np.int32([90, 45]),
        "labels": rng.integers(1, 30, (2, 8)).astype(np.int32),
        "labels_length": np.int32([8, 5]),
        "mask": np.ones(2, bool),
    }
    plain = jax.device_get(jax.jit(recogniser.evaluate)(params, batch))
    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(attention, "_QUERIES", 8)
    monkeypatch.setattr("fedasr.models.objectives._STREAMED", 1)
    detour = jax.device_get(jax.jit(lambda *args: recogniser.evaluate(*args))(params, batch))
    for one, other in zip(plain, detour, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


ENCODE = CharTokenizer().encode


def lengths_corpus(lengths, long=None):
    """Utterances whose features spell their text in their first frames."""
    users, letters = {}, "abcdefghij"
    for i, frames in enumerate([*lengths, *([long] if long else [])]):
        text = "".join(letters[int(c)] for c in str(i))
        features = np.zeros((frames, 1), np.float16)
        features[: len(text), 0] = ENCODE(text)
        users.setdefault(f"u{i % 5}", []).append({"features": features, "labels": ENCODE(text)})
    return InMemoryCorpus(users, ragged=("features", "labels"))


def fake(params, batch):
    tokens = batch["features"][..., 0].astype(jnp.int32)
    counts = jnp.sum(tokens > 0, axis=1)
    valid = batch["mask"]
    return tokens, counts, jnp.where(valid, params * counts, 0.0), valid


def make_fake():
    """With a function of its own: compiled programs are kept by function."""
    return Recogniser(init=None, loss=None, evaluate=lambda *args: fake(*args))


@pytest.mark.parametrize("devices", [1, 2])
def test_evaluation_is_bounded_by_frames_and_compiles_few_shapes(monkeypatch, devices):
    rng = np.random.default_rng(0)
    corpus = lengths_corpus(rng.integers(100, 1500, 40), long=60_000)
    seen = []
    batches = evaluation.eval_batches

    def watched(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            seen.append(batch["features"].shape[:2])
            yield batch

    monkeypatch.setattr(evaluation, "eval_batches", watched)
    buckets = evaluation_buckets([corpus])
    evaluator = Evaluator(make_fake(), buckets, 32, jax.devices()[:devices])
    scores = evaluator(jnp.float32(1), corpus)
    assert scores["wer"] == 0 and scores["loss"] == pytest.approx((10 + 2 * 31) / 41)
    # The longest comes alone, even with two devices; what is computed together is bounded.
    assert (1, 60_000) in seen
    assert max(size * frames for size, frames in seen) <= 60_000
    assert max(s * f for s, f in seen if f < 30_000) <= evaluation.BATCH_FRAMES
    assert evaluator.compilations() == len(set(seen)) <= len(buckets) <= 6
    # One shape for all, as for ordinary utterances before: the same error rates.
    rest = lengths_corpus(rng.integers(100, 1500, 40))
    whole = Evaluator(make_fake(), make_buckets([rest], 1, evaluation.MULTIPLES), 32)
    assert whole(jnp.float32(1), rest)["wer"] == 0


def squares(params, batch, key):
    mean = batch["features"].sum((1, 2)) / jnp.maximum(batch["features_length"], 1)
    return jnp.sum(jnp.where(batch["mask"], (params * mean - 1) ** 2, 0.0)), {}


@pytest.mark.parametrize("sizes", [dict(batch_size=8), dict(batch_size=None, frames=6000)])
def test_central_training_pads_little_and_compiles_few_programs(sizes):
    lengths = np.random.default_rng(0).lognormal(6, 0.6, 400).astype(int) + 30
    corpus = lengths_corpus(np.minimum(lengths, 3000))
    training = central.CentralTraining(
        corpus,
        squares,
        optax.sgd(1e-3),
        seed=0,
        multiples=evaluation.MULTIPLES,
        devices=jax.devices()[:1],
        select=("features",),
        **sizes,
    )
    *_, (state, steps, _) = training.run(training.init(jnp.float32(0)), 45)
    assert steps == 45 and np.isfinite(float(state.params))
    assert training.padding(45).fraction < 0.15
    assert 1 < training.compilations() <= central.MOST_BUCKETS
    # To the longest of all it would be most of the work.
    one = make_buckets([corpus], 1, evaluation.MULTIPLES)
    options = {k: v for k, v in sizes.items() if v}
    assert PooledBatcher(corpus, one, 0, **options).padding(45).fraction > 0.4


def test_padding_is_what_the_batches_hold():
    corpus = lengths_corpus(np.random.default_rng(1).integers(10, 300, 37))
    buckets = make_buckets([corpus], 3, evaluation.MULTIPLES)
    for sizes in (dict(batch_size=4), dict(frames=900)):
        batcher = PooledBatcher(corpus, buckets, 3, multiple=2, **sizes)
        real = computed = 0
        for step in range(11):
            batch = batcher.batch(step)
            real += int(batch["features_length"][batch["mask"]].sum())
            computed += batch["features"].shape[0] * batch["features"].shape[1]
        assert batcher.padding(11) == (real, computed)


def test_as_few_buckets_as_pad_little():
    alike = lengths_corpus([100] * 20)
    assert len(fewest_buckets([alike], 0.3, 6, evaluation.MULTIPLES)) == 1
    varied = lengths_corpus(np.random.default_rng(0).integers(10, 3000, 60))
    buckets = fewest_buckets([varied], 0.2, 6, evaluation.MULTIPLES)
    assert 1 < len(buckets) <= 6
    assert bucket_padding([varied], buckets).fraction <= 0.2
    assert bucket_padding([varied], buckets[-1:]).fraction > 0.2
    assert fewest_buckets([], 0.2, 6) == ()


def test_a_joint_network_that_cannot_fit_is_refused_with_its_size(monkeypatch):
    options = SMALL | dict(objective="rnnt", vocab=1001, joint_dim=8, prediction_dim=8)
    recogniser = make_recogniser("transformer", options)
    params = jax.eval_shape(recogniser.init, jax.random.key(0))
    monkeypatch.setattr(transducer, "_memory", lambda: 1 << 30)
    evaluate = jax.jit(recogniser.evaluate)
    with pytest.raises(UserError, match=r"2\.3 GiB \(3 utterances x 2000 frames x 101 ") as error:
        evaluate.lower(params, shapes_of(6000, 100, batch=3))
    assert "1.0 GiB are there" in str(error.value) and "\n" not in str(error.value)
    evaluate.lower(params, shapes_of(600, 10))
