import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.compression import costs
from fedasr.compression.partial import Subset, partial_training
from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.models import layers, peft
from fedasr.models.peft.kind import insert, leaves_by_path
from fedasr.models.peft.lora import A, B
from fedasr.models.recogniser import make_recogniser
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler
from fedasr.streams import Stream, seed_key
from fedasr.training.central import CentralTraining

SMALL = {"dim": 16, "heads": 2, "mlp": 24, "features": 8, "vocab": 6}
MODELS = {
    "transformer": SMALL | {"blocks": 2},
    "conformer": SMALL | {"blocks": 1, "conv_kernel": 3, "stride": 2},
}
ADDING = ("lora", "ffa_lora", "adapter")
EVERYTHING = (r"kernel$",)


def config_of(kind, **changes):
    return peft.PeftConfig(kind=kind, rank=3, alpha=6.0, bottleneck=4, **changes)


@functools.cache
def base(name="transformer", **options):
    return make_recogniser(name, MODELS[name] | options)


@functools.cache
def start(name="transformer"):
    return jax.device_get(base(name).init(seed_key(0, Stream.INIT)))


def adapted(config, name="transformer", **options):
    recogniser = peft.adapt(base(name, **options), config)
    return recogniser, peft.completed(start(name), config, seed_key(0, Stream.INIT))


def batch(count=2, frames=21):
    rng = np.random.default_rng(1)
    return {
        "features": rng.normal(size=(count, frames, 8)).astype(np.float32),
        "features_length": np.full(count, frames, np.int32),
        "labels": rng.integers(1, 6, (count, 3)).astype(np.int32),
        "labels_length": np.full(count, 3, np.int32),
        "mask": np.ones(count, bool),
    }


def scores(recogniser, params):
    return jax.jit(recogniser.scores)(params, batch())[0]


