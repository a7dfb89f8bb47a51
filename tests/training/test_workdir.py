"""What a work directory is known by: moved, extended, older, damaged and foreign ones."""

import dataclasses
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from fedasr.data.batching import Padding
from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.federated.metrics import RoundMetrics
from fedasr.models.recogniser import model_configs
from fedasr.training import config as config_lib
from fedasr.training import exactness, loop, session, stages, workdir
from fedasr.training.builders import corpora, decoders, devices
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.totals import Totals
from fedasr.training.trainers import federated

FIXTURES = Path(__file__).parent / "fixtures"

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Half a second of noise for each of 4 training users and one other."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    utterances = [
        Utterance(f"{split}-{user}", f"{split}-{user}", "one two", split, lambda: noise)
        for split, users in {"train": 4, "dev": 1}.items()
        for user in range(users)
    ]
    out = tmp_path_factory.mktemp("workdir") / "data"
    prepare(utterances, out, name="noise")
    return out


@pytest.fixture
def configure(corpus_dir):
    """configure(changes): a configuration that takes seconds; all of them compile the same."""

    def make(changes=()):
        config = config_lib.default_config()
        config.data.dir, config.data.eval = str(corpus_dir), ("dev",)
        config.model.options.update(dim=8, blocks=1, heads=2, mlp=8, kernel=3)
        config.rounds, config.cohort = 4, 2
        config.client.steps, config.client.batch_size = 1, 2
        config.evaluation.every, config.checkpoint.every = 0, 2
        config.server.optimizer = "sgd"
        config.privacy.sampler, config.privacy.deployments = "fixed", ()
        config.update_from_flattened_dict(dict(changes))
        return to_json(config.to_dict())

    return make


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Plots take seconds; these tests do not look at them."""
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)


@pytest.fixture(scope="module")
def whole(corpus_dir, tmp_path_factory):
    """(work directory, summary) of four rounds, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "write_report", lambda workdir: None)
        return folder, loop.run(configure.__wrapped__(corpus_dir)(), folder)


@pytest.fixture
def halfway(whole, tmp_path):
    """A copy of it as a kill would have left it after round 3."""
    folder = tmp_path / "halfway"
    shutil.copytree(whole[0], folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    return folder


@pytest.fixture
def accept(monkeypatch):
    """accept(config, folder, extend): both dry run and run up to training; raises what they do."""

    def both(config, folder, extend=None):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(stages, "run_stages", lambda *args: {"status": "reached"})
            for go in (loop.dry_run, loop.run):
                try:
                    found.append(go(config, folder, extend)["status"])
                except UserError as error:
                    found.append(str(error))
        refused = [text for text in found if text not in ("dry_run", "reached", "completed")]
        assert len(refused) in (0, 2), found
        if refused:
            raise UserError(refused[1])
        return found[1]

    return both


def same_params(first, second):
    jax.tree.map(np.testing.assert_array_equal, restore_params(first), restore_params(second))


@pytest.mark.slow
def test_the_same_data_elsewhere_is_the_same_run(
    whole, halfway, configure, accept, corpus_dir, tmp_path
):
    shutil.copytree(corpus_dir, tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved", target_is_directory=True)
    for place in (f"{corpus_dir}/", str(tmp_path / "link")):
        assert accept(configure({"data.dir": place}), halfway) == "reached"
    config = configure({"data.dir": str(tmp_path / "moved")})
    assert loop.run(config, halfway)["status"] == "completed"
    same_params(halfway, whole[0])
    # And a finished run is found done from anywhere.
    assert accept(configure(), halfway) == "completed"


def test_other_data_in_the_same_place_is_another_run(
    halfway, configure, accept, corpus_dir, tmp_path
):
    shutil.copytree(corpus_dir, tmp_path / "data")
    metadata = json.loads((tmp_path / "data" / "corpus.json").read_text())
    metadata["summary"]["changed"] = True
    (tmp_path / "data" / "corpus.json").write_text(json.dumps(metadata))
    config = configure({"data.dir": str(tmp_path / "data")})
    with pytest.raises(UserError, match=r"differs in data.dir, data.identity"):
        accept(config, halfway)


@pytest.mark.slow
def test_where_a_run_started_from_may_vanish_once_it_has_started(
    whole, configure, accept, tmp_path
):
    parent, child = tmp_path / "parent", tmp_path / "child"
    shutil.copytree(whole[0], parent)
    config = configure({"init_from": str(parent), "seed": 5})
    loop.run(config, child)
    end = restore_params(child)
    (child / "summary.json").unlink()
    shutil.rmtree(child / "checkpoints" / "4")
    parent.rename(tmp_path / "elsewhere")
    assert accept(config, child) == "reached"
    # The same parameters in another place are the same start; others are not.
    moved = configure({"init_from": str(tmp_path / "elsewhere"), "seed": 5})
    assert accept(moved, child) == "reached"
    shutil.copytree(whole[0], tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "4")
    with pytest.raises(UserError, match="differs in init_from, start"):
        accept(configure({"init_from": str(tmp_path / "other"), "seed": 5}), child)
    # Without a checkpoint of its own a run needs what it starts from.
    with pytest.raises(UserError, match="no checkpoint in"):
        accept(config, tmp_path / "new")
    shutil.rmtree(tmp_path / "elsewhere")
    loop.run(moved, child)
    jax.tree.map(np.testing.assert_array_equal, restore_params(child), end)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "\0\0"])
