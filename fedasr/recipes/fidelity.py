"""What was published, item by item, beside what is here: the table of docs/fidelity.md.

    python -m fedasr.recipes.fidelity > docs/fidelity.md

Each `Item` is checked against the code by tests: by the settings of a recipe, by a test that holds
the computation against the description, or both. What differs says why. It is one table, so it is
one file, however long.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

SAME, OPTION, DIFFERS = "same", "option", "differs"


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of the table.

    Attributes:
      name: what it is about.
      published: what the paper or its authors' public programs do.
      ours: what the published recipes do here.
      how: `SAME`, as published without an option made for it; `OPTION`, the recipes set what other
        configurations do not have; `DIFFERS`.
      because: why, where it differs.
      recipe: a recipe with its arguments, "name:key=value,key=value".
      fields: of the recipe's configuration, by dotted name, with their values.
      test: "file::test" under tests/ that holds the computation against its description.
    """

    name: str
    published: str
    ours: str
    how: str
    because: str = ""
    recipe: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test: str = ""


def _of_recipe(name: str, published: str, how: str, recipe: str, **fields: Any) -> Item:
    """An item that is the settings of a recipe; two underscores in a name are a dot."""
    named = {field.replace("__", "."): value for field, value in fields.items()}
    ours = ", ".join(f"`{field}={value!r}`" for field, value in named.items())
    return Item(name, published, ours, how, recipe=recipe, fields=named)


_FORWARD = "models/test_published_transformer.py"
_CV = "common_voice:seed=ls100"
_LS = "librispeech:"


def _model(name: str, published: str, test: str, **options: Any) -> Item:
    named = {f"model.options.{option}": value for option, value in options.items()}
    ours = ", ".join(f"`{field}={value!r}`" for field, value in named.items())
    return Item(name, published, ours, OPTION, recipe=_CV, fields=named, test=f"{_FORWARD}::{test}")


_MODEL = (
    Item(
        "parameters",
        "255M; 114M, 450M, 114M, 510M of other sizes",
        "255,800,864 of the base model",
        SAME,
        test="experiments/test_published.py::test_parameters_are_counted_without_allocating_them",
    ),
    _model(
        "front-end window, lengths",
        'padding "same": 2 or 3 frames before a window\'s first, by the padded length of the '
        "batch; floor(L/3) outputs",
        "test_forward_pass_equals_the_description",
        front_end="same",
    ),
    Item(
        "frames before the first window",
        "3 where the padded length of the batch is 1 more than a multiple of 3, else 2",
        "2",
        DIFFERS,
        "a result here never depends on how far an utterance is padded",
    ),
    _model(
        "dropout",
        "on attention weights, ReLU units and the front end's output before the positions; none "
        "on residual branches",
        "test_dropout_is_where_it_was_published",
        branch_dropout=False,
    ),
    _model(
        "initialisation of front end and output",
        "kernels uniform with variance 1 / fan-in, biases uniform within 1 / sqrt(fan-in)",
        "test_front_end_and_output_begin_as_published",
        init="lecun",
    ),
    _model(
        "precision",
        "bfloat16 in blocks and output; front end and residual stream float32",
        "test_front_end_and_residual_stream_stay_in_float32",
        dtype="bfloat16",
        stream_dtype="float32",
    ),
    Item(
        "attention weights under bfloat16",
        "softmax in bfloat16",
        "softmax in float32",
        DIFFERS,
        "it is nearer to float32",
    ),
    _model(
        "layer drop",
        "one draw for a block and batch, both branches, no rescaling",
        "test_all_parts_of_a_batch_drop_the_same_blocks",
        layer_drop=0.3,
        layer_drop_per="batch",
    ),
    Item(
        "gradients",
        "-",
        "equal to finite differences of the description",
        SAME,
        test=f"{_FORWARD}::test_gradients_equal_differences_of_the_description",
    ),
    Item(
        "epsilon of the norms of the features",
        "1e-7",
        "1e-5",
        DIFFERS,
        "it was the default before it was compared: features of unit variance are scaled by 5e-6 "
        "less",
    ),
    Item(
        "positions",
        "sines and cosines in turn; CAPE with a global shift of up to 30 s",
        "sines, then cosines: the same up to the order of the units, whose weights are drawn alike",
        SAME,
        recipe=_CV,
        fields={
            "model.options.cape_shift": 30.0,
            "model.options.frame_seconds": 0.03,
            "model.options.position_scale": 30.0,
        },
        test=f"{_FORWARD}::test_forward_pass_equals_the_description",
    ),
    Item(
        "SpecAugment, widths and starts",
        "widths 0 to F - 1, at least one position after a mask; filled with 0",
        "`augment.options.inclusive=False`",
        OPTION,
        recipe=_LS,
        fields={
            "augment.options.inclusive": False,
            "augment.options.frequency_width": 30,
            "augment.options.time_width": 50,
            "augment.options.time_masks": 10,
        },
        test="audio/test_augment.py::test_published_masks_are_narrower_and_never_at_the_end",
    ),
    _of_recipe("SpecAugment, start", "from round 1 on", OPTION, _LS, augment__start_round=1),
    Item(
        "SpecAugment, start of central training",
        "from step 1 on",
        "from step 0 on",
        DIFFERS,
        "another program would be compiled for one step in 300,000, whose rate is mostly 0 there",
    ),
)

