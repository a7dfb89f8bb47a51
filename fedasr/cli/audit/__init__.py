"""Attacks the round code and bounds epsilon from below, to hold against what is claimed.

    fedasr audit [--config=NAME|FILE.py]
        [--config.section.field=value ...] [--canaries={updates,users}]
        [--method={one_run,many_runs}] [--trials=N] [--canary_count=M] [--rounds=T] [--delta=D]
        [--confidence=P] [--seed=S] [--side_by_side] [--runs=R] [--plot=FILE.png] [--json]

`updates`: canaries return crafted updates (see `fedasr.auditing`). The mechanism is the
configuration's: sampler, cohort, population, clip norm, budget, noise, rounds. The model is
replaced by three layers with one coordinate for each canary, so this takes seconds and no data.

`users`: canaries are people of the held-out splits (`data.eval`), each with one more utterance
whose transcript is random, so that nothing else teaches it. They are trained on, or not, with all
other users by the configuration's own federated rounds, and recognised by how much the loss of the
inserted utterance fell. An absent canary is a user who has nothing but an utterance that cannot be
aligned, whose update is zero. Rounds start from `init_from`, or from scratch.

The report has what is claimed for Gaussian noise of a trusted server (central) and for Skellam
noise of the same variance in shares of the clients (distributed), and why not where the latter
cannot be. With --side_by_side both are run and audited, each by both methods: --trials are the runs
of the method asked for, --runs those of the other.

Exit status: 0 when the bound is below the claim, 1 when it exceeds it (the code does not have the
privacy that it claims), 2 for a mistake that the user can mend.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.streams import Stream, generator, seed_key

if TYPE_CHECKING:
    from fedasr.auditing import Audit
    from fedasr.data.corpus import Corpus, Example
    from fedasr.privacy.mechanism import Mechanism

_RUNS = 1000  # of many_runs with crafted updates

# ------------------------------------------------------------------------------------ real users


class Canary(NamedTuple):
    """A held-out user: id, all examples with the inserted one last, and what they are if absent."""

    user: str
    present: list[Example]
    absent: list[Example]

    @property
    def inserted(self) -> Example:
        return self.present[-1]


def make_canaries(corpus: Corpus, count: int, vocab: int, seed: int) -> list[Canary]:
    """Held-out users, each with one more utterance: own speech, transcript at random.

    Args:
      corpus: held-out users; examples hold "features" [frames, ...] and "labels" int [tokens].
      count: of canaries, different users.
      vocab: tokens of the model, the blank (0) among them.
      seed: of users, utterances and transcripts.

    Raises:
      UserError: if there are not so many users.
    """
    if not 1 <= count <= len(corpus.users):
        raise UserError(
            f"--canary_count={count}: the held-out splits (data.eval) have "
            f"{len(corpus.users)} users"
        )
    rng = generator(Stream.CANARIES, seed)
    canaries = []
    for user in rng.choice(len(corpus.users), count, replace=False).tolist():
        own = corpus.get(user, range(int(corpus.sizes[user])))
        spoken = own[int(rng.integers(len(own)))]
        labels = _random_labels(len(spoken["labels"]), vocab, rng)
        inserted = {**spoken, "labels": labels.astype(spoken["labels"].dtype)}
        # One frame cannot carry eight tokens: the loss leaves the utterance out.
        nothing = {
            **inserted,
            "features": spoken["features"][:1],
            "labels": np.ones(8, spoken["labels"].dtype),
        }
        canaries.append(Canary(f"canary {corpus.users[user]}", [*own, inserted], [nothing]))
    return canaries


def _random_labels(count: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens 1..vocab-1, no two alike in a row: those would need a frame more."""
    steps = np.concatenate([rng.integers(vocab - 1, size=1), rng.integers(1, vocab - 1, count - 1)])
    return np.cumsum(steps) % (vocab - 1) + 1


