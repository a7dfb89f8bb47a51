"""Round trips, misfits and kill -9 at random moments."""

import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.errors import UserError
from fedasr.training.checkpoint import Checkpointer, read_metadata, restore_params

pytest.importorskip("orbax.checkpoint")


class State(NamedTuple):
    """A state with every kind of leaf and container that training uses."""

    round: jax.Array
    params: dict
    opt_state: optax.OptState
    ledger: tuple
    seed: int
    users: np.ndarray


def make_state(seed: int = 0, width: int = 3) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "dense": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
            "norm": {"scale": jnp.asarray(rng.normal(size=(width,)), jnp.bfloat16)},
        },
        "head": {"bias": jnp.asarray([np.nan, -0.0, 1e-45, np.inf], jnp.float32)},
    }
    optimizer = optax.chain(optax.lamb(1e-3), optax.clip_by_global_norm(1.0))
    return State(
        round=jnp.int32(seed),
        params=params,
        opt_state=optimizer.init(params),
        ledger=(jnp.asarray(True), {"counts": jnp.arange(5, dtype=jnp.uint32)}),
        seed=2**40 + seed,
        users=rng.integers(2**62, size=7),
    )


def bits(tree) -> list:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (str(path), type(leaf).__name__, np.asarray(leaf).dtype, np.asarray(leaf).tobytes())
        for path, leaf in leaves
    ]


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(1, state, {"model": {"width": 3}, "note": "ä"})
        assert checkpoints.latest_step() == 1
    with Checkpointer(tmp_path) as checkpoints:
        restored, metadata = checkpoints.restore(1, like=make_state(2))
    assert metadata == {"model": {"width": 3}, "note": "ä"}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_restores_into_abstract_structure(tmp_path):
    state = make_state(1)._replace(seed=jnp.int32(7))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored, _ = checkpoints.restore(0, like=abstract)
    assert bits(restored) == bits(state)
    assert isinstance(restored.opt_state[0][0], optax.ScaleByAdamState)


def test_restores_to_the_sharding_of_like(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    state = {"params": jax.device_put(jnp.arange(3.0), sharding), "free": jnp.ones(2)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored, _ = checkpoints.restore(0, like=state)
    assert restored["params"].committed and restored["params"].sharding == sharding
    assert not restored["free"].committed


def test_saved_state_may_change_after_the_call(tmp_path):
    state = {"params": np.zeros(1000)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        state["params"][:] = 1.0
        assert not checkpoints.restore(0, like=state)[0]["params"].any()


def test_keeps_the_latest_and_saves_a_step_once(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (0, 3, 5, 11):
            checkpoints.save(step, {"params": np.full(3, step)}, {"step": step})
        checkpoints.save(11, {"params": np.full(3, -1)}, {"step": -1})
        with pytest.raises(ValueError, match="checkpoint 6 cannot follow checkpoint 11"):
            checkpoints.save(6, {"params": np.zeros(3)}, {})
        assert checkpoints.restore(11, like={"params": np.zeros(3, int)})[1] == {"step": 11}
    assert sorted(int(f.name) for f in tmp_path.iterdir()) == [5, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s._replace(params=make_state(width=4).params),
            r"shape of params/encoder/dense/kernel is \(4, 3\) in it, \(4, 4\) in the model",
        ),
        (
            lambda s: s._replace(round=np.int64(0)),
            "dtype of round is int32 in it, int64 in the model",
        ),
        (
            lambda s: s._replace(opt_state=optax.adagrad(1.0).init(s.params)),
            "it has no opt_state/0/sum_of_squares/encoder/dense/kernel",
        ),
        (lambda s: s._replace(opt_state=()), "the model has no opt_state/0/0/count"),
    ],
)
def test_misfit_names_the_leaf(tmp_path, change, message):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, make_state(), {})
        with pytest.raises(UserError, match=message):
            checkpoints.restore(0, like=change(make_state()))


def test_params_and_metadata_without_the_model(tmp_path):
    state = make_state(4)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(9, make_state(3), {"model": "a"})
        checkpoints.save(10, state, {"model": "b"})
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "10"):
        params = restore_params(path)
        assert read_metadata(path) == {"model": "b"}
        assert bits(jax.tree.map(jnp.asarray, params)) == bits(state.params)
        assert type(params) is type(params["encoder"]["norm"]) is dict
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "seed")
    assert read_metadata(tmp_path / "seed") == {"model": "b"}
    assert read_metadata(str(tmp_path)) == {"model": "a"}


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_params(tmp_path / "absent")
    with pytest.raises(UserError, match="at least one"):
        Checkpointer(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another work directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with Checkpointer(tmp_path / "run") as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(0, {"weights": np.ones(2)}, {"bad": object()})
        with pytest.raises(UserError, match="there is no checkpoint 0"):
            checkpoints.restore(0, like={"weights": np.ones(2)})
        checkpoints.save(0, {"weights": np.ones(2)}, {})
        checkpoints.wait()
        with pytest.raises(UserError, match="no model parameters"):
            restore_params(tmp_path / "run")
        (tmp_path / "run" / "0" / "state" / "manifest.ocdbt").write_bytes(b"torn")
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.restore(0, like={"weights": np.ones(2)})


@pytest.mark.parametrize("torn", ["commit_success.txt", "_CHECKPOINT_METADATA", "state", None])
def test_unfinished_checkpoints_are_ignored_and_removed(tmp_path, torn):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.zeros(2)}, {})
        checkpoints.save(2, {"params": np.ones(2)}, {})
    unfinished = (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    if torn == "state":
        shutil.rmtree(unfinished / torn)
    elif torn:
        (unfinished / torn).unlink()
    np.testing.assert_array_equal(restore_params(tmp_path), np.zeros(2))
    with Checkpointer(tmp_path) as checkpoints:
        assert [f.name for f in tmp_path.iterdir()] == ["1"]
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, {"params": np.full(2, 3.0)}, {})
    np.testing.assert_array_equal(restore_params(tmp_path), np.full(2, 3.0))


