"""Runs programs as far as their flags, each in a process forked from this one.

stdin is a list of commands in JSON ([[module, flag, ...], ...]); stdout is a line of JSON for each:
[exit status, what it printed on stderr], in which 0 says that the program took its flags.
"""

import contextlib
import io
import json
import os
import runpy
import sys

from absl import flags

TAKEN = 0
LISTS = {"experiments.transcribe"}  # take files beside flags


def take(module, arguments):
    """Becomes the program until it has parsed its flags; returns the exit status."""
    parse = flags.FlagValues.__call__

    def parse_only(values, argv, known_only=False):
        rest = parse(values, argv, known_only)
        if len(rest) > 1 and module not in LISTS:
            return rest  # the program refuses them
        if module == "experiments.train":
            from fedasr.training.config import check_fields

            check_fields(values["config"].value.to_dict())
        raise SystemExit("taken")

    flags.FlagValues.__call__ = parse_only
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return TAKEN if end.code == "taken" else int(end.code or 1)
    return 1  # it never parsed any


def main():
    from fedasr.training import config

    config.check_fields(config.default_config().to_dict())  # imports what many programs do
    for module, *arguments in json.load(sys.stdin):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            status, errors = 1, io.StringIO()
            try:
                with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
                    status = take(module, arguments)
            except BaseException as error:  # a program or configuration that is not there
                errors.write(repr(error))
            os.write(write, json.dumps([status, errors.getvalue()[-2000:]]).encode())
            os._exit(0)  # without the end of an interpreter that holds much
        os.close(write)
        with open(read) as answer:
            print(answer.read(), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
