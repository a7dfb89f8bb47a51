"""Prints setup.py's lower bounds as pins, for a test with the oldest versions it takes."""

import re
import sys
from pathlib import Path
from unittest import mock

import setuptools

EXTRAS = ("speech", "quickstart")


def main() -> None:
    """Lines such as jax==0.8."""
    root = Path(__file__).parents[1]
    with mock.patch.object(setuptools, "setup") as setup:
        exec(compile((root / "setup.py").read_text(), str(root / "setup.py"), "exec"), {
            "__file__": str(root / "setup.py"), "__name__": "__main__"
        })  # fmt: skip
    declared = setup.call_args.kwargs
    wanted = [*declared["install_requires"]]
    for extra in EXTRAS:
        wanted += declared["extras_require"][extra]
    pins = {re.sub(r">=", "==", line.split(";")[0].strip()) for line in wanted}
    if bad := [pin for pin in pins if "==" not in pin]:
        sys.exit(f"no lower bound: {bad}")
    print("\n".join(sorted(pins)))


if __name__ == "__main__":
    main()
