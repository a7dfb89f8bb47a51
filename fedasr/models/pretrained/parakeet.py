"""FastConformer encoders with a CTC head (arXiv 2305.05084): NVIDIA's Parakeet and Conformer-CTC.

NeMo's mel features, three strided convolutions over time and mels, then blocks of a feed-forward
net, attention with relative positions (Transformer-XL, 1901.02860), a convolution and another
feed-forward net. Batch norms are affine maps here, see `mapping.batch_norm`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.kernels.dense import product
from fedasr.kernels.depthwise import depthwise_convolution
from fedasr.models import encoder_blocks, layers
from fedasr.models.objectives import Recogniser
from fedasr.models.pretrained import audio, mapping
from fedasr.models.pretrained.family import Family, check_blank, ctc, known
from fedasr.models.pretrained.modules import (
    ComputeConfig,
    CtcModel,
    FeedForward,
    biased_attention,
    dense,
    projections,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ParakeetConfig(ComputeConfig):
    """Sizes; the defaults are those of parakeet-ctc-1.1b but for the blocks. See `ComputeConfig`.

    mels: channels. emphasis: of the waveform. channels: of the front end. factor: mel frames in a
    frame, a power of 2. separable: whether its convolutions but the first are of each channel by
    itself, with a dense layer after it. kernel: taps of the blocks' convolutions. bias: whether
    attention and feed-forward nets have biases. convolution_bias: whether convolutions in blocks
    have. scale_input: whether frames are multiplied by sqrt(dim). blank: its number in the file.

    Raises:
      UserError: a size below 1, or sizes that do not go together.
    """

    vocab: int = 1025
    dim: int = 1024
    blocks: int = 24
    heads: int = 8
    mlp: int = 4096
    mels: int = 80
    emphasis: float = 0.97
    channels: int = 256
    factor: int = 8
    separable: bool = True
    kernel: int = 9
    bias: bool = True
    convolution_bias: bool = True
    scale_input: bool = True
    blank: int = 1024

    def __post_init__(self) -> None:
        self.check("vocab", "dim", "heads", "mlp", "mels", "channels", "factor", "kernel")
        check_blank(self)
        if self.dim % self.heads or self.dim % 2:
            raise UserError(
                f"the model's dim={self.dim} must be even and a multiple of heads={self.heads}"
            )
        if self.factor < 2 or self.factor & (self.factor - 1) or not self.kernel % 2:
            raise UserError("the model's factor must be 2, 4, 8 ... and its kernel odd")


def _neighbours(x: Array) -> list[Array]:
    """Of every second frame and channel, each of the 3 x 3 around it: 9 of [b, t', f', c].

    x: [b, t, f, c]; zeros beyond its ends.
    """
    t, f = (-(-size // 2) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.pad(x, ((0, 0), (0, 2 * t + 2 - x.shape[1]), (0, 2 * f + 2 - x.shape[2]), (0, 0)))
    return [x[:, i : i + 2 * t : 2, j : j + 2 * f : 2] for i in range(3) for j in range(3)]


class FrontEnd(nn.Module):
    """Mel frames to fewer frames of features."""

    config: ParakeetConfig

    @nn.compact
    def __call__(self, mel: Array, lengths: Array) -> tuple[Array, Array]:
        """mel: [b, t, mels], zeros beyond `lengths` -> [b, t', dim], and true frames [b]."""
        c = self.config
        x = mel[..., None].astype(c.compute)
        init = layers.uniform_fan_in(1.0)
        for i in range(c.factor.bit_length() - 1):
            alone = c.separable and i > 0
            shape = (9 if alone or i == 0 else 9 * c.channels, c.channels)
            taps = self.param(f"kernel_{i}", init, shape, jnp.float32).astype(c.compute)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, shape[1:], jnp.float32)
            near = _neighbours(x)
            if alone:
                x = sum(tap * y for tap, y in zip(taps, near, strict=True))
            else:
                x = product(jnp.concatenate(near, axis=-1), taps)
            lengths = -(-lengths // 2)
            mask = audio.inside(x.shape[1], lengths)[..., None, None]
            x = jnp.where(mask, x + bias.astype(c.compute), 0.0)
            if alone:
                x = dense(c.channels, c.compute, f"pointwise_{i}")(x)
                x = jnp.where(mask, x, 0.0)
            x = jax.nn.relu(x)
        x = jnp.moveaxis(x, 3, 2).reshape(*x.shape[:2], -1)
        return dense(c.dim, c.compute, "projection")(x), lengths


class Attention(nn.Module):
    """Scores of contents and of distances, with a bias of all queries for each."""

    config: ParakeetConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, distances: Array) -> Array:
        """x: [b, t, d]; mask: bool [b, t]; distances: [2t - 1, d], from t - 1 to 1 - t."""
        c = self.config
        t, size = x.shape[1], c.dim // c.heads
        q, k, v = projections(x, c.heads, c.compute, c.bias)
        by = dense(c.dim, c.compute, "distance", False)(distances).reshape(-1, c.heads, size)
        zeros = nn.initializers.zeros
        content = self.param("content_bias", zeros, (c.heads, size), jnp.float32)
        distance = self.param("distance_bias", zeros, (c.heads, size), jnp.float32)
        scores = jnp.einsum("bqhe,phe->bhqp", q + distance.astype(c.compute), by)
        scores = _by_key(scores.astype(jnp.float32)) * size**-0.5
        q = q + content.astype(c.compute)
        found = biased_attention(q, k, v, mask[:, None, None, :], scores)
        return dense(c.dim, c.compute, "out", c.bias)(found.reshape(x.shape[0], t, c.dim))


