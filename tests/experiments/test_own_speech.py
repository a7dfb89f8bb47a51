"""The recipe for one's own speech chooses from the data, says so, and runs."""

import functools

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.privacy.accounting import rdp_epsilon
from fedasr.recipes import own_speech
from fedasr.recipes.tables import expansion
from fedasr.training import loop, stages
from fedasr.training.builders import corpora, mechanisms, whole
from fedasr.training.config import Config
from fedasr.training.logging import to_json


def sound(number=0):
    return 0.1 * np.random.default_rng(number).standard_normal(16_000, np.float32), 16_000


def make(directory, users, texts=("one two", "two six"), **options):
    """`users` {split: number}, each of which says all texts."""
    utterances = [
        Utterance(
            f"{split}{user}-{i}",
            f"{split}{user}",
            text,
            split,
            lambda i=i: (
                0.1 * np.random.default_rng(i).standard_normal(16_000, np.float32),
                16_000,
            ),
        )
        for split, number in users.items()
        for user in range(number)
        for i, text in enumerate(texts)
    ]
    prepare(utterances, directory, name="own", **options)
    return directory


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six training users, where the default cohort is eight."""
    users = {"seed": 1, "train": 6, "dev": 1, "test": 1}
    return make(tmp_path_factory.mktemp("six") / "data", users)


def test_six_users_train(six, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)
    config = own_speech.get_config(f"data={six}")
    said = capsys.readouterr().err
    assert "6 training users with 2 utterances each" in said and "cohort 3" in said
    assert "lexicon decoding" in said and said.count("\n") == 1
    own_speech.get_config(f"data={six}")
    assert capsys.readouterr().err == ""  # once
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.update(rounds=2, devices=1)
    config.seed_training.steps = 1
    config.evaluation.every = 1
    summary = loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert summary["status"] == "completed" and summary["cohort"] == 3
    assert summary["selection"]["split"] == "dev"
    assert sum("transcripts of 'train+seed'" in x for x in summary["privacy"]["not_covered"]) == 1
    for cohort in (7, 8):
        config.cohort = cohort
        with pytest.raises(UserError, match=r"set cohort to 6 or less .*own_speech"):
            loop.run(to_json(config.to_dict()), tmp_path / "more")


def test_decay_and_noise_follow_the_rounds(six):
    config = own_speech.get_config(f"data={six}")
    assert (config.rounds, config.server.decay_start, config.server.decay_rounds) == (120, 80, 30)
    epsilons = []
    for rounds in (60, 120, 600):
        config.rounds = rounds
        assert config.server.decay_start == rounds * 2 // 3
        settings = Config.of(to_json(config.to_dict()))
        sampler = mechanisms.make_sampler(settings, 6)
        deployed = mechanisms.make_mechanism(settings, sampler).deployed(1024, 1_000_000)
        relation = deployed.sampler.neighboring_relation
        epsilons.append(rdp_epsilon(deployed.event(rounds), 1e-9, relation))
    assert max(epsilons) < 1.05 * min(epsilons)
    config = own_speech.get_config(f"data={six},rounds=1")
    assert config.server.decay_rounds == 1


def test_central_training_sees_as_many_utterances_as_the_rounds(six):
    config = own_speech.get_config(f"data={six}")
    assert (config.cohort, config.client.steps, config.client.batch_size) == (3, 1, 4)
    assert config.central.steps == 120 * 3 * 4 // 16
    config.rounds = 121
    assert config.central.steps == 91  # rounded up


def test_every_row_of_the_table_can_be_run(six):
    (table,) = own_speech.TABLES.values()
    expansion.check(table)
    found = {}
    for row in table.rows:
        config = own_speech.get_config(row.arguments.replace("data/mine", str(six)))
        tree = to_json(config.to_dict())
        for name, value in row.overrides.items():
            *parts, leaf = name.split(".")
            section = functools.reduce(dict.__getitem__, parts, tree)
            # Or the row would be another's; this corpus is so small that the seed has few steps.
            assert section[leaf] != value or leaf == "steps", (row.name, name)
            section[leaf] = value
        found[row.name] = whole.checked(tree)
    assert found["private"].privacy.enabled and not found["federated"].privacy.enabled
    conformer, transformer = (found[x].model.options for x in ("federated", "Transformer"))
    assert "conv_kernel" in conformer and "front_end" in transformer
    assert conformer["vocab"] == transformer["vocab"] and conformer["dropout"] == 0.1


def test_without_a_seed_split(tmp_path, capsys):
    make(tmp_path / "data", {"train": 5, "dev": 1})
    config = own_speech.get_config(f"data={tmp_path / 'data'}")
    assert config.seed_training.steps == 0 and "seed_share=20" in capsys.readouterr().err
    config = own_speech.get_config(f"data={tmp_path / 'data'},seed_share=40")
    assert config.data.train == "train[40%:]" and config.seed_training.split == "train[:40%]"
    assert config.seed_training.steps == 250 and config.cohort == 1
    assert "3 training users" in capsys.readouterr().err
    assert config.decoding.lm == "from_train[40%:]+train[:40%]"
    loop.dry_run(to_json(config.to_dict()))


def test_splits_of_other_names(tmp_path):
    """As LibriSpeech has them; who trains is not judged by."""
    split = {"train_a": 2, "train_b": 2, "dev_clean": 2, "dev_other": 1, "test_clean": 1}
    make(tmp_path / "data", split)
    config = own_speech.get_config(f"data={tmp_path / 'data'}")
    assert config.data.train == "train_a+train_b" and config.cohort == 2
    assert config.data.eval == ("dev_clean", "dev_other", "test_clean")
    assert config.selection.split == "dev_clean"
    loop.dry_run(to_json(config.to_dict()))
    config = own_speech.get_config(f"data={tmp_path / 'data'},train=dev_clean[50%:]")
    assert config.data.train == "dev_clean[50%:]" and config.cohort == 1
    assert config.data.eval == ("dev_other", "test_clean")
    with pytest.raises(UserError, match="one whole split"):
        own_speech.get_config(f"data={tmp_path / 'data'},seed_share=20")
    make(tmp_path / "one", {"dev_clean": 3})
    with pytest.raises(UserError, match=r"only dev_clean: .*train=dev_clean\[20%:\]"):
        own_speech.get_config(f"data={tmp_path / 'one'}")
    config = own_speech.get_config(f"data={tmp_path / 'one'},train=dev_clean")
    assert config.data.eval == () and config.selection.split == ""


def test_decoding_follows_the_words(tmp_path, capsys):
    """Words that dev says and train does not: beyond a few, no list of words is closed."""

    def corpus(name, texts, split="dev"):
        said = [("train", "a b c d")] * 4 + [(split, text) for text in texts]
        utterances = [
            Utterance(f"{i}", f"{split}{i}", text, split, sound)
            for i, (split, text) in enumerate(said)
        ]
        prepare(utterances, tmp_path / name, name="x")
        return own_speech.get_config(f"data={tmp_path / name}")

    assert corpus("known", ["a b", "c d"]).decoding.name == "lexicon"
    assert corpus("some", ["a b", "c e"]).decoding.name == "beam"
    assert corpus("none", ["e f", "g d"]).decoding.name == "greedy"
    assert "75% of dev's words are in no transcript" in capsys.readouterr().err
    # The words of who tests choose nothing.
    assert corpus("untuned", ["a b"], "test").decoding.name == "beam"
    none = own_speech.get_config(f"data={tmp_path / 'known'},language=none")
    assert none.decoding.name == "greedy" and not none.decoding.lm


def test_another_script(tmp_path):
    text = "\u043e\u0434\u0438\u043d \u0434\u0432\u0430"
    make(tmp_path / "data", {"train": 2, "dev": 1}, [text], language="ru", alphabet="cyrillic")
    config = own_speech.get_config(f"data={tmp_path / 'data'}")
    assert config.model.options.vocab > 30 and config.decoding.name == "lexicon"
    loop.dry_run(to_json(config.to_dict()))


def test_mistakes(six, tmp_path):
    for arguments, match in (
        ("", "own_speech:data=DIR"),
        (f"data={six},round=3", "no argument 'round=3'"),
        (f"data={six},seed_share=95", "seed_share=95"),
        (f"data={six},language=dev", "choose one of all, train, seed, none"),
        (f"data={tmp_path}", str(tmp_path)),
    ):
        with pytest.raises(UserError, match=match):
            own_speech.get_config(arguments)


def test_data_that_is_not_there_is_told_of_when_it_is_used(tmp_path, capsys):
    config = own_speech.get_config(f"data={tmp_path / 'nowhere'},rounds=9")
    assert config.rounds == 9 and "is not there" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere"):
        loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_transcripts_too_long_for_the_model_are_counted(tmp_path):
    """One second: 33 encoder frames of 30 ms, 25 of 40."""
    make(tmp_path / "data", {"train": 3, "dev": 1}, ["go", "seven nine seven nine seven o"])
    said = []
    for model in ("conformer", "transformer"):
        config = own_speech.get_config(f"data={tmp_path / 'data'},model={model}")
        corpora.Data(tmp_path / "data", Config.of(to_json(config.to_dict())), said.append)
    (told,) = [text for text in said if "stride" in text]
    assert "stride is 4" in told and "3 of 6 training transcripts are too long" in told
