"""Pretrained recognisers against transformers, on tiny models with random weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is torch: pip install torch transformers")
pytest.importorskip("transformers", reason="the oracle is transformers")
pytest.importorskip("safetensors", reason="pretrained models need safetensors")

import torch
import transformers

from fedasr.models.pretrained import FAMILIES, folders, mapping
from fedasr.models.recogniser import make_recogniser

SAMPLES = (4000, 3211, 2400)  # one whole block, two that are not
VOCAB = 12


def waves(seed=0):
    """Noise whose loudness differs, int16."""
    rng = np.random.default_rng(seed)
    shapes = zip(SAMPLES, (3000, 500, 9000), strict=True)
    return [(rng.normal(size=n) * loud).clip(-32768, 32767).astype(np.int16) for n, loud in shapes]


def batch(sounds, blocks=26, labels=((3, 1, 4), (2, 2), (5, 6))):
    """What a loss takes, padded to so many blocks, with noise where nothing should listen."""
    rng = np.random.default_rng(9)
    features = rng.integers(-9000, 9000, (len(sounds), blocks, 160)).astype(np.int16)
    counts = [-(-len(x) // 160) for x in sounds]
    for row, x, count in zip(features, sounds, counts, strict=True):
        row[:count] = 0
        row.reshape(-1)[: len(x)] = x
    padded = np.zeros((len(sounds), 4), np.int32)
    for row, text in zip(padded, labels, strict=True):
        row[: len(text)] = text
    return {
        "features": features,
        "features_length": np.int32(counts),
        "samples": np.int32([len(x) for x in sounds]),
        "labels": padded,
        "labels_length": np.int32([len(text) for text in labels]),
        "mask": np.ones(len(sounds), bool),
    }


def wav2vec2(kind, **changes):
    """A small model of the three with a CTC head, and what hears the waveforms."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 4, 4),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=10,
        num_conv_pos_embedding_groups=2,
        **{"pad_token_id": 0, **changes},
    )
    model = getattr(transformers, f"{kind}ForCTC")(config)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)

    def hear(x):
        inputs = extractor(x, sampling_rate=16000, return_tensors="pt").input_values
        return model(inputs).logits[0]

    return model, extractor, hear


def parakeet():
    """A small ParakeetForCTC whose batch norms have statistics."""
    encoder = transformers.ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_mel_bins=16,
        subsampling_conv_channels=6,
        conv_kernel_size=5,
    )
    config = transformers.ParakeetCTCConfig(
        vocab_size=VOCAB, pad_token_id=VOCAB - 1, encoder_config=encoder.to_dict()
    )
    model = transformers.ParakeetForCTC(config)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_()
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
        for name, value in model.named_parameters():
            if "bias_u" in name or "bias_v" in name or name.endswith("norm.weight"):
                value.normal_(1.0)
    extractor = transformers.ParakeetFeatureExtractor(feature_size=16)

    def hear(x):
        inputs = extractor(x, sampling_rate=16000, return_tensors="pt")
        return model(**inputs).logits[0]

    return model, extractor, hear


LARGE = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "pad_token_id": 3,
}
MODELS = {
    "wav2vec2 base": functools.partial(wav2vec2, "Wav2Vec2"),
    "hubert large": functools.partial(wav2vec2, "Hubert", **LARGE),
    "wavlm": functools.partial(wav2vec2, "WavLM", num_buckets=16, max_bucket_distance=20),
    "parakeet": parakeet,
}


