"""How much of what transcripts of all users would give does self-training give without them?

    python -m experiments.self_training [--seeds=0,1,2] [--systems=labelled,self,all]
        [--workdir=DIR] [--plot=FILE.png] [--config.section.field=value ...] [--json]

A tenth of the users, drawn by the seed, have transcripts. Central steps on their utterances make
the model that begins ("start"). Then come rounds over all users, each followed by central steps on
the labelled users' utterances, the same for all systems:

* labelled: only the labelled users have anything to send;
* self: the others train on what the server's model hears (`fedasr.feedback.self_training`);
* all: they train on their true transcripts.

The gap that is closed is (WER of labelled - WER of self) / (WER of labelled - WER of all), on split
"test"; where the rounds of "labelled" do worse on "dev" than "start", that takes its place. Results
of each seed and system are kept in the work directory: the same command goes on. With
--config.init_from=RUN the first model begins with the encoder of a run, such as one of masked
prediction (`objective=best_rq`); `{seed}` in it is the seed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments import study
from experiments.study import in_words, once, spread
from fedasr.errors import UserError
from fedasr.streams import Stream, generator, seed_key

if TYPE_CHECKING:
    from fedasr.models.recogniser import Recogniser
    from fedasr.training.builders.corpora import Data
    from fedasr.training.config import Config
    from fedasr.training.evaluation import Evaluator

SYSTEMS = ("labelled", "self", "all")
SPLITS = ("dev", "test")


class Bench(NamedTuple):
    """What the systems of a seed share. labelled: numbers of the users with transcripts."""

    config: Config
    settings: Mapping[str, Any]
    data: Data
    recogniser: Recogniser
    evaluator: Evaluator
    labelled: tuple[int, ...]


def open_bench(config: Mapping[str, Any], seed: int) -> Bench:
    """Opens the corpus, which is made when first needed, and draws who is labelled."""
    import jax

    from fedasr.training.builders import corpora, evaluators, models
    from fedasr.training.config import Config

    typed = Config.of(config)
    start = typed.init_from.replace("{seed}", str(seed))
    typed = dataclasses.replace(typed, seed=seed, init_from=start)
    data = corpora.Data(corpora.data_directory(typed), typed, lambda line: None)
    recogniser = models.build_recogniser(typed)
    settings, users = config["self_training"], len(data.train.users)
    count = max(1, round(settings["labelled"] * users))
    drawn = generator(Stream.STUDY, seed, "labelled").permutation(users)[:count]
    evaluator = evaluators.make_evaluator(typed, recogniser, data, jax.local_devices())
    return Bench(typed, settings, data, recogniser, evaluator, tuple(sorted(map(int, drawn))))


def evaluate(bench: Bench, params: Any) -> dict[str, float]:
    """WER in percent by split."""
    return {split: bench.evaluator(params, bench.data.evaluation[split])["wer"] for split in SPLITS}


def central_training(bench: Bench, section: str) -> Any:
    """Central steps on the labelled users' utterances, by a section of the configuration."""
    import jax

    from fedasr.data.views import UserSubset
    from fedasr.training.builders import pooled

    corpus = UserSubset(bench.data.train, bench.labelled)
    return pooled.central_training(
        bench.config, section, corpus, bench.recogniser.loss, jax.local_devices()
    )


def first_model(bench: Bench, settings: Mapping[str, Any], folder: Path, log: study.Log) -> Any:
    """Trained centrally on the labelled users; once, and kept in `folder`.

    From scratch, or with `init_from` from the encoder of a run.
    """
    from fedasr.training import starts

    def train() -> tuple[int, Any]:
        config, seed, steps = bench.config, bench.config.seed, bench.config.seed_training.steps
        trainer = central_training(bench, "seed_training")
        params = starts.read_start(config, None, folder)
        if params is None:
            params = bench.recogniser.init(seed_key(seed, Stream.INIT))
        state = trainer.init(params)
        for state, done, loss in trainer.run(state, steps):  # noqa: B007
            if done % 100 == 0:
                log(f"seed {seed}, start: step {done} of {steps}, loss {loss:.2f}")
        return steps, state

    return study.trained_once(folder, settings, train)


