"""LoRA (arXiv 2106.09685): matrices W get factors, W + alpha / rank A B; A and B are trained.

A is drawn as PyTorch draws a dense layer, U(-1/sqrt(f), 1/sqrt(f)) for f inputs, B begins as
zeros. Both lie beside their matrix, "kernel_lora_a" [f, rank] and "kernel_lora_b" [rank, g]. The
sum is not made while training: see `fedasr.kernels.low_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.kernels.low_rank import LowRank
from fedasr.models.peft.kind import Init, Kind, PeftConfig, leaves_by_path, matching

A, B = "_lora_a", "_lora_b"
ATTENTION = r"att(ention|n)/"  # the projections of attention, whatever they are called


def added(params: Any, config: PeftConfig) -> Mapping[str, Init]:
    """{path: init} of the factors; see `Kind`.

    Raises:
      UserError: a pattern that matches no matrix.
    """
    matrices = {
        path: leaf.shape
        for path, leaf in leaves_by_path(params).items()
        if len(leaf.shape) == 2 and not path.endswith((A, B))
    }
    names = matching(list(matrices), config.patterns or (ATTENTION,), "matrix")
    found: dict[str, Init] = {}
    for name in names:
        inputs, outputs = matrices[name]
        found[name + A] = _uniform((inputs, config.rank))
        found[name + B] = _zeros((config.rank, outputs))
    return found


def _uniform(shape: tuple[int, int]) -> Init:
    most = shape[0] ** -0.5
    return lambda key: jax.random.uniform(key, shape, jnp.float32, -most, most)


def _zeros(shape: tuple[int, int]) -> Init:
    return lambda key: jnp.zeros(shape)


def fold(params: Any, config: PeftConfig) -> Any:
    """The base's parameters with a `LowRank` in place of each matrix that has factors."""
    return _folded(params, config, lambda x: x)


def merged(params: Any, config: PeftConfig) -> Any:
    """The base's parameters with the sums."""
    return _folded(params, config, lambda x: x.array())


def _folded(tree: Any, config: PeftConfig, of: Callable[[LowRank], Any]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    factors = {name for name in tree if name.endswith((A, B))}
    kept = {}
    for name, value in tree.items():
        if name in factors:
            continue
        if name + A in factors:
            scale = config.alpha / config.rank
            kept[name] = of(LowRank(value, tree[name + A], tree[name + B], scale))
        else:
            kept[name] = _folded(value, config, of)
    return kept


KIND = Kind(
    trained=lambda config: (f"({A}|{B})$",),
    added=added,
    fold=fold,
    merged=merged,
    reads=("rank", "alpha", "patterns"),
)
