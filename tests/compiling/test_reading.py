"""What is read from programs' texts and jaxprs, against programs whose figures are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from fedasr.cli import compile as compiler
from fedasr.compiling import figures, hlo, programs, targets
from fedasr.compiling.flops import matrix_flops
from fedasr.errors import UserError
from fedasr.training.builders import models
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

MODULE = """HloModule jit_step, is_scheduled=true

%body.1 (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %f.1 = f32[8,4]{1,0} fusion(%x.1), kind=kLoop, calls=%fused
  %c.1 = bf16[8,4]{1,0} copy(%f.1)
  ROOT %t.1 = (s32[], f32[8,4]{1,0}) tuple(%i.1, %f.1)
}

%counted (p.2: (s32[], f32[8,4])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %p.2 = (s32[], f32[8,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt = pred[] compare(%i.2, %seven), direction=LT
}

%unknown (p.3: (s32[], f32[8,4])) -> pred[] {
  %p.3 = (s32[], f32[8,4]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  ROOT %lt.3 = pred[] compare(%i.3, %i.3), direction=LT
}

%outer (p.4: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.4 = (s32[], f32[8,4]) parameter(0)
  %w.4 = (s32[], f32[8,4]{1,0}) while(%p.4), condition=%counted, body=%body.1
  %w.5 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%w.4), condition=%c, body=%body.1, KNOWN
  %x.4 = f32[8,4]{1,0} get-tuple-element(%w.5), index=1
  %r.4 = f32[8,4]{1,0} all-reduce(%x.4), to_apply=%sum
  ROOT %t.4 = (s32[], f32[8,4]{1,0}) tuple(%p.4, %r.4)
}

ENTRY %main (a: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%unknown, body=%outer
}
"""


MODULE = MODULE.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"},"x":"("}')


def test_loops_and_launches_of_a_text():
    found = hlo.read(MODULE)
    assert found.entry.launches == 0 and found.entry.exchanges == ()
    assert found.entry.collectives == {"all-reduce": hlo.Collective(1, 128, 128)}
    (outer,) = found.entry.loops
    assert outer is found.step and outer.trips is None and outer.launches == 1
    assert [(loop.trips, loop.launches) for loop in outer.loops] == [(7, 2), (5, 2)]
    assert outer.total == 1 + 7 * 2 + 5 * 2
    # The fusion reads and writes 128 bytes, the copy reads 128 and writes 64.
    assert outer.loops[0].moved == 256 + 192
    assert outer.moved == 256  # an all-reduce in and out
    assert [loop.trips for loop in found.entry.every_loop()] == [None, 7, 5]
    assert outer.total_moved == 256 + (256 + 192) * (7 + 5)
    assert not found.from_host and not found.float64


PLACES = """HloModule jit_step

%slicing (p.0: f32[9,8,4], p.1: s32[]) -> f32[1,8,4] {
  %p.0 = f32[9,8,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %less = s32[] subtract(%p.1, %zero)
  ROOT %s.0 = f32[1,8,4]{2,1,0} dynamic-slice(%p.0, %less, %zero, %zero)
}

%inner (p.2: f32[9,8,4], p.3: s32[]) -> f32[8,4] {
  %p.2 = f32[9,8,4]{2,1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %s.1 = f32[1,8,4]{2,1,0} dynamic-slice(%p.2, %p.3, %p.3, %p.3)
  %s.2 = f32[8,4]{1,0} bitcast(%s.1)
  ROOT %n.1 = f32[8,4]{1,0} negate(%s.2)
}

%writing (p.4: f32[9,8,4], p.5: f32[9,8,4], p.6: s32[]) -> f32[9,8,4] {
  %p.4 = f32[9,8,4]{2,1,0} parameter(0)
  %p.5 = f32[9,8,4]{2,1,0} parameter(1)
  %p.6 = s32[] parameter(2)
  %f.9 = f32[8,4]{1,0} fusion(%p.5, %p.6), kind=kLoop, calls=%inner
  %b.9 = f32[1,8,4]{2,1,0} bitcast(%f.9)
  ROOT %u.9 = f32[9,8,4]{2,1,0} dynamic-update-slice(%p.4, %b.9, %p.6, %p.6, %p.6)
}

ENTRY %main (a: f32[9,8,4], b: f32[9,8,4], c: s32[]) -> f32[9,8,4] {
  %a = f32[9,8,4]{2,1,0} parameter(0)
  %b = f32[9,8,4]{2,1,0} parameter(1)
  %c = s32[] parameter(2)
  %x.0 = ((f32[9,8,4], s32[]), f32[1,8,4], u32[]) fusion-start(%a, %c), calls=%slicing
  %x.1 = f32[1,8,4]{2,1,0} fusion-done(%x.0)
  ROOT %y = f32[9,8,4] fusion(%a, %b, %c), kind=kLoop, calls=%writing
}
"""


def test_only_the_part_of_an_array_that_is_sliced_or_written_counts():
    found = hlo.read(PLACES).entry
    part, index = 8 * 4 * 4, 4
    assert found.moved == 2 * part + index + 2 * part + index
    assert (found.launches, found.copies) == (2, 1)


def test_what_stays_in_a_tpus_own_memory_is_not_moved():
    """An array comes near, is read and written there, and one result of two goes back."""
    text = """HloModule jit_step

%fused (p.0: f32[8,4], p.1: f32[2,4]) -> (f32[8,4], f32[8,4]) {
  %p.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[2,4]{1,0:T(8,128)} parameter(1)
  %n.0 = f32[8,4]{1,0:T(8,128)} negate(%p.0)
  %n.1 = f32[2,4]{1,0:T(8,128)} negate(%p.1)
  ROOT %t.0 = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)}) tuple(%n.0, %n.0)
}

ENTRY %main (a: f32[8,4], b: f32[2,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[2,4]{1,0:T(8,128)} parameter(1)
  %c = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%c)
  %f = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}) fusion(%d, %b), calls=%fused
  ROOT %g = f32[8,4]{1,0:T(8,128)} get-tuple-element(%f), index=1
}
"""
    whole = small = 8 * 128 * 4  # each takes a whole tile
    assert hlo.read(text).entry.moved == whole + small + whole
    assert hlo.read(text.replace("S(1)", "")).entry.moved == 2 * whole + whole + small + 2 * whole


def test_a_slice_that_comes_near_is_read_alone():
    text = """HloModule jit_step

