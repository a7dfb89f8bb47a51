"""What an attack found, beside chance and beside what the privacy allows."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """The success of an attack in one setting.

    Attributes:
      attack: name. setting: what was done to the updates, in words.
      success: share of targets that the attack got right. targets: how many there were.
      interval: (low, high), of the success at 95% (Clopper and Pearson).
      chance: success of guessing.
      bound: success that no attack can pass if the noise is what it is said to be.
      noise_multiplier: of the setting, standard deviation of the noise on the sum over the clip
        norm; None where updates are not clipped.
      epsilon, delta: of what the attack sees, None without noise.
      what: success of what, in words.
    """

    attack: str
    setting: str
    success: float
    targets: int
    interval: tuple[float, float]
    chance: float
    bound: float
    noise_multiplier: float | None
    epsilon: float | None
    delta: float | None
    what: str

    @property
    def exceeds(self) -> bool:
        """Whether the noise cannot be what it is said to be."""
        return self.interval[0] > self.bound

    def record(self) -> dict[str, Any]:
        """As a plain mapping."""
        return asdict(self) | {"exceeds": self.exceeds}


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of independent trials."""
    from scipy import stats

    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high if not math.isnan(high) else 1.0
