"""Recurrent decoder of neural recordings, with an input layer that belongs to a recording day.

    bins -> noise -> smoothing -> day layer -> windows -> GRU stack -> scores for CTC

After the public code of Fan et al. (CORP, NeurIPS 2023) and Willett et al. (Nature 620, 2023). The
parameters of one client, that is one day, are {"day": {"kernel", "bias"}, "shared": {...}}: what
lies under "day" can stay with the client. Smoothing is part of the model because the noise of
training must come before it.
"""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.generators import DrawingConfig
from fedasr.kernels.dense import product
from fedasr.kernels.frontend import patches
from fedasr.kernels.gru import gru
from fedasr.models import layers

DAY, SHARED = "day", "shared"
_CHOICES = {
    "day_layer": ("affine", "softsign"),
    "recurrent_init": ("gates", "matrix"),
    "initial_states": ("all", "first"),
    "walk_axis": ("time", "channels"),
    "l2_on": ("all", "inputs"),
    "windows": ("centred", "inside"),
}


@dataclass(frozen=True)
class RecurrentConfig(DrawingConfig):
    """Default sizes are those of the published seed configuration (two GRU layers of 512).

    With the fields of `PUBLISHED` it is built as published; see docs/fidelity.md for the rest.

    vocab: tokens with the blank. features: channels. units, layers: of the GRU stack.
    bidirectional: a second stack sees the future, too. smoothing: standard deviation of a Gaussian
    in bins, 0 for none. subsample: every so manieth smoothed bin is kept. window, stride: bins that
    the GRU sees at once, and by how many they move on. day_layer: "affine", or "softsign" of it.
    day_dropout: on the day layer's output. dropout: on the input of each GRU layer. white_noise,
    offset_noise, walk_noise: standard deviations, in units of the z-scored features, of noise per
    bin, of a constant per utterance and channel, and of the steps of a random walk. drift_noise:
    before these, each utterance's channels are mixed by the identity plus a random matrix, whose
    entries have the standard deviation drift_noise / sqrt(features). channel_dropout: probability
    that a channel is zero for a whole utterance. Both imitate what a new day changes, and make the
    shared part forgive what its day layer gets wrong; they are ours, not published. l2: times the
    squared norm of the matrices that `l2_on` names is added to the loss: "all", or "inputs", the
    day layer's and those of the GRU layers' inputs.

    recurrent_init: recurrent matrices are orthogonal by "gates", each [u, u], or as one "matrix"
    [u, 3u], whose rows are orthonormal: a gate is then smaller by sqrt(3). initial_states: of "all"
    GRU layers are trained, from zero; or of the "first", from Glorot's uniform distribution, and
    the others' stay zero. walk_axis: along which the random walk adds up, "time" or "channels".
    taps: of the smoothing; 0 for three standard deviations on both sides. windows: "centred", with
    zeros beyond the ends, one for every stride of bins; or "inside" the utterance alone, as many
    as there are whole ones. generator: see `fedasr.generators`.
    """

    vocab: int = 32
    features: int = 192
    units: int = 512
    layers: int = 2
    bidirectional: bool = False
    smoothing: float = 2.0
    subsample: int = 2
    window: int = 1
    stride: int = 1
    day_layer: str = "affine"
    day_dropout: float = 0.0
    dropout: float = 0.4
    white_noise: float = 1.2
    offset_noise: float = 0.6
    walk_noise: float = 0.02
    drift_noise: float = 0.0
    channel_dropout: float = 0.0
    l2: float = 1e-5
    recurrent_init: str = "gates"
    initial_states: str = "all"
    walk_axis: str = "time"
    l2_on: str = "all"
    taps: int = 0
    windows: str = "centred"

    def __post_init__(self) -> None:
        sizes = ("vocab", "features", "units", "layers", "subsample", "window", "stride")
        layers.check_numbers(self)
        layers.check_sizes(self, sizes)
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"the model's {name} must be one of {known}: {value}")
        if self.taps < 0:
            raise UserError("the model's taps must be at least 0")
        noise = ("smoothing", "white_noise", "offset_noise", "walk_noise", "drift_noise", "l2")
        if negative := [name for name in noise if not getattr(self, name) >= 0]:
            raise UserError(f"the model's {', '.join(negative)} must be at least 0")
        if not all(0 <= x < 1 for x in (self.dropout, self.day_dropout, self.channel_dropout)):
            raise UserError(
                "the model's dropout, day_dropout and channel_dropout must be in [0, 1)"
            )


