"""Who of the users drawn gets an update back, and when: devices that are slow, away, or drop out.

All of it is a function of (seed, round, user), so that a resumed run meets the same devices, and
runs that are compared meet the same ones. A user's lot depends on no other user (but for
`Participation.first`, which privacy refuses), so that leaving one out moves the sum by that one's
update alone. The server divides by the expected cohort whoever is missing, and epsilon is that of
the users drawn: dropout shrinks steps, not epsilon, and no amplification is claimed from it.
"""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator

_DAY = 24.0  # hours
_COLUMNS = ("user", "seconds_per_step")
_OPTIONAL = ("transfer_seconds", "from_hour", "to_hour")


@dataclasses.dataclass(frozen=True, eq=False)
class Devices:
    """The users' devices, float64 [users] each.

    seconds_per_step: of training. transfer: seconds that download and upload take together.
    begin, end: hours of the day, in [0, 24], between which a device takes part; past midnight
    where begin is above end.
    """

    seconds_per_step: np.ndarray
    transfer: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    @classmethod
    def drawn(
        cls, users: int, seed: int, seconds: float = 1.0, spread: float = 0.0, transfer: float = 0.0
    ) -> "Devices":
        """Devices of log-normal speeds, always there.

        Args:
          users: how many.
          seed: of the draws.
          seconds: a step takes, in the median.
          spread: standard deviation of the logarithm of the speeds; the transfer varies with them.
          transfer: seconds, in the median.
        """
        normal = generator(Stream.DEVICES, seed, "speeds").standard_normal(users)
        slowness = np.exp(spread * normal)
        whole = np.zeros(users), np.full(users, _DAY)
        return cls(seconds * slowness, transfer * slowness, *whole)

    @classmethod
    def read(cls, path: str | Path, users: Sequence[str]) -> "Devices":
        """Devices from a CSV file with a header.

        Columns: user, seconds_per_step; and if they are there, transfer_seconds (else 0), from_hour
        and to_hour (else 0 and 24), decimal hours of the day. Other columns are ignored.

        Args:
          path: of the file.
          users: names, each of which must have one row; rows of others are ignored.

        Raises:
          UserError: for a file that cannot be read, columns or users that are missing, or values
            out of range.
        """
        rows = _rows_of(Path(path))
        if missing := [user for user in users if user not in rows]:
            raise UserError(f"{path} has no row of user {missing[0]!r}: add one for each user")
        values = np.array([rows[user] for user in users]).reshape(len(users), 4)
        return cls(*values.T)


