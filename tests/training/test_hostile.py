"""Every field of a configuration meets values that make no sense; run and dry run agree on each."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr import fields
from fedasr.audio.augment import SpecAugmentConfig
from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.models.recogniser import model_configs
from fedasr.training import config as config_lib
from fedasr.training import loop, stages
from fedasr.training.builders import corpora

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")

SPEC = fields.flatten(config_lib.fields())
HOSTILE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "-0.5": -0.5,
    "1e300": 1e300,
    "10**30": 10**30,
    "None": None,
    "True": True,
    "empty text": "",
    "unknown name": "tset",
    "control character": "a\nb",
    "empty list": [],
    "list of nan": [math.nan],
    "list of an unknown name": ["tset"],
    "list of empty text": [""],
    "empty mapping": {},
    "mapping to nan": {"b1": math.nan},
    "mapping to null": {"b1": None},
    "unknown option": {"no_such_option": 1},
}
FLAGS = {name for name, field in SPEC.items() if isinstance(field.default, bool)}
# All that makes sense of the above, whatever the field; the rest has to be refused.
SENSIBLE = {
    *((name, "True") for name in FLAGS),
    ("name", "unknown name"),  # any name will do
    ("init_from", "empty text"),
    ("data.dir", "empty text"),
    ("compression.download", "empty text"),
    ("compression.upload", "empty text"),
    ("data.eval", "empty list"),
    ("evaluation.while_training", "empty list"),
    ("local.patterns", "empty list"),
    ("privacy.deployments", "empty list"),
    ("partial.patterns", "list of an unknown name"),  # unless mode is "fixed": see below
    ("model.options", "empty mapping"),
    ("peft.patterns", "empty list"),
    ("peft.patterns", "list of an unknown name"),  # unless the kind has a use for them
    ("peft.also", "empty list"),
    ("peft.also", "list of an unknown name"),  # likewise
    ("augment.options", "empty mapping"),
    ("server.options", "empty mapping"),
    ("algorithm_options", "empty mapping"),
    ("participation.trace", "empty text"),
    ("data.skew", "empty text"),
    ("central.options", "empty mapping"),
    ("decoding.lm", "empty text"),
    ("decoding.word_bonus", "-1"),
    ("decoding.word_bonus", "-0.5"),
    ("decoding.lexicon", "empty text"),
    ("selection.split", "empty text"),
    ("seed_training.options", "empty mapping"),
}
BEAM = {"decoding.name": "beam", "decoding.lm": "from_train"}
# What does not fit the rest of this configuration.
MISFITS = {
    ("compression.measure", "True"),
    ("central.decay_linear", "True"),  # to 0 in no steps
    ("seed_training.decay_linear", "True"),
}


class Reached(Exception):
    """Training would begin now."""


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Half a second of noise for each of 4 users, in the usual splits."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    utterances = [
        Utterance(f"{split}-{user}", f"{split}-{user}", "one two", split, lambda: noise)
        for split, users in {"seed": 1, "train": 4, "dev": 1, "test": 1}.items()
        for user in range(users)
    ]
    out = tmp_path_factory.mktemp("hostile") / "data"
    prepare(utterances, out, name="noise")
    return out


@pytest.fixture
def verdicts(corpus_dir, tmp_path, monkeypatch):
    """verdicts(changes): what dry run and run say of a configuration: None, or the refusal."""

    def reach(*args):
        raise Reached

    monkeypatch.setattr(stages, "run_stages", reach)
    # The synthetic corpus is not made for this; what comes before that is the same.
    monkeypatch.setattr(
        corpora, "data_directory", lambda config: Path(config.data.dir or corpus_dir)
    )
    runs = 0

    def of(changes):
        nonlocal runs
        runs += 1
        config = config_lib.default_config().to_dict()
        config["data"]["dir"], config["cohort"], config["rounds"] = str(corpus_dir), 0, 2
        config["privacy"].update(sampler="everyone", deployments=((9, 9),))  # quick to account for
        config["model"]["options"].update(dim=16, blocks=1, heads=2, mlp=16)
        for name, value in changes.items():
            *sections, leaf = name.split(".")
            tree = config
            for section in sections:
                tree = tree[section]
            tree[leaf] = value
        workdir, found = tmp_path / str(runs), []
        for run in (loop.dry_run, lambda config: loop.run(config, workdir)):
            try:
                run(config)
                found.append(None)
            except Reached:
                found.append(None)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                found.append(str(error))
        assert (found[0] is None) == (found[1] is None), (changes, found)
        if found[1] is not None:
            assert not (workdir / "config.json").exists()
        return found[1]

    return of


@pytest.mark.parametrize("section", sorted({name.split(".")[0] for name in SPEC}))
def test_nonsense_is_refused_and_nothing_else_is(verdicts, section):
    for name in SPEC:
        if name.split(".")[0] == section:
            for label, value in HOSTILE.items():
                refusal = verdicts({name: value})
                if (name, label) in MISFITS:
                    assert refusal
                elif (name, label) in SENSIBLE:
                    assert refusal is None, (name, label, refusal)
                else:
                    assert refusal, (name, label, "was accepted")
                    told = (name.split(".")[-1], str(value), "no_such_option")
                    assert any(word in refusal for word in told), (name, refusal)


@pytest.mark.parametrize(
    "options", [*model_configs().values(), SpecAugmentConfig], ids=lambda options: options.__name__
)
def test_options_are_checked_by_their_classes(options):
    default = options()
    for field in fields.dataclasses.fields(default):
        for label, value in HOSTILE.items():
            sensible = field.type in (bool, "bool") and label == "True"
            sensible |= value == "" and getattr(default, field.name) == ""
            try:
                options(**{field.name: value})
            except UserError as error:
                assert "\n" not in str(error) and field.name in str(error)
                assert not sensible, (field.name, label)
            else:
                assert sensible, (field.name, label)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.while_training": ("tset",)}, "while_training: there is no split 'tset'"),
        ({"data.eval": ("dev", "tset")}, "data.eval: there is no split 'tset'"),
        ({"seed_training.split": "sead"}, "seed_training.split: there is no split"),
        ({"data.train": "train[:200%]"}, "data.train"),
        ({"seed": 2**32}, "seed=4294967296 must be at most"),  # would be seed 0
        ({"partial.mode": "fixed", "partial.patterns": ("tset",)}, "'tset' matches none"),
        ({"server.options": {"b1": 1.0}}, "server.options.b1=1.0"),
        ({"server.options": {"b1": "much"}}, "server.options"),
        ({"server.options": {"eps": -1e-6}}, "server.options.eps"),
        ({"model.options": {"vocab": 30, "dropout": 1.0}}, "dropout=1.0 must be below 1"),
        ({"augment.options": {"time_fraction": 2.0}}, "time_fraction"),
        ({"privacy.deployments": ((math.nan, 10),)}, "not .cohort, population"),
        ({"privacy.deployments": ((True, 10),)}, "not .cohort, population"),
        ({"data": {"dir": ""}}, "the configuration lacks data.task"),
        ({"no_such_field": 1}, "no such field in the configuration: no_such_field"),
        ({"client.no_such_field": 1}, "no such field in the configuration: client.no_such_field"),
        ({"client": 1}, "client must be a section"),
        (
            {"algorithm": "central", "central.batch_seconds": 0.1},
            "is shorter than an example",
        ),
        ({"seed_training.steps": 1, "seed_training.batch_seconds": 0.1}, "shorter than"),
        ({"init_from": "no/such/run"}, "no checkpoint"),
        ({"init_from": "gs:/bucket/run"}, r"init_from='gs:/bucket/run' is not on a file system"),
        ({"data.dir": "s3://bucket/data"}, r"dir='s3://bucket/data' is not on a file system"),
        (BEAM | {"decoding.lm": "/no/such.arpa"}, r"decoding.lm=/no/such.arpa: .*cannot be read"),
        (BEAM | {"decoding.lm": "/dev/null"}, "decoding.lm=/dev/null: .* no whole ARPA file"),
        (BEAM | {"decoding.lm": "from_tset"}, "decoding.lm=from_tset: there is no split 'tset'"),
        (BEAM | {"decoding.lm": "from_dev"}, "what its error rate is measured with"),
        (BEAM | {"decoding.lm": "gs://bucket/x"}, "lm='gs://bucket/x' is not on a file system"),
        (BEAM | {"decoding.lexicon": "."}, "decoding.lexicon=.: .*cannot be read"),
        (BEAM | {"decoding.lexicon": "~"}, "decoding.lexicon=~: .*cannot be read"),
        # The same where the synthetic corpus is still to be made.
        (BEAM | {"data.dir": "", "decoding.lm": "no.arpa"}, "decoding.lm=no.arpa: .*cannot be"),
        (BEAM | {"data.dir": "", "decoding.lm": "from_tset"}, "there is no split 'tset'"),
        (BEAM | {"data.dir": "", "decoding.lm": "from_test"}, "what its error rate is measured"),
    ],
)
def test_what_does_not_fit_together_is_refused_alike(verdicts, changes, words):
    refusal = verdicts(changes)
    assert refusal
    assert re.search(words, refusal), refusal


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_field_holds_nothing_but_finite_numbers_text_and_sequences_of_them(data):
    name = data.draw(st.sampled_from(sorted(SPEC)))
    value = data.draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=5,
        )
    )

    def finite(tree):
        if isinstance(tree, dict):
            return all(map(finite, tree.values()))
        if isinstance(tree, list):
            return all(map(finite, tree))
        return tree is not None and (not isinstance(tree, float) or math.isfinite(tree))

    if SPEC[name].check(value) is None:
        assert finite(value)
        number = isinstance(SPEC[name].default, int | float) and name not in FLAGS
        assert not number or (value >= 0 and not isinstance(value, bool))
