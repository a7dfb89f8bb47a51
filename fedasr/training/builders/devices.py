"""What a run computes on."""

from collections.abc import Sequence

import jax

from fedasr.errors import UserError
from fedasr.federated import chunks
from fedasr.training.config import Config


def check(config: Config) -> None:
    """Raises UserError for devices, or processes, that the run cannot use."""
    if config.devices > len(jax.local_devices()):
        raise UserError(f"devices={config.devices}: only {len(jax.local_devices())} are here")
    if (count := config.devices or len(jax.devices())) % config.model_devices:
        raise UserError(
            f"{count} devices cannot be grouped by model_devices={config.model_devices}"
        )
    if jax.process_count() > 1:
        if config.devices:
            raise UserError("devices must be 0, all of them, with several processes")
        if config.model_devices > 1:
            raise UserError("model_devices above 1 needs a single process")


def run_devices(config: Config) -> list[jax.Device]:
    """Of all processes; those that the run uses."""
    return jax.devices()[: config.devices or None]


def device_name(devices: Sequence[jax.Device]) -> str:
    """How many there are, and of which kind: "2 x cpu"."""
    return f"{len(devices)} x {devices[0].device_kind}"


def described(devices: Sequence[jax.Device]) -> str:
    """Likewise with the processes that they belong to, on which the order of sums depends, too."""
    processes = len({device.process_index for device in devices})
    name = device_name(devices)
    return name if processes == 1 else f"{name} in {processes} processes"


def known_chunk(config: Config) -> int | str:
    """Clients vmapped together, as far as it is known without compiling."""
    automatic = config.chunk == chunks.AUTO
    return 1 if automatic and chunks.device_budget(jax.devices()) is None else config.chunk
