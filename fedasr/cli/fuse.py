"""Merges models by competition and attraction (M2N2), or by what it is compared with.

    fedasr fuse --task=digits [--from_scratch | --pretrained] [--raw]
        [--method=NAME,NAME...] [--evaluations=N] [--seeds=R] [--every=N] [--workdir=DIR]
        [--plot=FILE.png] [--json]
    fedasr fuse --task=asr --models=CKPT,CKPT,... --data=DIR [--split=dev]
        [--test=SPLIT,SPLIT...] [--method=NAME] [--evaluations=N] [--workdir=DIR] [--json]

`digits` is the published test bed: an MLP on scikit-learn's digits, evolved from two random models
or merged from two specialists (digits 0-4 and 5-9), which do not mutate. `asr` merges recognisers
of one architecture, scored by utterance on --split; word error rates are on --test. With --workdir
the same command goes on after an interruption, and `asr` leaves the merged model in DIR/fused.

Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.fusion import METHODS

if TYPE_CHECKING:
    from fedasr.fusion.run import Result
    from fedasr.fusion.tasks import Task


CHECKPOINTS, FUSED = "search", "fused"


def search(name: str, task: Task) -> Result:
    """Runs one method as the flags say.

    Args:
      name: one of `fedasr.fusion.METHODS`. task: to search.
    """
    from fedasr.fusion.run import run
    from fedasr.fusion.tasks import make_method

    method = make_method(name, task, flags.FLAGS.population, flags.FLAGS.alpha)
    # Nothing to search for: one evaluation says all.
    budget = 1 if name == "average" else flags.FLAGS.evaluations
    settings = {"method": name, "population": flags.FLAGS.population, "alpha": flags.FLAGS.alpha}
    return run(
        method,
        task.make_parents,
        range(flags.FLAGS.seed, flags.FLAGS.seed + flags.FLAGS.seeds),
        budget,
        every=flags.FLAGS.every or max(1, flags.FLAGS.evaluations // 20),
        measure=task.measure,
        workdir=Path(flags.FLAGS.workdir, CHECKPOINTS, name) if flags.FLAGS.workdir else None,
        identity={**task.identity, **settings},
        save_seconds=flags.FLAGS.save_seconds,
        log=lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True),
    )


def describe(result: Result) -> dict[str, Any]:
    """What every method's summary has: evaluations, their speed and the curves.

    Args:
      result: of the search.
    """
    from fedasr.fusion.tasks import spread

    curve: dict[str, Any] = {"evaluations": result.curve["evaluations"].astype(int).tolist()}
    for key, values in result.curve.items():
        if key != "evaluations":
            curve[key] = spread(values)
    return {
        "evaluations": result.evaluations,
        "evaluations_per_second": result.timed / result.seconds if result.timed else None,
        "curve": curve,
    }


def run_digits() -> dict[str, Any]:
    """{method: summary} of the digits."""
    from fedasr.fusion.tasks import digits_task, spread

    if flags.FLAGS.from_scratch and flags.FLAGS.pretrained:
        raise UserError("choose one of --from_scratch and --pretrained")
    task = digits_task(flags.FLAGS.pretrained, flags.FLAGS.raw)
    results = {name: search(name, task) for name in flags.FLAGS.method}
    if flags.FLAGS.plot:
        draw({name: result.curve for name, result in results.items()}, flags.FLAGS.plot)
    return {
        name: {
            "test_accuracy": spread(result.curve["test_accuracy"][-1])
            | {"per_seed": result.curve["test_accuracy"][-1].tolist()},
            **describe(result),
            "start": "pretrained" if flags.FLAGS.pretrained else "scratch",
            "images": "raw" if flags.FLAGS.raw else "centred",
        }
        for name, result in results.items()
    }


def run_asr() -> dict[str, Any]:
    """{method: summary} of merged recognisers."""
    import jax

    from fedasr.data.records import open_corpus
    from fedasr.fusion import recognisers
    from fedasr.fusion.tasks import recognisers_task, spread

    if not flags.FLAGS.models or not flags.FLAGS.data:
        raise UserError("--models and --data are needed: the models to merge, and speech to do it")
    parents = recognisers.load_parents(flags.FLAGS.models, flags.FLAGS.data)
    task = recognisers_task(parents, flags.FLAGS.models, flags.FLAGS.data, flags.FLAGS.split)
    rates = recognisers.error_rates(parents, flags.FLAGS.data, flags.FLAGS.test)
    searched = open_corpus(flags.FLAGS.data, flags.FLAGS.split).users
    count = len(flags.FLAGS.models)
    average = jax.tree.map(lambda x: x.mean(0), parents.params)
    shared = {
        "parents_wer": [rates(parents.model(i)) for i in range(count)],
        "average_wer": rates(average),
    }
    summaries = {}
    for name in flags.FLAGS.method:
        result = search(name, task)
        found = [jax.tree.map(lambda x, i=i: x[i], result.best) for i in range(flags.FLAGS.seeds)]
        per_seed = [rates(params) for params in found]
        values = {split: np.array([rate[split] for rate in per_seed]) for split in flags.FLAGS.test}
        summaries[name] = {
            "wer": {s: spread(v) | {"per_seed": v.tolist()} for s, v in values.items()},
            **shared,
            **describe(result),
        }
        if flags.FLAGS.workdir:
            top = int(result.curve["score"][-1].argmax())  # by the scores, not by the test
            folder = Path(flags.FLAGS.workdir, FUSED, name)
            recognisers.save_fused(parents, found[top], result.evaluations, folder, searched)
            summaries[name]["fused"] = str(folder)
        if flags.FLAGS.plot:
            draw({name: result.curve}, flags.FLAGS.plot)
    return summaries


def draw(curves: Mapping[str, Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Accuracy (or score), coverage and entropy by evaluations: means and one standard deviation.

    Args:
      curves: {method: of `fedasr.fusion.run.Result`}. path: of a PNG.

    Raises:
      UserError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    from fedasr.fusion.tasks import spread

    first = next(iter(curves.values()))
    panels = {
        ("test_accuracy" if "test_accuracy" in first else "score"): "",
        "coverage": "share of points that some model solves",
        "entropy": "disagreement of models, bits",
    }
    titles = {"test_accuracy": "test accuracy, %", "score": "mean score"} | panels
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 3), panels, strict=True):
        for name, curve in curves.items():
            x, values = curve["evaluations"], curve[key]
            stats = spread(values)
            mean, std = np.array(stats["mean"]), np.array(stats["std"])
            (line,) = axes.plot(x, mean, label=name, marker="o" if len(x) < 3 else None)
            axes.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.15, lw=0)
        axes.set(title=titles[key] or key, xlabel="evaluations")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def program() -> None:
    """Runs what the flags ask for and prints: one method's summary, or {"methods": {...}}."""
    unknown: Sequence[str] = sorted(set(flags.FLAGS.method) - set(METHODS))
    if unknown or not flags.FLAGS.method:
        raise UserError(f"--method={','.join(unknown)}: choose from {', '.join(METHODS)}")
    common.configure_devices()
    import jax

    summaries = run_digits() if flags.FLAGS.task == "digits" else run_asr()
    devices = jax.local_devices()
    shared = {
        "task": flags.FLAGS.task,
        "seeds": flags.FLAGS.seeds,
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }
    if len(summaries) == 1:
        name, summary = next(iter(summaries.items()))
        common.show({**summary, "method": name, **shared})
    else:
        common.show({"methods": summaries, **shared})