_BATCHES = (
    Item(
        "a client's batches",
        "64 utterances at a time in the order of their lengths, each batch as many as fit into "
        "its seconds with padding; batches shuffled",
        "`client.batch_buffer=64`",
        OPTION,
        recipe=_CV,
        fields={"client.batch_buffer": 64, "client.batch_seconds": 120.0},
        test="data/test_batching.py::test_batches_of_padded_seconds_of_a_fixed_list_of_lengths",
    ),
    _of_recipe(
        "audio in a client's batch, LibriSpeech", "360 s", SAME, _LS, client__batch_seconds=360.0
    ),
    Item(
        "what a second is",
        "16,000 samples",
        "100 frames: 15 ms less for each utterance",
        DIFFERS,
        "frames are what is stored",
    ),
    Item(
        "order of utterances",
        "shuffled over 20,000, that is all of a user's, again in every epoch",
        "the same, by another generator",
        SAME,
        test="data/test_batching.py::test_every_epoch_holds_each_example_once",
    ),
    Item(
        "batches computed in parts",
        "whole",
        "parts of at most 2 utterances, whose gradients are averaged (`client.micro_batch=2`)",
        SAME,
        recipe=_CV,
        fields={"client.micro_batch": 2},
        test="data/test_micro_batches.py::test_gradient_is_that_of_the_whole_batch",
    ),
    Item(
        "batches of central training",
        "on each of 8 devices its own, as a client's, 512 utterances at a time",
        "8 devices' seconds together, of like length over the whole pass",
        DIFFERS,
        "one shape for all devices: every other length would be a program to compile",
    ),
)

