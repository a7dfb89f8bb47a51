"""Bottleneck adapters (arXiv 1902.00751) after each block: x + up(relu(down(norm(x)))).

What they compute is in `fedasr.models.encoder_blocks.adapted`, which `apply_block` there calls
where a block's parameters hold an adapter: they need an encoder of such blocks. The layer that goes
up begins as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.models.encoder_blocks import ADAPTER, BLOCK
from fedasr.models.peft.kind import Init, Kind, PeftConfig, leaves_by_path, matching

BLOCKS = rf"(^|/){BLOCK}\d+$"


def added(params: Any, config: PeftConfig) -> Mapping[str, Init]:
    """{path: init} of the adapters; see `Kind`.

    Raises:
      UserError: no such block.
    """
    widths = _widths(params)
    if not widths:
        raise UserError(
            "peft.kind='adapter' needs an encoder of blocks, which this model is not: choose "
            "'lora' or 'ffa_lora'"
        )
    found: dict[str, Init] = {}
    for block in matching(list(widths), config.patterns or (BLOCKS,), "block"):
        dim, units = widths[block], config.bottleneck
        shapes = {"down/kernel": (dim, units), "down/bias": (units,)}
        shapes |= {"up/kernel": (units, dim), "up/bias": (dim,)}
        for name, shape in shapes.items():
            drawn = _uniform(shape) if name == "down/kernel" else _zeros(shape)
            found[f"{block}/{ADAPTER}/{name}"] = drawn
    return found


def _widths(params: Any) -> dict[str, int]:
    """Features of each block's output, which are those of its norms, by the block's path.

    Not of decoders: they write a text token by token, by other code than `apply_block`.
    """
    found: dict[str, int] = {}
    for path, leaf in leaves_by_path(params).items():
        inside = re.match(rf"(.*?(?:^|/){BLOCK}\d+)/.*scale$", path)
        if inside and len(leaf.shape) == 1 and not path.startswith("decoder/"):
            found[inside[1]] = max(found.get(inside[1], 0), leaf.shape[0])
    return found


def _uniform(shape: tuple[int, ...]) -> Init:
    most = shape[0] ** -0.5
    return lambda key: jax.random.uniform(key, shape, jnp.float32, -most, most)


def _zeros(shape: tuple[int, ...]) -> Init:
    return lambda key: jnp.zeros(shape)


def merged(params: Any, config: PeftConfig) -> Any:
    """Raises UserError."""
    raise UserError(
        "adapters are layers of their own, which no matrix of the base can take in as it can "
        "LoRA's factors: keep them"
    )


KIND = Kind(
    trained=lambda config: (f"(^|/){ADAPTER}/",),
    added=added,
    merged=merged,
    reads=("bottleneck", "patterns"),
)
