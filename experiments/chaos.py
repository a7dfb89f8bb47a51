"""Runs a tiny training under random faults, again and again, until so many have happened.

    python -m experiments.chaos [--faults=100] [--seed=0] [--workdir=DIR] [--json]

Every run must end with the parameters of one that was left alone, bit for bit, or be refused in one
line that names a file and what to do about it; the script then does that and goes on. Anything else
(a traceback, another result, a process that hangs) is counted as a failure and printed. Every other
run keeps its best state. Faults:

    kill         kill -9 at a random moment
    stop         SIGTERM, which has to end in a checkpoint and status 3
    full         no room on the disk from a random moment on
    read_only    the disk takes nothing any more, not even in files that are open
    broken       it answers with errors of the device (EIO)
    slow         every call that writes takes 20 ms longer; half of the runs are killed in it
    clock        the clock jumps by up to a day, forwards or backwards
    memory       there is less memory than a run takes: the kernel kills it, or, half of the time, a
                 limit (as of ulimit -v) has its allocations fail from a random moment on
    files        likewise it may open a few files more, and no others (as of ulimit -n)
    garble       some bytes of a file in the work directory change while nothing runs
    cut          a file is cut off
    lose         a file is deleted

Those of disks are for root, who may mount a small tmpfs, and a C compiler: see `chaos_disk.c`.
What cannot be is left out and said so. Exit status: 0 if there was no failure, 1 otherwise, 2 for a
mistake that the user can mend.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError

KINDS = (
    *("kill", "stop", "full", "read_only", "broken", "slow"),
    *("clock", "memory", "files", "garble", "cut", "lose"),
)
_OF_FILES = ("garble", "cut", "lose")
_NEED_ROOT = ("full",)
_NEED_COMPILER = {"read_only": "r", "broken": "i", "slow": "s"}  # what `chaos_disk.c` is told
# What passes by itself: the refusal names no file, and the same command goes on.
_PASSING = ("full", *_NEED_COMPILER, "memory", "files")
_REMEDIES = ("disk", "room", "mend", "memory", "threads", "open files")
LONGEST = 600.0  # seconds that a process may take: then it hangs
_SIZE = "64m"  # of the small disk


def tiny_corpus(folder: Path) -> Path:
    """Half a second of noise for each of 4 training users and one other."""
    import numpy as np

    from fedasr.data.preparation.prepare import prepare
    from fedasr.data.utterances import Utterance

    noise = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    utterances = [
        Utterance(f"{split}-{user}", f"{split}-{user}", "one two", split, lambda: noise)
        for split, users in {"seed": 1, "train": 4, "dev": 1}.items()
        for user in range(users)
    ]
    prepare(utterances, folder, name="noise")
    return folder


def tiny_config(corpus: Path, best: bool = False) -> dict[str, Any]:
    """Two steps of a seed and six rounds with privacy, LAMB and a checkpoint every other round.

    With `best`, the state that is best on "dev" is kept.
    """
    from fedasr.training.config import default_config
    from fedasr.training.logging import to_json

    config = default_config()
    config.data.dir, config.data.eval = str(corpus), ("dev",)
    config.model.options.update(dim=8, blocks=1, heads=2, mlp=8, kernel=3)
    config.rounds, config.cohort = 6, 2
    config.client.steps, config.client.batch_size = 1, 2
    config.seed_training.steps, config.seed_training.batch_size = 2, 2
    config.checkpoint.every, config.checkpoint.seed_every = 2, 1
    config.evaluation.every = 3
    config.privacy.sampler, config.privacy.deployments = "fixed", ()
    if best:
        config.evaluation.every, config.selection.split = 1, "dev"
    return to_json(config.to_dict())


def _child(
    config: Mapping[str, Any],
    workdir: str,
    log: str,
    jump: tuple[float, float],
    disk: str,
    plant: Callable[[], None] | None = None,
) -> None:
    """A run in a process of its own, as `experiments.train` would end it.

    Args:
      config, workdir: of the run.
      log: file for stdout and stderr.
      jump: of the clock: (seconds from now, seconds that it jumps by).
      disk: that must be known to what was preloaded; "" for nothing preloaded.
      plant: breaks the program first; a function of a module, so that this process finds it.
    """
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    told, then = time.time, time.monotonic() + jump[0]
    time.time = lambda: told() + (jump[1] if time.monotonic() >= then else 0.0)
    from fedasr.training import loop

    if plant is not None:
        plant()

    def program() -> int | None:
        if os.environ.get("CHAOS_DISK", "") != disk:
            raise RuntimeError("processes are forked from one that knows of no faults")
        try:
            summary = loop.run(config, workdir)
        except loop.Interrupted as error:
            return common.fail(error, common.STOPPED)
        return None if summary["status"] == "completed" else common.FAILED

    status = common.status_of(program)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def source() -> str:
    """A hash of the program as it lies on the disk now."""
    from fedasr.training import exactness

    return exactness.source.__wrapped__()


class _MemoryGroup:
    """A control group of the kernel that bounds the memory of a process, if one can be made.

    What it had before it joins is not counted, so what it is forked from does not matter.
    """

    _LIMITS = ("memory.max", "memory.limit_in_bytes")
    _PEAKS = ("memory.peak", "memory.max_usage_in_bytes")

    def __init__(self) -> None:
        self.folder: Path | None = None
        for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
            folder = root / f"fedasr-chaos-{os.getpid()}"
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
                if self._file(folder, self._LIMITS) and self._file(folder, self._PEAKS):
                    self.folder = folder
                    return
                folder.rmdir()

    @staticmethod
    def _file(folder: Path, names: tuple[str, ...]) -> Path | None:
        return next((folder / name for name in names if (folder / name).exists()), None)

    def join(self, pid: int, limit: int | None) -> bool:
        """Moves a process in, with so many bytes; None for all there are. Whether that worked."""
        if self.folder is None:
            return False
        path = self._file(self.folder, self._LIMITS)
        everything = "max" if path and path.name == "memory.max" else "-1"
        try:
            path.write_text(everything if limit is None else str(limit))  # type: ignore[union-attr]
            (self.folder / "cgroup.procs").write_text(str(pid))
        except (OSError, AttributeError):
            return False
        return True

    def peak(self) -> int:
        """The most that its processes have had; 0 if that is not known."""
        path = self.folder and self._file(self.folder, self._PEAKS)
        return int(path.read_text()) if path else 0

    def close(self) -> None:
        """Removes the group, which is empty by now."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


