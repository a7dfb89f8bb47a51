"""From an attack's scores to a lower bound on epsilon."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedasr.errors import UserError

METHODS = ("one_run", "many_runs")
# Share of canaries guessed in one run, and the least number of guesses (few canaries: a quarter).
# Fixed beforehand, so that nothing has to be paid for looking for the best.
_GUESSED, _FEWEST_GUESSES = 0.02, 40


@dataclasses.dataclass(frozen=True)
class Scores:
    """An attack's scores, higher for those it takes to be present.

    present: float64 [canaries present]. absent: float64 [canaries absent].
    """

    present: np.ndarray
    absent: np.ndarray

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates, float64 [thresholds] from 0 to 1."""
        thresholds = np.unique(np.concatenate([self.present, self.absent]))[::-1]
        rates = [
            1 - np.searchsorted(np.sort(values), thresholds, side="left") / len(values)
            for values in (self.absent, self.present)
        ]
        return np.append(0.0, rates[0]), np.append(0.0, rates[1])


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    epsilon_lower: with probability `confidence` the code's epsilon at `delta` is at least this.
    epsilon_claimed: by the accountant, `math.inf` if there is no guarantee.
    neighbours: what the claim compares, in words.
    strict: the bound of `one_run` that assumes nothing (equal to epsilon_lower for `many_runs`).
    method: see `METHODS`. trials: independent runs. rounds: of each. canaries: over all runs.
    statistic: the attack that gave the bound. auroc: its area under the ROC curve.
    scores: by attack. bounds: epsilon_lower by attack, all of them valid at once.
    """

    epsilon_lower: float
    epsilon_claimed: float
    strict: float
    delta: float
    confidence: float
    method: str
    trials: int
    rounds: int
    canaries: int
    statistic: str
    auroc: float
    scores: Mapping[str, Scores]
    bounds: Mapping[str, float]
    neighbours: str = "not said"

    @property
    def exceeds(self) -> bool:
        """Whether the code is caught: the lower bound is above the claim."""
        return self.epsilon_lower > self.epsilon_claimed


def check_arguments(method: str, trials: int, rounds: int, delta: float, confidence: float) -> None:
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown: choose one of {METHODS}")
    if trials < (2 if method == "many_runs" else 1) or rounds < 1:
        raise UserError("an audit needs a round and a run, and many_runs at least 2 runs")
    if not 0 < delta < 1:
        raise UserError(f"delta must lie between 0 and 1, not {delta}")
    if not 0.5 < confidence < 1:
        raise UserError(f"confidence must lie between 0.5 and 1, not {confidence}")


def conclude(
    attacks: Mapping[str, Scores],
    claimed: float,
    delta: float,
    *,
    method: str,
    trials: int,
    rounds: int,
    confidence: float = 0.95,
    neighbours: str = "not said",
) -> Audit:
    """From scores to a bound: the best attack's, each at a share of the allowed error (Bonferroni).

    Args:
      attacks: scores by name.
      claimed: the accountant's epsilon at `delta`.
      delta, method, trials, rounds, confidence, neighbours: see `Audit`.

    Raises:
      UserError: if all canaries happened to be present, or all absent.
    """
    check_arguments(method, trials, rounds, delta, confidence)
    first = next(iter(attacks.values()))
    if not len(first.present) or not len(first.absent):
        raise UserError("by chance no canary was present, or none absent: use more canaries")
    significance = (1 - confidence) / len(attacks)
    bound = _one_run if method == "one_run" else _many_runs
    found = {name: bound(scores, delta, significance) for name, scores in attacks.items()}
    best = max(found, key=lambda name: found[name][0])
    return Audit(
        epsilon_lower=found[best][0],
        epsilon_claimed=claimed,
        strict=max(strict for _, strict in found.values()),
        delta=delta,
        confidence=confidence,
        method=method,
        trials=trials,
        rounds=rounds,
        canaries=len(first.present) + len(first.absent),
        statistic=best,
        auroc=float(_auditor(attacks[best]).attack_auroc()),
        scores=dict(attacks),
        bounds={name: value for name, (value, _) in found.items()},
        neighbours=neighbours,
    )


def _auditor(scores: Scores) -> Any:
    from jax_privacy.auditing import CanaryScoreAuditor

    return CanaryScoreAuditor(scores.present, scores.absent)


def _many_runs(scores: Scores, delta: float, significance: float) -> tuple[float, float]:
    found = float(_auditor(scores).epsilon_clopper_pearson(significance, delta))
    return found, found


def _one_run(scores: Scores, delta: float, significance: float) -> tuple[float, float]:
    """The bound for Gaussian trade-off curves, and the one for any."""
    from jax_privacy.auditing import Explicit

    everybody = np.sort(np.concatenate([scores.present, scores.absent]))
    guesses = guess_count(len(everybody))
    threshold = Explicit(float(everybody[-guesses]))
    auditor = _auditor(scores)
    bounds: list[Callable[..., float]] = [auditor.epsilon_one_run_fdp, auditor.epsilon_one_run]
    found = [float(b(significance, delta, threshold_strategy=threshold)) for b in bounds]
    return found[0], found[1]


def guess_count(canaries: int) -> int:
    """How many of the highest scores are guessed to be present canaries in `one_run`."""
    return max(round(_GUESSED * canaries), min(_FEWEST_GUESSES, math.ceil(canaries / 4)))
