import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.audio import features
from fedasr.audio.features import (
    LogMelConfig,
    bucket_samples,
    extract,
    log_mel,
    mel_filters,
    normalize,
    num_frames,
    to_mono_16k,
)
from fedasr.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

CONFIG = LogMelConfig()
RNG = np.random.default_rng(0)
# About a third of a second: noise whose loudness rises, plus two tones.
TIME = np.arange(5000) / 16000
WAVEFORM = (
    0.05 * RNG.standard_normal(5000) * np.linspace(0.01, 1, 5000)
    + 0.2 * np.sin(2 * np.pi * 300 * TIME)
    + 0.1 * np.sin(2 * np.pi * 2500 * TIME)
).astype(np.float32)


def mel_corners():
    """Corners of the 80 filters, in Hz."""
    highest = 2595 * np.log10(1 + 8000 / 700)
    return 700 * (10 ** (np.arange(82) * highest / 81 / 2595) - 1)


def reference_log_mel(waveform):
    """The facts of the paper in float64, one frame at a time, with the DFT by its definition."""
    wave = waveform.astype(np.float64) * 32768
    edges = mel_corners()
    i, k = np.arange(400), np.arange(257)
    dft = np.exp(-2j * np.pi * np.outer(i, k) / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].copy()
        for n in range(399, 0, -1):
            frame[n] -= 0.97 * frame[n - 1]
        frame[0] *= 1 - 0.97
        frame *= 0.54 - 0.46 * np.cos(2 * np.pi * i / 399)
        magnitude = np.abs(frame @ dft)
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            total = 0.0
            for bin_, value in enumerate(magnitude):
                f = bin_ * 16000 / 512
                if left < f <= centre:
                    total += value * (f - left) / (centre - left)
                elif centre < f < right:
                    total += value * (right - f) / (right - centre)
            row.append(np.log(max(total, 1.0)))
        rows.append(row)
    return np.array(rows)


@pytest.fixture(scope="module")
def reference():
    return reference_log_mel(WAVEFORM)


def test_log_mel_equals_the_reference(reference):
    result = log_mel(jnp.asarray(WAVEFORM))
    assert result.dtype == jnp.float32
    assert result.shape == reference.shape == (29, 80)
    np.testing.assert_allclose(result, reference, atol=2e-4)


def test_extract_equals_the_normalised_reference(reference):
    result = extract(WAVEFORM)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (reference - reference.mean()) / reference.std(), atol=2e-4)
    assert abs(result.mean()) < 1e-5
    assert abs(result.std() - 1) < 1e-5


def test_extract_does_not_depend_on_the_padding(monkeypatch):
    expected = extract(WAVEFORM)
    monkeypatch.setattr(features, "SMALLEST_BUCKET", 5001)
    np.testing.assert_allclose(extract(WAVEFORM), expected, atol=1e-5)
    # Samples that do not fill another frame change nothing at all.
    cut = 400 + 28 * 160
    np.testing.assert_allclose(extract(WAVEFORM[:cut]), expected, atol=1e-5)


def test_normalised_features_do_not_depend_on_loudness():
    loud = extract(WAVEFORM)
    np.testing.assert_allclose(extract(WAVEFORM * 0.5), loud, atol=1e-3)


def test_delay_by_one_hop_delays_by_one_frame():
    full = log_mel(jnp.asarray(WAVEFORM))
    delayed = log_mel(jnp.asarray(np.concatenate([WAVEFORM[160:], np.zeros(160, np.float32)])))
    np.testing.assert_allclose(delayed[:-1], full[1:], atol=1e-5)


def test_tone_peaks_in_its_filter():
    tone = np.sin(2 * np.pi * 1000 * TIME).astype(np.float32)
    peak = np.asarray(log_mel(jnp.asarray(tone))).mean(0).argmax()
    corners = mel_corners()
    assert corners[peak] < 1000 < corners[peak + 2]


def test_silence_is_the_floor_and_normalises_to_zero():
    silence = np.zeros(4000, np.float32)
    np.testing.assert_array_equal(log_mel(jnp.asarray(silence)), 0)
    np.testing.assert_array_equal(extract(silence), 0)
    assert not np.isnan(extract(silence + 1e-3)).any()


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_too_short_audio_has_no_frames(samples):
    audio = np.ones(samples, np.float32)
    assert num_frames(samples) == 0
    assert log_mel(jnp.asarray(audio)).shape == (0, 80)
    assert extract(audio).shape == (0, 80)


