"""Epsilon of a composed privacy event, by the accountants of dp_accounting.

Two accountants answer. PLD (privacy loss distributions) is numerically exact up to a pessimistic
discretisation and gives the figure to report; RDP (Rényi DP with the tight conversion of
arXiv 2004.00010) is looser, quick, and the figure wherever PLD has none: sampling without
replacement, noise multipliers below `MIN_PLD_NOISE`. Noise is calibrated with the figure to report.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedasr.errors import UserError

# With less noise one round can lose an epsilon of tens of thousands: no figure means anything, and
# the grid on which PLD works no longer resolves both the small and the large losses.
MIN_PLD_NOISE = 5e-3
# Points of the PLD grid on the range of one round's privacy loss, and most points where a round's
# losses are so small that the grid must be finer, this many steps to their standard deviation.
# Epsilon is then within 0.1% of what a ten times finer grid gives, in seconds for 2000 rounds.
_PLD_POINTS, _MOST_PLD_POINTS, _PLD_STEPS = 1e4, 1e5, 3
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
# Calibrated noise is the smallest to this factor, which is below the 0.1% that is promised.
_CALIBRATED = 1.0008


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
    # Both hold, so the smaller does. PLD gives infinity, too, for a delta below the mass that its
    # truncation gives up, and may be the larger where the grid is coarse for many tiny losses.
    use_pld = by_pld is not None and by_pld <= by_rdp
    return Epsilon(
        epsilon=by_rdp if by_pld is None or not use_pld else by_pld,
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
    noisy = [(z, one) for one in _simple_events(event) if (z := _noise_multiplier(one))]
    noise, least = min(noisy, key=lambda pair: pair[0], default=(1.0, None))
    if noise < MIN_PLD_NOISE:
        return None
    # One round's loss reaches about 1/(2 z^2) + 10/z within ten standard deviations.
    reach = 0.5 / noise**2 + 10 / noise
    # The loss of sampling with probability q has a standard deviation of q sqrt(exp(z^-2) - 1).
    rate = getattr(least, "sampling_probability", 1.0)
    deviation = rate * math.sqrt(math.expm1(min(noise**-2, 700)))
    return max(reach / _MOST_PLD_POINTS, min(reach / _PLD_POINTS, deviation / _PLD_STEPS))


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
    being sampled, z the noise multiplier, G(q, z) = exp((a - 1) D_a) of an ordinary Poisson round.
    Both hold whether the user's contribution is replaced by zero in the slot that the user keeps,
    or the user takes no slot.

    * Set the truncated user aside. Except when sampled into a full round, which has probability
      p q whether or not the user's data is there, the round is an ordinary Poisson round. Over T
      rounds the ordinary guarantee at delta - T p q holds, with -T log(1 - p q) added to epsilon.
    * Mix. Full or not is independent of the user, so exp((a - 1) D_a) is at most the mean, with
      weights 1 - p and p, of G(q, z) and a bound for full rounds, where the user displaces another.
      Who takes no slot then moves the sum by two clip norms: G(q, z / 2). Who keeps the slot leaves
      it empty and moves both sides of the comparison from a round without displacement, by two
      clip norms and by one, which are one apart. By advanced joint convexity (arXiv 1807.01647)
      the hockey-stick divergences are at most those of G(q, z / 2) with the user against without,
      and those of G(q, z) without against with; summed into exp((a - 1) D_a) (arXiv 1702.07476
      in terms of hockey-sticks) they give G(q, z / 2) + G(q, z) - 1, the larger bound.

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

    @functools.cache
    def curve(simple):
        if isinstance(simple, SkellamDpEvent):
            if neighboring_relation is NeighboringRelation.REPLACE_ONE:
                raise UserError(f"{simple} has no Rényi bound under {neighboring_relation}.")
            return simple.rdp(orders)
        accountant = rdp.RdpAccountant(orders, neighboring_relation)
        if not accountant.supports(simple):
            raise UserError(f"{simple} has no Rényi bound under {neighboring_relation}.")
        return accountant.compose(simple).rdp

    def convert(values, at, slack=0.0):
        found, order = rdp.compute_epsilon(orders, values, at)
        return max(0.0, float(found)) + slack, float(order)

    with _quiet():
        total = sum((count * curve(simple) for simple, count in plain), np.zeros(len(orders)))
        candidates = [convert(total, delta - mass, slack)] if mass < delta else []
        # Both exceed the ordinary bound: mixing cannot help once the first all but equals it.
        if mass > 1e-3 * delta:
            exponent = orders - 1
            for ordinary, doubled, full, count in mixed:
                one, two = curve(ordinary), curve(doubled)
                with np.errstate(invalid="ignore", divide="ignore"):
                    # log of G(q, z / 2) + G(q, z) - 1
                    less = exponent * one + np.log(-np.expm1(-exponent * one))
                    displaced = np.logaddexp(exponent * two, less)
                    mean = np.logaddexp(exponent * one + np.log1p(-full), displaced + np.log(full))
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
    """Smallest noise multiplier (to 0.1%) whose reported epsilon is at most the target.

    The epsilon is that of `epsilon`, so that what is calibrated is what will be reported; Rényi DP,
    which is quick, says where to begin, so that few evaluations by PLD are needed.

    Args:
      target_epsilon: epsilon of the whole run, positive and finite.
      delta: in (0, 1).
      event_of: from a noise multiplier to the `dp_accounting.DpEvent` of the whole run.
      neighboring_relation: under which the events hold.

    Returns:
      The noise multiplier, at least 1e-3.

    Raises:
      UserError: if no noise up to a multiplier of 1e6 reaches the target.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise UserError(f"target_epsilon must be finite and above 0, not {target_epsilon}.")

    @functools.cache
    def by_rdp(noise: float) -> float:
        return rdp_epsilon(event_of(noise), delta, neighboring_relation)

    def reported(noise: float) -> float:
        return epsilon(event_of(noise), delta, neighboring_relation).epsilon

    @functools.cache
    def by_pld(noise: float) -> float:
        found = pld_epsilon(event_of(noise), delta, neighboring_relation)
        return by_rdp(noise) if found is None or found == math.inf else found

    span = (_MIN_NOISE, _MAX_NOISE)
    guess = smallest(by_rdp, target_epsilon, 1.0, *span, 1.05)
    figure, slope = reported, -1.5
    if guess is not None:
        slope = math.log(by_rdp(1.05 * guess) / by_rdp(guess)) / math.log(1.05)
        if by_pld(guess) < by_rdp(guess):  # and so it is near there: PLD alone is the quicker
            figure = by_pld
    found = smallest(figure, target_epsilon, guess or 1.0, *span, _CALIBRATED, slope)
    if found is None:
        raise UserError(
            f"No noise reaches epsilon {target_epsilon} at delta {delta}; "
            "ask for more epsilon or delta, fewer rounds, or more slots."
        )
    return found


