"""Whisper against transformers, on a tiny model with random weights."""

import base64
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is torch: pip install torch transformers")
pytest.importorskip("transformers", reason="the oracle is transformers")
pytest.importorskip("safetensors", reason="pretrained models need safetensors")

import torch
import transformers

from fedasr.errors import UserError
from fedasr.models.pretrained import export_folder, folders, mapping
from fedasr.models.recogniser import make_recogniser

VOCAB = 12
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


class Words:
    """A Whisper of transformers, and the same here, read from its folder."""

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


def test_whisper_learns_and_writes_as_transformers(words, waves, batch):
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
    np.testing.assert_allclose(loss, float(total.detach()) / 3, rtol=1e-5)
    words.model.zero_grad()
    (total / 3).backward()
    grads = {n: p.grad.numpy() for n, p in words.model.named_parameters() if p.grad is not None}
    table = words.source.family.table(words.source.family.config(**options), True)
    known = [entry for entry in table if set(entry.names) <= grads.keys()]
    assert len(table) - len(known) <= 1  # the encoder's positions are fixed there
    worst = 0.0
    theirs = mapping.to_params(known, list(grads), grads.__getitem__, words.shapes)
    for path, value in jax.tree.leaves_with_path(theirs):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(ours, value, atol=1e-3 * scale, err_msg=str(path))
        worst = max(worst, float(np.abs(ours - value).max()) / scale)
    print(f"whisper: gradients differ by {worst:.1e}")
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


def test_whisper_padding_and_vmap(words, waves, batch):
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


def test_a_whisper_that_is_written_is_loaded_by_transformers(words, waves, tmp_path):
    model = types.SimpleNamespace(name="whisper", options=words.source.options)
    subwords = {"kind": "tokenizers", "model": base64.b64encode(b"{}").decode()}
    export_folder(model, words.params, {"subwords": subwords}, tmp_path)
    again = folders.open_source(tmp_path)
    assert words.source.options.items() <= again.options.items()
    loaded = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.generation_config.suppress_tokens == [3]
    tokens = torch.tensor([[31, 32, 4, 5]])
    with torch.no_grad():
        mel = words.mel(waves()[0])
        ours = loaded(mel, decoder_input_ids=tokens).logits
        np.testing.assert_array_equal(ours, words.model(mel, decoder_input_ids=tokens).logits)
    model.options = {**words.source.options, "objective": "ctc"}
    with pytest.raises(UserError, match="no Whisper with a CTC head"):
        export_folder(model, words.params, {"subwords": subwords}, tmp_path)


def test_whispers_encoder_with_a_new_output_layer(words, waves, batch):
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
