"""Kernels of whole layers compile for TPUs up to the sizes that they say they fit."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import pytest

from fedasr.compiling import targets
from fedasr.kernels import block_accelerated, frontend_accelerated

pytestmark = [pytest.mark.accelerator, pytest.mark.slow]


@pytest.fixture(params=["v5e", "v5p"])
def compiled(request):
    """compiled(function, *shapes): of clients [2, ...], each by itself."""
    target = targets.TARGETS[request.param]
    if targets.missing_wheel(target) or os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("needs the extra `compilers`, and JAX_PLATFORMS=cpu in the environment")
    targets.prepare([target])
    mesh = jax.sharding.Mesh(targets.devices(target)[:1], ("x",))
    spec = jax.sharding.PartitionSpec()

    def compile_for(function, *shapes):
        def both(weights, *rest):
            *rest, slopes = rest
            out, pull = jax.vjp(lambda weights: function(weights, *rest), weights)
            return out, pull(slopes)

        divided = jax.shard_map(
            jax.vmap(both), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        where = jax.sharding.NamedSharding(mesh, spec)
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=where), shapes
        )
        return jax.jit(divided).lower(*args).compile()

    return compile_for


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def longest(fits):
    """The largest multiple of 8 frames that fits."""
    return 8 * (next(n for n in itertools.count(1) if not fits(8 * n)) - 1)


@pytest.mark.parametrize(
    ("width", "stride", "features", "dim"), [(7, 3, 80, 144), (7, 3, 80, 768), (16, 2, 20, 64)]
)
def test_the_longest_front_ends(compiled, width, stride, features, dim):
    plan = frontend_accelerated.Plan(width, stride, 3, jnp.dtype("float32"))
    shapes = (2,), (width * features, 2 * dim), (2 * dim,)
    zeros = frontend_accelerated.Weights(*(jnp.zeros(x) for x in shapes))
    t = longest(lambda t: frontend_accelerated.fits("tpu", plan, zeros, t, features))
    assert t >= 480
    compiled(
        functools.partial(frontend_accelerated.gated, plan),
        frontend_accelerated.Weights(*(array(*x) for x in shapes)),
        array(1, t, features),
        array(1, dtype="int32"),
        array(1, plan.windows(t), dim),
    )


@pytest.mark.parametrize(("heads", "dim", "hidden"), [(4, 144, 576), (4, 256, 1536), (2, 64, 3072)])
def test_the_longest_blocks(compiled, heads, dim, hidden):
    plan = block_accelerated.Plan(heads, jnp.dtype("float32"), 0.1, 0.1)
    t = longest(lambda t: block_accelerated.fits("tpu", plan, t, dim, hidden))
    assert t >= 96
    shapes = (4, dim), (dim, 3 * dim), (dim, dim), (dim, hidden), (dim, hidden)
    weights = block_accelerated.Weights(*(array(*x) for x in shapes))
    x = array(1, t, dim)
    compiled(
        functools.partial(block_accelerated.block, plan), weights, x, array(1, 10, dtype="int32"), x
    )
