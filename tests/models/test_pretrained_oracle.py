"""Pretrained recognisers against transformers, on tiny models with random weights."""

import functools
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
from fedasr.models.pretrained import FAMILIES, export_folder, folders, mapping
from fedasr.models.pretrained import parakeet as parakeet_module
from fedasr.models.recogniser import make_recogniser
from fedasr.text import folder_tokenizer

VOCAB = 12


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


def parakeet(mlp=24):
    """A small ParakeetForCTC whose batch norms have statistics."""
    encoder = transformers.ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=mlp,
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

    def __init__(self, make, folder, name=""):
        self.name = name
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
    return Pair(MODELS[request.param], tmp_path_factory.mktemp("model"), request.param)


def test_scores_are_those_of_transformers(pair, waves, batch):
    sounds = waves()
    found, lengths, _, _ = pair.scores(pair.params, batch(sounds))
    for row, length, x in zip(found, lengths, sounds, strict=True):
        with torch.no_grad():
            theirs = torch.log_softmax(pair.hear(x.astype(np.float32) / 32768), -1)
        theirs = theirs.numpy()[:, pair.order()]
        size = int(length)
        assert size >= 2 and len(theirs) - size in (0, 1)  # a frame of padding at the end
        np.testing.assert_allclose(row[:size], theirs[:size], atol=1e-4)
        print(f"{pair.name}: scores differ by {np.abs(row[:size] - theirs[:size]).max():.1e}")


def test_gradients_are_those_of_transformers(pair, waves, batch):
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
    np.testing.assert_allclose(loss, float(total.detach()) / len(sounds), rtol=1e-5)
    grads = {n: p.grad.numpy() for n, p in pair.model.named_parameters() if p.grad is not None}
    table = pair.source.family.table(pair.source.family.config(**pair.source.options), True)
    linear = [entry for entry in table if len(entry.names) == 1]  # all but batch norms
    theirs = mapping.to_params(linear, list(grads), grads.__getitem__, pair.shapes)
    worst = 0.0
    for path, value in jax.tree.leaves_with_path(theirs):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(ours, value, atol=1e-3 * scale, err_msg=str(path))
        worst = max(worst, float(np.abs(ours - value).max()) / scale)
    print(f"{pair.name}: gradients differ by {worst:.1e}")
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs)) > 1e-2


def test_padding_and_the_vmap_over_clients_change_nothing(pair, waves, batch):
    given = batch(waves())
    key = jax.random.key(0)
    (loss, _), grads = pair.gradient(pair.params, given, key)
    (more, _), others = pair.gradient(pair.params, batch(waves(), blocks=39), key)
    np.testing.assert_allclose(loss, more, rtol=1e-5)

    apart = []

    def close(x, y):
        scale = max(1.0, float(np.abs(x).max()))
        np.testing.assert_allclose(x, y, atol=1e-5 * scale)
        apart.append(float(np.abs(x - y).max()) / scale)

    jax.tree.map(close, grads, others)
    clients = jax.tree.map(lambda *x: jnp.stack(x), given, batch(waves(1)))
    own = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), pair.params)
    together = jax.jit(
        jax.vmap(jax.value_and_grad(pair.recogniser.loss, has_aux=True), (0, 0, None))
    )
    (losses, _), found = together(own, clients, key)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-5)
    jax.tree.map(lambda x, y: close(x, y[0]), grads, found)
    print(f"{pair.name}: gradients of another padding, and vmapped, differ by {max(apart):.1e}")


def test_what_is_read_is_written_back_bit_for_bit(pair, waves, batch):
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


def test_a_folder_that_is_written_is_loaded_by_transformers(pair, waves, batch, tmp_path):
    characters = "".join(chr(ord("a") + i) for i in range(VOCAB - 2)) + " "
    model = types.SimpleNamespace(name=pair.source.name, options=pair.source.options)
    export_folder(model, pair.params, {"characters": characters}, tmp_path)
    again = folders.open_source(tmp_path)
    assert again.options == {**pair.source.options, **again.options}
    own = pair.source.family.config
    assert own(**again.options) == own(**pair.source.options)
    jax.tree.map(
        np.testing.assert_array_equal, pair.params, again.params(again.options, pair.shapes)
    )
    assert folder_tokenizer(tmp_path).characters == characters
    loaded, said = transformers.AutoModelForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    x = waves()[0].astype(np.float32) / 32768
    with torch.no_grad():
        logits = loaded.eval()(**extractor(x, sampling_rate=16000, return_tensors="pt")).logits[0]
        theirs = torch.log_softmax(logits, -1).numpy()[:, pair.order()]
    found, lengths, _, _ = pair.scores(pair.params, batch(waves()))
    size = int(lengths[0])
    np.testing.assert_allclose(found[0, :size], theirs[:size], atol=1e-4)


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


