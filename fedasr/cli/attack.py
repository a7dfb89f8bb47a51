"""Attacks a run: what somebody could learn of its users, beside chance and what epsilon allows.

    fedasr attack --workdir=DIR [--attacks=speaker,attribute,names,membership,inversion]
                  [--noise=Z,Z,...] [--users=N] [--rounds=R] [--shadows=N] [--seed=S] [--json]

`speaker` names who sent an update, `attribute` what they are like, `inversion` what they said it
like; these see single updates, as the server would release them. `names` looks for planted names
in the model, `membership` for who took part in short trainings from the run's model; these see the
model. All use the run's own code for clients, clipping and noise. --noise lists multipliers, the
noise on the sum over the clip norm; by default none, the run's own, and those of its deployments.
A success whose 95% interval begins above its bound says that the noise is not what it claims.

Writes `attacks.json` and the report into the work directory. At the quickstart's size all of them
take minutes. Exit status: 0 when no bound is passed, 1 when one is, 2 for a mistake that the user
can mend.
"""

import json
import time
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError

ATTACKS_FILE = "attacks.json"


def noise_of(config: Any) -> tuple[float, ...]:
    """What is tried by default: no noise, the simulation's, and that of each deployment."""
    sigma = config.privacy.sigma if config.privacy.enabled else 0.0
    cohorts = [config.cohort, *(cohort for cohort, _ in config.privacy.deployments)]
    return tuple(sorted({0.0, *(float(f"{sigma * cohort:.4g}") for cohort in cohorts)}))


def _noise(texts: list[str]) -> tuple[float, ...]:
    try:
        found = tuple(float(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--noise={','.join(texts)} must be numbers from 0") from error
    if not all(0 <= z < 1e6 for z in found):
        raise UserError(f"--noise={','.join(texts)} must be numbers from 0 to a million")
    return found


def run() -> int | None:
    """Attacks and prints; returns the exit status if not 0."""
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is needed: the folder of a run")
    common.configure_devices()
    workdir = Path(flags.FLAGS.workdir)
    common.configure_compilation(workdir.parent)
    from fedasr import attacks
    from fedasr.training.logging import say, to_json, write_json_atomic
    from fedasr.training.report import write_report

    wanted = flags.FLAGS.attacks or list(attacks.ATTACKS)
    if unknown := [name for name in wanted if name not in attacks.ATTACKS]:
        raise UserError(f"--attacks={unknown[0]}: there are {', '.join(attacks.ATTACKS)}")
    target = attacks.load_target(workdir)
    noise = noise_of(target.config) if not flags.FLAGS.noise else _noise(flags.FLAGS.noise)
    settings = attacks.Settings(
        users=flags.FLAGS.users,
        noise=noise,
        draws=flags.FLAGS.draws,
        rounds=flags.FLAGS.rounds,
        shadows=flags.FLAGS.shadows,
        candidates=flags.FLAGS.candidates,
        seed=flags.FLAGS.seed,
    )
    found: list[Any] = []
    for name in wanted:
        began = time.monotonic()
        found += attacks.ATTACKS[name](target, settings)
        say(f"{name}: {time.monotonic() - began:.0f} s")
    # Read now: others may have been tried meanwhile.
    records = [*_earlier(workdir, wanted), *(one.record() for one in found)]
    write_json_atomic(workdir / ATTACKS_FILE, to_json({"results": records}))
    write_report(workdir)
    if common.JSON.value:
        common.show({"results": [one.record() for one in found]})
    else:
        print("\n".join(lines(found)))
    exposed = [one for one in found if one.exceeds]
    if not exposed:
        return None
    return common.fail(
        f"{exposed[0].attack}, {exposed[0].setting}: success of at least "
        f"{exposed[0].interval[0]:.3g} where the claimed noise allows {exposed[0].bound:.3g}: the "
        "code has less privacy than it says",
        common.FAILED,
    )


def _earlier(workdir: Path, wanted: list[str]) -> list[dict[str, Any]]:
    """Results of attacks that are not tried again."""
    try:
        rows = json.loads((workdir / ATTACKS_FILE).read_text(encoding="utf-8"))["results"]
        return [row for row in rows if str(row["attack"]).split()[0] not in wanted]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def lines(found: list[Any]) -> list[str]:
    """The results for people."""
    head = f"{'attack':20}{'setting':16}{'success':>9}{'95% interval':>18}{'chance':>8}{'bound':>8}"
    rows = [
        f"{one.attack:20}{one.setting:16}{one.success:9.1%}"
        f"{f'{one.interval[0]:.1%} to {one.interval[1]:.1%}':>18}{one.chance:8.1%}{one.bound:8.1%}"
        for one in found
    ]
    return [head, *rows]


def main() -> None:
    """The command `fedasr attack`: parses the flags, runs and exits."""
    flags.DEFINE_string("workdir", None, "Of the run.")
    flags.DEFINE_list("attacks", None, "Which; default all.")
    flags.DEFINE_list("noise", None, "Noise multipliers to try.")
    flags.DEFINE_integer("users", 32, "Targets.", lower_bound=2)
    flags.DEFINE_integer("draws", 2, "Of the noise on each update.", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "Of a training that is observed.", lower_bound=1)
    flags.DEFINE_integer("shadows", 8, "Trainings of the attack on membership.", lower_bound=4)
    flags.DEFINE_integer("candidates", 50, "Names among which one is looked for.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of all that is drawn.", lower_bound=0)
    common.main(run, __name__)


if __name__ == "__main__":
    main()