_OPTIMIZERS = (
    Item(
        "LAMB",
        "eps 1e-6, no weight decay",
        "the same",
        OPTION,
        recipe="common_voice:",
        fields={"server.optimizer": "lamb", "server.options": {"eps": 1e-6}},
        test="federated/test_server.py::test_steps_of_the_published_options_equal_the_formulae",
    ),
    Item(
        "LARS",
        "trust .001, momentum .9, eps 1e-6 on the server and 1e-8 in central training",
        "the same",
        OPTION,
        recipe="common_voice:optimizer=lars",
        fields={"server.options": {"eps": 1e-6}, "central.options": {"eps": 1e-8}},
        test="federated/test_server.py::test_steps_of_the_published_options_equal_the_formulae",
    ),
    Item(
        "AdaGrad",
        "accumulator from 0, eps 1e-8 added after the division",
        "accumulator from 0, no eps: equal to 1e-6",
        OPTION,
        recipe="common_voice:optimizer=adagrad",
        fields={"server.options": {"initial_accumulator_value": 0.0, "eps": 0.0}},
        test="federated/test_server.py::test_adagrad_as_published_is_no_sgd",
    ),
    Item(
        "Adam, AdamW, Yogi, SGD",
        "optax's, with its defaults",
        "the same",
        SAME,
        recipe="common_voice:optimizer=adam",
        fields={"server.options": {}},
        test="federated/test_server.py::test_optimizer_options_are_optax_own",
    ),
    Item(
        "server rates of other optimisers than LAMB",
        "in no public configuration",
        "a grid of ours",
        DIFFERS,
        "not known",
    ),
    Item(
        "small optimiser table",
        "AdaGrad from 0",
        "`mini_optimizers` has it so, measured anew; figures with optax's accumulator beside them",
        OPTION,
        recipe="mini:adagrad=published",
        fields={"server.options": {"initial_accumulator_value": 0.0, "eps": 0.0}},
    ),
    _of_recipe(
        "client's optimiser",
        "SGD at a constant rate, gradients clipped to 1",
        SAME,
        _CV,
        client__optimizer="sgd",
        client__learning_rate=0.2,
        client__grad_clip=1.0,
    ),
)


def _baseline(name: str, arguments: str, start: int, published: str, **fields: Any) -> Item:
    known: dict[str, Any] = {
        "central.learning_rate": 0.5,
        "central.decay_start": start,
        "central.decay_steps": 50_000,
        "central.decay_rate": 0.5,
        "central.decay_smooth": False,
        "central.batch_seconds": 8 * 240.0,
        "model.options.dtype": "bfloat16",
        "model.options.dropout": 0.3,
        "model.options.layer_drop": 0.3,
    }
    named = {field.replace("__", "."): value for field, value in fields.items()}
    recipe, _, rest = arguments.partition(":")
    return Item(
        f"central `{name}`",
        f"LARS, {published}",
        "the same",
        OPTION,
        recipe=f"{recipe}:training=central{',' if rest else ''}{rest}",
        fields=known | named,
        test="training/test_central.py::test_schedules_are_constant_until_they_decay",
    )


