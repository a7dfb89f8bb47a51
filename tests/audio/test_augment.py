import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.audio.augment import SpecAugmentConfig, _sources, _spans, spec_augment
from fedasr.errors import UserError

CONFIG = SpecAugmentConfig()
ONE_TIME = SpecAugmentConfig(frequency_masks=0, time_masks=1, time_width=9, time_fraction=0.2)
ONE_FREQUENCY = SpecAugmentConfig(frequency_masks=1, frequency_width=5, time_masks=0)

augment = jax.jit(spec_augment, static_argnames="config")


def assert_one_run(masked):
    """The True values are neighbours."""
    assert np.abs(np.diff(np.concatenate([[0], masked.astype(int), [0]]))).sum() in (0, 2)


@given(st.integers(0, 120), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=60)
def test_masks_are_whole_rows_and_columns_within_bounds(length, seed):
    x = np.random.default_rng(seed).standard_normal((120, 80)).astype(np.float32) + 10
    y = np.asarray(augment(x, length, jax.random.key(seed), CONFIG))
    np.testing.assert_array_equal(y[length:], x[length:])
    masked = y[:length] == 0
    np.testing.assert_array_equal(y[:length][~masked], x[:length][~masked])
    rows, columns = masked.all(1), masked.all(0)
    if not rows.all() and length:
        np.testing.assert_array_equal(masked, rows[:, None] | masked[~rows].all(0))
        assert columns.sum() <= 2 * 30
    assert rows.sum() <= 10 * min(50, length // 10)


@given(st.integers(0, 60), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=60)
def test_one_time_mask_is_one_short_run(length, seed):
    y = np.asarray(augment(np.ones((60, 4)), length, jax.random.key(seed), ONE_TIME))
    masked = (y == 0).all(1)
    np.testing.assert_array_equal((y == 0).any(1), masked)
    assert_one_run(masked)
    assert masked.sum() <= min(9, length // 5)
    assert not masked[length:].any()


@pytest.mark.parametrize("config, axis, widest", [(ONE_TIME, 1, 8), (ONE_FREQUENCY, 0, 5)])
def test_widths_and_starts_are_uniform(config, axis, widest):
    keys = jax.random.split(jax.random.key(0), 6000)
    x = jnp.ones((40, 12))
    y = jax.jit(jax.vmap(lambda key: spec_augment(x, 40, key, config)))(keys)
    masked = np.asarray((y == 0).all(axis + 1 if axis else 1))
    extent = masked.shape[1]
    assert extent == (40 if axis else 12)
    for row in masked[:200]:
        assert_one_run(row)
    widths = masked.sum(1)
    counts = np.bincount(widths, minlength=widest + 1)
    assert len(counts) == widest + 1
    np.testing.assert_allclose(counts / 6000, 1 / (widest + 1), atol=0.02)
    starts = masked[widths == widest].argmax(1)
    assert starts.min() == 0
    assert starts.max() == extent - widest
    np.testing.assert_allclose(starts.mean(), (extent - widest) / 2, rtol=0.1)


def test_draws_do_not_depend_on_padding():
    x = np.ones((120, 80), np.float32)
    for seed in range(5):
        short = augment(x[:50], 45, jax.random.key(seed), CONFIG)
        long = augment(x, 45, jax.random.key(seed), CONFIG)
        np.testing.assert_array_equal(short[:45], long[:45])
        assert (short[:45] == 0).any()


def test_padding_is_untouched_even_if_not_finite():
    x = np.ones((120, 80), np.float32)
    x[30:] = np.nan
    y = np.asarray(augment(x, 30, jax.random.key(1), CONFIG))
    assert np.isfinite(y[:30]).all()
    assert np.isnan(y[30:]).all()


def test_batch_equals_single_and_is_deterministic():
    keys = jax.random.split(jax.random.key(3), 4)
    x = np.random.default_rng(0).standard_normal((4, 120, 80)).astype(np.float32)
    lengths = np.array([120, 61, 10, 0])
    batch = np.asarray(jax.jit(jax.vmap(spec_augment))(x, lengths, keys))
    for i in range(4):
        np.testing.assert_array_equal(batch[i], augment(x[i], lengths[i], keys[i], CONFIG))
    assert not np.array_equal(batch[0] == 0, augment(x[0], 120, keys[1], CONFIG) == 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dtype_is_kept(dtype):
    x = jax.ShapeDtypeStruct((20, 8), dtype)
    assert jax.eval_shape(spec_augment, x, 20, jax.random.key(0)).dtype == dtype


def test_no_masks_change_nothing():
    none = SpecAugmentConfig(frequency_masks=0, time_masks=0)
    x = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    np.testing.assert_array_equal(augment(x, 20, jax.random.key(0), none), x)


@pytest.mark.parametrize("fields", [{"time_masks": -1}, {"time_fraction": 1.5}])
def test_bad_config_is_refused(fields):
    with pytest.raises(UserError):
        SpecAugmentConfig(**fields)


@pytest.mark.parametrize("inclusive", [True, False])
def test_published_masks_are_narrower_and_never_at_the_end(inclusive):
    """The extreme draws, and a NumPy count of what each pair of draws masks."""
    almost = np.float32(1 - 2**-24)
    for extent, widest in ((20, 5), (3, 3), (1, 0)):
        for a in (0.0, 0.3, 0.5, almost):
            for b in (0.0, 0.5, almost):
                draws = jnp.float32([[a], [b]])
                masked = np.flatnonzero(_spans(draws, widest, extent, 24, inclusive))
                width = int(np.float32(a) * np.float32(widest + inclusive))
                start = int(np.float32(b) * np.float32(extent - width + inclusive))
                assert masked.tolist() == list(range(start, start + width))
                assert width <= widest - (not inclusive) or width == 0
                assert not width or start + width <= extent - (not inclusive)


WARPED = SpecAugmentConfig(frequency_masks=0, time_masks=0, time_warp=0.1, frequency_warp=0.05)


@pytest.mark.parametrize(
    ("point", "move", "extent"), [(0.5, 0.1, 41), (0.25, -0.2, 60), (0.75, 0.2, 7), (0.5, 0.1, 1)]
)
def test_a_warp_moves_a_point_and_keeps_the_ends(point, move, extent):
    found = np.asarray(_sources(point, jnp.float32(move), extent, 64))
    last = extent - 1
    knots = [0, point * last, last], [0, (point + move) * last, last]
    expected = np.interp(np.arange(extent), *knots) if last else np.zeros(1)
    np.testing.assert_allclose(found[:extent], expected, atol=1e-4)
    np.testing.assert_array_equal(found[extent:], np.arange(extent, 64))


@given(st.integers(0, 60), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=30)
def test_warped_features_lie_between_their_neighbours(length, seed):
    """Of a plane, whose value says where it comes from."""
    frames, channels = np.arange(60.0), np.arange(80.0)
    x = np.add.outer(frames, 100 * channels).astype(np.float32)
    y = np.asarray(augment(x, length, jax.random.key(seed), WARPED))
    np.testing.assert_array_equal(y[length:], x[length:])
    if not length:
        return
    channel = y[0] / 100
    np.testing.assert_allclose(channel[[0, -1]], [0, 79], atol=1e-3)
    assert (np.diff(channel) > 0).all() and np.abs(channel - channels).max() <= 0.05 * 79 + 1e-3
    time = y[:length, 0]
    np.testing.assert_allclose(time[[0, -1]], [0, length - 1], atol=1e-3)
    assert (np.diff(time) > 0).all()
    assert np.abs(time - frames[:length]).max() <= 0.1 * length
    np.testing.assert_allclose(y[:length], np.add.outer(time, 100 * channel), atol=0.02)


def test_warps_move_both_ways_and_as_far_as_they_may():
    x = np.add.outer(np.arange(41.0), 100 * np.arange(80.0)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 300)
    y = np.asarray(jax.jit(jax.vmap(lambda key: spec_augment(x, 41, key, WARPED)))(keys))
    time = y[:, :, 0] - x[:, 0]
    furthest = np.take_along_axis(time, np.abs(time).argmax(1)[:, None], 1)[:, 0]
    channel = (y[:, 0] - x[0])[:, 60] / 100
    for found, most in ((furthest, 4.0), (channel, 4.0)):
        assert found.min() < -0.8 * most and found.max() > 0.8 * most
        assert abs(found.mean()) < 0.15 * most


def test_warps_leave_padding_and_its_neighbours_alone():
    x = np.random.default_rng(0).standard_normal((120, 80)).astype(np.float32)
    x[45:] = np.nan
    for seed in range(5):
        long = np.asarray(augment(x, 45, jax.random.key(seed), WARPED))
        short = np.asarray(augment(x[:50], 45, jax.random.key(seed), WARPED))
        assert np.isfinite(long[:45]).all() and np.isnan(long[45:]).all()
        np.testing.assert_allclose(short[:45], long[:45], atol=1e-5)
        assert not np.allclose(long[:45], x[:45], atol=0.1)


def test_masks_lie_on_warped_features():
    both = SpecAugmentConfig(time_warp=0.1)
    x = np.random.default_rng(0).standard_normal((60, 80)).astype(np.float32) + 10
    y = np.asarray(augment(x, 60, jax.random.key(2), both))
    assert (y == 0).any() and not np.isin(y[(y != 0)][:50], x).all()


@pytest.mark.parametrize("name", ["time_warp", "frequency_warp"])
def test_a_warp_that_leaves_nothing_is_refused(name):
    with pytest.raises(UserError, match=name):
        SpecAugmentConfig(**{name: 0.3})
