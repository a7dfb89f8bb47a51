"""Whisper (arXiv 2212.04356): an encoder and a decoder of words, or the encoder with a CTC head.

The encoder was trained on 30 s of audio, silence after the utterance included, and by default hears
just that ("padded"). With `window="true"` it hears true frames alone, which costs a fraction and is
what a new CTC head may well learn from. Of longer utterances the first 30 s are heard; none is
trained on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models import layers
from fedasr.models.objectives import Recogniser, from_forward
from fedasr.models.pretrained import audio, mapping
from fedasr.models.pretrained.family import Family, augmented, choose, ctc, example, known
from fedasr.models.pretrained.modules import (
    Attention,
    ComputeConfig,
    Convolution,
    FeedForward,
    biased_attention,
    dense,
    gelu,
    numbers,
    written,
)

Array = jax.Array
CROSS_ENTROPY = "cross_entropy"


@dataclasses.dataclass(frozen=True)
class WhisperConfig(ComputeConfig):
    """Sizes; the defaults are those of tiny.en. Compute: see `ComputeConfig`.

    objective: "cross_entropy", the decoder's, whose tokens are one more than in the file (0 is the
    blank, here of no use), or "ctc" for a new output layer on the encoder.
    positions: frames of the encoder's window, of 20 ms. longest: tokens of a text, with its start.
    window: "padded" or "true", see above. mels: channels. start, suppress, begin_suppress: tokens
    of the file, with commas between, that every text begins with, that are never written, or not
    first. end: the token that ends a text; what lies above it is no text and is never written.

    Raises:
      UserError: a size below 1, or sizes that do not go together.
    """

    objective: str = CROSS_ENTROPY
    vocab: int = 51865
    dim: int = 384
    blocks: int = 4
    heads: int = 6
    mlp: int = 1536
    decoder_blocks: int = 4
    decoder_heads: int = 6
    decoder_mlp: int = 1536
    mels: int = 80
    positions: int = 1500
    longest: int = 448
    window: str = "padded"
    start: str = "50257,50362"
    end: int = 50256
    suppress: str = ""
    begin_suppress: str = ""

    def __post_init__(self) -> None:
        self.check("vocab", "dim", "heads", "mlp", "decoder_heads", "decoder_mlp", "mels")
        choose(self, objective=(CROSS_ENTROPY, "ctc"), window=("padded", "true"))
        if self.dim % self.heads or self.dim % self.decoder_heads:
            raise UserError(f"the model's dim={self.dim} must be a multiple of its heads")
        if not numbers(self, "start"):
            raise UserError("the model's start must hold a token")
        tokens = {name: numbers(self, name) for name in ("start", "suppress", "begin_suppress")}
        for name, found in {**tokens, "end": (self.end,)}.items():
            if found and max(found) > self.vocab - 2 and self.objective != "ctc":
                raise UserError(f"the model's {name} must hold tokens below vocab - 1")

    @property
    def samples(self) -> int:
        """Of the encoder's window."""
        return self.positions * 2 * audio.BLOCK_SAMPLES


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, keys: Array | None) -> Array:
        """x: [b, t, d]; mask: bool [b, t]; keys: [b] or None."""
        c = self.config
        k = layers.split_keys(keys, 3)
        norm = nn.LayerNorm(1e-5, dtype=c.compute, name="attention_norm")
        attend = Attention(c.heads, c.compute, False, c.attention == "fused", name="attention")
        x = x + layers.dropout(attend(norm(x), mask, keys is not None), c.dropout, k[0])
        norm = nn.LayerNorm(1e-5, dtype=c.compute, name="mlp_norm")
        feed = FeedForward(c.mlp, c.dropout, c.compute, name="mlp")
        return x + layers.dropout(feed(norm(x), k[1]), c.dropout, k[2])


