"""What privacy a federated training would have, or what it would take.

    fedasr plan --cohort=S --population=K --rounds=T --delta=D
        (--sigma=X | --noise_multiplier=Z | --target_epsilon=E) [--json]

sigma is the noise's standard deviation on the mean client update over the clip norm, as in
arXiv 2310.00098; noise_multiplier is that on the sum over the clip norm: sigma * cohort. What one
user can change in the sum is one clip norm, but two under fixed-size sampling, so that the noise
over that (noise_over_sensitivity) is half of noise_multiplier there. Several cohorts or
populations (--cohort=1024,204800) make a table, --plot=FILE.png draws it. With --workdir the
rounds, delta and sigma are a finished run's, and with --target_epsilon too the answer is, for each
cohort, the smallest population that gives it. Every figure protects one user with all their data:
it compares with the user's contribution replaced by nothing, where the number of users is public;
under fixed-size sampling with the user replaced by any other.
--sampling, --cycle, --noise, --bands, --buffers and --bits are as in a run's configuration;
--noise=skellam needs the number of --parameters that clients send.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.privacy import accounting, ledger
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler
from fedasr.privacy.secure_aggregation import SecureAggregation
from fedasr.training.builders.mechanisms import make_correlation, make_sampler
from fedasr.training.config import Config, Privacy
from fedasr.training.logging import from_json

# Beyond the number of people there are, an answer is none.
_MOST_USERS = 10_000_000_000
_COHORTS = (1_024, 10_240, 51_200, 102_400, 204_800)


def make_mechanism(
    cohort: float,
    population: int,
    rounds: int,
    *,
    sampling: str = "poisson",
    slots: int = 0,
    cycle: int = 1,
    noise: str = "independent",
    bands: int = 0,
    buffers: int = 2,
    bits: int = 16,
    parameters: int = 0,
) -> Mechanism:
    """The mechanism that the flags name, with a noise multiplier of 1.

    Raises:
      UserError: for numbers out of range, or sampling and noise that no accountant knows together.
    """
    privacy = Privacy(
        sampler=sampling, slots=slots, cycle=cycle, noise=noise, bands=bands, buffers=buffers
    )
    # A fraction goes with Poisson sampling alone.
    settings = Config(cohort=cast(int, cohort), rounds=rounds, privacy=privacy)
    if sampling != "poisson":
        if cohort != int(cohort):
            raise UserError(f"--cohort={cohort} must be whole with --sampling={sampling}")
        if slots:
            raise UserError(f"--slots are of Poisson sampling, not of --sampling={sampling}")
    sampler = make_sampler(settings, population)
    correlation, secure = make_correlation(settings, sampler), None
    if noise == "skellam":
        if parameters < 1:
            raise UserError("--noise=skellam depends on the model's size: give --parameters")
        secure = SecureAggregation(parameters, bits)
    return Mechanism(1.0, "global", 1.0, sampler, correlation=correlation, secure=secure)


def plan(
    cohort: float,
    population: int,
    rounds: int,
    delta: float,
    *,
    sigma: float | None = None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    **kind: Any,
) -> dict[str, Any]:
    """One line of the plan: the privacy of a noise, or the noise of a privacy.

    Args:
      cohort: expected number of users a round. population: of all users. rounds, delta: as usual.
      sigma, noise_multiplier, target_epsilon: exactly one of them.
      kind: of sampling and noise, see `make_mechanism`.

    Returns:
      The inputs and `epsilon` (by `accountant`), `epsilon_rdp` at `rdp_order`, `epsilon_pld` on a
      grid of `pld_interval`, `sigma`, `noise_multiplier` (of the sum over the clip norm),
      `noise_over_sensitivity`, `sampling` and `neighbours` in words.

    Raises:
      UserError: for anything out of range, or a target that no noise reaches.
    """
    given = [x for x in (sigma, noise_multiplier, target_epsilon) if x is not None]
    if len(given) != 1:
        raise UserError("give exactly one of --sigma, --noise_multiplier and --target_epsilon")
    if not given[0] > 0:
        raise UserError(f"the noise or target must be above 0, not {given[0]}")
    mechanism = make_mechanism(cohort, population, rounds, **kind)
    if target_epsilon is not None:
        mechanism = mechanism.calibrated(target_epsilon, delta, rounds)
    else:
        over_clip = given[0] * cohort if sigma else given[0]
        mechanism = dataclasses.replace(mechanism, noise_multiplier=over_clip)
    figure = mechanism.epsilon(rounds, delta)
    return {
        "cohort": cohort,
        "population": population,
        "rounds": rounds,
        "delta": delta,
        "sigma": mechanism.sigma,
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_over_sensitivity": mechanism.noise_over_sensitivity,
        "epsilon": figure.epsilon,
        "accountant": figure.accountant,
        "epsilon_rdp": figure.epsilon_rdp,
        "rdp_order": figure.rdp_order,
        "epsilon_pld": figure.epsilon_pld,
        "pld_interval": figure.pld_interval,
        "sampling": figure.sampling,
        "neighbours": mechanism.sampler.neighbours,
    }


def smallest_population(
    cohort: float, rounds: int, delta: float, sigma: float, target_epsilon: float
) -> int | None:
    """The smallest population (to 1%) of which Poisson cohorts give `target_epsilon`.

    None if even ten thousand million users do not.
    """

    def mechanism(population: float) -> Mechanism:
        # Rounded up, so that what is found is what was tried.
        sampler = PoissonSampler(math.ceil(population), cohort, seed=0)
        return Mechanism(1.0, "global", sigma * cohort, sampler)

    def by_rdp(population: float) -> float:
        found = mechanism(population)
        relation = found.sampler.neighboring_relation
        return accounting.rdp_epsilon(found.event(rounds), delta, relation)

    def reported(population: float) -> float:
        return mechanism(population).epsilon(rounds, delta).epsilon

    if not target_epsilon > 0:
        raise UserError(f"--target_epsilon={target_epsilon} must be above 0")
    span = (math.ceil(cohort), _MOST_USERS)
    guess = accounting.smallest(by_rdp, target_epsilon, math.sqrt(span[0] * span[1]), *span, 1.05)
    found = accounting.smallest(reported, target_epsilon, guess or span[1], *span, 1.01)
    return None if found is None else math.ceil(found)


def read_run(workdir: str) -> dict[str, Any]:
    """sigma, rounds, delta and word error rates of a finished run.

    Raises:
      UserError: if there is no finished private run.
    """
    try:
        text = (Path(workdir) / "summary.json").read_text(encoding="utf-8")
        summary = from_json(json.loads(text))
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir} holds no finished run") from error
    privacy = summary.get("privacy", {})
    if not privacy.get("enabled") or not privacy.get("sigma"):
        raise UserError(f"--workdir={workdir}: the run had no noise, there is nothing to plan")
    if privacy.get("noise", "independent") != "independent" or "adaptive" in privacy:
        raise UserError(
            f"--workdir={workdir}: only runs with independent noise and fixed bounds are "
            "extrapolated; the summary's privacy.extrapolations have this run's"
        )
    sampling = privacy.get("sampling", "")
    if "in turn" in sampling or "everyone" in sampling:
        raise UserError(
            f"--workdir={workdir}: extrapolations are for Poisson sampling, that run had {sampling}"
        )
    return {
        "sigma": privacy["sigma"],
        "rounds": summary["rounds"],
        "delta": privacy["delta"],
        "wer": summary["wer"],
        "ledger": privacy.get("ledger"),
    }


def _numbers(values: Iterable[str], flag: str) -> list[Any]:
    """Positive numbers, as integers where they are whole: 1e6 is as good as 1000000."""
    numbers = []
    for text in values:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"--{flag}: {text!r} is not a positive number")
        numbers.append(int(number) if number == int(number) else number)
    return numbers


def _inputs() -> dict[str, Any]:
    """The flags that every line shares; a run's figures stand in for those not given.

    Raises:
      UserError: for flags that contradict a run, whose error rates go with its own noise only.
    """
    run = read_run(flags.FLAGS.workdir) if flags.FLAGS.workdir else {}
    if run:
        _check_beside_run()
    rounds = flags.FLAGS.rounds or run.get("rounds")
    delta = flags.FLAGS.delta or run.get("delta")
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"--delta={delta} must lie between 0 and 1")
    if rounds is None or delta is None:
        raise UserError("--rounds and --delta are needed")
    return {"run": run, "rounds": rounds, "delta": delta}


def _check_beside_run() -> None:
    """Refuses flags that contradict the run of --workdir."""
    given = ("rounds", "sigma", "noise_multiplier")
    if taken := [name for name in given if flags.FLAGS[name].value is not None]:
        raise UserError(f"--workdir gives the rounds and the noise: leave out --{taken[0]}")
    plain = all(flags.FLAGS[name].using_default_value for name in _kind())
    if flags.FLAGS.target_epsilon is not None and (flags.FLAGS.population or not plain):
        raise UserError(
            "--workdir with --target_epsilon looks for the population, under Poisson sampling "
            "with independent noise: leave out --population and the flags of other kinds"
        )


def _kind() -> dict[str, Any]:
    """The flags that say what kind of sampling and noise it is."""
    names = ("sampling", "slots", "cycle", "noise", "bands", "buffers", "bits", "parameters")
    return {name: flags.FLAGS[name].value for name in names}


def run() -> dict[str, Any]:
    """What the flags ask for: {"rows": [...]}, with `wer` of the run that is extrapolated."""
    shared = _inputs()
    run, rounds, delta = shared["run"], shared["rounds"], shared["delta"]
    cohorts = _numbers(flags.FLAGS.cohort, "cohort")
    populations = _numbers(flags.FLAGS.population, "population")
    sigma = run["sigma"] if run else flags.FLAGS.sigma
    target = flags.FLAGS.target_epsilon
    if run and target is not None:
        rows = [_enough(cohort, rounds, delta, sigma, target) for cohort in cohorts or _COHORTS]
        return {"target_epsilon": target, **_of_run(run), "rows": rows}
    if not cohorts or not populations:
        raise UserError("--cohort and --population are needed")
    rows = [
        plan(
            cohort,
            population,
            rounds,
            delta,
            sigma=sigma,
            noise_multiplier=flags.FLAGS.noise_multiplier,
            target_epsilon=target,
            **_kind(),
        )
        for cohort in cohorts
        for population in populations
        if len(cohorts) * len(populations) == 1 or cohort <= population
    ]
    if not rows:
        raise UserError("every cohort is larger than every population")
    return {**_of_run(run), "rows": rows} if run else {"rows": rows}


def _enough(
    cohort: float, rounds: int, delta: float, sigma: float, target_epsilon: float
) -> dict[str, Any]:
    """A line with the smallest population, None where none is enough."""
    found = smallest_population(cohort, rounds, delta, sigma, target_epsilon)
    if found is None:
        return {"cohort": cohort, "population": None, "rounds": rounds}
    return plan(cohort, found, rounds, delta, sigma=sigma)


def _of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an extrapolated run beside the rows, which are of its own rounds alone."""
    return {"wer": run["wer"], "ledger": run["ledger"]}


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plan for people, aligned."""
    head = ("cohort", "population", "noise multiplier", "sigma", "epsilon", "RDP (order)", "PLD")
    lines = [head]
    for row in rows:
        if row["population"] is None:
            lines.append((f"{row['cohort']:,}", "none is enough", "", "", "", "", ""))
            continue
        pld = row["epsilon_pld"]
        lines.append(
            (
                f"{row['cohort']:,}",
                f"{row['population']:,}",
                f"{row['noise_multiplier']:.4g}",
                f"{row['sigma']:.3g}",
                _figure(row["epsilon"]),
                f"{_figure(row['epsilon_rdp'])} ({row['rdp_order']:g})",
                "-" if pld is None else _figure(pld),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _figure(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite (no guarantee)"


def write_plot(result: Mapping[str, Any], path: str) -> None:
    """Draws epsilon against population, a line for each cohort, with the run's error rates."""
    from matplotlib.figure import Figure

    by_cohort: dict[Any, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if row["population"] is not None:
            by_cohort.setdefault(row["cohort"], []).append(row)
    if not by_cohort:
        raise UserError("--plot: there is nothing to draw, no population is enough")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for cohort, rows in by_cohort.items():
        xs, ys = [r["population"] for r in rows], [r["epsilon"] for r in rows]
        axes.plot(xs, ys, marker="o", label=f"{cohort:,} users a round")
    axes.set(xscale="log", yscale="log", xlabel="population, users", ylabel="epsilon")
    rates = ", ".join(f"{split} {wer:.1f}%" for split, wer in result.get("wer", {}).items())
    one = next(rows[0] for rows in by_cohort.values())
    title = f"{one['rounds']:,} rounds, delta {one['delta']:g}"
    axes.set_title(f"{title}; word error rate {rates}" if rates else title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path}: {error}") from error


def _define_flags() -> None:
    flags.DEFINE_list("cohort", [], "Users a round, expected; several make a table.")
    flags.DEFINE_list("population", [], "Users in all; several make a table.")
    flags.DEFINE_integer("rounds", None, "Rounds.", lower_bound=1)
    flags.DEFINE_float("delta", None, "Of (epsilon, delta).")
    flags.DEFINE_float("sigma", None, "Noise on the mean over the clip norm.")
    flags.DEFINE_float("noise_multiplier", None, "Noise on the sum over the clip norm.")
    flags.DEFINE_float("target_epsilon", None, "Find the noise that gives this epsilon.")
    flags.DEFINE_enum(
        "sampling", "poisson", ["poisson", "fixed", "shuffled", "everyone"], "Of users."
    )
    flags.DEFINE_integer("slots", 0, "Largest Poisson cohort; 0: hardly ever full.")
    flags.DEFINE_integer("cycle", 1, "Groups of users that Poisson sampling takes in turn.")
    flags.DEFINE_enum(
        "noise", "independent", ["independent", "banded", "buffered", "skellam"], "Kind."
    )
    flags.DEFINE_integer("bands", 0, "Of banded noise; 0: the rounds between turns, at most 32.")
    flags.DEFINE_integer("buffers", 2, "Of buffered linear Toeplitz noise.")
    flags.DEFINE_integer("bits", 16, "Of a parameter that a client sends, with skellam noise.")
    flags.DEFINE_integer("parameters", 0, "That a client sends updates of, with skellam noise.")
    flags.DEFINE_string("workdir", None, "Extrapolate the run in this directory.")
    flags.DEFINE_string("plot", None, "PNG of epsilon against population, by cohort.")


def program() -> None:
    """Plans and prints: one line, a table, or JSON."""
    result = run()
    rows = result["rows"]
    if flags.FLAGS.plot:
        write_plot(result, flags.FLAGS.plot)
    if common.JSON.value:
        single = len(rows) == 1 and len(result) == 1
        common.show(rows[0] if single else result)
        return
    print(to_table(rows))
    if known := [row for row in rows if row["population"] is not None]:
        print(f"rounds {known[0]['rounds']:,}, delta {known[0]['delta']:g}, {known[0]['sampling']}")
        print(f"epsilon compares: {known[0]['neighbours']}")
    if "wer" in result:
        print("word error rate of the run:", result["wer"])
    for line in ledger.in_words(result.get("ledger") or {}):
        print(line)


def main() -> None:
    """The command `fedasr plan`: parses the flags, runs and exits."""
    _define_flags()
    common.main(program, __name__)


if __name__ == "__main__":
    main()