_SMOOTH: dict[str, Any] = {"central__decay_smooth": True}
_LOW: dict[str, Any] = {"central__learning_rate": 0.2}
_TENTH: dict[str, Any] = {
    **_SMOOTH,
    "central__decay_steps": 25_000,
    "central__batch_seconds": 8 * 216.0,
    "model__options__dropout": 0.4,
    "model__options__layer_drop": 0.4,
}
_HALVED = "then halved at once and every 50,000"
_TENTH_SAID = (
    "rate .5 to step 100,000, then halved smoothly within every 25,000; dropout and layer drop .4, "
    "216 s a device"
)
_SCHEDULES = (
    _baseline("ls", "librispeech:", 250_000, "rate .5 to step 250,000, then smoothly", **_SMOOTH),
    _baseline(
        "cv_to_ls",
        "librispeech:seed=cv,baseline=cv_to_ls",
        250_000,
        "rate .5 to step 250,000, then smoothly",
        **_SMOOTH,
    ),
    _baseline("cv_en_to_ls", "librispeech:seed=cv", 100_000, f"rate .5 to 100,000, {_HALVED}"),
    _baseline("ls_100", "librispeech:split=ls100", 330_000, f"rate .5 to 330,000, {_HALVED}"),
    _baseline("ls_100_to_860", "librispeech:seed=ls100", 150_000, f"rate .5 to 150,000, {_HALVED}"),
    _baseline(
        "cv_en",
        "common_voice:",
        330_000,
        f"rate .5 to 330,000, {_HALVED}; float32",
        model__options__dtype="float32",
    ),
    _baseline("ls_100_to_cv", "common_voice:seed=ls100", 40_000, f"rate .5 to 40,000, {_HALVED}"),
    _baseline("ls_to_cv", "common_voice:seed=ls960", 150_000, f"rate .5 to 150,000, {_HALVED}"),
    _baseline(
        "cv_en_10_to_90",
        "common_voice:seed=cv10",
        150_000,
        f"rate .2 to 150,000, {_HALVED}",
        **_LOW,
    ),
    _baseline("cv_en_10", "common_voice:split=cv10", 100_000, _TENTH_SAID, **_TENTH),
    _baseline("cv_fr", "common_voice:language=fr", 200_000, f"rate .5 to 200,000, {_HALVED}"),
    _baseline("cv_fr_10", "common_voice:language=fr,split=cv10", 100_000, _TENTH_SAID, **_TENTH),
    _baseline(
        "cv_fr_10_to_90",
        "common_voice:language=fr,seed=cv10",
        150_000,
        f"rate .2 to 150,000, {_HALVED}",
        **_LOW,
    ),
    _baseline(
        "cv_de", "common_voice:language=de", 150_000, f"rate .2 to 150,000, {_HALVED}", **_LOW
    ),
    _baseline("cv_de_10", "common_voice:language=de,split=cv10", 100_000, _TENTH_SAID, **_TENTH),
    _baseline(
        "cv_de_10_to_90",
        "common_voice:language=de,seed=cv10",
        200_000,
        f"rate .5 to 200,000, {_HALVED}",
    ),
    Item(
        "seed or baseline on 5% of Common Voice",
        "no public configuration",
        "those of 10%",
        DIFFERS,
        "they are the nearest",
    ),
    Item(
        "central LibriSpeech from Common Voice",
        "two configurations, `cv_to_ls` and `cv_en_to_ls`",
        "`cv_en_to_ls`, or `baseline=cv_to_ls`",
        DIFFERS,
        "which of them the paper's table has is not said",
    ),
    Item(
        "number of central steps",
        "300,000 to 600,000",
        "200,000 after the rate begins to fall, at least 300,000",
        DIFFERS,
        "not said for each",
    ),
    Item(
        "first step of halving schedules",
        "rate 0",
        "the full rate",
        DIFFERS,
        "a warm-up of one step is one step less",
    ),
    Item(
        "later halvings",
        "49,999, 99,999, ... steps after the first",
        "50,000, 100,000, ... steps after it",
        DIFFERS,
        "one step in 50,000",
    ),
)