class Encoder(nn.Module):
    """Mel frames to half as many frames of features."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, mel: Array, lengths: Array, keys: Array | None) -> tuple[Array, Array]:
        """mel: [b, t, mels], zeros beyond `lengths`; see `heard`. Frames, and true ones [b]."""
        c = self.config
        k_input, *k_blocks = layers.split_keys(keys, 1 + c.blocks)

        def masked(x: Array, lengths: Array) -> Array:
            return jnp.where(audio.inside(x.shape[1], lengths)[..., None], x, 0.0)

        true = mel.shape[1] if c.window == "padded" else lengths
        true = jnp.broadcast_to(jnp.asarray(true, jnp.int32), lengths.shape)
        x = masked(gelu(Convolution(c.dim, 3, 1, c.compute, 1, name="conv_0")(mel)), true)
        x = gelu(Convolution(c.dim, 3, 2, c.compute, 1, name="conv_1")(x))
        true, lengths = -(-true // 2), -(-lengths // 2)
        draw = nn.initializers.normal(0.02)
        positions = self.param("positions", draw, (c.positions, c.dim), jnp.float32)
        x = masked(x + positions[: x.shape[1]].astype(c.compute), true)
        x = layers.dropout(x, c.dropout, k_input)
        mask = audio.inside(x.shape[1], true)
        for i, k in enumerate(k_blocks):
            y = layers.apply_block(EncoderBlock(c, name=f"block_{i}"), c.remat, x, mask, k)
            x = layers.drop_block(y, x, c.layer_drop, k, 3)
        return nn.LayerNorm(1e-5, dtype=c.compute, name="norm")(x), lengths


class Heads(nn.Module):
    """Attention in parts, for a decoder that keeps keys and values."""

    dim: int
    heads: int
    dtype: jnp.dtype

    def setup(self) -> None:
        """Makes the layers."""
        self.query = dense(self.dim, self.dtype, None)
        self.key = dense(self.dim, self.dtype, None, False)
        self.value = dense(self.dim, self.dtype, None)
        self.out = dense(self.dim, self.dtype, None)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """[b, t, d] -> keys and values, [b, t, heads, e] each."""
        shape = (*x.shape[:2], self.heads, self.dim // self.heads)
        return self.key(x).reshape(shape), self.value(x).reshape(shape)

    def __call__(self, x: Array, keys_values: tuple[Array, Array], mask: Array) -> Array:
        """x: [b, u, d]; mask: bool, broadcast to [b, heads, u, t] -> [b, u, d]."""
        q = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        return self.out(biased_attention(q, *keys_values, mask, None).reshape(x.shape))


class DecoderBlock(nn.Module):
    """Attention to what was written before and to what was heard, and a feed-forward net."""

    config: WhisperConfig

    def setup(self) -> None:
        """Makes the layers."""
        c = self.config

        def norm() -> nn.Module:
            return nn.LayerNorm(1e-5, dtype=c.compute)

        self.attention = Heads(c.dim, c.decoder_heads, c.compute)
        self.cross_attention = Heads(c.dim, c.decoder_heads, c.compute)
        self.attention_norm, self.cross_norm, self.mlp_norm = norm(), norm(), norm()
        self.mlp = FeedForward(c.decoder_mlp, c.dropout, c.compute)

    def memory(self, encoded: Array) -> tuple[Array, Array]:
        """Keys and values of what was heard, [b, t, heads, e]."""
        return self.cross_attention.keys_values(encoded)

    def __call__(self, x: Array, encoded: Array, heard: Array, keys: Array | None) -> Array:
        """x: [b, u, d], a whole text; encoded: [b, t, d]; heard: bool [b, t]; keys: [b] or None."""
        k = layers.split_keys(keys, 4)
        rate = self.config.dropout
        y = self.attention_norm(x)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        y = self.attention(y, self.attention.keys_values(y), causal)
        x = x + layers.dropout(y, rate, k[0])
        y = self.cross_norm(x)
        y = self.cross_attention(y, self.memory(encoded), heard[:, None, None, :])
        x = x + layers.dropout(y, rate, k[1])
        return x + layers.dropout(self.mlp(self.mlp_norm(x), k[2]), rate, k[3])

    def step(
        self,
        x: Array,
        memory: tuple[Array, Array],
        heard: Array,
        past: tuple[Array, Array],
        place: Array,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One more token.

        Args:
          x: [b, 1, d]. memory, heard: of what was heard.
          past: keys and values of the tokens before, [b, longest, heads, e].
          place: of this one, int32 scalar.

        Returns:
          [b, 1, d], and `past` with this one.
        """
        y = self.attention_norm(x)
        new = self.attention.keys_values(y)
        past = jax.tree.map(
            lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, place, 1), past, new
        )
        x = x + self.attention(y, past, jnp.arange(past[0].shape[1]) <= place)
        x = x + self.cross_attention(self.cross_norm(x), memory, heard[:, None, None, :])
        return x + self.mlp(self.mlp_norm(x), None), past