def moved(params, kind):
    """What is added, all of it away from where it began."""
    rng = np.random.default_rng(2)
    patterns = peft.trained_patterns(config_of(kind))
    paths = leaves_by_path(params)
    return insert(
        params,
        {
            path: rng.normal(size=leaf.shape).astype(np.float32) / 3
            for path, leaf in paths.items()
            if any(re.search(pattern, path) for pattern in patterns)
        },
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", peft.KINDS)
def test_an_adapted_model_begins_as_the_base(kind, name):
    recogniser, params = adapted(config_of(kind), name)
    theirs = leaves_by_path(start(name))
    ours = leaves_by_path(params)
    assert all(np.array_equal(ours[path], leaf) for path, leaf in theirs.items())
    assert (ours.keys() > theirs.keys()) == (kind in ADDING)
    if kind in ADDING:
        np.testing.assert_allclose(
            scores(recogniser, params), scores(base(name), start(name)), atol=1e-6
        )
        # As soon as what is added has moved, it is another model.
        other = scores(recogniser, moved(params, kind))
        assert np.abs(other - scores(recogniser, params)).max() > 1e-2


def test_initialisation_gives_the_same():
    recogniser, params = adapted(config_of("lora"))
    drawn = jax.device_get(recogniser.init(seed_key(0, Stream.INIT)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), drawn, params)


FAMILIES = {
    **{name: (name, options) for name, options in MODELS.items()},
    "transducer": ("transformer", MODELS["transformer"] | {"objective": "rnnt", "joint_dim": 8}),
    "scanned": ("transformer", MODELS["transformer"] | {"scan_blocks": True}),
    "wav2vec2": (
        "wav2vec2",
        {"dim": 16, "blocks": 2, "heads": 2, "mlp": 8, "convolutions": "8,8", "widths": "10,3"}
        | {"strides": "5,4", "position_width": 8, "position_groups": 2, "vocab": 6},
    ),
    "whisper": (
        "whisper",
        {"dim": 16, "blocks": 1, "heads": 2, "mlp": 8, "decoder_blocks": 1, "decoder_heads": 2}
        | {"decoder_mlp": 8, "positions": 50, "longest": 8, "vocab": 9, "start": "5", "end": 4},
    ),
    "parakeet": (
        "parakeet",
        {"dim": 16, "blocks": 1, "heads": 2, "mlp": 8, "mels": 16, "channels": 4, "vocab": 6}
        | {"blank": 5},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_whatever_is_added_is_used(kind, family):
    """Of every family: what no loss depends on would be noised and sent for nothing."""
    name, options = FAMILIES[family]
    plain = make_recogniser(name, options)
    recogniser = peft.adapt(plain, config_of(kind))
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    examples = batch()
    if name in ("wav2vec2", "whisper", "parakeet"):
        examples["features"] = np.ones((2, 21, 160), np.int16)
        examples["samples"] = np.full(2, 21 * 160, np.int32)
    before = leaves_by_path(jax.eval_shape(plain.init, jax.random.key(0)))
    added = [path for path in leaves_by_path(shapes) if path not in before]

    def loss(params, batch):
        return recogniser.loss(params, batch, jax.random.key(0))[0]

    def decode(params, batch):
        return recogniser.evaluate(params, batch)[:2]

    for function in (loss, decode):
        traced = jax.make_jaxpr(function)(shapes, examples).jaxpr
        _, used = jax.interpreters.partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
        of = dict(zip(leaves_by_path(shapes), used, strict=False))
        assert added and [path for path in added if not of[path]] == [], function


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lora", "ffa_lora"])
def test_merged_scores_as_factors_do(kind, name):
    """Of every matrix, front end and output layer among them."""
    config = config_of(kind, patterns=EVERYTHING)
    recogniser, params = adapted(config, name)
    params = moved(params, kind)
    merged = peft.merged(params, config)
    assert jax.tree.structure(merged) == jax.tree.structure(start(name))
    path = "block_0/attention/qkv/kernel"
    of = leaves_by_path(params)
    by_hand = of[path] + 6.0 / 3 * np.float64(of[path + A]) @ np.float64(of[path + B])
    np.testing.assert_allclose(leaves_by_path(merged)[path], by_hand, atol=1e-5)
    np.testing.assert_allclose(
        scores(recogniser, params), scores(base(name), merged), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_gradient_checkpointing_computes_the_same_gradients(kind):
    config = config_of(kind)
    found = []
    for remat in ("none", "block"):
        recogniser, params = adapted(config, remat=remat)
        params = moved(params, kind)
        gradients = jax.jit(
            jax.grad(lambda p, r=recogniser: r.loss(p, batch(), jax.random.key(0))[0])
        )
        found.append(leaves_by_path(gradients(params)))
    added = [path for path in found[0] if A in path or "adapter/" in path]
    assert added
    for path in added:
        assert np.abs(found[0][path]).max() > 0
        np.testing.assert_allclose(found[1][path], found[0][path], rtol=1e-3, atol=1e-6)


def test_what_one_matrix_draws_does_not_depend_on_the_others():
    few = adapted(config_of("lora", patterns=("block_1/attention/qkv",)))[1]
    many = adapted(config_of("ffa_lora"))[1]
    path = "block_1/attention/qkv/kernel" + A
    drawn = leaves_by_path(many)
    np.testing.assert_array_equal(leaves_by_path(few)[path], drawn[path])
    assert np.abs(drawn[path]).max() <= 16**-0.5
    factors = [drawn[name] for name in drawn if name.endswith(A)]
    assert len({x.tobytes() for x in factors}) == len(factors) == 4
    other = peft.completed(start(), config_of("lora"), seed_key(1, Stream.INIT))
    assert not np.array_equal(leaves_by_path(other)[path], drawn[path])


# Which variables a kind trains, of the transformer of two blocks.
TRAINED = {
    "head": r"^output/",
    "bitfit": r"/bias$",
    "lora": r"block_\d/attention/(qkv|out)/kernel_lora_[ab]$",
    "ffa_lora": r"block_\d/attention/(qkv|out)/kernel_lora_b$",
    "adapter": r"block_\d/adapter/(up|down)/(kernel|bias)$",
}


@pytest.mark.parametrize("kind", TRAINED)
def test_noise_and_clipping_touch_trained_variables_only(kind):
    """A private round with a decaying server: the rest keeps every bit, and has no state at all."""
    config = config_of(kind)
    params = adapted(config)[1]
    subset = Subset("fixed", peft.trained_patterns(config), setting="peft")
    trained = subset.trained(params)
    names = [path for path, yes in zip(leaves_by_path(params), trained, strict=True) if yes]
    assert names == [path for path in leaves_by_path(params) if re.search(TRAINED[kind], path)]

    def loss(params, batch, key):  # of every variable, and quick to compile
        total = sum(jnp.sum(jnp.square(x - 1.0)) for x in jax.tree.leaves(params))
        return total * jnp.mean(batch["x"]), {}

    corpus = InMemoryCorpus({f"u{i}": [{"x": np.float32([1.0])}] * 2 for i in range(4)})
    simulation = Simulation(
        corpus,
        Mechanism(0.5, "uniform", 0.1, FixedSizeSampler(4, 2, seed=0)),
        FedAvg(
            partial_training(lambda f: local_training(f, optax.sgd(0.1)), loss, subset),
            optax.adamw(0.1, weight_decay=0.1),
            trained=trained,
        ),
        Batching(2, steps=1),
        hardware=Hardware(jax.devices()[:1]),
        seed=0,
    )
    state = simulation.init(params)
    assert simulation.layer_names(params) == names
    leaves = jax.tree.leaves(state.opt_state)
    moments = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    size = sum(x.size for x, yes in zip(jax.tree.leaves(params), trained, strict=True) if yes)
    assert sum(x.size for x in moments) == 2 * size
    for state, metrics in simulation.run(state, 1):  # noqa: B007
        assert len(metrics.norms) == len(names) and all(metrics.norms > 0)
    after = leaves_by_path(state.params)
    for path, before in leaves_by_path(params).items():
        assert np.array_equal(after[path], before) == (path not in names), path


def test_central_training_of_a_part():
    config = config_of("ffa_lora")
    _, params = adapted(config)
    trained = Subset("fixed", peft.trained_patterns(config)).trained(params)

    def loss(params, batch, key):
        return sum(jnp.sum(jnp.square(x - 1.0)) for x in jax.tree.leaves(params)), {}

    corpus = InMemoryCorpus({"u": [{"x": np.float32([1.0])}] * 2})
    central = CentralTraining(
        corpus, loss, optax.adamw(0.1, weight_decay=0.1), 2, seed=0, trained=trained, buckets=({},)
    )
    for state, _, _ in central.run(central.init(params), 2):  # noqa: B007
        pass
    after = leaves_by_path(state.params)
    for (path, before), yes in zip(leaves_by_path(params).items(), trained, strict=True):
        assert np.array_equal(after[path], before) != yes, path


def wav2vec2_base():
    """Shapes of wav2vec 2.0 base with a head of 32 characters (arXiv 2006.11477), by hand."""
    shapes = {"feature_projection/norm": (512,), "feature_projection/kernel": (512, 768)}
    for i, (width, inputs) in enumerate([(10, 1), *4 * [(3, 512)], *2 * [(2, 512)]]):
        shapes[f"conv_{i}/kernel"] = (width, inputs, 512)
    shapes |= {"positions/kernel": (128, 48, 768), "lm_head/kernel": (768, 32)}
    for i in range(12):
        for name in ("q", "k", "v", "out"):
            shapes[f"layers_{i}/attention/{name}_proj/kernel"] = (768, 768)
        shapes[f"layers_{i}/feed_forward/up/kernel"] = (768, 3072)
        shapes[f"layers_{i}/feed_forward/down/kernel"] = (3072, 768)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return insert({}, leaves)


@pytest.mark.parametrize(("kind", "share"), [("lora", 0.0063), ("ffa_lora", 0.0032)])
def test_upload_of_rank_8_is_below_a_hundredth(kind, share):
    config = peft.PeftConfig(kind=kind)
    shapes = wav2vec2_base()
    full = costs.sent_size(shapes)
    assert 93e6 < full < 95e6
    adaption = jax.eval_shape(lambda p: peft.completed(p, config, jax.random.key(0)), shapes)
    subset = Subset("fixed", peft.trained_patterns(config))
    sent = costs.sent_size(adaption, subset.trained(adaption))
    assert sent == 12 * 4 * 8 * 768 * (2 if kind == "lora" else 1)
    assert sent / full == pytest.approx(share, rel=0.05) and sent / full <= 0.01


WIDE = {"dim": 128, "heads": 2, "mlp": 512, "features": 8, "vocab": 6, "blocks": 3}


def chunk_memory(config, chunk, kind=None):
    """Bytes of a vmapped chunk of clients beside its arguments, and of the frozen variables."""
    if kind is not None:
        fold, peft.KINDS[config.kind] = peft.KINDS[config.kind], kind
    try:
        recogniser = peft.adapt(make_recogniser("transformer", WIDE), config)
    finally:
        if kind is not None:
            peft.KINDS[config.kind] = fold
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    subset = Subset("fixed", peft.trained_patterns(config))
    update = partial_training(
        lambda loss: local_training(loss, optax.sgd(0.1)), recogniser.loss, subset
    )

    def of_chunk(params, batches, keys):
        def one(batches, key):
            return update(params, batches, jnp.int32(2), key, jnp.int32(2))

        deltas, metrics = jax.vmap(one)(batches, keys)
        return jax.tree.map(lambda x: x.sum(0), deltas), metrics.loss.sum()

    one = jax.tree.map(lambda x: np.broadcast_to(x, (chunk, 2, *x.shape)), batch(1, 9))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), chunk))
    compiled = jax.jit(of_chunk).lower(shapes, one, keys).compile().memory_analysis()
    leaves = zip(jax.tree.leaves(shapes), subset.trained(shapes), strict=True)
    frozen = sum(x.size * x.dtype.itemsize for x, yes in leaves if not yes)
    return compiled.temp_size_in_bytes, frozen


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("frozen_dtype", peft.FROZEN)
def test_the_frozen_variables_are_there_once_at_a_chunk_of_eight(frozen_dtype):
    """Eight clients take little more than one, of all that is as large as the model."""
    if frozen_dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA before JAX 0.11 widens all frozen matrices at once")
    config = peft.PeftConfig(kind="ffa_lora", rank=2, frozen_dtype=frozen_dtype)
    (one, frozen), (eight, _) = (chunk_memory(config, chunk) for chunk in (1, 8))
    assert eight - one < frozen
    # In the lower precision, the float32 of all layers is never there at once, either.
    assert eight < frozen


@pytest.mark.usefixtures("optimized")
def test_merged_matrices_would_be_there_once_a_client():
    """What the test before sees if the sums are made; it is why they are not."""
    config = peft.PeftConfig(kind="ffa_lora", rank=2)
    real = peft.KINDS["ffa_lora"]
    merging = dataclasses.replace(real, fold=real.merged)
    eight, frozen = chunk_memory(config, 8, merging)
    assert eight > 2 * frozen


def test_frozen_matrices_in_bfloat16():
    config = config_of("lora", frozen_dtype="bfloat16", also=("^output/",))
    recogniser, params = adapted(config)
    for path, leaf in leaves_by_path(params).items():
        rounded = leaf.ndim == 2 and not path.endswith((A, B)) and path != "output/kernel"
        assert leaf.dtype == (jnp.bfloat16 if rounded else jnp.float32), path
    found = scores(recogniser, params)
    assert found.dtype == jnp.float32
    exact = scores(base(), start())
    assert 1e-6 < np.abs(found - exact).max() < 0.1
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(peft.merged(params, config)))


