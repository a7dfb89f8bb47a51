"""The command `fedasr`: chooses the program and hands the flags on."""

import importlib
import sys

import fedasr

PROGRAMS = {
    "train": "trains a recogniser, federated and privately or not; the quickstart without flags",
    "evaluate": "word error rates of a trained recogniser on a prepared corpus",
    "prepare": "inspects, prepares or verifies a corpus",
    "transcribe": "writes down recordings with a trained recogniser",
    "export": "a trained recogniser as a folder or an ONNX file, with a model card",
    "decode": "decodes a split into a file, such as a submission to a competition",
    "plan": "noise, cohort and population of a deployment, and its epsilon",
    "compile": "compiles a run's programs for accelerators that are not there",
    "audit": "attacks the round code: a lower bound on epsilon beside the claim",
    "attack": "attacks on a run's updates and model: success beside chance and epsilon's bound",
    "compare": "who gains and who loses between two runs, and whether it is chance",
    "sweep": "runs tables or grids of trainings and collects the results",
    "fuse": "merges trained models",
}
_HELP = ("help", "--help", "-h", "-?")


def usage() -> str:
    """What there is, for people."""
    from fedasr import recipes

    width = max(map(len, PROGRAMS))
    return "\n".join(
        [
            "usage: fedasr PROGRAM [--flag=value ...]",
            "",
            *(f"  {name:{width}}  {what}" for name, what in PROGRAMS.items()),
            "",
            "fedasr PROGRAM --help lists its flags. Recipes for --config=NAME[:ARGUMENTS]:",
            f"  {', '.join(recipes.NAMES)}",
        ]
    )


def main() -> None:
    """Runs the program that the first argument names; exits with its status, or 2 for a mistake."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in _HELP:
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(f"fedasr {fedasr.__version__}")
        sys.exit(0)
    if name not in PROGRAMS:
        from fedasr.cli.common import fail

        what = f"there is no program {name!r}" if name else "which program?"
        sys.exit(fail(f"{what}: fedasr {'|'.join(PROGRAMS)} --flags; fedasr --help says more"))
    sys.argv = [f"fedasr {name}", *sys.argv[2:]]
    importlib.import_module(f"fedasr.cli.{name}").main()
