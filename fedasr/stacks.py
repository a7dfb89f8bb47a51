"""Parameters of like blocks, one array for all: what a device's program computes with.

A program that handles every array of every block by itself grows with their number, and so does the
time to compile it and what an accelerator is given to launch. Outside of programs, in states and
checkpoints, each block has arrays of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = "block_"  # how the names of an encoder's blocks begin
STACK = "block_*"  # the name of all of them together
FEW = 6  # blocks that accelerators run without a loop, which would copy what goes in and comes out


def can_stack(params: Any) -> bool:
    """Whether a tree has blocks under `BLOCK` and a number, from 0, alike in names and shapes."""
    if not isinstance(params, dict) or STACK in params:
        return False
    found = [params[name] for name in _names(params)]
    if not found or len(found) != sum(name.startswith(BLOCK) for name in params):
        return False

    def shapes(block: Any) -> Any:
        return jax.tree.structure(block), [(x.shape, x.dtype) for x in jax.tree.leaves(block)]

    first = shapes(found[0])
    return bool(first[1]) and all(shapes(block) == first for block in found)


def _names(params: dict[str, Any]) -> list[str]:
    names: list[str] = []
    while (name := f"{BLOCK}{len(names)}") in params:
        names.append(name)
    return names


def is_stacked(tree: Any) -> bool:
    """Whether a tree is of `stack`."""
    return isinstance(tree, dict) and STACK in tree


def stack(params: Any) -> Any:
    """A tree for which `can_stack`, its blocks' arrays [...] as one [blocks, ...] under `STACK`.

    Leaves may also be of NumPy, or numbers.
    """
    names = _names(params)

    def joined(*leaves: Any) -> Any:
        traced = any(isinstance(x, jax.Array) for x in leaves)
        return jnp.stack(leaves) if traced else np.stack(leaves)

    blocks = jax.tree.map(joined, *(params[name] for name in names))
    return {name: x for name, x in params.items() if name not in names} | {STACK: blocks}


def unstack(tree: Any) -> Any:
    """The tree before `stack`; of arrays or of their shapes."""
    count = len_of(tree)

    def part(x: Any, i: int) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return x[i]

    blocks = {
        f"{BLOCK}{i}": jax.tree.map(lambda x: part(x, i), tree[STACK])  # noqa: B023
        for i in range(count)
    }
    return {name: x for name, x in tree.items() if name != STACK} | blocks


def stack_within(tree: Any) -> Any:
    """The tree with `stack` of every tree within that can be: such as a state with moments."""
    return jax.tree.map(lambda x: stack(x) if can_stack(x) else x, tree, is_leaf=can_stack)


def unstack_within(tree: Any) -> Any:
    """The tree before `stack_within`."""
    return jax.tree.map(lambda x: unstack(x) if is_stacked(x) else x, tree, is_leaf=is_stacked)


def axes(tree: Any) -> list[int | None]:
    """Of each leaf of a tree, the axis of the blocks: 0 where it is stacked, else None."""

    def one(path: Any) -> int | None:
        return 0 if any(getattr(key, "key", None) == STACK for key in path) else None

    return [one(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def one_of(tree: Any) -> Any:
    """Shapes of a tree with its stacked arrays as each block has them."""

    def one(x: Any, axis: int | None) -> Any:
        return jax.ShapeDtypeStruct(x.shape if axis is None else x.shape[1:], x.dtype)

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(one, leaves, axes(tree)))


def one_by_one(kind: str, blocks: int) -> bool:
    """Whether a program computes with so many blocks' own arrays, though it could with stacks.

    A TPU's compiler makes the norm of an array's gradient with the product that makes the gradient,
    but not where that becomes a part of a stack, which is then read again. A GPU's does not, and
    has fewer operations to launch with stacks.

    Args:
      kind: see `fedasr.kernels.devices.platform`.
    """
    return kind == "tpu" and blocks <= FEW


def len_of(tree: Any) -> int:
    """How many blocks are stacked."""
    return int(jax.tree.leaves(tree[STACK])[0].shape[0])
