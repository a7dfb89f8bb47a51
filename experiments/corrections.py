"""Does a recogniser learn words that it never met from its users' corrections?

    python -m experiments.corrections [--seeds=0,1,2] [--systems=uniform,words,...]
        [--workdir=DIR] [--plot=FILE.png] [--config.section.field=value ...] [--json]

The corpus is the synthetic task "fresh": the recogniser is trained on split "seed", which has none
of the fresh words. It transcribes the users of "train", who correct some of its errors, rewrite
some sentences and make mistakes (`fedasr.feedback.corrections`). Federated rounds on what is left
after the filters then start from that stale recogniser, each followed by central steps on the
server's data (joint training):

* unfiltered: every edited text as it is, all users alike;
* uniform: filtered and refined labels, all users alike;
* words: the same, users weighted by their rarest trusted word;
* quality: the same, updates weighted by the loss on held-out data of the server;
* federated: "words" without central steps;
* private: "words" with clipping and noise, its histograms noisy too.

NAME+ averages the models of the last rounds of NAME, and as much of the stale recogniser with them
as keeps the general WER of split "dev" (the smallest share that does).

Measured on the users of "test" (other voices, other sentences): WER of sentences with a fresh word,
with a rare one, and with none (general), and the share of rare words that were not recognised.
Results of each seed and system are kept in the work directory: the same command goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments import study
from experiments.study import in_words, once, spread
from fedasr.errors import UserError
from fedasr.streams import Stream, make_root, seed_key, sub_seed

if TYPE_CHECKING:
    from fedasr.data.batching import Bucket
    from fedasr.data.corpus import Corpus
    from fedasr.feedback.corrections import Feedback, Review
    from fedasr.feedback.histograms import Histogram
    from fedasr.models.recogniser import Recogniser
    from fedasr.text import CharTokenizer
    from fedasr.training.evaluation import Evaluator

SYSTEMS = ("unfiltered", "uniform", "words", "quality", "federated", "private")
WEIGHTED = ("words", "federated", "private")  # by their words
MEASURES = ("fresh", "rare", "general", "rare_missed")


class Bench(NamedTuple):
    """What all systems and seeds share."""

    config: Mapping[str, Any]
    tokenizer: CharTokenizer
    pad_space: bool
    corpora: Mapping[str, Corpus]
    bucket: Bucket
    recogniser: Recogniser
    evaluator: Evaluator


def open_bench(config: Mapping[str, Any]) -> Bench:
    """Opens the corpus, which is made when first needed (or is `data.dir`)."""
    from fedasr.data.batching import make_buckets
    from fedasr.data.records import open_corpus, read_metadata
    from fedasr.data.synthetic import SyntheticConfig, prepare_synthetic
    from fedasr.training.builders.corpora import fitting_tokenizer
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.config import Config
    from fedasr.training.evaluation import Evaluator

    fields = study.with_tuples(config["corrections"]["corpus"])
    directory = config["data"]["dir"] or prepare_synthetic(SyntheticConfig("fresh", **fields))
    metadata = read_metadata(directory)
    corpora = {split: open_corpus(directory, split) for split in ("seed", "train", "dev", "test")}
    (bucket,) = make_buckets(list(corpora.values()), 1, {"features": 24, "labels": 4})
    typed = Config.of(config)
    tokenizer, recogniser = fitting_tokenizer(typed, metadata), build_recogniser(typed)
    return Bench(
        config,
        tokenizer,
        metadata["options"]["pad_space"],
        corpora,
        bucket,
        recogniser,
        Evaluator(recogniser, [bucket], tokenizer=tokenizer),
    )


# --------------------------------------------------------------------------------- measuring


def missed_words(
    references: Sequence[str], hypotheses: Sequence[str], words: Collection[str]
) -> float:
    """Percent of the occurrences of `words` that an alignment finds nothing equal for."""
    from rapidfuzz.distance import Levenshtein

    missed = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = reference.split(), hypothesis.split()
        total += sum(word in words for word in said)
        for tag, i1, i2, _, _ in Levenshtein.opcodes(said, heard):
            if tag != "equal":
                missed += sum(word in words for word in said[i1:i2])
    return 100.0 * missed / max(total, 1)


def measure(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """The `MEASURES` of transcripts, in percent."""
    from fedasr.data.synthetic import FRESH_WORDS, RARE_FRESH_WORDS
    from fedasr.training.metrics import word_errors

    pairs = list(zip(references, hypotheses, strict=True))

    def rate(wanted: Callable[[set[str]], bool]) -> float:
        chosen = [pair for pair in pairs if wanted(set(pair[0].split()))]
        return word_errors([r for r, _ in chosen], [h for _, h in chosen]).percent

    return {
        "fresh": rate(lambda words: bool(words & set(FRESH_WORDS))),
        "rare": rate(lambda words: bool(words & set(RARE_FRESH_WORDS))),
        "general": rate(lambda words: not words & set(FRESH_WORDS)),
        "rare_missed": missed_words(references, hypotheses, RARE_FRESH_WORDS),
    }


def evaluate(bench: Bench, params: Any) -> dict[str, dict[str, float]]:
    """{split: `MEASURES`} of a model on the held-out users."""
    return {
        split: measure(*bench.evaluator.transcripts(params, bench.corpora[split])[:2])
        for split in ("dev", "test")
    }


# ----------------------------------------------------------------------------------- systems


def central_training(bench: Bench, section: str, seed: int, batch_size: int) -> Any:
    """Training on the server's data, split "seed", by a section of the configuration."""
    import optax

    from fedasr.federated.server import make_optimizer
    from fedasr.models.recogniser import ARRAYS
    from fedasr.training.central import CentralTraining

    settings = bench.config[section]
    rate = settings["learning_rate"]
    if section == "seed_training":
        rate = optax.cosine_decay_schedule(rate, max(settings["steps"], 1), 0.02)
    return CentralTraining(
        bench.corpora["seed"],
        bench.recogniser.loss,
        optax.chain(
            optax.clip_by_global_norm(settings["grad_clip"]),
            make_optimizer(settings["optimizer"], rate),
        ),
        batch_size,
        seed=seed,
        buckets=[bench.bucket],
        select=ARRAYS,
    )