def make_trainer(bench: Bench, system: str, corpus: Any, central: Any) -> Any:
    """Rounds over all users of a corpus, some silent, and central steps between them."""
    import jax
    import numpy as np

    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.simulation import Simulation
    from fedasr.feedback.joint import JointTraining
    from fedasr.privacy.sampling import SilentSampler
    from fedasr.training.builders import batches, mechanisms, models, optimizers

    config = bench.config
    sampler = mechanisms.make_sampler(config, len(corpus.users))
    sampler = SilentSampler(sampler, tuple(np.flatnonzero(corpus.sizes).tolist()))
    simulation = Simulation(
        corpus,
        mechanisms.make_mechanism(config, sampler, models.sent_parameters(config)),
        FedAvg(
            optimizers.local_update(config)(bench.recogniser.loss),
            optimizers.server_optimizer(config),
        ),
        batches.make_batching(config, bench.data.grid),
        hardware=Hardware(jax.local_devices(), chunk=1),
        seed=config.seed,
        identity=f"self-training {system}",
    )
    steps = bench.settings["central_steps"]
    return JointTraining(simulation, central, steps) if steps else simulation


def make_filters(bench: Bench) -> list[Any]:
    """By the configuration; the language model is of the labelled users' transcripts."""
    from fedasr.data.views import UserSubset
    from fedasr.decoding import ngram
    from fedasr.feedback import self_training as lib
    from fedasr.training.builders.decoders import transcripts

    settings, tokenizer = bench.settings, bench.data.tokenizer
    filters = [lib.confident(settings["confidence"])]
    if settings["words"] > -1e6:
        texts = transcripts(UserSubset(bench.data.train, bench.labelled), tokenizer)
        model = ngram.estimate(texts, settings["order"])
        filters.append(lib.likely(model, tokenizer.decode, settings["words"]))
    return filters


def quality(bench: Bench, labels: Mapping[tuple[int, int], Any]) -> dict[str, float]:
    """{"kept": share of the utterances without transcripts, "wer": of what they train on}."""
    from fedasr.training.metrics import word_errors

    corpus, decode = bench.data.train, bench.data.tokenizer.decode
    known, heard, said = set(bench.labelled), [], []
    for (user, index), found in labels.items():
        if user not in known:
            heard.append(decode(found))
            said.append(decode(corpus.get(user, [index])[0]["labels"]))
    total = int(corpus.sizes.sum()) - int(corpus.sizes[list(known)].sum())
    wer = word_errors(said, heard).percent if said else 0.0
    return {"kept": len(heard) / max(total, 1), "wer": wer}


def train(bench: Bench, system: str, params: Any, log: study.Log) -> dict[str, Any]:
    """Runs one system from the model that begins; its result."""
    from fedasr.feedback.self_training import GreedyLabeller, SelfTraining

    config, settings = bench.config, bench.settings
    central = central_training(bench, "central")
    greedy = GreedyLabeller(bench.recogniser, bench.data.buckets)
    hears = system == "self"
    everybody = range(len(bench.data.train.users))
    trainer = SelfTraining(
        bench.data.train,
        greedy if hears else lambda params, corpus: [],
        lambda corpus: make_trainer(bench, system, corpus, central),
        labelled=everybody if system == "all" else bench.labelled,
        filters=make_filters(bench) if hears else (),
        every=settings["every"] if hears else config.rounds + 1,
        decay=settings["decay"],
    )
    state, teachers = trainer.init(params), []
    for state, metrics in trainer.run(state, config.rounds):
        if hears and (metrics.round - 1) % settings["every"] == 0:
            found = quality(bench, trainer.labels(state.labeller))
            teachers.append({"round": metrics.round - 1, **found})
        if metrics.round % 10 == 0:
            log(f"seed {config.seed}, {system}: round {metrics.round}, loss {metrics.loss:.2f}")
    return {"wer": evaluate(bench, state.params), "teachers": teachers}


# ---------------------------------------------------------------------------- seeds and tables


def used(config: Mapping[str, Any], system: str) -> dict[str, Any]:
    """The part of the configuration that a result depends on."""
    kept = copy.deepcopy({name: value for name, value in config.items() if name != "seed"})
    if system == "start":
        names = ["data", "model", "augment", "seed_training"]
        names += ["init_from"] * bool(kept["init_from"])
        return {name: kept[name] for name in names} | {
            "labelled": config["self_training"]["labelled"]
        }
    if system != "self":
        for name in ("every", "decay", "confidence", "words", "order"):
            del kept["self_training"][name]
    return kept


