import contextlib
import json
import math
import shutil

import dp_accounting
import jax
import numpy as np
import pytest
from dp_accounting import pld

from fedasr.data.batching import make_buckets
from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.evaluation.hypotheses import read_hypotheses
from fedasr.federated.simulation import Simulation
from fedasr.training import loop, rows, stages
from fedasr.training.builders import identities, models
from fedasr.training.checkpoint import Checkpointer, lock_directory, restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.evaluation import Evaluator
from fedasr.training.interrupts import StopFlag
from fedasr.training.logging import RunLogger, read_metrics, to_json
from fedasr.training.session import Interrupted

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")


def noise(number=0):
    return 0.1 * np.random.default_rng(number).standard_normal(8_000, np.float32), 16_000


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Noise in three splits without a seed: 4 training users, 1 each of dev and test."""
    utterances = [
        Utterance(f"{split}-{user}-{i}", f"{split}-{user}", "one two", split, lambda i=i: noise(i))
        for split, users in {"train": 4, "dev": 1, "test": 1}.items()
        for user in range(users)
        for i in range(2)
    ]
    out = tmp_path_factory.mktemp("loop") / "data"
    prepare(utterances, out, name="noise")
    return out


def make_config(corpus_dir, changes):
    config = default_config()
    config.data.dir = str(corpus_dir)
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.rounds, config.cohort = 1, 2
    config.client.steps, config.client.batch_size = 1, 2
    config.central.update(steps=4, batch_size=2)
    config.checkpoint.seed_every = 2
    config.evaluation.batch_size = 2
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


@pytest.fixture
def no_report(monkeypatch):
    """Plots take seconds; these tests do not look at them."""
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)


@pytest.fixture
def one_identity(monkeypatch):
    """Runs of different configurations draw alike: for those that should train alike."""
    monkeypatch.setattr(identities, "run_identity", lambda config: "one run")


@pytest.fixture
def configure(corpus_dir):
    """configure({"section.field": value}): a tiny configuration without a seed, as a dict."""
    return lambda changes: make_config(corpus_dir, changes)


ADAPTIVE = default_config().privacy.adaptive.to_dict()
MISTAKES = {
    "algorithm": "gossip",
    "rounds": -1,
    "cohort": 5,  # of 4 users
    "chunk": -1,
    "devices": 999,
    "model_devices": 3,  # of 2
    "data.train": "no_such_split",
    "data.buckets": 0,
    "model.name": "oracle",
    "model.options.dim": 15,  # not a multiple of the heads
    "client.optimizer": "magic",
    "client.steps": 0,
    "client.batch_size": 0,
    "server.optimizer": "magic",
    "seed_training.optimizer": "magic",
    "central.optimizer": "magic",
    "privacy.sampler": "systematic",
    "privacy.budget": "lavish",
    "privacy.clip_norm": -1.0,
    "privacy.sigma": -1.0,
    "privacy.slots": 1,
    "privacy.cycle": 0,
    "privacy.noise": "pink",
    "privacy.adaptive": ADAPTIVE | {"enabled": True, "rate": 0.0},
    "evaluation.batch_size": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "init_from": "no/such/run",
    "server.decay_rounds": 0,
    "model.options.vocab": 10,
    "model.options.features": 40,
    "model.options.heads": 0,
    "model.options.dtype": "float7",
    "privacy.delta": 0.0,
    "privacy.deployments": ((10, 5),),
    "client.batch_seconds": -1.0,
    "client.micro_batch": -1,
    "client.weighting": "examples",  # with noise
    "central.decay_steps": -1,
    "augment.start_round": -1,
    "data.population": -1,
    "model.options.norm": "both",
    "compression.download": "S2E3M7",
    "compression.share": 1.5,
    "partial.mode": "half",
    "partial.share": 0.0,
    "local.patterns": ("^input_layer/",),  # the model has none
    "local.prototype": "median",
}


@pytest.mark.parametrize("field", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_directory_free(configure, tmp_path, field):
    config = configure({field: MISTAKES[field]})
    with pytest.raises(UserError) as caught:
        loop.run(config, tmp_path / "run")
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("field", sorted(MISTAKES.keys() - {"data.buckets"}))
def test_dry_run_finds_the_same_mistakes(configure, field):
    with pytest.raises(UserError):
        loop.dry_run(configure({field: MISTAKES[field]}))


def test_a_user_of_the_seed_cannot_be_promised_privacy(tmp_path):
    utterances = [
        Utterance(split, "same user", "one two", split, noise) for split in ("seed", "train")
    ]
    prepare(utterances, tmp_path / "data", name="shared")
    changes = {"cohort": 1, "seed_training.steps": 1, "data.eval": ()}
    with pytest.raises(UserError, match="same user"):
        loop.run(make_config(tmp_path / "data", changes), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_data(tmp_path, configure):
    def data(name):
        utterances = [Utterance(name, "anna", "one two", "train", noise)]
        prepare(utterances, tmp_path / "data", name=name, overwrite=True)
        return make_config(tmp_path / "data", {"cohort": 1, "data.eval": (), "rounds": 0})

    loop.run(data("first"), tmp_path / "run")
    with pytest.raises(UserError, match="identity"):
        loop.run(data("second"), tmp_path / "run")


def test_two_processes_do_not_share_a_work_directory(configure, tmp_path):
    (tmp_path / "run").mkdir()
    held = lock_directory(tmp_path / "run")
    with pytest.raises(UserError, match="in use"):
        loop.run(configure({}), tmp_path / "run")
    held.close()


def test_dry_run_extrapolates_as_dp_accounting_by_hand(configure):
    config = configure(
        {"rounds": 200, "privacy.sigma": 6e-4, "privacy.deployments": ((1000, 10**6),)}
    )
    privacy = loop.dry_run(config)["privacy"]
    assert privacy["noise_multiplier"] == pytest.approx(6e-4 * 2)
    assert sum(bound**2 for bound in privacy["layer_bounds"].values()) == pytest.approx(
        config["privacy"]["clip_norm"] ** 2
    )
    (deployed,) = privacy["extrapolations"]
    assert deployed["noise_multiplier"] == pytest.approx(6e-4 * 1000)
    # Rounds that would overflow have a probability too small to matter: an ordinary Poisson event.
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(1e-3, dp_accounting.GaussianDpEvent(0.6)), 200
    )
    by_hand = pld.PLDAccountant().compose(event).get_epsilon(1e-9)
    assert deployed["epsilon"] == pytest.approx(by_hand, rel=1e-3)
    assert deployed["accountant"] == "PLD"
    assert "by nothing" in privacy["neighbours"]


@pytest.mark.parametrize(("name", "sensitivity"), [("poisson", 1), ("fixed", 2), ("shuffled", 1)])
def test_noise_has_one_meaning_whatever_the_sampling(configure, name, sensitivity):
    config = configure({"privacy.sampler": name, "privacy.sigma": 0.25, "rounds": 3})
    privacy = loop.dry_run(config)["privacy"]
    on_sum = 0.25 * config["cohort"]  # the mean's noise times its divisor, in clip norms
    assert privacy["noise_multiplier"] == pytest.approx(on_sum)
    assert privacy["noise_over_sensitivity"] == pytest.approx(on_sum / sensitivity)
    for case in privacy["extrapolations"]:
        assert case["noise_multiplier"] == pytest.approx(0.25 * case["cohort"])


def test_a_dry_run_without_noise_is_json(configure):
    config = configure({"privacy.sigma": 0.0})
    summary = loop.dry_run(config)
    json.dumps(summary, allow_nan=False)
    for case in (summary["privacy"], *summary["privacy"]["extrapolations"]):
        assert case["epsilon"] is None and case["epsilon_infinite"] is True
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"privacy\.sigma"):
            loop.dry_run(config | {"privacy": config["privacy"] | {"sigma": bad}})


def test_dry_run_without_privacy_spends_nothing(configure):
    summary = loop.dry_run(configure({"privacy.enabled": False}))
    assert summary["privacy"] == {"enabled": False, "epsilon": None, "extrapolations": []}


@pytest.fixture(scope="module")
def without_privacy(corpus_dir, tmp_path_factory):
    """(work directory, summary) of one round without privacy."""
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    config = make_config(corpus_dir, {"privacy.enabled": False})
    return workdir, loop.run(config, workdir)


def test_without_privacy(without_privacy):
    workdir, summary = without_privacy
    assert summary["status"] == "completed"
    assert summary["privacy"] == {"enabled": False, "epsilon": None, "extrapolations": []}
    (record,) = [r for r in read_metrics(workdir) if r.get("round") == 1]
    assert sum(record["clipped_share"].values()) == 0
    assert sum(record["update_norm"].values()) > 0
    assert summary["served"]["test"]["all"] == pytest.approx(summary["wer"]["test"])
    assert len(read_hypotheses(workdir, ["test"])) == 2

    # A kill between the summary and the report loses neither.
    (workdir / "report.html").unlink()
    config = json.loads((workdir / "config.json").read_text())
    assert loop.run(config, workdir) == summary
    assert (workdir / "report.html").exists()


def test_init_from_another_model_is_refused(configure, tmp_path):
    with Checkpointer(tmp_path / "source" / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": {"output": {"kernel": np.zeros((2, 3))}}}, {})
    config = configure({"init_from": str(tmp_path / "source")})
    with pytest.raises(UserError, match="another model"):
        loop.run(config, tmp_path / "run")


@contextlib.contextmanager
def stop_at_once():
    stop = StopFlag()
    stop.requested = True
    yield stop


@pytest.mark.slow
def test_central_training_from_another_run_stopped_and_resumed(
    configure, without_privacy, no_report, tmp_path, monkeypatch
):
    source, before = without_privacy
    config = configure({"algorithm": "central", "init_from": str(source)})
    whole = loop.run(config, tmp_path / "whole")
    assert whole["initial_wer"] == before["wer"]
    assert whole["central_steps"] == 4
    assert whole["privacy"] == {"enabled": False, "epsilon": None, "extrapolations": []}

    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", stop_at_once)
        with pytest.raises(Interrupted, match="main at 2"):
            loop.run(config, tmp_path / "stopped")
    partial = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert partial["status"] == "interrupted"

    resumed = loop.run(config, tmp_path / "stopped")
    for key in whole.keys() - {"wall_seconds"}:
        assert resumed[key] == whole[key], key
    pairs = (restore_params(tmp_path / "stopped"), restore_params(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    steps = [[r["step"], r["loss"]] for r in read_metrics(tmp_path / "stopped") if "step" in r]
    assert steps == [
        [r["step"], r["loss"]] for r in read_metrics(tmp_path / "whole") if "step" in r
    ]
    assert [step for step, _ in steps] == [2, 4]


@pytest.mark.long
def test_augmentation_begins_at_its_round_whether_or_not_resumed(
    configure, no_report, tmp_path, monkeypatch
):
    changes = {"rounds": 2, "data.eval": (), "client.batch_seconds": 1.0}
    runs = {
        "late": {"augment.enabled": True, "augment.start_round": 2},
        "half": {"augment.enabled": True, "augment.start_round": 1},
    }
    params, losses = {}, {}
    for name, more in runs.items():
        loop.run(configure(changes | more), tmp_path / name)
        params[name] = restore_params(tmp_path / name)
        records = read_metrics(tmp_path / name)
        losses[name] = [r["loss"] for r in records if r.get("round", 0) > 0]
    assert losses["half"][0] == losses["late"][0] and losses["half"][1] != losses["late"][1]

    config = configure(changes | runs["half"])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", stop_at_once)
        with pytest.raises(Interrupted, match="main at 1"):
            loop.run(config, tmp_path / "stopped")
    loop.run(config, tmp_path / "stopped")
    jax.tree.map(
        np.testing.assert_array_equal, params["half"], restore_params(tmp_path / "stopped")
    )


def test_a_run_with_batches_in_seconds_on_reshuffled_users(configure, no_report, tmp_path):
    changes = {
        "client.batch_seconds": 1.0,  # two of the half-second utterances
        "client.steps": 0,
        "client.epochs": 3,
        "data.iid": True,
        "client.decay_start": 0,
        "client.decay_rounds": 1,
        "data.eval": (),
        "privacy.normalise": True,
        "data.population": 9,
    }
    summary = loop.run(configure(changes), tmp_path / "run")
    assert summary["status"] == "completed"
    record = next(r for r in read_metrics(tmp_path / "run") if r.get("round") == 1)
    assert record["client_steps"] == 3 * record["cohort"] > 0
    assert any("data.iid" in limit for limit in summary["privacy"]["not_covered"])


@pytest.mark.long
def test_batches_in_parts_train_as_whole_ones(configure, no_report, one_identity, tmp_path):
    """Also from a corpus that the devices keep."""
    settings = {"client.steps": 0, "client.epochs": 2, "model.options.dropout": 0.0}
    settings |= {"client.batch_size": 3, "data.buckets": 3, "rounds": 2, "data.eval": ()}
    settings |= {"privacy.enabled": False, "server.optimizer": "sgd"}
    padding = [
        loop.run(configure(settings | {"client.micro_batch": size}), tmp_path / str(size))[
            "padding_fraction"
        ]
        for size in (0, 1)
    ]
    assert padding[1] < 0.2 < padding[0]
    loop.run(configure(settings | {"client.micro_batch": 1, "data.resident": True}), tmp_path / "3")
    whole, *others = (restore_params(tmp_path / name) for name in ("0", "1", "3"))
    for found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, found
        )
    with pytest.raises(UserError, match="chunk=1"):
        loop.run(configure(settings | {"client.micro_batch": 1, "chunk": 2}), tmp_path / "2")


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["federated", "central"])
def test_devices_that_hold_the_model_together(
    configure, no_report, one_identity, tmp_path, algorithm
):
    """A run, its evaluation and its checkpoints; the noise is the same."""
    settings = {"algorithm": algorithm, "client.steps": 2}
    losses = []
    for together in (1, 2):
        config = configure(settings | {"model_devices": together, "devices": together})
        summary = loop.run(config, tmp_path / str(together))
        assert summary["status"] == "completed"
        losses.append(summary["wer"])
    alone, together = (restore_params(tmp_path / name) for name in ("1", "2"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, together)
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="model_devices=0 must be at least 1"):
        loop.run(configure(settings | {"model_devices": 0}), tmp_path / "0")


def test_central_training_in_seconds_with_decay(configure, no_report, tmp_path):
    changes = {
        "algorithm": "central",
        "central.batch_seconds": 2.0,
        "central.decay_steps": 2,
        "central.optimizer": "lars",
        "data.eval": (),
    }
    summary = loop.run(configure(changes), tmp_path / "run")
    assert summary["status"] == "completed" and summary["central_steps"] == 4


@pytest.mark.slow
def test_all_kinds_of_state_survive_a_stop(configure, no_report, tmp_path, monkeypatch):
    """Correlated noise, bounds that adapt after a warm-up, optimisers of some variables."""
    changes = {
        "rounds": 3,
        "data.eval": (),
        "privacy.sampler": "shuffled",
        "privacy.noise": "banded",
        "privacy.adaptive.enabled": True,
        "privacy.adaptive.warmup": 1,
        "privacy.deployments": ((10, 100),),
        "compression.download": "S1E3M7",
        "compression.upload": "S1E4M3",
        "compression.measure": True,
        "partial.mode": "fixed",
        "partial.patterns": ("block_0/", "output"),
    }
    config = configure(changes)
    whole = loop.run(config, tmp_path / "whole")
    privacy = whole["privacy"]
    assert privacy["noise"] == "banded, 2 bands"  # 4 users, 2 a round: turns 2 apart
    start = models.initial_params(models.build_recogniser(Config.of(config)), Config.of(config))
    end, trained = restore_params(tmp_path / "whole"), 0
    for (path, before), after in zip(
        jax.tree.leaves_with_path(start), jax.tree.leaves(end), strict=True
    ):
        chosen = path[0].key in ("block_0", "output")
        trained += chosen * before.size
        assert np.any(before != after) == chosen, path
    assert privacy["noise_state_bytes"] == 4 * trained < 4 * whole["parameters"]
    plain, ours = whole["clients"]
    assert plain["down_bytes"] == plain["parameter_bytes"] == 4 * whole["parameters"]
    assert ours["parameter_bytes"] < plain["parameter_bytes"]
    assert ours["peak_bytes"] < plain["peak_bytes"]
    assert ours["up_bytes"] < 2 * trained < ours["down_bytes"] < plain["up_bytes"]
    assert privacy["adaptive"]["noise_multiplier"] == pytest.approx(0.2)
    assert privacy == loop.dry_run(config)["privacy"]
    records = [r for r in read_metrics(tmp_path / "whole") if r.get("round", 0) > 0]
    scales = [list(r["clip_scale"].values()) for r in records]
    assert set(scales[0]) == {1.0} and scales[0] != scales[1] != scales[2]
    assert records[0]["clip_scale"].keys() == records[0]["update_norm"].keys()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", stop_at_once)
        with pytest.raises(Interrupted, match="main at 1"):
            loop.run(config, tmp_path / "stopped")
    loop.run(config, tmp_path / "stopped")
    pairs = (restore_params(tmp_path / "stopped"), restore_params(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_everyone_every_round(configure):
    summary = loop.dry_run(configure({"privacy.sampler": "everyone", "cohort": 0}))
    assert summary["cohort"] == 4 == summary["population"]
    assert summary["privacy"]["sampling"] == "everyone in every round"
    with pytest.raises(UserError, match="cohort=0 or 4"):
        loop.dry_run(configure({"privacy.sampler": "everyone", "cohort": 3}))
    with pytest.raises(UserError, match="cycle=3"):
        loop.dry_run(configure({"rounds": 5, "privacy.noise": "banded", "privacy.bands": 3}))


LOCAL = {
    "rounds": 4,
    "checkpoint.every": 3,
    "data.train": "train[:][:50%]",
    "data.eval": ("train[:][50%:]", "test"),
    "model.options.input_layer": True,
    "local.patterns": ("^input_layer/",),
    "privacy.clip_norm": 0.5,
    "client.learning_rate": 1.0,
}


@pytest.mark.long
def test_local_parameters_survive_a_crash_and_are_told_apart(configure, tmp_path, monkeypatch):
    config = configure(LOCAL)
    summary = loop.run(config, tmp_path / "whole")
    numbers = 80 * 80 + 80
    users = summary["local"]["users"]
    assert 2 <= users <= 4
    assert summary["local"] == {
        "parameters": numbers,
        "users": users,
        "bytes": 4 * numbers * users,
        "prototype": "init",
    }
    (client,) = summary["clients"]
    assert client["up_bytes"] == client["down_bytes"] == 4 * (summary["parameters"] - numbers)
    assert any("local parameters" in text for text in summary["privacy"]["not_covered"])
    assert not any("input_layer" in name for name in summary["privacy"]["layer_bounds"])
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "local to every user" in report and "shared part of the model alone" in report

    # Dies in round 4, with the rows of that round written, long after the checkpoint of round 3.
    def die(self, round, record):
        if round == 4:
            raise RuntimeError("killed")
        return logged(self, round, record)

    logged = RunLogger.round
    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "round", die)
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(config, tmp_path / "died")
    # Without its rows it does not go on as if there had been none.
    (tmp_path / "died" / "local").rename(tmp_path / "rows")
    with pytest.raises(UserError, match="belong together"):
        loop.run(config, tmp_path / "died")
    shutil.rmtree(tmp_path / "died" / "local")
    (tmp_path / "rows").rename(tmp_path / "died" / "local")
    resumed = loop.run(config, tmp_path / "died")
    for key in summary.keys() - {"wall_seconds", "client_steps_per_second"}:
        assert resumed[key] == summary[key], key
    params = restore_params(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "died"), params)

    # The rows are what evaluation used, of users who train; others have the model's.
    rates = {}
    for split in LOCAL["data.eval"]:
        corpus = open_corpus(config["data"]["dir"], split)
        found = []
        for folder in ("whole", "died/checkpoints/4"):
            where = tmp_path / folder
            layout, own = rows.local_rows(where, params, corpus, config["data"]["dir"])
            found.append(own(np.arange(len(corpus.users))))
        np.testing.assert_array_equal(*found)
        same = (found[0] == np.asarray(layout.extract(params))).all(axis=1)
        assert same.sum() == (4 - users if split != "test" else 1)
        buckets = make_buckets([corpus], 1, {"features": 24, "labels": 4})
        evaluator = Evaluator(models.build_recogniser(Config.of(config)), buckets, 2, layout=layout)
        rates[split] = [evaluator(params, corpus, how)["loss"] for how in (own, None)]
    last = [r for r in read_metrics(tmp_path / "whole") if r.get("round") == 4][-1]
    for split, (own, prototype) in rates.items():
        assert own == pytest.approx(last["eval"][split]["loss"], rel=1e-4)
        assert (own == pytest.approx(prototype, rel=1e-6)) == (split == "test")


def test_prototypes_of_other_users_are_refused_with_privacy(configure):
    for prototype in ("mean", "last"):
        changes = LOCAL | {"local.prototype": prototype}
        with pytest.raises(UserError, match="each other's"):
            loop.dry_run(configure(changes))
        dry = loop.dry_run(configure(changes | {"privacy.enabled": False}))
        assert dry["local"] == {"parameters": 80 * 81}


@pytest.mark.slow
def test_out_of_memory_halves_the_chunk_once(configure, tmp_path, monkeypatch, capsys, no_report):
    """And the run that is resumed begins with the half; all of it is said, for bits differ then."""
    config = configure({"chunk": 2, "rounds": 3, "privacy.sampler": "fixed", "checkpoint.every": 1})
    seen = []

    def limited(most):
        def run(self, state, rounds):
            for item in trained(self, state, rounds):
                seen.append((self.chunk, item[1].round))
                if self.chunk > most and item[1].round == 2:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB")
                yield item

        return run

    trained = Simulation.run
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "run", limited(1))
        summary = loop.run(config, tmp_path / "2")
    said = capsys.readouterr().err
    assert "out of memory on" in said and "from round 2 on sums are in another order" in said
    assert summary["device_changes"] == ["chunk=2 -> chunk=1 at 1"]
    assert seen == [(2, 1), (2, 2), (1, 2), (1, 3)]
    assert summary["chunk"] == 1 and summary["status"] == "completed"
    assert json.loads((tmp_path / "2" / "chunk.json").read_text())["chunk"] == 1

    # Not even one client: a clear error, and a resumed run does not try the larger chunk again.
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "run", limited(0))
        with pytest.raises(UserError, match=r"out of memory on .* with chunk=1"):
            loop.run(config, tmp_path / "3")
        assert seen == [(2, 1), (2, 2), (1, 2)]
        seen.clear()
        with pytest.raises(UserError, match="chunk=1"):
            loop.run(config, tmp_path / "3")
        assert seen == [(1, 2)]

    # Killed before a checkpoint could keep that: what goes on says it, whatever file is lost.
    for number, lost in enumerate((False, True)):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "3", folder)
        if lost:
            (folder / "chunk.json").unlink()
        seen.clear()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(Simulation, "run", limited(9))
            summary = loop.run(config, folder)
        chunk, changes = (2, []) if lost else (1, ["chunk=2 -> chunk=1 at 1"])
        assert [c for c, _ in seen] == [chunk] * 2 and summary["device_changes"] == changes
        said = capsys.readouterr().err
        assert ("exactly: on" in said) == lost and ("with chunk=2 -> chunk=1: sums" in said) != lost