def stale_model(bench: Bench, seed: int, folder: Path, log: study.Log) -> Any:
    """The recogniser that has never met a fresh word; trained once and kept in `folder`."""

    def train_stale() -> tuple[int, Any]:
        settings = bench.config["seed_training"]
        trainer = central_training(bench, "seed_training", seed, settings["batch_size"])
        state = trainer.init(bench.recogniser.init(seed_key(seed, Stream.INIT)))
        steps = settings["steps"]
        for state, done, loss in trainer.run(state, steps):  # noqa: B007
            if done % 100 == 0:
                log(f"seed {seed}, stale recogniser: step {done} of {steps}, loss {loss:.2f}")
        return steps, state

    return study.trained_once(folder, _settings(bench.config, "stale"), train_stale)


def _histogram_seed(bench: Bench, seed: int, name: str) -> int:
    """Of the noise on one histogram: no other histogram, seed or setting shares it."""
    from fedasr.training.config import fingerprint

    settings = {key: value for key, value in bench.config.items() if key != "seed"}
    return sub_seed(make_root(seed, fingerprint(settings)), Stream.HISTOGRAM, name)


class Corrections(NamedTuple):
    """What the users' devices hold after the filters."""

    feedback: list[Feedback]
    reviews: list[Review]
    pairs: Histogram


def make_corrections(bench: Bench, params: Any, seed: int, noise: float) -> Corrections:
    """Edits of the users of "train", reviewed; `noise` is on the histogram of trusted pairs."""
    from fedasr.feedback import corrections as lib
    from fedasr.feedback.histograms import client_histogram

    settings, corpus = bench.config["corrections"], bench.corpora["train"]
    said, heard = lib.transcribe(bench.evaluator, params, corpus)
    feedback = lib.simulate_edits(said, heard, lib.EditConfig(**settings["edits"]), seed)
    filters = lib.Filters(
        **settings["filters"],
        stride=bench.config["model"]["options"]["stride"],
        characters=bench.tokenizer.characters,
    )
    frames = [int(corpus.lengths(one.user)["features"][one.index]) for one in feedback]
    pairs = client_histogram(
        lib.pairs_of_users(feedback, frames, len(corpus.users), filters),
        most=settings["most"],
        noise_multiplier=noise,
        seed=_histogram_seed(bench, seed, "pairs"),
    )
    reviews = [lib.review(one, n, filters, pairs) for one, n in zip(feedback, frames, strict=True)]
    return Corrections(feedback, reviews, pairs)