def test_mistakes_are_one_line():
    cases = {
        "peft.kind='ia3'": config_of("ia3"),
        "peft.rank and peft.bottleneck": peft.PeftConfig("lora", rank=0),
        "nothing is frozen": config_of("full", frozen_dtype="bfloat16"),
        "peft.frozen_dtype='int8'": config_of("lora", frozen_dtype="int8"),
        "'decoder' matches no matrix": config_of("lora", patterns=("decoder",)),
        "'block_7' matches no block": config_of("adapter", patterns=("block_7",)),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            jax.eval_shape(peft.adapt(base(), config).init, jax.random.key(0))
        assert "\n" not in str(caught.value)
    recurrent = make_recogniser("recurrent", {"features": 4, "units": 6, "layers": 1, "vocab": 5})
    with pytest.raises(UserError, match="needs an encoder of blocks"):
        jax.eval_shape(peft.adapt(recurrent, config_of("adapter")).init, jax.random.key(0))
    with pytest.raises(UserError, match="adapters are layers of their own"):
        peft.merged(start(), config_of("adapter"))


def test_the_library_peft_computes_the_same():
    """Forward, gradients of both factors, and the merged weights, of the same numbers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    library = pytest.importorskip("peft", reason="the library peft is not installed")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 16)).astype(np.float32)
    model = layers.FeedForward(24)
    config = config_of("lora", patterns=EVERYTHING)
    params = model.init(jax.random.key(0), jnp.asarray(x), None)["params"]
    params = moved(peft.completed(params, config, jax.random.key(1)), "lora")
    kind = peft.kind_of(config)

    def ours(params):
        out = model.apply({"params": kind.fold(params, config)}, x, None)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.grad(ours, has_aux=True)(params)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(16, 24, bias=False)
            self.down = torch.nn.Linear(24, 16, bias=False)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    wanted = library.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"])
    theirs = library.get_peft_model(Net(), wanted)
    flat = leaves_by_path(params)

    def transposed(array):
        return torch.tensor(np.asarray(array).T.copy())

    def layer(name):
        return getattr(theirs.base_model.model, name)

    with torch.no_grad():
        for name in ("up", "down"):
            layer(name).base_layer.weight.copy_(transposed(flat[f"{name}/kernel"]))
            layer(name).lora_A["default"].weight.copy_(transposed(flat[f"{name}/kernel{A}"]))
            layer(name).lora_B["default"].weight.copy_(transposed(flat[f"{name}/kernel{B}"]))
    found = theirs(torch.tensor(x))
    torch.sin(found).sum().backward()
    np.testing.assert_allclose(out, found.detach().numpy(), rtol=1e-5, atol=1e-5)
    by_path = leaves_by_path(gradients)
    for name in ("up", "down"):
        for factor, theirs_of in ((A, layer(name).lora_A), (B, layer(name).lora_B)):
            np.testing.assert_allclose(
                by_path[f"{name}/kernel{factor}"],
                theirs_of["default"].weight.grad.numpy().T,
                rtol=1e-4,
                atol=1e-5,
            )
    merged = leaves_by_path(peft.merged(params, config))
    whole = theirs.merge_and_unload()
    for name in ("up", "down"):
        np.testing.assert_allclose(
            merged[f"{name}/kernel"], getattr(whole, name).weight.detach().numpy().T, atol=1e-5
        )