NEMO = {
    "encoder.subsampling.layers.": "encoder.pre_encode.conv.",
    "encoder.subsampling.linear.": "encoder.pre_encode.out.",
    ".conv.norm.": ".conv.batch_norm.",
    "ctc_head.": "decoder.decoder_layers.0.",
    ".relative_k_proj.": ".linear_pos.",
    ".o_proj.": ".linear_out.",
    ".q_proj.": ".linear_q.",
    ".k_proj.": ".linear_k.",
    ".v_proj.": ".linear_v.",
    ".bias_u": ".pos_bias_u",
    ".bias_v": ".pos_bias_v",
}


def archive(folder, state, **encoder):
    """A NeMo archive of a state dict."""
    import tarfile

    import yaml

    config = {
        "preprocessor": {
            "sample_rate": 16000,
            "window_size": 0.025,
            "window_stride": 0.01,
            "normalize": "per_feature",
            "features": 16,
            "n_fft": 512,
            "log": True,
        },
        "encoder": {
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "ff_expansion_factor": 2,
            "feat_in": 16,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 6,
            "conv_kernel_size": 5,
            "self_attention_model": "rel_pos",
            **encoder,
        },
        "decoder": {"vocabulary": [f"piece {i}" for i in range(VOCAB - 1)]},
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / "model_weights.ckpt")
    with tarfile.open(folder / "model.nemo", "w") as tar:
        for name in ("model_config.yaml", "model_weights.ckpt"):
            tar.add(folder / name, f"./{name}")
    return folder / "model.nemo"


def nemo_state(model):
    """A model's tensors, as NeMo names them."""
    state = {"preprocessor.featurizer.window": torch.ones(3)}
    for name, value in model.state_dict().items():
        for ours, theirs in NEMO.items():
            name = name.replace(ours, theirs)
        state[name] = value
    return state


def test_an_archive_of_nemo_is_read_as_the_folder(tmp_path):
    pair = Pair(functools.partial(parakeet, 32), tmp_path)
    state = nemo_state(pair.model)
    assert not any("_proj" in name or "ctc_head" in name for name in state)
    source = folders.open_source(archive(tmp_path, state))
    assert source.options == pair.source.options
    found = source.params(source.options, pair.shapes)
    jax.tree.map(np.testing.assert_array_equal, pair.params, found)
    with pytest.raises(UserError, match=r"local_attn.*choose another model"):
        folders.open_source(archive(tmp_path, state, self_attention_model="local_attn"))
    file = tmp_path / "model.nemo"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"fetch it again|is no model of NeMo"):
        folders.open_source(file)


def test_an_archive_that_would_run_something_is_refused(tmp_path):
    file = archive(tmp_path, {"x": functools.partial(print, "run")})
    with pytest.raises(UserError, match=r"functools\.partial, which is no array"):
        folders.open_source(file)


def test_the_front_end_of_earlier_conformers():
    options = dict(dim=8, heads=2, mlp=8, mels=12, channels=4, factor=4, kernel=3, vocab=5)
    options |= {"blocks": 0, "separable": False, "scale_input": False, "blank": 4}
    family = FAMILIES["parakeet"]
    params = make_recogniser("parakeet", options).init(jax.random.key(0))
    config = family.config(**options)
    tensors = mapping.to_tensors(family.table(config, True), params)
    tensors = {name: torch.tensor(value) for name, value in tensors.items()}
    mel = np.random.default_rng(0).normal(size=(1, 21, 12)).astype(np.float32)
    x = torch.tensor(mel)[:, None]
    for i in (0, 2):
        name = f"encoder.subsampling.layers.{i}"
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride=2, padding=1))
    x = x.transpose(1, 2).flatten(2)
    name = "encoder.subsampling.linear"
    wanted = torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
    padded = np.pad(mel, ((0, 0), (0, 9), (0, 0)))
    found, lengths = parakeet_module.FrontEnd(config).apply(
        {"params": params["encoder"]["front_end"]}, padded, np.int32([21])
    )
    assert int(lengths[0]) == wanted.shape[1] == 6
    np.testing.assert_allclose(found[0, :6], wanted[0], atol=1e-5)


def test_every_family_has_an_oracle():
    assert set(FAMILIES) == {"wav2vec2", "whisper", "parakeet"}