def server_words(bench: Bench) -> Counter[str]:
    """How often the server's own data have each word."""
    corpus, counts = bench.corpora["seed"], Counter()
    for user, size in enumerate(corpus.sizes):
        for example in corpus.get(user, range(int(size))):
            counts.update(bench.tokenizer.decode(example["labels"]).split())
    return counts


def held_out_batch(bench: Bench) -> dict[str, Any]:
    """Utterances of the held-out split "dev", for weights by quality: one batch, general ones."""
    from fedasr.data.batching import make_buckets, write_example
    from fedasr.data.synthetic import FRESH_WORDS
    from fedasr.models.recogniser import ARRAYS

    corpus, count = bench.corpora["dev"], bench.config["corrections"]["quality"]["utterances"]
    (bucket,) = make_buckets([corpus], 1, {"features": 24, "labels": 4})  # no training user's
    batch: dict[str, Any] = {}
    slot = 0
    for user, size in enumerate(corpus.sizes):
        for example in corpus.get(user, range(int(size))):
            words = set(bench.tokenizer.decode(example["labels"]).split())
            if slot < count and not words & set(FRESH_WORDS):
                write_example(batch, (slot,), (count,), example, bucket, ARRAYS)
                slot += 1
    return batch


def make_sampler(bench: Bench, corrected: Any, seed: int) -> Any:
    """Poisson sampling of all training users; who has no corrections left sends nothing.

    How many have some left is as private as the corrections: nothing may follow from it.
    """
    from fedasr.privacy.sampling import PoissonSampler, SilentSampler

    population = len(corrected.users)
    everybody = PoissonSampler(population, min(bench.config["cohort"], population), seed)
    return SilentSampler(everybody, tuple(corrected.sizes.nonzero()[0].tolist()))


def train(bench: Bench, system: str, params: Any, seed: int, log: study.Log) -> dict[str, Any]:
    """Runs one system from the stale recogniser; its result."""
    import numpy as np

    from fedasr.feedback import corrections as lib
    from fedasr.feedback import weighting
    from fedasr.feedback.histograms import client_histogram
    from fedasr.feedback.joint import JointTraining, average_params

    config, settings = bench.config, bench.config["corrections"]
    private = system == "private"
    noise = settings["histogram_noise"] if private else 0.0
    found = make_corrections(bench, params, seed, noise)
    texts: list[str | None] = [r.label for r in found.reviews]
    if system == "unfiltered":
        texts = [one.edited or None for one in found.feedback]
    corpus = lib.corrected_corpus(
        bench.corpora["train"], found.feedback, texts, bench.tokenizer, bench.pad_space, True
    )

    weights = weigh = None
    if system in WEIGHTED:
        words = weighting.words_of_users(corpus, bench.tokenizer)
        histogram = client_histogram(
            words,
            most=settings["most"],
            noise_multiplier=noise,
            seed=_histogram_seed(bench, seed, "words"),
        )
        weights = weighting.word_weights(words, histogram, server_words(bench), **settings["words"])
    if system == "quality":
        options = {k: v for k, v in settings["quality"].items() if k != "utterances"}
        held_out = held_out_batch(bench)
        weigh = weighting.quality_weight(bench.recogniser.evaluate, held_out, **options)

    sampler = make_sampler(bench, corpus, seed)
    weighted = weights is not None or weigh is not None
    mechanism = make_mechanism(bench, sampler, noise if private else None, weighted)
    trainer = make_simulation(bench, system, corpus, mechanism, weights, weigh, seed)
    if system != "federated":
        central = central_training(bench, "central", seed, config["central"]["batch_size"])
        trainer = JointTraining(trainer, central, settings["central_steps"])
    rounds, last = config["rounds"], []
    state = trainer.init(params)
    began = time.monotonic()
    for state, metrics in trainer.run(state, rounds):
        last = [*last, state.params][-settings["averaged"] :]
        if metrics.round % 10 == 0:
            log(f"seed {seed}, {system}: round {metrics.round} of {rounds}, {metrics.loss:.2f}")
    result: dict[str, Any] = {"seconds": time.monotonic() - began}
    speaking = corpus.sizes > 0
    result |= {"users": int(speaking.sum()), "utterances": int(corpus.sizes.sum())}
    result["wer"] = evaluate(bench, state.params)
    result |= _averaged(bench, params, average_params(last))
    if weights is not None:
        weights = weights[speaking]
        result["weights"] = {"mean": float(weights.mean()), "max": float(weights.max())}
        result["share_at_floor"] = float(np.mean(weights <= weights.min() + 1e-6))
    if private:
        trusted = {name: settings[name]["trusted"] for name in ("filters", "words")}
        result["privacy"] = _privacy(mechanism, config["privacy"], rounds, trusted)
    return result


