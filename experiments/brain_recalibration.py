"""Recalibration as published beside ours, and central training by days beside federated.

    python -m experiments.brain_recalibration [--seeds=0,1,2] [--workdir=DIR] [--plot=FILE.png]
        [--config.section.field=value ...] [--json]

Recordings, decoder and language model are made as by `experiments.brain_to_text`, smaller, and the
decoder is built as published. The days after training come in order, to

* "fixed": the decoder as it is;
* "ours": trained on after every portion of a day's sentences (`fedasr.training.recalibration`);
* "published": after every sentence, until the loss is low (`fedasr.training.corp`).

None sees a label. Character error rates are of greedy decoding on each day's test sentences at the
end of the day; "as decoded" of the sentences when they came, before training on them. "commands"
are test error rates of the recipe `neural` on all days, central and federated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import brain_to_text as base
from experiments import study
from experiments.study import in_words, once, spread

if TYPE_CHECKING:
    from fedasr.decoding.beam import BeamDecoder

ARMS = ("fixed", "ours", "published")


def ours(bench: base.Bench, params: Any, decoder: BeamDecoder) -> dict[str, Any]:
    """The days after training, by `fedasr.training.recalibration`."""
    from fedasr.models.recogniser import recurrent_recogniser
    from fedasr.training import days as lib
    from fedasr.training.recalibration import RecalibrationConfig, recalibrate

    settings = dict(bench.config["recalibration"])
    portion, rate = settings.pop("portion"), settings.pop("learning_rate")
    options = RecalibrationConfig(**settings)
    optimizer = lib.published_optimizer(rate, None)
    step = lib.make_step(lib.by_day(recurrent_recogniser(bench.model).loss), optimizer)
    past = [bench.train[day] for day in bench.known]
    record = _Record(bench)
    for day in bench.later:
        params = lib.set_day(params, day, day - 1)
        today: list[Any] = []
        for part, start in enumerate(range(0, len(bench.train[day].examples), portion)):
            new = bench.train[day].examples[start : start + portion]
            record.arrived(params, lib.DayData(day, new))
            today += base.corrected(bench, params, day, new, decoder)
            data = lib.DayData(day, today)
            args = (step, optimizer, params, data, past, bench.bucket, options, bench.seed, part)
            params, losses = recalibrate(*args)
            record.steps.append(len(losses))
        past = [*past, lib.DayData(day, today)] if today else past
        record.ended(params, day)
    return record.result(params)


def published(bench: base.Bench, params: Any, decoder: BeamDecoder) -> dict[str, Any]:
    """The days after training, by `fedasr.training.corp`."""
    from fedasr.training import corp
    from fedasr.training import days as lib
    from fedasr.training.corp import CorpConfig, Labelled
    from fedasr.training.metrics import char_errors

    options = CorpConfig(**bench.config["published"])
    optimizer = corp.optimizer_of(options)
    step = corp.make_step(bench.model, options, optimizer)
    scorer = lib.Scorer(bench.model, bench.bucket, 1)
    past = [Labelled(day, e) for day in bench.known for e in bench.train[day].examples]
    record = _Record(bench)
    for day in bench.later:
        params = lib.set_day(params, day, day - 1)
        greedy: list[str] = []

        def correct(scores: Any, greedy: list[str] = greedy) -> str:
            greedy.append(bench.tokenizer.decode(lib.greedy_labels(scores)))
            return decoder(scores).text

        params, today, told = corp.recalibrate_day(
            step,
            optimizer,
            params,
            day,
            bench.train[day].examples,
            past,
            scorer,
            correct,
            bench.tokenizer.encode,
            bench.bucket,
            options,
            bench.seed,
        )
        said = [bench.tokenizer.decode(e["labels"]) for e in bench.train[day].examples]
        record.seen.append(char_errors(said, greedy).percent)
        record.steps += [len(one.losses) for one in told]
        past += today
        record.ended(params, day)
    return record.result(params)


def fixed(bench: base.Bench, params: Any) -> dict[str, Any]:
    """The days after training, by the decoder as it is."""
    from fedasr.training import days as lib

    record = _Record(bench)
    for day in bench.later:
        params = lib.set_day(params, day, bench.known[-1])
        record.arrived(params, bench.train[day])
        record.ended(params, day)
    return record.result(params)


class _Record:
    """What is measured of an arm. Labels are read here alone."""

    def __init__(self, bench: base.Bench) -> None:
        self._bench, self._began = bench, time.monotonic()
        self.seen: list[float] = []
        self.steps: list[int] = []
        self.days: list[float] = []

    def arrived(self, params: Any, data: Any) -> None:
        """Sentences came, and are decoded."""
        self.seen.append(base.error_rates(self._bench, params, [data], None)["cer"])

    def ended(self, params: Any, day: int) -> None:
        """A day is over."""
        rates = base.error_rates(self._bench, params, [self._bench.test[day]], None)
        self.days.append(rates["cer"])
        self._bench.log(f"seed {self._bench.seed}, day {day}: {rates['cer']:.1f}")

    def result(self, params: Any) -> dict[str, Any]:
        """All of it; the training days' error rate is that of the parameters in the end."""
        known = [self._bench.test[day] for day in self._bench.known]
        return {
            "cer": statistics.fmean(self.days),
            "cer_by_day": self.days,
            "as decoded": statistics.fmean(self.seen),
            "training days": base.error_rates(self._bench, params, known, None)["cer"],
            "steps": sum(self.steps),
            "fewest steps": min(self.steps, default=0),
            "seconds": time.monotonic() - self._began,
        }


