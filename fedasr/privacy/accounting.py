"""Epsilon of a composed privacy event, by the accountants of dp_accounting.

Two accountants answer. PLD (privacy loss distributions) is numerically exact up to a pessimistic
discretisation and gives the figure to report; RDP (Rényi DP with the tight conversion of
arXiv 2004.00010) is looser, quick enough to calibrate noise with, and the figure wherever PLD has
none: sampling without replacement, noise multipliers below `MIN_PLD_NOISE`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fedasr.errors import UserError

# With less noise one round can lose an epsilon of tens of thousands: no figure means anything, and
# the grid on which PLD works no longer resolves both the small and the large losses.
MIN_PLD_NOISE = 5e-3
# Points of the PLD grid on the range of one round's privacy loss. Epsilon is within 0.1% of what a
# ten times finer grid gives, in about a second for 2000 rounds.
_PLD_POINTS = 1e4
# Close to 1 for little noise, in the hundreds for much; dp_accounting's conversion needs > 1.01.
_POISSON_ORDERS = np.concatenate(
    [
        [1.011, 1.02, 1.03, 1.05],
        np.arange(110, 200, 5) / 100,
        np.arange(20, 110) / 10,
        np.arange(11, 64),
        [64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 1024],
    ]
)
# Bounds for sampling without replacement exist at integers, and interpolate in between.
_INTEGER_ORDERS = np.array([*range(2, 65), 80, 96, 128])
_MIN_NOISE, _MAX_NOISE = 1e-3, 1e6


@dataclasses.dataclass(frozen=True)
class Epsilon:
    """A privacy guarantee and where it comes from.

    epsilon: the figure to report, `math.inf` if there is no guarantee.
    delta: the delta that goes with it.
    accountant: "PLD" or "RDP", which of the two figures `epsilon` is.
    epsilon_rdp: by Rényi DP.
    epsilon_pld: by privacy loss distributions, None where they cannot be computed.
    sampling: how the users of a round were chosen, in words.
    rdp_order: the Rényi order that gives `epsilon_rdp`.
    pld_interval: the grid of privacy losses behind `epsilon_pld`, None without it.
    """

    epsilon: float
    delta: float
    accountant: str
    epsilon_rdp: float
    epsilon_pld: float | None
    sampling: str
    rdp_order: float
    pld_interval: float | None


def compose(event: Any, rounds: int) -> Any:
    """The `dp_accounting.DpEvent` of `rounds` adaptive repetitions of `event`."""
    import dp_accounting

    if rounds != int(rounds) or rounds < 0:
        raise UserError(f"rounds must be a whole number, 0 or more, not {rounds}.")
    if rounds == 0:
        return dp_accounting.NoOpDpEvent()
    return dp_accounting.SelfComposedDpEvent(event, int(rounds))


def epsilon(event: Any, delta: float, neighboring_relation: Any, sampling: str = "") -> Epsilon:
    """Epsilon of `event` at `delta`, by both accountants.

    Args:
      event: a `dp_accounting.DpEvent`, composed over all rounds.
      delta: in (0, 1).
      neighboring_relation: the `dp_accounting.NeighboringRelation` under which `event` holds.
      sampling: how users were chosen, in words, for the report.
    """
    by_rdp, order = _rdp_epsilon_and_order(event, delta, neighboring_relation)
    by_pld = pld_epsilon(event, delta, neighboring_relation)
    # PLD gives infinity, too, for a delta below the mass that its truncation gives up.
    use_pld = by_pld is not None and (math.isfinite(by_pld) or not math.isfinite(by_rdp))
    return Epsilon(
        epsilon=by_pld if use_pld else by_rdp,
        delta=delta,
        accountant="PLD" if use_pld else "RDP",
        epsilon_rdp=by_rdp,
        epsilon_pld=by_pld,
        sampling=sampling,
        rdp_order=order,
        pld_interval=None if by_pld is None else _pld_interval(event),
    )


def _pld_interval(event: Any) -> float | None:
    """Spacing of the grid of losses for the least noise in `event`; None for too little noise."""
    multipliers = [z for z in map(_noise_multiplier, _simple_events(event)) if z]
    noise = min(multipliers, default=1.0)
    if noise < MIN_PLD_NOISE:
        return None
    # One round's loss reaches about 1/(2 z^2) + 10/z within ten standard deviations.
    return (0.5 / noise**2 + 10 / noise) / _PLD_POINTS


def pld_epsilon(event: Any, delta: float, neighboring_relation: Any) -> float | None:
    """Epsilon by privacy loss distributions, or None where they cannot be computed.

    None for events that dp_accounting's PLD accountant does not know (sampling without
    replacement) and for noise multipliers below `MIN_PLD_NOISE`.
    """
    from dp_accounting import pld

    _check_delta(delta)
    if (interval := _pld_interval(event)) is None:
        return None
    accountant = pld.PLDAccountant(neighboring_relation, interval)
    if not accountant.supports(event):
        return None
    return float(accountant.compose(event).get_epsilon(delta))


def rdp_epsilon(event: Any, delta: float, neighboring_relation: Any) -> float:
    """Epsilon by Rényi DP with the tight conversion to (epsilon, delta).

    dp_accounting has no Rényi bound for Poisson sampling with truncated rounds, so the smaller of
    two is taken here. Let p be the probability that the other users fill all the slots, q that of
    being sampled, z the noise multiplier.

    * Set the truncated user aside. Except when sampled into a full round, which has probability
      p q whether or not the user's data is there, the round is an ordinary Poisson round. Over T
      rounds the ordinary guarantee at delta - T p q holds, with -T log(1 - p q) added to epsilon.
    * Mix. Full or not is independent of the user, and in a full round the user displaces another,
      which doubles the sensitivity, so exp((a - 1) D_a) is at most the mean, with weights 1 - p
      and p, of the ordinary bounds at noise z and z / 2.

    Raises:
      UserError: if the event has no Rényi bound under this relation.
    """
    return _rdp_epsilon_and_order(event, delta, neighboring_relation)[0]


def _rdp_epsilon_and_order(
    event: Any, delta: float, neighboring_relation: Any
) -> tuple[float, float]:
    from dp_accounting import NeighboringRelation, dp_event, rdp

    from fedasr.privacy.events import SkellamDpEvent

    _check_delta(delta)
    plain, mixed = [], []
    mass = slack = 0.0
    for simple, count in _simple_events(event, counts=True):
        if getattr(simple, "truncated_batch_size", None) is None:
            plain.append((simple, count))
            continue
        full = full_round_probability(simple)
        q = simple.sampling_probability
        ordinary, doubled = _untruncated(simple, 1), _untruncated(simple, 2)
        plain.append((ordinary, count))
        mixed.append((ordinary, doubled, full, count))
        mass += count * full * q
        slack -= count * math.log1p(-full * q) if full * q < 1 else -math.inf

    fixed_size = any(
        isinstance(simple, dp_event.SampledWithoutReplacementDpEvent) for simple, _ in plain
    )
    orders = _INTEGER_ORDERS if fixed_size else _POISSON_ORDERS

    def curve(simple, count=1):
        if isinstance(simple, SkellamDpEvent):
            if neighboring_relation is NeighboringRelation.REPLACE_ONE:
                raise UserError(f"{simple} has no Rényi bound under {neighboring_relation}.")
            return count * simple.rdp(orders)
        accountant = rdp.RdpAccountant(orders, neighboring_relation)
        if not accountant.supports(simple):
            raise UserError(f"{simple} has no Rényi bound under {neighboring_relation}.")
        return accountant.compose(simple, count).rdp

    def convert(values, at, slack=0.0):
        found, order = rdp.compute_epsilon(orders, values, at)
        return max(0.0, float(found)) + slack, float(order)

    with _quiet():
        total = sum((curve(simple, count) for simple, count in plain), np.zeros(len(orders)))
        candidates = [convert(total, delta - mass, slack)] if mass < delta else []
        # Both exceed the ordinary bound: mixing cannot help once the first all but equals it.
        if mass > 1e-3 * delta:
            exponent = orders - 1
            for ordinary, doubled, full, count in mixed:
                one, two = curve(ordinary), curve(doubled)
                with np.errstate(invalid="ignore", divide="ignore"):
                    mean = np.logaddexp(
                        exponent * one + np.log1p(-full), exponent * two + np.log(full)
                    )
                    total = total + count * (mean / exponent - one)
            # Infinite bounds may have given inf - inf.
            candidates.append(convert(np.where(np.isnan(total), np.inf, total), delta))
    return min(candidates)


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    event_of: Callable[[float], Any],
    neighboring_relation: Any,
) -> float:
    """Smallest noise multiplier (to 0.01%) whose epsilon by Rényi DP is at most the target.

    The final epsilon, by PLD, is then a little below the target.

    Args:
      target_epsilon: epsilon of the whole run, positive.
      delta: in (0, 1).
      event_of: from a noise multiplier to the `dp_accounting.DpEvent` of the whole run.
      neighboring_relation: under which the events hold.

    Returns:
      The noise multiplier, at least 1e-3.

    Raises:
      UserError: if no noise up to a multiplier of 1e6 reaches the target.
    """
    if not target_epsilon > 0:
        raise UserError(f"target_epsilon must be above 0, not {target_epsilon}.")

    def reached(noise):
        return rdp_epsilon(event_of(noise), delta, neighboring_relation) <= target_epsilon

    low = high = 1.0
    while not reached(high):
        low, high = high, 4 * high
        if high > _MAX_NOISE:
            raise UserError(
                f"No noise reaches epsilon {target_epsilon} at delta {delta}; "
                "ask for more epsilon or delta, fewer rounds, or more slots."
            )
    while low == high or reached(low):
        low, high = low / 4, low
        if high <= _MIN_NOISE:
            return _MIN_NOISE
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta must lie between 0 and 1, not {delta}.")


def _simple_events(event: Any, counts: bool = False) -> Iterator[Any]:
    """The events that `event` composes, with or without how often each happens."""
    from dp_accounting import dp_event

    def walk(node, count):
        if isinstance(node, dp_event.SelfComposedDpEvent):
            yield from walk(node.event, count * node.count)
        elif isinstance(node, dp_event.ComposedDpEvent):
            for child in node.events:
                yield from walk(child, count)
        else:
            yield (node, count) if counts else node

    return walk(event, 1)


def _noise_multiplier(event: Any) -> float | None:
    """Noise multiplier of a (subsampled) Gaussian event, None for other events."""
    while hasattr(event, "event"):
        event = event.event
    return getattr(event, "noise_multiplier", None)


def _untruncated(event: Any, moved: float) -> Any:
    """A truncated round as an ordinary one in which a user moves the sum `moved` times as far."""
    from dp_accounting import dp_event

    if not isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        return event.untruncated(moved)
    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier / moved)
    return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)


def full_round_probability(event: Any) -> float:
    """Probability that, without one given user, a truncated round has no slot left."""
    from scipy import stats

    return float(
        stats.binom.sf(
            event.truncated_batch_size - 1, event.dataset_size - 1, event.sampling_probability
        )
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences dp_accounting's note that it leaves out an order whose series does not converge."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
