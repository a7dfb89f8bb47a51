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

import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from fedasr.cli import common
from fedasr.cli.audit.report import (
    CENTRAL,
    DISTRIBUTED,
    Report,
    both_noises,
    describe,
    figure_of,
    to_summary,
)
from fedasr.cli.audit.users import audit_users
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.auditing import Audit
    from fedasr.privacy.mechanism import Mechanism

_RUNS = 1000  # of many_runs with crafted updates


def _as_flags_say(config: dict[str, Any]) -> int:
    """Makes the configuration one of an audit, in place; returns the number of training users."""
    from fedasr.training import loop
    from fedasr.training.builders import pretrained
    from fedasr.training.config import Config

    options = flags.FLAGS
    for name in ("rounds", "seed"):
        if options[name].value is not None:
            config[name] = options[name].value
    # Rounds start from init_from or from scratch; deployments are not what runs here.
    config["seed_training"]["steps"] = 0
    config["privacy"]["deployments"] = []
    population = loop.dry_run(config)["population"]
    if pretrained.is_pretrained(typed := Config.of(config)):
        config |= pretrained.resolved(typed).tree()
    return population


def run(config: dict[str, Any]) -> Report:
    """What the flags ask for.

    Args:
      config: plain, as `fedasr.training.loop.run` takes it.

    Raises:
      UserError: for a mistake in flags or configuration.
    """
    options, population = flags.FLAGS, _as_flags_say(config)
    delta = config["privacy"]["delta"] if options.delta is None else options.delta
    other = "many_runs" if options.method == "one_run" else "one_run"
    methods = [options.method, other] if options.side_by_side else [options.method]
    counts = {method: _trials(method) for method in methods}
    attack: Callable[..., tuple[Audit, Mechanism]] = functools.partial(
        _attack_updates, population=population
    )
    if options.canaries == "users":
        attack = _attack_users
    audits: list[tuple[Any, Any]] = []
    noises: dict[str, Any] = {}
    for method in methods:
        first, mechanism = attack(config, delta, method, counts[method])
        configured = CENTRAL if mechanism.secure is None else DISTRIBUTED
        audits.append((configured, first))
        noises = noises or both_noises(
            mechanism, config["privacy"]["bits"], _dimension(config, mechanism, method)
        )
        rest = DISTRIBUTED if configured == CENTRAL else CENTRAL
        if options.side_by_side and not isinstance(noises[rest], str):
            second, _ = attack(_with_noise(config, rest), delta, method, counts[method])
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


def _canary_count(method: str) -> int | None:
    """Of the method asked for; by one run at least two are needed, by many exactly one."""
    return flags.FLAGS.canary_count if method == flags.FLAGS.method else None


def _with_noise(config: Mapping[str, Any], noise: str) -> dict[str, Any]:
    """The configuration with noise of that kind."""
    kind = "skellam" if noise == DISTRIBUTED else "independent"
    return {**config, "privacy": {**config["privacy"], "noise": kind}}


def _attack_users(
    config: Mapping[str, Any], delta: float, method: str, trials: int
) -> tuple[Audit, Mechanism]:
    return audit_users(
        config,
        delta,
        method=method,
        trials=trials,
        canaries=_canary_count(method),
        confidence=flags.FLAGS.confidence,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _attack_updates(
    config: Mapping[str, Any], delta: float, method: str, trials: int, *, population: int
) -> tuple[Audit, Mechanism]:
    from fedasr import auditing
    from fedasr.training.builders.mechanisms import make_mechanism, make_sampler
    from fedasr.training.config import Config

    settings = Config.of(config)
    sampler = make_sampler(settings, population)
    count = _canary_count(method)
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
    plain = common.plain_config()
    common.configure_devices()
    from fedasr.auditing import write_roc
    from fedasr.training.config import resolve

    report = run(resolve(plain))
    if flags.FLAGS.plot:
        write_roc(report.audits[0][1], flags.FLAGS.plot)
    if common.JSON.value:
        common.show(to_summary(report))
    else:
        print("\n".join(describe(report)))
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
