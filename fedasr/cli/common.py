"""What the command-line programs share: flags, JSON on stdout, errors in one line.

A program is a module with a docstring, which is its help, and `main()`, which defines the flags:
not when the module is imported, for other programs have flags of the same names.
"""

import contextlib
import ctypes
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from fedasr import recipes
from fedasr.cli import aborts, exhaustion
from fedasr.errors import UserError
from fedasr.fields import bucket

# Seconds: a program that took so long to lower will take long to compile; a compilation to report.
LARGE_PROGRAM, LONG_COMPILATION = 0.3, 2.0
_TOGETHER: list[aborts.Abort] = []  # not empty: this is one of several processes
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
FAILED, MISTAKE, STOPPED = 1, 2, 3  # exit statuses, beside 0 for work done

JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line of stdout.")


def fail(message: object, status: int = MISTAKE) -> int:
    """Prints a one-line error on stderr; returns the exit status."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        print("error:", " ".join(str(message).split()), file=sys.stderr)
    return status


def main(
    program: Callable[..., int | None],
    module: str = "__main__",
    arguments: bool = False,
    urls: Sequence[str] = (),
) -> None:
    """Parses the flags, runs `program` and exits: 0 done, 2 a user's mistake, 1 anything else.

    Args:
      program: returns the exit status, or None for 0.
      module: its name, whose docstring and flags are what --help shows.
      arguments: whether the program takes a list of what is given beside flags.
      urls: names of the flags that may be a URL in cloud storage.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    app.define_help_flags()
    _adopt(module)

    def parsed() -> int | None:
        try:
            rest = flags.FLAGS(sys.argv)
        except (AttributeError, KeyError) as error:
            raise UserError(f"no such field in the configuration: {error}") from error
        _refuse_urls(urls)
        if arguments:
            for value in rest[1:]:
                if wrong := bucket(value):
                    raise UserError(f"{value} {wrong}")
            return program(rest[1:])
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: options are given as --name=value")
        return program()

    status = status_of(parsed)
    status = _flush() or status
    if _TOGETHER:
        if status not in (0, STOPPED):
            # The usual end waits for the other processes, which may wait for this one.
            os._exit(status)
        # Whoever does not come to the usual end changes nothing any more.
        _TOGETHER[0].status, _TOGETHER[0].message = status, None
    sys.exit(status)


def _refuse_urls(allowed: Sequence[str]) -> None:
    """Raises UserError if another flag is one: a folder would be made of its name."""
    for name in set(flags.FLAGS) - set(allowed):
        if name.startswith("config."):  # fields say themselves what they take
            continue
        given = flags.FLAGS[name].value
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and (wrong := bucket(value)):
                raise UserError(f"--{name}={value} {wrong}")


def status_of(program: Callable[[], int | None]) -> int:
    """Runs a program; what it raises becomes a line on stderr and an exit status.

    Returns:
      0 done, 2 a user's mistake or too little memory, threads or open files, 1 anything else.
      KeyboardInterrupt ends the process here.
    """
    exhaustion.install()
    try:
        return program() or 0
    except (UserError, flags.Error) as error:
        return fail(error)
    except KeyboardInterrupt:
        # At once: the usual end waits for threads, which may wait for a disk that hangs.
        status = fail("interrupted", STOPPED)
        _flush()
        os._exit(status)
    except BrokenPipeError:  # whoever read the result has gone
        return FAILED
    except Exception as error:
        if what := exhaustion.found(error):
            return fail(exhaustion.message(what, error))
        traceback.print_exc()
        return FAILED


def _adopt(module: str) -> None:
    """Help is about a module, as if that were the one that runs."""
    sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
    for name in (module, __name__):
        for flag in flags.FLAGS.get_key_flags_for_module(name):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _flush() -> int:
    """Whether stdout took all: 0, or the exit status if it is full or closed.

    Closed streams are replaced, so that Python does not stumble over them at its end.
    """
    status = 0
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError):
            status = FAILED if name == "stdout" else status
            setattr(sys, name, open(os.devnull, "w"))
    return status


class _ByName(flags.ArgumentParser):
    """Reads configurations by `recipes.locate`; a mistake in their arguments stays one line."""

    def __init__(self, files: flags.ArgumentParser) -> None:
        self._files = files

    def parse(self, config: str) -> Any:
        """The configuration of a name or file; see `flags.ArgumentParser`."""
        # The parser of files puts a traceback around a ValueError, absl words of its own.
        try:
            path = recipes.locate(config)
        except UserError as error:
            raise flags.Error(str(error)) from error
        try:
            return self._files.parse(path)
        except UserError as error:
            raise flags.Error(str(error.__context__)) from error

    def flag_type(self) -> str:
        """See `flags.ArgumentParser`."""
        return self._files.flag_type()