def test_a_half_deleted_older_checkpoint_does_no_harm(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": np.full(2, step)}, {})
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(tmp_path / "1" / "state")
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 2
        with pytest.raises(UserError, match="there is no checkpoint 1"):
            checkpoints.restore(1, like={"params": np.zeros(2, int)})
        checkpoints.save(3, {"params": np.full(2, 3)}, {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["2", "3"]


SAVER = """
import sys
import threading
import numpy as np
from fedasr.training.checkpoint import Checkpointer

checkpoints = Checkpointer(sys.argv[1], keep=2)
step = (checkpoints.latest_step() or 0) + 1
while True:
    rng = np.random.default_rng(step)
    state = {"params": {str(i): rng.normal(size=5000) for i in range(8)}, "step": np.int64(step)}
    checkpoints.save(step, state, {"step": step})
    print(step, flush=True)
    step += 1
"""


def test_kill_at_random_moments(tmp_path):
    like = {"params": {str(i): np.empty(5000) for i in range(8)}, "step": np.int64(0)}
    pause = random.Random(0)
    started = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        first = int(process.stdout.readline())
        process.stdout.readline()  # however slow the machine, two are begun
        time.sleep(pause.uniform(0.0, 0.4))
        process.kill()
        started = int((process.stdout.read().split() or [first])[-1])
        process.wait()

        with Checkpointer(tmp_path) as checkpoints:
            step = checkpoints.latest_step()
            # `save` of the step printed last had returned, so all earlier ones were complete.
            assert started - 1 <= (step or 0) <= started + 1
            if step is None:
                continue
            restored, metadata = checkpoints.restore(step, like=like)
        rng = np.random.default_rng(step)
        for i in range(8):
            np.testing.assert_array_equal(restored["params"][str(i)], rng.normal(size=5000))
        assert restored["step"] == step and metadata == {"step": step}
        assert not [f.name for f in tmp_path.iterdir() if not f.name.isdecimal()]
        assert read_metadata(tmp_path) == {"step": step}
    assert started > 5


@pytest.mark.parametrize(
    "name", ["a[1]", "a\\b", "with space", "räksmörgås", "~", "q?*", "#%41", "line\nbreak", "{x}$Y"]
)
def test_any_path_that_the_file_system_takes(tmp_path, name):
    state = {"params": {"w": np.arange(3.0)}}
    with Checkpointer(tmp_path / name / "checkpoints") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"step": step})
        assert checkpoints.restore(3, like=state)[1] == {"step": 3}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name, target_is_directory=True)
    for path in (tmp_path / name, link):
        np.testing.assert_array_equal(restore_params(path)["w"], np.arange(3.0))
        assert read_metadata(path) == {"step": 3}
    assert {f.name for f in (tmp_path / name / "checkpoints").iterdir()} == {"2", "3"}


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_every_damaged_file_is_noticed_or_means_nothing(tmp_path):
    """Bytes flipped, cut off or missing: what is restored is what was saved, or an older one."""
    states = {
        step: {"params": {"w": np.arange(600.0) + step}, "n": np.int64(step)} for step in (1, 2)
    }
    with Checkpointer(tmp_path / "whole") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"step": step})
    rng, noticed = random.Random(0), 0
    names = [p.relative_to(tmp_path / "whole") for p in files_of(tmp_path / "whole" / "2")]
    for number, (name, how) in enumerate((n, h) for n in names for h in ("flip", "cut", "remove")):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "whole", folder)
        data = bytearray((folder / name).read_bytes())
        if how == "flip" and data:
            data[rng.randrange(len(data))] ^= 0xFF
        (folder / name).write_bytes(data[: len(data) // 2] if how == "cut" else data)
        if how == "remove":
            (folder / name).unlink()
        with Checkpointer(folder) as checkpoints:
            step = checkpoints.latest_step()
            state, metadata = checkpoints.restore(step, like=states[1])
            assert metadata == {"step": step}
            assert bits(state) == bits(states[step])
            if step == 1:
                assert [place.name for place in checkpoints.damaged] == ["damaged-2"]
                checkpoints.save(2, states[2], {"step": 2})  # training comes to it again
                assert bits(checkpoints.restore(2, like=states[1])[0]) == bits(states[2])
                noticed += 1
        shutil.rmtree(folder)
    assert noticed >= len(names)


def test_damage_to_all_is_refused_in_one_line(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.ones(2)}, {})
    (tmp_path / "1" / "checksums" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* can be read") as caught:
        Checkpointer(tmp_path)
    assert "\n" not in str(caught.value) and (tmp_path / "1").exists()


def test_a_save_that_cannot_be_read_back_is_an_error_and_older_ones_stay(tmp_path, monkeypatch):
    from fedasr.training import checkpoint

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"params": np.ones(2)}, {})
        checkpoints.wait()
        tell = checkpoint.verify

        def spoil(folder):
            (folder / "state" / "manifest.ocdbt").write_bytes(b"torn")
            tell(folder)

        monkeypatch.setattr(checkpoint, "verify", spoil)
        checkpoints.save(2, {"params": np.full(2, 2.0)}, {})
        with pytest.raises(UserError, match=r"checkpoint 2 cannot be written .* from checkpoint 1"):
            checkpoints.wait()
        monkeypatch.undo()
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_leaves_that_a_release_added_keep_their_first_values(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.ones(2)}, {})
        like = {"params": np.zeros(2), "run": {"id": np.arange(3)}}
        state, _ = checkpoints.restore(1, like=like, added=("run",))
        np.testing.assert_array_equal(state["run"]["id"], np.arange(3))
        np.testing.assert_array_equal(state["params"], np.ones(2))
        with pytest.raises(UserError, match="it has no run/id"):
            checkpoints.restore(1, like=like, added=("ru",))


