"""Folders of pretrained models, written by hand: what is read, and what is refused in one line."""

import json
import types

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="pretrained models need safetensors")

from safetensors.numpy import load_file, save_file

from fedasr.errors import UserError
from fedasr.models.pretrained import FAMILIES, audio, export_folder, folders
from fedasr.models.pretrained.modules import grouped_convolution
from fedasr.models.recogniser import make_recogniser, takes_audio
from fedasr.text import CharTokenizer, folder_tokenizer, prepared_with

CONFIG = {
    "model_type": "wav2vec2",
    "vocab_size": 6,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": [4, 4],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 8],
    "conv_bias": False,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "num_conv_pos_embeddings": 3,
    "num_conv_pos_embedding_groups": 2,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}
OPTIONS = FAMILIES["wav2vec2"].options(CONFIG, {})


def write(folder, config=CONFIG, drop=(), **more):
    """A folder of a model with random weights; returns its tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    params = make_recogniser("wav2vec2", OPTIONS).init(jax.random.key(1))
    tensors = folders.to_tensors("wav2vec2", OPTIONS, params) | more
    tensors = {name: value for name, value in tensors.items() if name not in drop}
    save_file(tensors, folder / "model.safetensors")
    return params


def read(place, head=True):
    source = folders.open_source(place, head)
    shapes = jax.eval_shape(make_recogniser("wav2vec2", source.options).init, jax.random.key(0))
    return source.params(source.options, shapes)


def test_a_folder_a_file_and_shards_hold_the_same(tmp_path):
    params = write(tmp_path / "a")
    for place in (tmp_path / "a", tmp_path / "a" / "model.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, params, read(place))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        part = {name: value for name, value in tensors.items() if names[name] == file}
        save_file(part, tmp_path / "a" / file)
    index = {"weight_map": names}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, params, read(tmp_path / "a"))


def test_half_precision_is_read_as_float32(tmp_path):
    params = write(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    save_file({n: v.astype(np.float16) for n, v in load_file(file).items()}, file)
    half = read(tmp_path / "a")
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.float32(np.float16(x)), y), params, half
    )


def test_a_model_without_output_layer(tmp_path):
    params = write(tmp_path / "a", drop=("lm_head.weight", "lm_head.bias"))
    file = tmp_path / "a" / "model.safetensors"
    bare = {n.removeprefix("wav2vec2."): v for n, v in load_file(file).items()}
    save_file(bare, file)
    with pytest.raises(UserError, match=r"no output layer.*init_from=hf-encoder:"):
        folders.open_source(tmp_path / "a")
    found = read(tmp_path / "a", head=False)
    assert "output" not in found
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], found["encoder"])


def test_what_pretraining_left_is_not_read(tmp_path):
    write(tmp_path / "a", **{"wav2vec2.masked_spec_embed": np.zeros(8, np.float32)})
    read(tmp_path / "a")


def _spoil(name, value=None):
    def spoil(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = tensors[name] * np.nan if value is None else value
        save_file(tensors, file)

    return spoil


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _without(name):
    return lambda folder: write(folder, drop=(name,))


def _said(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def _indexed(names):
    text = json.dumps({"weight_map": names})
    return lambda folder: (folder / folders.INDEX).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json.*give the model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read.*fetch it again"),
        (_said(model_type="bert"), "model_type 'bert', which cannot be read: use one of hubert"),
        (_said(hidden_act="relu"), "hidden_act='relu', of which only 'gelu' is known"),
        (_said(hidden_size=None), "must be"),
        (_said(hidden_size=10), "config.json and weights again"),
        (_said(vocab_size=9), "config.json and weights again"),
        (_said(pad_token_id=6), "blank=6 must be below vocab=6"),
        (_said(conv_dim=5), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read"),
        (_indexed([1]), "does not name files: fetch it again"),
        (_indexed({"a": 3}), "does not name files: fetch it again"),
        (_said(model_type="parakeet_ctc", encoder_config=None), "None where settings should be"),
        (lambda folder: (folder / "model.safetensors").unlink(), "save the model as such"),
        (_truncate, "cannot be read.*fetch it again"),
        (_without("wav2vec2.encoder.layer_norm.weight"), "layer_norm.weight is missing: fetch"),
        (_spoil("lm_head.bias"), "lm_head.bias has values that are not finite"),
        (_spoil("lora_A", np.zeros(3, np.float32)), "lora_A has no place in this model"),
        (_spoil("lm_head.weight", np.zeros((2, 2, 2), np.float32)), "lm_head.weight.*again"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, spoil, says):
    folder = tmp_path / "a"
    write(folder)
    spoil(folder)
    with pytest.raises(UserError, match=says) as raised:
        read(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"is not there: give a folder with config\.json"):
        folders.open_source(tmp_path / "no")


def test_parameters_of_another_model_are_not_written():
    params = make_recogniser("wav2vec2", OPTIONS).init(jax.random.key(1))
    more = {**params, "adapter": {"kernel": np.zeros(3)}}
    with pytest.raises(UserError, match="hold adapter/kernel, for which a folder has no place"):
        folders.to_tensors("wav2vec2", OPTIONS, more)
    del params["projection"]
    with pytest.raises(UserError, match="the parameters lack projection/kernel"):
        folders.to_tensors("wav2vec2", OPTIONS, params)


def test_a_folder_is_written_of_models_that_came_from_one(tmp_path):
    model = types.SimpleNamespace(name="wav2vec2", options=OPTIONS)
    params = make_recogniser("wav2vec2", OPTIONS).init(jax.random.key(1))
    export_folder(model, params, {"characters": "\ue001ab c"}, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, read(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert vocabulary == {"<pad>": 0, "<s>": 1, "a": 2, "b": 3, "|": 4, "c": 5}
    model.name = "transformer"
    with pytest.raises(UserError, match="own format"):
        export_folder(model, params, {"characters": "ab"}, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("wav2vec2", {"widths": "10,a"}, "whole numbers with commas"),
        ("wav2vec2", {"widths": "10"}, "as many numbers each"),
        ("wav2vec2", {"heads": 5}, "multiple of its heads"),
        ("wav2vec2", {"layout": "data2vec"}, "layout must be one of"),
        ("wav2vec2", {"blank": 32}, "blank=32 must be below vocab=32"),
        ("parakeet", {"vocab": 30}, "blank=1024 must be below vocab=30"),
        ("whisper", {"window": "half"}, "window='half' must be padded, true, or whole seconds"),
        ("whisper", {"window": "31"}, "1 to 30"),
        ("whisper", {"start": ""}, "start must hold a token"),
        ("whisper", {"most_tokens": -1}, "most_tokens=-1 must be at least 0"),
        ("whisper", {"end": 90_000}, "end must hold tokens below"),
        ("parakeet", {"factor": 6}, "factor must be 2, 4, 8"),
        ("parakeet", {"dim": 1023}, "must be even"),
    ],
)
def test_options_that_make_no_model(name, options, says):
    assert takes_audio(name)
    with pytest.raises(UserError, match=says):
        make_recogniser(name, options)


def test_vocabularies_of_characters(tmp_path):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "'"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = folder_tokenizer(tmp_path)
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.vocab_size == 8
    assert tokenizer.encode("tet 'e").tolist() == [6, 5, 6, 4, 7, 5]
    assert tokenizer.decode([1, 6, 2, 5, 3, 4, 0, 6]) == "te t"  # signs are never written
    assert prepared_with(str(tmp_path)) == {"alphabet": tokenizer.characters}
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 7, "vocab_size": 9}))
    moved = folder_tokenizer(tmp_path)
    assert moved.vocab_size == 9 and moved.encode("e").tolist() == [6]
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(UserError, match="holds no object"):
        folder_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        folder_tokenizer(tmp_path)


def test_a_wide_convolution_in_groups():
    rng = np.random.default_rng(0)
    for width in (3, 10, 16):
        x = rng.normal(size=(2, 13, 6)).astype(np.float32)
        kernel = rng.normal(size=(width, 2, 3, 4)).astype(np.float32)
        padded = np.pad(x, ((0, 0), (width // 2, width), (0, 0))).reshape(2, -1, 2, 3)
        wanted = np.zeros((2, 13, 2, 4))
        for i in range(13):
            wanted[:, i] = np.einsum("bjgi,jgio->bgo", padded[:, i : i + width], kernel)
        found = jax.jit(grouped_convolution)(x, kernel)
        np.testing.assert_allclose(found, wanted.reshape(2, 13, 8), atol=1e-4)


def test_dropout_draws_alike_however_far_it_is_padded(waves, batch):
    options = OPTIONS | {"dropout": 0.3, "layer_drop": 0.5, "vocab": 12}
    recogniser = make_recogniser("wav2vec2", options)
    params = recogniser.init(jax.random.key(1))
    loss = jax.jit(recogniser.loss)
    sounds = waves()
    found = {seed: float(loss(params, batch(sounds), jax.random.key(seed))[0]) for seed in (0, 1)}
    padded = float(loss(params, batch(sounds, blocks=39), jax.random.key(0))[0])
    assert found[0] == pytest.approx(padded, rel=1e-5) and found[0] != pytest.approx(found[1])


WHISPER = {
    **{"dim": 8, "mlp": 8, "blocks": 1, "decoder_blocks": 1, "heads": 2, "decoder_heads": 2},
    **{"decoder_mlp": 8, "vocab": 12, "start": "8,9", "end": 7, "longest": 20, "positions": 100},
}


def test_whisper_stops_at_the_most_tokens(waves, batch):
    options = {**WHISPER, "window": "true"}
    params = make_recogniser("whisper", options).init(jax.random.key(0))
    sounds = batch(waves())

    def decoded(**more):
        evaluate = make_recogniser("whisper", {**options, **more}).evaluate
        return [np.asarray(x) for x in jax.jit(evaluate)(params, sounds)[:2]]

    whole, lengths = decoded()
    assert whole.shape == (3, 20) and lengths.max() > 3
    for most, size in {3: 4, 40: 20}.items():
        found, counts = decoded(most_tokens=most)
        assert found.shape == (3, size)
        np.testing.assert_array_equal(found[:, :most], whole[:, :most])
        np.testing.assert_array_equal(counts, np.minimum(lengths, most))


def test_whisper_hears_a_part_of_its_window(waves, batch):
    """As a model does whose window is no longer."""
    recogniser = make_recogniser("whisper", WHISPER)
    params, sounds = recogniser.init(jax.random.key(0)), batch(waves())
    cut = jax.tree.map(lambda x: x, params)
    cut["encoder"]["positions"] = params["encoder"]["positions"][:50]
    short = make_recogniser("whisper", {**WHISPER, "positions": 50})
    part = make_recogniser("whisper", {**WHISPER, "window": "1"})
    losses = [
        float(jax.jit(x.loss)(p, sounds, jax.random.key(1))[0])
        for x, p in ((part, params), (short, cut), (recogniser, params))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_samples_of_a_batch():
    features = np.full((2, 3, 160), 16384, np.int16)
    batch = {"features": features, "features_length": np.int32([3, 2])}
    waveforms, lengths = audio.samples(batch)
    assert lengths.tolist() == [480, 320] and float(waveforms[1].sum()) == 160
    waveforms, lengths = audio.samples(batch | {"samples": np.int32([401, 9999])})
    assert lengths.tolist() == [401, 320] and float(waveforms[0].sum()) == 200.5


def _frames(x, size, count):
    """Windows of a 1-D array, one every 160 samples; zeros beyond its end."""
    x = np.concatenate([x, np.zeros(size * 2)])
    return np.stack([x[i * 160 : i * 160 + size] for i in range(count)])


def _filters(mels, fft):
    """Slaney's triangles, one by one."""

    def hz(mel):
        return 200 * mel / 3 if mel < 15 else 1000 * np.exp((mel - 15) * np.log(6.4) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    corners = [hz(top * i / (mels + 1)) for i in range(mels + 2)]
    bins = np.arange(fft // 2 + 1) * 16000 / fft
    return np.stack(
        [
            np.interp(bins, corners[i : i + 3], [0, 2 / (corners[i + 2] - corners[i]), 0])
            for i in range(mels)
        ],
        axis=1,
    )


def test_whispers_features():
    x = np.random.default_rng(0).normal(size=1600).astype(np.float32) * 0.1
    x[900:] = 0
    found = jax.jit(audio.whisper_mel, static_argnums=1)(x[None], 20)[0]
    mirrored = np.concatenate([x[200:0:-1], x, x[-2:-202:-1]])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(_frames(mirrored, 400, 10) * hann)) ** 2
    log = np.log10(np.maximum(power @ _filters(20, 400), 1e-10))
    wanted = (np.maximum(log, log.max() - 8) + 4) / 4
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_nemos_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1600).astype(np.float32) * 0.1
    noisy = np.concatenate([x[:1500], rng.normal(size=900).astype(np.float32)])
    compute = jax.jit(audio.nemo_mel, static_argnums=(2, 3))
    found, lengths = compute(noisy[None], np.int32([1500]), 20, 0.97)
    assert lengths.tolist() == [9] and not found[0, 9:].any()
    emphasised = x[:1500] - 0.97 * np.concatenate([[0], x[:1499]])
    padded = np.concatenate([np.zeros(256), emphasised])
    hann = np.zeros(512)
    hann[56:456] = np.hanning(400)
    power = np.abs(np.fft.rfft(_frames(padded, 512, 9) * hann)) ** 2
    log = np.log(power @ _filters(20, 512) + 2.0**-24)
    wanted = (log - log.mean(0)) / (log.std(0, ddof=1) + 1e-5)
    np.testing.assert_allclose(found[0, :9], wanted, atol=1e-3)
