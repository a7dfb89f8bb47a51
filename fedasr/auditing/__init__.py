"""Auditing: what an attacker finds out about users in spite of the noise, as a bound on epsilon.

An accountant proves an upper bound on epsilon for a mechanism on paper. An audit attacks the code
that runs: *canary* users, each present or absent by chance, are guessed from what the server
publishes, and from how well the guesses do follows a *lower* bound on the epsilon of the code. A
lower bound above the claimed epsilon proves that the code is not the mechanism (or bad luck, with
probability 1 - confidence); one below proves nothing.

The attack is a strong one. All other users are known (they contribute zero), every round's noisy
mean is published, and a canary's update is enormous along a direction of its own, so that clipping
brings it to exactly the clip norm: one coordinate of every layer belongs to a canary, which makes
canaries' scores independent and any layer that escapes clipping glaring. Every fifth canary has a
hundred examples, so that weights would show. Sampling, batching, the cohort's sum, clipping,
division and noise are those of `fedasr.federated.simulation.Simulation`.

It is not the strongest: other users could oppose the canary, which matters where a user displaces
another (fixed-size sampling, few slots), and an attacker could know the turns of users in turn and
undo the correlation of noise. Nothing of that makes a bound too high.

An absent canary is a user whose update is zero, which is what Poisson sampling and users in turn
are compared with. (With fewer slots than users the absent one still takes a slot; the claim covers
who takes none, too, of which this audit sees nothing.) Where users are replaced by any other it is
one replacement.

Two ways to bound epsilon, both by jax_privacy:

* `many_runs`: independent runs with one canary; Clopper-Pearson intervals of the true and false
  positive rates (Nasr et al., 2023, arXiv 2302.07956, section 3). It assumes nothing about the
  mechanism, and needs thousands of runs.
* `one_run`: many canaries with a fair coin each in one run, the highest scores guessed to be
  present (Steinke et al., 2023, arXiv 2305.08846). That bound, `strict`, assumes nothing and is
  loose. The one reported takes the trade-off curve to be that of a Gaussian mechanism (Mahloujifar
  et al., 2024, arXiv 2410.22235). That is exact without sampling; with sampling it is an
  approximation that is wrong where delta comes near the sampling probability q, so delta must be at
  most q / 100 (at q / 250 it never exceeded the claim of correct code in twenty audits). Several
  runs with canaries of their own are one larger run.

jax_privacy's `epsilon_from_gdp` is not used: version 2.0.0 takes the absolute value of a negative
lower bound, and reports an epsilon where there is none.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.corpus import LazyUsers
from fedasr.errors import UserError
from fedasr.privacy import clipping
from fedasr.privacy.mechanism import Mechanism
from fedasr.streams import Stream, generator

METHODS = ("one_run", "many_runs")
# Canaries are so many clip norms long: what is not clipped cannot be overlooked.
_LENGTH = 1e4
_HEAVY_EVERY, _HEAVY_EXAMPLES = 5, 100
_LAYERS = ("first", "second", "third")
# Share of canaries guessed in one run, and the least number of guesses (few canaries: a quarter).
# Fixed beforehand, so that nothing has to be paid for looking for the best.
_GUESSED, _FEWEST_GUESSES = 0.02, 40
_CHUNK_BYTES = 64 << 20


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


# ------------------------------------------------------------------------------- crafted updates


class CanaryCorpus:
    """Users of whom the first are canaries; nothing is stored but who is present when.

    An example is {"canary": int32 index, "presence": float32 [trials]}; the presence of users who
    are no canaries is zero.

    Args:
      presence: float32 [trials, canaries], what scales a canary's contribution.
      population: number of users, at least the canaries.
    """

    def __init__(self, presence: np.ndarray, population: int) -> None:
        self._presence = np.asarray(presence, np.float32)
        canaries = self._presence.shape[1]
        if not 1 <= canaries <= population:
            raise UserError(f"{canaries} canaries do not fit among {population} users")
        self.users = LazyUsers(population, lambda i: f"{i:012d}")
        self.sizes = np.ones(population, np.int64)
        self.sizes[:canaries:_HEAVY_EVERY] = _HEAVY_EXAMPLES

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """No array is ragged."""
        del user
        return {}

    def get(self, user: int, indices: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        trials, canaries = self._presence.shape
        here = user < canaries
        presence = self._presence[:, user] if here else np.zeros(trials, np.float32)
        canary = np.asarray(user if here else 0, np.int32)
        return [{"canary": canary, "presence": presence} for _ in indices]


def canary_params(canaries: int) -> dict[str, jax.Array]:
    """Zeros for every canary in each of three layers: {name: float32 [canaries]}."""
    return {name: jnp.zeros(canaries, jnp.float32) for name in _LAYERS}


def for_canaries(mechanism: Mechanism, canaries: int) -> Mechanism:
    """The mechanism on the canaries' layers in place of a model: noise in shares depends on it."""
    if mechanism.secure is None:
        return mechanism
    secure = dataclasses.replace(mechanism.secure, dimension=len(_LAYERS) * canaries)
    return dataclasses.replace(mechanism, secure=secure)


