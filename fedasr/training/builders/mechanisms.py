"""Who takes part, and the mechanism: what runs the privacy, and what accounts for it."""

import math
from typing import cast

from fedasr.errors import UserError
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.correlated import BandedNoise, BufferedNoise, Correlation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import (
    AsynchronousSampler,
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    ShuffledSampler,
)
from fedasr.privacy.secure_aggregation import SecureAggregation
from fedasr.training.config import Config
from fedasr.training.sections import Adaptive


def make_sampler(config: Config, population: int) -> Sampler:
    """The sampler that `config.privacy.sampler` names, over `population` users.

    Raises:
      UserError: for an unknown name or a cohort larger than the population.
    """
    privacy, cohort, seed = config.privacy, config.cohort, config.seed
    name = privacy.sampler
    if privacy.cycle != 1 and name != "poisson":
        raise UserError(f"privacy.cycle is of sampler 'poisson', not of {name!r}")
    if privacy.slots and name != "poisson":
        raise UserError(f"privacy.slots is of sampler 'poisson', not of {name!r}")
    if name == "everyone":
        if cohort not in (0, population):
            raise UserError(f"privacy.sampler='everyone' has cohort=0 or {population}, all users")
        return ShuffledSampler(population, population, seed)
    if cohort > population:
        raise UserError(
            f"cohort={cohort} is more than the {population} users of the training split: set "
            f"cohort to {population} or less (--config=own_speech:data=DIR chooses one)"
        )
    if name == "poisson":
        slots = cast(int, privacy.slots or None)  # None: the sampler's own choice
        return PoissonSampler(population, cohort, seed, slots, privacy.cycle)
    if name == "fixed":
        return FixedSizeSampler(population, cohort, seed)
    if name == "shuffled":
        return ShuffledSampler(population, cohort, seed)
    if name == "asynchronous":
        at_once = config.participation.concurrency or cohort
        return AsynchronousSampler(population, cohort, at_once, seed)
    raise UserError(
        f"privacy.sampler={name!r} is unknown: choose 'poisson', 'fixed', 'shuffled', 'everyone' "
        "or 'asynchronous'"
    )


def make_correlation(config: Config, sampler: Sampler) -> Correlation | None:
    """The correlation of the noise that `config.privacy.noise` names.

    Raises:
      UserError: for an unknown name, or bands or buffers out of range.
    """
    privacy, rounds = config.privacy, config.rounds
    name = privacy.noise
    if name in ("independent", "skellam"):
        return None
    if name == "banded":
        bands = privacy.bands or min(sampler.separation, 32, rounds)
        if not privacy.bands and bands == 1:
            raise UserError(
                f"privacy.noise='banded' has nothing to gain: {sampler.description} sampling has "
                "users one round apart. Set privacy.cycle (Poisson) or sampler='shuffled', or "
                "privacy.bands"
            )
        return BandedNoise(bands, rounds)
    if name == "buffered":
        turns = sampler.participations(rounds)
        return BufferedNoise(privacy.buffers, rounds, sampler.separation, turns)
    raise UserError(
        f"privacy.noise={name!r} is unknown: choose 'independent', 'banded', 'buffered' or "
        "'skellam'"
    )


def make_secure(config: Config, dimension: int | None) -> SecureAggregation | None:
    """How clients send updates with shares of the noise in them; None for noise of the server's.

    Args:
      config: of the run.
      dimension: number of parameters that clients send updates of.

    Raises:
      UserError: for settings that cannot go together with it.
    """
    privacy = config.privacy
    if not privacy.enabled or privacy.noise != "skellam":
        return None
    if dimension is None:
        raise UserError("privacy.noise='skellam' depends on the model: here it has none")
    if config.compression.upload:
        raise UserError(
            "privacy.noise='skellam' sends integers of privacy.bits bits, whose sum is theirs: "
            "unset compression.upload and choose privacy.bits"
        )
    if (mode := config.partial.mode) not in ("all", "fixed"):
        raise UserError(
            f"partial.mode={mode!r} would save nothing: under secure aggregation everybody sends "
            "all variables; choose partial.mode='fixed', or privacy.noise='independent'"
        )
    if config.model_devices > 1:
        raise UserError("privacy.noise='skellam' rotates whole updates: set model_devices=1")
    if not privacy.sigma > 0:
        raise UserError("privacy.noise='skellam' needs privacy.sigma above 0")
    return SecureAggregation(dimension, privacy.bits)


def make_mechanism(config: Config, sampler: Sampler, dimension: int | None = None) -> Mechanism:
    """The privacy mechanism of a configuration; without privacy, neither clipping nor noise.

    Args:
      config: of the run.
      sampler: who takes part.
      dimension: number of parameters that clients send updates of, for noise in shares.
    """
    privacy, weighting = config.privacy, config.client.weighting
    if not privacy.enabled:
        return Mechanism(math.inf, "global", 0.0, sampler, weighting=weighting)
    multiplier = privacy.sigma * sampler.expected_cohort
    return Mechanism(
        privacy.clip_norm,
        privacy.budget,
        multiplier,
        sampler,
        normalise=privacy.normalise,
        weighting=weighting,
        correlation=make_correlation(config, sampler),
        adaptive=_adaptive(privacy.adaptive, sampler),
        secure=make_secure(config, dimension),
    )


def _adaptive(settings: Adaptive, sampler: Sampler) -> AdaptiveClip | None:
    if not settings.enabled:
        return None
    noise = settings.sigma * sampler.expected_cohort
    return AdaptiveClip(
        noise,
        settings.quantile,
        settings.rate,
        settings.warmup,
        settings.warmup_rate,
    )


def check_deployments(config: Config, mechanism: Mechanism) -> None:
    """Raises UserError for what cannot be claimed, before anything is trained."""
    if config.privacy.enabled:
        rounds, delta = config.rounds, config.privacy.delta
        mechanism.check_delta(rounds, delta)
        for case in config.privacy.deployments:
            mechanism.deployed(*case).check_delta(rounds, delta)
