"""Simulated devices of a configuration."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fedasr.errors import UserError
from fedasr.federated.participation import Devices, Participation
from fedasr.privacy.sampling import AsynchronousSampler, Sampler
from fedasr.training.config import Config

ASYNCHRONOUS = "fedbuff"  # the algorithm whose users train when they can
SAMPLER = "asynchronous"  # theirs


def make_devices(config: Config, users: Sequence[str]) -> Devices:
    """The users' devices: those of a file, or drawn.

    Raises:
      UserError: see `Devices.read`.
    """
    settings = config.participation
    if settings.trace:
        return Devices.read(settings.trace, [str(user) for user in users])
    return Devices.drawn(
        len(users),
        config.seed,
        settings.seconds_per_step,
        settings.spread,
        settings.transfer_seconds,
    )


def make_participation(config: Config, users: Sequence[str]) -> Participation | None:
    """The rules of a run; None where everybody takes part at once, or nobody waits for anybody.

    Args:
      config: of the run. users: names of the training users.
    """
    settings = config.participation
    if not settings.enabled or config.algorithm == ASYNCHRONOUS:
        return None
    return Participation(
        make_devices(config, users),
        config.seed,
        settings.available,
        settings.diurnal,
        settings.round_hours,
        settings.dropout_before,
        settings.dropout_after,
        settings.jitter,
        settings.deadline,
        settings.first,
    )


def with_times(config: Config, sampler: Sampler, users: Sequence[str]) -> Sampler:
    """The sampler of users who train when they can, with the times of their devices.

    A training takes as many steps as the configuration says of all users, so that who is done when
    depends on nobody's data.

    Args:
      config: of the run. sampler: of the run; another kind stays as it is.
      users: names of the training users.

    Raises:
      UserError: see `make_devices`; and for devices that are not always there.
    """
    settings, client = config.participation, config.client
    if not settings.enabled or not isinstance(sampler, AsynchronousSampler):
        return sampler
    devices = make_devices(config, users)
    if (devices.begin > 0).any() or (devices.end < 24).any():
        raise UserError(
            f"{settings.trace}: from_hour and to_hour are of rounds, which {ASYNCHRONOUS!r} has "
            "not: leave them out"
        )
    steps = client.steps or client.max_steps or client.epochs
    times = tuple(float(t) for t in devices.transfer + steps * devices.seconds_per_step)
    return dataclasses.replace(sampler, times=times, jitter=settings.jitter)


def check(config: Config) -> None:
    """Raises UserError for rules that the rest of the configuration does not go with."""
    settings = config.participation
    _check_queue(config)
    if settings.trace and not Path(settings.trace).is_file():
        raise UserError(f"participation.trace={settings.trace!r} is no file: give a CSV of devices")
    if not settings.enabled:
        return
    if not config.has_rounds:
        raise UserError("participation is of federated rounds: unset participation.enabled")
    _check_privacy(config)


def _check_queue(config: Config) -> None:
    """Raises UserError for users without rounds whose sampler or devices count in rounds."""
    settings = config.participation
    by_queue = config.algorithm == ASYNCHRONOUS
    if config.has_rounds and by_queue != (config.privacy.sampler == SAMPLER):
        raise UserError(
            f"algorithm={ASYNCHRONOUS!r} and privacy.sampler={SAMPLER!r} belong together: set "
            "both, or neither"
        )
    if by_queue and settings.enabled:
        names = ("available", "diurnal", "dropout_before", "dropout_after", "deadline", "first")
        for name in names:
            if getattr(settings, name) != (1 if name == "available" else 0):
                raise UserError(
                    f"participation.{name} is of rounds, which {ASYNCHRONOUS!r} has not"
                )


def _check_privacy(config: Config) -> None:
    """Raises UserError for devices whose behaviour no accountant covers."""
    settings = config.participation
    private = config.privacy.enabled and config.privacy.sigma > 0
    if settings.first and private:
        raise UserError(
            "participation.first has users displace each other, which no accountant covers: with "
            "privacy ask a larger cohort and set participation.deadline"
        )
    if private and config.privacy.noise == "skellam":
        raise UserError(
            "noise in shares is missing where users drop out: participation needs "
            "privacy.noise='independent'"
        )
