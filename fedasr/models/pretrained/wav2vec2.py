"""wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900) with a CTC head.

Raw audio, convolutions, Transformer blocks. The three differ in how they were trained, in names,
and WavLM in its attention, to whose scores a gated bias of distances is added. The base layout has
a group norm over all frames after the first convolution, which here counts true frames alone, and
norms after each sum; the large one layer norms after every convolution and before each branch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models import encoder_blocks, layers
from fedasr.models.objectives import Recogniser
from fedasr.models.pretrained import audio, mapping
from fedasr.models.pretrained.family import Family, check_blank, choose, ctc, known
from fedasr.models.pretrained.modules import (
    Attention,
    ComputeConfig,
    Convolution,
    FeedForward,
    biased_attention,
    dense,
    gelu,
    grouped_convolution,
    numbers,
    projections,
    written,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config(ComputeConfig):
    """Sizes; the defaults are the base layout's. Compute: see `ComputeConfig`.

    layout: "wav2vec2", "hubert" or "wavlm", of which the last has other attention.
    convolutions, widths, strides: of the front end: features, windows and hops, with commas
    between. convolution_norm: "group" after the first of them, or "layer" after each.
    convolution_bias: whether they have biases. projection_norm: whether a norm follows them.
    norm: "post" or "pre". position_width, position_groups: of the convolution of positions.
    normalise: whether audio is brought to zero mean and unit variance. epsilon: of layer norms.
    buckets, distance: of WavLM's distances. blank: number of the blank in the file.

    Raises:
      UserError: a size below 1, an unknown norm, or sizes that do not go together.
    """

    layout: str = "wav2vec2"
    vocab: int = 32
    dim: int = 768
    blocks: int = 12
    heads: int = 12
    mlp: int = 3072
    convolutions: str = "512,512,512,512,512,512,512"
    widths: str = "10,3,3,3,3,2,2"
    strides: str = "5,2,2,2,2,2,2"
    convolution_norm: str = "group"
    convolution_bias: bool = False
    projection_norm: bool = True
    norm: str = "post"
    position_width: int = 128
    position_groups: int = 16
    normalise: bool = True
    epsilon: float = 1e-5
    buckets: int = 320
    distance: int = 800
    blank: int = 0

    def __post_init__(self) -> None:
        self.check("vocab", "dim", "heads", "mlp", "position_width", "position_groups", "buckets")
        choose(self, layout=_PREFIXES, convolution_norm=("group", "layer"), norm=("pre", "post"))
        check_blank(self)
        sizes = [numbers(self, name) for name in _FRONT_END]
        if not all(sizes) or len(set(map(len, sizes))) > 1 or min(map(min, sizes)) < 1:
            raise UserError(
                f"the model's {', '.join(_FRONT_END)} must be as many numbers each, at least 1"
            )
        if self.dim % self.heads or self.dim % self.position_groups:
            raise UserError(
                f"the model's dim={self.dim} must be a multiple of its heads and position_groups"
            )

    @property
    def front_end(self) -> list[tuple[int, int, int]]:
        """(features, width, stride) of each convolution."""
        parts = (numbers(self, name) for name in _FRONT_END)
        return list(zip(*parts, strict=True))


_FRONT_END = ("convolutions", "widths", "strides")
_PREFIXES = {"wav2vec2": "wav2vec2", "hubert": "hubert", "wavlm": "wavlm"}


class FrontEnd(nn.Module):
    """Samples to a frame of features for every 20 ms."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, waveforms: Array, lengths: Array) -> tuple[Array, Array]:
        """float32 [b, samples] -> [b, frames, features], zeros at padding; true frames [b]."""
        c = self.config
        x = waveforms[..., None]
        for i, (features, width, stride) in enumerate(c.front_end):
            convolve = Convolution(
                features, width, stride, c.compute, 0, c.convolution_bias, name=f"conv_{i}"
            )
            lengths = jnp.maximum((lengths - width) // stride + 1, 0)
            mask = audio.inside(-(-x.shape[1] // stride), lengths)[..., None]
            x = convolve(x)
            if c.convolution_norm == "layer":
                x = nn.LayerNorm(1e-5, dtype=c.compute, name=f"norm_{i}")(x)
            elif i == 0:
                x = GroupNorm(c.compute, name="norm_0")(x, mask, lengths)
            x = jnp.where(mask, gelu(x), 0.0)
        return x, lengths


class GroupNorm(nn.Module):
    """Each feature over the true frames of an utterance, then scale and bias."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, lengths: Array) -> Array:
        """x: [b, t, f]; mask: bool [b, t, 1]; lengths: int32 [b]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[2:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[2:], jnp.float32)
        x = x.astype(jnp.float32)
        count = jnp.maximum(lengths, 1)[:, None, None]
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=1, keepdims=True) / count
        centred = jnp.where(mask, x - mean, 0.0)
        variance = jnp.sum(centred**2, axis=1, keepdims=True) / count
        normed = centred * jax.lax.rsqrt(variance + 1e-5)
        return (normed * scale.astype(jnp.float32) + bias).astype(self.dtype)


class Positions(nn.Module):
    """What a wide convolution in groups hears; its kernel has a norm of its own for each tap."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [b, t, d], zeros at padding -> [b, t, d]."""
        c = self.config
        groups, width, size = c.position_groups, c.position_width, c.dim // c.position_groups
        shape = (c.dim, size, width)
        draw = nn.initializers.normal(math.sqrt(4.0 / (width * c.dim)))
        direction = self.param("direction", draw, shape, jnp.float32).astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.dim,), jnp.float32)
        norm = jnp.sqrt(jnp.sum(direction**2, axis=(0, 1), keepdims=True))
        kernel = (direction * (scale / norm)).reshape(groups, size, size, width)
        kernel = kernel.transpose(3, 0, 2, 1).astype(c.compute)
        return gelu(grouped_convolution(x, kernel) + bias).astype(c.compute)