def define_config(default: str) -> Any:
    """The flag --config, with a flag for each field; exits with 2 where it cannot be read.

    Args:
      default: name of a recipe, or path of a configuration file.
    """
    try:
        from ml_collections import config_flags

        said = f"A recipe ({', '.join(recipes.NAMES)}) or a configuration file, with :ARGUMENTS."
        holder = config_flags.DEFINE_config_file("config", recipes.locate(default), said)
        flag = flags.FLAGS["config"]
        flag.parser = _ByName(flag.parser)
        return holder
    except ImportError:
        sys.exit(fail("ml_collections is missing: pip install fedasr"))
    except (AttributeError, KeyError) as error:
        # Flags are looked up in the configuration when they are defined.
        sys.exit(fail(f"no such field in the configuration: {error}"))
    except UserError as error:
        sys.exit(fail(error))


def plain_config() -> dict[str, Any]:
    """What --config and the flags of its fields say.

    Raises:
      UserError: the file cannot be read; in one line what ml_collections says in many.
    """
    try:
        return flags.FLAGS.config.to_dict()
    except OSError as error:
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error


def seeds(texts: Sequence[str]) -> list[int]:
    """The numbers of --seeds.

    Args:
      texts: of the flag.

    Raises:
      UserError: unless there is at least one and all are whole numbers.
    """
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--seeds={','.join(texts)} must be whole numbers") from error
    if not numbers:
        raise UserError("--seeds names none")
    return numbers


def show(summary: Mapping[str, Any]) -> None:
    """Prints the summary on stdout: one line of JSON with --json, else a line for each field."""
    if JSON.value:
        from fedasr.training.logging import to_json

        print(json.dumps(to_json(summary), allow_nan=False))
        return
    for key, value in summary.items():
        print(f"{key}: {value}")


def configure_devices() -> None:
    """On a CPU, one virtual device for each core: client streams beat threads within a step.

    Must run before anything uses a JAX device. `JAX_NUM_CPU_DEVICES` in the environment comes
    first.
    """
    import jax

    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return

    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)


def keep_memory() -> None:
    """Has glibc, on Linux, keep what a training step frees for the next step.

    It would give large arrays back to the system and have their pages made anew every time, which
    took up to 12% of a step's time on a CPU. A process then holds on to what it has needed once.
    Variables `MALLOC_*` in the environment come first. For programs that train; not for such as
    measure memory.
    """
    if not sys.platform.startswith("linux") or any(x.startswith("MALLOC_") for x in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, -1),
            (_M_TOP_PAD, 1 << 26),
        ):
            libc.mallopt(option, value)


def configure_compilation(folder: Path) -> None:
    """Keeps compiled programs for the next process, and says on stderr what takes long to compile.

    Args:
      folder: that holds the work directories; the programs lie in its `.compile-cache`. An own
        `JAX_COMPILATION_CACHE_DIR` comes first.
    """
    import jax

    from fedasr.training.exactness import processor
    from fedasr.training.logging import say

    settings: Any = jax.config  # its options are made when JAX is imported
    if not settings.jax_compilation_cache_dir:
        cache = folder.absolute() / ".compile-cache" / processor()
        jax.config.update("jax_compilation_cache_dir", str(cache))

    _say_once("persistent compilation cache", "compiled programs are not kept")

    def report(event: str, duration_secs: float, **said: str | int) -> None:
        fun_name = said.get("fun_name", "")
        kind = event.rsplit("/", 1)[-1]
        if kind == "jaxpr_to_mlir_module_duration" and duration_secs >= LARGE_PROGRAM:
            say(f"compiling {fun_name} ...")
        elif kind == "backend_compile_duration" and duration_secs >= LONG_COMPILATION:
            say(f"compiled {fun_name} in {duration_secs:.1f} s")

    jax.monitoring.register_event_duration_secs_listener(report)


def _say_once(text: str, meaning: str) -> None:
    """Has a warning that libraries repeat, of what may fail without harm, said in one line.

    Args:
      text: that is in it. meaning: what it comes to.
    """
    from fedasr.training.logging import say

    shown = warnings.showwarning
    told: list[Any] = []

    def show(message: Any, *args: Any, **more: Any) -> None:
        if text not in str(message):
            shown(message, *args, **more)
        elif not told:
            told.append(message)
            said = " ".join(str(message).split())
            # What failed comes behind the name of the program that was compiled.
            say(f"warning: {meaning} ({(said.partition(chr(39) + ': ')[2] or said)[:200]})")

    warnings.showwarning = show


def in_step(
    coordinator: str, processes: int | None, process: int | None, program: Callable[[], int | None]
) -> int | None:
    """Runs a program as one of several processes; ends this one when another has died.

    Args:
      coordinator, processes, process: see `fedasr.federated.hosts.initialize`; "auto" for None.
      program: the same in all of them.
    """
    from fedasr.federated import hosts
    from fedasr.federated.chunks import is_out_of_memory

    abort = aborts.Abort(FAILED, hosts.NOT_FOUND)
    abort.install()
    _TOGETHER.append(abort)
    hosts.initialize(None if coordinator == "auto" else coordinator, processes, process)
    abort.message = aborts.LOST
    import jax

    try:
        return program()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            return fail("out of memory: set a smaller chunk", FAILED)
        if not aborts.is_of_partners(error):
            raise
        return fail(aborts.lost(error), FAILED)