class Pair:
    """A model of transformers, and the same here, read from its folder."""

    def __init__(self, make, folder):
        torch.manual_seed(0)
        self.model, extractor, self.hear = make()
        self.model.eval()
        with torch.no_grad():
            for value in self.model.parameters():  # of biases that begin as zeros, too
                value.add_(0.1 * torch.randn_like(value))
        self.model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        self.source = folders.open_source(folder)
        self.recogniser = make_recogniser(self.source.name, self.source.options)
        shapes = jax.eval_shape(self.recogniser.init, jax.random.key(0))
        self.params = self.source.params(self.source.options, shapes)
        self.shapes = shapes
        assert jax.tree.structure(self.params) == jax.tree.structure(shapes)
        self.scores = jax.jit(self.recogniser.scores)
        self.gradient = jax.jit(jax.value_and_grad(self.recogniser.loss, has_aux=True))

    @property
    def blank(self):
        return self.source.options["blank"]

    def order(self):
        """The file's tokens as they are numbered here."""
        rest = [i for i in range(VOCAB) if i != self.blank]
        return [self.blank, *rest]


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    return Pair(MODELS[request.param], tmp_path_factory.mktemp("model"))


def test_scores_are_those_of_transformers(pair):
    sounds = waves()
    found, lengths, _, _ = pair.scores(pair.params, batch(sounds))
    for row, length, x in zip(found, lengths, sounds, strict=True):
        with torch.no_grad():
            theirs = torch.log_softmax(pair.hear(x.astype(np.float32) / 32768), -1)
        theirs = theirs.numpy()[:, pair.order()]
        size = int(length)
        assert size >= 5 and len(theirs) - size in (0, 1)  # a frame of padding at the end
        np.testing.assert_allclose(row[:size], theirs[:size], atol=1e-4)


def test_gradients_are_those_of_transformers(pair):
    sounds = waves()
    given = batch(sounds)
    lengths = pair.scores(pair.params, given)[1]
    order = pair.order()
    total = 0
    for i, x in enumerate(sounds):
        logits = torch.log_softmax(pair.hear(x.astype(np.float32) / 32768), -1)
        labels = [order[n] for n in given["labels"][i, : given["labels_length"][i]]]
        total = total + torch.nn.functional.ctc_loss(
            logits[: int(lengths[i]), None],
            torch.tensor([labels]),
            torch.tensor([int(lengths[i])]),
            torch.tensor([len(labels)]),
            blank=pair.blank,
            reduction="sum",
        )
    pair.model.zero_grad()
    (total / len(sounds)).backward()
    (loss, aux), found = pair.gradient(pair.params, given, jax.random.key(0))
    assert int(aux["utterances"]) == len(sounds)
    np.testing.assert_allclose(loss, float(total) / len(sounds), rtol=1e-5)
    grads = {n: p.grad.numpy() for n, p in pair.model.named_parameters() if p.grad is not None}
    table = pair.source.family.table(pair.source.family.config(**pair.source.options), True)
    linear = [entry for entry in table if len(entry.names) == 1]  # all but batch norms
    theirs = mapping.to_params(linear, list(grads), grads.__getitem__, pair.shapes)
    for path, value in jax.tree.leaves_with_path(theirs):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(ours, value, atol=1e-3 * scale, err_msg=str(path))
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs)) > 1e-2


def test_padding_and_the_vmap_over_clients_change_nothing(pair):
    given = batch(waves())
    key = jax.random.key(0)
    (loss, _), grads = pair.gradient(pair.params, given, key)
    (more, _), others = pair.gradient(pair.params, batch(waves(), blocks=39), key)
    np.testing.assert_allclose(loss, more, rtol=1e-5)

    def close(x, y):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(np.abs(x).max())))

    jax.tree.map(close, grads, others)
    clients = jax.tree.map(lambda *x: jnp.stack(x), given, batch(waves(1)))
    own = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), pair.params)
    together = jax.jit(
        jax.vmap(jax.value_and_grad(pair.recogniser.loss, has_aux=True), (0, 0, None))
    )
    (losses, _), found = together(own, clients, key)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-5)
    jax.tree.map(lambda x, y: close(x, y[0]), grads, found)


