"""Whisper's encoder and decoder, and their sizes: see `whisper`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.models import encoder_blocks, layers
from fedasr.models.pretrained import audio
from fedasr.models.pretrained.family import choose
from fedasr.models.pretrained.modules import (
    Attention,
    ComputeConfig,
    Convolution,
    FeedForward,
    biased_attention,
    dense,
    gelu,
    numbers,
)

Array = jax.Array
CROSS_ENTROPY, TRUE = "cross_entropy", "true"


@dataclasses.dataclass(frozen=True)
class WhisperConfig(ComputeConfig):
    """Sizes; the defaults are those of tiny.en. Compute: see `ComputeConfig`.

    objective: "cross_entropy", the decoder's, whose tokens are one more than in the file (0 is the
    blank, here of no use), or "ctc" for a new output layer on the encoder.
    positions: frames of the encoder's window, of 20 ms. longest: tokens of a text, with its start.
    most_tokens: of a text that is decoded, without its start; 0 for what `longest` allows. Texts
    that do not end, as those of an untrained model, cost less for it.
    window: "padded", "true" or seconds such as "10", see above. mels: channels. start, suppress,
    begin_suppress: tokens of the file, with commas between, that every text begins with, that are
    never written, or not first. end: the token that ends a text; what lies above it is no text and
    is never written.

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
    most_tokens: int = 0
    window: str = "padded"
    start: str = "50257,50362"
    end: int = 50256
    suppress: str = ""
    begin_suppress: str = ""

    def __post_init__(self) -> None:
        self.check("vocab", "dim", "heads", "mlp", "decoder_heads", "decoder_mlp", "mels")
        choose(self, objective=(CROSS_ENTROPY, "ctc"))
        if self.window not in ("padded", TRUE) and not 1 <= self._seconds <= self.positions // 50:
            raise UserError(
                f"the model's window={self.window!r} must be padded, true, or whole seconds, 1 to "
                f"{self.positions // 50}"
            )
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
        places = 50 * self._seconds or self.positions
        return places * 2 * audio.BLOCK_SAMPLES

    @property
    def _seconds(self) -> int:
        """Of a window that is given so; else 0."""
        return int(self.window) if self.window.isdecimal() else 0


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

        true = lengths if c.window == TRUE else mel.shape[1]
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
            y = encoder_blocks.apply_block(EncoderBlock(c, name=f"block_{i}"), c.remat, x, mask, k)
            x = encoder_blocks.drop_block(y, x, c.layer_drop, k, 3)
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
            y = encoder_blocks.apply_block(block, c.remat, x, encoded, heard, k)
            x = encoder_blocks.drop_block(y, x, c.layer_drop, k, 4)
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