class GatedAttention(nn.Module):
    """WavLM's: the bias of distances, times a gate that each query has for each head."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, distances: Array) -> Array:
        """x: [b, t, d]; mask: bool [b, t]; distances: [heads, t, t]."""
        c = self.config
        split = x.reshape(*x.shape[:2], c.heads, -1)
        gates = dense(8, c.compute, "gate")(split).astype(jnp.float32)
        a, b = jnp.moveaxis(jax.nn.sigmoid(gates.reshape(*split.shape[:3], 2, 4).sum(-1)), -1, 0)
        scale = self.param("gate_scale", nn.initializers.ones, (c.heads,), jnp.float32)
        gate = a * (b * scale - 1.0) + 2.0  # [b, t, heads]
        bias = jnp.moveaxis(gate, 2, 1)[..., None] * distances
        q, k, v = projections(x, c.heads, c.compute)
        found = biased_attention(q, k, v, mask[:, None, None, :], bias)
        return dense(c.dim, c.compute, "out")(found.reshape(x.shape))


class Block(nn.Module):
    """Attention and a feed-forward net, with norms before both or after both sums."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, x: Array, mask: Array, keys: Array | None, distances: Array | None = None
    ) -> Array:
        """x: [b, t, d]; mask: bool [b, t]; keys: [b] or None; distances: [heads, t, t] or None."""
        c = self.config
        k = layers.split_keys(keys, 3)
        train = keys is not None
        norms = [
            nn.LayerNorm(c.epsilon, dtype=c.compute, name=name)
            for name in ("attention_norm", "mlp_norm")
        ]

        def attend(x: Array) -> Array:
            if distances is not None:
                found = GatedAttention(c, name="attention")(x, mask, distances)
            else:
                fused = c.attention == "fused"
                attention = Attention(c.heads, c.compute, fused=fused, name="attention")
                found = attention(x, mask, train)
            return layers.dropout(found, c.dropout, k[0])

        def feed(x: Array) -> Array:
            found = FeedForward(c.mlp, c.dropout, c.compute, name="mlp")(x, k[1])
            return layers.dropout(found, c.dropout, k[2])

        if c.norm == "pre":
            x = x + attend(norms[0](x))
            return x + feed(norms[1](x))
        x = norms[0](x + attend(x))
        return norms[1](x + feed(x))


