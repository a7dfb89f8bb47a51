"""The loop of a gated recurrent unit, and a backward pass that leaves to a loop what it must."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fedasr.kernels.dense import by_kernel, product

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def gru(
    params: Mapping[str, jax.Array], x: jax.Array, lengths: jax.Array, backwards: bool = False
) -> jax.Array:
    """A gated recurrent unit (Cho et al., 2014) with the reset gate after the product.

        z, r = sigmoid(x W_zr + b_zr + h U_zr);  n = tanh(x W_n + b_n + r (h U_n + c))
        h <- z h + (1 - z) n

    The inputs' products are one product for all frames, before the loop.

    Args:
      params: "input" W [f, 3u] (z, r, n), "bias" b [3u], "recurrent" U [u, 3u], "recurrent_bias" c
        [u], "initial" h [u].
      x: float [b, t, f]. lengths: int32 [b]; the state rests at frames beyond.
      backwards: from each utterance's last frame to its first.

    Returns:
      h after each frame, [b, t, u] in x's dtype.
    """
    projected = jnp.moveaxis(product(x, params["input"]) + params["bias"], 1, 0)
    inside = (jnp.arange(x.shape[1]) < lengths[:, None]).T[..., None]
    if backwards:  # frames beyond the end come first, and pass
        projected, inside = projected[::-1], inside[::-1]
    start = jnp.broadcast_to(params["initial"], (x.shape[0], params["initial"].shape[0]))
    states = _recurrence(projected, params["recurrent"], params["recurrent_bias"], start, inside)
    return jnp.moveaxis(states[::-1] if backwards else states, 0, 1)


def reference(
    params: Mapping[str, jax.Array], x: jax.Array, lengths: jax.Array, backwards: bool = False
) -> jax.Array:
    """What `gru` computes, frame by frame."""
    units = params["initial"].shape[0]
    h = jnp.broadcast_to(params["initial"], (x.shape[0], units))
    out = [h] * x.shape[1]
    for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        given = jnp.split(x[:, t] @ params["input"] + params["bias"], 3, axis=-1)
        old = jnp.split(h @ params["recurrent"], 3, axis=-1)
        z, r = (jax.nn.sigmoid(a + b) for a, b in zip(given[:2], old[:2], strict=True))
        new = jnp.tanh(given[2] + r * (old[2] + params["recurrent_bias"]))
        h = jnp.where((t < lengths)[:, None], z * h + (1 - z) * new, h)
        out[t] = h
    return jnp.stack(out, axis=1)


@jax.custom_vjp
def _recurrence(
    projected: jax.Array,
    recurrent: jax.Array,
    bias: jax.Array,
    start: jax.Array,
    inside: jax.Array,
) -> jax.Array:
    """The loop of `gru`: states after each frame, [t, b, u].

    The backward pass computes gates and products for all frames at once and leaves to its loop what
    must be in order: one product a frame. Automatically the recurrent matrix's gradient would be
    added up frame by frame, too.

    Args:
      projected: [t, b, 3u]. recurrent: [u, 3u]. bias: [u]. start: [b, u]. inside: bool [t, b, 1].
    """

    def step(h: jax.Array, frame: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        given, real = frame
        z, _, new = _gates(given, h @ recurrent, bias)
        h = jnp.where(real, z * h + (1 - z) * new, h)
        return h, h

    return jax.lax.scan(step, start, (projected, inside))[1]


def _gates(
    given: jax.Array, old: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z, r and the new content, from the products of the input and of the state [..., 3u]."""
    units = bias.shape[0]
    gates = jax.nn.sigmoid(given[..., : 2 * units] + old[..., : 2 * units])
    z, r = gates[..., :units], gates[..., units:]
    return z, r, jnp.tanh(given[..., 2 * units :] + r * (old[..., 2 * units :] + bias))


def _forward(
    projected: jax.Array,
    recurrent: jax.Array,
    bias: jax.Array,
    start: jax.Array,
    inside: jax.Array,
) -> tuple[jax.Array, Saved]:
    states = _recurrence(projected, recurrent, bias, start, inside)
    return states, (projected, recurrent, bias, start, inside, states)


def _backward(
    saved: Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    projected, recurrent, bias, start, inside, states = saved
    before = jnp.concatenate([start[None], states])[:-1]
    old = product(before, recurrent)
    z, r, new = _gates(projected, old, bias)
    # What the gradient of a state is multiplied by on its way to each gate's argument.
    to_new = jnp.where(inside, (1 - z) * (1 - new**2), 0)
    to_z = jnp.where(inside, (before - new) * z * (1 - z), 0)
    to_r = to_new * (old[..., 2 * bias.shape[0] :] + bias) * r * (1 - r)
    factors = jnp.stack([to_z, to_r, to_new * r], axis=2)  # [t, b, 3, u]
    kept = jnp.where(inside, z, 1)

    def step(
        after: jax.Array, frame: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        arriving, kept, factors = frame
        now = after + arriving
        back = (now[:, None] * factors).reshape(now.shape[0], -1)
        return now * kept + back @ recurrent.T, now

    last = jnp.zeros_like(start)
    by_start, by_state = jax.lax.scan(step, last, (gradient, kept, factors), reverse=True)
    by_old = (by_state[:, :, None] * factors).reshape(old.shape)
    by_recurrent = by_kernel(before, by_old)
    by_new = by_state * to_new
    by_projected = jnp.concatenate([by_old[..., : 2 * bias.shape[0]], by_new], axis=-1)
    return by_projected, by_recurrent, jnp.sum(by_new * r, axis=(0, 1)), by_start, None


_recurrence.defvjp(_forward, _backward)
