"""What whole runs promise about privacy: fresh noise throughout, a ledger, a root kept secret.

The model is a few numbers, so that a run takes a second; all else is a run's own.
"""

import contextlib
import json
import math
import shutil

import dp_accounting as dp
import jax
import numpy as np
import pytest
from dp_accounting import pld

from fedasr import streams
from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.federated.simulation import Simulation
from fedasr.privacy import accounting, ledger, noise
from fedasr.training import loop, session
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import default_config
from fedasr.training.interrupts import StopFlag
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.session import Interrupted

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.usefixtures("small_model")

SOUND = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
USERS, SIGMA, DELTA = 4, 0.8, 1e-6
ZERO_OUT = dp.NeighboringRelation.REPLACE_SPECIAL


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, folder): 4 users each, the last two of the first are the first two of the second."""
    folders = []
    for name, first in (("a", 0), ("b", 2)):
        said = [
            Utterance(f"{u}-{i}", f"user {u}", "one two", "train", lambda: SOUND)
            for u in range(first, first + USERS)
            for i in range(2)
        ]
        folders.append(tmp_path_factory.mktemp("privacy") / name)
        prepare(said, folders[-1], name=name)
    return folders


@pytest.fixture
def drawn(monkeypatch):
    """The keys of which noise was drawn, in order, with how many draws."""
    seen, draw = [], noise.standard_normal

    def recorded(key, size, reach):
        def note(data):
            seen.append((size, *map(int, data)))

        jax.debug.callback(note, jax.random.key_data(key))
        return draw(key, size, reach)

    monkeypatch.setattr(noise, "standard_normal", recorded)
    return seen


def configuration(folder, **changes):
    config = default_config()
    config.data.update(dir=str(folder), eval=())
    config.update(rounds=4, cohort=2, devices=1, chunk=2)
    config.client.update(steps=1, batch_size=1)
    config.server.optimizer = "sgd"
    config.checkpoint.update(every=1, keep=10)
    config.privacy.update(sampler="everyone", sigma=SIGMA, delta=DELTA, deployments=((8, 16),))
    config.update_from_flattened_dict(changes)
    if config.privacy.sampler == "everyone":
        config.cohort = 0
    return to_json(config.to_dict())


@contextlib.contextmanager
def stop_at_once():
    stop = StopFlag()
    stop.requested = True
    yield stop


def run_with_stops(config, workdir, monkeypatch, stops):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", stop_at_once)
        for _ in range(stops):
            with pytest.raises(Interrupted):
                loop.run(config, workdir)
    return loop.run(config, workdir)


def by_hand(*multipliers, delta=DELTA):
    account = pld.PLDAccountant(ZERO_OUT, 1e-4)
    for z in multipliers:
        account.compose(dp.GaussianDpEvent(z))
    return account.get_epsilon(delta)


STATES = {
    "augment.enabled": True,
    "augment.start_round": 2,
    "privacy.sampler": "shuffled",
    "privacy.noise": "banded",
    "privacy.adaptive.enabled": True,
    "privacy.adaptive.sigma": 0.5,
}


def test_stages_halvings_and_stops_go_on_with_the_noise(data, drawn, tmp_path, monkeypatch):
    """Four rounds, augmented from the third on: every draw once, whatever comes in between."""
    config = configuration(data[0], **STATES)
    loop.run(config, tmp_path / "whole")
    jax.effects_barrier()
    whole = list(drawn)
    assert len(whole) == len(set(whole)) == 2 * 4  # on the sum and on the votes
    params = restore_params(tmp_path / "whole")

    drawn.clear()
    run_with_stops(config, tmp_path / "stopped", monkeypatch, 1)
    jax.effects_barrier()
    assert drawn == whole
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "stopped"), params)

    # Out of memory when the second stage begins: the third round is done again, with its noise.
    drawn.clear()
    trained, failed = Simulation.run, []

    def run(self, state, rounds):
        for item in trained(self, state, rounds):
            if item[1].round == 3 and not failed:
                failed.append(self.chunk)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB")
            yield item

    monkeypatch.setattr(Simulation, "run", run)
    summary = loop.run(config, tmp_path / "halved")
    jax.effects_barrier()
    assert failed == [2] and summary["chunk"] == 1
    assert drawn == whole[:6] + whole[4:]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        restore_params(tmp_path / "halved"),
        params,
    )


def test_runs_behind_a_model_are_charged_and_share_no_noise(data, drawn, tmp_path, monkeypatch):
    """A, then B from A with other users, stopped on its way, then C from B with A's users."""
    rounds, z = (2, 3, 4), SIGMA * USERS
    events = [z / math.sqrt(count) for count in rounds]
    summaries, before, starts = [], "", 0
    for name, folder, count in zip("ABC", (data[0], data[1], data[0]), rounds, strict=True):
        config = configuration(folder, rounds=count, init_from=before)
        planned = loop.dry_run(config)["privacy"]
        summaries.append(run_with_stops(config, tmp_path / name, monkeypatch, int(name == "B")))
        jax.effects_barrier()
        starts += count
        assert len(drawn) == len(set(drawn)) == starts
        before = str(tmp_path / name)
        told = summaries[-1]["privacy"]
        # As the plan had it, but for the names of runs.
        assert told["ledger"]["total_epsilon"] == planned["ledger"]["total_epsilon"]
        assert told["epsilon"] == planned["epsilon"] and told["delta"] == DELTA
        assert told["noise_multiplier"] == pytest.approx(z)
        # And as it is in the checkpoint.
        kept = read_metadata(tmp_path / name)["ledger"]
        entries = ledger.from_data([*kept["earlier"], *kept["own"]])
        assert [entry.rounds for entry in entries] == list(rounds[: len(entries)])
        assert [entry.users.count for entry in entries] == [USERS] * len(entries)
    epsilons = [one["privacy"]["epsilon"] for one in summaries]
    np.testing.assert_allclose(epsilons, [by_hand(e) for e in events], rtol=2e-3)
    ledgers = [one["privacy"]["ledger"] for one in summaries]
    names = [one["run"] for one in summaries]
    assert len(set(names)) == 3 and all(one["known"] for one in ledgers)
    assert [len(one["earlier"]) for one in ledgers] == [0, 1, 2]
    assert [one["run"] for one in ledgers[2]["earlier"]] == names[:2]
    totals = [one["total_epsilon"] for one in ledgers]
    by_count = [by_hand(*events[:count]) for count in (1, 2, 3)]
    np.testing.assert_allclose(totals, by_count, rtol=2e-3)
    assert [one["shared_users"] for one in ledgers] == [0, 2, 4]
    # As deployed: the noise on the mean stays, everybody in turn (two turns apart).
    (deployed,) = ledgers[2]["total_deployed"]
    turns = [math.ceil(count * 8 / 16) for count in rounds]
    large = [SIGMA * 8 / math.sqrt(count) for count in turns]
    assert deployed["epsilon"] == pytest.approx(by_hand(*large), rel=2e-3)
    extrapolated = [one["privacy"]["extrapolations"][0]["epsilon"] for one in summaries]
    np.testing.assert_allclose(extrapolated, [by_hand(e) for e in large], rtol=2e-3)
    # What a round's record says of the deployment is of the rounds so far.
    record = [r for r in read_metrics(tmp_path / "C") if r.get("round") == 4][-1]
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(SIGMA * 8), turns[2])
    assert record["epsilon"] == pytest.approx(accounting.rdp_epsilon(event, DELTA, ZERO_OUT))


