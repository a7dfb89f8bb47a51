"""An audit of whole trainings: held-out people, trained on or not, and recognised by a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator, seed_key

if TYPE_CHECKING:
    from fedasr.auditing import Audit
    from fedasr.data.corpus import Corpus, Example
    from fedasr.privacy.mechanism import Mechanism


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
        examples = corpus.get(user, range(int(corpus.sizes[user])))
        spoken = examples[int(rng.integers(len(examples)))]
        labels = _random_labels(len(spoken["labels"]), vocab, rng)
        inserted = {**spoken, "labels": labels.astype(spoken["labels"].dtype)}
        # One frame cannot carry eight tokens: the loss leaves the utterance out.
        nothing = {
            **inserted,
            "features": spoken["features"][:1],
            "labels": np.ones(8, spoken["labels"].dtype),
        }
        canaries.append(Canary(f"canary {corpus.users[user]}", [*examples, inserted], [nothing]))
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
    from fedasr.data.views import UnionCorpus
    from fedasr.training.builders import corpora, models
    from fedasr.training.config import Config

    _check(config)
    typed = Config.of(config)
    directory = corpora.data_directory(typed)
    data = corpora.Data(directory, typed, log)
    if not data.evaluation:
        raise UserError("there is no held-out split: data.eval names those to take canaries from")
    held_out = UnionCorpus(
        [corpora.open_split(directory, split, typed) for split in data.evaluation]
    )
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


def _check(config: Mapping[str, Any]) -> None:
    if config["algorithm"] == "central" or config["data"]["iid"]:
        raise UserError("--canaries=users audits federated users: algorithm='federated', not iid")
    if (optimizer := config["client"]["optimizer"]) in ("adamw", "yogi"):
        raise UserError(f"client.optimizer={optimizer!r} moves users without data: choose another")
    if config["augment"]["enabled"] and config["augment"]["start_round"]:
        raise UserError("--canaries=users has SpecAugment from the start: augment.start_round=0")


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

    from fedasr.data.corpus import InMemoryCorpus
    from fedasr.data.views import UnionCorpus
    from fedasr.training.builders import corpora, simulations
    from fedasr.training.config import Config

    train = corpora.open_split(directory, config["data"]["train"], Config.of(config))
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

    from fedasr.training.builders import models, pretrained
    from fedasr.training.checkpoint import restore_params
    from fedasr.training.config import Config

    if config["init_from"]:
        typed = Config.of(config)
        if pretrained.is_pretrained(typed):
            return pretrained.read_params(typed, models.variable_shapes(typed))
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
    from fedasr.models.recogniser import ARRAYS, INPUTS

    examples = {f"{i:012d}": [canary.inserted] for i, canary in enumerate(canaries)}
    corpus = InMemoryCorpus(examples, ragged=ARRAYS)
    buckets = make_buckets([corpus], 1, {"features": 24, "labels": 4})
    losses: list[float] = []
    for batch in eval_batches(corpus, buckets, min(32, len(canaries)), INPUTS):
        found = jax.device_get(evaluate(params, batch)[2])
        losses += found[batch["mask"]].astype(np.float64).tolist()
    return np.array(losses)
