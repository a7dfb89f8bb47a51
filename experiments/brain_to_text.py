"""Decoding sentences from synthetic neural recordings that drift from day to day.

    python -m experiments.brain_to_text [--seeds=0,1,2] [--workdir=DIR] [--plot=FILE.png]
        [--config.section.field=value ...] [--json]

Each seed makes recordings of its own (`fedasr.data.neural.synthetic`: nothing was recorded), writes
them as MATLAB files and prepares a corpus from these. Then

* days, shared: a decoder with a layer for each training day, and one with a single layer for all;
* federated: the first of these by federated learning, where a day is a client whose layer is local
  (`fedasr.federated.local`);
* language: its test sentences with and without an n-gram language model, which has neither these
  sentences nor those of later days in its text, nor some of the words at all;
* calibration: new days, each through a layer of its own (at first the day before's) that is trained
  on a few labelled sentences, the rest at rest, and then with them on the decoder's own corrected
  output for the day's other sentences; and a decoder that was trained in full on these days, in
  place of as many of the first training days: with as much data, and as long. Both decoders are
  trained with noise that imitates drift;
* drift: the days after training, in order, decoded by the decoder as it is ("fixed"), by one that
  trains on its own corrected output every day ("recalibrated"), without labels, and by one that
  goes on training as long on the labelled days alone ("past only").

Character error rates are of greedy decoding, word error rates with the language model unless said
otherwise, on each day's test sentences; several days' are pooled. Results are kept in the work
directory: the same command goes on.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import study
from experiments.study import in_words, once, spread
from fedasr.errors import UserError
from fedasr.streams import Stream, seed_key

if TYPE_CHECKING:
    from fedasr.data.batching import Bucket
    from fedasr.decoding.beam import BeamDecoder
    from fedasr.models.recurrent import RecurrentConfig
    from fedasr.text import CharTokenizer
    from fedasr.training.days import DayData, Scorer

STREAMS = ("init", "training")


class Bench(NamedTuple):
    """What the stages of a seed share. Days are numbered from 0, training days first."""

    config: Mapping[str, Any]
    seed: int
    folder: Path
    model: RecurrentConfig
    bucket: Bucket
    tokenizer: CharTokenizer
    names: Sequence[str]
    train: Mapping[int, DayData]
    test: Mapping[int, DayData]
    holdout: Mapping[int, DayData]
    scorer: Scorer
    log: study.Log

    @property
    def known(self) -> range:
        """The training days."""
        return range(self.config["train_days"])

    @property
    def later(self) -> range:
        """The days after them."""
        return range(self.config["train_days"], len(self.names))


def open_bench(config: Mapping[str, Any], seed: int, folder: Path, log: study.Log) -> Bench:
    """Makes the recordings and the corpus of a seed, unless they are there."""
    from fedasr.data import neural
    from fedasr.data.batching import make_buckets
    from fedasr.data.neural import synthetic as neural_synthetic
    from fedasr.data.records import open_corpus, read_metadata
    from fedasr.models.recurrent import RecurrentConfig
    from fedasr.text import tokenizer_for
    from fedasr.training.config import fingerprint
    from fedasr.training.days import Scorer, days_of

    fields = study.with_tuples(config["recordings"])
    if not 0 < config["train_days"] < fields["days"]:
        raise UserError("train_days must leave days of the recordings for later")
    most = min(config["train_days"], fields["days"] - config["train_days"])
    if not 0 < config["calibration"]["days"] <= most:
        raise UserError(
            "calibration.days must be at least 1 and no more than the later or the training days"
        )
    recordings = neural_synthetic.NeuralConfig(seed=seed, **fields)
    options = config["model"]
    defaults = RecurrentConfig()
    stride = options.get("subsample", defaults.subsample) * options.get("stride", defaults.stride)
    made_of = {"recordings": config["recordings"], "areas": config["areas"], "stride": stride}
    folder = folder / f"data-{fingerprint(made_of)}"
    neural_synthetic.generate(recordings, folder / "recordings")
    source = neural.NeuralSessions(folder / "recordings", neural.parse_areas(config["areas"]))
    summary = neural.prepare_sessions(source, folder / "corpus", stride=stride)
    log(f"seed {seed}: {summary['utterances']} sentences, skipped: {summary['skipped']}")
    tokenizer = tokenizer_for(read_metadata(folder / "corpus"))
    corpora = [open_corpus(folder / "corpus", split) for split in neural.SPLITS]
    (bucket,) = make_buckets(corpora, 1, {"features": 16, "labels": 4})
    model = RecurrentConfig(vocab=tokenizer.vocab_size, features=source.channels, **options)
    names = sorted({name for corpus in corpora for name in corpus.users})
    days = [days_of(corpus, names) for corpus in corpora]
    known = range(config["train_days"])
    if any(number not in part for part in days[:2] for number in range(len(names))) or any(
        number not in days[2] for number in known
    ):
        raise UserError(
            f"some day of {names} has no sentences to train on, to test or to choose by"
        )
    scorer = Scorer(model, bucket)
    return Bench(config, seed, folder, model, bucket, tokenizer, names, *days, scorer, log)


# ---------------------------------------------------------------------------------- measuring


def error_rates(
    bench: Bench, params: Any, days: Sequence[DayData], decoder: BeamDecoder | None
) -> dict[str, float]:
    """{"cer", "wer_greedy", "wer"} in percent of sentences of some days together.

    Args:
      params: stacked by day, or those of one day for all.
      days: whose numbers name their layers.
      decoder: with the language model; None leaves "wer" out.
    """
    from fedasr.training.days import greedy_labels, with_day
    from fedasr.training.metrics import char_errors, word_errors

    said, greedy, corrected = [], [], []
    for day in days:
        single = params["day"]["bias"].ndim == 1
        own = params if single else with_day(params, day.day)
        for example, scores in zip(day.examples, bench.scorer(own, day.examples), strict=True):
            said.append(bench.tokenizer.decode(example["labels"]))
            greedy.append(bench.tokenizer.decode(greedy_labels(scores)))
            if decoder is not None:
                corrected.append(decoder(scores).text)
    rates = {
        "cer": char_errors(said, greedy).percent,
        "wer_greedy": word_errors(said, greedy).percent,
    }
    if decoder is not None:
        rates["wer"] = word_errors(said, corrected).percent
    return rates


def make_decoder(
    bench: Bench, lm_weight: float, word_bonus: float, model: bool = True
) -> BeamDecoder:
    """The beam search with the language model, which is estimated once and kept as ARPA.

    Args:
      lm_weight, word_bonus: of the search. model: False for the search alone.
    """
    from fedasr.data.neural import synthetic as neural_synthetic
    from fedasr.decoding.beam import BeamConfig, BeamDecoder
    from fedasr.decoding.ngram import estimate, read_arpa, write_arpa
    from fedasr.training.config import fingerprint

    settings = bench.config["language"]
    if not model:
        search = BeamConfig(beam=settings["beam"])
        return BeamDecoder(bench.tokenizer.characters, " ", config=search)
    made_of = {name: settings[name] for name in ("order", "sentences", "withheld")}
    path = bench.folder / f"language-{fingerprint(made_of | {'days': len(bench.known)})}.arpa"
    if not path.is_file():
        # Their pseudo-labels must not come from having been read.
        later = [
            bench.tokenizer.decode(example["labels"])
            for day in bench.later
            for example in bench.train[day].examples
        ]
        texts = neural_synthetic.language_text(
            settings["sentences"], bench.seed, exclude=later, withheld=settings["withheld"]
        )
        write_arpa(estimate(texts, settings["order"]), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    search = BeamConfig(
        beam=settings["beam"],
        lm_weight=lm_weight,
        word_bonus=word_bonus,
        unknown_penalty=settings["unknown_penalty"],
    )
    return BeamDecoder(bench.tokenizer.characters, " ", read_arpa(path), config=search)


# ------------------------------------------------------------------------------------- stages


def _folder(bench: Bench, kind: str, settings: Mapping[str, Any]) -> Path:
    """Where a training is kept: its settings are part of the name."""
    from fedasr.training.config import fingerprint

    return bench.folder / f"{kind}-{fingerprint(dict(settings))}"


def _key(bench: Bench, stream: str) -> Any:
    """The random key of what a stage draws."""
    import jax

    return jax.random.fold_in(seed_key(bench.seed, Stream.STUDY), STREAMS.index(stream))


def trained(
    bench: Bench, own_layers: bool, later: int = 0, noise: Mapping[str, float] | None = None
) -> Any:
    """Parameters of central training on the training days; kept in the folder.

    Args:
      own_layers: a layer for each day, or one for all. later: so many days after the training days
        are trained on in place of as many of the first. noise: fields of the model's configuration
        in place of its own.
    """
    training, kind = dict(bench.config["training"]), "days" if own_layers else "shared"
    days = [bench.train[day + later] for day in bench.known]
    settings = {"model": bench.config["model"], "training": training, "days": len(days)}
    if later:
        settings["later"] = later
    if noise:
        settings["noise"] = dict(noise)
    return study.trained_once(
        _folder(bench, kind, settings), settings, lambda: _train(bench, own_layers, days, noise)
    )


def _train(
    bench: Bench,
    own_layers: bool,
    days: Sequence[DayData],
    noise: Mapping[str, float] | None,
) -> tuple[int, Any]:
    """See `trained`; returns the number of steps and the state."""
    import dataclasses

    import jax

    from fedasr.federated.server import ServerState
    from fedasr.models.recogniser import recurrent_recogniser
    from fedasr.training import days as lib

    training, kind = bench.config["training"], "days" if own_layers else "shared"
    recogniser = recurrent_recogniser(dataclasses.replace(bench.model, **noise or {}))
    optimizer = lib.published_optimizer(training["learning_rate"], training["steps"])
    params = recogniser.init(_key(bench, "init"))
    if own_layers:
        params, loss = lib.stack_days(params, len(bench.names)), lib.by_day(recogniser.loss)
    else:
        loss = _without_day(recogniser.loss)  # the same batches
    items = lib.batches(
        days,
        bench.bucket,
        training["batch_size"],
        bench.seed,
        training["steps"],
    )
    began = time.monotonic()

    def told(losses: list[float]) -> bool:
        if len(losses) % 100 == 0:
            seconds = time.monotonic() - began
            mean = statistics.fmean(losses[-100:])
            bench.log(f"seed {bench.seed}, {kind}: step {len(losses)}, {mean:.2f}, {seconds:.0f} s")
        return False

    step = lib.make_step(loss, optimizer)
    params, losses = lib.train(
        step, params, optimizer.init(params), items, _key(bench, "training"), told
    )
    return len(losses), ServerState(params, (), jax.numpy.int32(len(losses)))


def federated(bench: Bench) -> Any:
    """Parameters of federated training: each training day a client that keeps its own layer.

    Returns:
      They are stacked as those of `trained`; later days have the layer of the last training day.
    """
    import jax
    import numpy as np
    import optax

    from fedasr.data.batching import Batching
    from fedasr.data.records import open_corpus
    from fedasr.data.views import UserSubset
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.local import LocalStore, make_layout
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, recurrent_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import ShuffledSampler

    settings = bench.config["federated"]
    recogniser = recurrent_recogniser(bench.model)
    init = recogniser.init(_key(bench, "init"))
    corpus = open_corpus(bench.folder / "corpus", "train")
    known = [corpus.users.index(bench.names[day]) for day in bench.known]
    corpus = UserSubset(corpus, known)
    days = len(corpus.users)
    layout = make_layout(init, ("^day/",))
    decay = optax.linear_schedule(1.0, 0.0, settings["rounds"])
    with tempfile.TemporaryDirectory(dir=bench.folder) as rows:
        store = LocalStore(rows, layout, days)
        simulation = Simulation(
            corpus,
            Mechanism(
                math.inf, "global", 0.0, ShuffledSampler(days, settings["cohort"], bench.seed)
            ),
            FedAvg(
                local_training(
                    recogniser.loss,
                    optax.sgd(settings["learning_rate"], momentum=settings["momentum"]),
                    grad_clip=settings["grad_clip"],
                    schedule=decay,
                ),
                optax.sgd(settings["server_learning_rate"], momentum=settings["server_momentum"]),
                store=store,
            ),
            Batching(
                batch_size=settings["batch_size"],
                epochs=settings["epochs"],
                buckets=[bench.bucket],
                select=ARRAYS,
            ),
            seed=bench.seed,
        )
        state = simulation.init(init)
        for state, metrics in simulation.run(state, settings["rounds"]):  # noqa: B007
            if metrics.round % 10 == 0:
                bench.log(
                    f"seed {bench.seed}, federated: round {metrics.round}, {metrics.loss:.2f}, "
                    f"{metrics.seconds:.1f} s a round"
                )
        params = jax.device_get(state.params)
        own = store.gather(range(days), np.asarray(layout.extract(params)))
        store.close()
    by_day = [layout.insert(params, row)["day"] for row in own]
    by_day += by_day[-1:] * (len(bench.names) - days)
    return {**params, "day": jax.tree.map(lambda *rows: np.stack(rows), *by_day)}


def _without_day(loss: Any) -> Any:
    return lambda params, batch, key: loss(
        params, {name: value for name, value in batch.items() if name != "day"}, key
    )


def chosen_weights(bench: Bench, params: Any) -> dict[str, float]:
    """The language model's weight and the word bonus with the lowest WER on held-out sentences."""
    settings = bench.config["language"]
    days = [bench.holdout[day] for day in bench.known]
    rates = {
        (weight, bonus): error_rates(bench, params, days, make_decoder(bench, weight, bonus))["wer"]
        for weight in settings["lm_weights"]
        for bonus in settings["word_bonuses"]
    }
    weight, bonus = min(rates, key=lambda pair: (rates[pair], pair))
    return {"lm_weight": weight, "word_bonus": bonus, "wer": rates[weight, bonus]}