_ROUNDS = (
    _of_recipe(
        "LibriSpeech from scratch",
        "client .4, server .006 to round 1,000, then times .6 every 500; 10 epochs",
        SAME,
        _LS,
        client__learning_rate=0.4,
        server__learning_rate=0.006,
        server__decay_start=1000,
        server__decay_rounds=500,
        client__epochs=10,
        rounds=2000,
    ),
    _of_recipe(
        "LibriSpeech from a seed",
        "client .2, server .003 to round 1,000, then times .6 every 250; 10 epochs",
        SAME,
        "librispeech:seed=cv",
        client__learning_rate=0.2,
        server__learning_rate=0.003,
        server__decay_start=1000,
        server__decay_rounds=250,
    ),
    _of_recipe(
        "Common Voice from a seed",
        "client .2, server .002 to round 750, then times .6 every 750; 10 epochs",
        SAME,
        _CV,
        client__learning_rate=0.2,
        server__learning_rate=0.002,
        server__decay_start=750,
        server__decay_rounds=750,
        client__epochs=10,
    ),
    _of_recipe(
        "more than 256 users a round, without noise",
        "10 local steps, updates clipped to .01 all together",
        OPTION,
        "common_voice:seed=ls100,cohort=1024",
        client__steps=10,
        client__epochs=0,
        privacy__clip_norm=0.01,
        privacy__budget="global",
        privacy__sigma=0.0,
        privacy__sampler="fixed",
    ),
    _of_recipe(
        "with noise",
        "10 local steps, C = .01, 1,024 users",
        SAME,
        "common_voice:seed=ls100,cohort=1024,clipping=dim,sigma=10e-6",
        client__steps=10,
        privacy__clip_norm=0.01,
        privacy__budget="dim",
        cohort=1024,
    ),
    Item(
        "cohort with noise",
        "so many users without replacement, accounted for as if it were Poisson",
        "Poisson",
        DIFFERS,
        "what is claimed must be what was done; `--config.privacy.sampler=fixed` for the other",
        recipe="common_voice:seed=ls100,cohort=1024,clipping=dim,sigma=10e-6",
        fields={"privacy.sampler": "poisson"},
    ),
    Item(
        "rounds with noise",
        "2,006 in the paper's accounts, 2,000 in the programs",
        "2,006",
        SAME,
        recipe="common_voice:seed=ls100,cohort=1024,clipping=dim,sigma=10e-6",
        fields={"rounds": 2006},
    ),
    Item(
        "clipping per layer",
        "clips in the paper; the programs bring every layer to its bound where the whole is over C",
        "clips; the other with `normalise=true`",
        OPTION,
        recipe="common_voice:seed=ls100,cohort=1024,clipping=dim,normalise=true",
        fields={"privacy.normalise": True},
        test="privacy/test_clipping.py::test_normalising_is_all_or_nothing",
    ),
    Item(
        "FedProx",
        "mu / 2 times the squared distance in the paper; the programs add mu times the distance",
        "the paper's",
        DIFFERS,
        "it is what FedProx is; the gradient of the distance is not defined where training begins",
    ),
    Item(
        "users of 10% and 90%",
        "drawn with a generator's seed",
        "the first in the order of a hash of their names",
        DIFFERS,
        "the order does not depend on a library's generator",
    ),
)

_EVALUATION = (
    Item(
        "word error rate",
        "mean of the utterances' rates, weighted by words + 2; utterances over 30 s left out",
        "`wer_published` beside `wer`, that of the corpus with all utterances",
        OPTION,
        recipe=_CV,
        fields={"evaluation.published": True},
        test="training/test_evaluation.py::"
        "test_the_published_rate_weighs_utterances_and_leaves_long_ones_out",
    ),
    Item(
        "padding in the word error rate",
        "each empty place of a batch counts as one word",
        "not counted",
        DIFFERS,
        "the rate would depend on the batches; by estimate it is lower by half a percent of itself",
    ),
    Item(
        "decoding",
        "greedy, no language model",
        "the same",
        SAME,
        test="training/test_evaluation.py::test_every_utterance_once_with_the_error_rates_by_hand",
    ),
    Item(
        "punctuation in transcripts",
        "removed: what `-`, `/` or `...` separate, and U+2014, becomes one word",
        "separates words; the other with `prepare --text_rules=published`",
        DIFFERS,
        "words are as they are said",
        test="test_published_text.py::test_by_hand",
    ),
    Item(
        "digits, `&`, other scripts in transcripts",
        "digits and signs removed, other scripts transliterated; the utterance is kept",
        "the utterance is skipped and counted, in dev and test splits, too; the other with "
        "`prepare --text_rules=published`",
        DIFFERS,
        "a label must be what is said",
        test="test_published_text.py::test_an_utterance_stays_whatever_its_label_lacks",
    ),
    Item(
        "hyphens at the edges of words",
        "removed",
        "removed",
        SAME,
        test="experiments/test_fidelity.py::test_hyphens_at_the_edges_of_words_go",
    ),
    Item(
        "letters of French and German",
        "27 and 28 more tokens in central configurations, though transcripts are transliterated; "
        "none in federated ones",
        "none; a language's own with `--keep_letters`",
        DIFFERS,
        "one alphabet for all runs that start from one another",
    ),
    Item(
        "transliteration",
        "Unidecode",
        "anyascii, equal on Latin letters that were compared",
        DIFFERS,
        "Unidecode's licence is the GPL",
    ),
    Item(
        "training utterances",
        "up to 30 s; targets with a space at both ends",
        "the same",
        SAME,
        test="data/test_prepare.py::test_labels_have_a_space_on_both_sides_unless_told_otherwise",
    ),
)