def _define_flags() -> None:
    flags.DEFINE_enum("task", "digits", ["digits", "asr"], "What the models do.")
    flags.DEFINE_list("method", ["m2n2"], f"One or several of {', '.join(METHODS)}.")
    flags.DEFINE_bool("from_scratch", False, "digits: start from random models (default).")
    flags.DEFINE_bool("pretrained", False, "digits: start from two specialists.")
    flags.DEFINE_bool("raw", False, "digits: pixels of 0 to 16 as published, not centred.")
    flags.DEFINE_integer("evaluations", 10_000, "Of every seed.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Independent runs, side by side.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The first one.", lower_bound=0)
    flags.DEFINE_integer("every", 0, "Evaluations between measurements; 0: 20 of them.")
    flags.DEFINE_integer("population", 20, "Models in the archive.")
    flags.DEFINE_float("alpha", 1.0, "Exponent of the competition.")
    flags.DEFINE_string("workdir", None, "For checkpoints, to go on after an interruption.")
    flags.DEFINE_float("save_seconds", 60.0, "Between checkpoints.", lower_bound=0)
    flags.DEFINE_string("plot", None, "Picture of accuracy, coverage and entropy.")
    flags.DEFINE_list("models", [], "asr: work directories or checkpoints to merge.")
    flags.DEFINE_string("data", None, "asr: a folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "dev", "asr: what models are scored on.")
    flags.DEFINE_list("test", ["test"], "asr: splits whose word error rate is reported.")


def main() -> None:
    """The command `fedasr fuse`: parses the flags, runs and exits."""
    _define_flags()
    common.main(program, __name__)


if __name__ == "__main__":
    main()
