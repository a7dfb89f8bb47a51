"""Simulated devices of a configuration."""

from collections.abc import Sequence

from fedasr.errors import UserError
from fedasr.federated.participation import Devices, Participation
from fedasr.training.config import Config


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


def check(config: Config) -> None:
    """Raises UserError for rules that the rest of the configuration does not go with."""
    settings = config.participation
    if not settings.enabled:
        return
    if not config.has_rounds:
        raise UserError("participation is of federated rounds: unset participation.enabled")
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


ASYNCHRONOUS = "fedbuff"  # the algorithm whose users train when they can