def run_seed(
    config: Mapping[str, Any], seed: int, systems: Sequence[str], workdir: Path, log: study.Log
) -> dict[str, Any]:
    """{"start" and each system: result} of a seed; what is done is read again."""
    folder, bench = workdir / f"seed-{seed}", open_bench(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    params = first_model(bench, used(config, "start"), folder / "start", log)

    def stage(name: str, make: Any) -> dict[str, Any]:
        return once(folder / f"{name}.json", used(config, name), make)

    results = {"start": stage("start", lambda: {"wer": evaluate(bench, params)})}
    for system in systems:
        results[system] = stage(system, lambda s=system: train(bench, s, params, log))
        rates = results[system]["wer"]
        log(f"seed {seed}, {system}: dev {rates['dev']:.1f}, test {rates['test']:.1f}")
    return results


def gap_closed(found: Mapping[str, Any]) -> float | None:
    """Of a seed, on "test"; None where transcripts of all are no better than of a tenth."""
    lower = min((found[name]["wer"] for name in ("start", "labelled")), key=lambda x: x["dev"])
    best = found["all"]["wer"]["test"]
    gap = lower["test"] - best
    return (lower["test"] - found["self"]["wer"]["test"]) / gap if gap > 0 else None


def summarize(results: Mapping[int, Mapping[str, Any]], systems: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and the gap that is closed."""
    rows = {
        name: {
            split: spread([found[name]["wer"][split] for found in results.values()])
            for split in SPLITS
        }
        for name in ("start", *systems)
    }
    summary: dict[str, Any] = {"seeds": sorted(results), "wer": rows}
    if set(SYSTEMS) <= set(systems):
        gaps = [gap_closed(found) for found in results.values()]
        summary["closed"] = gaps
        if None not in gaps:
            summary["gap_closed"] = spread([gap for gap in gaps if gap is not None])
    if "self" in systems:
        summary["teachers"] = [found["self"]["teachers"] for found in results.values()]
    return summary


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people: mean (standard deviation over the seeds)."""
    yield f"WER in percent, mean (std) over seeds {summary['seeds']}: {', '.join(SPLITS)}"
    for name, row in summary["wer"].items():
        yield f"  {name}: " + ", ".join(in_words(row[split]) for split in SPLITS)
    for number, teachers in enumerate(summary.get("teachers", ())):
        said = (f"{t['round']}: {100 * t['kept']:.0f}% at {t['wer']:.1f}%" for t in teachers)
        yield f"labels kept and their WER, seed {summary['seeds'][number]}: " + "; ".join(said)
    if "gap_closed" in summary:
        yield f"gap closed: {in_words(summary['gap_closed'], scale=100)}%"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Bars of every system's error rates, with the standard deviation over the seeds."""
    figure = study.new_figure(6.5, 3.6)
    axes = figure.subplots()
    rows = {name: [row[split] for split in SPLITS] for name, row in summary["wer"].items()}
    study.draw_bars(axes, rows, [f"WER, {split}" for split in SPLITS])
    axes.set_ylabel("percent")
    axes.legend(fontsize=8)
    study.save_figure(figure, path)


# ------------------------------------------------------------------------------------- program


def _define_flags() -> None:
    flags.DEFINE_list("systems", list(SYSTEMS), f"Which of {', '.join(SYSTEMS)}.")


def _check(config: Mapping[str, Any]) -> None:
    study.check_names("systems", flags.FLAGS.systems, SYSTEMS)
    if not 0 < config["self_training"]["labelled"] < 1:
        raise UserError("self_training.labelled must be above 0 and below 1: a share of users")


def _summarize(
    config: dict[str, Any], seeds: Sequence[int], workdir: Path, log: study.Log
) -> dict[str, Any]:
    systems = flags.FLAGS.systems
    return summarize(
        {seed: run_seed(config, seed, systems, workdir, log) for seed in seeds}, systems
    )


if __name__ == "__main__":
    study.main(
        study.Study(
            "self_training",
            ("self_training",),
            _summarize,
            _lines,
            draw,
            _check,
            define_flags=_define_flags,
        )
    )
