"""A few random faults; `python -m experiments.chaos` has many. And what that would not overlook."""

import shutil
import time
from multiprocessing import forkserver

import pytest

from experiments import chaos as chaos_lib
from experiments.chaos import Chaos


@pytest.fixture
def own_forkserver(monkeypatch):
    """Processes of other tests are not to be forked from one with this one's environment."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.long  # moments are random, and too little memory has ended in a traceback
def test_a_few_faults_of_every_kind(own_forkserver, tmp_path):
    said = []
    with Chaos(tmp_path, seed=0, say=said.append) as chaos:
        chaos.run(6)
        assert not chaos.failures, chaos.failures
        assert sum(chaos.results.values()) == 6


# What follows runs in processes that `experiments.chaos` starts, before the training does.


def a_round_is_lost():
    """A resumed run goes on after the round that it should do."""
    from fedasr.training.checkpoint import Checkpointer

    real = Checkpointer.restore

    def restore(self, *args):
        state, metadata = real(self, *args)
        return state._replace(round=state.round + 1), metadata

    Checkpointer.restore = restore


def the_noise_begins_anew():
    """A resumed run draws the noise of its first rounds again."""
    import jax
    import numpy as np

    from fedasr.training.checkpoint import Checkpointer

    real = Checkpointer.restore

    def restore(self, *args):
        state, metadata = real(self, *args)

        def zeroed(path, x):
            counts = np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.integer)
            return x * 0 if counts else x

        opt_state = jax.tree_util.tree_map_with_path(zeroed, state.opt_state)
        return state._replace(opt_state=opt_state), metadata

    Checkpointer.restore = restore


def checkpoints_are_not_checked():
    """What is read is taken for what was saved."""
    from fedasr.training import stored

    stored.read_checksums = lambda folder: None


def a_traceback():
    """A resumed run meets an error of ours."""
    from fedasr.training.checkpoint import Checkpointer

    def restore(self, *args):
        raise RuntimeError("planted")

    Checkpointer.restore = restore


def a_refusal_without_a_remedy():
    """A resumed run is refused, and nobody knows what to do."""
    from fedasr.errors import UserError
    from fedasr.training.checkpoint import Checkpointer

    def restore(self, *args):
        raise UserError("this cannot be")

    Checkpointer.restore = restore


def a_run_that_hangs():
    """It never ends."""
    time.sleep(1_000)


def nothing():
    """The program as it is: to see that the others are noticed for what they do."""


PLANTED = {
    nothing: "",
    a_round_is_lost: "other parameters",
    the_noise_begins_anew: "other parameters",
    checkpoints_are_not_checked: "other parameters",
    a_traceback: "a traceback",
    a_refusal_without_a_remedy: "neither a file nor a remedy",
    a_run_that_hangs: "hangs",
}


@pytest.mark.long
def test_what_is_broken_in_the_program_is_noticed(own_forkserver, tmp_path, monkeypatch):
    """Each in a run that was killed before its end, and goes on from what is left of it."""
    with Chaos(tmp_path, seed=0, kinds=("garble",), say=lambda text: None) as chaos:
        chaos._turn = 0
        for plant, words in PLANTED.items():
            workdir = chaos._workdir = chaos._disk / plant.__name__
            shutil.copytree(tmp_path / "whole", workdir)
            (workdir / "summary.json").unlink()
            *_, older, newest = sorted(int(f.name) for f in (workdir / "checkpoints").iterdir())
            newest, older = (workdir / "checkpoints" / str(x) for x in (newest, older))
            if plant in (nothing, checkpoints_are_not_checked):  # it is read, and is another
                shutil.rmtree(older / "state")
                shutil.copytree(newest / "state", older / "state")
            shutil.rmtree(newest)
            monkeypatch.setattr(chaos_lib, "LONGEST", 5.0 if plant is a_run_that_hangs else 600.0)
            chaos.plant, before = plant, len(chaos.failures)
            status, errors = chaos._run(workdir)
            chaos.plant = None
            chaos._judge(workdir, "garble", "state", status, errors)
            found = chaos.failures[before:]
            assert any(words in failure for failure in found) if words else not found, (
                plant.__name__,
                found,
                errors[-2000:],
            )
            shutil.rmtree(workdir)