class Encoder(nn.Module):
    """Transformer blocks on frames and what the convolution of positions adds to them."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Array, lengths: Array, keys: Array | None) -> Array:
        """x: [b, t, d]; lengths: int32 [b]; keys: [b] or None."""
        c = self.config
        k_input, *k_blocks = layers.split_keys(keys, 1 + c.blocks)
        mask = audio.inside(x.shape[1], lengths)
        x = jnp.where(mask[..., None], x, 0.0)
        x = x + Positions(c, name="positions")(x)
        norm = nn.LayerNorm(c.epsilon, dtype=c.compute, name="norm")
        if c.norm == "post":
            x = norm(x)
        x = layers.dropout(x, c.dropout, k_input)
        more: tuple[Array, ...] = ()
        if c.layout == "wavlm":
            more = (Distances(c, name="distances")(x.shape[1]),)
        for i, k in enumerate(k_blocks):
            y = encoder_blocks.apply_block(Block(c, name=f"block_{i}"), c.remat, x, mask, k, *more)
            x = encoder_blocks.drop_block(y, x, c.layer_drop, k, 3)
        return norm(x) if c.norm == "pre" else x


class Distances(nn.Module):
    """A score for each head and distance, of which far ones share buckets (T5, 1910.10683)."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, frames: int) -> Array:
        """float32 [heads, frames, frames]: of each query and key."""
        c = self.config
        shape = (c.buckets, c.heads)
        table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        distance = jnp.arange(frames)[None, :] - jnp.arange(frames)[:, None]
        half, exact = c.buckets // 2, c.buckets // 4
        near = jnp.abs(distance)
        growth = jnp.log(jnp.maximum(near, 1) / exact) / math.log(c.distance / exact)
        far = jnp.minimum(exact + (growth * (half - exact)).astype(jnp.int32), half - 1)
        bucket = jnp.where(near < exact, near, far) + jnp.where(distance > 0, half, 0)
        return jnp.moveaxis(table.astype(jnp.float32)[bucket], 2, 0)


class Model(nn.Module):
    """Waveforms to scores of tokens."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, waveforms: Array, lengths: Array, keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Encodes utterances.

        Args:
          waveforms: float32 [b, samples], zeros beyond `lengths`, int32 [b].
          keys: PRNG keys [b], one per utterance; None for evaluation.

        Returns:
          Logits float32 [b, frames, vocab] and true frames, int32 [b].
        """
        c = self.config
        x, lengths = FrontEnd(c, name="front_end")(waveforms, lengths)
        k_input, k_blocks, k_output = layers.split_keys(keys, 3)
        if c.projection_norm:
            x = nn.LayerNorm(c.epsilon, dtype=c.compute, name="projection_norm")(x)
        x = layers.dropout(dense(c.dim, c.compute, "projection")(x), c.dropout, k_input)
        x = Encoder(c, name="encoder")(x, lengths, k_blocks)
        x = layers.dropout(x, c.dropout, k_output)
        return dense(c.vocab, c.compute, "output")(x).astype(jnp.float32), lengths