def layer_weights(mechanism: Mechanism, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Share of the clip norm that a clipped canary has in each layer; the squares add up to 1."""
    if mechanism.budget == "global":
        return dict.fromkeys(params, 1 / math.sqrt(len(params)))
    bounds = clipping.layer_bounds(params, mechanism.clip_norm, mechanism.budget, lambda path: path)
    return dict(zip(sorted(params), (float(b) / mechanism.clip_norm for b in bounds), strict=True))


def crafted_update(weights: Mapping[str, float], length: float, rounds: int) -> Any:
    """A `fedasr.federated.client.ClientUpdate`: `length` along the canary's own coordinates.

    Args:
      weights: from `layer_weights`.
      length: L2 norm of the update of a canary that is present, before clipping.
      rounds: of a trial; round r belongs to trial r // rounds.
    """
    from fedasr.federated.client import ClientMetrics, take_batch

    def update(params, batches, num_steps, key, max_steps=None, round=0):
        del num_steps, key, max_steps
        batch = take_batch(batches, 0)
        presence = batch["presence"][0, round // rounds]
        canary = batch["canary"][0]
        delta = {
            name: jnp.zeros_like(leaf).at[canary].set(presence * (length * weights[name]))
            for name, leaf in params.items()
        }
        return delta, ClientMetrics(jnp.float32(0), {})

    return update


def publish() -> optax.GradientTransformation:
    """A server optimiser after which the parameters *are* the round's noisy mean."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.subtract, updates, params))


def toss(trials: int, canaries: int, method: str, seed: int) -> np.ndarray:
    """Who is present: bool [trials, canaries].

    Independent fair coins for `one_run`; for `many_runs`, which compares two fixed numbers of
    runs, one half of the trials, at random.
    """
    rng = generator(Stream.COINS, seed)
    if method == "one_run":
        return rng.random((trials, canaries)) < 0.5
    return rng.permutation(np.arange(trials) % 2 == 0)[:, None]


def observe(
    mechanism: Mechanism,
    present: np.ndarray,
    rounds: int,
    seed: int,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """Runs the rounds and projects what is published onto the canaries' directions.

    Where neither sampling nor noise remembers earlier rounds, all trials are blocks of rounds of
    one simulation; otherwise each trial is a simulation with seeds of its own.

    Args:
      mechanism: what is audited.
      present: bool [trials, canaries], from `toss`.
      rounds: of a trial.
      seed: of the simulation.
      devices: default all local devices.

    Returns:
      float64 [trials, rounds, canaries], in units of what one canary adds to the noisy sum.
    """
    remembers = (
        mechanism.correlation is not None
        or mechanism.adaptive is not None
        or mechanism.sampler.separation > 1
    )
    if not remembers or len(present) == 1:
        return _observe(mechanism, present, rounds, seed, devices)
    return np.concatenate(
        [
            _observe(mechanism, row[None], rounds, seed, devices, f"trial {trial}")
            for trial, row in enumerate(present)
        ]
    )


def _observe(
    mechanism: Mechanism,
    present: np.ndarray,
    rounds: int,
    seed: int,
    devices: Sequence[jax.Device] | None,
    identity: str = "",
) -> np.ndarray:
    from fedasr.data.batching import Batching
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.simulation import Simulation

    sampler = mechanism.sampler
    trials, canaries = present.shape
    corpus = CanaryCorpus(present, sampler.population)
    params = canary_params(canaries)
    weights = layer_weights(mechanism, params)
    bytes_each = 4 * len(params) * canaries
    simulation = Simulation(
        corpus,
        mechanism,
        FedAvg(crafted_update(weights, _LENGTH * mechanism.clip_norm, rounds), publish()),
        Batching(1, steps=1, buckets=()),
        hardware=Hardware(devices, chunk=max(1, min(sampler.slots, _CHUNK_BYTES // bytes_each))),
        seed=seed,
        identity=f"audit {identity}",
    )
    unit = mechanism.clip_norm / sampler.expected_cohort
    seen = np.zeros((trials * rounds, canaries))
    state = simulation.init(params)
    for i, (state, _) in enumerate(simulation.run(state, trials * rounds)):
        mean = jax.device_get(state.params)
        for name, weight in weights.items():
            seen[i] += weight / unit * mean[name].astype(np.float64)
    return seen.reshape(trials, rounds, canaries)


def statistics(seen: np.ndarray, mechanism: Mechanism) -> dict[str, np.ndarray]:
    """The attacks: {name: float64 [trials, canaries]}.

    likelihood: log of the likelihood of what was seen with the canary over that without, for the
      claimed mechanism: by the Neyman-Pearson lemma nothing tells the two apart better, as long as
      the code is the mechanism.
    spread: largest minus smallest of the rounds, which sees through noise that is reused.

    Args:
      seen: from `observe`.
      mechanism: the claimed one, for its noise and sampling probability.
    """
    q = mechanism.sampler.expected_cohort / mechanism.sampler.population
    z = mechanism.noise_multiplier

    def log_ratio(x):
        sampled = math.log(q) + (2 * x - 1) / (2 * z**2)
        return np.logaddexp(math.log1p(-q), sampled) if q < 1 else sampled

    attacks = {"likelihood": log_ratio(seen).sum(axis=1)}
    if seen.shape[1] > 1:
        attacks["spread"] = seen.max(axis=1) - seen.min(axis=1)
    return attacks


def audit_updates(
    mechanism: Mechanism,
    rounds: int,
    delta: float,
    *,
    method: str = "one_run",
    trials: int = 1,
    canaries: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Audit:
    """Audits the round code under `mechanism` with canaries whose updates are crafted.

    Args:
      mechanism: its sampler's population holds the canaries.
      rounds: of a run, at least 1.
      delta: in (0, 1); the claim is a curve, and larger deltas need fewer canaries to test it.
      method: see `METHODS`.
      trials: independent runs; for "many_runs" at least 2.
      canaries: of a run; None for everybody, at most 1000 ("one_run"), or one ("many_runs").
      confidence: of the bound.
      seed: of coins and simulation; users are sampled by the mechanism's own seed.
      devices: default all local devices.

    Raises:
      UserError: if an argument is out of range or there is no noise to audit.
    """
    _check(method, trials, rounds, delta, confidence)
    if mechanism.noise_multiplier == 0:
        raise UserError("a mechanism without noise claims no epsilon: there is nothing to audit")
    if mechanism.adaptive is not None:
        # A canary's zero would vote, too, and scores would change units from round to round.
        raise UserError("crafted canaries audit fixed bounds: set privacy.adaptive.enabled=False")
    probability = mechanism.sampler.expected_cohort / mechanism.sampler.population
    if method == "one_run" and mechanism.sampler.amplifies and delta > probability / 100:
        raise UserError(
            f"delta={delta:g} is too near the sampling probability of {probability:.3g} for "
            f"one_run: choose at most {probability / 100:.2g}, or many_runs"
        )
    if canaries is None:
        canaries = default_canaries(mechanism, method)
    if method == "many_runs" and canaries != 1:
        raise UserError("many_runs has one canary in each run")
    mechanism = for_canaries(mechanism, canaries)
    present = toss(trials, canaries, method, seed)
    seen = observe(mechanism, present, rounds, seed, devices)
    attacks = {
        name: Scores(values[present], values[~present])
        for name, values in statistics(seen, mechanism).items()
    }
    claimed = mechanism.epsilon(rounds, delta).epsilon
    return conclude(
        attacks,
        claimed,
        delta,
        method=method,
        trials=trials,
        rounds=rounds,
        confidence=confidence,
        neighbours=mechanism.sampler.neighbours,
    )


def default_canaries(mechanism: Mechanism, method: str) -> int:
    """Canaries of a run whose updates are crafted: one, or everybody, at most 1000."""
    return 1 if method == "many_runs" else min(mechanism.sampler.population, 1000)


def _check(method: str, trials: int, rounds: int, delta: float, confidence: float) -> None:
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown: choose one of {METHODS}")
    if trials < (2 if method == "many_runs" else 1) or rounds < 1:
        raise UserError("an audit needs a round and a run, and many_runs at least 2 runs")
    if not 0 < delta < 1:
        raise UserError(f"delta must lie between 0 and 1, not {delta}")
    if not 0.5 < confidence < 1:
        raise UserError(f"confidence must lie between 0.5 and 1, not {confidence}")


# ---------------------------------------------------------------------------------------- bounds


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
    _check(method, trials, rounds, delta, confidence)
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


# ------------------------------------------------------------------------------------------ plot


def write_roc(audit: Audit, path: str) -> None:
    """Draws the attacks' ROC curves, on logarithmic axes, with what (epsilon, delta)-DP allows.

    Args:
      audit: what is drawn.
      path: of the picture; its suffix names the format.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in audit.scores.items():
        fpr, tpr = scores.roc()
        axes.step(fpr, tpr, where="post", label=f"{name}: epsilon >= {audit.bounds[name]:.3g}")
    least = 0.5 / max(len(s.absent) for s in audit.scores.values())
    rates = np.geomspace(least, 1, 200)
    axes.plot(rates, rates, color="grey", linewidth=0.8, linestyle=":", label="guessing blindly")
    if math.isfinite(audit.epsilon_claimed):
        exponential = np.exp(min(audit.epsilon_claimed, 700.0))
        allowed = np.min(
            [
                exponential * rates + audit.delta,
                1 - (1 - audit.delta - rates) / exponential,
                np.ones_like(rates),
            ],
            axis=0,
        )
        label = f"most that epsilon {audit.epsilon_claimed:.3g} allows"
        axes.plot(rates, allowed, color="black", linewidth=1, linestyle="--", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1.05),
        xlabel="false positive rate (absent canaries taken for present)",
        ylabel="true positive rate",
    )
    axes.set_title(
        f"{audit.canaries:,} canaries, {audit.rounds:,} rounds, delta {audit.delta:g}: "
        f"epsilon >= {audit.epsilon_lower:.3g} ({audit.confidence:.0%} confidence)",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path}: {error}") from error
