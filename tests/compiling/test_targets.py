"""Every kind of program compiles for a TPU and a GPU, by their own compilers, without a device.

JAX_PLATFORMS=cpu pytest -m accelerator     # with the extra `compilers`
"""

import os

import jax
import pytest

from fedasr.compiling import figures, hlo, programs, targets
from fedasr.kernels import block_accelerated
from fedasr.kernels.devices import lowered
from fedasr.models.recogniser import make_recogniser
from fedasr.training.builders import models
from fedasr.training.config import Config, default_config, resolve
from fedasr.training.logging import to_json

pytestmark = pytest.mark.accelerator
TINY = {"dim": 32, "blocks": 1, "heads": 2, "mlp": 64}
MODELS = {
    "transformer": ("transformer", TINY),
    "bfloat16": ("transformer", TINY | {"dtype": "bfloat16", "dropout": 0.1, "layer_drop": 0.1}),
    "fused attention": ("transformer", TINY | {"attention": "fused", "remat": "block"}),
    "rnnt": ("transformer", TINY | {"objective": "rnnt", "prediction_dim": 16, "joint_dim": 16}),
    "conformer": ("conformer", TINY | {"conv_kernel": 4}),
    "recurrent": ("recurrent", {"vocab": 30, "units": 16, "layers": 1}),
}
WAYS = {
    "adaptive": {"privacy.adaptive.quantile": 0.5},
    "banded": {"privacy.noise": "banded", "privacy.sampler": "shuffled", "privacy.bands": 2},
    "skellam": {"privacy.noise": "skellam"},
    "micro-batch": {"client.micro_batch": 1},
    "partial": {"partial.patterns": ("block_0",), "compression.download": "bfloat16"},
    "large batch": {"client.batch_seconds": 8.0},
    "local": {"local.patterns": ("^output/",), "privacy.enabled": False},
    "scaffold": {"algorithm": "scaffold"},
    "adam": {"server.optimizer": "adam", "client.optimizer": "adam"},
}
OF_CPU = ("attention_mean_by_output", "front_end_from_product")


def config(model="transformer", **changes):
    name, options = MODELS[model]
    found = default_config()
    found.update(cohort=4, rounds=2)
    found.privacy.deployments = ()
    found.model.name, found.model.options = name, options
    found.update_from_flattened_dict(changes)
    return Config.of(resolve(to_json(found.to_dict())))


@pytest.fixture(scope="module", params=["v5e", "h200"])
def target(request):
    found = targets.TARGETS[request.param]
    if requirement := targets.missing_wheel(found):
        pytest.skip(f"{requirement} is not installed: pip install -e '.[compilers]'")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("the compilers load with JAX_PLATFORMS=cpu in the environment only")
    targets.prepare([found])
    return found


def check(found):
    """Nothing of a program is left to the host, or made for another platform."""
    assert not found.from_host and not found.float64 and found.fits
    assert found.kernels > 0 and all(size >= 0 for size in found.memory.values())


def compiled(target, chosen, devices=1, chunk=2, **lengths):
    there = targets.devices(target, devices)
    lengths = {"seconds": 1.0, "labels_per_second": 4.0} | lengths
    return figures.measure(chosen, target, there, chunk, **lengths)


