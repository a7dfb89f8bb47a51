"""What the benchmarks share: random speech and the measurement of memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


class RandomSpeech:
    """A corpus of random features that are made when read: its size costs no memory.

    Args:
      sizes: examples of each user. frames, labels: of every example.
    """

    def __init__(self, sizes: Sequence[int], frames: int, labels: int = 20) -> None:
        self.users = [f"user-{i}" for i in range(len(sizes))]
        self.sizes = np.asarray(sizes, np.int64)
        self._frames, self._labels = frames, labels

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        count = int(self.sizes[user])
        return {
            "features": np.full(count, self._frames, np.int32),
            "labels": np.full(count, self._labels, np.int32),
        }

    def get(self, user: int, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        examples = []
        for index in indices:
            rng = np.random.default_rng([user, index])
            features = rng.standard_normal((self._frames, 80), np.float32)
            labels = rng.integers(1, 30, self._labels).astype(np.int32)
            examples.append({"features": features.astype(np.float16), "labels": labels})
        return examples


def peak_rss_mb(action: Callable[[], object]) -> float:
    """Peak resident memory during `action`, MB (outside Linux: since the process started)."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if clear.exists():
        clear.write_text("5")  # resets the high-water mark
        action()
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
