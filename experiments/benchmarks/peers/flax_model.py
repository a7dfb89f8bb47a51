"""The CTC Transformer of `fedasr.models.transformer` from flax's layers and optax's loss: as many
parameters and frames. It is what those who use another JAX framework would write."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
    dim: int
    mlp: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = nn.LayerNorm(1e-5)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, use_bias=False)(normed)
        hidden = nn.relu(nn.Dense(self.mlp, use_bias=False)(nn.LayerNorm(1e-5)(x)))
        return x + nn.Dense(self.dim, use_bias=False)(hidden)


class Recogniser(nn.Module):
    """Takes features [b, frames, 80], all of full length, to scores [b, frames / 3, vocab]."""

    dim: int
    mlp: int
    blocks: int
    heads: int
    vocab: int = 30

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        mean = features.mean(axis=(1, 2), keepdims=True)
        std = features.std(axis=(1, 2), keepdims=True)
        x = (features - mean) / std * scale + bias
        x = nn.glu(nn.Conv(2 * self.dim, (7,), strides=3, padding=((3, 3),))(x))
        half = self.dim // 2
        turns = jnp.exp(-jnp.log(1e4) * jnp.arange(half) / half)
        angles = 0.9 * jnp.arange(x.shape[1])[:, None] * turns
        x = x + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for _ in range(self.blocks):
            x = Block(self.dim, self.mlp, self.heads)(x)
        return nn.Dense(self.vocab)(nn.LayerNorm(1e-5)(x))

    def loss(self, params: dict, features: jax.Array, labels: jax.Array) -> jax.Array:
        """Mean CTC loss of the batch."""
        scores = self.apply({"params": params}, features)
        frames, tokens = jnp.zeros(scores.shape[:2]), jnp.zeros(labels.shape)
        return optax.ctc_loss(scores, frames, labels, tokens).mean()