# The published speech decoder: 39 phonemes, silence and the blank.
SPEECH = RecurrentConfig(
    vocab=41,
    features=256,
    units=1024,
    layers=5,
    subsample=1,
    window=32,
    stride=4,
    day_layer="softsign",
    day_dropout=0.2,
    white_noise=1.0,
    offset_noise=0.2,
    walk_noise=0.0,
)


# What the authors' programs do, where it is not the default here.
PUBLISHED: dict[str, Any] = {
    "recurrent_init": "matrix",
    "initial_states": "first",
    "walk_axis": "channels",
    "l2_on": "inputs",
    "taps": 9,
    "windows": "inside",
}


def init(key: jax.Array, config: RecurrentConfig) -> dict[str, Any]:
    """Parameters of one client, float32.

    The day layer is the identity. Recurrent matrices are orthogonal (see `RecurrentConfig`), others
    Glorot uniform; biases and, where all are trained, the initial states are zero.

    Returns:
      {"day": {"kernel" [c, c], "bias" [c]}, "shared": {"gru_0", ..., "head"}}; see
      `kernels.gru.gru` for a layer, whose name ends in "_back" where it runs backwards. "initial"
      is missing where it stays zero.
    """
    dense = jax.nn.initializers.glorot_uniform()
    orthogonal = jax.nn.initializers.orthogonal()
    n, u = config.features, config.units

    def recurrent(key: jax.Array) -> jax.Array:
        if config.recurrent_init == "matrix":
            return orthogonal(key, (u, 3 * u))
        return jnp.concatenate([orthogonal(k, (u, u)) for k in jax.random.split(key, 3)], axis=1)

    def initial(key: jax.Array, first: bool) -> dict[str, jax.Array]:
        if config.initial_states == "all":
            return {"initial": jnp.zeros(u)}
        return {"initial": dense(key, (1, u))[0]} if first else {}

    def layer(key: jax.Array, inputs: int, first: bool) -> dict[str, jax.Array]:
        return {
            "input": dense(key, (inputs, 3 * u)),
            "recurrent": recurrent(jax.random.fold_in(key, 1)),
            "bias": jnp.zeros(3 * u),
            "recurrent_bias": jnp.zeros(u),
            **initial(jax.random.fold_in(key, 2), first),
        }

    shared: dict[str, Any] = {}
    width = n * config.window
    for i in range(config.layers):
        for j, end in enumerate(("", "_back")[: 1 + config.bidirectional]):
            shared[f"gru_{i}{end}"] = layer(jax.random.fold_in(key, 2 * i + j), width, not i)
        width = u * (1 + config.bidirectional)
    head = dense(jax.random.fold_in(key, 2 * config.layers), (width, config.vocab))
    shared["head"] = {"kernel": head, "bias": jnp.zeros(config.vocab)}
    return {DAY: {"kernel": jnp.eye(n), "bias": jnp.zeros(n)}, SHARED: shared}


def noisy(x: jax.Array, keys: jax.Array, config: RecurrentConfig) -> jax.Array:
    """Adds the noise of training: of the channels, per bin, constant over time, and a random walk.

    Args:
      x: float32 [b, t, c], z-scored and not smoothed. keys: one per utterance [b].
    """

    def one(x, key):
        white, offset, walk = jax.random.split(key, 3)
        size = x.shape[-1]
        if config.drift_noise:
            mixing = jax.random.normal(jax.random.fold_in(key, 3), (size, size))
            x = x + config.drift_noise / math.sqrt(size) * (x @ mixing)
        if config.channel_dropout:
            keep = 1 - config.channel_dropout
            x = x * jax.random.bernoulli(jax.random.fold_in(key, 4), keep, (size,))
        if config.white_noise:
            x = x + config.white_noise * jax.random.normal(white, x.shape)
        if config.offset_noise:
            x = x + config.offset_noise * jax.random.normal(offset, x.shape[1:])
        if config.walk_noise:
            axis = 0 if config.walk_axis == "time" else 1
            x = x + config.walk_noise * jnp.cumsum(jax.random.normal(walk, x.shape), axis=axis)
        return x

    return jax.vmap(one)(x, keys)