class Chaos:
    """Runs and faults in one folder.

    Args:
      folder: for the corpus, the reference and the runs.
      seed: of the faults.
      kinds: of the faults; what cannot be here is left out.
      say: told of every fault and of failures.

    Attributes:
      plant: breaks the program in the processes to come (see `_child`), so that what is there to be
        noticed can be seen to be noticed; None for the program as it is.
    """

    plant: Callable[[], None] | None = None

    def __init__(
        self,
        folder: Path,
        seed: int,
        kinds: tuple[str, ...] = KINDS,
        say: Callable[[str], None] = print,
    ) -> None:
        from fedasr.training.checkpoint import restore_params

        self._source, self._cores = source(), os.sched_getaffinity(0)
        self._random = random.Random(seed)
        self._folder, self._say = folder, say
        self._disk, self._told = folder / "disk", folder / "fault"
        self._disk.mkdir(parents=True, exist_ok=True)
        self._mounted, self._memory = self._mount(), _MemoryGroup()
        self._preloaded = self._preload(folder) if self._mounted else ""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["fedasr.training.loop", "orbax.checkpoint", "tensorboardX"]
        )
        self._fork_with_faults()
        impossible: tuple[str, ...] = () if self._mounted else _NEED_ROOT
        impossible += () if self._preloaded else tuple(_NEED_COMPILER)
        if left := [kind for kind in kinds if kind in impossible]:
            say(f"left out, which needs root and a C compiler: {', '.join(left)}")
        self.kinds = tuple(kind for kind in kinds if kind not in impossible)
        self.results: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self._story: list[str] = []  # faults of the run under way, and how each ended
        self._workdir: Path | None = None
        corpus = tiny_corpus(folder / "corpus")
        # Runs take turns.
        self._configs = [tiny_config(corpus, best) for best in (False, True)]
        self._seconds, self._turn = LONGEST, 0
        self._wholes = []
        for self._turn, name in ((0, "compiled"), (0, "whole"), (1, "best")):
            status, errors = self._run(folder / name)
            if status:
                raise UserError(f"the run without faults failed: {errors[-300:]}")
            if name != "compiled":
                self._wholes.append(restore_params(folder / name))

    def _preload(self, folder: Path) -> str:
        """The library with the faults of disks; "" if it cannot be made."""
        source, made = Path(__file__).with_name("chaos_disk.c"), folder / "chaos_disk.so"
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return str(made)

    def _fork_with_faults(self) -> None:
        """Starts what all processes are forked from, where the library is preloaded."""
        ours = {}
        if self._preloaded:
            ours = {"LD_PRELOAD": self._preloaded, "CHAOS_DISK": str(self._disk)}
            ours["CHAOS_FAULT"] = str(self._told)
        os.environ.update(ours)
        forkserver.ensure_running()
        for name in ours:
            del os.environ[name]

    def close(self) -> None:
        """Gives the small disk and the group of memory back."""
        self._memory.close()
        if self._mounted:
            subprocess.run(["umount", str(self._disk)], check=False)

    def __enter__(self) -> "Chaos":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _mount(self) -> bool:
        if os.geteuid():
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(self._disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def run(self, faults: int) -> None:
        """Lets so many faults happen, over as many runs as that takes."""
        number = 0
        while sum(self.results.values()) < faults:
            workdir = self._disk / f"run [{number}]"  # a path that has to be taken literally
            self._workdir, self._story = workdir, []
            self._turn = number % len(self._configs)
            number += 1
            finished = False
            for _ in range(12):
                if sum(self.results.values()) >= faults:
                    break
                if finished := self._fault(workdir, self._random.choice(self.kinds)):
                    break
            if not finished:
                self._finish(workdir, "no more faults")
            shutil.rmtree(workdir, ignore_errors=True)

    def _fault(self, workdir: Path, kind: str) -> bool:
        """One fault; whether the run has got to its end."""
        before = len(self.failures)
        if kind in _OF_FILES:
            if not workdir.exists():  # half of a run to hurt
                process, log = self._start(workdir)
                process.join(0.6 * self._seconds)
                process.kill()
                self._end(process, log)
            hurt = self._hurt(workdir, kind)
            if hurt is None:  # it was too early
                kind = "kill"
            else:
                status, errors = self._run(workdir)
                outcome = self._judge(workdir, kind, hurt, status, errors)
                self._count(kind, hurt, outcome if len(self.failures) == before else "failed")
                return outcome != "resumed"
        moment, jump = self._random.uniform(0, self._seconds), (0.0, 0.0)
        if kind == "clock":
            jump = (moment, self._random.uniform(-86_400, 86_400))
        process, log = self._start(workdir, jump)
        if kind != "clock":
            self._during(kind, process, moment)
        status, errors = self._end(process, log)
        self._mend()
        outcome = self._judge(workdir, kind, "", status, errors)
        self._count(kind, "", outcome if len(self.failures) == before else "failed")
        return outcome == "identical"

    def _count(self, kind: str, hurt: str, end: str) -> None:
        """Counts a fault, and tells of it."""
        told = f"{kind} {hurt}".strip() + f": {end}"
        self._story.append(told)
        self.results[kind, end] += 1
        self._say(f"{sum(self.results.values())}. {told}")

    def _during(self, kind: str, process: Any, moment: float) -> None:
        """Does to a process what a fault does, so many seconds after its start."""
        if kind == "memory" and self._random.random() < 0.5:
            limit = int(self._random.uniform(0.1, 1.0) * self._memory.peak())
            if limit and self._memory.join(process.pid, limit):
                return
        process.join(moment)
        if kind == "kill":
            process.kill()
        elif kind == "stop" and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
        elif kind == "full":
            self._fill()
        elif kind == "memory":
            self._bound(process.pid, self._random.randrange(64 << 20))
        elif kind == "files":
            self._bound_files(process.pid, self._random.randrange(4))
        elif kind in _NEED_COMPILER:
            self._told.write_text(_NEED_COMPILER[kind])
            if kind == "slow" and self._random.random() < 0.5:
                process.join(self._random.uniform(0, self._seconds))
                process.kill()

    def _bound(self, pid: int, more: int) -> None:
        """A process gets so many more bytes of addresses, and no others."""
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            has = pages * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (has + more, has + more))

    def _bound_files(self, pid: int, more: int) -> None:
        """A process may open so many more files, and no others."""
        with contextlib.suppress(OSError, ValueError):
            used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
            # Of the numbers that are free the lowest are given out first.
            most = sorted(set(range(len(used) + 5)) - used)[more] + 1
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))

    def _judge(self, workdir: Path, kind: str, hurt: str, status: int | None, errors: str) -> str:
        """ "identical", "resumed" (to be gone on with) or "refused", after doing what was said."""
        where = f"{kind} {hurt}".strip()
        if status is None:
            self._fail(f"{where}: hangs")
        elif source() != self._source:
            # It is read by every process anew, and one that has old and new parts is neither.
            raise UserError("the program's source has changed since: start again, in a copy")
        elif "Traceback" in errors:
            self._fail(f"{where}: a traceback, status {status}: {errors[-1500:]}")
        elif status == 0:
            self._compare(workdir, where)
            return "identical"
        elif status == common.MISTAKE:
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            if len(lines) != 1:
                self._fail(f"{where}: {len(lines)} lines of errors: {errors[-500:]}")
            elif kind in _PASSING:
                if not any(word in lines[0] for word in _REMEDIES):
                    self._fail(f"{where}: no remedy in: {lines[0]}")
            else:
                self._obey(workdir, where, lines[0])
                self._finish(workdir, where)
            return "refused"
        elif status == -signal.SIGABRT and kind == "memory":
            pass  # C++ libraries end the process when there is no memory
        elif status not in (common.STOPPED, -signal.SIGKILL, -signal.SIGTERM):
            self._fail(f"{where}: status {status}: {errors[-500:]}")
        return "resumed"

    def _obey(self, workdir: Path, where: str, line: str) -> None:
        """Removes what a refusal says is to be removed, if it is in the work directory."""
        # The paths have a space and brackets.
        pattern = re.escape(str(workdir)) + r"(/[^\s:;,()]+)"
        found = re.findall(pattern, line.rpartition("remove ")[2]) or re.findall(pattern, line)
        if "remove" not in line or not found:
            self._fail(f"{where}: neither a file nor a remedy in: {line}")
            return
        path = workdir / found[0].lstrip("/")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _finish(self, workdir: Path, where: str) -> None:
        """Runs to the end without a fault."""
        status, errors = self._run(workdir)
        if status:
            self._fail(f"{where}: then status {status}: {errors[-1500:]}")
        else:
            self._compare(workdir, where)

    def _compare(self, workdir: Path, where: str) -> None:
        import jax
        import numpy as np

        from fedasr.training.checkpoint import restore_params
        from fedasr.training.logging import read_metrics

        try:
            found = restore_params(workdir)
        except UserError as error:
            # A finished run says so, whatever became of its checkpoints; they are not its result.
            if "cannot be read" not in str(error) and "no checkpoint" not in str(error):
                self._fail(f"{where}: {error}")
            return
        whole = self._wholes[self._turn]
        same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), found, whole)
        if not all(jax.tree.leaves(same)):
            names = [p for p, x in jax.tree_util.tree_leaves_with_path(same) if not x]
            most = max(
                float(np.abs(np.float64(a) - b).max())
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True)
            )
            self._fail(f"{where}: other parameters, in {len(names)} arrays, by up to {most:g}")
        rounds = [r.get("round") for r in read_metrics(workdir) if "round" in r]
        if len(rounds) != len(set(rounds)) and "metrics.jsonl" not in where:
            self._fail(f"{where}: a round is logged twice")
        with contextlib.suppress(OSError, ValueError, KeyError):
            summary = json.loads((workdir / "summary.json").read_text())
            if not np.isfinite(summary["wer"]["dev"]):
                self._fail(f"{where}: no error rate")

    def _fail(self, what: str) -> None:
        """Counts a failure; what led to it is told, and the run kept to look at."""
        what = f"{what} (before: {', '.join(self._story) or 'nothing'})"
        if self._workdir is not None and self._workdir.exists():
            kept = self._folder / f"failed-{len(self.failures)}"
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(self._workdir, kept)
        self.failures.append(what)
        self._say(f"FAILED: {what}")

    def _hurt(self, workdir: Path, kind: str) -> str | None:
        files = sorted(p for p in workdir.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            return None
        path = self._random.choice(files)
        data = bytearray(path.read_bytes())
        if kind == "lose":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(data[: self._random.randrange(len(data) + 1)])
        elif data:
            for _ in range(self._random.randint(1, 8)):
                data[self._random.randrange(len(data))] = self._random.randrange(256)
            path.write_bytes(data)
        return str(path.relative_to(workdir))

    def _start(self, workdir: Path, jump: tuple[float, float] = (0.0, 0.0)) -> tuple[Any, Path]:
        log = self._folder / "log.txt"
        log.write_bytes(b"")
        disk = str(self._disk) if self._preloaded else ""
        process = self._context.Process(
            target=_child,
            args=(self._configs[self._turn], str(workdir), str(log), jump, disk, self.plant),
        )
        process.start()
        if os.sched_getaffinity(process.pid) != self._cores:
            process.kill()
            raise UserError("processes were moved to other cores, whose number bits follow from")
        self._memory.join(process.pid, None)
        return process, log

    def _end(self, process: Any, log: Path) -> tuple[int | None, str]:
        process.join(LONGEST)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        return status, log.read_text(errors="replace")

    def _run(self, workdir: Path) -> tuple[int | None, str]:
        fresh, began = not workdir.exists(), time.monotonic()
        status, errors = self._end(*self._start(workdir))
        if fresh and status == 0:  # the first one compiles, which the others find done
            self._seconds = min(self._seconds, time.monotonic() - began)
        return status, errors

    def _fill(self) -> None:
        with contextlib.suppress(OSError), (self._disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 14))

    def _mend(self) -> None:
        self._told.unlink(missing_ok=True)
        (self._disk / "filler").unlink(missing_ok=True)


