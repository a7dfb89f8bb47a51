"""The program of one device, with parameters that stay compressed; what its memory is measured on.

A simulation trains many devices at once and keeps their parameters in float32: `as_client_update`
rounds them to what the devices would hold. Here is the round of a single device as it would run
there: codes laid bit to bit, decompressed block by block in the forward pass and again in the
backward pass, gradients of the trained variables only, and an upload in codes. Both compute the
same update. The measured figures are XLA's for the compiled program.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedasr.compression.formats import FloatFormat, decode, pack, unpack
from fedasr.compression.online import Select, compress_variable, flags, weight_matrices
from fedasr.federated.client import Loss
from fedasr.kernels.checkpoint import after
from fedasr.models.encoder_blocks import LazyParameter, is_lazy, realise_outside_blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(LazyParameter):
    """A compressed variable at rest: `scale * decode(codes, fmt) + bias`, codes laid bit to bit.

    Attributes:
      words: uint32, see `formats.pack`.
      scale, bias: float32 scalars.
      fmt, shape: of the codes, static.
    """

    words: chex.Array
    scale: chex.Array
    bias: chex.Array
    fmt: FloatFormat = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def array(self) -> jax.Array:
        """float32 of the variable's shape."""
        codes = unpack(self.words, self.fmt, self.shape)
        return self.scale * decode(codes, self.fmt) + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Trained(LazyParameter):
    """A compressed variable that is trained: a gradient flows to `offset`, which is zero."""

    stored: Packed
    offset: chex.Array

    def array(self) -> jax.Array:
        return self.stored.array() + self.offset


def pack_variable(value: chex.Array, fmt: FloatFormat, *, align: bool = True) -> Packed:
    """`compress_variable`, with the codes laid bit to bit."""
    stored = compress_variable(value, fmt, align=align)
    return Packed(pack(stored.codes, fmt), stored.scale, stored.bias, fmt, tuple(value.shape))


def pack_params(
    params: Any, fmt: FloatFormat, chosen: Sequence[bool] | None = None, *, align: bool = True
) -> Any:
    """Parameters as a device holds them: `Packed` in place of the chosen weight matrices.

    Args:
      params: any pytree of arrays.
      fmt: format of the codes.
      chosen: for each of the weight matrices in order, whether it is compressed (concrete values,
        such as those of `online.choose`); None for all.
      align: see `compress_variable`.
    """
    leaves, treedef = jax.tree.flatten(params)
    selected = flags(params, weight_matrices)
    rest = iter(chosen if chosen is not None else [True] * sum(selected))
    packed = [
        pack_variable(leaf, fmt, align=align) if select and next(rest) else leaf
        for leaf, select in zip(leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(treedef, packed)


def fedsgd_program(
    loss: Loss,
    trained: Sequence[bool] | None = None,
    upload: FloatFormat | None = None,
    *,
    select: Select = weight_matrices,
    grad_clip: float | None = None,
) -> Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[dict[str, Any], jax.Array]]:
    """FedSGD on one device: one gradient, of the trained variables only.

    Args:
      loss: see `fedasr.federated.client.Loss`.
      trained: for each variable in order, whether it is trained (concrete values); None for all.
        What is not costs no gradient: its share of the backward pass does not exist.
      upload: format of the gradients' way back; None for float32.
      select: which gradients are compressed.
      grad_clip: largest global L2 norm of the gradient.

    Returns:
      program(stored, batch, key) -> ({path: gradient, `Packed` where compressed}, loss) for the
      parameters of `pack_params` (or plain ones); to be jitted.
    """

    def program(stored, batch, key):
        paths, treedef = jax.tree_util.tree_flatten_with_path(stored, is_leaf=is_lazy)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        train = trained if trained is not None else [True] * len(leaves)
        free = {
            name: jnp.zeros(leaf.shape) if is_lazy(leaf) else leaf
            for name, leaf, yes in zip(names, leaves, train, strict=True)
            if yes
        }

        def of(free):
            used = [
                (_Trained(leaf, free[name]) if is_lazy(leaf) else free[name])
                if name in free
                else leaf
                for name, leaf in zip(names, leaves, strict=True)
            ]
            return loss(realise_outside_blocks(treedef.unflatten(used)), batch, key)

        (value, _), gradients = jax.value_and_grad(of, has_aux=True)(free)
        if grad_clip is not None:
            gradients, _ = optax.clip_by_global_norm(grad_clip).update(
                gradients, optax.EmptyState()
            )
        if upload is not None:
            previous = value
            for name, gradient in gradients.items():
                if select(name, gradient):
                    # One after the other: their intermediate arrays are larger than they are.
                    packed = pack_variable(after(previous, gradient), upload)
                    gradients[name], previous = packed, packed.scale
        return gradients, value

    return program


class Memory(NamedTuple):
    """Bytes of a compiled program: its largest sum at any time, and what it is given and returns.

    peak: XLA's peak, with the arguments, which stay. arguments, outputs: their buffers. parameters:
    the part of the arguments that the model is.
    """

    peak: int
    arguments: int
    outputs: int
    parameters: int


def measure(program: Callable[..., Any], params: Any, *rest: Any) -> Memory:
    """Compiles program(params, *rest) for the first local device and reads its memory from XLA.

    Args:
      program: to be jitted; nothing is run.
      params, rest: arrays or `jax.ShapeDtypeStruct`.
    """
    device = jax.local_devices()[0]
    with jax.default_device(device):
        lowered = jax.jit(program).lower(params, *rest)
    # The buffers are the same without the optimisations that come after them.
    quick: dict[str, Any] = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    options = quick if device.platform == "cpu" else None
    analysis: Any = lowered.compile(compiler_options=options).memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    parameters = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    total = arguments + outputs + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(int(total), int(arguments), int(outputs), int(parameters))