def by_training_day(bench: Bench, params: Any, decoder: BeamDecoder | None) -> dict[str, Any]:
    """Error rates on the test sentences of all training days, and of each."""
    days = [bench.test[day] for day in bench.known]
    each = [error_rates(bench, params, [day], None)["cer"] for day in days]
    return error_rates(bench, params, days, decoder) | {"cer_by_day": each}


def beam_only(bench: Bench, params: Any) -> dict[str, float]:
    """Error rates on the test sentences of the training days, searched without a model."""
    days = [bench.test[day] for day in bench.known]
    return error_rates(bench, params, days, make_decoder(bench, 0.0, 0.0, model=False))


def calibrated(bench: Bench, decoder: BeamDecoder) -> dict[str, Any]:
    """New days in order, each through a layer of its own and few labels; the rest is at rest.

    A day's layer begins as a copy of the day before's. "labels" are error rates of layers that
    were trained on the labelled sentences alone; "calibrated" of such as went on with the day's
    other sentences, without their labels: with what was decoded and corrected in their place,
    decoded anew in every pass. The decoder is one that was trained for it.
    """
    from fedasr.models.recogniser import recurrent_recogniser
    from fedasr.training import days as lib
    from fedasr.training.recalibration import RecalibrationConfig, recalibrate

    settings = bench.config["calibration"]
    options = RecalibrationConfig(
        steps=settings["steps"], today=1.0, batch_size=settings["batch_size"], threshold=0.0
    )
    optimizer = lib.published_optimizer(settings["learning_rate"], settings["steps"])
    loss = lib.by_day(recurrent_recogniser(bench.model).loss)
    step = lib.make_step(loss, optimizer, day_only=True)
    new = bench.later[: settings["days"]]
    start = trained(bench, own_layers=True, noise=settings["noise"])
    fresh = labels = both = start

    def trained_on(params: Any, day: int, examples: Sequence[Any], part: int) -> Any:
        data = lib.DayData(day, examples)
        args = (step, optimizer, params, data, (), bench.bucket, options, bench.seed, part)
        return recalibrate(*args)[0]

    for day in new:
        examples = bench.train[day].examples
        few, rest = examples[: settings["sentences"]], examples[settings["sentences"] :]
        fresh = lib.set_day(fresh, day, bench.known[-1])
        labels = trained_on(lib.set_day(labels, day, day - 1), day, few, 0)
        both = trained_on(lib.set_day(both, day, day - 1), day, few, 0)
        for part in range(1, settings["passes"] + 1) if rest else ():
            labelled = [*few, *corrected(bench, both, day, rest, decoder)]
            both = trained_on(both, day, labelled, part)
    days = [bench.test[day] for day in new]
    full = trained(bench, own_layers=True, later=len(new), noise=settings["noise"])
    arms = {"before": fresh, "labels": labels, "calibrated": both, "trained": full}
    known = [bench.test[day] for day in bench.known]
    return {
        "training days": error_rates(bench, start, known, None)["cer"],
        **{name: error_rates(bench, model, days, None)["cer"] for name, model in arms.items()},
    }


