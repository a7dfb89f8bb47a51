"""Users who train when they can, and no rounds to wait for: a queue of events."""

import collections
import dataclasses
import functools
import heapq
import threading
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy.sampling.draws import check_cohort_size, check_counts, is_noisy, turns
from fedasr.privacy.sampling.protocol import ZERO_OUT
from fedasr.streams import Stream, generator


@dataclasses.dataclass(frozen=True)
class AsynchronousSampler:
    """Users start one after another and hand in when they are done; so many updates make a step.

    At any time `concurrency` users train, each from the model of its start. Who is done puts an
    update into the server's buffer, and the next idle user of a queue starts. `cohort_size` updates
    are one round: the server steps, and the users in the buffer go to the end of the queue. So a
    user is in a round at most once. The queue begins in a fixed random order.

    It is the schedule of buffered aggregation (arXiv 2106.06639). When a user is done depends on
    the seed and on what is known of devices, on no data: so no chance decides, nothing is
    amplified, and what limits a user is the number of participations. The guarantee is for
    replacing one user's contribution by nothing, at its place in the queue.

    Attributes:
      population: number of users, at least `cohort_size` + `concurrency`.
      cohort_size: updates in a round.
      concurrency: users who train at a time, at least `cohort_size`.
      seed: non-negative integer, of the order and the times.
      times: seconds that each user's training takes, for all users; () for 1.
      jitter: standard deviation of the logarithm of one training's time beside that.

    Raises:
      UserError: if an argument is out of range.
    """

    population: int
    cohort_size: int
    concurrency: int
    seed: int
    times: tuple[float, ...] = ()
    jitter: float = 0.0

    def __post_init__(self):
        check_counts(self.population, self.seed)
        check_cohort_size(self.cohort_size, self.population)
        if self.concurrency != int(self.concurrency) or self.concurrency < self.cohort_size:
            raise UserError(
                f"concurrency must be a whole number of users, at least the {self.cohort_size} of "
                f"a round, not {self.concurrency}."
            )
        if self.cohort_size + self.concurrency > self.population:
            raise UserError(
                f"{self.concurrency} users at a time and {self.cohort_size} in the buffer are more "
                f"than the population of {self.population}: lower one of them."
            )
        if self.times and len(self.times) != self.population:
            raise UserError(f"times must be of {self.population} users, not {len(self.times)}.")
        if not all(0 <= t < np.inf for t in self.times) or not 0 <= self.jitter < np.inf:
            raise UserError("times and jitter must be numbers from 0.")

    @property
    def expected_cohort(self) -> float:
        return float(self.cohort_size)

    @property
    def slots(self) -> int:
        return self.cohort_size

    @property
    def separation(self) -> int:
        """For any times. When a user's round ends, T < `concurrency` users train and all others but
        the buffer's wait ahead. All of them start before the user does again, which takes as many
        updates as there are starts, but for `concurrency` - T free places; then comes the user's.
        """
        between = self.population - self.concurrency - self.cohort_size + 2
        return -(-between // self.cohort_size)

    @property
    def sensitivity(self) -> float:
        return 1.0

    @property
    def amplifies(self) -> bool:
        return False

    @property
    def overflow_probability(self) -> float:
        """0: who trains has a place."""
        return 0.0

    @property
    def description(self) -> str:
        return (
            f"{self.cohort_size} users as they are done, of {self.concurrency} who train at a time"
        )

    @property
    def neighbours(self) -> str:
        return ZERO_OUT

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def reseeded(self, seed: int) -> "AsynchronousSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, seed=seed)

    def cohort(self, round: int) -> np.ndarray:
        """Users whose updates a round is made of, int64 [cohort_size], sorted."""
        return self._schedule().round(round)[0]

    def staleness(self, round: int) -> np.ndarray:
        """Rounds that ended between each one's start and this round's, int64, as in `cohort`."""
        return self._schedule().round(round)[1]

    def clock(self, round: int) -> float:
        """Seconds from the beginning to the end of a round."""
        return self._schedule().round(round)[2]

    def _schedule(self) -> "_Schedule":
        return _schedule_of(self)

    def participations(self, rounds: int) -> int:
        """Turns, `separation` rounds apart, of a user of the first round."""
        return 0 if rounds == 0 else 1 + (rounds - 1) // self.separation

    def deployed(self, cohort: float, population: int) -> "AsynchronousSampler":
        """See `Sampler`; the concurrency grows with the cohort."""
        at_once = max(int(cohort), round(self.concurrency * cohort / self.cohort_size))
        at_once = min(at_once, population - int(cohort))
        return AsynchronousSampler(population, int(cohort), at_once, seed=0)

    def event(self, noise_multiplier: float) -> Any:
        """`GaussianDpEvent` of one participation (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.GaussianDpEvent(noise_multiplier)


class _Schedule:
    """The events of a sampler in order, worked out as far as they are asked for."""

    def __init__(self, sampler: AsynchronousSampler) -> None:
        self._sampler = sampler
        self._lock = threading.Lock()
        self._idle = collections.deque(int(u) for u in turns(sampler.population, sampler.seed))
        self._training: list[tuple[float, int, int, int]] = []  # end, number, user, version
        self._buffer: list[tuple[int, int]] = []  # user, version
        self._rounds: list[tuple[np.ndarray, np.ndarray, float]] = []
        self._started = 0
        self._start(0.0)

    def round(self, number: int) -> tuple[np.ndarray, np.ndarray, float]:
        """(users, staleness, seconds since the beginning) of a round."""
        if number < 0:
            raise UserError(f"round must be 0 or more, not {number}.")
        with self._lock:
            while len(self._rounds) <= number:
                self._advance()
            return self._rounds[number]

    def _start(self, now: float) -> None:
        """Fills free places, from the present model."""
        sampler = self._sampler
        while len(self._training) < sampler.concurrency:
            user = self._idle.popleft()
            draw = 0.0
            if sampler.jitter:
                rng = generator(Stream.SAMPLING, sampler.seed, "time", self._started)
                draw = float(rng.standard_normal())
            own = sampler.times[user] if sampler.times else 1.0
            end = now + own * float(np.exp(sampler.jitter * draw))
            heapq.heappush(self._training, (end, self._started, user, len(self._rounds)))
            self._started += 1

    def _advance(self) -> None:
        """All that happens at the next moment; places are filled after it."""
        now = self._training[0][0]
        while self._training and self._training[0][0] == now:
            _, _, user, version = heapq.heappop(self._training)
            self._buffer.append((user, version))
            if len(self._buffer) == self._sampler.cohort_size:
                version_now = len(self._rounds)
                found = sorted((u, version_now - v) for u, v in self._buffer)
                users, age = np.array(found, np.int64).T
                self._rounds.append((users, age, now))
                self._idle.extend(u for u, _ in self._buffer)
                self._buffer = []
        self._start(now)


@functools.lru_cache(maxsize=4)
def _schedule_of(sampler: AsynchronousSampler) -> _Schedule:
    return _Schedule(sampler)