def heard(c: Wav2Vec2Config, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """The waveforms of a batch of audio as the model wants them, and their lengths."""
    waveforms, lengths = audio.samples(batch)
    return (audio.normalised(waveforms, lengths) if c.normalise else waveforms), lengths


def recogniser(c: Wav2Vec2Config, augment: SpecAugmentConfig | None) -> Recogniser:
    """See `Family`.

    Raises:
      UserError: SpecAugment, of which raw audio has no use.
    """
    if augment is not None:
        raise UserError("this model hears raw audio, no features: set augment.enabled=False")
    return ctc(Model(c), c, lambda batch: heard(c, batch), None)


def table(c: Wav2Vec2Config, head: bool) -> list[mapping.Entry]:
    """The tensors of a folder; `head`: whether the CTC head is among them."""
    prefix = _PREFIXES[c.layout] + "."
    found = []
    for i, (_, width, _) in enumerate(c.front_end):
        name = f"{prefix}feature_extractor.conv_layers.{i}"
        path = f"front_end/conv_{i}"
        found += mapping.convolution(path, f"{name}.conv", width, c.convolution_bias)
        if c.convolution_norm == "layer" or i == 0:
            found += mapping.norm(f"front_end/norm_{i}", f"{name}.layer_norm")
    if c.projection_norm:
        found += mapping.norm("projection_norm", f"{prefix}feature_projection.layer_norm")
    found += mapping.dense("projection", f"{prefix}feature_projection.projection")
    name = f"{prefix}encoder.pos_conv_embed.conv"
    found += [
        mapping.same(
            "encoder/positions/scale",
            f"{name}.parametrizations.weight.original0",
            (1, 1, c.position_width),
        ),
        mapping.same("encoder/positions/direction", f"{name}.parametrizations.weight.original1"),
        mapping.same("encoder/positions/bias", f"{name}.bias"),
    ]
    found += mapping.norm("encoder/norm", f"{prefix}encoder.layer_norm")
    for i in range(c.blocks):
        found += _block(c, f"encoder/block_{i}", f"{prefix}encoder.layers.{i}")
    if c.layout == "wavlm":
        name = f"{prefix}encoder.layers.0.attention.rel_attn_embed.weight"
        found.append(mapping.same("encoder/distances/embedding", name))
    return found + (mapping.output("output", "lm_head", c.blank) if head else [])


def _block(c: Wav2Vec2Config, path: str, name: str) -> list[mapping.Entry]:
    found = []
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        found += mapping.dense(f"{path}/attention/{ours}", f"{name}.attention.{theirs}_proj")
    found += mapping.norm(f"{path}/attention_norm", f"{name}.layer_norm")
    found += mapping.dense(f"{path}/mlp/up", f"{name}.feed_forward.intermediate_dense")
    found += mapping.dense(f"{path}/mlp/down", f"{name}.feed_forward.output_dense")
    found += mapping.norm(f"{path}/mlp_norm", f"{name}.final_layer_norm")
    if c.layout == "wavlm":
        gate = f"{path}/attention/gate"
        found += mapping.dense(gate, f"{name}.attention.gru_rel_pos_linear")
        shape = (1, c.heads, 1, 1)
        theirs = f"{name}.attention.gru_rel_pos_const"
        found.append(mapping.same(f"{path}/attention/gate_scale", theirs, shape))
    return found


def options(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a folder's config.json; `beside`: what its other files say.

    Raises:
      UserError: a variant that is not known here.
    """
    known(
        config,
        hidden_act="gelu",
        feat_extract_activation="gelu",
        add_adapter=False,
        conv_pos_batch_norm=False,
    )
    layout = config["model_type"]
    return {
        "layout": layout,
        "vocab": config["vocab_size"],
        "dim": config["hidden_size"],
        "blocks": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"],
        "convolutions": written(config["conv_dim"]),
        "widths": written(config["conv_kernel"]),
        "strides": written(config["conv_stride"]),
        "convolution_norm": config["feat_extract_norm"],
        "convolution_bias": config["conv_bias"],
        "projection_norm": config.get("feat_proj_layer_norm", True),
        "norm": "pre" if config["do_stable_layer_norm"] else "post",
        "position_width": config["num_conv_pos_embeddings"],
        "position_groups": config["num_conv_pos_embedding_groups"],
        "normalise": beside.get("do_normalize", True),
        "epsilon": config["layer_norm_eps"],
        "buckets": config.get("num_buckets", 320),
        "distance": config.get("max_bucket_distance", 800),
        "blank": config["pad_token_id"],
    }


_CLASSES = {"wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC", "wavlm": "WavLMForCTC"}


def describe(c: Wav2Vec2Config) -> dict[str, dict[str, Any]]:
    """The inverse of `options`: files by name."""
    convolutions, widths, strides = (numbers(c, name) for name in _FRONT_END)
    config = {
        "model_type": c.layout,
        "architectures": [_CLASSES[c.layout]],
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "feat_extract_norm": c.convolution_norm,
        "feat_proj_layer_norm": c.projection_norm,
        "conv_dim": list(convolutions),
        "conv_kernel": list(widths),
        "conv_stride": list(strides),
        "conv_bias": c.convolution_bias,
        "num_feat_extract_layers": len(widths),
        "num_conv_pos_embeddings": c.position_width,
        "num_conv_pos_embedding_groups": c.position_groups,
        "do_stable_layer_norm": c.norm == "pre",
        "layer_norm_eps": c.epsilon,
        "num_buckets": c.buckets,
        "max_bucket_distance": c.distance,
        "pad_token_id": c.blank,
        # Masks of features have a vector of their own there, which is not kept.
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": audio.RATE,
        "padding_value": 0.0,
        "do_normalize": c.normalise,
        "return_attention_mask": c.convolution_norm == "layer",
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


FAMILY = Family(
    config=Wav2Vec2Config,
    types=tuple(_PREFIXES),
    prefix=lambda c: _PREFIXES[c.layout],
    head=r"^lm_head\.",
    encoder={"blank": 0},
    options=options,
    describe=describe,
    table=table,
    recogniser=recogniser,
    # What pretraining alone needs.
    unused=(r"masked_spec_embed$", r"^(quantizer|project_hid|project_q|label_embeddings)"),
)