_CONFORMER = (
    Item(
        "blocks",
        "17, and a recurrent decoder",
        "21 and CTC: 128.9M parameters",
        DIFFERS,
        "CTC has no decoder; four blocks stand in for its size",
    ),
    Item(
        "compression",
        "nearest numbers to the values",
        "`compression.align=True`",
        DIFFERS,
        "values are scaled to the format's range; `align=False` is the paper's",
    ),
    Item(
        "second weight of weighted client averaging",
        "not legible in what is public",
        "by rare and fresh words, a design of ours",
        DIFFERS,
        "not known",
    ),
)
_SPEECH = "neural:labels=phonemes,training=central"
_WRITING = "neural:model=handwriting,labels=handwriting,training=central"
_GRU, _CORP = "models/test_recurrent.py", "training/test_corp.py"


def _decoder(name: str, published: str, test: str, **options: Any) -> Item:
    named = {f"model.options.{option}": value for option, value in options.items()}
    ours = ", ".join(f"`{field}={value!r}`" for field, value in named.items())
    return Item(name, published, ours, OPTION, recipe=_SPEECH, fields=named, test=f"{_GRU}::{test}")


_NEURAL = (
    _of_recipe(
        "sizes and noise of the speech decoder",
        "five layers of 1,024, windows of 32 bins every 4, white noise 1.0, offset 0.2 (512 and 14 "
        "in the released configuration)",
        OPTION,
        _SPEECH,
        model__options__units=1024,
        model__options__layers=5,
        model__options__window=32,
        model__options__stride=4,
        model__options__white_noise=1.0,
        model__options__offset_noise=0.2,
    ),
    _of_recipe(
        "sizes and noise of the handwriting decoder",
        "two layers of 512, white noise 1.2, offset 0.6, random walk 0.02",
        OPTION,
        _WRITING,
        model__options__units=512,
        model__options__layers=2,
        model__options__white_noise=1.2,
        model__options__offset_noise=0.6,
        model__options__walk_noise=0.02,
    ),
    _decoder(
        "recurrent initialisation",
        "orthogonal over the whole (u, 3u) matrix",
        "test_initial_parameters_as_published",
        recurrent_init="matrix",
    ),
    _decoder(
        "initial state",
        "of the first layer, drawn and trained; zero in the others",
        "test_initial_parameters_as_published",
        initial_states="first",
    ),
    _decoder(
        "random-walk noise",
        "cumulative over channels",
        "test_the_published_walk_is_over_the_channels",
        walk_axis="channels",
    ),
    _decoder(
        "L2 penalty",
        "on the GRU's input kernels and the day layer of the batch",
        "test_the_penalty_is_on_the_published_matrices",
        l2_on="inputs",
    ),
    _decoder(
        "smoothing",
        "9 taps (TensorFlow), 20 (PyTorch: `taps=20`)",
        "test_scores_agree_with_the_equations_whatever_the_padding_holds",
        taps=9,
    ),
    _decoder(
        "windows",
        "whole ones alone, without padding",
        "test_scores_agree_with_the_equations_whatever_the_padding_holds",
        windows="inside",
    ),
    Item(
        "noise and smoothing at a sentence's end",
        "go on into the padding of the batch",
        "end with the sentence",
        DIFFERS,
        "a result here never depends on padding",
    ),
    Item(
        "Adam's epsilon, .1",
        "Keras: outside of the bias correction",
        "`central.optimizer='keras_adam'`",
        OPTION,
        recipe=_SPEECH,
        fields={"central.optimizer": "keras_adam", "central.options.eps": 0.1},
        test="federated/test_server.py::test_steps_of_the_published_options_equal_the_formulae",
    ),
    _of_recipe(
        "central baseline on real data, speech",
        "Adam .02 to 0 in 10,000 steps of 64 sentences of a day, a layer for each day",
        OPTION,
        _SPEECH,
        algorithm="central",
        local__patterns=["^day/"],
        central__learning_rate=0.02,
        central__decay_linear=True,
        central__decay_steps=10_000,
        central__steps=10_000,
        central__batch_size=64,
        central__grad_clip=10.0,
    ),
    _of_recipe(
        "CORP's learning rate",
        "decays from .01 over 100,000 batches of 48, training stops at 20,000",
        OPTION,
        _WRITING,
        central__learning_rate=0.01,
        central__decay_linear=True,
        central__decay_steps=100_000,
        central__steps=20_000,
        central__batch_size=48,
    ),
    _of_recipe(
        "state that is kept",
        "the best on the test partition, every 50 batches (speech) or 500",
        OPTION,
        _WRITING,
        selection__split="test",
        evaluation__every_steps=500,
    ),
    Item(
        "by what the best is chosen",
        "characters or phonemes wrong",
        "words wrong, which of phonemes are phonemes; then the loss",
        DIFFERS,
        "selection is that of all models",
    ),
    Item(
        "sentences of a batch",
        "a day at random, its sentences in shuffled passes",
        "a day at random, its sentences at random, none twice",
        DIFFERS,
        "a batch is a function of the step alone, so that a run resumes",
    ),
    Item(
        "layers of a new day",
        "a copy of the last day's",
        "the same",
        OPTION,
        recipe=_SPEECH,
        fields={"local.prototype": "last"},
    ),
    Item(
        "PyTorch port",
        "bidirectional, rate .02 throughout, L2 on everything through Adam, loss by label, "
        "dropout between layers",
        "`bidirectional`, `l2_on='all'`; else the original's",
        DIFFERS,
        "it is another decoder than the paper's",
    ),
    Item(
        "handwriting tokens",
        "31, with , ' ~ ?",
        "`prepare --labels=handwriting`, `model.options.vocab=32` with the blank",
        OPTION,
        recipe=_WRITING,
        fields={"model.options.vocab": 32},
        test="data/test_neural.py::test_handwriting_has_31_characters",
    ),
    Item(
        "phonemes",
        "g2p_en reads the sentence; silence also at the end",
        "`prepare --labels=phonemes --final_silence` (extra `g2p`); or a dictionary's, `--lexicon`",
        SAME,
        test="data/test_neural.py::test_phonemes_as_published",
    ),
    Item(
        "CORP's release",
        "tfrecords; new days scaled by the ten sentences before",
        "`prepare --dataset=neural`, scaled alike",
        SAME,
        test="data/test_neural_records.py::"
        "test_sessions_of_recalibration_are_scaled_by_the_sentences_before",
    ),
    Item(
        "constant channels",
        "divided by 1e-8",
        "zero",
        DIFFERS,
        "a channel that was constant says nothing, and would drown the others",
    ),
    Item(
        "recalibration, training",
        "64 sentences mixed by day, 60% of today, earlier days pooled; backbone and today's layer; "
        "white noise .8 alone; Keras' Adam .01",
        "`fedasr.training.corp`; ours in `fedasr.training.recalibration`",
        SAME,
        test=f"{_CORP}::test_a_step_is_the_published_one",
    ),
    Item(
        "recalibration, when",
        "after every sentence, one optimiser all day; until the mean of the last 10 losses, of so "
        "many as there are, is below 4, at least 2 steps, at most 201",
        "`fedasr.training.corp`; ours after portions of a day, for longer",
        SAME,
        test=f"{_CORP}::test_training_stops_as_published",
    ),
    Item(
        "recalibration, earlier days",
        "one pass over their sentences after each new one, then today's alone",
        "pass after pass",
        DIFFERS,
        "the program's generator ends, which its description does not say",
    ),
    Item(
        "competitionHoldOut",
        "decoded into a submission; its texts are withheld",
        "`fedasr decode`: a sentence a line, in the competition's order",
        SAME,
        test="end_to_end/test_decode.py::test_withheld_sentences_become_lines_in_their_order",
    ),
    Item(
        "language model",
        "10-best of an n-gram, then GPT-2 XL: alpha 1, acoustic scale .5",
        "`fedasr decode --rescorer=gpt2-xl` (extra `rescoring`)",
        SAME,
        test="decoding/test_rescoring.py::test_a_causal_model_scores_token_by_token",
    ),
    Item(
        "blank penalty",
        "ln 2 (speech), ln 11 (handwriting)",
        "`--blank_penalty`",
        SAME,
        test="decoding/test_beam.py::test_a_blank_penalty_is_taken_in_every_frame",
    ),
    Item(
        "search with the n-gram model",
        "an automaton of letters or phonemes, words and an n-gram model, in Kaldi's decoder",
        "prefix beam search with the same parts",
        DIFFERS,
        "Kaldi is no package of Python",
    ),
)
_FUSION = (
    Item("specialists", "one pair, of key 42, for all runs, on pixels of 0 to 16",
         "`--pretrained --raw` of the digits, with the draw of the installed JAX; "
         "`--pair_per_seed`: a pair for each", SAME,
         test="fusion/test_digits.py::test_the_published_pair_is_that_of_the_public_code"),
    Item("parents of MAP-Elites", "by quality; without replacement once qualities sum to 2",
         "the same on the digits; elsewhere always without replacement", SAME,
         test="fusion/test_methods.py::"
         "test_map_elites_draws_as_the_public_code_while_qualities_sum_to_less_than_2"),
    Item("order of leaves", "by depth", "by name, digits as numbers: block_2 before block_10",
         DIFFERS, "names say no more of the depth"),
    Item("checkpoints of others", "language and diffusion models merged",
         "`fuse --task=checkpoints`: safetensors, by a score of the user's", SAME,
         test="end_to_end/test_fuse_checkpoints.py::"
         "test_llamas_merge_to_a_score_that_neither_parent_has"),
)  # fmt: skip

