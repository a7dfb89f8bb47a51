"""An encoder's blocks: one after another, stacked, with layer drop, adapters and recomputation.

Blocks are flax modules that take activations [batch, time, features], a mask and keys.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr import stacks
from fedasr.kernels import attention_accelerated, devices, norm_accelerated
from fedasr.kernels.checkpoint import checkpoint
from fedasr.kernels.dense import product
from fedasr.models.layers import KEPT, SumNorm, split_keys

BLOCK = stacks.BLOCK  # how the names of an encoder's blocks begin
_STACKED = "stacked"  # of flax's variables: parameters of all blocks
ADAPTER = "adapter"  # among a block's parameters, beside its own
_per_turn = contextvars.ContextVar("blocks in a turn of the loop over them", default=1)


@contextlib.contextmanager
def per_turn(blocks: int) -> Iterator[None]:
    """So many blocks are in each turn of loops that are traced here: the same values, more code."""
    token = _per_turn.set(blocks)
    try:
        yield
    finally:
        _per_turn.reset(token)


class LazyParameter:
    """A parameter that a device keeps in another form until the moment of its use.

    Subclasses are pytrees. Blocks make arrays of theirs themselves, within `checkpoint` where it is
    on; `realise` is for the rest.
    """

    def array(self) -> jax.Array:
        """The parameter as the model uses it."""
        raise NotImplementedError


def is_lazy(x: Any) -> bool:
    """Whether x is a `LazyParameter`."""
    return isinstance(x, LazyParameter)


def realise(params: Any) -> Any:
    """The tree with an array in place of every `LazyParameter`."""
    return jax.tree.map(lambda x: x.array() if is_lazy(x) else x, params, is_leaf=is_lazy)


def realise_outside_blocks(params: Any) -> Any:
    """`realise` for all of a model's parameters but its blocks'."""
    if not isinstance(params, dict):
        return realise(params)
    return {k: v if k.startswith(BLOCK) else realise_outside_blocks(v) for k, v in params.items()}


def apply_block(block: nn.Module, remat: str, x: jax.Array, *rest: Any) -> jax.Array:
    """block(x, *rest), with `checkpoint` around it where `remat` is "block".

    Args:
      block: a submodule of the module that is being called, its name begins with `BLOCK`.
      remat: "none" or "block"; parameters, their paths, outputs and random numbers are the same.
      x: [b, t, d]. rest: arrays, keys or None.
    """
    if block.is_initializing():
        return block(x, *rest)
    params = block.variables["params"]
    if remat == "none" and not any(map(is_lazy, jax.tree.leaves(params, is_leaf=is_lazy))):
        return adapted(params.get(ADAPTER), block(x, *rest))
    alone = block.clone(parent=None)

    def function(params, *args):
        params = realise(params)
        return adapted(params.get(ADAPTER), alone.apply({"params": params}, *args))

    return (function if remat == "none" else checkpoint(function))(params, x, *rest)


def adapted(adapter: Any, x: jax.Array) -> jax.Array:
    """A block's output with what its adapter adds: up(relu(down(norm(x)))) (arXiv 1902.00751).

    The norm has no parameters: the residual stream of pre-norm encoders has any scale.

    Args:
      adapter: {"down": {"kernel" [d, m], "bias" [m]}, "up": {"kernel" [m, d], "bias" [d]}}, see
        `fedasr.models.peft.adapter`; None for none.
      x: [b, t, d].
    """
    if adapter is None:
        return x
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    down, up = adapter["down"], adapter["up"]
    hidden = jax.nn.relu(product(normed, down["kernel"]) + down["bias"])
    return x + (product(hidden, up["kernel"]) + up["bias"]).astype(x.dtype)


def variables(params: Any) -> dict[str, Any]:
    """A flax module's variables of an encoder's parameters, of which blocks may be stacked."""
    if not stacks.is_stacked(params):
        return {"params": params}
    rest = {name: x for name, x in params.items() if name != stacks.STACK}
    return {"params": rest, _STACKED: {stacks.STACK: params[stacks.STACK]}}


def _with_adapters(blocks: Sequence[nn.Module], stacked: Any) -> bool:
    if stacked is not None:
        return ADAPTER in stacked
    return any(ADAPTER in block.variables.get("params", {}) for block in blocks)


def _stacked(blocks: Sequence[nn.Module]) -> Any:
    """Their parameters, stacked; None where names differ, as where some of them are adapted.

    None, too, where a device computes with each one's own: see `stacks.one_by_one`.
    """
    if not blocks or blocks[0].is_initializing():
        return None
    parent: Any = blocks[0].parent
    if found := parent.variables.get(_STACKED):
        return found[stacks.STACK]
    if stacks.one_by_one(devices.platform(), len(blocks)):
        return None
    each = [block.variables["params"] for block in blocks]
    if len(set(map(jax.tree.structure, each))) != 1:
        return None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(realise, each))


def apply_blocks(
    blocks: Sequence[nn.Module],
    config: Any,
    x: jax.Array,
    mask: jax.Array,
    keys: jax.Array | None,
    streams: tuple[int, int],
    batch_key: jax.Array | None = None,
    narrow: Any = None,
) -> jax.Array:
    """An encoder's blocks one after another, with layer drop.

    Args:
      blocks: submodules of the module that is being called; their names begin with `BLOCK`.
      config: has `remat`, `layer_drop` and `scan_blocks`.
      x: [b, t, d]. mask: bool [b, t].
      keys: [b], or None for evaluation.
      streams: of the keys' that of the first block, and of a block's keys that of its layer drop.
      batch_key: of the layer drop; None to draw from the first utterance's.
      narrow: the dtype that blocks compute with, of those that take all their matrices in it and,
        on accelerators, lengths in place of the mask, all their keys and whether they are kept.
    """
    first, dropping = streams
    stacked = _stacked(blocks) if config.scan_blocks else None
    kernels = narrow is not None and devices.platform()
    gated = kernels and not _with_adapters(blocks, stacked)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32) if gated else None

    def keys_of(index: Any) -> tuple[jax.Array | None, jax.Array | None]:
        """A block's, and what its layer drop is drawn from."""
        k = None
        if keys is not None:
            k = jax.vmap(lambda key: jax.random.fold_in(key, first + index))(keys)
        if keys is not None and batch_key is not None:
            return k, jax.random.fold_in(batch_key, index)[None]
        return k, k

    def gate_of(index: Any) -> tuple[Any, jax.Array | None]:
        """A block's own keys, each [b], and 1 where it is kept, else 0."""
        k, drawn = keys_of(index)
        keep = keeps_block(config.layer_drop, drawn, dropping)
        own = None if k is None else tuple(split_keys(k, dropping))
        return own, None if keep is None else keep.astype(jnp.float32)

    def add(x: jax.Array, apply: Callable[..., jax.Array], index: Any, gate: Any) -> jax.Array:
        if gated:
            return apply(x, lengths, *gate)
        k, drawn = keys_of(index)
        return drop_block(apply(x, mask, k), x, config.layer_drop, drawn, dropping)

    if stacked is not None:
        # Blocks are equal in shape: one is compiled, and all of them run through it.
        alone = blocks[0].clone(parent=None)

        def function(params: Any, *args: Any) -> Any:
            out: Any = alone.apply({"params": params}, *args)
            return adapted(params.get(ADAPTER), out)

        run: Callable[..., jax.Array] = function
        if config.remat != "none":
            run = checkpoint(function)
        elif devices.platform():
            # What a turn keeps is written and read once more. The rest is cheap to have again.
            names = (*attention_accelerated.KEPT, *norm_accelerated.KEPT, KEPT)
            kept = jax.checkpoint_policies.save_only_these_names(*names)
            run = jax.checkpoint(function, prevent_cse=False, policy=kept)
        if kernels:
            stacked = jax.tree.map(lambda x: x.astype(narrow) if x.ndim == 3 else x, stacked)
            stacked = _with_factors(stacked)

        def turn(x: jax.Array, block: tuple[Any, jax.Array, Any]) -> tuple[jax.Array, None]:
            params, index, gate = block
            return add(x, lambda *args: run(params, *args), index, gate), None

        index = jnp.arange(len(blocks))
        # Small numbers one by one would be as many launches of a turn.
        gates = jax.vmap(gate_of)(index) if gated else None
        few = bool(kernels) and len(blocks) <= stacks.FEW
        return jax.lax.scan(turn, x, (stacked, index, gates), unroll=few or _per_turn.get())[0]
    for i, block in enumerate(blocks):
        gate = gate_of(i) if gated else None
        x = add(x, lambda *args: apply_block(block, config.remat, *args), i, gate)  # noqa: B023
    return x


