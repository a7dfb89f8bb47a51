"""What a compiler says of a run's programs, and what follows from it."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from fedasr import stacks
from fedasr.compiling import hlo, programs
from fedasr.compiling.flops import matrix_flops
from fedasr.compiling.targets import Target
from fedasr.errors import UserError
from fedasr.federated import chunks
from fedasr.federated.simulation import Simulation, program_bytes
from fedasr.kernels.devices import lowered
from fedasr.models import encoder_blocks
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
        an argument's place), "code", "beside" (see `Simulation.beside_bytes`), "device" (what it
        has).
      fits: whether all that, the code too, is within the share of the memory that runs use.
      kernels: launches of a local step (of the server's step, of all), without those of loops
        within. loops: (turns or None, launches of a turn) of each loop within. copies: of all
        launches those that only copy a part of an array.
      launches: all of a local step, of loops of unknown length one turn.
      flops: of the matrix products of a call with one local step, on the devices that train a
        client together.
      bytes: that such a call moves from and to the device's memory, by the program's text.
      step_bytes: of these, what a local step moves (the server's: all).
      seconds: by bound: "compute", "memory", "launches".
      bound: the largest of them.
      accessed: bytes that a TPU's compiler counts, of its own memory, too; None where it tells
        none, or counts the turns of a loop once (see `measure`).
      estimate: seconds that it expects (of kernels of ours what their operations and bytes allow);
        None where it expects none or where it cannot be so.
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
    bytes: int
    step_bytes: int
    seconds: dict[str, float]
    bound: str
    accessed: float | None
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
    turns: bool = False,
    **lengths: float,
) -> list[Figures]:
    """Compiles the programs of a configuration's round for a target.

    Args:
      config: of the run.
      target, devices: see `fedasr.compiling.targets`.
      chunk: clients vmapped together on a device.
      wanted: programs, see `Simulation.trace`.
      turns: whether to compile clients' program for a TPU once more where a loop goes over the
        blocks, with two of them in a turn: what the compiler says of that one more tells what it
        would say of all. Without it such programs have neither `accessed` nor `estimate`.
      lengths: see `programs.make_simulation`.

    Raises:
      UserError: the target's compiler refuses a program, such as for its memory.
    """
    shapes = models.variable_shapes(config)
    simulation = programs.make_simulation(config, devices, chunk, **lengths)
    traced = simulation.trace(shapes)

    def compiled(name: str, program: jax.stages.Traced) -> Any:
        try:
            return lowered(program, simulation.mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"{target.name}: {name} at chunk {chunk}: {reason}") from error

    found = []
    for name in wanted:
        flops = float(matrix_flops(traced[name].jaxpr))
        began = time.perf_counter()
        program = compiled(name, traced[name])
        seconds = time.perf_counter() - began
        text = hlo.read(program.as_text())
        told = told_by_compiler(program)
        if trips := {loop.trips for loop in text.entry.every_loop()} - {None, 1}:
            blocks = sum(key.startswith(stacks.BLOCK) for key in shapes)
            more = None
            if turns and told is not None and trips == {blocks} and blocks % 2 == 0:
                with encoder_blocks.per_turn(2):
                    again = programs.make_simulation(config, devices, chunk, **lengths)
                    more = told_by_compiler(compiled(name, again.trace(shapes)[name]))
            told = told_of_all(told, more, blocks)
        held = simulation.beside_bytes(shapes, name)
        described = (name, target, len(devices), config.model_devices, chunk, flops, held, seconds)
        found.append(_figures(described, program, text, told))
    return found


Told = tuple[float, float]  # bytes and seconds, by a TPU's compiler


def told_by_compiler(program: Any) -> Told | None:
    """What a TPU's compiler says; None of others."""
    costs = program.cost_analysis() or {}
    if "optimal_seconds" not in costs:
        return None
    return float(costs.get("bytes accessed", 0.0)), float(costs["optimal_seconds"])


def told_of_all(one: Told | None, two: Told | None, blocks: int) -> Told | None:
    """What a compiler would say of a program's loops over blocks if it counted every turn.

    Args:
      one, two: what it says of the program with one and with two blocks in a turn.
      blocks: how many there are.
    """
    if one is None or two is None:
        return None
    moved, seconds = (a + (blocks - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return moved, seconds


def _figures(described: Any, compiled: Any, text: hlo.Program, told: Told | None) -> Figures:
    name, target, devices, together, chunk, flops, beside, compile_seconds = described
    step = text.step if name == "clients" else text.entry
    analysis = compiled.memory_analysis()
    moved = text.entry.total_moved
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
        accessed=None if told is None else told[0],
        estimate=sane_estimate(None if told is None else told[1], max(seconds.values())),
        collectives=text.entry.collectives,
        from_host=text.from_host,
        float64=text.float64,
    )


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
