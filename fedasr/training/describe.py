"""The privacy of a run, as its summary tells it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fedasr.privacy import accounting, clipping, ledger
from fedasr.privacy.mechanism import Mechanism
from fedasr.training import selection
from fedasr.training.builders import decoders, models
from fedasr.training.config import Config


def describe_privacy(
    mechanism: Mechanism,
    config: Config,
    rounds: int,
    params: Any,
    entries: Sequence[ledger.Entry] = (),
    ledger_known: bool = True,
) -> dict[str, Any]:
    """The summary's "privacy": the mechanism, and epsilon as simulated and as deployed.

    Args:
      mechanism: of the run.
      config: for delta and the deployments.
      rounds: so many were, or would be, run.
      params: parameters or their shapes, for the bounds by layer.
      entries: of all runs behind the model, this one's last.
      ledger_known: whether the model that it started from had a ledger.
    """
    privacy = config.privacy
    if not privacy.enabled:
        return {"enabled": False, "epsilon": None, "extrapolations": []}
    spent = mechanism.epsilon(rounds, privacy.delta)
    extrapolations = []
    for cohort, population in privacy.deployments:
        deployed = mechanism.deployed(cohort, population)
        figure = deployed.epsilon(rounds, privacy.delta)
        extrapolations.append(
            {
                "cohort": cohort,
                "population": population,
                "rounds": rounds,
                **_multipliers(deployed),
                **_figure(figure),
                **_shares(deployed, rounds, privacy.delta),
                "neighbours": deployed.sampler.neighbours,
            }
        )
    bounds = {}
    if mechanism.budget != "global":
        names = clipping.layer_names(params, mechanism.layers)
        values = clipping.layer_bounds(
            params, mechanism.clip_norm, mechanism.budget, mechanism.layers
        )
        bounds = dict(zip(names, map(float, values), strict=True))
    return {
        "enabled": True,
        "clip_norm": mechanism.clip_norm,
        "budget": privacy.budget,
        "sigma": mechanism.sigma,
        **_multipliers(mechanism),
        "delta": privacy.delta,
        "delta_at_tails": mechanism.tail_delta(rounds),
        **_noise(mechanism, params),
        "layer_bounds": bounds,
        "not_covered": not_covered(config, ledger_known),
        "ledger": describe_ledger(entries, ledger_known, spent, extrapolations)
        if entries
        else None,
        **_figure(spent),
        **_shares(mechanism, rounds, privacy.delta),
        "neighbours": mechanism.sampler.neighbours,
        "extrapolations": extrapolations,
    }


def noise_words(mechanism: Mechanism) -> str:
    """The kind of noise."""
    if mechanism.secure is not None:
        return f"Skellam in shares, {mechanism.secure.bits} bits"
    return "independent" if mechanism.correlation is None else mechanism.correlation.description


def _multipliers(mechanism: Mechanism) -> dict[str, float]:
    """Noise on the sum, over the clip norm and over how far one user can move the sum."""
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_over_sensitivity": mechanism.noise_over_sensitivity,
    }


def _noise(mechanism: Mechanism, params: Any) -> dict[str, Any]:
    """How the noise hangs together over rounds, what remembering it costs, and adaptive bounds."""
    correlation, adaptive = mechanism.correlation, mechanism.adaptive
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    described = {
        "noise": noise_words(mechanism),
        "noise_state_bytes": correlation.buffers * size if correlation and mechanism.sigma else 0,
    }
    if adaptive is not None:
        described["adaptive"] = dataclasses.asdict(adaptive)
    return described


def _shares(mechanism: Mechanism, rounds: int, delta: float) -> dict[str, Any]:
    """Of noise in shares: what it costs beside Gaussian noise of the same variance; else nothing.

    `bits` of each of `coordinates` that a client sends, `wrapped`, the share of the sum's
    coordinates that are expected to wrap around, without signal and with the most there can be,
    `sensitivity`, what rounding makes of the clip norm, over it, and `central`, epsilon under that
    Gaussian noise.
    """
    if mechanism.secure is None:
        return {}
    encoding = mechanism.encoding
    length = encoding.l2 / (mechanism.clip_norm * encoding.scale)
    most = encoding.shares * mechanism.clip_norm
    return {
        "secure_aggregation": {
            "bits": encoding.bits,
            "coordinates": encoding.dimension,
            "wrapped": [encoding.wrapped(), encoding.wrapped(most)],
            "sensitivity": length,
            "rounding": math.sqrt(encoding.rounding_variance / encoding.variance),
            "central": _figure(mechanism.central().epsilon(rounds, delta)),
        }
    }


def not_covered(config: Config, ledger_known: bool) -> list[str]:
    """What the epsilons say nothing about."""
    limits = ["choices made by looking at the metrics of this or other runs"]
    if config.local.patterns:
        limits.append(
            "the users' local parameters, which are never sent: the guarantee is about the shared "
            "part of the model alone, and says nothing to who sees a user's own"
        )
    elif models.keeps_rows(config):
        limits.append(
            f"what algorithm={config.algorithm!r} remembers of each user, which is never sent: it "
            "is for that user's device alone, and so are models of the user's own"
        )
    if vocabulary := config.data.vocabulary:
        limits.append(vocabulary)
    limits += decoders.not_covered(config)
    limits += selection.not_covered(config)
    if config.data.iid or config.data.skew_alpha:
        how = "iid" if config.data.iid else "skew_alpha"
        limits.append(
            f"anybody (data.{how}: utterances were dealt out over users that do not exist)"
        )
    if config.init_from and not ledger_known:
        limits.append(
            f"whatever init_from={config.init_from} was trained on, and its rounds: it has no "
            "ledger, so that no total can be given"
        )
    elif config.init_from:
        limits.append(
            "users of the runs behind init_from who are not in this one: 'ledger' has their epsilon"
        )
    elif config.seed_training.steps:
        limits.append("the seed's own training data")
    return limits


def _figure(epsilon: Any) -> dict[str, Any]:
    return {
        "epsilon": epsilon.epsilon,
        "epsilon_rdp": epsilon.epsilon_rdp,
        "epsilon_pld": epsilon.epsilon_pld,
        "accountant": epsilon.accountant,
        "sampling": epsilon.sampling,
    }


def describe_ledger(
    entries: Sequence[ledger.Entry],
    known: bool,
    spent: accounting.Epsilon,
    extrapolations: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The summary's "ledger": what this run's users are charged over all runs behind the model.

    Args:
      entries: of all of them, this run's own last.
      known: whether the model that it started from had a ledger.
      spent: by this run alone. extrapolations: the summary's, of this run alone.
    """
    delta = spent.delta
    *earlier, _ = entries
    runs = [
        {
            "run": entry.run,
            "stage": entry.stage,
            "rounds": entry.rounds,
            "sampling": entry.sampling,
            "users": entry.users.count,
            "epsilon": ledger.composed([(entry.event, entry.relation)], delta)[0],
        }
        for entry in earlier
    ]
    described: dict[str, Any] = {"known": known, "earlier": runs, "delta": delta}
    if not known:
        return described | {"total_epsilon": None, "total_deployed": []}
    total = ledger.Total(spent.epsilon, delta, spent.accountant, 0, ())
    if earlier:
        total = ledger.total(entries, delta)
    deployed = []
    for one in extrapolations:
        case, epsilon = (one["cohort"], one["population"]), one["epsilon"]
        if earlier:
            epsilon = ledger.total_deployed(entries, case, delta)
        deployed.append({"cohort": case[0], "population": case[1], "epsilon": epsilon})
    return described | {
        "total_epsilon": total.epsilon,
        "accountant": total.accountant,
        "shared_users": total.shared,
        "users_assumed_shared": list(total.assumed),
        "total_deployed": deployed,
    }