def smallest(
    figure: Callable[[float], float],
    target: float,
    guess: float,
    least: float,
    most: float,
    ratio: float,
    slope: float = -1.5,
) -> float | None:
    """Smallest x in [least, most], to a factor, at which a falling figure is at most the target.

    The secant method on logarithms, within a bracket that it makes itself; a handful of evaluations
    where the figure is nearly a power of x.

    Args:
      figure: of x, falling; may be infinite.
      target: above 0.
      guess: where to begin, in [least, most].
      least, most: bounds of x, above 0.
      ratio: above 1: the figure exceeds the target at the result divided by this (or it is least).
      slope: a first idea of the slope of the figure's logarithm over that of x.

    Returns:
      x, or None if the figure exceeds the target at `most`.
    """
    seen: dict[float, float] = {}  # log x: log(figure / target), falling from above 0 to below
    step = math.log(ratio)

    def excess(at: float) -> float:
        if at not in seen:
            value = figure(math.exp(at)) / target
            seen[at] = math.log(max(value, 1e-9)) if value < math.inf else math.inf
        return seen[at]

    lowest, highest = math.log(least), math.log(most)
    low = high = None  # above the target, and not
    at, stride = math.log(guess), 0.05
    while True:
        if excess(at) <= 0:
            high = at
        else:
            low = at
        if high is not None and (high <= lowest or (low is not None and high - low <= step)):
            return min(max(math.exp(high), least), most)
        if low is not None and low >= highest:
            return None
        if low is None or high is None:  # further out, if need be by more every time
            stride, slope = _outwards(list(seen.items()), excess(at), stride, slope, step)
            at = max(at - stride, lowest) if low is None else min(at + stride, highest)
        else:
            at = _inwards((low, excess(low)), (high, excess(high)), step, secant=len(seen) < 12)


def _outwards(
    seen: Sequence[tuple[float, float]], over: float, stride: float, slope: float, step: float
) -> tuple[float, float]:
    """How far `smallest` goes on to find a bracket, and the slope that it now believes in."""
    if abs(over) < math.inf and len(seen) < 4:
        if len(seen) > 1:
            (x0, y0), (x1, y1) = seen[-2:]
            slope = (y1 - y0) / (x1 - x0)
        return abs(over / min(slope, -0.5)) + step, slope
    return min(4 * stride, 3.0), slope


def _inwards(
    low: tuple[float, float], high: tuple[float, float], step: float, secant: bool
) -> float:
    """Where `smallest` looks within a bracket of points (log x, excess)."""
    (left, over), (right, under) = low, high
    root = (left + right) / 2
    if over < math.inf and secant:
        root = left + (right - left) * over / (over - under)
    # A little above the root; or, where that is known to be enough, a last step below it.
    at = root + 0.3 * step
    if at > right - 0.3 * step:
        at = right - 0.95 * step
    return max(at, left + 0.3 * step)


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


def epsilon_in_words(epsilon: float | None) -> str:
    """An epsilon for people, with three digits; None is one that is not known."""
    if epsilon is None:
        return "unknown"
    return f"{epsilon:.3g}" if math.isfinite(epsilon) else "infinite (no guarantee)"
