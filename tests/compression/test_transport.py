import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.compression.formats import FloatFormat, packed_bytes
from fedasr.compression.transport import entropy_bytes, transport_bytes

S1E3M7 = FloatFormat(3, 7)
MATRICES = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(4)}


def test_eleven_bits_on_nine_tenths_are_the_published_saving():
    cost = transport_bytes(MATRICES, S1E3M7, S1E3M7, 0.9)
    assert cost.full == 4 * 4 * 512 * 512
    assert cost.down / cost.full == pytest.approx((0.9 * 11 + 0.1 * 32) / 32, abs=2e-5)
    assert round(cost.down / cost.full, 3) == 0.409
    assert cost.up == cost.down
    assert cost.down == pytest.approx(4 * (0.9 * (11 * 512 * 512 / 8 + 8) + 0.1 * 4 * 512 * 512))


def test_small_variables_and_what_is_not_compressed_travel_whole():
    params = MATRICES | {"b": jax.ShapeDtypeStruct((100,), jnp.float32)}
    cost = transport_bytes(params, S1E3M7)
    assert cost.down == pytest.approx(transport_bytes(MATRICES, S1E3M7).down + 400)
    assert cost.up == cost.full == 4 * (4 * 512 * 512 + 100)
    assert transport_bytes(params, S1E3M7, share=0.0).down == cost.full


def test_untrained_variables_are_received_but_not_sent():
    params = {"b": jax.ShapeDtypeStruct((8,), jnp.float32), **MATRICES}
    cost = transport_bytes(params, None, S1E3M7, 1.0, uploaded=[1.0, 0.5, 0.0, 0.0, 0.25])
    assert cost.down == cost.full
    assert cost.up == pytest.approx(32 + 0.75 * (packed_bytes(512 * 512, S1E3M7) + 8))


def test_entropy_of_few_and_of_many_codes():
    fmt = FloatFormat(4, 3)
    b = jnp.zeros(10)
    # Four codes, equally frequent: two bits each.
    few = jnp.asarray(np.tile([1.0, -1.0, 0.5, -0.5], 64).reshape(16, 16), jnp.float32)
    assert entropy_bytes({"w": few, "b": b}, fmt) == pytest.approx(256 * 2 / 8 + 8 + 40)
    assert entropy_bytes({"w": jnp.ones((16, 16)), "b": b}, fmt) == pytest.approx(8 + 40)
    many = jax.random.normal(jax.random.key(0), (128, 128))
    assert 0.6 * packed_bytes(many.size, fmt) < entropy_bytes({"w": many}, fmt)
    assert entropy_bytes({"w": many}, fmt) < packed_bytes(many.size, fmt)