def test_what_is_read_is_written_back_bit_for_bit(pair):
    written = folders.to_tensors(pair.source.name, pair.source.options, pair.params)
    state = pair.model.state_dict()
    changed = ("num_batches_tracked", "masked_spec_embed")
    for name, value in state.items():
        if name.endswith(changed) or ".norm.running" in name or ".conv.norm." in name:
            continue
        np.testing.assert_array_equal(written[name], value.numpy(), err_msg=name)
    back = pair.source.family.config(**pair.source.options)
    again = mapping.to_params(
        pair.source.family.table(back, True), list(written), written.__getitem__, pair.shapes
    )
    jax.tree.map(np.testing.assert_array_equal, pair.params, again)
    missing, unexpected = pair.model.load_state_dict(
        {name: torch.tensor(value) for name, value in written.items()}, strict=False
    )
    assert not unexpected and all(name.endswith(changed) for name in missing)
    x = waves()[0]
    with torch.no_grad():
        theirs = torch.log_softmax(pair.hear(x.astype(np.float32) / 32768), -1).numpy()
    found, lengths, _, _ = pair.scores(pair.params, batch(waves()))
    size = int(lengths[0])
    np.testing.assert_allclose(found[0, :size], theirs[:size, pair.order()], atol=1e-4)


def test_both_spellings_of_weight_norm(tmp_path):
    from safetensors.numpy import load_file, save_file

    pair = Pair(MODELS["wav2vec2 base"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"parametrizations.weight.original0": "weight_g"}
    old |= {"parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, value in tensors.items():
        for new, spelled in old.items():
            name = name.replace(new, spelled)
        renamed[name] = value
    assert renamed.keys() != tensors.keys() or any("weight_g" in name for name in tensors)
    save_file(renamed, tmp_path / "model.safetensors")
    again = folders.open_source(tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, pair.params, again.params(again.options, pair.shapes)
    )


WHISPER = {
    "vocab_size": 40,
    "num_mel_bins": 16,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 25,  # half a second
    "max_target_positions": 12,
    "pad_token_id": 30,
    "bos_token_id": 30,
    "eos_token_id": 30,
    "decoder_start_token_id": 31,
    "begin_suppress_tokens": [7, 30],
    "suppress_tokens": [3],
}


class Words(Pair):
    """A Whisper."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**WHISPER)
        ).eval()
        with torch.no_grad():
            for value in self.model.parameters():
                value.add_(0.3 * torch.randn_like(value))
        self.model.save_pretrained(folder)
        generation = {"no_timestamps_token_id": 32, "suppress_tokens": [3]}
        generation |= {"begin_suppress_tokens": [7, 30]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        self.extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        self.extractor.n_samples = 8000
        self.source = folders.open_source(folder)
        self.recogniser = make_recogniser("whisper", self.source.options)
        self.shapes = jax.eval_shape(self.recogniser.init, jax.random.key(0))
        self.params = self.source.params(self.source.options, self.shapes)
        assert jax.tree.structure(self.params) == jax.tree.structure(self.shapes)
        self.gradient = jax.jit(jax.value_and_grad(self.recogniser.loss, has_aux=True))

    def mel(self, x):
        wave = x.astype(np.float32) / 32768
        return self.extractor(wave, sampling_rate=16000, return_tensors="pt").input_features


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return Words(tmp_path_factory.mktemp("whisper"))


def test_whisper_learns_and_writes_as_transformers(words):
    sounds, given = waves(), batch(waves())
    options = words.source.options
    assert options["start"] == "31,32" and options["vocab"] == 41
    total = 0
    texts = []
    for i, x in enumerate(sounds):
        labels = given["labels"][i, : given["labels_length"][i]] - 1
        tokens = torch.tensor([[31, 32, *labels]])
        logits = words.model(words.mel(x), decoder_input_ids=tokens).logits[0, 1:]
        wanted = torch.tensor([*labels, 30])
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        texts.append(_greedy(words, x))
    (loss, aux), found = words.gradient(words.params, given, jax.random.key(0))
    assert int(aux["utterances"]) == 3
    np.testing.assert_allclose(loss, float(total) / 3, rtol=1e-5)
    words.model.zero_grad()
    (total / 3).backward()
    grads = {n: p.grad.numpy() for n, p in words.model.named_parameters() if p.grad is not None}
    table = words.source.family.table(words.source.family.config(**options), True)
    known = [entry for entry in table if set(entry.names) <= grads.keys()]
    assert len(table) - len(known) <= 1  # the encoder's positions are fixed there
    theirs = mapping.to_params(known, list(grads), grads.__getitem__, words.shapes)
    for path, value in jax.tree.leaves_with_path(theirs):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(ours, value, atol=1e-3 * scale, err_msg=str(path))
    tokens, counts, losses, valid = jax.jit(words.recogniser.evaluate)(words.params, given)
    assert valid.all() and np.isclose(losses.mean(), loss, rtol=1e-5)
    for row, count, text in zip(tokens, counts, texts, strict=True):
        assert [int(t) - 1 for t in row[: int(count)]] == text
    assert len({tuple(text) for text in texts}) > 1


def _greedy(words, x):
    """The likeliest tokens by transformers' model, one after the other."""
    tokens, mel = [31, 32], words.mel(x)
    with torch.no_grad():
        while len(tokens) < 13:
            logits = words.model(mel, decoder_input_ids=torch.tensor([tokens[:12]])).logits[0, -1]
            logits[[3]] = -torch.inf
            logits[31:] = -torch.inf
            if len(tokens) == 2:
                logits[[7, 30]] = -torch.inf
            best = int(logits.argmax())
            if best == 30:
                break
            tokens.append(best)
    return tokens[2:]


def test_whisper_padding_and_vmap(words):
    given, key = batch(waves()), jax.random.key(0)
    (loss, _), grads = words.gradient(words.params, given, key)
    (more, _), others = words.gradient(words.params, batch(waves(), blocks=39), key)
    np.testing.assert_allclose(loss, more, rtol=1e-5)

    def close(x, y):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(np.abs(x).max())))

    jax.tree.map(close, grads, others)
    clients = jax.tree.map(lambda *x: jnp.stack(x), given, batch(waves(1)))
    own = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), words.params)
    together = jax.jit(
        jax.vmap(jax.value_and_grad(words.recogniser.loss, has_aux=True), (0, 0, None))
    )
    (losses, _), found = together(own, clients, key)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-5)
    jax.tree.map(lambda x, y: close(x, y[0]), grads, found)