def drop_block(
    new: jax.Array, old: jax.Array, rate: float, keys: jax.Array | None, index: int
) -> jax.Array:
    """Layer drop: a block's output `new`, or with probability `rate` its input `old`.

    One draw for the whole batch, without rescaling. The batch's first utterance draws for all:
    padding utterances come last.

    Args:
      new, old: [b, t, d]. keys: the block's [b], or None for evaluation. index: of the stream of
        the block's keys to draw from; those below it are the block's own.
    """
    keep = keeps_block(rate, keys, index)
    return new if keep is None else jnp.where(keep, new, old)


def keeps_block(rate: float, keys: jax.Array | None, index: int) -> jax.Array | None:
    """Whether layer drop leaves a block in, see `drop_block`; None where it always does."""
    if not rate or keys is None:
        return None
    return jax.random.bernoulli(jax.random.fold_in(keys[0], index), 1.0 - rate)


def _with_factors(blocks: Any) -> Any:
    """Stacked blocks with scale and bias of their norms [n, d] as kernels take them."""

    def one(name: str, norm: Any) -> Any:
        if not name.endswith("_norm") or not norm_accelerated.fits(
            devices.platform(), norm["scale"].shape[-1]
        ):
            return norm
        return {SumNorm.FACTORS: norm_accelerated.factors(norm["scale"], norm["bias"])}

    return {name: one(name, x) for name, x in blocks.items()}