def audit_users(
    config: Mapping[str, Any],
    delta: float,
    *,
    method: str,
    trials: int,
    canaries: int | None,
    confidence: float,
    log: Callable[[str], None],
) -> tuple[Audit, Mechanism]:
    """Audits whole trainings with held-out users among the training users.

    Args:
      config: of the run; its seed is the first trial's, the next trial has the next one.
      delta, method, trials, confidence: see `fedasr.auditing.audit_updates`.
      canaries: of each trial; None for all held-out users ("one_run"), or one ("many_runs").
      log: takes a line for every trial.

    Returns:
      The audit, and the mechanism that was audited.

    Raises:
      UserError: for a configuration whose rounds cannot be audited so.
    """
    import jax

    from fedasr import auditing
    from fedasr.data.corpus import open_corpus
    from fedasr.data.splits import UnionCorpus
    from fedasr.training.builders import corpora, models
    from fedasr.training.config import Config

    if config["algorithm"] == "central" or config["data"]["iid"]:
        raise UserError("--canaries=users audits federated users: algorithm='federated', not iid")
    if (optimizer := config["client"]["optimizer"]) in ("adamw", "yogi"):
        raise UserError(f"client.optimizer={optimizer!r} moves users without data: choose another")
    if config["augment"]["enabled"] and config["augment"]["start_round"]:
        raise UserError("--canaries=users has SpecAugment from the start: augment.start_round=0")
    typed = Config.of(config)
    directory = corpora.data_directory(typed)
    data = corpora.Data(directory, typed, log)
    if not data.evaluation:
        raise UserError("there is no held-out split: data.eval names those to take canaries from")
    held_out = UnionCorpus([open_corpus(directory, split) for split in data.evaluation])
    if canaries is None:
        canaries = 1 if method == "many_runs" else len(held_out.users)
    elif method == "many_runs" and canaries != 1:
        raise UserError("many_runs has one canary in each run: leave out --canary_count")
    recogniser = models.build_recogniser(typed)
    evaluate = jax.jit(recogniser.evaluate)
    devices = jax.local_devices()[: config["devices"] or None]
    chosen = make_canaries(held_out, canaries, data.tokenizer.vocab_size, config["seed"])
    present = auditing.toss(trials, canaries, method, config["seed"])
    falls: list[np.ndarray] = []
    mechanism: Any = None
    for trial, row in enumerate(present):
        settings = {**config, "seed": config["seed"] + trial}
        simulation = _with_canaries(settings, data, directory, chosen, row, recogniser, devices)
        mechanism = simulation.mechanism
        start = final = _start(settings, recogniser)
        for state, metrics in simulation.run(simulation.init(start), settings["rounds"]):
            final = jax.device_get(state.params)
            log(f"run {trial + 1}/{trials}, round {metrics.round}, loss {metrics.loss:.3f}")
        losses = [inserted_losses(evaluate, params, chosen) for params in (start, final)]
        falls.append(losses[0] - losses[1])
    fall = np.stack(falls)
    if not np.isfinite(fall).all():
        raise UserError("the training diverged: there is no loss to tell canaries by")
    private = config["privacy"]["enabled"]
    claimed = mechanism.epsilon(config["rounds"], delta).epsilon if private else math.inf
    scores = {"loss": auditing.Scores(fall[present], fall[~present])}
    audit = auditing.conclude(
        scores,
        claimed,
        delta,
        method=method,
        trials=trials,
        rounds=config["rounds"],
        confidence=confidence,
        neighbours=mechanism.sampler.neighbours,
    )
    return audit, mechanism


def _with_canaries(
    config: Mapping[str, Any],
    data: Any,
    directory: Path,
    canaries: Sequence[Canary],
    present: np.ndarray,
    recogniser: Any,
    devices: Sequence[Any],
) -> Any:
    """The configuration's simulation over the training users and the canaries."""
    import copy

    from fedasr.data.corpus import InMemoryCorpus, open_corpus
    from fedasr.data.splits import UnionCorpus
    from fedasr.training.builders import simulations
    from fedasr.training.config import Config

    train = open_corpus(directory, config["data"]["train"])
    members = {
        canary.user: canary.present if here else canary.absent
        for canary, here in zip(canaries, present.tolist(), strict=True)
    }
    everybody = copy.copy(data)
    joined = InMemoryCorpus(members, ragged=tuple(train.lengths(0)))
    everybody.train = UnionCorpus([train, joined])
    return simulations.make_simulation(Config.of(config), everybody, recogniser.loss, devices)


