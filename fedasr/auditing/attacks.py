"""Runs the round code with canaries, and tells from what it publishes who was there."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from fedasr.auditing.bounds import Audit, Scores, check_arguments, conclude
from fedasr.auditing.canaries import (
    CanaryCorpus,
    canary_params,
    crafted_update,
    default_canaries,
    for_canaries,
    layer_weights,
    publish,
    toss,
)
from fedasr.errors import UserError
from fedasr.privacy.mechanism import Mechanism

# Canaries are so many clip norms long: what is not clipped cannot be overlooked.
_LENGTH = 1e4
_CHUNK_BYTES = 64 << 20


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
    check_arguments(method, trials, rounds, delta, confidence)
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