@given(st.integers(0, 5000), st.integers(10, 40), st.integers(5, 40))
@settings(deadline=None, max_examples=100)
def test_num_frames_counts_the_frames_that_fit(samples, frame_ms, hop_ms):
    config = LogMelConfig(frame_ms=frame_ms, hop_ms=hop_ms, fft_size=1024)
    starts = range(0, samples, config.hop_samples)
    fit = sum(start + config.frame_samples <= samples for start in starts)
    assert num_frames(samples, config) == fit


@pytest.mark.parametrize("frame_ms, hop_ms", [(20.0, 7.5), (32.0, 8.0), (10.0, 16.0)])
def test_frames_start_every_hop(frame_ms, hop_ms):
    config = LogMelConfig(frame_ms=frame_ms, hop_ms=hop_ms, num_mels=20)
    result = log_mel(jnp.asarray(WAVEFORM[:2000]), config)
    assert result.shape == (num_frames(2000, config), 20)
    for i in (0, len(result) - 1):
        alone = WAVEFORM[i * config.hop_samples :][: config.frame_samples]
        np.testing.assert_allclose(log_mel(jnp.asarray(alone), config)[0], result[i], atol=1e-4)


def test_every_filter_has_weight_and_neighbours_sum_to_one():
    filters = mel_filters(CONFIG)
    assert filters.shape == (257, 80)
    assert (filters.sum(0) > 0).all()
    corners = mel_corners()
    hz = np.arange(257) * 31.25
    between = (hz >= corners[1]) & (hz <= corners[-2])
    np.testing.assert_allclose(filters[between].sum(1), 1, atol=1e-5)


def test_buckets_are_few_and_close():
    buckets = {}
    for samples in range(0, 30 * 16000 + 1, 7):
        bucket = bucket_samples(samples)
        assert bucket >= samples
        assert bucket == features.SMALLEST_BUCKET or bucket <= 1.5 * samples
        buckets[bucket] = True
    assert len(buckets) <= 13


@given(st.integers(0, 12), st.floats(0.1, 50), st.floats(-20, 20), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_normalize_is_masked_and_ignores_padding(length, scale, offset, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((12, 5)) * scale + offset).astype(np.float32)
    garbage = x.copy()
    garbage[length:] = rng.choice([np.nan, np.inf, 1e30])
    result = np.asarray(normalize(jnp.asarray(garbage), length))
    np.testing.assert_array_equal(result, normalize(jnp.asarray(x), length))
    np.testing.assert_array_equal(result[length:], 0)
    if length:
        true = x[:length].astype(np.float64)
        np.testing.assert_allclose(
            result[:length], (true - true.mean()) / true.std(), rtol=1e-3, atol=1e-3
        )


def test_normalize_without_length_uses_all_frames():
    x = jnp.asarray(RNG.standard_normal((12, 5)), jnp.float32)
    np.testing.assert_array_equal(normalize(x), normalize(x, 12))


@pytest.mark.parametrize(
    "waveform",
    [np.zeros(800, np.int16), np.zeros((800, 2), np.float32), np.full(800, np.nan, np.float32)],
)
def test_extract_refuses_what_is_not_a_waveform(waveform):
    with pytest.raises(UserError):
        extract(waveform)


@pytest.mark.parametrize(
    "fields",
    [
        {"fft_size": 256},
        {"high_hz": 9000},
        {"low_hz": 8000},
        {"num_mels": 0},
        {"mel_floor": 0},
        {"hop_ms": 0},
    ],
)
def test_contradictory_config_is_refused(fields):
    with pytest.raises(UserError):
        LogMelConfig(**fields)


def test_to_mono_averages_channels():
    stereo = RNG.standard_normal((100, 2)).astype(np.float64)
    mono = to_mono_16k(stereo, 16000)
    assert mono.dtype == np.float32
    np.testing.assert_allclose(mono, stereo.mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_tone_and_duration(rate):
    pytest.importorskip("soxr")
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    result = to_mono_16k(np.stack([tone, tone], 1), rate)
    assert result.dtype == np.float32
    assert abs(len(result) - 16000) <= 1
    middle = slice(2000, 14000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(result[middle], expected[middle], atol=1e-2)
    np.testing.assert_array_equal(result, to_mono_16k(np.stack([tone, tone], 1), rate))


def test_resampling_without_soxr_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match="soxr"):
        to_mono_16k(np.zeros(100), 8000)
    assert to_mono_16k(np.zeros(100), 16000).shape == (100,)


@pytest.mark.parametrize(
    "audio, rate",
    [(np.zeros(9, np.int16), 16000), (np.zeros((3, 3, 3)), 16000), (np.zeros(9), 0)],
)
def test_to_mono_refuses_bad_audio(audio, rate):
    with pytest.raises(UserError):
        to_mono_16k(audio, rate)
