"""Which implementation is in a program follows from its platform, not from where it is lowered."""

import functools
import pathlib
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import fedasr
from fedasr.fusion.methods import score_all
from fedasr.kernels import devices
from fedasr.kernels.attention import attention
from fedasr.models.recogniser import make_recogniser

SIZES = dict(vocab=6, features=8, dim=16, blocks=1, heads=2, mlp=16)
BATCH = {
    "features": jax.ShapeDtypeStruct((2, 20, 8), jnp.float32),
    "features_length": jax.ShapeDtypeStruct((2,), jnp.int32),
    "labels": jax.ShapeDtypeStruct((2, 3), jnp.int32),
    "labels_length": jax.ShapeDtypeStruct((2,), jnp.int32),
    "mask": jax.ShapeDtypeStruct((2,), jnp.bool_),
}
CPU, OTHERS = "cpu", ("tpu", "cuda", "rocm")
OF_CPU = {"attention_mean_by_output", "front_end_from_product"}
OF_OTHERS = {"attention_mean_by_weights", "front_end_plainly"}


def training_step(name="transformer", **options):
    """The traced loss and gradient of a model, by its parameters, and the arguments."""
    recogniser = make_recogniser(name, SIZES | options)
    params = jax.eval_shape(recogniser.init, jax.random.key(0))
    step = jax.value_and_grad(recogniser.loss, has_aux=True)
    return step, (params, BATCH, jax.eval_shape(lambda: jax.random.key(0)))


def text(traced, platform):
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def ways(traced, platform):
    found = text(traced, platform)
    return {way for way in OF_CPU | OF_OTHERS if way in found}


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_training_step_has_the_ways_of_its_platform(remat):
    step, arguments = training_step(remat=remat)
    traced = jax.jit(step).trace(*arguments)
    assert ways(traced, CPU) == OF_CPU
    for platform in OTHERS:
        assert ways(traced, platform) == OF_OTHERS
    exported = jax.export.export(jax.jit(step), platforms=("tpu",))(*arguments)
    assert exported.platforms == ("tpu",)


def test_also_for_clients_side_by_side_and_in_turns():
    step, (params, batch, key) = training_step()
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), params)

    def side_by_side(params, batch, key):
        return jax.vmap(step, (0, None, None))(params, batch, key)

    def in_turns(params, batch, key):
        return jax.lax.map(lambda p: step(p, batch, key), params)

    for function in (side_by_side, in_turns):
        traced = jax.jit(function).trace(stacked, batch, key)
        assert ways(traced, CPU) == OF_CPU
        assert ways(traced, "tpu") == OF_OTHERS


def test_compiled_for_a_cpu_nothing_is_left_to_choose():
    values = np.ones((4, 2, 7, 2, 4), np.float32)
    mask = np.ones((2, 7), bool)

    def total(q, k, v, outer):
        return jnp.sum(attention(q, k, v, mask, None) * outer)

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*values).compile().as_text()
    assert "conditional" not in compiled


def fake_cudnn(monkeypatch):
    """JAX as on a machine with cuDNN: it writes its calls, which nobody can run here."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(stablehlo, "cuda_versions", versions)


def test_fused_attention_is_cudnns_in_programs_for_cuda_alone(monkeypatch):
    fake_cudnn(monkeypatch)
    step, arguments = training_step(attention="fused", dtype="bfloat16")
    traced = jax.jit(step).trace(*arguments)
    calls = {p: set(re.findall(r"__cudnn\$\w+", text(traced, p))) for p in (CPU, *OTHERS)}
    assert calls == {CPU: set(), "tpu": set(), "rocm": set(), "cuda": calls["cuda"]}
    assert len(calls["cuda"]) == 2  # forwards and backwards
    # Not in single precision, which cuDNN has not.
    step, arguments = training_step(attention="fused")
    assert "__cudnn$" not in text(jax.jit(step).trace(*arguments), "cuda")


@pytest.mark.parametrize(("there", "heads"), [(False, 2), (True, 4)])
def test_without_cudnn_a_program_for_cuda_warns(monkeypatch, recwarn, there, heads):
    """Where its version is not known, or where it does not take the size of a head."""
    if there:
        fake_cudnn(monkeypatch)
    step, arguments = training_step(attention="fused", dtype="bfloat16", heads=heads)
    traced = jax.jit(step).trace(*arguments)
    for platform in (CPU, "tpu"):
        text(traced, platform)
    assert not [w for w in recwarn if "cuDNN" in str(w.message)]
    with pytest.warns(UserWarning, match="fused attention is compiled for CUDA without cuDNN's"):
        found = text(traced, "cuda")
    assert "__cudnn$" not in found


def test_models_are_scored_in_turns_on_a_cpu_alone():
    models = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    score = functools.partial(score_all, lambda model: jnp.tanh(model))
    traced = jax.jit(score).trace(models)
    assert "stablehlo.while" in text(traced, CPU)
    for platform in OTHERS:
        assert "stablehlo.while" not in text(traced, platform)


def test_compilers_get_options_of_their_platform_unless_flags_name_them(monkeypatch):
    """On GPUs products are a library's; on a v5p operations may use all of its fast memory."""
    of_gpu, of_tpu = "xla_gpu_enable_triton_gemm", "xla_tpu_scoped_vmem_limit_kib"
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)

    def options(platform, kind=""):
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        return devices.compiler_options(
            types.SimpleNamespace(devices=np.array([device], dtype=object))
        )

    assert options("cpu") == {}
    assert options("cuda") == options("gpu") == {of_gpu: False}
    assert options("tpu", "TPU v5") == {of_tpu: 128 * 1024}
    assert options("tpu", "TPU v5 lite") == options("tpu", "TPU v6 lite") == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{of_gpu}=true")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{of_tpu}=32768")
    assert options("cuda") == options("tpu", "TPU v5") == {}


def test_nothing_asks_which_machine_compiles():
    sources = pathlib.Path(fedasr.__file__).parent.rglob("*.py")
    asking = [p.name for p in sources if re.search(r"default_backend|get_backend", p.read_text())]
    assert asking == []