def corrected(
    bench: Bench, params: Any, day: int, examples: Sequence[Any], decoder: BeamDecoder
) -> list[dict[str, Any]]:
    """A day's sentences with what a model and the language model make of them as labels."""
    from fedasr.training.days import with_day
    from fedasr.training.recalibration import pseudo_labelled

    return pseudo_labelled(
        examples,
        bench.scorer(with_day(params, day), examples),
        lambda scores: decoder(scores).text,
        bench.tokenizer.encode,
        bench.bucket["labels"],
    )


def drifted(bench: Bench, params: Any, decoder: BeamDecoder) -> dict[str, Any]:
    """The days after training: the decoder as it is, recalibrated, and trained on without them."""
    import jax

    from fedasr.models.recogniser import recurrent_recogniser
    from fedasr.training import days as lib
    from fedasr.training.recalibration import RecalibrationConfig, recalibrate

    settings = dict(bench.config["recalibration"])
    portion, rate = settings.pop("portion"), settings.pop("learning_rate")
    options = RecalibrationConfig(**settings)
    control = RecalibrationConfig(**settings | {"today": 0.0})
    optimizer = lib.published_optimizer(rate, None)
    step = lib.make_step(lib.by_day(recurrent_recogniser(bench.model).loss), optimizer)
    last = bench.known[-1]
    labelled = [bench.train[day] for day in bench.known]
    past: list[DayData] = list(labelled)
    models = {"fixed": params, "recalibrated": params, "past only": params}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    taken, first_seen = [], []
    for day in bench.later:
        models["fixed"] = lib.set_day(models["fixed"], day, last)
        models["recalibrated"] = lib.set_day(models["recalibrated"], day, day - 1)
        today: list[Any] = []
        for part, start in enumerate(range(0, len(bench.train[day].examples), portion)):
            new = bench.train[day].examples[start : start + portion]
            # Labels are read to say how many errors a user would have seen, and for nothing else.
            now = error_rates(bench, models["recalibrated"], [lib.DayData(day, new)], None)
            first_seen.append(now["cer"])
            today += corrected(bench, models["recalibrated"], day, new, decoder)
            for name, data, earlier, how in (
                ("recalibrated", lib.DayData(day, today), past, options),
                ("past only", lib.DayData(day, new), labelled, control),
            ):
                models[name], losses = recalibrate(
                    step,
                    optimizer,
                    models[name],
                    data,
                    earlier,
                    bench.bucket,
                    how,
                    bench.seed,
                    part,
                )
                taken.append(len(losses))
        models["past only"] = lib.set_day(models["past only"], day, last)
        past = [*past, lib.DayData(day, today)] if today else past
        for name, model in models.items():
            rows[name].append(error_rates(bench, model, [bench.test[day]], decoder))
            models[name] = jax.device_get(model)
        bench.log(
            f"seed {bench.seed}, day {day}: "
            + ", ".join(f"{name} {found[-1]['cer']:.1f}" for name, found in rows.items())
        )
    known = [bench.test[day] for day in bench.known]
    return {
        "steps": sum(taken),
        "as decoded": statistics.fmean(first_seen),
        # A recalibrated model has a layer for every day, which has gone on changing: by day.
        **{
            name: _over_days(rates)
            | {"training days": error_rates(bench, models[name], known, None)["cer"]}
            for name, rates in rows.items()
        },
        "unknown_words": _unknown_words(bench, decoder),
    }


