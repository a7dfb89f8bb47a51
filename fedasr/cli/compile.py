"""Compiles a run's programs for accelerators that are not there, by their own compilers.

    fedasr compile [--config=NAME|FILE.py] [--config.section.field=value ...]
                   [--targets=v5e,v5p,v6e,h100,h200,t4,v5e-8,...] [--chunk=N | --fit]
                   [--turns] [--seconds=15] [--labels_per_second=14] [--json]

For each target: whether the round's programs compile, memory by kind beside the device's, launches
of a local step, loops, FLOPs, bytes from and to the device's memory (of a call with one local step,
and of the step), the roofline and what bounds it, a TPU's compiler's own estimate and the bytes
that it counts, how long compiling took, and what devices exchange (of such a call: how often and
how many MB arrive on a device). --fit finds the largest chunk that the device's memory holds. TPUs'
compilers count a loop's turns once: with --turns one over blocks is compiled twice, to tell what
they would say of all. (The second has two blocks in a turn.)
Utterances are all --seconds long. The data is not read. No device is needed, only the target's
compiler: `pip install 'jax[tpu]'` for TPUs; `jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`
for GPUs. Exit status: 0 when all is compiled, 2 for a mistake that the user can mend.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.compiling import targets
from fedasr.errors import UserError

PROGRAMS = ("clients", "server")  # see `Simulation.trace`
_GIB = 2**30


def run() -> None:
    """Compiles and prints."""
    options = flags.FLAGS
    chosen = prepared(options.targets)
    from fedasr.training.config import resolve

    lengths = {"seconds": options.seconds, "labels_per_second": options.labels_per_second}
    rows = measured(
        resolve(common.plain_config()),
        chosen,
        options.programs,
        chunk=options.chunk,
        fit=options.fit,
        turns=options.turns,
        **lengths,
    )
    if common.JSON.value:
        common.show({"programs": [dataclasses.asdict(row) for row in rows]})
    else:
        print("\n".join(table(rows)))


def prepared(names: Sequence[str]) -> list[tuple[targets.Target, int]]:
    """The targets of these names, and what JAX has to know of them before it is imported.

    Raises:
      UserError: for a name that is none.
    """
    chosen = [targets.target_by_name(name) for name in names]
    targets.prepare([target for target, _ in chosen])
    return chosen


def measured(
    wanted: dict[str, Any],
    chosen: Sequence[tuple[targets.Target, int]],
    programs: Sequence[str] = PROGRAMS,
    *,
    chunk: int = 0,
    fit: bool = False,
    turns: bool = False,
    **lengths: float,
) -> list[Any]:
    """Figures (`fedasr.compiling.figures`) of a configuration's programs for each target.

    Args:
      wanted: the configuration, resolved.
      chosen: of `prepared`.
      programs: of a round.
      chunk: clients vmapped together; 0 for the configuration's, or 1.
      fit: find the largest chunk that fits instead.
      turns: see `fedasr.compiling.figures.measure`.
      lengths: see `fedasr.compiling.programs.make_simulation`.

    Raises:
      UserError: for a mistake in the configuration, or a compiler that is not there or refuses.
    """
    from fedasr.compiling import figures
    from fedasr.training.builders import whole

    if unknown := [name for name in programs if name not in PROGRAMS]:
        raise UserError(f"--programs={unknown[0]}: choose from {', '.join(PROGRAMS)}")
    # The devices here are none of the run's: a configuration is checked as if for one.
    config = whole.checked(wanted | {"model_devices": 1, "devices": 0})
    config = dataclasses.replace(config, model_devices=wanted["model_devices"])
    rows: list[Any] = []
    for target, count in chosen:
        devices = targets.devices(target, count)
        size = chunk or (config.chunk if isinstance(config.chunk, int) else 1)
        if fit:
            size = figures.largest_chunk(config, target, devices, config.cohort or 1, **lengths)
        rows += figures.measure(config, target, devices, size, programs, turns, **lengths)
    return rows


def table(rows: list) -> list[str]:
    """The figures for people."""
    header = (
        "program", "target", "chunk", "fits", "GiB", "of", "launches", "loops", "copies", "TFLOP",
        "GB", "of step", "bound", "ms", "estimate",
        "accessed", "compiled in", "collectives",
    )  # fmt: skip
    lines = [header, *(_row(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines]


def _row(row) -> tuple[str, ...]:
    memory = {kind: size / _GIB for kind, size in row.memory.items()}
    taken = sum(size for kind, size in memory.items() if kind != "device")
    loops = " ".join(f"{turns or '?'}x{launches}" for turns, launches in row.loops) or "-"
    return (
        row.program,
        row.target if row.devices == 1 else f"{row.target}-{row.devices}",
        str(row.chunk),
        "yes" if row.fits else "no",
        f"{taken:.2f}",
        f"{memory['device']:.0f}",
        str(row.kernels),
        loops,
        str(row.copies),
        f"{row.flops / 1e12:.3g}",
        f"{row.bytes / 1e9:.3g}",
        f"{row.step_bytes / 1e9:.3g}",
        row.bound,
        f"{1e3 * max(row.seconds.values()):.3g}",
        "-" if row.estimate is None else f"{1e3 * row.estimate:.3g} ms",
        "-" if row.accessed is None else f"{row.accessed / 1e9:.3g} GB",
        f"{row.compile_seconds:.1f} s",
        ", ".join(_collective(*item) for item in sorted(row.collectives.items())) or "-",
    )


def _collective(kind: str, found) -> str:
    return f"{found.number} {kind} {found.bytes / 1e6:.3g} MB"


def _define_flags() -> None:
    common.define_config("quickstart")
    flags.DEFINE_list("targets", ["v5e", "h200"], "Accelerators; v5e-8 is eight devices.")
    flags.DEFINE_list("programs", list(PROGRAMS), "Of a round.")
    flags.DEFINE_integer("chunk", 0, "Clients vmapped together; 0: the configuration's, or 1.", 0)
    flags.DEFINE_bool("fit", False, "Find the largest chunk that fits: compiles several times.")
    flags.DEFINE_bool(
        "turns", False, "TPUs: compile a loop over blocks once more, for the compiler's estimate."
    )
    flags.DEFINE_float("seconds", 15.0, "Of each utterance.", 0.1, 3_600.0)
    flags.DEFINE_float("labels_per_second", 14.0, "Of an utterance.", 0.1, 100.0)


def main() -> None:
    """The command `fedasr compile`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__)


if __name__ == "__main__":
    main()