def test_training_waits_for_a_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    state = {"params": np.ones(1000)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert checkpoints.seconds > 0 and not checkpoints.busy
        write = checkpoints._manager.save
        gate = threading.Event()
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda *args, **more: gate.wait(60) and write(*args, **more),
        )
        checkpoints.save(2, state, {})  # returns, although nothing is written before the gate opens
        assert checkpoints.busy and not (tmp_path / "2").exists()
        state["params"][:] = 0.0
        gate.set()
        checkpoints.wait()
        assert not checkpoints.busy
        assert checkpoints.restore(2, like=state)[0]["params"].all()


def test_too_little_memory_to_read_is_no_damage(tmp_path, monkeypatch):
    from fedasr.training import stored

    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.ones(2)}, {})

    def fail(*args, **more):
        raise MemoryError("bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(stored, "by_path", fail)
        patch.setattr(stored, "digests", fail)
        with pytest.raises(MemoryError):
            Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        import orbax.checkpoint as ocp

        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
        with pytest.raises(MemoryError, match=r"reading .*bad_alloc"):
            Checkpointer(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1 and not checkpoints.damaged


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "file"),
        ValueError("PERMISSION_DENIED: Error opening file: Permission denied [OS error 13]"),
        OSError(116, "Stale file handle"),
        UserError("no folder for temporary files can hold a link to it"),
    ],
)
def test_what_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch, error):
    """It is said, and nothing is set aside: the next start may read it."""
    import orbax.checkpoint as ocp

    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": np.ones(2)}, {})

    def fail(*args, **more):
        raise error

    for handler, name in (("PyTree", "restore"), ("PyTree", "metadata"), ("Json", "restore")):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(ocp, f"{handler}CheckpointHandler"), name, fail)
            with pytest.raises(UserError) as caught:
                Checkpointer(tmp_path)
        said = str(caught.value)
        assert "can be read: put them back" not in said and "remove" not in said
        assert error is caught.value or "cannot be read now" in said
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2 and not checkpoints.damaged


