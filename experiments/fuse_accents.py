"""Recognisers trained on separate accents by federated learning, merged into one.

    python -m experiments.fuse_accents [--seeds=0,1,2] [--privacy=none,private]
        [--methods=m2n2,mixing_ratio] [--between=m2n2,average] [--workdir=DIR] [--plot=FILE.png]
        [--config.section.field=value ...] [--json]

The users of the synthetic corpus are divided by accent into groups. For each seed a model is
trained centrally on split "seed" (two further accents, and a share of the groups' training users,
who then take no part in the rounds); from it one federated run starts in each
group (the specialists) and one on the union of the groups, with as many users a round as all of
them. Then:

* average: the mean of the specialists' parameters;
* each of --methods: a search over merged models, by scores of the utterances of all groups' "dev";
* "NAME between rounds": groups that train side by side and are fused every few rounds, by each of
  --between.

WER is measured on the users of "test" (other voices, other sentences), by group and in all.
"private" clips and adds noise as the configuration says. Everything is kept in the work directory:
the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments import study
from experiments.study import in_words, spread
from fedasr.errors import UserError
from fedasr.fusion import METHODS

if TYPE_CHECKING:
    from fedasr.data.synthetic import SyntheticConfig
    from fedasr.data.utterances import Utterance

PRIVACY = ("none", "private")
ALL = "all"  # the groups' test users together
SEED, UNION, AVERAGE = "seed", "union", "average"


class Bench(NamedTuple):
    """config: of the experiment. data: the prepared corpus. groups: their names."""

    config: Mapping[str, Any]
    data: Path
    groups: tuple[str, ...]

    def split(self, name: str) -> str:
        """A split of all groups, as an expression."""
        return "+".join(f"{name}_{group}" for group in self.groups)


# ------------------------------------------------------------------------------------- the corpus


def by_group(
    utterances: Iterator[Utterance],
    config: SyntheticConfig,
    groups: Mapping[str, Sequence[str]],
    seed_share: float,
) -> Iterator[Utterance]:
    """The same utterances, their splits named by group ("train_british"); "seed" stays whole.

    Users of accents that no group has are left out. About `seed_share` of the training users, by a
    hash of their names, go to "seed".
    """
    from fedasr.data.corpus import user_hash
    from fedasr.data.synthetic import speaker_voice

    names = {accent: group for group, accents in groups.items() for accent in accents}
    accents: dict[str, str] = {}
    for utterance in utterances:
        if utterance.split == SEED:
            yield utterance
            continue
        user = utterance.user
        if user not in accents:
            accents[user] = speaker_voice(config, user).accent
        group = names.get(accents[user])
        if group and utterance.split == "train" and user_hash(user) / 2**64 < seed_share:
            yield dataclasses.replace(utterance, split=SEED)
        elif group:
            yield dataclasses.replace(utterance, split=f"{utterance.split}_{group}")


def prepare_groups(settings: Mapping[str, Any]) -> Path:
    """Makes the corpus unless it is in the cache; returns its folder.

    Args:
      settings: "accents" of the configuration.
    """
    from fedasr.data import synthetic
    from fedasr.data.preparation.folder import cache_dir
    from fedasr.data.preparation.prepare import prepare
    from fedasr.data.preparation.progress import progress_bar

    config = synthetic.SyntheticConfig(**study.with_tuples(settings["corpus"]))
    made_of = (sorted(settings["groups"].items()), settings["seed_share"])
    described = f"{synthetic.fingerprint(config)} {made_of}"
    name = hashlib.sha256(described.encode()).hexdigest()[:16]
    out = cache_dir() / f"accents-{name}"
    with progress_bar("preparing speech") as report:
        prepare(
            by_group(
                synthetic.synthetic_utterances(config),
                config,
                settings["groups"],
                settings["seed_share"],
            ),
            out,
            name="synthetic accents",
            fingerprint=name,
            total=synthetic.total_utterances(config),
            progress=report,
            overwrite=True,  # of an older version
        )
    return out


# ----------------------------------------------------------------------------------------- stages


def own_seed(seed: int, name: str) -> int:
    """A seed of its own for every run of an experiment's seed.

    Runs with one seed would draw the same noise, which the difference of two models cancels, and
    the same places in their populations.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def run_config(
    bench: Bench,
    seed: int,
    privacy: str,
    train: str,
    start: Path | None,
    groups: int = 1,
    name: str = "",
) -> dict[str, Any]:
    """The configuration of a run of `fedasr.training.loop`.

    Args:
      seed: of the experiment. privacy: of `PRIVACY`. train: split expression. start: folder of the
        model to start from; None: only train that. groups: how many's users are in a round. name:
        tells apart runs on the same users.
    """
    config = {key: value for key, value in bench.config.items() if key != "accents"}
    enabled = privacy == "private" and start is not None
    evaluated = [f"dev_{group}" for group in bench.groups]
    return config | {
        "seed": own_seed(seed, f"{name}/{train}") if start else seed,
        "data": config["data"] | {"dir": str(bench.data), "train": train, "eval": evaluated},
        "privacy": config["privacy"] | {"enabled": enabled},
        "rounds": config["rounds"] if start else 0,
        "cohort": groups * config["cohort"],
        "init_from": str(start) if start else "",
    }


