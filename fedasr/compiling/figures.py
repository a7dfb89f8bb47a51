"""What a compiler says of a run's programs, and what follows from it."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from fedasr.compiling import hlo, programs
from fedasr.compiling.flops import matrix_flops
from fedasr.compiling.targets import Target
from fedasr.errors import UserError
from fedasr.federated import chunks
from fedasr.federated.simulation import Simulation, program_bytes
from fedasr.kernels.devices import lowered
from fedasr.training.builders import models
from fedasr.training.config import Config

# What a launch costs a GPU at least where the host keeps ahead of it; a TPU runs a program whole.
_LAUNCH_SECONDS = {"cuda": 2e-6, "tpu": 0.0}
# An estimate that is below what the peak rates allow by this factor, or above it by this one, is of
# another machine than the one that is meant.
_SANE = (0.5, 200.0)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one program, compiled for one target.

    Attributes:
      program: "clients" or "server"; see `Simulation.trace`. target; devices: how many.
      chunk: clients vmapped together on a device.
      compile_seconds: of the compiler alone.
      memory: bytes of a device by kind: "arguments", "temporaries", "outputs" (without what shares
        an argument's place), "code", "beside" (chunks on their way, the server's state and its
        step; with "clients" alone), "device" (what it has).
      fits: whether all that, the code too, is within the share of the memory that runs use.
      kernels: launches of a local step (of the server's step, of all), without those of loops
        within. loops: (turns or None, launches of a turn) of each loop within. copies: of all
        launches those that only copy a part of an array.
      launches: all of a local step, of loops of unknown length one turn.
      flops: of the matrix products of a call with one local step, on the devices that train a
        client together. bytes: that it reads and writes; where the compiler does not tell them (a
        GPU), from the program's text. Compilers count loops once: what they say is scaled by how
        much more the text has with all turns.
      step_bytes: that a local step (the server's step) moves from and to the device's memory, by
        the program's text: what stays in a TPU's own fast memory is not among them.
      seconds: by bound: "compute", "memory", "launches".
      bound: the largest of them.
      estimate: seconds that the compiler itself expects, loops as often as they turn (of kernels of
        ours what their operations and bytes allow); None where it expects none or where it cannot
        be so.
      collectives: by kind, of a call with one local step.
      from_host: instructions that wait for the host.
      float64: whether there are floats of 64 bits.
    """

    program: str
    target: str
    devices: int
    chunk: int
    compile_seconds: float
    memory: dict[str, int]
    fits: bool
    kernels: int
    loops: tuple[tuple[int | None, int], ...]
    copies: int
    launches: int
    flops: float
    bytes: float
    step_bytes: int
    seconds: dict[str, float]
    bound: str
    estimate: float | None
    collectives: dict[str, hlo.Collective]
    from_host: tuple[str, ...]
    float64: bool


def measure(
    config: Config,
    target: Target,
    devices: Sequence[jax.Device],
    chunk: int,
    wanted: Sequence[str] = ("clients", "server"),
    **lengths: float,
) -> list[Figures]:
    """Compiles the programs of a configuration's round for a target.

    Args:
      config: of the run.
      target, devices: see `fedasr.compiling.targets`.
      chunk: clients vmapped together on a device.
      wanted: programs, see `Simulation.trace`.
      lengths: see `programs.make_simulation`.

    Raises:
      UserError: the target's compiler refuses a program, such as for its memory.
    """
    simulation = programs.make_simulation(config, devices, chunk, **lengths)
    shapes = models.variable_shapes(config)
    traced = simulation.trace(shapes)
    beside = simulation.beside_bytes(shapes)
    found = []
    for name in wanted:
        flops = float(matrix_flops(traced[name].jaxpr))
        began = time.perf_counter()
        try:
            compiled = lowered(traced[name], simulation.mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"{target.name}: {name} at chunk {chunk}: {reason}") from error
        seconds = time.perf_counter() - began
        held = beside if name == "clients" else 0
        described = (name, target, len(devices), config.model_devices, chunk, seconds, held)
        found.append(_figures(described, compiled, flops))
    return found


def _figures(described: tuple[Any, ...], compiled: Any, flops: float) -> Figures:
    name, target, devices, together, chunk, compile_seconds, beside = described
    text = hlo.read(compiled.as_text())
    step = text.step if name == "clients" else text.entry
    analysis = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    moved = float(costs.get("bytes accessed", 0.0)) * _share(
        text.entry.total_moved, text.entry.moved_once
    )
    moved = moved or float(step.total_moved)
    estimate = costs.get("optimal_seconds")
    if estimate is not None:
        estimate *= _share(text.entry.total_cycles, text.entry.cycles_once)
    seconds = {
        "compute": flops / target.flops / together,
        "memory": moved / target.bandwidth,
        "launches": step.total * _LAUNCH_SECONDS[target.platform],
    }
    needed = program_bytes(analysis) + analysis.generated_code_size_in_bytes + beside
    return Figures(
        program=name,
        target=target.name,
        devices=devices,
        chunk=chunk,
        compile_seconds=compile_seconds,
        memory={
            "arguments": analysis.argument_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
            "beside": beside,
            "device": target.memory,
        },
        fits=needed <= chunks.SHARE * target.memory,
        kernels=step.launches,
        loops=tuple((loop.trips, loop.total) for loop in step.loops),
        copies=step.copies + sum((loop.trips or 1) * loop.copies for loop in step.loops),
        launches=step.total,
        flops=flops,
        bytes=moved,
        step_bytes=step.total_moved,
        seconds=seconds,
        bound=max(seconds, key=lambda kind: seconds[kind]),
        estimate=sane_estimate(estimate, max(seconds.values())),
        collectives=text.entry.collectives,
        from_host=text.from_host,
        float64=text.float64,
    )


def _share(total: float, once: float) -> float:
    """By how much loops that turn as often as they do exceed ones that turn once."""
    return total / once if once else 1.0


def sane_estimate(estimate: float | None, roofline: float) -> float | None:
    """A compiler's estimate of seconds, if it can be true beside the roofline's."""
    if estimate is None or not _SANE[0] * roofline <= estimate <= _SANE[1] * roofline:
        return None
    return float(estimate)


def largest_chunk(
    config: Config, target: Target, devices: Sequence[jax.Device], most: int, **lengths: float
) -> int:
    """The chunk that `chunk="auto"` would take on this target: compiles several times.

    Args:
      config, target, devices, lengths: see `measure`. most: such as the cohort.

    Raises:
      UserError: not even one client fits.
    """
    shapes = models.variable_shapes(config)
    budget = int(chunks.SHARE * target.memory)

    def memory(chunk: int) -> int:
        simulation: Simulation = programs.make_simulation(config, devices, chunk, **lengths)
        try:
            return simulation.chunk_bytes(shapes)
        except jax.errors.JaxRuntimeError as error:
            if not chunks.is_out_of_memory(error):
                raise
            return 2 * budget  # some compilers refuse what does not fit

    return chunks.fit_chunk(memory, most, budget)
