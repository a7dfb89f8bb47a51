"""z-scores by block."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class BlockReport(NamedTuple):
    """Channels of a block that carry nothing and are zero: not finite somewhere, or constant."""

    not_finite: tuple[int, ...]
    constant: tuple[int, ...]


def z_score_block(signals: Sequence[np.ndarray]) -> tuple[list[np.ndarray], BlockReport]:
    """Zero mean and unit variance of every channel over the bins of a block.

    Args:
      signals: the block's sentences, [time, channels] each.

    Returns:
      float32 arrays of the same shapes, and what was wrong. A channel that is NaN or infinite
      anywhere in the block, or constant, is zero in all of it.
    """
    joined = np.concatenate(signals).astype(np.float64)
    finite = np.isfinite(joined).all(axis=0)
    joined[:, ~finite] = 0.0
    mean, std = joined.mean(axis=0), joined.std(axis=0)
    # Rounding leaves a little variance in constant channels.
    alive = std > 1e-6 * np.maximum(1.0, np.abs(mean))
    scaled = np.where(alive, (joined - mean) / np.where(alive, std, 1.0), 0.0).astype(np.float32)
    ends = np.cumsum([len(signal) for signal in signals])[:-1]
    report = BlockReport(
        tuple(np.flatnonzero(~finite).tolist()), tuple(np.flatnonzero(finite & ~alive).tolist())
    )
    return np.split(scaled, ends), report