def _by_key(scores: Array) -> Array:
    """Scores of distances t - 1 ... 1 - t, [b, h, t, 2t - 1], as scores of keys, [b, h, t, t]."""
    b, h, t, count = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    shifted = padded.reshape(b, h, count + 1, t)[:, :, 1:].reshape(b, h, t, count)
    return shifted[..., :t]


class Convolution(nn.Module):
    """Gated dense layer, depthwise convolution over time, affine map, swish, dense layer."""

    config: ParakeetConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x: [b, t, d]; mask: bool [b, t] -> [b, t, d]."""
        c = self.config
        x = jax.nn.glu(dense(2 * c.dim, c.compute, "up", c.convolution_bias)(x))
        x = jnp.where(mask[..., None], x, 0.0)
        taps = self.param("depthwise", layers.uniform_fan_in(1.0), (c.kernel, c.dim), jnp.float32)
        x = depthwise_convolution(x, taps)
        if c.convolution_bias:
            bias = self.param("depthwise_bias", nn.initializers.zeros, (c.dim,), jnp.float32)
            x = x + bias.astype(c.compute)
        scale = self.param("scale", nn.initializers.ones, (c.dim,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.dim,), jnp.float32)
        x = x * scale.astype(c.compute) + bias.astype(c.compute)
        return dense(c.dim, c.compute, "down", c.convolution_bias)(jax.nn.swish(x))


class Block(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step, layer norm."""

    config: ParakeetConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, keys: Array | None, distances: Array) -> Array:
        """x: [b, t, d]; mask: bool [b, t]; keys: [b] or None; distances: see `Attention`."""
        c = self.config
        k = layers.split_keys(keys, 6)

        def norm(name: str) -> nn.Module:
            return nn.LayerNorm(1e-5, dtype=c.compute, name=name)

        def feed(name: str) -> nn.Module:
            return FeedForward(c.mlp, c.dropout, c.compute, jax.nn.swish, c.bias, name=name)

        y = feed("mlp_0")(norm("mlp_norm_0")(x), k[0])
        x = x + 0.5 * layers.dropout(y, c.dropout, k[1])
        y = Attention(c, name="attention")(norm("attention_norm")(x), mask, distances)
        x = x + layers.dropout(y, c.dropout, k[2])
        y = Convolution(c, name="convolution")(norm("convolution_norm")(x), mask)
        x = x + layers.dropout(y, c.dropout, k[3])
        y = feed("mlp_1")(norm("mlp_norm_1")(x), k[4])
        return norm("final_norm")(x + 0.5 * layers.dropout(y, c.dropout, k[5]))