def make_mechanism(bench: Bench, sampler: Any, noise: float | None, weighted: bool) -> Any:
    """Clipping and noise by the configuration; none of both where `noise` is None.

    Args:
      sampler: of the users.
      noise: noise multiplier of each of the two histograms that were published.
      weighted: whether users have weights.
    """
    from fedasr.privacy.mechanism import Mechanism

    weighting = "bounded" if weighted else "uniform"
    if noise is None:
        return Mechanism(float("inf"), "global", 0.0, sampler, weighting=weighting)
    privacy = bench.config["privacy"]
    return Mechanism(
        privacy["clip_norm"],
        privacy["budget"],
        privacy["sigma"] * sampler.expected_cohort,
        sampler,
        weighting=weighting,
        released=(noise, noise),
    )


def make_simulation(
    bench: Bench, system: str, corpus: Any, mechanism: Any, weights: Any, weigh: Any, seed: int
) -> Any:
    """The federated rounds of a system; see `FedAvg` for weights and weigh."""
    from fedasr.data.batching import Batching
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.server import constant_then_exponential, make_optimizer
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS
    from fedasr.training.builders import corpora
    from fedasr.training.config import Config, fingerprint

    config = bench.config
    client, server = config["client"], config["server"]
    schedule = constant_then_exponential(
        server["learning_rate"],
        server["decay_start"],
        server["decay_rounds"],
        server["decay_rate"],
    )
    return Simulation(
        corpus,
        mechanism,
        FedAvg(
            local_training(
                bench.recogniser.loss,
                make_optimizer(client["optimizer"], client["learning_rate"]),
                grad_clip=client["grad_clip"],
            ),
            make_optimizer(server["optimizer"], schedule, **server["options"]),
            weights=weights,
            weigh=weigh,
        ),
        Batching(
            client["batch_size"],
            steps=client["steps"],
            buckets=corpora.client_grid(Config.of(config)),
            select=ARRAYS,
        ),
        hardware=Hardware(chunk=config["chunk"]),
        seed=seed,
        identity=f"corrections {system} {fingerprint(_settings(config, system))}",
    )


def _averaged(bench: Bench, stale: Any, new: Any) -> dict[str, Any]:
    """{"averaged": rates, "stale_share"} of the least stale mean that keeps dev's general WER."""
    from fedasr.feedback.joint import average_params

    settings = bench.config["corrections"]
    most = evaluate(bench, stale)["dev"]["general"] + settings["general_margin"]
    for share in settings["stale_shares"]:
        rates = evaluate(bench, average_params([stale, new], [share, 1 - share]))
        if rates["dev"]["general"] <= most:
            break
    return {"averaged": rates, "stale_share": share}