def fused_between(
    bench: Bench, seed: int, privacy: str, start: Path, method: str, folder: Path, log: study.Log
) -> Any:
    """The model of groups that train side by side and are fused every few rounds."""
    import jax

    from fedasr.federated.chunks import AUTO
    from fedasr.fusion import groups, recognisers, tasks
    from fedasr.training.builders import corpora, models
    from fedasr.training.builders.simulations import make_simulation
    from fedasr.training.checkpoint import Checkpointer, lock_directory, restore_params
    from fedasr.training.config import Config

    settings, rounds = bench.config["accents"], bench.config["rounds"]
    fuse = groups.average
    if method != AVERAGE:
        parents = recognisers.load_parents([start, start], bench.data)
        task = tasks.recognisers_task(
            parents, [start, start], bench.data, bench.split("dev"), settings["by_module"]
        )
        searched = tasks.make_method(method, task, settings["population"])
        fuse = groups.by_search(searched, settings["evaluations_between"], seed)
    simulations = []
    for group in bench.groups:
        config = run_config(bench, seed, privacy, f"train_{group}", start, name=method)
        typed = Config.of(config)
        data = corpora.Data(bench.data, typed, log)
        loss = models.build_recogniser(typed).loss
        # The same whenever the run goes on: "auto" would be measured again.
        chunk = 1 if config["chunk"] == AUTO else config["chunk"]
        devices = jax.local_devices()
        simulations.append(make_simulation(typed, data, loss, devices, chunk=chunk))
    params = restore_params(start)
    states = [simulation.init(params) for simulation in simulations]
    folder.mkdir(parents=True, exist_ok=True)
    identity = run_config(bench, seed, privacy, "", start) | {"accents": settings}
    with lock_directory(folder), Checkpointer(folder / "checkpoints", 1) as checkpointer:
        if (latest := checkpointer.latest_step()) is not None:
            like = jax.device_get({"params": params, "states": states})
            found, metadata = checkpointer.restore(latest, like)
            if metadata != identity:
                raise UserError(f"{folder} is of another configuration: choose another --workdir")
            params = found["params"]
            states = [
                simulation.transfer(state)
                for simulation, state in zip(simulations, found["states"], strict=True)
            ]
        for fused in groups.train(simulations, states, rounds, settings["every"], fuse):
            losses = ", ".join(f"{group[-1].loss:.2f}" for group in fused.metrics)
            log(f"seed {seed}, {privacy}, {method}: fused at round {fused.round}, losses {losses}")
            params = fused.model
            state = {"params": params, "states": fused.states}
            checkpointer.save(fused.round, state, identity)
    return params


