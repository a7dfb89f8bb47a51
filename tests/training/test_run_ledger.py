"""Runs that start from runs, with a recogniser: independent noise, totals as dp-accounting's."""

import itertools

import dp_accounting as dp
import jax
import numpy as np
import pytest
from dp_accounting import pld

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.privacy import ledger
from fedasr.training import loop, stages
from fedasr.training.checkpoint import Checkpointer, read_metadata, restore_params
from fedasr.training.config import default_config
from fedasr.training.logging import RunLogger, to_json

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")

ROUNDS, POPULATION, COHORT = 3, 4, 2


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of four training users each, of whom they share two."""
    found = []
    for first in (0, 2):
        sound = 0.1 * np.random.default_rng(first).standard_normal(8_000, np.float32)
        utterances = [
            Utterance(f"{split}-{user}-{i}", f"{split}-{user}", "one two", split,
                      lambda sound=sound: (sound, 16_000))
            for split, users in {"train": range(first, first + 4), "test": [9]}.items()
            for user in users
            for i in range(2)
        ]  # fmt: skip
        out = tmp_path_factory.mktemp("ledger") / "data"
        prepare(utterances, out, name="noise")
        found.append(out)
    return found


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)


def configure(data, **changes):
    config = default_config()
    config.data.dir = str(data)
    config.data.eval = ("test",)
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.rounds, config.cohort = ROUNDS, COHORT
    config.client.steps, config.client.batch_size = 1, 2
    config.server.optimizer, config.server.learning_rate = "sgd", 1.0
    config.privacy.sigma, config.privacy.delta = 1.0, 1e-6
    config.privacy.deployments = ((20, 1000),)
    config.evaluation.batch_size = 2
    config.checkpoint.every, config.checkpoint.keep = 1, 10
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return to_json(config.to_dict())


def event(rounds=ROUNDS, z=COHORT * 1.0, q=COHORT / POPULATION):
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), rounds)


def by_hand(*events):
    account = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    for one in events:
        account.compose(one)
    return account.get_epsilon(1e-6)


def steps(folder):
    """What each round added to the parameters, flat."""
    states = [restore_params(folder / "checkpoints" / str(i)) for i in range(ROUNDS + 1)]
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s)]) for s in states]
    return [b - a for a, b in itertools.pairwise(flat)]


def correlation(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_chain_of_runs_is_independent_and_charged_in_full(corpora, tmp_path, monkeypatch):
    first = loop.run(configure(corpora[0]), tmp_path / "a")
    own = first["privacy"]["ledger"]
    assert own["known"] and own["earlier"] == []
    assert own["total_epsilon"] == first["privacy"]["epsilon"]
    assert own["total_epsilon"] == pytest.approx(by_hand(event()), rel=2e-3)
    assert 0 < first["privacy"]["delta_at_tails"] < 1e-30

    # B is the same configuration again from where A ended, and is killed after its second round.
    config = configure(corpora[0], init_from=str(tmp_path / "a"))
    planned = loop.dry_run(config)["privacy"]["ledger"]

    def die(self, round, record):
        if round == 3:
            raise RuntimeError("killed")
        return logged(self, round, record)

    logged = RunLogger.round
    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "round", die)
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(config, tmp_path / "b")
    kept = read_metadata(tmp_path / "b")["ledger"]
    (entry,) = ledger.from_data(kept["own"])
    assert entry.users.digest == ledger.Users.of([f"train-{i}" for i in range(4)]).digest
    assert [e["rounds"] for e in kept["earlier"]] == [ROUNDS]
    assert [e["rounds"] for e in kept["own"]] == [2]
    second = loop.run(config, tmp_path / "b")
    total = second["privacy"]["ledger"]
    assert total["total_epsilon"] == pytest.approx(by_hand(event(), event()), rel=2e-3)
    assert planned["total_epsilon"] == pytest.approx(total["total_epsilon"])
    assert total["shared_users"] == POPULATION and total["earlier"][0]["run"] == first["run"]
    deployed = event(z=20.0, q=20 / 1000)
    assert total["total_deployed"][0]["epsilon"] == pytest.approx(
        by_hand(deployed, deployed), rel=2e-3
    )
    assert second["privacy"]["epsilon"] == first["privacy"]["epsilon"]
    assert not any("no ledger" in text for text in second["privacy"]["not_covered"])

    # C has other data, of which it shares two users with both; nobody else is in all three.
    third = loop.run(configure(corpora[1], init_from=str(tmp_path / "b")), tmp_path / "c")
    total = third["privacy"]["ledger"]
    assert total["shared_users"] == 2 and len(total["earlier"]) == 2
    assert total["total_epsilon"] == pytest.approx(by_hand(event(), event(), event()), rel=2e-3)

    # The noise is nearly all there is in a step: none of the nine has anything of another's.
    moves = [step for name in "abc" for step in steps(tmp_path / name)]
    noise = np.sqrt(moves[0].size) * 0.01
    assert all(np.linalg.norm(m) == pytest.approx(noise, rel=0.2) for m in moves)
    worst = max(abs(correlation(a, b)) for i, a in enumerate(moves) for b in moves[:i])
    assert worst < 6 / np.sqrt(moves[0].size)


def test_a_longer_run_goes_through_the_rounds_of_a_shorter(corpora, tmp_path):
    """One mechanism, which a longer run continues; with other draws it would be charged twice."""
    loop.run(configure(corpora[0], rounds=2), tmp_path / "short")
    loop.run(configure(corpora[0]), tmp_path / "long")
    jax.tree.map(
        np.testing.assert_array_equal,
        restore_params(tmp_path / "short"),
        restore_params(tmp_path / "long" / "checkpoints" / "2"),
    )


def test_starts_without_privacy_or_without_a_ledger_say_so(corpora, tmp_path):
    open_run = configure(corpora[0], privacy__enabled=False)
    loop.run(open_run, tmp_path / "open")
    shared = loop.dry_run(configure(corpora[0], init_from=str(tmp_path / "open")))
    assert shared["privacy"]["ledger"]["total_epsilon"] in (None, float("inf"))
    assert shared["privacy"]["ledger"].get("total_epsilon_infinite", True)
    assert shared["privacy"]["epsilon"] < 100

    # As a checkpoint that another program wrote, or an earlier release.
    metadata = read_metadata(tmp_path / "open")
    del metadata["ledger"]
    state = {"params": restore_params(tmp_path / "open")}
    with Checkpointer(tmp_path / "bare") as checkpointer:
        checkpointer.save(1, state, metadata)
    config = configure(corpora[0], init_from=str(tmp_path / "bare"))
    for summary in (loop.dry_run(config), loop.run(config, tmp_path / "from_bare")):
        assert summary["privacy"]["ledger"]["known"] is False
        assert summary["privacy"]["ledger"]["total_epsilon"] is None
        assert any("no ledger" in text for text in summary["privacy"]["not_covered"])
    # What started from an unknown model stays unknown.
    again = loop.dry_run(configure(corpora[0], init_from=str(tmp_path / "from_bare")))
    assert again["privacy"]["ledger"]["known"] is False


def test_a_delta_beyond_the_tails_is_refused_before_anything_runs(corpora, tmp_path):
    config = configure(corpora[0], privacy__delta=1e-70)
    with pytest.raises(UserError, match="cannot be claimed"):
        loop.dry_run(config)
    with pytest.raises(UserError, match="cannot be claimed"):
        loop.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
