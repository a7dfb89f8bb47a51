"""Where one part of a run ends and another begins: stops and kills there change nothing.

The model is a few numbers, so that a run takes a second; all else is a run's own.
"""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.training import loop, session, workdir
from fedasr.training.builders import devices, identities
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.interrupts import StopFlag
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.session import Interrupted, Session

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.usefixtures("small_model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two users of a seed and four who train."""
    sound = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    said = [
        Utterance(f"{split}-{user}", f"{split}-{user}", "one two", split, lambda: sound)
        for split, users in {"seed": 2, "train": 4}.items()
        for user in range(users)
    ]
    folder = tmp_path_factory.mktemp("boundaries") / "data"
    prepare(said, folder, name="noise")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The keys of which noise was drawn, in order."""
    seen, draw = [], noise.standard_normal

    def recorded(key, size, reach):
        jax.debug.callback(lambda data: seen.append((*map(int, data),)), jax.random.key_data(key))
        return draw(key, size, reach)

    monkeypatch.setattr(noise, "standard_normal", recorded)
    return seen


@pytest.fixture
def roots(monkeypatch):
    """What the operating system's generator gave, so far."""
    given, real = [], session.secret_root
    monkeypatch.setattr(session, "secret_root", lambda: given.append(real()) or given[-1])
    return given


def configure(corpus, **changes):
    config = default_config()
    config.data.update(dir=str(corpus), eval=())
    config.update(rounds=3, cohort=2, devices=1, chunk=2)
    config.client.update(steps=1, batch_size=1)
    config.seed_training.update(steps=2, batch_size=2)
    config.checkpoint.update(every=10, seed_every=0)
    config.evaluation.update(every=0, while_training=())
    config.server.optimizer = "sgd"
    config.privacy.update(sampler="fixed", deployments=())
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


@contextlib.contextmanager
def told_to_stop():
    stop = StopFlag()
    stop.requested = True
    yield stop


def same_params(one, other):
    jax.tree.map(np.testing.assert_array_equal, restore_params(one), restore_params(other))


class Killed(BaseException):
    """As by kill -9: nothing is saved."""


@pytest.mark.parametrize("noise_seed", ["secret", "run"])
def test_a_stop_at_the_end_of_the_seed_changes_nothing(
    corpus, drawn, roots, monkeypatch, tmp_path, noise_seed
):
    config = configure(corpus, **{"privacy.noise_seed": noise_seed})
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:  # the seed reports once: at its end
        patch.setattr(loop, "graceful_stop", told_to_stop)
        with pytest.raises(Interrupted, match="stopped in seed at 2"):
            loop.run(config, folder)
    for killed in (1, 2):  # there is no other checkpoint: the rounds are done again, and alike
        with monkeypatch.context() as patch:

            def fall(self, units, record, state, after=killed):
                if units == after:
                    raise Killed

            patch.setattr(Session, "evaluated", fall)
            with pytest.raises(Killed):
                loop.run(config, folder)
    assert read_metadata(folder)["stage"] == "seed"
    stopped = loop.run(config, folder)
    jax.effects_barrier()
    first, second, third = drawn[0], drawn[2], drawn[-1]
    assert drawn == [first, first, second, first, second, third]
    assert len(roots) == (noise_seed == "secret")

    # One that nobody disturbs, with the same root, is the same.
    monkeypatch.setattr(session, "secret_root", lambda: roots[0])
    whole = loop.run(config, tmp_path / "whole")
    same_params(folder, tmp_path / "whole")
    for name in whole.keys() - {"wall_seconds", "client_steps_per_second"}:
        assert stopped[name] == whole[name], name
    numbers = [[r.get("round") for r in read_metrics(f)] for f in (folder, tmp_path / "whole")]
    assert numbers[0] == numbers[1]


def test_a_secret_root_lies_in_no_metadata_of_the_seed(corpus, roots, monkeypatch, tmp_path):
    """Exports and fusion take metadata over."""
    config = configure(corpus, **{"privacy.noise_seed": "secret"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", told_to_stop)
        with pytest.raises(Interrupted):
            loop.run(config, tmp_path)
    (root,) = roots
    metadata = str(read_metadata(tmp_path))
    assert not any(str(int(word)) in metadata for word in root if word > 100_000)


def test_the_seed_alone_stopped_at_its_end_goes_on(corpus, monkeypatch, tmp_path):
    config, folder = configure(corpus), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", told_to_stop)
        with pytest.raises(Interrupted):
            loop.run(config, folder, only_seed=True)
    summary = loop.run(config, folder, only_seed=True)
    assert summary["status"] == "seed" and summary["steps"] == 2


VARIANTS = {
    "plain": {},
    "a rate that falls after the shorter run": {
        "client.decay_start": 3,
        "client.decay_rounds": 1,
        "client.decay_rate": 0.5,
    },
    "unused bands": {
        "privacy.enabled": False,
        "privacy.noise": "banded",
        "privacy.sampler": "shuffled",
    },
    "memories": {"algorithm": "scaffold", "client.optimizer": "sgd"},
    "whole numbers": {
        "privacy.noise": "skellam",
        "privacy.sampler": "poisson",
        "privacy.sigma": 0.1,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_extended_run_is_one_that_was_made_so(corpus, monkeypatch, tmp_path, variant):
    changes = VARIANTS[variant] | {"seed_training.steps": 0}
    whole, long = tmp_path / "whole", configure(corpus, **changes, rounds=4)
    expected = loop.run(long, whole)
    finished, short = tmp_path / "finished", configure(corpus, **changes, rounds=2)
    assert loop.run(short, finished)["rounds"] == 2
    running = tmp_path / "running"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", told_to_stop)
        with pytest.raises(Interrupted, match="stopped in main at 1"):
            loop.run(short, running)
    for folder, history in ((finished, [2]), (running, [])):
        assert loop.dry_run(short, folder, extend=4)["rounds"] == 4
        summary = loop.run(short, folder, extend=4)
        same_params(folder, whole)
        for name in expected.keys() - {"wall_seconds", "client_steps_per_second", "history"}:
            assert summary[name] == expected[name], name
        assert [end["rounds"] for end in summary["history"]] == history
    if variant == "plain":  # checkpoints know the history, too
        (finished / "summary.json").write_text("{")
        assert [end["rounds"] for end in loop.run(long, finished)["history"]] == [2]


def test_an_extension_on_other_devices_says_so(corpus, monkeypatch, capsys, tmp_path):
    changes = {"seed_training.steps": 0, "chunk": 1, "devices": 0}
    short, long = configure(corpus, **changes, rounds=2), configure(corpus, **changes, rounds=4)

    def on(count, config, name, extend=None):
        monkeypatch.setattr(devices, "run_devices", lambda config: jax.devices()[:count])
        return loop.run(config, tmp_path / name, extend)["device_changes"]

    assert on(1, long, "whole") == on(2, short, "moved") == []
    capsys.readouterr()
    assert on(1, short, "moved", 4) == ["2 x cpu -> 1 x cpu at 2"]
    assert "at 2 with 2 x cpu -> 1 x cpu: sums are in another order" in capsys.readouterr().err
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0),
        *(restore_params(tmp_path / name) for name in ("whole", "moved")),
    )


def test_rounds_of_another_mechanism_are_refused(corpus, tmp_path):
    """As a release would meet them that accounts for the same settings in another way."""
    short = configure(corpus, **{"seed_training.steps": 0}, rounds=2)
    loop.run(short, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "checksums")
    file = tmp_path / "checkpoints" / "2" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    assert loop.dry_run(short, tmp_path, extend=4)["rounds"] == 4
    metadata["ledger"]["own"][-1]["relation"] = "ADD_OR_REMOVE_ONE"
    file.write_text(json.dumps(metadata))
    for go in (loop.dry_run, loop.run):
        with pytest.raises(UserError, match=r"ledger the 2 rounds .* another mechanism .* start"):
            go(short, tmp_path, extend=4)
    assert loop.run(short, tmp_path)["rounds"] == 2  # it is no matter where nothing is added


@pytest.mark.parametrize(("chosen", "rounds"), [(3, 6), (4, 6), (3, 3), (2, 6)])
def test_a_best_state_that_a_longer_run_would_not_see(
    corpus, monkeypatch, tmp_path, chosen, rounds
):
    changes = {"evaluation.every": 2, "selection.split": "dev"}
    ours = Config.of(configure(corpus, **changes, rounds=3))
    monkeypatch.setattr(workdir, "has_checkpoint", lambda path: True)
    monkeypatch.setattr(workdir, "read_metadata", lambda path: {"selection": {"units": chosen}})
    if chosen % 2 == 0 or chosen == rounds:
        assert workdir.extended(tmp_path, ours.tree(), ours, rounds).rounds == rounds
        return
    with pytest.raises(UserError, match="best state on 'dev' is of round 3, where the shorter run"):
        workdir.extended(tmp_path, ours.tree(), ours, rounds)


@pytest.mark.parametrize("noise", ["independent", "skellam", "banded", "buffered"])
@pytest.mark.parametrize("private", [True, False])
def test_only_noise_that_is_made_for_its_rounds_cannot_be_extended(
    corpus, tmp_path, noise, private
):
    ours = Config.of(configure(corpus, **{"privacy.noise": noise, "privacy.enabled": private}))
    longer = dataclasses.replace(ours, rounds=9)
    same = identities.run_identity(ours) == identities.run_identity(longer)
    assert same == (not private or noise in ("independent", "skellam"))
    if same:
        assert workdir.extended(tmp_path, ours.tree(), ours, 9).rounds == 9
        return
    with pytest.raises(UserError, match="made for its number of rounds"):
        workdir.extended(tmp_path, ours.tree(), ours, 9)
