"""Of how many clients each key (a word, a correction) comes, with or without privacy.

Keys are hashed into a fixed number of buckets: a device sends which buckets it has something in,
the server adds up, and nobody needs a list of keys in advance. All buckets get noise, the empty
ones too, so that the histogram is one Gaussian query and no key shows by being there at all. A
device that holds a key can look it up; whoever has the histogram alone sees counts of buckets.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.streams import Stream, seed_key


class Histogram(NamedTuple):
    """Numbers of clients by bucket.

    counts: float64 [buckets], noisy where there is noise (then also below 0, and not whole).
    most: so many buckets of one client are counted at most.
    noise_multiplier: standard deviation of the noise over sqrt(most), which is how far one client
      more or less moves the counts (L2). It is what `Mechanism.released` takes.
    """

    counts: np.ndarray
    most: int
    noise_multiplier: float

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every bucket."""
        return self.noise_multiplier * math.sqrt(self.most)

    def count(self, key: str) -> float:  # type: ignore[override]  # hides `tuple.count`
        """About so many clients hold the key; another key in its bucket counts too."""
        return float(self.counts[bucket(key, len(self.counts))])


def bucket(key: str, buckets: int) -> int:
    """The bucket of a key, in [0, buckets): the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def client_histogram(
    keys: Sequence[Collection[str]],
    *,
    most: int,
    buckets: int = 1 << 16,
    noise_multiplier: float = 0.0,
    seed: int = 0,
) -> Histogram:
    """Counts clients by key.

    A client with more than `most` buckets reports those of the smallest numbers: which ones
    depends on nothing but its own keys.

    Args:
      keys: of each client; one that a client holds twice counts once.
      most: of one client's buckets are counted at most.
      buckets: how many there are. n keys make a given key share its bucket with chance n / buckets.
      noise_multiplier: see `Histogram`; 0 for exact counts.
      seed: of the noise: one that no other histogram has, nor this one of other settings, or
        their difference would be without noise (see `fedasr.streams.sub_seed`).

    Raises:
      UserError: an argument out of range.
    """
    if most < 1 or buckets < 1:
        raise UserError(f"most={most} and buckets={buckets} must be at least 1")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UserError(f"noise_multiplier must be finite and 0 or more, not {noise_multiplier}")
    counts = np.zeros(buckets)
    for own in keys:
        counts[sorted({bucket(key, buckets) for key in own})[:most]] += 1
    if noise_multiplier:
        key = seed_key(seed, Stream.HISTOGRAM)
        drawn = noise.standard_normal(key, buckets, noise.released_reach(noise_multiplier))
        counts += noise_multiplier * math.sqrt(most) * np.asarray(drawn, np.float64)
    return Histogram(counts, most, noise_multiplier)
