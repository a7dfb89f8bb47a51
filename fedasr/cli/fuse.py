"""Merges models by competition and attraction (M2N2), or by what it is compared with.

    fedasr fuse --task=digits [--from_scratch | --pretrained [--pair_per_seed]] [--raw]
        [--method=NAME,NAME...] [--evaluations=N] [--seeds=R] [--every=N] [--workdir=DIR]
        [--plot=FILE.png] [--json]
    fedasr fuse --task=asr --models=CKPT,CKPT,... --data=DIR [--split=dev]
        [--test=SPLIT,SPLIT...] [--method=NAME] [--evaluations=N] [--workdir=DIR] [--json]
    fedasr fuse --task=checkpoints --models=A,B,... --score=MODULE:FUNCTION --workdir=DIR
        [--score_takes=arrays|folder] [--method=NAME,NAME...] [--evaluations=N]
        [--chromosomes=REGEX] [--base=MODEL] [--archive=host|device] [--plot=FILE.png] [--json]

`digits` is the published test bed: an MLP on scikit-learn's digits, evolved from two random models
or merged from two specialists (digits 0-4 and 5-9), which do not mutate; --pretrained --raw is the
published setting. `asr` merges recognisers of one architecture, scored by utterance on --split;
word error rates are on --test. `checkpoints` merges any models of one architecture that are saved
as safetensors (files, or folders as Hugging Face's libraries write them) by a score of yours: a
Python function of {tensor's name: NumPy array}, or of a folder, that gives a number from 0 to 1 for
every data point. With --workdir the same command goes on after an interruption, and `asr` and
`checkpoints` leave the merged model in DIR/fused/METHOD.

Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.fusion import METHODS

if TYPE_CHECKING:
    from fedasr.fusion.checkpoints import Parents
    from fedasr.fusion.methods import Method
    from fedasr.fusion.outside import Score
    from fedasr.fusion.run import Result
    from fedasr.fusion.tasks import Task


CHECKPOINTS, FUSED, CANDIDATE = "search", "fused", "candidate"


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
    return run(
        method,
        task.make_parents,
        _seeds(),
        budget,
        every=_every(),
        measure=task.measure,
        workdir=Path(flags.FLAGS.workdir, CHECKPOINTS, name) if flags.FLAGS.workdir else None,
        identity=_identity(name, task),
        save_seconds=flags.FLAGS.save_seconds,
        log=lambda text: _say(f"{name}: {text}"),
    )


def _every() -> int:
    return flags.FLAGS.every or max(1, flags.FLAGS.evaluations // 20)


def _identity(name: str, task: Task) -> dict[str, Any]:
    """Of a method's run."""
    settings = {"method": name, "population": flags.FLAGS.population, "alpha": flags.FLAGS.alpha}
    if name == "map_elites":
        settings["parents"] = "by quality"  # earlier revisions drew any two
    return {**task.identity, **settings}


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
    if flags.FLAGS.pair_per_seed and not flags.FLAGS.pretrained:
        raise UserError("--pair_per_seed is about the specialists of --pretrained")
    task = digits_task(flags.FLAGS.pretrained, flags.FLAGS.raw, flags.FLAGS.pair_per_seed)
    results = {name: search(name, task) for name in flags.FLAGS.method}
    if flags.FLAGS.plot:
        draw({name: result.curve for name, result in results.items()}, flags.FLAGS.plot)
    return {
        name: {
            "test_accuracy": spread(result.curve["test_accuracy"][-1])
            | {"per_seed": result.curve["test_accuracy"][-1].tolist()},
            **describe(result),
            "start": "pretrained" if flags.FLAGS.pretrained else "scratch",
            **({"pair": task.identity["pair"]} if flags.FLAGS.pretrained else {}),
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


def run_checkpoints() -> dict[str, Any]:
    """{method: summary} of merged checkpoints."""
    # JAX holds little of an accelerator here, and must leave the rest to whoever scores.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from fedasr.fusion import checkpoints, outside
    from fedasr.fusion.tasks import make_method

    if not flags.FLAGS.models or not flags.FLAGS.score:
        raise UserError(
            "--models and --score are needed: the checkpoints to merge, and the function that "
            "scores one (MODULE:FUNCTION)"
        )
    function = checkpoints.load_score(flags.FLAGS.score)
    parents = checkpoints.load_parents(flags.FLAGS.models, flags.FLAGS.base, _say)
    results = {}
    with contextlib.ExitStack() as stack:
        workdir = flags.FLAGS.workdir
        if workdir:
            candidate = Path(workdir, CANDIDATE)
            stack.enter_context(contextlib.closing(_locked(workdir)))
            stack.callback(shutil.rmtree, candidate, ignore_errors=True)
        else:
            _say("without --workdir the merged model is not kept")
            scratch = tempfile.TemporaryDirectory(prefix="fedasr-")
            candidate = Path(stack.enter_context(scratch), CANDIDATE)
        score = checkpoints.make_score(parents, function, flags.FLAGS.score_takes, candidate)
        rows = outside.parent_scores(score, parents.models, flags.FLAGS.models)
        average = outside.checked(score(parents.average()), rows.shape[1])
        name_of_score = f"{flags.FLAGS.score} of {flags.FLAGS.score_takes}"
        task = checkpoints.checkpoints_task(
            parents, rows.shape[1], name_of_score, flags.FLAGS.chromosomes
        )
        for name in flags.FLAGS.method:
            method = make_method(name, task, flags.FLAGS.population, flags.FLAGS.alpha)
            results[name] = outside.beside(
                [
                    _search_outside(name, method, task, score, parents, rows, seed)
                    for seed in _seeds()
                ]
            )
    shared = {
        "parents_score": [float(np.nan_to_num(row).mean()) for row in rows],
        "average_score": float(np.nan_to_num(average).mean()),
    }
    if flags.FLAGS.plot:
        draw({name: result.curve for name, result in results.items()}, flags.FLAGS.plot)
    return {
        name: _checkpoint_summary(name, result, parents, shared) for name, result in results.items()
    }


def _locked(workdir: str) -> Any:
    """A lock of the work directory: of two processes, one writes candidates there."""
    from fedasr.training.checkpoint import lock_directory

    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --workdir={workdir}: {error.strerror}") from error
    return lock_directory(workdir)


def _seeds() -> range:
    return range(flags.FLAGS.seed, flags.FLAGS.seed + flags.FLAGS.seeds)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _search_outside(
    name: str,
    method: Method,
    task: Task,
    score: Score,
    parents: Parents,
    rows: np.ndarray,
    seed: int,
) -> Result:
    """One seed's search of a method for checkpoints."""
    import jax

    from fedasr.fusion import outside

    where = f"seed_{seed}"
    try:
        kind = "cpu" if flags.FLAGS.archive == "host" else None
        device = jax.local_devices(backend=kind)[0]
    except RuntimeError as error:
        raise UserError(
            "--archive=host needs JAX's CPU device: add cpu to JAX_PLATFORMS, or choose "
            "--archive=device"
        ) from error
    return outside.search(
        method,
        score,
        parents.models,
        rows,
        seed,
        # Nothing to search for: one evaluation says all.
        1 if name == "average" else flags.FLAGS.evaluations,
        every=_every(),
        workdir=Path(flags.FLAGS.workdir, CHECKPOINTS, name, where)
        if flags.FLAGS.workdir
        else None,
        identity=_identity(name, task),
        save_seconds=flags.FLAGS.save_seconds,
        device=device,
        log=lambda text: _say(f"{name}, {where}: {text}"),
    )


def _checkpoint_summary(
    name: str, result: Result, parents: Parents, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """What is said of a method, whose best model is written."""
    import jax

    from fedasr.fusion import folders
    from fedasr.fusion.tasks import spread

    last = result.curve["score"][-1]
    top = int(last.argmax())
    summary: dict[str, Any] = {
        "score": spread(last) | {"per_seed": last.tolist()},
        **shared,
        **describe(result),
    }
    if flags.FLAGS.workdir:
        best = jax.tree.map(lambda x: np.asarray(x[top]), result.best)
        provenance = {
            "models": [str(Path(one.name).absolute()) for one in parents.folders],
            "sha256": parents.digests[: len(parents.folders)],
            "method": name,
            "seed": flags.FLAGS.seed + top,
            "evaluations": result.evaluations,
            "score": float(last[top]),
            **shared,
        }
        out = Path(flags.FLAGS.workdir, FUSED, name)
        folders.write(parents.folders[0], parents.whole(best), out, provenance)
        summary["fused"] = str(out)
    return summary


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

    outside = flags.FLAGS.task == "checkpoints"
    for name, value in (
        ("seeds", 1 if outside else 3),
        ("evaluations", 1000 if outside else 10_000),
    ):
        if flags.FLAGS[name].value is None:
            flags.FLAGS[name].value = value
    tasks = {"digits": run_digits, "asr": run_asr, "checkpoints": run_checkpoints}
    summaries = tasks[flags.FLAGS.task]()
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
    flags.DEFINE_enum("task", "digits", ["digits", "asr", "checkpoints"], "What the models do.")
    flags.DEFINE_list("method", ["m2n2"], f"One or several of {', '.join(METHODS)}.")
    flags.DEFINE_bool("from_scratch", False, "digits: start from random models (default).")
    flags.DEFINE_bool("pretrained", False, "digits: start from two specialists.")
    flags.DEFINE_bool("raw", False, "digits: pixels of 0 to 16 as published, not centred.")
    flags.DEFINE_bool(
        "pair_per_seed", False, "digits: specialists of each seed, not the published."
    )
    flags.DEFINE_integer(
        "evaluations", None, "Of every seed; default 10000, for checkpoints 1000.", lower_bound=1
    )
    flags.DEFINE_integer(
        "seeds", None, "Independent runs; default 3, for checkpoints 1.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "The first one.", lower_bound=0)
    flags.DEFINE_integer("every", 0, "Evaluations between measurements; 0: 20 of them.")
    flags.DEFINE_integer("population", 20, "Models in the archive.")
    flags.DEFINE_float("alpha", 1.0, "Exponent of the competition.")
    flags.DEFINE_string("workdir", None, "For checkpoints, to go on after an interruption.")
    flags.DEFINE_float("save_seconds", 60.0, "Between checkpoints.", lower_bound=0)
    flags.DEFINE_string("plot", None, "Picture of accuracy, coverage and entropy.")
    flags.DEFINE_list(
        "models", [], "asr: work directories or checkpoints to merge. checkpoints: safetensors."
    )
    flags.DEFINE_string("data", None, "asr: a folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "dev", "asr: what models are scored on.")
    flags.DEFINE_list("test", ["test"], "asr: splits whose word error rate is reported.")
    flags.DEFINE_string("score", None, "checkpoints: MODULE:FUNCTION or FILE.py:FUNCTION.")
    flags.DEFINE_enum(
        "score_takes", "arrays", ["arrays", "folder"], "checkpoints: what the function is given."
    )
    flags.DEFINE_enum(
        "archive", "host", ["host", "device"], "checkpoints: where models are held and merged."
    )
    flags.DEFINE_string("base", None, "checkpoints: what all were trained from, if known.")
    flags.DEFINE_string(
        "chromosomes",
        "",
        "checkpoints: tensors whose names match this alike are merged on their own.",
    )


def main() -> None:
    """The command `fedasr fuse`: parses the flags, runs and exits."""
    _define_flags()
    common.main(program, __name__)


if __name__ == "__main__":
    main()