def _privacy(
    mechanism: Any, privacy: Mapping[str, Any], rounds: int, trusted: Mapping[str, float]
) -> dict[str, Any]:
    """Epsilon with the histograms', as simulated and as deployed.

    Deployed, the same noise on shares of the users is more noise on counts, and what counts as
    trusted by so many users grows with the population as well: `trusted_pairs`, `trusted_words`.
    """
    figures = []
    for cohort, population in ((None, None), *privacy["deployments"]):
        deployed = mechanism if cohort is None else mechanism.deployed(cohort, population)
        spent = deployed.epsilon(rounds, privacy["delta"])
        growth = deployed.sampler.population / mechanism.sampler.population
        figures.append(
            {
                "cohort": cohort or mechanism.sampler.expected_cohort,
                "population": population or mechanism.sampler.population,
                "epsilon": spent.epsilon,
                "accountant": spent.accountant,
                "released": deployed.released,
                "trusted_pairs": trusted["filters"] * growth,
                "trusted_words": trusted["words"] * growth,
            }
        )
    return {
        "delta": privacy["delta"],
        "neighbours": mechanism.sampler.neighbours,
        "simulated": figures[0],
        "deployed": figures[1:],
    }


# ---------------------------------------------------------------------------- seeds and tables


def _settings(config: Mapping[str, Any], system: str) -> dict[str, Any]:
    """The part of the configuration that a result depends on."""
    if system == "stale":
        names = ("data", "model", "augment", "seed_training")
        return {name: config[name] for name in names} | {"corpus": config["corrections"]["corpus"]}
    others = {"words": WEIGHTED, "quality": ("quality",), "histogram_noise": ("private",)}
    unused = {name for name, systems in others.items() if system not in systems}
    used = {name: value for name, value in config["corrections"].items() if name not in unused}
    return {name: value for name, value in config.items() if name != "seed"} | {"corrections": used}


def filtered(bench: Bench, params: Any, seed: int) -> dict[str, Any]:
    """What the filters make of the users' edits."""
    from fedasr.feedback.corrections import filter_quality

    found = make_corrections(bench, params, seed, 0.0)
    dropped = Counter(review.reason for review in found.reviews if review.label is None)
    spans = Counter(r for review in found.reviews for r in review.reasons if r)
    return {
        "edited": len(found.feedback),
        "kept": sum(review.label is not None for review in found.reviews),
        "dropped": dict(dropped),
        "rejected_spans": dict(spans),
        "planted": filter_quality(found.feedback, found.reviews),
    }