def test_a_lost_configuration_is_that_of_the_checkpoints(whole, halfway, configure, accept, text):
    (halfway / "config.json").unlink()
    if text is not None:
        (halfway / "config.json").write_text(text)
    (halfway / "summary.json").write_text(text or "")
    with pytest.raises(UserError, match="differs in seed"):
        accept(configure({"seed": 1}), halfway)
    assert accept(configure(), halfway) == "reached"
    config = json.loads((halfway / "config.json").read_text())
    assert config == json.loads((whole[0] / "config.json").read_text())


def test_files_of_another_run_do_not_make_it_another(whole, halfway, configure, accept):
    other = json.loads((halfway / "config.json").read_text()) | {"seed": 1}
    (halfway / "config.json").write_text(json.dumps(other))
    for seed in (0, 1):
        with pytest.raises(UserError, match=r"config.json is not of the run .* remove that file"):
            accept(configure({"seed": seed}), halfway)
    (halfway / "config.json").unlink()
    summary = json.loads((whole[0] / "summary.json").read_text())
    (halfway / "summary.json").write_text(
        json.dumps(summary | {"configuration": workdir.identity(other)})
    )
    assert accept(configure(), halfway) == "reached"
    (halfway / "summary.json").write_text(json.dumps(summary))
    assert accept(configure(), halfway) == "completed"


def test_files_that_are_decoded_with_are_known_by_their_content(
    halfway, configure, accept, tmp_path
):
    """Which state is kept follows from them."""
    lists = {name: tmp_path / name for name in ("words", "same", "others")}
    for name, path in lists.items():
        path.write_text("one\ntwo\n" + ("three\n" if name == "others" else ""))

    def using(path):
        return configure({"decoding.name": "lexicon", "decoding.lexicon": str(path)})

    file = halfway / "checkpoints" / "2" / "metadata" / "metadata"
    carried = json.loads(file.read_text())
    shutil.rmtree(halfway / "checkpoints" / "2" / "checksums")
    for known in (True, False):  # older releases did not note it
        config = using(lists["words"])
        config["data"] |= {k: carried["config"]["data"][k] for k in ("identity", "characters")}
        config["data"] |= {"knowledge": decoders.knowledge_hash(Config.of(config).decoding)}
        if not known:
            del config["data"]["knowledge"]
        file.write_text(json.dumps(carried | {"config": config | {"start": ""}}))
        (halfway / "config.json").unlink(missing_ok=True)
        assert accept(using(lists["words"]), halfway) == "reached"
        (halfway / "config.json").unlink()
        if known:
            assert accept(using(lists["same"]), halfway) == "reached"
            (halfway / "config.json").unlink()
        with pytest.raises(UserError, match=r"differs in .*decoding\.lexicon"):
            accept(using(lists["others"]), halfway)
    config["data"]["knowledge"] = "of another"
    file.write_text(json.dumps(carried | {"config": config | {"start": ""}}))
    with pytest.raises(UserError, match=r"differs in data\.knowledge"):
        accept(using(lists["words"]), halfway)


