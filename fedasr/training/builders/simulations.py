"""The federated rounds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from fedasr.errors import UserError
from fedasr.federated import chunks
from fedasr.federated.client import Loss
from fedasr.federated.cohort import replicated
from fedasr.federated.hardware import Hardware
from fedasr.federated.local import LocalStore
from fedasr.federated.simulation import Simulation
from fedasr.training.builders import (
    algorithms,
    batches,
    clients,
    corpora,
    identities,
    mechanisms,
    models,
    participations,
)
from fedasr.training.config import Config


def make_simulation(
    config: Config,
    data: corpora.Data,
    loss: Loss,
    devices: Sequence[jax.Device],
    store: LocalStore | None = None,
    chunk: int | None = None,
) -> Simulation:
    """The federated rounds of a configuration.

    Args:
      config, data, loss, devices: of the run.
      store: the users' local parameters, if the configuration has any.
      chunk: in place of the configuration's. That may be "auto": 1 on a CPU, where it is fastest,
        otherwise as many clients as the devices' memory holds.

    Raises:
      UserError: for settings that make no sense together.
    """
    if config.local.patterns and store is None:
        raise UserError("local.patterns: this program keeps no local parameters")
    if store is None and models.keeps_rows(config):
        raise UserError(f"algorithm={config.algorithm!r}: this program remembers no users")
    users = data.train.users
    sampler = mechanisms.make_sampler(config, len(users))
    sampler = participations.with_times(config, sampler, users)

    devices_of_users = participations.make_participation(config, users)

    def make_algorithm() -> Any:
        algorithm: Any = algorithms.make(
            config,
            loss,
            sampler.expected_cohort / sampler.population,
            store,
            models.trained_variables(config),
        )
        if devices_of_users is None:
            return algorithm
        return dataclasses.replace(algorithm, participation=devices_of_users)

    def build(chunk: int) -> Simulation:
        stacked = devices[0].platform != "cpu" and clients.takes_stacks(config)
        hardware = Hardware(devices, config.model_devices, chunk, stacked)
        return Simulation(
            data.train,
            mechanisms.make_mechanism(config, sampler, models.sent_parameters(config)),
            make_algorithm(),
            batches.make_batching(config, data.grid, data.resident(replicated(hardware.mesh()))),
            hardware=hardware,
            seed=config.seed,
            identity=identities.run_identity(config),
        )

    wanted = config.chunk if chunk is None else chunk
    if isinstance(wanted, int):
        return build(wanted)
    budget = None if config.client.micro_batch else chunks.device_budget(devices)
    if budget is None:
        return build(1)
    shapes = models.variable_shapes(config)
    most = -(-sampler.slots * config.model_devices // len(devices))

    def memory(chunk: int) -> int:
        try:
            return build(chunk).chunk_bytes(shapes)
        except jax.errors.JaxRuntimeError as error:
            if not chunks.is_out_of_memory(error):
                raise
            return 2 * budget  # some compilers refuse what does not fit

    return build(chunks.fit_chunk(memory, most, budget))