SECTIONS: dict[str, tuple[Item, ...]] = {
    "Federated recognition with privacy: the model": _MODEL,
    "Batches": _BATCHES,
    "Optimisers": _OPTIMIZERS,
    "Central schedules": _SCHEDULES,
    "Federated rounds": _ROUNDS,
    "Evaluation and text": _EVALUATION,
    "Large Conformers (arXiv 2408.10443, 2205.03494)": _CONFORMER,
    "Neural decoders (the public baselines of speechBCI and CORP)": _NEURAL,
    "Model fusion (arXiv 2508.16204)": _FUSION,
}

_HEAD = """# What was published, and what is here

Made by `python -m fedasr.recipes.fidelity` from the table in that module, which tests check
against the code. The first six sections compare the recipes `librispeech` and `common_voice` with
arXiv 2310.00098 and its authors' public programs; neural decoders are the recipe `neural` with
`training=central`.

* **same**: as published, without an option that was made for it.
* **option**: the published recipes set it; other configurations keep a default of ours.
* **differs**: it does, because of what is said.
"""


def page() -> str:
    """The page's Markdown."""
    parts = [_HEAD]
    for section, items in SECTIONS.items():
        parts.append(f"\n## {section}\n\n| item | published | here | |\n|---|---|---|---|\n")
        for item in items:
            how = f"**{item.how}**" + (f": {item.because}" if item.because else "")
            parts.append(f"| {item.name} | {item.published} | {item.ours} | {how} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