class Decoder(nn.Module):
    """Tokens so far, and what was heard, to scores of the next one."""

    config: WhisperConfig

    def setup(self) -> None:
        """Makes the layers."""
        c = self.config
        draw = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", draw, (c.vocab - 1, c.dim), jnp.float32)
        self.positions = self.param("positions", draw, (c.longest, c.dim), jnp.float32)
        for i in range(c.decoder_blocks):
            setattr(self, f"block_{i}", DecoderBlock(c))
        self.norm = nn.LayerNorm(1e-5, dtype=c.compute)

    def _blocks(self) -> list[DecoderBlock]:
        return [getattr(self, f"block_{i}") for i in range(self.config.decoder_blocks)]

    def _embedded(self, tokens: Array, positions: Array) -> Array:
        return (self.embedding[tokens] + positions).astype(self.config.compute)

    def _scores(self, x: Array) -> Array:
        scores = jnp.einsum("bud,vd->buv", self.norm(x), self.embedding.astype(x.dtype))
        return scores.astype(jnp.float32)

    def __call__(self, tokens: Array, encoded: Array, heard: Array, keys: Array | None) -> Array:
        """Scores after each of the tokens, float32 [b, u, vocab - 1].

        Args:
          tokens: of the file, int32 [b, u], u at most `longest`.
          encoded: [b, t, d]. heard: bool [b, t]. keys: [b] or None.
        """
        c = self.config
        k_input, *k_blocks = layers.split_keys(keys, 1 + c.decoder_blocks)
        x = self._embedded(tokens, self.positions[: tokens.shape[1]])
        x = layers.dropout(x, c.dropout, k_input)
        for block, k in zip(self._blocks(), k_blocks, strict=True):
            y = layers.apply_block(block, c.remat, x, encoded, heard, k)
            x = layers.drop_block(y, x, c.layer_drop, k, 4)
        return self._scores(x)

    def memory(self, encoded: Array) -> list[tuple[Array, Array]]:
        """What every block keeps of what was heard."""
        return [block.memory(encoded) for block in self._blocks()]

    def step(
        self, token: Array, memory: Any, heard: Array, past: Any, place: Array
    ) -> tuple[Array, Any]:
        """Scores after one more token, [b, vocab - 1], and what is kept; see `DecoderBlock`."""
        x = self._embedded(token[:, None], self.positions[place])
        kept = []
        for block, heard_by, before in zip(self._blocks(), memory, past, strict=True):
            x, now = block.step(x, heard_by, heard, before, place)
            kept.append(now)
        return self._scores(x)[:, 0], kept


class CtcModel(nn.Module):
    """Mel frames to scores of tokens."""

    config: WhisperConfig

    @nn.compact
    def __call__(
        self, mel: Array, lengths: Array, keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Logits float32 [b, frames, vocab] and true frames [b]; see `Encoder`."""
        c = self.config
        x, lengths = Encoder(c, name="encoder")(mel, lengths, keys)
        return dense(c.vocab, c.compute, "output")(x).astype(jnp.float32), lengths


def heard(c: WhisperConfig, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Mel frames of a batch of audio [b, t, mels], and how many hold true samples, int32 [b].

    t is that of the whole window, or with `window="true"` of the longest utterance; then what lies
    beyond an utterance is zeros.
    """
    waveforms, lengths = audio.samples(batch)
    size = min(waveforms.shape[1], c.samples)
    frames = jnp.minimum(-(-lengths // audio.BLOCK_SAMPLES), c.positions * 2)
    waveforms = waveforms[:, :size]
    # A block of silence after the longest, too: what is mirrored there would depend on padding.
    more = c.samples - size if c.window == "padded" else 2 * audio.BLOCK_SAMPLES
    mel = audio.whisper_mel(jnp.pad(waveforms, ((0, 0), (0, more))), c.mels)
    if c.window == "padded":
        return mel, frames
    mel = mel[:, : size // audio.BLOCK_SAMPLES]
    return jnp.where(audio.inside(mel.shape[1], frames)[..., None], mel, 0.0), frames


def recogniser(c: WhisperConfig, augment: SpecAugmentConfig | None) -> Recogniser:
    """See `Family`."""
    if c.objective == "ctc":
        return ctc(CtcModel(c), lambda batch: heard(c, batch), augment)
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
        if c.window == "true":
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

    return from_forward(init, forward, decode, None)


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
      int32 [b, longest], one more than in the file, zeros after the end; and int32 [b].
    """
    start = jnp.array(numbers(c, "start"), jnp.int32)
    ids = jnp.arange(c.vocab - 1)
    never = (ids > c.end) | jnp.isin(ids, jnp.array(numbers(c, "suppress") or (-1,)))
    not_first = never | jnp.isin(ids, jnp.array(numbers(c, "begin_suppress") or (-1,)))
    variables = {"params": params}
    memory = decoder.apply(variables, encoded, method="memory")
    shape = (len(encoded), c.longest, c.decoder_heads, c.dim // c.decoder_heads)
    nothing = [(jnp.zeros(shape, c.compute),) * 2 for _ in range(c.decoder_blocks)]

    def more(carry: Any) -> Array:
        place, _, _, ended, _ = carry
        return (place < c.longest) & ~jnp.all(ended)

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
        jnp.zeros((b, c.longest), jnp.int32),
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


FAMILY = Family(
    config=WhisperConfig,
    types=("whisper",),
    prefix=lambda c: "model",
    head=r"^(model\.decoder|proj_out|lm_head)\.",
    encoder={"objective": "ctc"},
    options=options,
    table=table,
    recogniser=recogniser,
    unused=(r"^proj_out\.weight$",),  # the embedding once more
)