def some(names, *quick):
    """In `.ci/run` a few, all when asked for."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model", some(MODELS, "transformer"))
def test_every_model_and_objective(target, model):
    clients, server = compiled(target, config(model))
    check(clients)
    check(server)
    assert clients.flops > 0 and clients.bytes > 0 and clients.bound in clients.seconds
    assert (clients.estimate is None) or target.platform == "tpu"


@pytest.mark.parametrize("way", some(WAYS))
def test_every_way_of_a_round(target, way):
    chunk = 1 if way == "micro-batch" else 2
    for found in compiled(target, config(**WAYS[way]), chunk=chunk):
        check(found)


@pytest.mark.slow
def test_no_branch_of_the_cpu(target):
    there = targets.devices(target)
    simulation = programs.make_simulation(config(), there, 2, seconds=1.0, labels_per_second=4.0)
    traced = simulation.trace(models.variable_shapes(config()))["clients"]
    text = lowered(traced, simulation.mesh).compile().as_text()
    front_end = "front_end_backwards" if target.platform == "tpu" else "front_end_plainly"
    assert not any(name in text for name in OF_CPU) and front_end in text


@pytest.mark.parametrize("objective", ["ctc", "rnnt"])
def test_walks_of_losses_are_kernels(target, objective):
    """In programs of rounds: frames, or diagonals of the lattice, are no loop of launches."""
    there = targets.devices(target)
    chosen = config("transformer" if objective == "ctc" else "rnnt")
    simulation = programs.make_simulation(chosen, there, 2, seconds=1.0, labels_per_second=4.0)
    traced = simulation.trace(models.variable_shapes(chosen))["clients"]
    text = lowered(traced, simulation.mesh).as_text(debug_info=True)
    of_tpu = (f"{objective}_forwards", f"{objective}_backwards")
    of_gpu = ("__gpu$xla.gpu.triton", f"{objective}_walks")
    mine, others = (of_tpu, of_gpu) if target.platform == "tpu" else (of_gpu, of_tpu)
    assert all(name in text for name in mine) and not any(name in text for name in others)


@pytest.mark.slow
def test_attention_is_a_kernel_and_no_program_grows_with_the_blocks(target, monkeypatch):
    """Neither clients' nor the server's, with noise and LAMB."""
    there = targets.devices(target)
    found, sizes = [], []
    # As where matrices are too large for a TPU's kernel of whole blocks, such as those of 255M.
    monkeypatch.setattr(block_accelerated, "fits", lambda *_: False)
    for blocks in (8, 11):
        options = TINY | {
            "blocks": blocks, "scan_blocks": True, "dropout": 0.1, "generator": "hashed",
            "dtype": "bfloat16",
        }  # fmt: skip
        chosen = config(**{"model.options": options, "server.optimizer": "lamb"})
        lengths = {"seconds": 1.0, "labels_per_second": 4.0}
        simulation = programs.make_simulation(chosen, there, 1, **lengths)
        traced = simulation.trace(models.variable_shapes(chosen))
        clients, server = (
            lowered(traced[name], simulation.mesh).compile().as_text()
            for name in ("clients", "server")
        )
        sizes.append([len(text.splitlines()) for text in (clients, server)])
        assert "attention_forwards" in clients and "attention_backwards" in clients
        assert "gemm_fusion" not in clients  # of a GPU: products are cuBLAS's
        entry, step = hlo.read(clients).entry, hlo.read(clients).step
        assert sorted(loop.trips for loop in step.loops) == [blocks, blocks]
        found.append((entry.launches, step.launches, hlo.read(server).entry.launches))
        found[-1] += tuple(sorted(loop.launches for loop in step.loops))
        kernels = [loop.launches - loop.copies for loop in step.loops]
        # One of them counts the turns. Of 255M there are two less backwards.
        assert target.platform == "tpu" or max(kernels) <= 15
    # Three blocks more by themselves would be some 180. By the arrays' sizes single ones are copied
    # ahead (TPU), or summed in two stages (GPU).
    assert found[0][2:] == found[1][2:]
    assert all(abs(a - b) < 6 for a, b in zip(*found, strict=True))
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(*sizes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("v5p", "float32"), ("v5p", "bfloat16"), ("h200", "float32")]
)
def test_a_small_model_of_many_clients(name, dtype):
    """The 1.1M parameters of docs/results/compiled.md, 32 clients side by side."""
    target = targets.TARGETS[name]
    if targets.missing_wheel(target) or os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("needs the extra `compilers`, and JAX_PLATFORMS=cpu in the environment")
    targets.prepare([target])
    options = {"dim": 144, "mlp": 576, "blocks": 4, "heads": 4, "scan_blocks": True}
    options |= {"dropout": 0.0, "layer_drop": 0.0, "dtype": dtype}
    batches = {"client.batch_size": 2, "client.batch_seconds": 0.0, "client.steps": 4}
    chosen = config(**{"model.options": options, "cohort": 64} | batches)
    there = targets.devices(target)
    (found,) = figures.measure(chosen, target, there, 32, ["clients"], seconds=2.0)
    check(found)
    if name == "v5p":
        assert found.step_bytes / 32 <= 50e6 and found.launches <= 220
    else:
        assert found.launches <= 150


@pytest.mark.slow
def test_what_a_tpus_compiler_says_of_loops_takes_a_second_compilation(target):
    options = TINY | {"blocks": 8, "scan_blocks": True}
    chosen, there = config(**{"model.options": options}), targets.devices(target)
    lengths = {"seconds": 1.0, "labels_per_second": 4.0}
    (once,) = figures.measure(chosen, target, there, 1, ["clients"], **lengths)
    (twice,) = figures.measure(chosen, target, there, 1, ["clients"], turns=True, **lengths)
    assert once.accessed is once.estimate is None
    assert (twice.accessed is not None) == (target.platform == "tpu")
    assert twice.accessed is None or twice.accessed > twice.bytes / 2


def test_evaluation(target):
    recogniser = make_recogniser("transformer", TINY)
    sharding = jax.sharding.SingleDeviceSharding(targets.devices(target)[0])

    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    batch = {
        "features": shape(2, 96, 80),
        "features_length": shape(2, dtype="int32"),
        "labels": shape(2, 8, dtype="int32"),
        "labels_length": shape(2, dtype="int32"),
        "mask": shape(2, dtype="bool"),
    }
    params = jax.eval_shape(recogniser.init, jax.random.key(0))
    params = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), params)
    text = jax.jit(recogniser.evaluate).lower(params, batch).compile().as_text()
    found = hlo.read(text)
    assert not found.from_host and not found.float64


@pytest.mark.slow
def test_a_model_over_several_devices(target):
    """Four devices hold a quarter each, and in no step does one of them get the whole model.

    One utterance of half a second: what is computed of it is small beside the parameters.
    """
    if target.platform != "tpu":
        pytest.skip("collectives of GPUs need several hosts' descriptions")
    wide = {"dim": 128, "blocks": 2, "heads": 4, "mlp": 512, "scan_blocks": True}
    changes = {"model.options": wide, "chunk": 1, "client.steps": 1, "client.batch_size": 1}
    there = targets.devices(target, 4)

    def programs_of(parts, *names):
        chosen = config(**changes, model_devices=parts)
        lengths = {"seconds": 0.5, "labels_per_second": 4.0}
        return figures.measure(chosen, target, there, 1, names, **lengths)

    (whole,) = programs_of(1, "clients")
    clients, server = programs_of(4, "clients", "server")
    held = [x.memory["arguments"] + x.memory["beside"] for x in (whole, clients)]
    assert held[1] < 0.3 * held[0]
    taken = [size + x.memory["temporaries"] for size, x in zip(held, (whole, clients), strict=True)]
    assert taken[1] < 0.6 * taken[0]
    assert not whole.collectives.get("all-gather")
    shapes = models.variable_shapes(config(**changes))
    model = sum(4 * x.size for x in jax.tree.leaves(shapes))
    for split in (clients, server):  # neither at once nor bit by bit
        gathered = split.collectives.get("all-gather", hlo.Collective(0, 0, 0))
        assert split.collectives and gathered.largest < model / 4 and gathered.bytes < model


@pytest.mark.slow
def test_the_largest_chunk(target):
    chosen = config()
    there = targets.devices(target)
    assert figures.largest_chunk(chosen, target, there, 2, seconds=1.0) == 2