def run_seed(
    bench: Bench,
    seed: int,
    privacy: str,
    methods: Sequence[str],
    between: Sequence[str],
    workdir: Path,
    log: study.Log,
) -> dict[str, Any]:
    """{"wer": {model: {group or `ALL`: percent}}, "privacy", "search"} of a seed."""
    import jax

    from fedasr.fusion import recognisers, tasks
    from fedasr.fusion.run import run
    from fedasr.training import loop
    from fedasr.training.checkpoint import restore_params
    from fedasr.training.config import fingerprint

    settings = bench.config["accents"]
    start, folder = workdir / f"seed-{seed}" / SEED, workdir / f"seed-{seed}" / privacy
    loop.run(run_config(bench, seed, "none", bench.split("train"), None), start)
    spent = {}
    for name in (*bench.groups, UNION):
        split, count = (f"train_{name}", 1)
        if name == UNION:
            split, count = bench.split("train"), len(bench.groups)
        config = run_config(bench, seed, privacy, split, start, count)
        spent[name] = loop.run(config, folder / name)["privacy"]

    specialists = [folder / group for group in bench.groups]
    parents = recognisers.load_parents(specialists, bench.data)
    rates = recognisers.error_rates(
        parents, bench.data, [*(f"test_{group}" for group in bench.groups), bench.split("test")]
    )
    names = (*bench.groups, ALL)

    def measure(params: Any) -> dict[str, float]:
        return dict(zip(names, rates(params).values(), strict=True))

    wer = {SEED: measure(restore_params(start))}
    wer |= {group: measure(parents.model(i)) for i, group in enumerate(bench.groups)}
    wer[UNION] = measure(restore_params(folder / UNION))
    wer[AVERAGE] = measure(jax.tree.map(lambda x: x.mean(0), parents.params))
    task = tasks.recognisers_task(
        parents, specialists, bench.data, bench.split("dev"), settings["by_module"]
    )
    search = {}
    for name in methods:
        method = tasks.make_method(name, task, settings["population"])
        result = run(
            method,
            task.make_parents,
            [seed],
            settings["evaluations"],
            every=max(1, settings["evaluations"] // 10),
            workdir=folder / "fused" / f"{name}-{fingerprint(settings)}",
            identity={**task.identity, "method": name, "population": settings["population"]},
            log=lambda line, name=name: log(f"seed {seed}, {privacy}, {name}: {line}"),
        )
        wer[name] = measure(jax.tree.map(lambda x: x[0], result.best))
        search[name] = {key: values.tolist() for key, values in result.curve.items()}
    for name in between:
        target = folder / f"between-{name}"
        params = fused_between(bench, seed, privacy, start, name, target, log)
        wer[f"{name} between rounds"] = measure(params)
    for name, row in wer.items():
        log(f"seed {seed}, {privacy}, {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()))
    return {"wer": wer, "privacy": spent if privacy == "private" else None, "search": search}


# ---------------------------------------------------------------------------------------- results


def summarize(results: Mapping[str, Mapping[int, Mapping[str, Any]]], bench: Bench) -> dict:
    """Means and standard deviations over the seeds, and what the experiment set out to show.

    Args:
      results: {privacy: {seed: of `run_seed`}}.
    """
    summary: dict[str, Any] = {}
    for privacy, by_seed in results.items():
        rows = [found["wer"] for found in by_seed.values()]
        groups = (*bench.groups, ALL)
        found: dict[str, Any] = {
            "seeds": list(by_seed),
            "wer": {
                model: {g: spread([row[model][g] for row in rows]) for g in groups}
                for model in rows[0]
            },
        }
        for model in rows[0]:
            if model in (SEED, UNION, AVERAGE, *bench.groups):
                continue
            gain = [row[AVERAGE][ALL] - row[model][ALL] for row in rows]
            found.setdefault("better_than_average", {})[model] = spread(gain)
            worse = {g: [row[model][g] - row[g][g] for row in rows] for g in bench.groups}
            found.setdefault("worse_than_specialist", {})[model] = {
                g: spread(values) for g, values in worse.items()
            }
        found["privacy"] = [found["privacy"] for found in by_seed.values()]
        found["search"] = [found["search"] for found in by_seed.values()]
        summary[privacy] = found
    return summary


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people: mean (standard deviation over the seeds)."""
    from fedasr.privacy.accounting import epsilon_in_words

    for privacy, found in summary.items():
        yield f"privacy: {privacy}; test WER in percent, mean (std) over seeds {found['seeds']}"
        for model, row in found["wer"].items():
            yield f"  {model}: " + ", ".join(f"{g} {in_words(value)}" for g, value in row.items())
        for model, gain in found.get("better_than_average", {}).items():
            worse = found["worse_than_specialist"][model]
            better = f"{in_words(gain)} points better than the average"
            yield f"  {model}: {better}, worse than specialists "
            yield "    by " + ", ".join(f"{g} {in_words(value)}" for g, value in worse.items())
        for case in (found["privacy"][0] or {}).values():
            deployed = [
                f"{epsilon_in_words(x['epsilon'])} ({x['cohort']:,} of {x['population']:,} users)"
                for x in case["extrapolations"]
            ]
            yield (
                f"  epsilon {epsilon_in_words(case['epsilon'])} at {case['delta']}, as deployed: "
                f"{', '.join(deployed) or '-'}; it compares: {case.get('neighbours')}"
            )


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Bars of every model's error rates by group, with the standard deviation over the seeds."""
    figure = study.new_figure(10.5, 3.6 * len(summary))
    panels = figure.subplots(len(summary), 1, squeeze=False)[:, 0]
    for axes, (privacy, found) in zip(panels, summary.items(), strict=True):
        groups = list(next(iter(found["wer"].values())))
        rows = {
            f"specialist: {model}" if model in groups else model: [row[group] for group in groups]
            for model, row in found["wer"].items()
            if model != SEED
        }
        study.draw_bars(axes, rows, [f"test users: {group}" for group in groups])
        axes.set(ylabel="WER, %", title=f"privacy: {privacy}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, ncols=2, frameon=False)
    study.save_figure(figure, path, dpi=130)


# ---------------------------------------------------------------------------------------- program


def _define_flags() -> None:
    flags.DEFINE_list("privacy", ["none"], f"Which of {', '.join(PRIVACY)}.")
    flags.DEFINE_list("methods", ["m2n2", "mixing_ratio"], "As of experiments.fuse.")
    flags.DEFINE_list("between", ["m2n2", "average"], "Fusions between rounds; may be ''.")


def _between() -> list[str]:
    return [name for name in flags.FLAGS.between if name]


def _check(config: Mapping[str, Any]) -> None:
    study.check_names("privacy", flags.FLAGS.privacy, PRIVACY)
    study.check_names("methods", flags.FLAGS.methods, METHODS)
    study.check_names("between", _between(), METHODS)
    if taken := sorted(set(config["accents"]["groups"]) & {SEED, UNION, AVERAGE, ALL, *METHODS}):
        raise UserError(f"accents.groups: {taken} would be confused with models of that name")
    if not flags.FLAGS.privacy:
        raise UserError("--privacy names none")


def _summarize(
    config: dict[str, Any], seeds: Sequence[int], workdir: Path, log: study.Log
) -> dict[str, Any]:
    settings = config["accents"]
    bench = Bench(config, prepare_groups(settings), tuple(settings["groups"]))
    methods, between = flags.FLAGS.methods, _between()
    results = {
        privacy: {
            seed: run_seed(bench, seed, privacy, methods, between, workdir, log) for seed in seeds
        }
        for privacy in flags.FLAGS.privacy
    }
    return summarize(results, bench)


if __name__ == "__main__":
    study.main(
        study.Study(
            "accents", ("accents",), _summarize, lines, draw, _check, define_flags=_define_flags
        )
    )