def test_without_room_for_temporary_files(tmp_path, monkeypatch):
    """Only paths that need a link need any; and their checkpoints are not taken for damaged."""
    from fedasr.training import stored

    def nowhere(*args, **more):
        raise FileNotFoundError(2, "No usable temporary directory found")

    for name in ("plain", "a[1]"):
        with Checkpointer(tmp_path / name) as checkpoints:
            checkpoints.save(1, {"params": np.ones(2)}, {})
    monkeypatch.setattr(stored.tempfile, "TemporaryDirectory", nowhere)
    monkeypatch.setattr(stored.tempfile, "gettempdir", nowhere)
    restore_params(tmp_path / "plain")
    with pytest.raises(UserError, match="set TMPDIR"):
        Checkpointer(tmp_path / "a[1]")
    assert [p.name for p in (tmp_path / "a[1]").iterdir()] == ["1"]


def test_parameters_that_are_not_what_was_saved_are_not_handed_out(tmp_path, monkeypatch):
    """To evaluations and to runs that start from them."""
    from fedasr.training import stored

    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": np.ones(2)}, "other": np.ones(2)}, {})
    read = stored.read_arrays

    def other(folder, tree):
        return jax.tree.map(lambda x: x + 1, read(folder, tree))

    assert restore_params(tmp_path)["w"].tolist() == [1, 1]
    monkeypatch.setattr(stored, "read_arrays", other)
    with pytest.raises(UserError, match="params/w is not what was saved"):
        restore_params(tmp_path)
    shutil.rmtree(tmp_path / "1" / "checksums")  # of an older release
    assert restore_params(tmp_path)["w"].tolist() == [2, 2]


def test_a_folder_that_is_moved_meanwhile_is_not_made_again(tmp_path):
    """A run would end well in a folder that holds nothing else."""
    with Checkpointer(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"params": np.ones(2)}, {})
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        checkpoints.save(2, {"params": np.ones(2)}, {})
        with pytest.raises(UserError, match="moved or removed while the run went on: put it back"):
            checkpoints.wait()
    assert not (tmp_path / "run").exists()
    with Checkpointer(tmp_path / "elsewhere") as checkpoints:
        assert checkpoints.latest_step() == 1


def test_folders_that_are_called_like_checkpoints_are_none(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, {"params": np.ones(2)}, {})
    for name in ("0008", "٩", "10 (copy)", "-11", "1e2"):
        shutil.copytree(tmp_path / "7", tmp_path / name)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        checkpoints.save(9, {"params": np.ones(2)}, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 9


@pytest.mark.parametrize("which", [1, 2])
def test_what_the_library_notes_of_a_checkpoint_is_damaged(tmp_path, which):
    """It is looked at for all of them at once, and no error of the library's says for which."""
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.zeros(2)}, {})
        checkpoints.save(2, {"params": np.ones(2)}, {})
    (tmp_path / str(which) / "_CHECKPOINT_METADATA").write_text('{"item_handlers": 3}')
    with Checkpointer(tmp_path) as checkpoints:
        assert [folder.name for folder in checkpoints.damaged] == [f"damaged-{which}"]
        checkpoints.save(3, {"params": np.ones(2)}, {})
        assert checkpoints.latest_step() == 3
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": 3}')
    shutil.rmtree(tmp_path / str(3 - which), ignore_errors=True)
    with pytest.raises(UserError, match="none of the 1 checkpoints in"):
        Checkpointer(tmp_path)
