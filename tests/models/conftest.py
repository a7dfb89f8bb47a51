"""Batches of audio for pretrained recognisers."""

import numpy as np
import pytest

SAMPLES = (4000, 3211, 2400)  # one whole block, two that are not


def _waves(seed=0):
    """Noise whose loudness differs, int16."""
    rng = np.random.default_rng(seed)
    shapes = zip(SAMPLES, (3000, 500, 9000), strict=True)
    return [(rng.normal(size=n) * loud).clip(-32768, 32767).astype(np.int16) for n, loud in shapes]


def _batch(sounds, blocks=26, labels=((3, 1, 4), (2, 2), (5, 6))):
    """What a loss takes, padded to so many blocks, with noise where nothing should listen."""
    rng = np.random.default_rng(9)
    features = rng.integers(-9000, 9000, (len(sounds), blocks, 160)).astype(np.int16)
    counts = [-(-len(x) // 160) for x in sounds]
    for row, x, count in zip(features, sounds, counts, strict=True):
        row[:count] = 0
        row.reshape(-1)[: len(x)] = x
    padded = np.zeros((len(sounds), 4), np.int32)
    for row, text in zip(padded, labels, strict=True):
        row[: len(text)] = text
    return {
        "features": features,
        "features_length": np.int32(counts),
        "samples": np.int32([len(x) for x in sounds]),
        "labels": padded,
        "labels_length": np.int32([len(text) for text in labels]),
        "mask": np.ones(len(sounds), bool),
    }


@pytest.fixture(scope="session")
def waves():
    """waves(seed) -> three sounds."""
    return _waves


@pytest.fixture(scope="session")
def batch():
    """batch(sounds, blocks) -> a batch of audio with labels."""
    return _batch