def _over_days(rates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Error rates of single days: their mean, and each."""
    return {
        measure: {
            "mean": statistics.fmean(row[measure] for row in rates),
            "by_day": [row[measure] for row in rates],
        }
        for measure in ("cer", "wer")
    }


def _unknown_words(bench: Bench, decoder: BeamDecoder) -> float:
    """Percent of the later days' test words that the language model does not know."""
    known = [
        word in decoder.model.vocabulary
        for day in bench.later
        for example in bench.test[day].examples
        for word in bench.tokenizer.decode(example["labels"]).split()
    ]
    return 100 * (1 - statistics.fmean(known))


def run_seed(config: Mapping[str, Any], seed: int, workdir: Path, log: study.Log) -> dict[str, Any]:
    """All stages of a seed; those that are done are read again."""
    from fedasr.training.logging import to_json

    bench = open_bench(config, seed, workdir / f"seed-{seed}", log)
    params = trained(bench, own_layers=True)

    def stage(name: str, sections: Sequence[str], make: Callable[[], Any]) -> Any:
        base = ("recordings", "areas", "model", "training", "train_days")  # of every stage
        settings = {section: config[section] for section in (*base, *sections)}

        def timed() -> dict[str, Any]:
            began = time.monotonic()
            return to_json(make()) | {"seconds": time.monotonic() - began}

        return once(bench.folder / f"{name}.json", settings, timed)

    weights = stage("weights", ["language"], lambda: chosen_weights(bench, params))
    decoder = make_decoder(bench, weights["lm_weight"], weights["word_bonus"])
    results = {
        "weights": weights,
        "days": stage("days-rates", ["language"], lambda: by_training_day(bench, params, decoder)),
        "beam": stage("beam-rates", ["language"], lambda: beam_only(bench, params)),
        "shared": stage(
            "shared-rates", [], lambda: by_training_day(bench, trained(bench, False), None)
        ),
        "federated": stage(
            "federated-rates",
            ["federated"],
            lambda: by_training_day(bench, federated(bench), None),
        ),
        "calibration": stage(
            "calibration", ["language", "calibration"], lambda: calibrated(bench, decoder)
        ),
        "drift": stage(
            "drift", ["language", "recalibration"], lambda: drifted(bench, params, decoder)
        ),
    }
    for line in _lines(summarize({seed: results}, config)):
        log(f"seed {seed}: {line}")
    return results


# ------------------------------------------------------------------------------------- tables

HELP = {
    "seeds": "Of recordings and of training.",
    "workdir": "Where all is kept; default runs/NAME.",
    "plot": "Draws the error rate by day into this PNG file.",
}


def ratio(a: float, b: float) -> float:
    """a / b; NaN where b is 0: a model without errors has nothing to be compared with."""
    return a / b if b else math.nan


def summarize(results: Mapping[int, Mapping[str, Any]], config: Mapping[str, Any]) -> dict:
    """Means and standard deviations over the seeds, and the ratios the experiment is about."""
    training, federated = config["training"], config["federated"]
    sentences = federated["cohort"] * config["recordings"]["train_sentences"]
    rows: dict[str, list[float]] = {}
    by_day: dict[str, list[list[float]]] = {"training days": []}
    for found in results.values():
        days, shared, drift = found["days"], found["shared"], found["drift"]
        calibration = found["calibration"]
        values = {
            "cer, a layer for each day": days["cer"],
            "cer, one layer for all": shared["cer"],
            "gain of layers by day, percent": 100 * (1 - ratio(days["cer"], shared["cer"])),
            "cer, federated by day": found["federated"]["cer"],
            "federated / central": ratio(found["federated"]["cer"], days["cer"]),
            "wer, greedy": days["wer_greedy"],
            "wer, beam without a model": found["beam"]["wer"],
            "wer, language model": days["wer"],
            "gain of the language model over the beam, percent": 100
            * (1 - ratio(days["wer"], found["beam"]["wer"])),
            "words that the model does not know, percent": drift["unknown_words"],
            "cer, new days before calibration": calibration["before"],
            "cer, new days calibrated, labels alone": calibration["labels"],
            "cer, new days calibrated": calibration["calibrated"],
            "cer, the same days trained": calibration["trained"],
            "labels alone / trained": ratio(calibration["labels"], calibration["trained"]),
            "calibrated / trained": ratio(calibration["calibrated"], calibration["trained"]),
            "cer, training days, of the decoder that is calibrated": calibration["training days"],
            "calibrated / training days": ratio(
                calibration["calibrated"], calibration["training days"]
            ),
            "cer, recalibrated, sentences as they were decoded": drift["as decoded"],
        }
        for name in ("fixed", "past only", "recalibrated"):
            cer = drift[name]["cer"]
            values |= {
                f"cer, later days, {name}": cer["mean"],
                f"{name} / training days": ratio(cer["mean"], days["cer"]),
                f"last later day, {name} / training days": ratio(cer["by_day"][-1], days["cer"]),
                f"cer, training days, {name} in the end": drift[name]["training days"],
            }
            by_day.setdefault(name, []).append(cer["by_day"])
        values["fixed / recalibrated"] = ratio(
            values["cer, later days, fixed"], values["cer, later days, recalibrated"]
        )
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
        by_day["training days"].append(days["cer_by_day"])
    return {
        "seeds": sorted(results),
        "sentences": {
            "central": training["steps"] * training["batch_size"],
            "federated": federated["rounds"] * federated["epochs"] * sentences,
        },
        "rows": {name: spread(values) for name, values in rows.items()},
        "cer_by_day": {
            name: [statistics.fmean(column) for column in zip(*values, strict=True)]
            for name, values in by_day.items()
        },
    }


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people."""
    counts = summary["sentences"]
    yield f"sentences trained on: central {counts['central']}, federated {counts['federated']}"
    for name, value in summary["rows"].items():
        yield f"{name}: {in_words(value, 2)}"
    for name, values in summary["cer_by_day"].items():
        yield f"cer by day, {name}: " + " ".join(f"{value:.1f}" for value in values)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """The character error rate by day, with and without recalibration."""
    by_day = dict(summary["cer_by_day"])
    before = by_day.pop("training days")
    draw_days({name: by_day[name] for name in ("fixed", "past only", "recalibrated")}, path, before)


def draw_days(
    by_day: Mapping[str, Sequence[float]], path: Path, before: Sequence[float] = ()
) -> None:
    """Character error rates by name and day after training; those of the days before in grey."""
    figure = study.new_figure(7.5, 3.9)
    axes = figure.subplots()
    if before:
        axes.plot(range(1 - len(before), 1), before, "o-", color="gray", label="training days")
    for name, values in by_day.items():
        axes.plot(range(1, len(values) + 1), values, "o-", label=name)
    axes.set_xlabel("days after training")
    axes.set_ylabel("character error rate, percent")
    axes.set_ylim(bottom=0)
    axes.legend()
    study.save_figure(figure, path)


def _summarize(
    config: dict[str, Any], seeds: Sequence[int], workdir: Path, log: study.Log
) -> dict[str, Any]:
    return summarize({seed: run_seed(config, seed, workdir, log) for seed in seeds}, config)


if __name__ == "__main__":
    study.main(
        study.Study(
            "brain_to_text",
            None,
            _summarize,
            _lines,
            draw,
            help=HELP,
        )
    )