class Encoder(nn.Module):
    """The front end and the blocks."""

    config: ParakeetConfig

    @nn.compact
    def __call__(self, mel: Array, lengths: Array, keys: Array | None) -> tuple[Array, Array]:
        """mel: [b, t, mels], zeros beyond `lengths` -> frames [b, t', dim], true ones [b]."""
        c = self.config
        k_input, *k_blocks = layers.split_keys(keys, 1 + c.blocks)
        x, lengths = FrontEnd(c, name="front_end")(mel, lengths)
        x = layers.dropout(x * (math.sqrt(c.dim) if c.scale_input else 1.0), c.dropout, k_input)
        mask = audio.inside(x.shape[1], lengths)
        distances = jnp.asarray(_waves(x.shape[1], c.dim), c.compute)
        for i, k in enumerate(k_blocks):
            block = Block(c, name=f"block_{i}")
            y = encoder_blocks.apply_block(block, c.remat, x, mask, k, distances)
            x = encoder_blocks.drop_block(y, x, c.layer_drop, k, 6)
        return x, lengths


def _waves(frames: int, dim: int) -> np.ndarray:
    """Sines and cosines, in turns, of the distances frames - 1 ... 1 - frames."""
    rates = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(frames - 1, -frames, -1)[:, None] * rates
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return waves.reshape(len(angles), dim).astype(np.float32)


def recogniser(c: ParakeetConfig, augment: SpecAugmentConfig | None) -> Recogniser:
    """See `Family`."""

    def front(batch: Mapping[str, Array]) -> tuple[Array, Array]:
        return audio.nemo_mel(*audio.samples(batch), c.mels, c.emphasis)

    return ctc(CtcModel(Encoder(c), c.vocab, c.compute), c, front, augment)


def table(c: ParakeetConfig, head: bool) -> list[mapping.Entry]:
    """The tensors of a folder; `head`: whether the CTC head is among them."""
    found = []
    for i in range(c.factor.bit_length() - 1):
        place = 2 * i if not c.separable else max(3 * i - 1, 0)
        name = f"encoder.subsampling.layers.{place}"
        found += [
            _taps(f"encoder/front_end/kernel_{i}", f"{name}.weight"),
            mapping.same(f"encoder/front_end/bias_{i}", f"{name}.bias"),
        ]
        if i and c.separable:
            path, name = f"encoder/front_end/pointwise_{i}", f"encoder.subsampling.layers.{3 * i}"
            found.append(mapping.permuted(f"{path}/kernel", f"{name}.weight", _POINT, (1, 0, 2, 3)))
            found.append(mapping.same(f"{path}/bias", f"{name}.bias"))
    found += mapping.dense("encoder/front_end/projection", "encoder.subsampling.linear")
    for i in range(c.blocks):
        found += _block(c, f"encoder/block_{i}", f"encoder.layers.{i}")
    return found + (mapping.output("output", "ctc_head", c.blank, 1) if head else [])


_POINT = (-1, -1, 1, 1)  # a convolution of one tap


def _taps(path: str, name: str) -> mapping.Entry:
    """A convolution of 3 x 3 taps: [out, in, 3, 3] there, [9 * in, out] here."""

    def read(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.ascontiguousarray(x.transpose(2, 3, 1, 0).reshape(-1, len(x))),)

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        taps = x.reshape(3, 3, -1, x.shape[1])
        return (np.ascontiguousarray(taps.transpose(3, 2, 0, 1)),)

    return mapping.Entry((path,), (name,), read, write)