@pytest.mark.parametrize("place", ["gs:/bucket/run", "s3:/b"])
def test_half_a_url_is_refused_and_no_folder_made_of_its_name(
    configure, accept, monkeypatch, tmp_path, place
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mount the bucket"):
        accept(configure(), place)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_chunk_file_is_named(halfway, configure):
    path = halfway / "chunk.json"
    whole = json.loads(path.read_text())
    for text in ("{", "[]", "{}", json.dumps(whole | {"chunk": 2}), '{"chunk": 2}'):
        path.write_text(text)
        if text == "{}":  # as good as none
            assert federated.read_chunk(path) == {}
            continue
        with pytest.raises(UserError, match=r"chunk.json is damaged: remove it"):
            loop.run(configure(), halfway)
    del whole["check"]  # of an older release
    path.write_text(json.dumps(whole))
    assert federated.read_chunk(path) == whole


@pytest.mark.slow
def test_an_extended_run_is_one_that_was_made_so(whole, configure, accept, tmp_path):
    folder, short = tmp_path / "run", configure({"rounds": 2})
    with pytest.raises(UserError, match="holds no run yet"):
        loop.run(short, folder, extend=4)
    first = loop.run(short, folder)
    stored = json.loads((folder / "config.json").read_text())
    assert first["history"] == []
    with pytest.raises(UserError, match=r"differs in rounds\).*--extend=4"):
        loop.run(configure(), folder)
    for changes in ({}, {"rounds": 3}):
        assert accept(configure({"rounds": 2} | changes), folder, 4) == "reached"
        (folder / "config.json").write_text(json.dumps(stored))
    dry = loop.dry_run(short, folder, extend=4)
    assert dry["rounds"] == 4 and dry["privacy"]["epsilon"] == whole[1]["privacy"]["epsilon"]
    summary = loop.run(short, folder, extend=4)
    same_params(folder, whole[0])
    assert summary["history"] == [
        {
            "rounds": 2,
            "wer": first["wer"],
            "cer": first["cer"],
            "epsilon": first["privacy"]["epsilon"],
        }
    ]
    for key in whole[1].keys() - {"wall_seconds", "client_steps_per_second", "history"}:
        assert summary[key] == whole[1][key], key
    assert [r["round"] for r in read_metrics(folder)] == [0, 1, 2, 3, 4]
    # It is done, for this command and for one that says so from the start.
    assert loop.run(short, folder, extend=4) == summary == loop.run(configure(), folder)
    with pytest.raises(UserError, match="already goes to round 4"):
        loop.run(short, folder, extend=3)
    with pytest.raises(UserError, match="differs in seed"):
        loop.run(configure({"seed": 1}), folder, extend=5)


def test_a_run_that_is_killed_while_it_is_extended_goes_on(configure, accept, halfway):
    """`config.json` already says where to, the checkpoint does not yet."""
    config = json.loads((halfway / "config.json").read_text())
    (halfway / "config.json").write_text(json.dumps(config | {"rounds": 6}))
    assert accept(configure(), halfway, 6) == "reached"
    assert accept(configure({"rounds": 6}), halfway) == "reached"
    with pytest.raises(UserError, match="differs in rounds"):
        accept(configure(), halfway)
    with pytest.raises(UserError, match="already goes to round 6"):
        accept(configure(), halfway, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"privacy.noise": "banded", "privacy.sampler": "shuffled"},
            "'banded' is made for its number of rounds",
        ),
        ({"algorithm": "central"}, "central training has none"),
    ],
)
def test_what_cannot_be_extended_is_refused(configure, tmp_path, changes, words):
    config = configure(changes)
    with pytest.raises(UserError, match=words):
        workdir.extended(tmp_path, config, Config.of(config), 10)
    for rounds in (0, -1, True, 10**12, 3):
        with pytest.raises(UserError, match="--extend="):
            workdir.extended(tmp_path, configure(), Config.of(configure()), rounds)


def metrics_of(round, clients, invalid, loss=1.0):
    return RoundMetrics(round, loss, clients, 1, invalid, *3 * [np.zeros(0)], {}, NOTHING, 1.0, 0.0)


NOTHING = Padding(0, 0)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([(4, 0), (4, 2)], ""),
        ([(4, 4), (4, 1)], "5 of 8 client updates"),
        ([(4, 0)] * 20 + [(4, 3)] * 3, "in the last 3 rounds"),
        ([(4, 0)] * 20 + [(4, 3)] * 2 + [(0, 0), (4, 3)], "in the last 3 rounds"),
        ([(4, 0)] * 20 + [(4, 3)] * 2 + [(4, 0)], ""),
        ([(4, 0), (4, 0, math.nan)], "loss was not finite"),
        ([(4, 0), (4, 0, math.inf), (4, 0)], ""),
        ([(4, 0), (0, 0, math.nan)], ""),  # nobody was drawn
        ([(0, 0, math.nan)], ""),
    ],
)
def test_when_a_result_is_worth_nothing(rounds, words):
    totals = Totals()
    for number, of in enumerate(rounds, 1):
        totals.add(metrics_of(number, *of), compiled=False)
    assert words in totals.problem() and bool(words) == bool(totals.problem())


