"""Bytes that a client receives and sends in a round."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.compression.formats import FloatFormat, packed_bytes
from fedasr.compression.online import (
    Select,
    check_share,
    compress_variable,
    flags,
    weight_matrices,
)
from fedasr.privacy.secure_aggregation import SecureAggregation

_FLOAT32_BYTES = 4


class Transport(NamedTuple):
    """Expected bytes per client and round: sent to it, sent back by it; `full`: all in float32."""

    down: float
    up: float
    full: int


def transport_bytes(
    params: Any,
    download: FloatFormat | None = None,
    upload: FloatFormat | None = None,
    share: float = 0.9,
    select: Select = weight_matrices,
    *,
    uploaded: Sequence[float] | None = None,
    secure: SecureAggregation | None = None,
) -> Transport:
    """Expected bytes that a client receives and sends in a round.

    A compressed variable costs its packed codes and 8 bytes of scale and bias. Random subsets cost
    nothing: they follow from a key. What is not trained is still received.

    Args:
      params: any pytree of arrays or of their shapes (`jax.ShapeDtypeStruct`).
      download, upload: formats of parameters and deltas, None for float32.
      share, select: see `online.compress_params`.
      uploaded: probability of each variable's upload, in order (`partial.Subset.uploaded`);
        None for 1.
      secure: if given, all that is sent back goes as its integers.

    Raises:
      UserError: if the share is out of [0, 1].
    """
    check_share(share)
    leaves = jax.tree.leaves(params)
    selected = flags(params, select)

    def total(fmt, probabilities):
        bytes = 0.0
        for leaf, chosen, probability in zip(leaves, selected, probabilities, strict=True):
            size = math.prod(leaf.shape)
            whole = size * jnp.dtype(leaf.dtype).itemsize
            part = whole
            if fmt is not None and chosen:
                part = packed_bytes(size, fmt) + 2 * _FLOAT32_BYTES
            bytes += probability * (share * part + (1 - share) * whole)
        return bytes

    always = [1.0] * len(leaves)
    return Transport(
        total(download, always),
        total(upload, always if uploaded is None else uploaded) if secure is None else secure.bytes,
        round(total(None, always)),
    )


def entropy_bytes(params: Any, fmt: FloatFormat, select: Select = weight_matrices) -> float:
    """Bytes of compressed variables under an ideal entropy coder, the rest as they are.

    An order-0 coder with each variable's own histogram of codes, as an arithmetic or ANS coder
    nearly reaches; the histograms themselves are not counted. Codes are those of
    `compress_variable(..., align=True)`.

    Args:
      params: any pytree of arrays (concrete values: parameters, or a client's delta).
      fmt, select: see `online.compress_params`.
    """
    total = 0.0
    for leaf, chosen in zip(jax.tree.leaves(params), flags(params, select), strict=True):
        if not chosen:
            total += leaf.size * leaf.dtype.itemsize
            continue
        codes = np.asarray(compress_variable(jnp.asarray(leaf), fmt, align=True).codes)
        counts = np.unique(codes, return_counts=True)[1]
        bits = float(-np.sum(counts * np.log2(counts / codes.size)))
        total += bits / 8 + 2 * _FLOAT32_BYTES
    return float(total)
