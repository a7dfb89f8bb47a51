"""What the studies share: flags, seeds, stages that are kept, spreads over the seeds, pictures.

A study (`corrections`, `brain_to_text`, `fuse_accents`) says its stages and its table as a `Study`,
and is run by `main`:

    python -m experiments.NAME [--seeds=0,1,2] [--workdir=DIR] [--plot=FILE.png]
        [--config.section.field=value ...] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError

_CONFIGS = Path(__file__).parent / "configs"

Log = Callable[[str], None]
Summary = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """What makes a study.

    Attributes:
      config: its configuration, of those in `configs`.
      sections: of the configuration that no run of `fedasr train` has; None for all of them.
      summarize: from the configuration, the seeds, the work directory and a log to the summary.
      lines: of the summary, for people.
      draw: draws the summary into a file.
      check: raises UserError for flags or a configuration that cannot be; before anything is made.
      define_flags: further ones.
      help: what --seeds, --workdir and --plot are, in words.
    """

    config: str
    sections: tuple[str, ...] | None
    summarize: Callable[[dict[str, Any], Sequence[int], Path, Log], Summary]
    lines: Callable[[Summary], Iterable[str]]
    draw: Callable[[Summary, Path], None]
    check: Callable[[Mapping[str, Any]], None] = lambda config: None
    define_flags: Callable[[], None] = lambda: None
    help: Mapping[str, str] = dataclasses.field(default_factory=dict)


def main(study: Study) -> None:
    """The command of a study: parses the flags, runs and exits."""
    said = {
        "seeds": "Training seeds.",
        "workdir": "Where results are kept; default runs/NAME.",
        "plot": "Draws the error rates into this PNG file.",
    } | dict(study.help)
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_list("seeds", ["0", "1", "2"], said["seeds"])
    flags.DEFINE_string("workdir", None, said["workdir"])
    flags.DEFINE_string("plot", None, said["plot"])
    for name in said:  # --help has them, too
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    study.define_flags()
    common.define_config(str(_CONFIGS / f"{study.config}.py"))
    common.main(lambda: run(study))


def run(study: Study) -> None:
    """Does what the flags ask for."""
    common.configure_devices()
    common.keep_memory()
    from fedasr.training.config import resolve
    from fedasr.training.logging import from_json, say, to_json

    config = resolve(common.plain_config(), study.sections)
    study.check(config)
    seeds = common.seeds(flags.FLAGS.seeds)
    workdir = Path(flags.FLAGS.workdir or Path("runs") / config["name"])
    common.configure_compilation(workdir.parent)
    summary = to_json(study.summarize(config, seeds, workdir, say))
    if flags.FLAGS.plot:
        study.draw(summary, Path(flags.FLAGS.plot))
    if common.JSON.value:
        common.show(summary)
    else:
        print("\n".join(study.lines(from_json(summary))))


def check_names(flag: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises UserError if a flag names what is not known."""
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--{flag}: {unknown} is not among {', '.join(known)}")


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass from a section of the configuration, which has lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


# -------------------------------------------------------------------------------------- stages


def once(path: Path, settings: Any, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a stage: made, unless `path` holds one of the same settings.

    Args:
      path: of a JSON file, whose folder is there.
      settings: all that the result depends on.
      make: the stage.
    """
    from fedasr.training.logging import to_json, write_json_atomic

    settings = to_json(settings)
    if path.is_file() and (kept := json.loads(path.read_text()))["settings"] == settings:
        return kept["result"]
    result = to_json(make())
    write_json_atomic(path, {"settings": settings, "result": result})
    return result


def trained_once(
    folder: Path, settings: Mapping[str, Any], train: Callable[[], tuple[int, Any]]
) -> Any:
    """Parameters of a model: trained, unless `folder` holds those of the same settings.

    Args:
      folder: of a checkpoint.
      settings: all that the model depends on beside the folder; values as JSON has them.
      train: makes the number of steps and a state, whose `params` are the model's.
    """
    import shutil

    import jax

    from fedasr.training.checkpoint import Checkpointer, read_metadata, restore_params

    if folder.is_dir():
        try:
            if read_metadata(folder) == settings:
                return restore_params(folder)
        except UserError:
            pass  # of a run that was killed before it had saved
    steps, state = train()
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpointer(folder, 1) as checkpointer:
        checkpointer.save(steps, state, settings)
    return jax.device_get(state.params)


# ------------------------------------------------------------------------------------- results


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std" (of the sample; 0 for one seed), "values"} over the seeds."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def in_words(value: Mapping[str, Any], digits: int = 1, scale: float = 1.0) -> str:
    """A `spread` for people: mean (standard deviation)."""
    return f"{scale * value['mean']:.{digits}f} ({scale * value['std']:.{digits}f})"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_bars(
    axes: Any, rows: Mapping[str, Sequence[Mapping[str, Any]]], ticks: Sequence[str]
) -> None:
    """Bars of several models side by side at every tick, with the spread over the seeds.

    Args:
      axes: of a figure.
      rows: spreads by the model's label, one for each tick.
      ticks: what is under the bars.
    """
    width = 0.8 / len(rows)
    for number, (label, row) in enumerate(rows.items()):
        axes.bar(
            [tick + (number - (len(rows) - 1) / 2) * width for tick in range(len(ticks))],
            [value["mean"] for value in row],
            width,
            yerr=[value["std"] for value in row],
            label=label,
        )
    axes.set_xticks(range(len(ticks)), ticks)


def save_figure(figure: Any, path: Path, dpi: int = 160) -> None:
    """Writes a picture, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