def test_totals_are_read_whatever_release_wrote_them():
    tree = dataclasses.asdict(Totals(real=3, device_changes=["1 -> 2"]))
    del tree["bad_rounds"]
    assert Totals.of(tree | {"of_a_later_release": 1}) == Totals(real=3, device_changes=["1 -> 2"])


def test_a_run_of_invalid_updates_is_not_completed(configure, tmp_path):
    """Clients that blow up are counted as zero: the parameters stay finite."""
    changes = {"client.learning_rate": 1e4, "client.grad_clip": 1e12, "client.steps": 4}
    changes |= {"privacy.enabled": False, "client.optimizer": "sgd", "rounds": 2}
    config = configure(changes)
    summary = loop.run(config, tmp_path / "run")
    assert summary["invalid_client_updates"] == summary["client_updates"] == 4
    assert summary["status"] == "diverged" and "4 of 4" in summary["problem"]


def test_a_report_that_fails_does_not_take_the_run_with_it(halfway, configure, monkeypatch):
    def fail(workdir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "write_report", fail)
    summary = loop.run(configure(), halfway)
    assert summary["status"] == "completed"
    assert "No space left" in summary["side_channel_failures"]["report"]
    assert workdir.read_summary(halfway) == (summary, "")


def test_every_field_that_is_not_in_the_first_release_has_its_history():
    """A new field must say what directories without it did."""
    ours = to_json(config_lib.default_config().to_dict()) | {"start": ""}
    for options in model_configs().values():  # those of all models at once
        ours["model"]["options"] |= to_json(dataclasses.asdict(options()))
    assert set(workdir.ADDED) - set(workdir.flatten(ours)) == set()
    ours["data"] |= {"identity": "x", "characters": "y"}
    theirs = json.loads(json.dumps(ours))
    for name in workdir.ADDED:
        *sections, leaf = name.split(".")
        tree = theirs
        for section in sections:
            tree = tree[section]
        del tree[leaf]
        if not tree:
            del theirs[sections[0]]
    assert workdir.differing(theirs, ours) == []
    ours["data"]["resident"] = True
    assert workdir.differing(theirs, ours) == ["data.resident"]


