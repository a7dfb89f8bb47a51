"""The front end's kernels, interpreted on the CPU, compute what its operations do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels import frontend_accelerated as accelerated
from fedasr.kernels.low_rank import LowRank
from fedasr.models import layers

FEATURES, UNITS = 5, 24


def plan_of(width=7, stride=3, left=3, dtype="float32"):
    return accelerated.Plan(width, stride, left, jnp.dtype(dtype), True)


def weights_of(seed=0, width=7, features=FEATURES):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((width * features, UNITS)) / (width * features) ** 0.5
    arrays = np.array([1.3, -0.2]), kernel, 0.3 * rng.standard_normal(UNITS)
    return accelerated.Weights(*(jnp.asarray(x, jnp.float32) for x in arrays))


def drawn(t, lengths, plan, seed=1):
    """Features, large beyond their lengths, and slopes by what comes out."""
    rng = np.random.default_rng(seed)
    features = 3 + 2 * rng.standard_normal((len(lengths), t, FEATURES))
    features[np.arange(t) >= np.asarray(lengths)[:, None]] = 1e6
    slopes = rng.standard_normal((len(lengths), plan.windows(t), UNITS // 2))
    return jnp.asarray(features, jnp.float32), jnp.asarray(slopes, jnp.float32)


def by_weights(function, plan, weights, features, lengths, slopes):
    """What comes out, and the derivatives by weights."""

    def way(weights):
        return function(plan, weights, features, jnp.asarray(lengths))

    out, pull = jax.vjp(jax.jit(way), weights)
    return out, pull(slopes.astype(out.dtype))


def same(found, expected, share=2e-5):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=share * float(jnp.abs(b).max()))


@pytest.mark.parametrize("windows", [(7, 3, 3), (4, 4, 0), (3, 2, 0), (2, 3, 0), (5, 1, 2)])
@pytest.mark.parametrize(("t", "lengths"), [(48, (48, 20)), (37, (37, 0, 1, 36))])
def test_values_and_gradients_are_the_references(windows, t, lengths):
    plan, weights = plan_of(*windows), weights_of(width=windows[0])
    features, slopes = drawn(t, lengths, plan)
    ways = accelerated.gated, accelerated.reference
    found, expected = (by_weights(f, plan, weights, features, lengths, slopes) for f in ways)
    same(found, expected)
    assert all(float(jnp.abs(x).max()) > 0.05 for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("scale", [1.3, 0.0])
def test_they_are_the_modules(scale):
    """Also where nothing of the features is left."""
    lengths, plan = (48, 20), plan_of()
    weights = weights_of()._replace(affine=jnp.asarray([scale, 0.4]))
    features, slopes = drawn(48, lengths, plan)

    def modules(plan, weights, features, lengths):
        norm = {"params": dict(zip(("scale", "bias"), weights.affine, strict=True))}
        normed = layers.MaskedNorm().apply(norm, features, lengths, method="affine")
        front_end = layers.WindowedDense(UNITS, plan.width, plan.stride)
        params = {"params": {"kernel": weights.kernel, "bias": weights.bias}}
        return jax.nn.glu(front_end.apply(params, normed, method="of_normed"))

    ways = accelerated.gated, modules
    same(*(by_weights(f, plan, weights, features, lengths, slopes) for f in ways))


def test_padding_does_not_matter():
    plan, weights = plan_of(), weights_of()
    features, slopes = drawn(48, (30, 17), plan)
    short = by_weights(accelerated.gated, plan, weights, features[:, :30], (30, 17), slopes[:, :10])
    slopes = slopes.at[:, 10:].set(0)
    out, by = by_weights(accelerated.gated, plan, weights, features, (30, 17), slopes)
    same((out[:, :10], by), short)


def test_half_precision_rounds_no_more_than_others_do():
    """Over some seeds: derivatives by scale and bias are two numbers of large sums."""
    half, ways = plan_of(dtype="bfloat16"), (accelerated.gated, accelerated.reference)
    errors = []
    for seed in range(6):
        weights = weights_of(seed)
        args = weights, *drawn(48, (48, 20), half, seed)
        args = *args[:2], (48, 20), args[2]
        exact = by_weights(accelerated.reference, plan_of(), *args)
        found = [by_weights(way, half, *args) for way in ways]
        assert found[0][0].dtype == jnp.bfloat16
        leaves = zip(*map(jax.tree.leaves, (exact, *found)), strict=True)
        errors.append(
            [
                [float(jnp.linalg.norm(x - leaf) / jnp.linalg.norm(leaf)) for x in both]
                for leaf, *both in leaves
            ]
        )
    for kernel, others in np.sqrt(np.mean(np.square(errors), axis=0)):
        assert 1e-4 < kernel < 0.2 and kernel < 1.5 * others


def test_features_have_derivatives_too():
    """As who reconstructs them asks for; together with those of weights."""
    plan, weights, lengths = plan_of(), weights_of(), jnp.asarray([30, 17])
    features, slopes = drawn(30, (30, 17), plan)

    def of(function):
        def way(weights, features):
            return jnp.sum(function(plan, weights, features, lengths) * slopes)

        return jax.grad(way, argnums=(0, 1))(weights, features)

    same(of(accelerated.gated), of(accelerated.reference))


def test_a_frozen_matrix_has_no_derivative(monkeypatch):
    """As where only vectors are trained: the kernel has no room for it."""
    plan, weights, lengths = plan_of(), weights_of(), jnp.asarray([30, 17])
    features, slopes = drawn(30, (30, 17), plan)
    asked, real = set(), accelerated._call
    monkeypatch.setattr(accelerated, "_call", lambda *args: asked.add(len(args[-1])) or real(*args))

    def of(names):
        def way(part):
            out = accelerated.gated(plan, weights._replace(**part), features, lengths)
            return jnp.sum(out * slopes)

        return jax.grad(way)({name: getattr(weights, name) for name in names})

    every = of(weights._fields)
    assert asked == {1, 3}  # what comes out forwards and backwards
    asked.clear()
    found = of(("affine", "bias"))
    assert asked == {1, 2}
    same(found, {name: every[name] for name in found})


def test_clients_side_by_side_are_each_by_itself():
    """With weights of their own, or some of all."""
    plan, c = plan_of(), 3
    every = jax.tree.map(lambda *x: jnp.stack(x), *map(weights_of, range(c)))
    lengths = jnp.asarray([[30, 17], [4, 30], [0, 29]])
    features, slopes = zip(*(drawn(30, n, plan, i) for i, n in enumerate(lengths)), strict=True)
    features, slopes = jnp.stack(features), jnp.stack(slopes)

    def both(weights, features, lengths, slopes):
        return by_weights(accelerated.gated, plan, weights, features, lengths, slopes)

    for shared in (), ("kernel",), ("kernel", "bias", "affine"):
        weights = every._replace(**{name: getattr(every, name)[0] for name in shared})
        axes = accelerated.Weights(*(None if n in shared else 0 for n in every._fields))
        program = jax.vmap(both, in_axes=(axes, 0, 0, 0))
        args = weights, features, lengths, slopes
        assert ("f32[1,35,24]" in str(jax.make_jaxpr(program)(*args))) == bool(shared)
        found = jax.jit(program)(*args)
        for i in range(c):
            own = weights._replace(
                **{n: getattr(every, n)[i] for n in every._fields if n not in shared}
            )
            same(jax.tree.map(lambda x: x[i], found), both(own, features[i], lengths[i], slopes[i]))  # noqa: B023


def test_which_front_ends_have_one():
    plan, weights = plan_of(), weights_of(features=80)
    assert accelerated.fits("tpu", plan, weights, 288, 80)
    assert not accelerated.fits("gpu", plan, weights, 288, 80)
    assert not accelerated.fits("", plan, weights, 288, 80)
    assert not accelerated.fits("tpu", plan, weights_of(features=129), 288, 129)
    assert not accelerated.fits("tpu", plan, weights, 50_000, 80)
    assert not accelerated.fits("tpu", plan._replace(width=17), weights_of(width=17), 288, 5)
    wide = weights._replace(kernel=jnp.zeros((560, 4096)), bias=jnp.zeros(4096))
    assert not accelerated.fits("tpu", plan, wide, 30, 80)
    assert not accelerated.fits("tpu", plan._replace(dtype="float16"), weights, 288, 80)
    low = LowRank(weights.kernel, jnp.zeros((560, 2)), jnp.zeros((2, UNITS)), 1.0)
    assert not accelerated.fits("tpu", plan, weights._replace(kernel=low), 288, 80)
    narrow = weights._replace(kernel=weights.kernel.astype(jnp.bfloat16))
    assert not accelerated.fits("tpu", plan, narrow, 288, 80)
