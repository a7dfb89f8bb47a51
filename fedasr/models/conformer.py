"""The Conformer encoder (Gulati et al., 2020, arXiv 2005.08100), for federated clients.

What differs from the paper, and why:

* The convolution module has a layer norm in place of batch norm: batch statistics do not federate,
  and a norm over time would have to mask padding.
* Positions are rotary: relative like the paper's, without parameters and without a second, twice
  as large matrix of scores. Error rates are reported to be similar or better (arXiv 2107.05907,
  2501.06051).
* The front end halves the frame rate by dense layers on windows of frames instead of
  two-dimensional convolutions, and dense layers within blocks have no biases.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.kernels.depthwise import depthwise_convolution
from fedasr.models import encoder_blocks, layers
from fedasr.models.transducer import ObjectiveConfig

_STREAMS = 7  # of a block's keys


@dataclass(frozen=True)
class ConformerConfig(ObjectiveConfig):
    """Sizes of a Conformer; the defaults are for a CPU (CTC, 1.3M parameters).

    mlp: hidden units of either feed-forward module. conv_kernel: encoder frames that the
    convolution module sees. kernel, stride: window of each strided layer of the front end, and its
    hop in all: log2(stride) layers halve the frame rate. dropout: on attention weights, hidden
    units and residual branches. layer_drop: probability that a training step skips a block, one
    draw per block and batch, without rescaling. input_layer: whether an affine layer, at first the
    identity, follows the features' norm: see `layers.InputLayer`. dtype: of the compute; parameters
    are float32.
    remat: "block" to keep only the blocks' inputs for the backward pass, see `kernels.checkpoint`;
    "none" to keep everything. attention: "plain", or "fused" for `kernels.attention`.
    scan_blocks: see `TransformerConfig`. The objective's fields: see `ObjectiveConfig`.

    Raises:
      UserError: a size below 1, an unknown dtype, remat or objective, a stride other than 2, 4,
        8 ..., or a dim that is no multiple of twice the heads.
    """

    vocab: int = 30
    features: int = 80
    dim: int = 128
    blocks: int = 3
    heads: int = 4
    mlp: int = 512
    conv_kernel: int = 16
    kernel: int = 3
    stride: int = 4
    dropout: float = 0.0
    layer_drop: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "plain"
    scan_blocks: bool = False
    input_layer: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab", "features", "dim", "heads", "mlp", "conv_kernel", "kernel", "stride")
        layers.check_options(self, sizes)
        self.check_objective()
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise UserError(f"the model's stride must be 2, 4, 8 ...: {self.stride}")
        if self.dim % (2 * self.heads):
            raise UserError(
                f"the model's dim must be a multiple of twice its heads, not {self.dim} with "
                f"{self.heads} heads"
            )


class Convolution(nn.Module):
    """Gated dense layer, depthwise convolution over time, layer norm, swish, dense layer."""

    kernel: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t], True for true frames -> [b, t, d]."""
        d = x.shape[-1]
        x = jax.nn.glu(layers.bias_free(2 * d, self.dtype, "up")(x))
        # The one place beside attention where frames meet: padding must be silent.
        x = jnp.where(mask[..., None], x, jnp.zeros_like(x))
        x = depthwise_convolution(
            x, self.param("depthwise", layers.uniform_fan_in(), (self.kernel, d))
        )
        x = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(x)
        return layers.bias_free(d, self.dtype, "down")(jax.nn.swish(x))


class Block(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step, layer norm."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t]; keys: [b] or None (no dropout)."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        k = layers.split_keys(keys, _STREAMS)

        def norm(name):
            return nn.LayerNorm(1e-5, dtype=dtype, name=name)

        def feed(name):
            return layers.FeedForward(c.mlp, c.dropout, dtype, jax.nn.swish, name=name)

        attend = layers.SelfAttention(
            c.heads, c.dropout, dtype, True, c.attention == "fused", name="attention"
        )
        convolve = Convolution(c.conv_kernel, dtype, name="convolution")
        h = feed("mlp_0")(norm("mlp_norm_0")(x), k[0])
        x = x + 0.5 * layers.dropout(h, c.dropout, k[1])
        h = attend(norm("attention_norm")(x), mask, k[2])
        x = x + layers.dropout(h, c.dropout, k[3])
        h = convolve(norm("convolution_norm")(x), mask)
        x = x + layers.dropout(h, c.dropout, k[4])
        h = feed("mlp_1")(norm("mlp_norm_1")(x), k[5])
        return norm("final_norm")(x + 0.5 * layers.dropout(h, c.dropout, k[6]))


class Conformer(nn.Module):
    """Log-mel features to per-frame token scores, or to what a `Transducer` scores."""

    config: ConformerConfig

    @nn.compact
    def __call__(
        self, features: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes utterances.

        Args:
          features: float [b, frames, features]; what lies beyond `lengths` does not matter.
          lengths: int32 [b], true frames.
          keys: PRNG keys [b], one per utterance, for dropout and layer drop; None for evaluation.

        Returns:
          Logits float32 [b, ceil(frames / stride), vocab], or with the objective "rnnt" projections
          [b, ceil(frames / stride), joint_dim], and their true lengths, int32 [b].
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        (k_input,) = layers.split_keys(keys, 1)
        x = layers.MaskedNorm(name="input_norm")(features.astype(jnp.float32), lengths)
        if c.input_layer:
            x = layers.InputLayer(name="input_layer")(x, lengths)
        x = x.astype(dtype)
        for i in range(c.stride.bit_length() - 1):
            dense = layers.WindowedDense(2 * c.dim, c.kernel, 2, dtype, name=f"front_end_{i}")
            x = jax.nn.glu(dense(x))
            lengths = -(-lengths // 2)
            mask = jnp.arange(x.shape[1]) < lengths[:, None]
            # A bias has given padding a sound, which the next layer's windows would hear.
            x = jnp.where(mask[..., None], x, jnp.zeros_like(x))
        x = layers.dropout(x, c.dropout, k_input)
        blocks = [Block(c, name=f"{encoder_blocks.BLOCK}{i}") for i in range(c.blocks)]
        x = encoder_blocks.apply_blocks(blocks, c, x, mask, keys, (1, _STREAMS))
        init = layers.uniform_fan_in()
        out = layers.Dense(c.outputs(c.vocab), kernel_init=init, dtype=dtype, name="output")(x)
        return out.astype(jnp.float32), lengths