def _start(config: Mapping[str, Any], recogniser: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from fedasr.training.checkpoint import restore_params

    if config["init_from"]:
        return jax.tree.map(jnp.asarray, restore_params(config["init_from"]))
    return recogniser.init(seed_key(config["seed"], Stream.INIT))


def inserted_losses(
    evaluate: Callable[..., Any], params: Any, canaries: Sequence[Canary]
) -> np.ndarray:
    """CTC loss of every canary's inserted utterance, without augmentation: float64 [canaries].

    Args:
      evaluate: of a recogniser, jitted.
      params: of the model.
      canaries: from `make_canaries`.
    """
    import jax

    from fedasr.data.batching import eval_batches, make_buckets
    from fedasr.data.corpus import InMemoryCorpus
    from fedasr.models.recogniser import ARRAYS

    examples = {f"{i:012d}": [canary.inserted] for i, canary in enumerate(canaries)}
    corpus = InMemoryCorpus(examples, ragged=ARRAYS)
    buckets = make_buckets([corpus], 1, {"features": 24, "labels": 4})
    losses: list[float] = []
    for batch in eval_batches(corpus, buckets, min(32, len(canaries)), ARRAYS):
        found = jax.device_get(evaluate(params, batch)[2])
        losses += found[batch["mask"]].astype(np.float64).tolist()
    return np.array(losses)


# --------------------------------------------------------------------------------------- program


CENTRAL, DISTRIBUTED = "central", "distributed"


class Report(NamedTuple):
    """What was audited and what is claimed.

    audits: (noise, audit), the configuration's own by the method asked for first; noise is
      "central", of the server, or "distributed", in shares.
    figures: by noise, what is claimed for the configuration's own: see `figure_of`.
    canaries: "updates" or "users".
    """

    audits: list[tuple[str, Audit]]
    figures: dict[str, dict[str, Any]]
    canaries: str


def both_noises(mechanism: Mechanism, bits: int, dimension: int) -> dict[str, Mechanism | str]:
    """The mechanism with noise of the server and with noise of equal variance in shares.

    Args:
      mechanism: with either.
      bits, dimension: of `SecureAggregation`, where the mechanism has none.

    Returns:
      {"central": mechanism, "distributed": mechanism, or why there is none}.
    """
    from fedasr.privacy.secure_aggregation import SecureAggregation

    if mechanism.secure is not None:
        return {CENTRAL: mechanism.central(), DISTRIBUTED: mechanism}
    try:
        secure = SecureAggregation(dimension, bits)
        return {CENTRAL: mechanism, DISTRIBUTED: dataclasses.replace(mechanism, secure=secure)}
    except UserError as error:
        return {CENTRAL: mechanism, DISTRIBUTED: str(error)}


def figure_of(mechanism: Mechanism | str, rounds: int, delta: float) -> dict[str, Any]:
    """What is claimed: `epsilon` (`math.inf` for no guarantee, None if there is no such mechanism),
    `accountant`, `epsilon_rdp`, `bits` and expected share of coordinates that wrap around of noise
    in shares, and `why_not`.
    """
    figure: dict[str, Any] = {"epsilon": None, "accountant": None, "epsilon_rdp": None}
    if isinstance(mechanism, str):
        return figure | {"why_not": mechanism}
    try:
        found = mechanism.epsilon(rounds, delta)
    except UserError as error:
        return figure | {"why_not": str(error)}
    figure |= {
        "epsilon": found.epsilon,
        "accountant": found.accountant,
        "epsilon_rdp": found.epsilon_rdp,
    }
    if mechanism.secure is not None:
        encoding = mechanism.encoding
        figure |= {"bits": encoding.bits, "wrapped": encoding.wrapped()}
    return figure


def run(config: dict[str, Any]) -> Report:
    """What the flags ask for.

    Args:
      config: plain, as `fedasr.training.loop.run` takes it.

    Raises:
      UserError: for a mistake in flags or configuration.
    """
    from fedasr.training import loop

    options = flags.FLAGS
    if options.rounds is not None:
        config["rounds"] = options.rounds
    if options.seed is not None:
        config["seed"] = options.seed
    # Rounds start from init_from or from scratch; deployments are not what runs here.
    config["seed_training"]["steps"] = 0
    config["privacy"]["deployments"] = []
    population = loop.dry_run(config)["population"]
    delta = config["privacy"]["delta"] if options.delta is None else options.delta
    other = "many_runs" if options.method == "one_run" else "one_run"
    methods = [options.method, other] if options.side_by_side else [options.method]
    counts = {method: _trials(method) for method in methods}
    attack = _attack_users if options.canaries == "users" else _attack_updates
    audits: list[tuple[Any, Any]] = []
    noises: dict[str, Any] = {}
    for method in methods:
        first, mechanism = attack(config, None, population, delta, method, counts[method])
        own = CENTRAL if mechanism.secure is None else DISTRIBUTED
        audits.append((own, first))
        noises = noises or both_noises(
            mechanism, config["privacy"]["bits"], _dimension(config, mechanism, method)
        )
        rest = DISTRIBUTED if own == CENTRAL else CENTRAL
        if options.side_by_side and not isinstance(noises[rest], str):
            second, _ = attack(config, rest, population, delta, method, counts[method])
            audits.append((rest, second))
    figures = {name: figure_of(one, config["rounds"], delta) for name, one in noises.items()}
    return Report(audits, figures, options.canaries)


def _trials(method: str) -> int:
    """So many runs does a method have: --trials of the one asked for, --runs of the other."""
    flag = "trials" if method == flags.FLAGS.method else "runs"
    if (count := flags.FLAGS[flag].value) is not None:
        return count
    if method == "many_runs" and flags.FLAGS.canaries == "users":
        raise UserError(f"many_runs trains as many models as it has runs: say how many (--{flag})")
    return _RUNS if method == "many_runs" else 1


def _with_noise(config: Mapping[str, Any], noise: str | None) -> dict[str, Any]:
    """The configuration with noise of that kind; None for its own."""
    if noise is None:
        return dict(config)
    kind = "skellam" if noise == DISTRIBUTED else "independent"
    return {**config, "privacy": {**config["privacy"], "noise": kind}}


def _attack_users(
    config: Mapping[str, Any],
    noise: str | None,
    population: int,
    delta: float,
    method: str,
    trials: int,
) -> tuple[Audit, Mechanism]:
    del population
    # By one run at least two canaries are needed, by many exactly one.
    count = flags.FLAGS.canary_count if method == flags.FLAGS.method else None
    return audit_users(
        _with_noise(config, noise),
        delta,
        method=method,
        trials=trials,
        canaries=count,
        confidence=flags.FLAGS.confidence,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _attack_updates(
    config: Mapping[str, Any],
    noise: str | None,
    population: int,
    delta: float,
    method: str,
    trials: int,
) -> tuple[Audit, Mechanism]:
    from fedasr import auditing
    from fedasr.training.builders.mechanisms import make_mechanism, make_sampler
    from fedasr.training.config import Config

    settings = Config.of(_with_noise(config, noise))
    sampler = make_sampler(settings, population)
    count = flags.FLAGS.canary_count if method == flags.FLAGS.method else None
    # The size stands in for the canaries' own, which follows.
    mechanism = make_mechanism(settings, sampler, 1000)
    count = auditing.default_canaries(mechanism, method) if count is None else count
    mechanism = auditing.for_canaries(mechanism, count)
    audit = auditing.audit_updates(
        mechanism,
        config["rounds"],
        delta,
        method=method,
        trials=trials,
        canaries=count,
        confidence=flags.FLAGS.confidence,
        seed=config["seed"],
    )
    return audit, mechanism


def _dimension(config: Mapping[str, Any], mechanism: Mechanism, method: str) -> int:
    """Numbers that a client sends in the audit."""
    from fedasr import auditing
    from fedasr.training.builders import models
    from fedasr.training.config import Config

    if flags.FLAGS.canaries == "users":
        return models.sent_parameters(Config.of(config))
    count = flags.FLAGS.canary_count or auditing.default_canaries(mechanism, method)
    return sum(x.size for x in auditing.canary_params(count).values())


def to_row(noise: str, audit: Audit) -> dict[str, Any]:
    """One audit, before infinities (a claim without a guarantee) become JSON."""
    return {
        "noise": noise,
        "method": audit.method,
        "epsilon_lower": audit.epsilon_lower,
        "epsilon_lower_strict": audit.strict,
        "epsilon_claimed": audit.epsilon_claimed,
        "neighbours": audit.neighbours,
        "exceeds": audit.exceeds,
        "confidence": audit.confidence,
        "delta": audit.delta,
        "canary_count": audit.canaries,
        "trials": audit.trials,
        "rounds": audit.rounds,
        "attack": audit.statistic,
        "auroc": audit.auroc,
    }


def to_summary(report: Report) -> dict[str, Any]:
    """The JSON object: the first audit, `figures` claimed by noise, and all `audits`."""
    rows = [to_row(noise, audit) for noise, audit in report.audits]
    return {
        **rows[0],
        "canaries": report.canaries,
        "exceeds": any(row["exceeds"] for row in rows),
        "figures": report.figures,
        "audits": rows,
    }


def _describe(report: Report) -> Iterator[str]:
    """The audits for people."""
    (_, audit), canaries = report.audits[0], report.canaries
    yield (
        f"{audit.canaries:,} canary {canaries} in {audit.trials:,} x {audit.rounds:,} rounds, "
        f"{audit.method}: AUROC {audit.auroc:.3f} ({audit.statistic})"
    )
    yield (
        f"epsilon is at least {audit.epsilon_lower:.3g} at delta {audit.delta:g} with "
        f"{audit.confidence:.0%} confidence"
    )
    if audit.method == "one_run":
        yield (
            f"(for Gaussian trade-off curves; {audit.strict:.3g} whatever the mechanism, a much "
            "looser bound)"
        )
    yield f"claimed: {_claim(audit.epsilon_claimed)}"
    yield f"the claim compares: {audit.neighbours}"
    yield ""
    lines = [("noise", "claimed", "by", "RDP", *(_head(method) for method in _methods(report)))]
    for noise, figure in report.figures.items():
        bounds = [_bound(report, noise, method) for method in _methods(report)]
        claims = ["-", "-", "-"]
        if figure["epsilon"] is not None:
            claims = [_claim(figure["epsilon"]), figure["accountant"]]
            claims.append(_claim(figure["epsilon_rdp"]))
        lines.append((noise, *claims, *bounds))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    for noise, figure in report.figures.items():
        if "why_not" in figure:
            yield f"{noise}: {figure['why_not']}"
        if "bits" in figure:
            yield f"{noise}: {figure['bits']} bits, {figure['wrapped']:.2g} of coordinates wrap"


def _claim(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite (no guarantee)"


def _methods(report: Report) -> list[str]:
    return list(dict.fromkeys(audit.method for _, audit in report.audits))


def _head(method: str) -> str:
    return f"at least, by {method}"


def _bound(report: Report, noise: str, method: str) -> str:
    for name, audit in report.audits:
        if (name, audit.method) == (noise, method):
            return f"{audit.epsilon_lower:.3g}{' (exceeds)' if audit.exceeds else ''}"
    return "not run"


def _define_flags() -> None:
    flags.DEFINE_enum("canaries", "updates", ["updates", "users"], "What canaries are.")
    flags.DEFINE_enum("method", "one_run", ["one_run", "many_runs"], "How epsilon is bounded.")
    flags.DEFINE_integer("trials", None, "Independent runs.", lower_bound=1)
    flags.DEFINE_integer("canary_count", None, "Canaries in each run.", lower_bound=1)
    flags.DEFINE_integer("rounds", None, "Instead of the configuration's.", lower_bound=1)
    flags.DEFINE_float(
        "delta",
        None,
        "Instead of the configuration's; larger ones show more, up to a hundredth of the sampling.",
    )
    flags.DEFINE_bool("side_by_side", False, "Both kinds of noise, each by both methods.")
    flags.DEFINE_integer("runs", None, "Of the other method, side by side.", lower_bound=1)
    flags.DEFINE_float("confidence", 0.95, "Of the bound.")
    flags.DEFINE_integer("seed", None, "Instead of the configuration's.", lower_bound=0)
    flags.DEFINE_string("plot", None, "Picture of the ROC curves.")


def program() -> int | None:
    """Audits and prints; returns the exit status if not 0."""
    try:
        plain = flags.FLAGS.config.to_dict()
    except OSError as error:
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error
    common.configure_devices()
    from fedasr.auditing import write_roc
    from fedasr.training.config import resolve

    report = run(resolve(plain))
    if flags.FLAGS.plot:
        write_roc(report.audits[0][1], flags.FLAGS.plot)
    if common.JSON.value:
        common.show(to_summary(report))
    else:
        print("\n".join(_describe(report)))
    for noise, audit in report.audits:
        if not audit.exceeds:
            continue
        return common.fail(
            f"the audit of {noise} noise by {audit.method} found epsilon >= "
            f"{audit.epsilon_lower:.3g}, more than the {audit.epsilon_claimed:.3g} claimed: the "
            "code has less privacy than it says",
            common.FAILED,
        )
    return None


def main() -> None:
    """The command `fedasr audit`: parses the flags, runs and exits."""
    _define_flags()
    common.define_config("quickstart")
    common.main(program, __name__)


if __name__ == "__main__":
    main()