ENTRY %main (a: f32[32,8,4]) -> f32[8,8,4] {
  %a = f32[32,8,4]{2,1,0:T(8,128)} parameter(0)
  %s = ((f32[32,8,4]{2,1,0:T(8,128)}), f32[8,8,4]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[24:32], [0:8], [0:4]}
  %d = f32[8,8,4]{2,1,0:T(8,128)S(1)} slice-done(%s)
  ROOT %e = f32[2,8,4]{2,1,0:T(8,128)} slice(%d), slice={[0:2], [0:8], [0:4]}
}
"""  # noqa: E501
    part, root = 8 * 8 * 128 * 4, 2 * 8 * 128 * 4
    assert hlo.read(text).entry.moved == part + root
    assert hlo.read(text.replace("S(1)", "")).entry.moved == 2 * part + 2 * root


def test_a_kernels_description_may_take_several_lines():
    text = """HloModule jit_step

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %k = f32[8,4]{1,0} custom-call(%a), backend_config={"cost": {
"flops":12,
"transcendentals":3
}, "format": 1}
  ROOT %n = f32[8,4]{1,0} negate(%k)
}
"""
    assert hlo.read(text).entry.launches == 2


def test_a_librarys_workspace_is_not_moved():
    text = """HloModule jit_step

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %c = (f32[8,2]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %d = f32[8,2]{1,0} get-tuple-element(%c), index=0
}
"""
    moved = 4 * (8 * 4 + 4 * 2 + 8 * 2)
    assert hlo.read(text).entry.moved == moved
    assert hlo.read(text.replace("__cublas", "other")).entry.moved == moved + 4194304


def test_what_a_fusion_reads_by_way_of_another_view_is_read():
    """A fusion within that only views an array, or one that slices it."""
    text = """HloModule jit_step

%viewed (p.0: f32[8,4]) -> f32[4,8] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  ROOT %b.0 = f32[4,8]{1,0} bitcast(%p.0)
}

%sliced (p.1: f32[8,4], i.1: s32[]) -> f32[2,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %s.1 = f32[2,4]{1,0} dynamic-slice(%p.1, %i.1, %i.1), dynamic_slice_sizes={2,4}
}

%fused (p.2: f32[8,4], p.3: f32[8,4], i.2: s32[]) -> f32[2,8] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  %p.3 = f32[8,4]{1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %v.2 = f32[4,8]{1,0} fusion(%p.2), kind=kLoop, calls=%viewed
  %s.2 = f32[2,4]{1,0} fusion(%p.3, %i.2), kind=kLoop, calls=%sliced
  ROOT %c.2 = f32[2,8]{1,0} dot(%s.2, %v.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,4], b: f32[8,4], i: s32[]) -> f32[2,8] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[2,8]{1,0} fusion(%a, %b, %i), kind=kOutput, calls=%fused
}
"""
    index = 1
    assert hlo.read(text).entry.moved == 4 * (8 * 4 + 2 * 4 + 2 * 8 + index)


def test_room_that_is_only_taken_is_neither_launched_nor_moved():
    text = """HloModule jit_step

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %s = f32[8,4]{1,0} add(%a, %r)
}
"""
    found, other = (hlo.read(x).entry for x in (text, text.replace("AllocateBuffer", "Fill")))
    assert (found.launches, found.moved) == (1, 3 * 8 * 4 * 4)
    assert (other.launches, other.moved) == (2, 4 * 8 * 4 * 4)


GATHER = """  %g.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p.9), dimensions={0}
  %g.2 = f32[8,4]{1,0} all-gather-done(%g.1)
  %p.9 = f32[2,4]{1,0} parameter(1)
  %m.1 = f32[8,4]{1,0} fusion(%x.1), kind=kCustom, calls=%moving
