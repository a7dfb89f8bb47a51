"""Who gains and who loses between two runs, and whether it is chance.

    fedasr compare RUN_A RUN_B [--split=test] [--report] [--json]

A run is a work directory of `fedasr train` that has ended, or a file that `fedasr evaluate
--hypotheses=FILE` wrote. What both have is compared, utterance by utterance: differences of users
with intervals by bootstrap over users, a sign-flip test over users, the matched-pairs test on
sentence segments (MAPSSWE), groups of users, and the users who lose most. --report writes the
report of RUN_B anew, with the users of RUN_A beside its own: both are then work directories. Exit
status: 0 when done, 2 for a mistake that the user can mend.
"""

import sys
from pathlib import Path

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError
from fedasr.fields import bucket


def run(runs: list[str]) -> None:
    """Compares and prints."""
    from fedasr.evaluation.comparison import compare, in_words
    from fedasr.evaluation.hypotheses import read_hypotheses
    from fedasr.training.logging import to_json

    if len(runs) != 2:
        raise UserError("give two runs: fedasr compare RUN_A RUN_B")
    for path in runs:
        if wrong := bucket(path):
            raise UserError(f"{path} {wrong}")
    split = flags.FLAGS.split
    found = []
    for path in runs:
        every = read_hypotheses(path)
        found.append([one for one in every if one.split == split])
        if not found[-1]:
            there = ", ".join(sorted({one.split for one in every})) or "nothing"
            raise UserError(f"--split={split}: {path} has {there}")
    result = compare(found[0], found[1])
    if flags.FLAGS.report:
        from fedasr.training.report import write_report

        print(f"report: {write_report(runs[1], runs[0])}", file=sys.stderr)
    if common.JSON.value:
        common.show(to_json(result))
    else:
        print(in_words(result, (Path(runs[0]).name, Path(runs[1]).name)))


def main() -> None:
    """The command `fedasr compare`: parses the flags, runs and exits."""
    flags.DEFINE_string("split", "test", "Which split.")
    flags.DEFINE_bool("report", False, "Write the second run's report, the first's users beside.")
    # The shared parser takes flags alone.
    runs = [value for value in sys.argv[1:] if not value.startswith("-")]
    sys.argv = [value for value in sys.argv if value not in runs]
    common.main(lambda: run(runs), __name__)


if __name__ == "__main__":
    main()
