"""From stored audio to what pretrained models hear, on the device: samples, or their mel spectra.

A batch of audio holds "features" [b, blocks, 160], samples as int16 has them in blocks of 10 ms,
so that whatever counts frames counts these; "features_length" [b], blocks; and "samples" [b], how
many of the samples are true. A result depends on true samples alone.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.audio.features import INT16_SCALE

BLOCK_SAMPLES = 160  # of a block, 10 ms
RATE = 16000
_WHISPER_FFT, _NEMO_FFT, _NEMO_WINDOW = 400, 512, 400
_NEMO_GUARD = 2.0**-24  # added before the logarithm


def samples(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The waveforms of a batch, float32 [b, blocks * 160] in [-1, 1], and true lengths int32 [b].

    Zeros beyond the true lengths. A batch without "samples" has whole blocks.
    """
    blocks = batch["features"].astype(jnp.float32) / INT16_SCALE
    most = batch["features_length"] * BLOCK_SAMPLES
    lengths = jnp.minimum(batch.get("samples", most), most).astype(jnp.int32)
    waveforms = blocks.reshape(blocks.shape[0], -1)
    return jnp.where(inside(waveforms.shape[1], lengths), waveforms, 0.0), lengths


def inside(size: int, lengths: jax.Array) -> jax.Array:
    """bool [b, size]: whether a place is within its utterance."""
    return jnp.arange(size) < lengths[:, None]


def normalised(waveforms: jax.Array, lengths: jax.Array) -> jax.Array:
    """Zero mean and unit variance over each utterance's true samples; zeros elsewhere."""
    mask, count = inside(waveforms.shape[1], lengths), jnp.maximum(lengths, 1)[:, None]
    mean = jnp.sum(waveforms, axis=1, keepdims=True) / count
    centred = jnp.where(mask, waveforms - mean, 0.0)
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-7)


def _windows(waveforms: jax.Array, size: int, count: int) -> jax.Array:
    """[b, count, size]: windows of `size` samples, one every block, from the first sample on."""
    room = (count - 1 + -(-size // BLOCK_SAMPLES)) * BLOCK_SAMPLES
    padded = jnp.pad(waveforms, ((0, 0), (0, max(room - waveforms.shape[1], 0))))[:, :room]
    blocks = padded.reshape(padded.shape[0], -1, BLOCK_SAMPLES)
    parts = [blocks[:, i : i + count] for i in range(-(-size // BLOCK_SAMPLES))]
    return jnp.concatenate(parts, axis=-1)[..., :size]


def _power(frames: jax.Array, size: int) -> jax.Array:
    spectrum = jnp.fft.rfft(frames, size)
    return spectrum.real**2 + spectrum.imag**2


def _product(power: jax.Array, filters: np.ndarray) -> jax.Array:
    return jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)


def whisper_mel(waveforms: jax.Array, mels: int) -> jax.Array:
    """Whisper's log-mel features of whole arrays: [b, blocks * 160] -> float32 [b, blocks, mels].

    Frames of 400 samples (Hann) every 160, the first centred on the first sample, mirrored at both
    ends; base-10 logarithm of the power, at most 8 below the utterance's largest; then (x + 4) / 4
    (Radford et al., 2022). Padding by zeros is silence that counts, as in the authors' code.
    """
    half, size = _WHISPER_FFT // 2, waveforms.shape[1]
    mirrored = jnp.pad(waveforms, ((0, 0), (half, half)), mode="reflect")
    frames = _windows(mirrored, _WHISPER_FFT, size // BLOCK_SAMPLES)
    hann = np.hanning(_WHISPER_FFT + 1)[:-1].astype(np.float32)
    power = _power(frames * hann, _WHISPER_FFT)
    log = jnp.log10(jnp.maximum(_product(power, slaney_filters(mels, _WHISPER_FFT)), 1e-10))
    least = jnp.max(log, axis=(1, 2), keepdims=True) - 8.0
    return (jnp.maximum(log, least) + 4.0) / 4.0


def nemo_mel(
    waveforms: jax.Array, lengths: jax.Array, mels: int, emphasis: float
) -> tuple[jax.Array, jax.Array]:
    """NeMo's log-mel features, normalised over time for each mel and utterance.

    Pre-emphasis over the whole waveform, frames of 400 samples (symmetric Hann) every 160 in the
    middle of 512, zeros beyond both ends, natural logarithm of the power.

    Args:
      waveforms, lengths: see `samples`.
      mels: number of filters.
      emphasis: coefficient of the pre-emphasis.

    Returns:
      float32 [b, blocks + 1, mels], zeros at padding, and true frames, int32 [b].
    """
    mask = inside(waveforms.shape[1], lengths)
    before = jnp.pad(waveforms[:, :-1], ((0, 0), (1, 0)))
    x = jnp.where(mask, waveforms - emphasis * before, 0.0)
    count = waveforms.shape[1] // BLOCK_SAMPLES + 1
    half = _NEMO_WINDOW // 2
    frames = _windows(jnp.pad(x, ((0, 0), (half, half))), _NEMO_WINDOW, count)
    hann = np.hanning(_NEMO_WINDOW).astype(np.float32)
    # Where the frame lies among the points of the transform does not matter to its power.
    power = _power(frames * hann, _NEMO_FFT)
    log = jnp.log(_product(power, slaney_filters(mels, _NEMO_FFT)) + _NEMO_GUARD)
    true = lengths // BLOCK_SAMPLES
    kept = inside(count, true)[..., None]
    number = true[:, None, None].astype(jnp.float32)
    mean = jnp.sum(jnp.where(kept, log, 0.0), axis=1, keepdims=True) / jnp.maximum(number, 1.0)
    centred = jnp.where(kept, log - mean, 0.0)
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(number - 1.0, 1.0)
    return centred / (jnp.sqrt(variance) + 1e-5), true


def _slaney(hz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1000 Hz, logarithmic above."""
    above = 15.0 + 27.0 * np.log(np.maximum(hz, 1.0) / 1000.0) / np.log(6.4)
    return np.where(hz < 1000.0, 3.0 * hz / 200.0, above)


def _from_slaney(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))


@functools.lru_cache(maxsize=8)
def slaney_filters(mels: int, fft: int) -> np.ndarray:
    """Triangles of equal area from 0 to 8 kHz on Slaney's scale, float32 [fft // 2 + 1, mels]."""
    ends = _slaney(np.array([0.0, RATE / 2]))
    corners = _from_slaney(np.linspace(ends[0], ends[1], mels + 2))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    hz = np.linspace(0.0, RATE / 2, fft // 2 + 1)[:, None]
    rising, falling = (hz - left) / (centre - left), (right - hz) / (right - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters = (triangles * 2.0 / (right - left)).astype(np.float32)
    filters.flags.writeable = False  # shared by the cache
    return filters