def commands(bench: base.Bench) -> dict[str, float]:
    """Test error rates of the recipe `neural`, by its training, on all days."""
    from fedasr.recipes.neural import get_config
    from fedasr.training import loop
    from fedasr.training.logging import to_json

    settings, found = bench.config["commands"], {}
    for name in ("central", "federated"):
        config = get_config(f"training={name}")
        config.data.dir = str(bench.folder / "corpus")
        config.seed = bench.seed
        options = {**bench.config["model"], "features": bench.model.features, "vocab": 30}
        config.model.options.update(options)
        config.central.update(
            steps=settings["steps"],
            decay_steps=settings["steps"],
            batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
        )
        config.evaluation.every_steps = max(1, settings["steps"] // 6)
        config.rounds = settings["rounds"]
        config.evaluation.every = 0
        summary = loop.run(to_json(config.to_dict()), bench.folder / f"command-{name}")
        found[name] = summary["cer"]["test"]
    return found


def run_seed(config: Mapping[str, Any], seed: int, workdir: Path, log: study.Log) -> dict[str, Any]:
    """All stages of a seed; those that are done are read again."""
    bench = base.open_bench(config, seed, workdir / f"seed-{seed}", log)
    params = base.trained(bench, own_layers=True)

    def stage(name: str, sections: Sequence[str], make: Callable[[], Any]) -> Any:
        common = ("recordings", "areas", "model", "training", "train_days", *sections)
        settings = {section: config[section] for section in common}
        return once(bench.folder / f"{name}.json", settings, make)

    weights = stage("weights", ["language"], lambda: base.chosen_weights(bench, params))
    decoder = base.make_decoder(bench, weights["lm_weight"], weights["word_bonus"])
    results = {
        "fixed": stage("fixed", [], lambda: fixed(bench, params)),
        "ours": stage("ours", ["language", "recalibration"], lambda: ours(bench, params, decoder)),
        "published": stage(
            "published", ["language", "published"], lambda: published(bench, params, decoder)
        ),
        "commands": stage("commands", ["commands"], lambda: commands(bench)),
    }
    for line in _lines(summarize({seed: results})):
        log(f"seed {seed}: {line}")
    return results


def summarize(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds."""
    found = list(results.values())
    measures = ("cer", "as decoded", "training days", "steps", "fewest steps", "seconds")
    return {
        "seeds": sorted(results),
        "arms": {
            arm: {name: spread([seed[arm][name] for seed in found]) for name in measures}
            for arm in ARMS
        },
        "cer_by_day": {
            arm: [
                statistics.fmean(column)
                for column in zip(*(seed[arm]["cer_by_day"] for seed in found), strict=True)
            ]
            for arm in ARMS
        },
        "commands": {
            name: spread([seed["commands"][name] for seed in found])
            for name in ("central", "federated")
        },
    }


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people."""
    for arm, rows in summary["arms"].items():
        for name, value in rows.items():
            yield f"{arm}, {name}: {in_words(value, 2)}"
    for name, value in summary["commands"].items():
        yield f"neural:training={name}, cer: {in_words(value, 2)}"
    for name, values in summary["cer_by_day"].items():
        yield f"cer by day, {name}: " + " ".join(f"{value:.1f}" for value in values)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """The character error rate by day."""
    base.draw_days(summary["cer_by_day"], path)


def _summarize(
    config: dict[str, Any], seeds: Sequence[int], workdir: Path, log: study.Log
) -> dict[str, Any]:
    return summarize({seed: run_seed(config, seed, workdir, log) for seed in seeds})


if __name__ == "__main__":
    study.main(
        study.Study(
            "brain_recalibration",
            None,
            _summarize,
            _lines,
            draw,
            help=base.HELP,
        )
    )
