"""The Transformer encoder of arXiv 2310.00098: Transformer blocks on a strided front end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.generators import is_hashed
from fedasr.kernels import block_accelerated, devices, frontend_accelerated
from fedasr.models import encoder_blocks, layers
from fedasr.models.transducer import ObjectiveConfig

_CHOICES = {
    "front_end": ("centred", "same"),
    "init": ("third", "lecun"),
    "layer_drop_per": ("part", "batch"),
    "stream_dtype": ("", "float32"),
}


@dataclass(frozen=True)
class TransformerConfig(ObjectiveConfig):
    """Sizes of a Transformer; the defaults are the quickstart's (CTC, 0.9M parameters).

    kernel, stride: the front end's window and hop in feature frames. dropout: on attention
    weights, hidden units and, as `branch_dropout` says, elsewhere. layer_drop: probability that a
    training step skips a block, one draw per block and batch, without rescaling. cape_shift:
    largest global shift of the positions in training, seconds (CAPE, Likhomanenko et al., 2021); 0
    for none.
    frame_seconds: duration of an encoder frame. position_scale: multiplies positions in seconds.
    norm: "pre" for layer norms before each branch and at the end (the paper's), "post" for one
    after each residual sum.
    input_layer: whether an affine layer, at first the identity, follows the features' norm: see
    `layers.InputLayer`. dtype: of the compute; parameters are float32.
    remat: "block" to keep only the blocks' inputs for the backward pass, see `kernels.checkpoint`;
    "none" to keep everything. attention: "plain", or "fused" for `kernels.attention`.
    scan_blocks: True to compile one block and run all through it: parameters keep their names and
    values, compiling takes a time that does not grow with the blocks, and a step copies them once
    more.

    The following are what the authors' programs do in another way, for the published recipes
    (docs/fidelity.md). branch_dropout: True also drops on the sum of the front end's output and the
    positions, and on the residual branches; False as published, on the front end's output alone.
    front_end: "centred" windows, of which ceil(frames / stride) count; "same" as published: window
    i begins (kernel - stride) // 2 frames before frame i * stride, and floor(frames / stride)
    count. init: "third", front end and output begin as the blocks' matrices, without biases;
    "lecun" as published: a variance of 1 / fan-in, biases uniform within 1 / sqrt(fan-in).
    layer_drop_per: what a draw is for where `client.micro_batch` divides batches: the "part", or
    the whole "batch" as published. stream_dtype: of the front end and of the sum to which blocks
    add; "" for dtype, "float32" as published.

    The objective's fields: see `ObjectiveConfig`.

    Raises:
      UserError: a size below 1, an unknown dtype, norm, remat or objective, or a dim that is odd or
        no multiple of heads.
    """

    vocab: int = 30
    features: int = 80
    dim: int = 128
    blocks: int = 4
    heads: int = 4
    mlp: int = 512
    kernel: int = 7
    stride: int = 3
    dropout: float = 0.0
    layer_drop: float = 0.0
    cape_shift: float = 0.0
    frame_seconds: float = 0.03
    position_scale: float = 30.0
    dtype: str = "float32"
    norm: str = "pre"
    remat: str = "none"
    attention: str = "plain"
    scan_blocks: bool = False
    input_layer: bool = False
    branch_dropout: bool = True
    front_end: str = "centred"
    init: str = "third"
    layer_drop_per: str = "part"
    stream_dtype: str = ""

    def __post_init__(self) -> None:
        layers.check_options(self, ("vocab", "features", "dim", "heads", "mlp", "kernel", "stride"))
        self.check_objective()
        if self.norm not in ("pre", "post"):
            raise UserError(f"the model's norm must be 'pre' or 'post': {self.norm!r}")
        for name, options in _CHOICES.items():
            if (found := getattr(self, name)) not in options:
                raise UserError(f"the model's {name} must be one of {options}: {found!r}")
        if self.scan_blocks and self.norm == "post" and self.stream_dtype not in ("", self.dtype):
            raise UserError("the model's scan_blocks needs blocks that keep the stream's dtype")
        if self.dim % self.heads or self.dim % 2:
            raise UserError(
                f"the model's dim must be even and a multiple of its heads, not {self.dim} with "
                f"{self.heads} heads"
            )


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); or norms of the sums (post)."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        keys: jax.Array | tuple[jax.Array, ...] | None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t]; keys: [b] or None (no dropout).

        On accelerators, see `encoder_blocks.apply_blocks`, mask: true frames int [b]; keys: four
        [b]; keep: float scalar of layer drop, 0 or 1; None to keep the block.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        k = list(keys) if isinstance(keys, tuple) else layers.split_keys(keys, 4)
        attend = layers.SelfAttention(
            c.heads, c.dropout, dtype, fused=c.attention == "fused", name="attention"
        )
        feed = layers.FeedForward(c.mlp, c.dropout, dtype, name="mlp")
        rate = c.dropout if c.branch_dropout else 0.0
        if (found := self._in_one_kernel(x, mask, k, keep)) is not None:
            return found
        if c.norm == "pre" and devices.platform():
            x, normed = layers.SumNorm(dtype, name="attention_norm")(x, None)
            attended = layers.dropout(attend(normed, mask, k[0]), rate, k[1])
            x, normed = layers.SumNorm(dtype, name="mlp_norm")(x, attended, keep)
            return x + layers.dropout(feed(normed, k[2], keep), rate, k[3])
        attention_norm = nn.LayerNorm(1e-5, dtype=dtype, name="attention_norm")
        mlp_norm = nn.LayerNorm(1e-5, dtype=dtype, name="mlp_norm")
        if c.norm == "post":
            x = attention_norm(x + layers.dropout(attend(x, mask, k[0]), rate, k[1]))
            return mlp_norm(x + layers.dropout(feed(x, k[2]), rate, k[3]))
        x = x + layers.dropout(attend(attention_norm(x), mask, k[0]), rate, k[1])
        return x + layers.dropout(feed(mlp_norm(x), k[2]), rate, k[3])

    def _in_one_kernel(
        self, x: jax.Array, mask: jax.Array, keys: Sequence[jax.Array | None], keep: Any
    ) -> jax.Array | None:
        """What `__call__` gives, where a device has a kernel for all of it; else None."""
        c, kind = self.config, devices.for_layers()
        if not kind or self.is_initializing() or c.norm != "pre" or mask.ndim != 1:
            return None
        dtype = jnp.dtype(c.dtype)
        drawn = [key for key in keys if key is not None]
        rate = c.dropout if drawn else 0.0
        plan = block_accelerated.Plan(c.heads, dtype, rate, rate if c.branch_dropout else 0.0)
        plain = c.attention == "plain" and jnp.result_type(x.dtype, dtype) == x.dtype
        plain &= not plan.drops or is_hashed(drawn[0])
        if not (plain and block_accelerated.fits(kind, plan, x.shape[1], c.dim, c.mlp)):
            return None
        if (weights := block_accelerated.weights_of(self.variables["params"])) is None:
            return None
        given = block_accelerated.given_of(mask, keep, drawn if plan.drops else None)
        return block_accelerated.block(plan, weights, x, given)


class Transformer(nn.Module):
    """Log-mel features to per-frame token scores, or to what a `Transducer` scores."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        lengths: jax.Array,
        keys: jax.Array | None = None,
        batch_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes utterances.

        Args:
          features: float [b, frames, features]; what lies beyond `lengths` does not matter.
          lengths: int32 [b], true frames.
          keys: PRNG keys [b], one per utterance, for dropout, layer drop and position shifts;
            None for evaluation.
          batch_key: of the layer drop, with keys; None to draw from the first utterance's.

        Returns:
          Logits float32 [b, ceil(frames / stride), vocab], or with the objective "rnnt" projections
          [b, ceil(frames / stride), joint_dim], and their true lengths, int32 [b].
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        k_input, k_shift = layers.split_keys(keys, 2)
        same, lecun = c.front_end == "same", c.init == "lecun"
        x = _gated(c, features.astype(jnp.float32), lengths)
        if not c.branch_dropout:
            x = layers.dropout(x, c.dropout, k_input)
        out_lengths = lengths // c.stride if same else -(-lengths // c.stride)
        frames = jnp.arange(x.shape[1])
        positions = _positions(c, frames, out_lengths, k_shift)
        x = x + layers.sinusoidal_positions(positions * c.position_scale, c.dim).astype(dtype)
        if c.branch_dropout:
            x = layers.dropout(x, c.dropout, k_input)
        mask = frames < out_lengths[:, None]
        blocks = [Block(c, name=f"{encoder_blocks.BLOCK}{i}") for i in range(c.blocks)]
        narrow = dtype if c.norm == "pre" else None
        x = encoder_blocks.apply_blocks(blocks, c, x, mask, keys, (2, 4), batch_key, narrow)
        if c.norm == "pre" and devices.platform():
            x = layers.SumNorm(dtype, name="final_norm").alone(x)
        elif c.norm == "pre":
            x = nn.LayerNorm(1e-5, dtype=dtype, name="final_norm")(x)
        out = layers.Dense(
            c.outputs(c.vocab),
            kernel_init=layers.uniform_fan_in(1.0 if lecun else 1.0 / 3.0),
            bias_init=layers.uniform_bias(c.dim) if lecun else nn.initializers.zeros,
            dtype=dtype,
            name="output",
        )(x)
        return out.astype(jnp.float32), out_lengths


def _gated(c: TransformerConfig, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """The gated linear units of normed features by windows, [b, t, dim]: before the first block."""
    dtype = jnp.dtype(c.dtype)
    same, lecun = c.front_end == "same", c.init == "lecun"
    norm = layers.MaskedNorm(frontend_accelerated.EPSILON, name="input_norm")
    left = max(c.kernel - c.stride, 0) // 2 if same else None
    front_end = layers.WindowedDense(
        2 * c.dim,
        c.kernel,
        c.stride,
        jnp.dtype(c.stream_dtype or dtype),
        left,
        1.0 if lecun else 1.0 / 3.0,
        lecun,
        name="front_end",
    )
    if c.input_layer:
        normed = layers.InputLayer(name="input_layer")(norm(features, lengths), lengths)
        return jax.nn.glu(front_end(normed))
    if front_end.dtype == dtype and (kind := devices.for_layers()):
        before = (c.kernel - 1) // 2 if left is None else left
        plan = frontend_accelerated.Plan(c.kernel, c.stride, before, dtype)
        weights = frontend_accelerated.Weights(
            jnp.stack(norm.parameters()), *front_end.parameters(features.shape[2])
        )
        if frontend_accelerated.fits(kind, plan, weights, *features.shape[1:]):
            return frontend_accelerated.gated(plan, weights, features, lengths)
    if dtype == jnp.float32 and not same:
        return jax.nn.glu(front_end.of_normed(norm.affine(features, lengths)))
    return jax.nn.glu(front_end(norm(features, lengths).astype(dtype)))  # rounded after the norm


def _positions(
    c: TransformerConfig, frames: jax.Array, lengths: jax.Array, keys: jax.Array | None
) -> jax.Array:
    """Seconds from the middle of each utterance, float32 [b, t]; shifted with keys [b]."""
    positions = (frames - (lengths[:, None] - 1) / 2) * c.frame_seconds
    if not c.cape_shift or keys is None:
        return positions
    draw = jax.vmap(lambda k: jax.random.uniform(k, minval=-c.cape_shift, maxval=c.cape_shift))
    return positions + draw(keys)[:, None]
