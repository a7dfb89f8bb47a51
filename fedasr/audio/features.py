"""Log-mel features of speech, normalised per utterance (arXiv 2310.00098, "Model and features").

The paper fixes: 16 kHz audio scaled to the int16 range, frames of 25 ms every 10 ms, pre-emphasis
0.97, Hamming window, *magnitude* (not power) spectrum, 80 mel filters, floor 1.0, natural log, and
zero mean and unit variance over time x mel within the utterance. Where it is silent we choose:

* FFT of 512 points (the next power of two over 400 samples);
* pre-emphasis within each frame, ``y[0] = (1 - a) x[0]`` and ``y[i] = x[i] - a x[i-1]``, so that a
  frame depends on no sample outside it;
* symmetric Hamming window, ``0.54 - 0.46 cos(2 pi i / (n - 1))``;
* filters that are triangles in Hz with peak 1 whose corners are equally spaced from 0 Hz to 8 kHz
  on the mel scale ``2595 log10(1 + f / 700)``;
* no dither, no padding at the ends: the frames are those that fit wholly into the audio.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

INT16_SCALE = 32768.0
# The least standard deviation that normalisation divides by: silence, whose log-mel is constant,
# becomes zeros rather than amplified rounding noise. Speech is near 2.
MIN_STD = 1e-3
# Sample counts are padded up to 1, 1.5, 2, 3, 4, 6, ... times this (half a second at 16 kHz), so
# that a corpus of utterances up to 30 s compiles about a dozen programs.
SMALLEST_BUCKET = 8000


@dataclass(frozen=True)
class LogMelConfig:
    """Parameters of the log-mel features; the defaults are the paper's.

    Attributes:
      sample_rate: of the audio, in Hz.
      frame_ms: length of a frame, in milliseconds.
      hop_ms: distance between the starts of neighbouring frames, in milliseconds.
      num_mels: number of mel filters.
      fft_size: points of the DFT; frames are padded with zeros up to it.
      pre_emphasis: coefficient of the first-order high-pass filter; 0 switches it off.
      low_hz: lower corner of the first filter.
      high_hz: upper corner of the last filter.
      mel_floor: least value of a mel energy before the logarithm.

    Raises:
      UserError: the values contradict one another.
    """

    sample_rate: int = 16000
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    num_mels: int = 80
    fft_size: int = 512
    pre_emphasis: float = 0.97
    low_hz: float = 0.0
    high_hz: float = 8000.0
    mel_floor: float = 1.0

    def __post_init__(self):
        if self.hop_samples < 1 or self.frame_samples < 2:
            raise UserError("frame_ms and hop_ms must span at least 2 and 1 samples: raise them")
        if self.frame_samples > self.fft_size:
            raise UserError(
                f"fft_size={self.fft_size} is less than a frame of {self.frame_samples} samples: "
                "raise fft_size or lower frame_ms"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise UserError(
                f"low_hz={self.low_hz} and high_hz={self.high_hz} must satisfy "
                f"0 <= low_hz < high_hz <= sample_rate / 2 = {self.sample_rate / 2}"
            )
        if self.num_mels < 1 or self.mel_floor <= 0:
            raise UserError("num_mels must be at least 1 and mel_floor positive")

    @property
    def frame_samples(self) -> int:
        """Samples in a frame."""
        return round(self.sample_rate * self.frame_ms / 1000)

    @property
    def hop_samples(self) -> int:
        """Samples between the starts of neighbouring frames."""
        return round(self.sample_rate * self.hop_ms / 1000)


def num_frames(samples: int, config: LogMelConfig = LogMelConfig()) -> int:
    """Number of frames that fit into `samples` samples: 0 where not even one does."""
    return max(0, 1 + (samples - config.frame_samples) // config.hop_samples)


@functools.lru_cache(maxsize=8)
def mel_filters(config: LogMelConfig = LogMelConfig()) -> np.ndarray:
    """The triangular filters, float32 [fft_size // 2 + 1, num_mels], each with peak 1."""
    lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (config.low_hz, config.high_hz))
    mels = np.linspace(lowest, highest, config.num_mels + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    hz = np.arange(config.fft_size // 2 + 1)[:, None] * config.sample_rate / config.fft_size
    rising = (hz - left) / (centre - left)
    falling = (right - hz) / (right - centre)
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    filters.flags.writeable = False  # shared by the cache
    return filters


def log_mel(waveform: jax.Array, config: LogMelConfig = LogMelConfig()) -> jax.Array:
    """Log-mel energies of one waveform, not yet normalised.

    Args:
      waveform: float [samples] in [-1, 1], at `config.sample_rate`.
      config: static parameters.

    Returns:
      float32 [num_frames(samples), num_mels], each at least log(mel_floor); [0, num_mels] for
      audio shorter than one frame.
    """
    frame, hop = config.frame_samples, config.hop_samples
    frames = num_frames(waveform.shape[0], config)
    if frames == 0:
        return jnp.zeros((0, config.num_mels), jnp.float32)
    # Overlapping frames from strided slices of blocks that divide both lengths: several times
    # faster than gathering sample by sample.
    block = math.gcd(frame, hop)
    step, parts = hop // block, frame // block
    blocks = (frames - 1) * step + parts
    x = (waveform[: blocks * block].astype(jnp.float32) * INT16_SCALE).reshape(blocks, block)
    x = jnp.concatenate([x[i : i + (frames - 1) * step + 1 : step] for i in range(parts)], axis=1)
    previous = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
    x = (x - config.pre_emphasis * previous) * np.hamming(frame).astype(np.float32)
    magnitude = jnp.abs(jnp.fft.rfft(x, config.fft_size))
    mel = jnp.matmul(magnitude, mel_filters(config), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, config.mel_floor))


def normalize(features: jax.Array, length: jax.Array | int | None = None) -> jax.Array:
    """Zero mean and unit variance over the time x mel values of one utterance.

    Args:
      features: float [frames, mels].
      length: number of true frames, possibly traced; the rest is padding, which may hold anything.
        None means all.

    Returns:
      float32 [frames, mels]; zeros in padding, and zeros for an utterance of constant value.
    """
    frames, mels = features.shape
    length = frames if length is None else length
    valid = jnp.arange(frames)[:, None] < length
    count = jnp.maximum(length, 1) * mels
    x = jnp.where(valid, features.astype(jnp.float32), 0)
    x = jnp.where(valid, x - x.sum() / count, 0)
    std = jnp.sqrt(jnp.square(x).sum() / count)
    return x / jnp.maximum(std, MIN_STD)


@functools.partial(jax.jit, static_argnames="config")
def _normalized_log_mel(waveform, length, config):
    return normalize(log_mel(waveform, config), length)


def bucket_samples(samples: int) -> int:
    """The padded sample count for `samples`: the next of 8000 x (1, 1.5, 2, 3, 4, 6, ...)."""
    bucket = SMALLEST_BUCKET
    while bucket < samples:
        if bucket * 3 // 2 >= samples:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def extract(waveform: np.ndarray, config: LogMelConfig = LogMelConfig()) -> np.ndarray:
    """Normalised log-mel features of one utterance, as they are stored and fed to models.

    Pads the samples to one of a few sizes, so that a corpus compiles a handful of programs; the
    padding does not change the result.

    Args:
      waveform: floating point [samples] in [-1, 1], at `config.sample_rate`.
      config: parameters.

    Returns:
      float32 [num_frames(samples), num_mels]; [0, num_mels] for audio shorter than one frame.

    Raises:
      UserError: the waveform is not one-dimensional, not floating point, or not finite.
    """
    waveform = np.asarray(waveform)
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise UserError(
            f"expected floating-point samples in [-1, 1] of one channel, got {waveform.dtype} "
            f"{list(waveform.shape)}: convert the audio first"
        )
    if not np.isfinite(waveform).all():
        raise UserError("the audio holds samples that are not finite: repair or leave out the file")
    samples = waveform.shape[0]
    frames = num_frames(samples, config)
    padded = np.zeros(bucket_samples(samples), np.float32)
    padded[:samples] = waveform
    return np.asarray(_normalized_log_mel(padded, frames, config))[:frames]


def to_mono_16k(
    audio: np.ndarray, sample_rate: int, config: LogMelConfig = LogMelConfig()
) -> np.ndarray:
    """One channel at the sample rate of `config` (16 kHz by default); deterministic.

    Args:
      audio: floating point [samples] or [samples, channels] in [-1, 1]; channels are averaged.
      sample_rate: of `audio`, in Hz.
      config: gives the target sample rate.

    Returns:
      float32 [samples at the target rate].

    Raises:
      UserError: wrong shape or type, a sample rate that is not positive, or soxr is missing.
    """
    audio = np.asarray(audio)
    if audio.ndim not in (1, 2) or not np.issubdtype(audio.dtype, np.floating):
        raise UserError(
            f"expected floating-point audio [samples] or [samples, channels] in [-1, 1], got "
            f"{audio.dtype} {list(audio.shape)}: convert it first"
        )
    if sample_rate <= 0:
        raise UserError(f"the sample rate is {sample_rate}: it must be positive")
    if audio.ndim == 2:
        audio = audio.mean(axis=1, dtype=np.float32)
    audio = np.ascontiguousarray(audio, dtype=np.float32)
    if sample_rate == config.sample_rate or audio.size == 0:
        return audio
    try:
        import soxr
    except ImportError:
        raise UserError(
            f"audio at {sample_rate} Hz needs resampling to {config.sample_rate} Hz: "
            "install soxr (pip install soxr)"
        ) from None
    return soxr.resample(audio, sample_rate, config.sample_rate, quality="HQ")