def table(results: Mapping[tuple[str, str], int]) -> list[str]:
    """Lines of Markdown: how the faults of each kind ended."""
    ends = ("identical", "resumed", "refused", "failed")
    lines = ["| fault | " + " | ".join(ends) + " |", "|---" * (len(ends) + 1) + "|"]
    for kind in KINDS:
        counts = [results.get((kind, end), 0) for end in ends]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    return lines


def program() -> int | None:
    """Does what the flags ask for."""
    values = flags.FLAGS
    with contextlib.ExitStack() as stack:
        folder = values.workdir
        if not folder:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedasr-chaos-"))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "compile-cache"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # a process's start is all
        chaos = stack.enter_context(
            Chaos(Path(folder), values.seed, say=lambda text: print(text, file=sys.stderr))
        )
        chaos.run(values.faults)
        if common.JSON.value:
            results = {f"{kind} {end}": count for (kind, end), count in chaos.results.items()}
            common.show({"results": results, "failures": chaos.failures})
        else:
            print("\n".join(table(chaos.results)))
        return common.FAILED if chaos.failures else None


if __name__ == "__main__":
    flags.DEFINE_integer("faults", 100, "How many are to happen.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the faults.")
    flags.DEFINE_string("workdir", "", "Where all of it happens; default: a temporary folder.")
    common.main(program)