def test_runs_that_differ_in_one_setting_share_no_noise(data, drawn, tmp_path):
    changes = [{}, {"client.proximal": 0.125}]
    names = set()
    for i, more in enumerate(changes):
        config = configuration(data[0], rounds=1, **more)
        names.add(loop.run(config, tmp_path / str(i))["run"])
    config = configuration(data[1], rounds=1)
    names.add(loop.run(config, tmp_path / "other data")["run"])
    jax.effects_barrier()
    assert len(names) == len(drawn) == len(set(drawn)) == 3


def test_a_model_without_a_ledger_has_no_total(data, tmp_path):
    config = configuration(data[0], rounds=1)
    alone = loop.run(config, tmp_path / "A")["privacy"]
    assert alone["epsilon"] == pytest.approx(by_hand(SIGMA * USERS), rel=2e-3)
    assert alone["epsilon"] == pytest.approx(alone["ledger"]["total_epsilon"])
    path = tmp_path / "A" / "checkpoints"
    for file in path.rglob("*"):
        if file.is_file() and b'"ledger"' in file.read_bytes():
            found = json.loads(file.read_text())
            holder = found if "ledger" in found else next(iter(found.values()))
            holder.pop("ledger", None)
            file.write_text(json.dumps(found))
    shutil.rmtree(path / "1" / "checksums")  # a release without ledgers had none, either
    config = configuration(data[0], rounds=1, init_from=str(tmp_path / "A"))
    told = loop.run(config, tmp_path / "B")["privacy"]
    assert told["epsilon"] == pytest.approx(by_hand(SIGMA * USERS), rel=2e-3)
    assert told["ledger"]["known"] is False and told["ledger"]["total_epsilon"] is None
    assert any("no ledger" in limit for limit in told["not_covered"])


def test_a_secret_root_is_kept_on_resume_and_written_nowhere_else(
    data, drawn, tmp_path, monkeypatch
):
    config = configuration(data[0], rounds=3, **{"privacy.noise_seed": "secret"})
    roots, real = [], streams.secret_root
    monkeypatch.setattr(session, "secret_root", lambda: roots.append(real()) or roots[-1])
    run_with_stops(config, tmp_path / "first", monkeypatch, 1)
    assert len(roots) == 1  # resumed, it is that of the checkpoint
    loop.run(config, tmp_path / "second")
    jax.effects_barrier()
    assert len(roots) == 2 and len(drawn) == len(set(drawn)) == 6
    for name, root in zip(("first", "second"), roots, strict=True):
        forms = {str(int(word)) for word in root} | {f"{int(word):x}" for word in root}
        forms |= {root.astype("<u4").tobytes().hex(), str(int.from_bytes(root.tobytes(), "little"))}
        metadata = json.dumps(read_metadata(tmp_path / name))
        assert not any(form in metadata for form in forms if len(form) > 5)
        for file in (tmp_path / name).rglob("*"):
            if file.is_file() and "checkpoints" not in file.relative_to(tmp_path).parts:
                text = file.read_bytes()
                assert root.astype("<u4").tobytes() not in text
                assert not any(form.encode() in text for form in forms if len(form) > 5), file
    # Not a function of the seed, and the same again for the same root.
    monkeypatch.setattr(session, "secret_root", lambda: roots[0])
    loop.run(config, tmp_path / "again")
    pairs = (restore_params(tmp_path / "again"), restore_params(tmp_path / "first"))
    jax.tree.map(np.testing.assert_array_equal, *pairs)