def run_seed(
    bench: Bench, seed: int, systems: Sequence[str], workdir: Path, log: study.Log
) -> dict[str, Any]:
    """{"stale", "filters" and each system: result} of a seed; what is done is read again."""
    folder = workdir / f"seed-{seed}"
    params = stale_model(bench, seed, folder / "stale", log)

    def stage(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return once(folder / f"{name}.json", _settings(bench.config, name), make)

    results = {
        "stale": stage("stale", lambda: {"wer": evaluate(bench, params)}),
        "filters": stage("filters", lambda: filtered(bench, params, seed)),
    }
    for system in systems:
        results[system] = stage(system, lambda s=system: train(bench, s, params, seed, log))
        rates = results[system]["wer"]["test"]
        log(f"seed {seed}, {system}: " + ", ".join(f"{k} {rates[k]:.1f}" for k in MEASURES))
    return results


def summarize(results: Mapping[int, Mapping[str, Any]], systems: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and what the experiment set out to show."""
    by_model: dict[str, list[Mapping[str, float]]] = {}
    for found in results.values():
        for name in ("stale", *systems):
            by_model.setdefault(name, []).append(found[name]["wer"]["test"])
            if name != "stale":
                by_model.setdefault(f"{name}+", []).append(found[name]["averaged"]["test"])
    summary: dict[str, Any] = {
        "seeds": sorted(results),
        "test": {
            name: {measure: spread([rates[measure] for rates in rows]) for measure in MEASURES}
            for name, rows in by_model.items()
        },
        "filters": _filters_over_seeds([found["filters"] for found in results.values()]),
        **_beside_stale(by_model),
        **_beside_uniform(by_model),
    }
    if "private" in systems:
        summary["privacy"] = [found["private"]["privacy"] for found in results.values()]
    return summary


def _filters_over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of right edits that were kept and of wrong ones that were removed."""
    planted = [one["planted"] for one in found]
    wrong = [sum(p[kind]["edits"] for kind in p if kind != "right") for p in planted]
    passed = [sum(p[kind]["kept"] for kind in p if kind != "right") for p in planted]
    return {
        "right_kept": spread([p["right"]["kept"] / p["right"]["edits"] for p in planted]),
        "wrong_removed": spread([1 - k / n for k, n in zip(passed, wrong, strict=True)]),
        "by_kind": list(found),
    }


def _beside_stale(by_model: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """What fresh words gain, in percent, and what general sentences cost, in points."""
    gains, costs = {}, {}
    for name, rows in by_model.items():
        if name != "stale":
            pairs = list(zip(rows, by_model["stale"], strict=True))
            gains[name] = spread([100 * (1 - new["fresh"] / old["fresh"]) for new, old in pairs])
            costs[name] = spread([new["general"] - old["general"] for new, old in pairs])
    return {"fresh_relative_reduction": gains, "general_points_worse": costs} if gains else {}


def _beside_uniform(by_model: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """What weights gain where words are rare, in points."""
    better = {}
    for name in ("words", "words+", "quality", "quality+"):
        base = "uniform" + "+" * name.endswith("+")
        if name in by_model and base in by_model:
            pairs = list(zip(by_model[base], by_model[name], strict=True))
            for measure in ("rare", "rare_missed"):
                gain = [uniform[measure] - weighted[measure] for uniform, weighted in pairs]
                better[f"{name} {measure}"] = spread(gain)
    return {"better_than_uniform": better} if better else {}


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people: mean (standard deviation over the seeds)."""
    from fedasr.privacy.accounting import epsilon_in_words

    yield f"test, percent, mean (std) over seeds {summary['seeds']}: {', '.join(MEASURES)}"
    for name, row in summary["test"].items():
        yield f"  {name}: " + ", ".join(in_words(row[measure]) for measure in MEASURES)
    filters = summary["filters"]
    yield f"right edits kept: {in_words(filters['right_kept'], scale=100)}%"
    yield f"wrong edits removed: {in_words(filters['wrong_removed'], scale=100)}%"
    for name, gain in summary.get("fresh_relative_reduction", {}).items():
        worse = in_words(summary["general_points_worse"][name])
        yield f"{name}: fresh WER reduced by {in_words(gain)}%, general worse by {worse} points"
    for name, gain in summary.get("better_than_uniform", {}).items():
        yield f"{name} better than uniform by {in_words(gain)} points"
    for found in summary.get("privacy", ())[:1]:
        yield f"privacy compares: {found['neighbours']}"
        for case in found["deployed"]:
            yield (
                f"private, as deployed: epsilon {epsilon_in_words(case['epsilon'])} at delta "
                f"{found['delta']:g} ({case['accountant']}), {case['cohort']:,} of "
                f"{case['population']:,} users a round, histograms' noise multipliers "
                f"{case['released']}; a word is trusted from {case['trusted_words']:,.0f} users on"
            )


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Bars of every model's error rates, with the standard deviation over the seeds."""
    figure = study.new_figure(10.5, 3.9)
    axes = figure.subplots()
    rows = {name: [row[measure] for measure in MEASURES] for name, row in summary["test"].items()}
    labels = ("WER, fresh word", "WER, rare word", "WER, general", "rare words missed")
    study.draw_bars(axes, rows, labels)
    axes.set_ylabel("percent")
    axes.legend(fontsize=8, ncols=2)
    study.save_figure(figure, path)


# ------------------------------------------------------------------------------------- program


def _define_flags() -> None:
    flags.DEFINE_list("systems", list(SYSTEMS), f"Which of {', '.join(SYSTEMS)}.")


def _check(config: Mapping[str, Any]) -> None:
    study.check_names("systems", flags.FLAGS.systems, SYSTEMS)
    if config["chunk"] == "auto":
        raise UserError("chunk must be a number here")


def _summarize(
    config: dict[str, Any], seeds: Sequence[int], workdir: Path, log: study.Log
) -> dict[str, Any]:
    bench, systems = open_bench(config), flags.FLAGS.systems
    return summarize(
        {seed: run_seed(bench, seed, systems, workdir, log) for seed in seeds}, systems
    )


if __name__ == "__main__":
    study.main(
        study.Study(
            "corrections",
            ("corrections",),
            _summarize,
            _lines,
            draw,
            _check,
            define_flags=_define_flags,
        )
    )