def smooth(x: jax.Array, sd: float, every: int = 1, taps: int = 0) -> jax.Array:
    """Gaussian smoothing along time, keeping every so manieth frame.

    The kernel sums to one; beyond the ends all is zero, the mean of z-scored features.

    Args:
      x: float32 [b, t, c], zero beyond each utterance's length.
      sd: in frames, 0 for none.
      every: frames 0, every, 2 every, ... are computed.
      taps: frames that count, one more of them after a frame than before it where they are even;
        0 for three standard deviations on both sides.

    Returns:
      float32 [b, ceil(t / every), c].
    """
    out = -(-x.shape[1] // every)
    taps = taps if sd and taps else 2 * math.ceil(3 * sd) + 1
    left, middle = (taps - 1) // 2, (taps - 1) / 2
    weights = [math.exp(-0.5 * ((i - middle) / sd) ** 2) if sd else 1.0 for i in range(taps)]
    # Shifted sums, not a convolution: see `kernels.depthwise`.
    right = max(0, (out - 1) * every + taps - left - x.shape[1])
    padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)))
    views = [padded[:, i : i + (out - 1) * every + 1 : every] for i in range(taps)]
    parts = [w / sum(weights) * view for w, view in zip(weights, views, strict=True)]
    return functools.reduce(operator.add, parts)


def forward(
    params: Any,
    features: jax.Array,
    lengths: jax.Array,
    keys: jax.Array | None,
    config: RecurrentConfig,
) -> tuple[jax.Array, jax.Array]:
    """Scores of tokens.

    Args:
      params: see `init`. The day layer may be one for each utterance, of days of its own: "kernel"
        [b, c, c], "bias" [b, c].
      features: [b, t, c], z-scored by block and not smoothed.
      lengths: int32 [b], bins.
      keys: of noise and dropout [b], or None for neither.

    Returns:
      logits float32 [b, o, vocab] and their lengths int32 [b]: o = ceil(ceil(t / subsample) /
      stride), or 1 + floor((ceil(t / subsample) - window) / stride) of windows inside, at least 1.
    """

    def masked(x):
        return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0.0)

    noise, of_day, *of_layers = layers.split_keys(keys, 2 + config.layers)
    x = features.astype(jnp.float32)
    if noise is not None:
        x = noisy(x, noise, config)
    x = smooth(masked(x), config.smoothing, config.subsample, config.taps)
    lengths = -(-lengths // config.subsample)
    x = _of_day(x, params[DAY])
    if config.day_layer == "softsign":
        x = jax.nn.soft_sign(x)
    x, lengths = _windows(masked(layers.dropout(x, config.day_dropout, of_day)), lengths, config)
    shared = params[SHARED]
    rest = {"initial": jnp.zeros(config.units)}  # of layers whose initial state is not trained
    for i, key in enumerate(of_layers):
        x = layers.dropout(x, config.dropout, key)
        states = gru(rest | shared[f"gru_{i}"], x, lengths)
        if config.bidirectional:
            back = gru(rest | shared[f"gru_{i}_back"], x, lengths, backwards=True)
            states = jnp.concatenate([states, back], axis=-1)
        x = states
    return product(x, shared["head"]["kernel"]) + shared["head"]["bias"], lengths


def _of_day(x: jax.Array, layer: Any) -> jax.Array:
    """The day layer's affine map of [b, t, c]: one for all utterances, or one for each."""
    if layer["kernel"].ndim == 2:
        return product(x, layer["kernel"]) + layer["bias"]
    return jnp.einsum("btc,bcd->btd", x, layer["kernel"]) + layer["bias"][:, None]


def _windows(
    x: jax.Array, lengths: jax.Array, config: RecurrentConfig
) -> tuple[jax.Array, jax.Array]:
    """What the GRU sees in each of its frames, [b, o, window * f], and their numbers [b]."""
    width, stride = config.window, config.stride
    if config.windows == "centred":
        return patches(x, width, stride), -(-lengths // stride)
    out = max((x.shape[1] - width) // stride + 1, 1)
    lengths = jnp.maximum((lengths - width) // stride + 1, 0)
    return patches(x, width, stride, left=0)[:, :out], lengths


def penalty(params: Any, config: RecurrentConfig) -> jax.Array:
    """`l2` times the sum of the squares of the matrices that `l2_on` names, a scalar."""
    if config.l2_on == "inputs":
        matrices = [params[DAY]["kernel"]]
        matrices += [part["input"] for part in params[SHARED].values() if "input" in part]
    else:
        matrices = [a for a in jax.tree.leaves(params) if a.ndim == 2]
    return config.l2 * functools.reduce(operator.add, [jnp.sum(a**2) for a in matrices])