"""
MOVING = """%moving (p.5: f32[8,4]) -> f32[8,4] {
  %p.5 = f32[8,4]{1,0} parameter(0)
  ROOT %m.5 = f32[16,4]{1,0} all-gather(%p.5), dimensions={0}
}

"""


def test_collectives_count_as_often_as_they_run():
    """In two counted loops, of 7 and 5 turns; also started ones, and within a fusion."""
    text = MODULE.replace("  %c.1 = ", GATHER + "  %c.1 = ")
    text = text.replace("%body.1 (", MOVING + "%body.1 (")
    found = hlo.read(text).entry
    assert found.collectives["all-gather"] == hlo.Collective(2 * 12, (128 + 256) * 12, 256)
    assert found.collectives["all-reduce"].number == 1


def test_a_real_exchange_is_found():
    """Every device gets the whole of what it has half of."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    half, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("x",), ()))
    given = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=half)
    text = jax.jit(lambda x: x + 1, out_shardings=whole).lower(given).compile().as_text()
    assert hlo.read(text).entry.collectives == {"all-gather": hlo.Collective(1, 512, 512)}


@pytest.mark.parametrize(
    ("line", "host", "wide"),
    [
        ('%h = f32[2]{0} custom-call(), custom_call_target="xla_ffi_python_cpu_callback"', 1, 0),
        ('%h = f32[2]{0} custom-call(), custom_call_target="xla_python_gpu_callback"', 1, 0),
        ("%h = (f32[2], token[]) outfeed(%a)", 1, 0),
        ("%h = f64[2]{0} fusion(%a), kind=kLoop", 0, 1),
        ('%h = f32[2]{0} custom-call(%a), custom_call_target="__cublas$gemm"', 0, 0),
    ],
)
def test_the_host_and_wide_floats_are_found(line, host, wide):
    found = hlo.read(
        MODULE.replace("ENTRY %main", f"%more () -> f32[2] {{\n  {line}\n}}\n\nENTRY %main")
    )
    assert (len(found.from_host), found.float64) == (host, bool(wide))


def test_a_real_callback_is_found():
    def step(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda y: y, shape, x.sum())

    text = jax.jit(step).lower(jnp.ones(3)).compile().as_text()
    assert hlo.read(text).from_host


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.read("HloModule nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,4]{1,0}", 128),
        ("bf16[3]", 6),
        ("pred[]", 1),
        ("(s32[], f8e4m3fn[2,2])", 8),
        ("u4[8]", 4),
        ("f32[9,144]{1,0:T(8,128)}", 16 * 256 * 4),
        ("bf16[3,144,9]{1,2,0:T(8,128)(2,1)}", 3 * 256 * 16 * 2),
        ("(f32[144]{0:T(256)S(1)}, s32[]{:T(128)})", 256 * 4 + 4),
    ],
)
def test_sizes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_a_compiled_scan_turns_as_often_as_it_says():
    def turn(x, _):
        return jnp.sin(x @ x) + 1, None

    text = jax.jit(lambda x: jax.lax.scan(turn, x, length=11)[0]).lower(jnp.ones((8, 8)))
    (loop,) = hlo.read(text.compile().as_text()).entry.loops
    assert loop.trips == 11


def test_products_are_counted():
    x, y = jnp.ones((3, 5)), jnp.ones((5, 7))
    product = 2 * 3 * 5 * 7
    assert matrix_flops(jax.jit(jnp.matmul).trace(x, y).jaxpr) == product
    batched = jax.jit(jax.vmap(jnp.matmul)).trace(jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7)))
    assert matrix_flops(batched.jaxpr) == 4 * product

    def loops(x, y, n):
        x = jax.lax.scan(lambda c, _: (c + (c @ y) @ y.T, None), x, length=6)[0]
        x = jax.lax.fori_loop(0, n, lambda _, c: c + (c @ y) @ y.T, x)  # turns nobody knows: one
        return jax.lax.cond(n > 2, lambda: (x @ y).sum(), lambda: x.sum())

    assert matrix_flops(jax.jit(loops).trace(x, y, 3).jaxpr) == product * (2 * 6 + 2 + 1)
    grad = jax.jit(jax.grad(lambda x, y: jnp.sum(jax.checkpoint(jnp.matmul)(x, y) ** 2), (0, 1)))
    assert matrix_flops(grad.trace(x, y).jaxpr) in (3 * product, 4 * product)


