"""Whisper (arXiv 2212.04356): an encoder and a decoder of words, or the encoder with a CTC head.

The encoder was trained on 30 s of audio, silence after the utterance included, and by default hears
just that ("padded"). Less costs a fraction: `window="10"` hears 10 s, silence included, and
`window="true"` true frames alone, which a new CTC head may well learn from; a decoder that was
trained with silence often does not find its end without. Of utterances longer than the window its
length is heard; none is trained on.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models import layers
from fedasr.models.objectives import Recogniser, from_forward
from fedasr.models.pretrained import audio, mapping
from fedasr.models.pretrained.family import Family, augmented, ctc, example, known
from fedasr.models.pretrained.modules import CtcModel, numbers, written
from fedasr.models.pretrained.whisper_model import TRUE, Decoder, Encoder, WhisperConfig

Array = jax.Array


def heard(c: WhisperConfig, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Mel frames of a batch of audio [b, t, mels], and how many hold true samples, int32 [b].

    t is that of the whole window, or with `window="true"` of the longest utterance; then what lies
    beyond an utterance is zeros.
    """
    waveforms, lengths = audio.samples(batch)
    size = min(waveforms.shape[1], c.samples)
    frames = jnp.minimum(-(-lengths // audio.BLOCK_SAMPLES), c.samples // audio.BLOCK_SAMPLES)
    waveforms = waveforms[:, :size]
    # A block of silence after the longest, too: what is mirrored there would depend on padding.
    more = 2 * audio.BLOCK_SAMPLES if c.window == TRUE else c.samples - size
    mel = audio.whisper_mel(jnp.pad(waveforms, ((0, 0), (0, more))), c.mels)
    if c.window != TRUE:
        return mel, frames
    mel = mel[:, : size // audio.BLOCK_SAMPLES]
    return jnp.where(audio.inside(mel.shape[1], frames)[..., None], mel, 0.0), frames


def recogniser(c: WhisperConfig, augment: SpecAugmentConfig | None) -> Recogniser:
    """See `Family`."""
    if c.objective == "ctc":
        module = CtcModel(Encoder(c), c.vocab, c.compute)
        return ctc(module, c, lambda batch: heard(c, batch), augment)
    encoder: Any = Encoder(c)
    decoder: Any = Decoder(c)
    start = jnp.array(numbers(c, "start"), jnp.int32)

    def init(key: Array) -> Any:
        keys = jax.random.split(key)
        mel, lengths = heard(c, example())
        tokens, encoded = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, c.dim))
        inputs = tokens, encoded, jnp.ones((1, 1), bool), None
        return {
            "encoder": encoder.init(keys[0], mel, lengths, None)["params"],
            "decoder": decoder.init(keys[1], *inputs)["params"],
        }

    def forward(params: Any, batch: Mapping[str, Array], features: Array, keys: Array | None):
        mel, lengths = heard(c, {**batch, "features": features})
        mel, keys = augmented(mel, lengths, keys, augment)
        k_encoder, k_decoder = layers.split_keys(keys, 2)
        encoded, lengths = encoder.apply({"params": params["encoder"]}, mel, lengths, k_encoder)
        size = encoded.shape[1]
        seen = jnp.ones(encoded.shape[:2], bool)
        if c.window == TRUE:
            seen = audio.inside(size, lengths)
        inputs, targets, weights = _texts(c, start, batch["labels"], batch["labels_length"])
        scores = decoder.apply({"params": params["decoder"]}, inputs, encoded, seen, k_decoder)
        found = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)
        values = -jnp.sum(jnp.where(weights, found[..., 0], 0.0), axis=1)
        fits = batch["labels_length"] + len(start) <= c.longest
        fits &= audio.samples(batch)[1] <= c.samples
        return values, values, fits, (encoded, seen)

    def decode(params: Any, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        return greedy(c, decoder, params["decoder"], *outputs)

    return from_forward(init, forward, decode, None, c)


def _texts(
    c: WhisperConfig, start: Array, labels: Array, lengths: Array
) -> tuple[Array, Array, Array]:
    """Tokens that are given, those that follow, and which of these count: [b, u] each."""
    begin = jnp.broadcast_to(start, (labels.shape[0], len(start)))
    tokens = jnp.maximum(labels.astype(jnp.int32) - 1, 0)
    whole = jnp.concatenate([begin, tokens, tokens[:, :1]], axis=1)
    places = jnp.arange(whole.shape[1])
    last = (lengths + len(start))[:, None]
    whole = jnp.where(places >= last, c.end, whole)
    inputs, targets = whole[:, :-1], whole[:, 1:]
    counts = (places[1:] >= len(start)) & (places[1:] <= last)
    size = min(inputs.shape[1], c.longest)
    return inputs[:, :size], targets[:, :size], counts[:, :size]


def greedy(
    c: WhisperConfig, decoder: Decoder, params: Any, encoded: Array, heard: Array
) -> tuple[Array, Array]:
    """The likeliest token after those before it, until the end: tokens and counts.

    Args:
      c, decoder, params: the model.
      encoded: [b, t, d]. heard: bool [b, t].

    Returns:
      int32 [b, u], one more than in the file, zeros after the end; and int32 [b]. u is `longest`,
      or less as `most_tokens` says.
    """
    start = jnp.array(numbers(c, "start"), jnp.int32)
    size = min(c.longest, c.most_tokens + len(start) - 1) if c.most_tokens else c.longest
    ids = jnp.arange(c.vocab - 1)
    never = (ids > c.end) | jnp.isin(ids, jnp.array(numbers(c, "suppress") or (-1,)))
    not_first = never | jnp.isin(ids, jnp.array(numbers(c, "begin_suppress") or (-1,)))
    variables = {"params": params}
    memory = decoder.apply(variables, encoded, method="memory")
    shape = (len(encoded), size, c.decoder_heads, c.dim // c.decoder_heads)
    nothing = [(jnp.zeros(shape, c.compute),) * 2 for _ in range(c.decoder_blocks)]

    def more(carry: Any) -> Array:
        place, _, _, ended, _ = carry
        return (place < size) & ~jnp.all(ended)

    def step(carry: Any) -> Any:
        place, token, found, ended, past = carry
        scores, past = decoder.apply(variables, token, memory, heard, past, place, method="step")
        first = place == len(start) - 1
        scores = jnp.where(jnp.where(first, not_first, never), -jnp.inf, scores)
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        writes = place >= len(start) - 1
        ended = ended | (writes & (best == c.end))
        at = jnp.maximum(place - len(start) + 1, 0)
        found = found.at[:, at].set(jnp.where(writes & ~ended, best + 1, 0))
        given = start[jnp.minimum(place + 1, len(start) - 1)]
        return place + 1, jnp.where(writes, best, given), found, ended, past

    b = len(encoded)
    carry = (
        jnp.int32(0),
        jnp.full(b, start[0]),
        jnp.zeros((b, size), jnp.int32),
        jnp.zeros(b, bool),
        nothing,
    )
    found = jax.lax.while_loop(more, step, carry)[2]
    return found, jnp.sum(found > 0, axis=1, dtype=jnp.int32)


def table(c: WhisperConfig, head: bool) -> list[mapping.Entry]:
    """The tensors of a folder. A CTC head, whose names are this project's, where `head` says so."""
    found = mapping.convolution("encoder/conv_0", "model.encoder.conv1", 3)
    found += mapping.convolution("encoder/conv_1", "model.encoder.conv2", 3)
    found.append(mapping.same("encoder/positions", "model.encoder.embed_positions.weight"))
    found += mapping.norm("encoder/norm", "model.encoder.layer_norm")
    for i in range(c.blocks):
        found += _block(f"encoder/block_{i}", f"model.encoder.layers.{i}")
    if c.objective == "ctc":
        return found + (mapping.output("output", "lm_head", 0) if head else [])
    found.append(mapping.same("decoder/embedding", "model.decoder.embed_tokens.weight"))
    found.append(mapping.same("decoder/positions", "model.decoder.embed_positions.weight"))
    found += mapping.norm("decoder/norm", "model.decoder.layer_norm")
    for i in range(c.decoder_blocks):
        path, name = f"decoder/block_{i}", f"model.decoder.layers.{i}"
        found += _block(path, name)
        found += _attention(f"{path}/cross_attention", f"{name}.encoder_attn")
        found += mapping.norm(f"{path}/cross_norm", f"{name}.encoder_attn_layer_norm")
    return found


def _block(path: str, name: str) -> list[mapping.Entry]:
    return [
        *_attention(f"{path}/attention", f"{name}.self_attn"),
        *mapping.norm(f"{path}/attention_norm", f"{name}.self_attn_layer_norm"),
        *mapping.dense(f"{path}/mlp/up", f"{name}.fc1"),
        *mapping.dense(f"{path}/mlp/down", f"{name}.fc2"),
        *mapping.norm(f"{path}/mlp_norm", f"{name}.final_layer_norm"),
    ]


def _attention(path: str, name: str) -> list[mapping.Entry]:
    return [
        *mapping.dense(f"{path}/query", f"{name}.q_proj"),
        *mapping.dense(f"{path}/key", f"{name}.k_proj", False),
        *mapping.dense(f"{path}/value", f"{name}.v_proj"),
        *mapping.dense(f"{path}/out", f"{name}.out_proj"),
    ]


def options(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a folder's config.json; `beside`: what its other files say.

    Of models of several languages the text is English, transcribed: another start is another
    option.

    Raises:
      UserError: a variant that is not known here.
    """
    known(config, activation_function="gelu", scale_embedding=False)
    said = {**config, **beside}
    start = [said["decoder_start_token_id"]]
    if languages := said.get("lang_to_id"):
        start += [languages["<|en|>"], said["task_to_id"]["transcribe"]]
    elif forced := said.get("forced_decoder_ids"):
        start += [token for _, token in sorted(forced) if token is not None]
    if (plain := said.get("no_timestamps_token_id")) is not None and plain not in start:
        start.append(plain)
    return {
        "vocab": config["vocab_size"] + 1,
        "dim": config["d_model"],
        "blocks": config["encoder_layers"],
        "heads": config["encoder_attention_heads"],
        "mlp": config["encoder_ffn_dim"],
        "decoder_blocks": config["decoder_layers"],
        "decoder_heads": config["decoder_attention_heads"],
        "decoder_mlp": config["decoder_ffn_dim"],
        "mels": config["num_mel_bins"],
        "positions": config["max_source_positions"],
        "longest": config["max_target_positions"],
        "start": written(start),
        "end": said["eos_token_id"],
        "suppress": written(said.get("suppress_tokens") or ()),
        "begin_suppress": written(said.get("begin_suppress_tokens") or ()),
    }


def describe(c: WhisperConfig) -> dict[str, dict[str, Any]]:
    """The inverse of `options`: files by name.

    Raises:
      UserError: an encoder with a CTC head, which transformers has not.
    """
    if c.objective == "ctc":
        raise UserError(
            "transformers has no Whisper with a CTC head: export it in the project's own format"
        )
    start = numbers(c, "start")
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "vocab_size": c.vocab - 1,
        "num_mel_bins": c.mels,
        "d_model": c.dim,
        "encoder_layers": c.blocks,
        "encoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.mlp,
        "decoder_layers": c.decoder_blocks,
        "decoder_attention_heads": c.decoder_heads,
        "decoder_ffn_dim": c.decoder_mlp,
        "max_source_positions": c.positions,
        "max_target_positions": c.longest,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "decoder_start_token_id": start[0],
        "eos_token_id": c.end,
        "pad_token_id": c.end,
        "bos_token_id": c.end,
    }
    generation: dict[str, Any] = {
        "decoder_start_token_id": start[0],
        "eos_token_id": c.end,
        "pad_token_id": c.end,
        "suppress_tokens": list(numbers(c, "suppress")),
        "begin_suppress_tokens": list(numbers(c, "begin_suppress")),
        "max_length": c.longest,
    }
    if len(start) > 1:
        generation["no_timestamps_token_id"] = start[-1]
    if len(start) == 4:
        generation["is_multilingual"] = True
        generation["lang_to_id"] = {"<|en|>": start[1]}
        generation["task_to_id"] = {"transcribe": start[2]}
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": c.mels,
        "sampling_rate": audio.RATE,
        "hop_length": audio.BLOCK_SAMPLES,
        "n_fft": 400,
        "chunk_length": c.samples // audio.RATE,
    }
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
    }


FAMILY = Family(
    config=WhisperConfig,
    types=("whisper",),
    prefix=lambda c: "model",
    head=r"^(model\.decoder|proj_out|lm_head)\.",
    encoder={"objective": "ctc"},
    options=options,
    describe=describe,
    table=table,
    recogniser=recogniser,
    unused=(r"^proj_out\.weight$",),  # the embedding once more
)