def _block(c: ParakeetConfig, path: str, name: str) -> list[mapping.Entry]:
    found = []
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        found += mapping.dense(
            f"{path}/attention/{ours}", f"{name}.self_attn.{theirs}_proj", c.bias
        )
    distance = f"{name}.self_attn.relative_k_proj"
    found += mapping.dense(f"{path}/attention/distance", distance, False)
    found.append(mapping.same(f"{path}/attention/content_bias", f"{name}.self_attn.bias_u"))
    found.append(mapping.same(f"{path}/attention/distance_bias", f"{name}.self_attn.bias_v"))
    for i in (0, 1):
        feed = f"{name}.feed_forward{i + 1}"
        found += mapping.dense(f"{path}/mlp_{i}/up", f"{feed}.linear1", c.bias)
        found += mapping.dense(f"{path}/mlp_{i}/down", f"{feed}.linear2", c.bias)
        found += mapping.norm(f"{path}/mlp_norm_{i}", f"{name}.norm_feed_forward{i + 1}")
    for ours, theirs in (("attention", "self_att"), ("convolution", "conv"), ("final", "out")):
        found += mapping.norm(f"{path}/{ours}_norm", f"{name}.norm_{theirs}")
    path, name = f"{path}/convolution", f"{name}.conv"
    for ours, theirs in (("up", "pointwise_conv1"), ("down", "pointwise_conv2")):
        kernel = f"{path}/{ours}/kernel"
        found.append(mapping.permuted(kernel, f"{name}.{theirs}.weight", (-1, -1, 1), (1, 0, 2)))
        if c.convolution_bias:
            found.append(mapping.same(f"{path}/{ours}/bias", f"{name}.{theirs}.bias"))
    taps = f"{name}.depthwise_conv"
    shape = (-1, 1, -1)
    found.append(mapping.permuted(f"{path}/depthwise", f"{taps}.weight", shape, (2, 1, 0)))
    if c.convolution_bias:
        found.append(mapping.same(f"{path}/depthwise_bias", f"{taps}.bias"))
    return [*found, mapping.batch_norm(path, f"{name}.norm", 1e-5)]


def options(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a folder's config.json; `beside`: what its other files say.

    Raises:
      UserError: a variant that is not known here.
    """
    c = config["encoder_config"]
    known(c, hidden_act="silu", subsampling_conv_kernel_size=3, subsampling_conv_stride=2)
    kind = c.get("subsampling", "dw_striding")
    if kind not in ("striding", "dw_striding"):
        raise UserError(f"subsampling={kind!r} is not known here: choose another model")
    known(beside, n_fft=512, win_length=400, hop_length=160, sampling_rate=audio.RATE)
    return {
        "vocab": config["vocab_size"],
        "dim": c["hidden_size"],
        "blocks": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp": c["intermediate_size"],
        "mels": c["num_mel_bins"],
        "emphasis": beside.get("preemphasis", 0.97),
        "channels": c["subsampling_conv_channels"],
        "factor": c["subsampling_factor"],
        "separable": kind == "dw_striding",
        "kernel": c["conv_kernel_size"],
        "bias": c["attention_bias"],
        "convolution_bias": c["convolution_bias"],
        "scale_input": c["scale_input"],
        "blank": config["pad_token_id"],
    }


def describe(c: ParakeetConfig) -> dict[str, dict[str, Any]]:
    """The inverse of `options`: files by name.

    Raises:
      UserError: a front end of earlier Conformers, which transformers has not.
    """
    if not c.separable:
        raise UserError(
            "transformers has no model with this front end (separable=False): export it in the "
            "project's own format"
        )
    encoder = {
        "model_type": "parakeet_encoder",
        "hidden_size": c.dim,
        "num_hidden_layers": c.blocks,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": "silu",
        "num_mel_bins": c.mels,
        "subsampling_conv_channels": c.channels,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "subsampling_factor": c.factor,
        "conv_kernel_size": c.kernel,
        "attention_bias": c.bias,
        "convolution_bias": c.convolution_bias,
        "scale_input": c.scale_input,
    }
    config = {
        "model_type": "parakeet_ctc",
        "architectures": ["ParakeetForCTC"],
        "vocab_size": c.vocab,
        "pad_token_id": c.blank,
        "encoder_config": encoder,
    }
    preprocessor = {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": c.mels,
        "sampling_rate": audio.RATE,
        "preemphasis": c.emphasis,
        "n_fft": 512,
        "win_length": 400,
        "hop_length": audio.BLOCK_SAMPLES,
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


FAMILY = Family(
    config=ParakeetConfig,
    types=("parakeet_ctc",),
    prefix=lambda c: "encoder",
    head=r"^ctc_head\.",
    encoder={"blank": 0},
    options=options,
    describe=describe,
    table=table,
    recogniser=recogniser,
)