def test_convolutions_are_counted():
    x, kernel = jnp.ones((2, 10, 4)), jnp.ones((3, 4, 6))
    conv = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
    )
    assert matrix_flops(conv.trace(x, kernel).jaxpr) == 2 * (2 * 8 * 6) * (3 * 4)


def test_kernels_count_for_each_of_their_blocks():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def product(x, y):
        rows = pl.BlockSpec((8, 16), lambda i, j: (i, 0))
        columns = pl.BlockSpec((16, 8), lambda i, j: (0, j))
        return pl.pallas_call(
            kernel,
            grid=(3, 2),
            in_specs=[rows, columns],
            out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((24, 16), jnp.float32),
        )(x, y)

    traced = jax.jit(product).trace(jnp.ones((24, 16)), jnp.ones((16, 16)))
    assert matrix_flops(traced.jaxpr) == 2 * 24 * 16 * 16


def test_a_loop_counts_as_often_as_it_turns_by_the_difference_that_a_turn_makes():
    assert figures.told_of_all((10.0, 1.0), (12.0, 1.5), 36) == (10.0 + 35 * 2, 1.0 + 35 * 0.5)
    assert figures.told_of_all((10.0, 1.0), None, 36) is None
    assert figures.told_of_all(None, None, 36) is None


@pytest.mark.parametrize(
    ("estimate", "kept"), [(1.2, 1.2), (0.1, None), (-1202.0, None), (None, None), (1e6, None)]
)
def test_estimates_that_cannot_be_are_left_out(estimate, kept):
    assert figures.sane_estimate(estimate, 1.0) == kept


def test_targets_by_name():
    assert targets.target_by_name("v5e-8") == (targets.TARGETS["v5e"], 8)
    assert targets.target_by_name("h200") == (targets.TARGETS["h200"], 1)
    for name in ("v7", "v5e-", "v5e-none", "v5e-0", ""):
        with pytest.raises(UserError, match="--targets="):
            targets.target_by_name(name)


@pytest.mark.parametrize(
    ("devices", "axes", "shape"),
    [
        (1, 2, "2x2"),
        (4, 2, "2x2"),
        (8, 2, "4x2"),
        (16, 2, "4x4"),
        (1, 3, "2x2x1"),
        (16, 3, "4x2x2"),
    ],
)
def test_topologies_are_the_smallest(devices, axes, shape):
    assert targets._shape(devices, axes) == shape


def test_a_missing_compiler_is_named(monkeypatch):
    def nothing(name):
        raise targets.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(targets.importlib.metadata, "distribution", nothing)
    with pytest.raises(UserError, match=r"v5e: its compiler is missing: pip install 'jax\[tpu\]'"):
        targets.devices(targets.TARGETS["v5e"])
    with pytest.raises(UserError, match=r"h200: .*pip install 'jax-cuda13-plugin'"):
        targets.devices(targets.TARGETS["h200"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "central"}, "only programs of rounds"),
        ({"model.name": "whisper"}, "programs of samples"),
    ],
)
def test_what_is_not_compiled_is_refused(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        programs.make_simulation(Config.of(to_json(config.to_dict())), jax.devices(), 1)


def test_unknown_programs_are_refused():
    with pytest.raises(UserError, match="--programs=evaluation: choose from clients, server"):
        compiler.measured(to_json(default_config().to_dict()), [], ["evaluation"])


@pytest.mark.parametrize("devices", [1, 2])
def test_products_are_those_of_one_device(devices):
    """Of clients on several devices each computes its own: more devices are no faster a step."""
    config = default_config()
    config.model.options = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16}
    config.update(cohort=4, rounds=1)
    config.privacy.deployments = ()
    found = Config.of(to_json(config.to_dict()))
    there = jax.local_devices()[:devices]
    simulation = programs.make_simulation(found, there, 1, seconds=0.5)
    traced = simulation.trace(models.variable_shapes(found))["clients"]
    batch, frames = found.client.batch_size, 24  # of 50, padded to 72, at a stride of 3
    fewest = 3 * 2 * batch * frames * (7 * 80 * 32 + 4 * 16 * 16 + 2 * 16 * 16)
    assert fewest < matrix_flops(traced.jaxpr) < 1.2 * fewest