def _rows_of(path: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ()
            if missing := [name for name in _COLUMNS if name not in header]:
                raise UserError(
                    f"{path} has no column {missing[0]!r}: its first line must name "
                    f"{', '.join(_COLUMNS)}, and may name {', '.join(_OPTIONAL)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row["user"] in found:
                    raise UserError(f"{where}: user {row['user']!r} has two rows: remove one")
                found[row["user"]] = [
                    _number(row, "seconds_per_step", None, math.inf, where),
                    _number(row, "transfer_seconds", 0.0, math.inf, where),
                    _number(row, "from_hour", 0.0, _DAY, where),
                    _number(row, "to_hour", _DAY, _DAY, where),
                ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the devices in {path}: {error}") from error
    return found


def _number(
    row: dict[str, str], name: str, default: float | None, most: float, where: str
) -> float:
    text = row.get(name)
    if text in (None, "") and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)):
        within = f"a number from 0 to {most:g}" if math.isfinite(most) else "a number from 0"
        raise UserError(f"{where}: {name}={text!r} must be {within}")
    return value


@dataclasses.dataclass(frozen=True)
class Turnout:
    """What became of the users drawn for a round.

    arrived: users whose updates count. lost: who trained, but their update was lost or late; what
    stays with them is as after training. Both int64, sorted. drawn, unavailable, dropped, late:
    numbers of users. seconds: that the round takes by the simulated clock.
    """

    arrived: np.ndarray
    lost: np.ndarray
    drawn: int
    unavailable: int
    dropped: int
    late: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Participation:
    """The rules.

    Attributes:
      devices: of all users.
      seed: of all draws.
      available: mean chance that a user who was drawn is there, in (0, 1].
      diurnal: amplitude of that chance over the day, a cosine that peaks at 2 at night, for each
        user up to a few hours (normal, 2 h) earlier or later; the chance stays within [0, 1].
      round_hours: from one round to the next, for the time of day of a round.
      dropout_before, dropout_after: chances that a user who is there drops out before training, or
        after it.
      jitter: standard deviation of the logarithm of a round's time beside the device's own.
      deadline: seconds after which the server waits no longer; 0 for none.
      first: so many updates end the round, and later ones are not waited for; 0 for all. To ask
        more users than that is over-selection. Refused with privacy.

    Raises:
      UserError: for a number out of range.
    """

    devices: Devices
    seed: int = 0
    available: float = 1.0
    diurnal: float = 0.0
    round_hours: float = 0.1
    dropout_before: float = 0.0
    dropout_after: float = 0.0
    jitter: float = 0.0
    deadline: float = 0.0
    first: int = 0

    def __post_init__(self) -> None:
        for name in ("available", "diurnal", "dropout_before", "dropout_after"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"participation.{name}={getattr(self, name)} must be within [0, 1]")
        for name in ("round_hours", "jitter", "deadline", "first"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"participation.{name}={getattr(self, name)} must be at least 0")

    def is_there(self, round: int, user: int) -> bool:
        """Whether a user could take part in a round."""
        hour = round * self.round_hours % _DAY
        begin, end = self.devices.begin[user], self.devices.end[user]
        inside = begin <= hour < end if begin <= end else hour >= begin or hour < end
        if not inside:
            return False
        chance = self.available
        if self.diurnal:
            peak = 2.0 + 2.0 * generator(Stream.DEVICES, self.seed, "peak", user).standard_normal()
            chance += self.diurnal * math.cos(2 * math.pi * (hour - peak) / _DAY)
        return self._happens("there", round, user, chance)

    def seconds(self, round: int, user: int, steps: int) -> float:
        """From the server's call to the user's update."""
        own = self.devices.transfer[user] + steps * self.devices.seconds_per_step[user]
        if self.jitter:
            draw = generator(Stream.DEVICES, self.seed, "jitter", round, user).standard_normal()
            own *= math.exp(self.jitter * draw)
        return float(own)

    def turnout(self, round: int, users: Sequence[int], steps: Sequence[int]) -> Turnout:
        """What becomes of a cohort.

        Args:
          round: from 0. users: who was drawn. steps: that each would train.
        """
        count = dict(zip(users, steps, strict=True))
        there = [u for u in users if self.is_there(round, u)]
        began = [u for u in there if not self._happens("before", round, u, self.dropout_before)]
        back = [u for u in began if not self._happens("after", round, u, self.dropout_after)]
        times = sorted((self.seconds(round, u, count[u]), u) for u in back)
        arrived, seconds = self._in_time(times, len(users))
        kept = {u for _, u in arrived}
        return Turnout(
            arrived=np.array(sorted(kept), np.int64),
            lost=np.array(sorted(set(began) - kept), np.int64),
            drawn=len(users),
            unavailable=len(users) - len(there),
            dropped=len(there) - len(back),
            late=len(times) - len(kept),
            seconds=seconds,
        )

    def _in_time(
        self, times: list[tuple[float, int]], drawn: int
    ) -> tuple[list[tuple[float, int]], float]:
        """Those who arrive before the round ends, and when that is; `times` are in order."""
        arrived = [(t, u) for t, u in times if t <= (self.deadline or math.inf)]
        if 0 < self.first <= len(arrived):
            arrived = arrived[: self.first]
        elif len(arrived) < drawn and self.deadline:
            return arrived, self.deadline
        return arrived, arrived[-1][0] if arrived else 0.0

    def _happens(self, use: str, round: int, user: int, chance: float) -> bool:
        if not 0 < chance < 1:  # a generator for each user is most of the time that this takes
            return chance > 0
        return generator(Stream.DEVICES, self.seed, use, round, user).random() < chance


def async_turnout(sampler: Any, round: int, versions: int) -> Turnout:
    """Of a round whose users hand in as they are done: updates that are too old count as late.

    Args:
      sampler: with `staleness` and `clock`. round: from 0. versions: see `extras.Extras`.
    """
    users, ages = sampler.cohort(round), sampler.staleness(round)
    before = sampler.clock(round - 1) if round else 0.0
    kept = users[ages < versions]
    return Turnout(
        arrived=kept,
        lost=np.zeros(0, np.int64),
        drawn=len(users),
        unavailable=0,
        dropped=0,
        late=len(users) - len(kept),
        seconds=sampler.clock(round) - before,
    )