@pytest.mark.parametrize("release", ["2026-11-28", "2026-11-29"])
def test_directories_of_older_releases_go_on(configure, accept, corpus_dir, tmp_path, release):
    """What they lack is filled in; the data is here, as its hash says."""
    folder = tmp_path / "run"
    with tarfile.open(FIXTURES / f"workdir-{release}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    metadata = folder / "checkpoints" / "2" / "metadata" / "metadata"
    stored = json.loads((folder / "config.json").read_text())
    assert "start" not in stored and ("model_devices" in stored) == (release == "2026-11-29")
    # Its corpus was made in another place by another release: the same samples, another hash.
    stored["data"]["identity"] = corpora.content_hash(corpus_dir)
    (folder / "config.json").write_text(json.dumps(stored))
    carried = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(carried | {"config": stored}))
    given = {
        name: value
        for name, value in workdir.flatten(stored).items()
        if name not in ("data.identity", "data.characters", "data.dir", "server.options")
    }
    config = configure({name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    with pytest.raises(UserError, match=r"differs in data\.resident"):
        accept(config | {"data": config["data"] | {"resident": True}}, folder)
    summary = loop.run(config, folder)
    assert (summary["status"], summary["rounds"]) == ("completed", 4)
    assert [r["round"] for r in read_metrics(folder)] == [0, 1, 2, 3, 4]
    assert summary["initial_wer"] == {"dev": carried["initial"]["dev"]["wer"]}


def test_a_run_goes_on_with_other_devices_and_says_that_it_did(
    configure, monkeypatch, capsys, tmp_path
):
    config = configure({"checkpoint.every": 1, "checkpoint.keep": 9, "privacy.sigma": 0.1})

    def run(folder, count, since=None):
        if since is not None:  # as a kill after that round would have left it
            (folder / "summary.json").unlink()
            for later in range(since + 1, 5):
                shutil.rmtree(folder / "checkpoints" / str(later))
        with monkeypatch.context() as patch:
            patch.setattr(devices, "run_devices", lambda config: jax.devices()[:count])
            summary = loop.run(config, folder)
        return summary["device_changes"], capsys.readouterr().err

    whole, stays, moves = tmp_path / "whole", tmp_path / "stays", tmp_path / "moves"
    assert run(whole, 1)[0] == []
    shutil.copytree(whole, stays)
    shutil.copytree(whole, moves)
    changes, said = run(stays, 1, since=2)
    assert changes == [] and "resuming in stage 'main' at 2, exactly: on 1 x cpu" in said
    same_params(stays, whole)
    (stays / "users.json").unlink()  # killed after the last checkpoint: it evaluates once more
    run(stays, 1, since=4)
    assert (stays / "users.json").read_bytes() == (whole / "users.json").read_bytes()
    changes, said = run(moves, 2, since=1)
    assert changes == ["1 x cpu -> 2 x cpu at 1"]
    assert "at 1 with 1 x cpu -> 2 x cpu: sums are in another order" in said and "1e-5" in said
    changes, said = run(moves, 1, since=3)
    assert changes == ["1 x cpu -> 2 x cpu at 1", "2 x cpu -> 1 x cpu at 3"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0),
        restore_params(moves),
        restore_params(whole),
    )


def test_what_else_bits_follow_from_is_compared_with_the_checkpoint(
    halfway, whole, configure, capsys, monkeypatch
):
    monkeypatch.setattr(exactness, "source", lambda: "0123456789")
    summary = loop.run(configure(), halfway)
    (change,) = summary["device_changes"]
    assert change.startswith("code ") and change.endswith(" -> code 01234567 at 2")
    said = capsys.readouterr().err
    assert f"at 2 with {change.removesuffix(' at 2')}: what is computed may be another" in said
    same_params(halfway, whole[0])
    # What people are told of it says the same, wherever it was.
    assert exactness.meaning(["1 x cpu -> 2 x cpu at 1", change]) == exactness.NEW_CODE
    assert exactness.meaning(["1 x cpu -> 2 x cpu at 1"]) == exactness.NEW_ORDER

    ours = exactness.here(jax.devices()[:1], 4)
    assert ours["devices"] == "1 x cpu" and ours["jax"] == jax.__version__ and ours["processor"]
    assert exactness.changes({}, ours) == exactness.changes(dict(ours), ours) == []
    assert ours["cores"] == len(os.sched_getaffinity(0))
    theirs = {**ours, "chunk": 2, "jax": "0.1", "processor": "other", "devices": "2 x cpu"}
    theirs["cores"] = 99
    assert exactness.changes(theirs, ours) == [
        "2 x cpu -> 1 x cpu",
        f"99 cores -> {ours['cores']} cores",
        "chunk=2 -> chunk=4",
        f"processor other -> processor {ours['processor']}",
        f"jax 0.1 -> jax {jax.__version__}",
    ]
    assert exactness.changes({**theirs, "chunk": None}, ours)[2].startswith("processor")
    assert exactness.changes({**theirs, "cores": None}, ours)[1].startswith("chunk")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are pinned on Linux")
def test_a_process_that_is_pinned_has_other_cores(monkeypatch):
    """As many devices then divide their work among other numbers of threads."""
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert exactness.here(jax.devices()[:1], 1)["cores"] == 1
    finally:
        os.sched_setaffinity(0, mine)
    monkeypatch.setenv("NPROC", "7")
    assert exactness.machine(jax.devices())["cores"] == 7


def test_a_lost_chunk_file_is_that_of_the_checkpoint(halfway, monkeypatch):
    """Found anew it might be another, as the memory is that there is now."""
    (folder,) = (halfway / "checkpoints" / "2" / "metadata").glob("metadata")
    carried = json.loads(folder.read_text())
    assert carried["chunk"] == 1 and carried["devices"] == f"{len(jax.devices())} x cpu"
    config = Config.of(carried["config"])
    parts = session.make_parts(config, Path(config.data.dir), halfway)

    def chunk_of(metadata):
        monkeypatch.setattr(federated, "read_metadata", lambda folder: metadata)
        return federated.FederatedTrainer(parts, halfway).chunk

    assert chunk_of(carried | {"chunk": 2}) == 1  # chunk.json says so
    (halfway / "chunk.json").unlink()
    assert chunk_of(carried | {"chunk": 2}) == 2
    assert chunk_of(carried | {"chunk": 2, "devices": "8 x H200"}) == 1
    assert chunk_of({}) == 1
