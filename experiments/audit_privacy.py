"""Attacks the round code and bounds epsilon from below, to hold against what is claimed.

    python -m experiments.audit_privacy [--config=experiments/configs/NAME.py]
        [--config.section.field=value ...] [--canaries={updates,users}]
        [--method={one_run,many_runs}] [--trials=N] [--canary_count=M] [--rounds=T] [--delta=D]
        [--confidence=P] [--seed=S] [--plot=FILE.png] [--json]

`updates`: canaries return crafted updates (see `fedasr.privacy.auditing`). The mechanism is the
configuration's: sampler, cohort, population, clip norm, budget, noise, rounds. The model is
replaced by three layers with one coordinate for each canary, so this takes seconds and no data.

`users`: canaries are people of the held-out splits (`data.eval`), each with one more utterance
whose transcript is random, so that nothing else teaches it. They are trained on, or not, with all
other users by the configuration's own federated rounds, and recognised by how much the loss of the
inserted utterance fell. An absent canary is a user who has nothing but an utterance that cannot be
aligned, whose update is zero. Rounds start from `init_from`, or from scratch.

Exit status: 0 when the bound is below the claim, 1 when it exceeds it (the code does not have the
privacy that it claims), 2 for a mistake that the user can mend.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from experiments import cli
from fedasr.errors import UserError
from fedasr.streams import Stream, generator, seed_key

if TYPE_CHECKING:
    from fedasr.data.corpus import Corpus, Example
    from fedasr.privacy.auditing import Audit

_DEFAULT = str(Path(__file__).parent / "configs" / "quickstart.py")
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
) -> Audit:
    """Audits whole trainings with held-out users among the training users.

    Args:
      config: of the run; its seed is the first trial's, the next trial has the next one.
      delta, method, trials, confidence: see `fedasr.privacy.auditing.audit_updates`.
      canaries: of each trial; None for all held-out users ("one_run"), or one ("many_runs").
      log: takes a line for every trial.

    Raises:
      UserError: for a configuration whose rounds cannot be audited so.
    """
    import jax

    from fedasr.data.corpus import open_corpus
    from fedasr.data.splits import UnionCorpus
    from fedasr.privacy import auditing
    from fedasr.training import loop

    if config["algorithm"] != "federated" or config["data"]["iid"]:
        raise UserError("--canaries=users audits federated users: algorithm='federated', not iid")
    if (optimizer := config["client"]["optimizer"]) in ("adamw", "yogi"):
        raise UserError(f"client.optimizer={optimizer!r} moves users without data: choose another")
    if config["augment"]["enabled"] and config["augment"]["start_round"]:
        raise UserError("--canaries=users has SpecAugment from the start: augment.start_round=0")
    directory = loop.data_directory(config)
    data = loop.Data(directory, config, log)
    if not data.evaluation:
        raise UserError("there is no held-out split: data.eval names those to take canaries from")
    held_out = UnionCorpus([open_corpus(directory, split) for split in data.evaluation])
    if canaries is None:
        canaries = 1 if method == "many_runs" else len(held_out.users)
    elif method == "many_runs" and canaries != 1:
        raise UserError("many_runs has one canary in each run: leave out --canary_count")
    recogniser = loop.build_recogniser(config)
    evaluate = jax.jit(recogniser.evaluate)
    devices = jax.local_devices()[: config["devices"] or None]
    chosen = make_canaries(held_out, canaries, data.tokenizer.vocab_size, config["seed"])
    present = auditing.toss(trials, canaries, method, config["seed"])
    falls, mechanism = [], None
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
    return auditing.conclude(
        scores,
        claimed,
        delta,
        method=method,
        trials=trials,
        rounds=config["rounds"],
        confidence=confidence,
        neighbours=mechanism.sampler.neighbours,
    )


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
    from fedasr.training import loop

    train = open_corpus(directory, config["data"]["train"])
    members = {
        canary.user: canary.present if here else canary.absent
        for canary, here in zip(canaries, present.tolist(), strict=True)
    }
    everybody = copy.copy(data)
    joined = InMemoryCorpus(members, ragged=tuple(train.lengths(0)))
    everybody.train = UnionCorpus([train, joined])
    return loop.make_simulation(config, everybody, recogniser.loss, devices)


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


def run(config: dict[str, Any]) -> Audit:
    """What the flags ask for.

    Args:
      config: plain, as `fedasr.training.loop.run` takes it.

    Raises:
      UserError: for a mistake in flags or configuration.
    """
    from fedasr.privacy import auditing
    from fedasr.privacy.settings import make_mechanism, make_sampler
    from fedasr.training import loop

    options = flags.FLAGS
    if options.rounds is not None:
        config["rounds"] = options.rounds
    if options.seed is not None:
        config["seed"] = options.seed
    # Rounds start from init_from or from scratch; deployments are not what runs here.
    config["seed_training"]["steps"] = 0
    config["privacy"]["deployments"] = []
    resolved = loop.dry_run(config)
    delta = config["privacy"]["delta"] if options.delta is None else options.delta
    trials = options.trials
    if trials is None:
        if options.method == "many_runs" and options.canaries == "users":
            raise UserError("--method=many_runs trains --trials models: say how many")
        trials = _RUNS if options.method == "many_runs" else 1
    shared = {
        "method": options.method,
        "trials": trials,
        "canaries": options.canary_count,
        "confidence": options.confidence,
    }
    if options.canaries == "users":
        return audit_users(
            config, delta, **shared, log=lambda text: print(text, file=sys.stderr, flush=True)
        )
    mechanism = make_mechanism(config, make_sampler(config, resolved["population"]))
    return auditing.audit_updates(mechanism, config["rounds"], delta, **shared, seed=config["seed"])


def to_summary(audit: Audit, canaries: str) -> dict[str, Any]:
    """The JSON object, before infinities (a claim without a guarantee) become JSON."""
    return {
        "epsilon_lower": audit.epsilon_lower,
        "epsilon_lower_strict": audit.strict,
        "epsilon_claimed": audit.epsilon_claimed,
        "neighbours": audit.neighbours,
        "exceeds": audit.exceeds,
        "confidence": audit.confidence,
        "delta": audit.delta,
        "method": audit.method,
        "canaries": canaries,
        "canary_count": audit.canaries,
        "trials": audit.trials,
        "rounds": audit.rounds,
        "attack": audit.statistic,
        "auroc": audit.auroc,
    }


def _describe(audit: Audit, canaries: str) -> Iterator[str]:
    """The audit for people."""
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
    claimed = audit.epsilon_claimed
    yield f"claimed: {f'{claimed:.4g}' if math.isfinite(claimed) else 'infinite (no guarantee)'}"
    yield f"the claim compares: {audit.neighbours}"


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
    flags.DEFINE_float("confidence", 0.95, "Of the bound.")
    flags.DEFINE_integer("seed", None, "Instead of the configuration's.", lower_bound=0)
    flags.DEFINE_string("plot", None, "Picture of the ROC curves.")


def program() -> int | None:
    """Audits and prints; returns the exit status if not 0."""
    try:
        plain = _CONFIG.value.to_dict()
    except OSError as error:
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error
    cli.configure_devices()
    from fedasr.privacy.auditing import write_roc
    from fedasr.training.config import resolve

    canaries = flags.FLAGS.canaries
    audit = run(resolve(plain))
    if flags.FLAGS.plot:
        write_roc(audit, flags.FLAGS.plot)
    if cli.JSON.value:
        cli.show(to_summary(audit, canaries))
    else:
        print("\n".join(_describe(audit, canaries)))
    if audit.exceeds:
        return cli.fail(
            f"the audit found epsilon >= {audit.epsilon_lower:.3g}, more than the "
            f"{audit.epsilon_claimed:.3g} claimed: the code has less privacy than it says",
            cli.FAILED,
        )
    return None


if __name__ == "__main__":
    # Not when imported: other programs have flags of these names.
    _define_flags()
    _CONFIG = cli.define_config(_DEFAULT)
    cli.main(program)