def test_whisper_is_written_back_bit_for_bit(words):
    written = folders.to_tensors("whisper", words.source.options, words.params)
    state = {n: v.numpy() for n, v in words.model.state_dict().items() if n != "proj_out.weight"}
    assert written.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_whispers_encoder_with_a_new_output_layer(words):
    source = folders.open_source(words.source.folder, head=False)
    assert source.options["objective"] == "ctc"
    with torch.no_grad():
        for window in ("padded", "true"):
            options = {**source.options, "vocab": VOCAB, "window": window}
            recogniser = make_recogniser("whisper", options)
            params = recogniser.init(jax.random.key(0))
            params = folders.fill(source.params(options, params), params)
            scores = jax.jit(recogniser.scores)
            found, lengths, _, _ = scores(params, batch(waves()))
            again, _, _, _ = scores(params, batch(waves(), blocks=39))
            for row, other, length, x in zip(found, again, lengths, waves(), strict=True):
                size = int(length)
                assert size == -(-len(x) // 320)
                np.testing.assert_allclose(row[:size], other[:size], atol=1e-5)
                if window == "true":
                    continue
                theirs = words.model.model.encoder(words.mel(x)).last_hidden_state[0, :size].numpy()
                logits = theirs @ np.asarray(params["output"]["kernel"])
                logits += np.asarray(params["output"]["bias"])
                wanted = torch.log_softmax(torch.tensor(logits), -1).numpy()
                np.testing.assert_allclose(row[:size], wanted, atol=1e-4)


def test_every_family_has_an_oracle():
    assert set(FAMILIES) == {"wav2vec2", "whisper", "parakeet"}
