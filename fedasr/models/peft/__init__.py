"""Adapting a recogniser: which of its variables are trained, and which are added for that.

A kind of adaptation is a file in this package and a line in `KINDS`. It transforms a `Recogniser`:
its parameters are the base's by their names, and what is added beside them. What is trained is told
by paths, so that partial training (`fedasr.federated.subset`) has clipping, noise, optimisers and
uploads know of nothing else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.models.peft import adapter, bitfit, ffa_lora, full, head, lora
from fedasr.models.peft.kind import Kind, PeftConfig, insert, leaves_by_path
from fedasr.models.recogniser import Recogniser
from fedasr.streams import Stream, fold

KINDS: dict[str, Kind] = {
    "full": full.KIND,
    "head": head.KIND,
    "bitfit": bitfit.KIND,
    "lora": lora.KIND,
    "ffa_lora": ffa_lora.KIND,
    "adapter": adapter.KIND,
}
FROZEN = ("float32", "bfloat16")

__all__ = [
    "FROZEN",
    "KINDS",
    "Kind",
    "PeftConfig",
    "adapt",
    "completed",
    "kind_of",
    "merged",
    "trained_patterns",
]


def kind_of(config: PeftConfig) -> Kind:
    """The kind of adaptation by its name.

    Raises:
      UserError: for an unknown kind, or numbers that make no sense.
    """
    if config.kind not in KINDS:
        raise UserError(f"peft.kind={config.kind!r}: choose one of {', '.join(KINDS)}")
    if config.rank < 1 or config.bottleneck < 1:
        raise UserError("peft.rank and peft.bottleneck must be at least 1")
    if config.frozen_dtype not in FROZEN:
        raise UserError(f"peft.frozen_dtype={config.frozen_dtype!r}: choose {' or '.join(FROZEN)}")
    if config.frozen_dtype != "float32" and config.kind == "full":
        raise UserError("peft.frozen_dtype: with peft.kind='full' nothing is frozen")
    return KINDS[config.kind]


def trained_patterns(config: PeftConfig) -> tuple[str, ...] | None:
    """Regular expressions, searched for in paths, of what is trained; None for everything."""
    patterns = kind_of(config).trained(config)
    return None if patterns is None else (*patterns, *config.also)


def adapt(recogniser: Recogniser, config: PeftConfig) -> Recogniser:
    """A recogniser whose parameters hold, beside its own, what an adaptation adds.

    Untrained it scores as the recogniser does.

    Args:
      recogniser: any whose parameters are nested dicts. Its key of `init` draws what is added, too.
      config: of the adaptation.

    Returns:
      A recogniser; with the kind "full", the same one.

    Raises:
      UserError: see `kind_of`. When it is initialised or its shapes are asked for: a pattern that
        matches nothing.
    """
    kind = kind_of(config)
    if kind is full.KIND:
        return recogniser

    def inner(function: Any) -> Any:
        if function is None:
            return None
        return lambda params, *rest: function(kind.fold(params, config), *rest)

    return recogniser._replace(
        init=jax.jit(lambda key: completed(recogniser.init(key), config, key)),
        loss=inner(recogniser.loss),
        evaluate=inner(recogniser.evaluate),
        scores=inner(recogniser.scores),
    )


def completed(params: Any, config: PeftConfig, key: jax.Array) -> Any:
    """A base's parameters with what an adaptation adds, and frozen matrices in their dtype.

    Args:
      params: nested dicts of arrays or their shapes; what is there of the additions stays.
      config: of the adaptation.
      key: that the base was, or would have been, initialised with.

    Raises:
      UserError: a pattern that matches nothing.
    """
    kind = kind_of(config)
    if kind is full.KIND:
        return params
    variables = kind.added(params, config)
    trained = trained_patterns(config) or ()
    key = fold(key, Stream.ADDED)
    there = leaves_by_path(params)
    if config.frozen_dtype != "float32":
        params = _frozen(params, trained, jnp.dtype(config.frozen_dtype))
    made = {
        # By name: what one variable draws does not depend on which others there are.
        path: init(jax.random.fold_in(key, zlib.crc32(path.encode()) >> 1))
        for path, init in variables.items()
        if path not in there
    }
    return insert(params, made)


def _frozen(params: Any, trained: tuple[str, ...], dtype: Any) -> Any:
    """The parameters with the matrices that are not trained in another dtype."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        small = leaf.ndim < 2 or any(re.search(pattern, name) for pattern in trained)
        return leaf if small else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def merged(params: Any, config: PeftConfig) -> Any:
    """The parameters of the base alone, in float32, that score as the adapted ones do.

    Args:
      params: of `adapt`'s recogniser.
      config: of the adaptation.

    Raises:
      UserError: the kind adds layers of their own, which no matrix of the base can take in.
    """
    base = kind_of(config).merged(params, config)
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, base)


def describe(config: PeftConfig) -> Mapping[str, Any]:
    """What sets the adaptation apart, for people: its kind and the numbers that it reads."""
    return {"kind": config.kind} | {name: getattr(config, name) for name in kind_of(config).reads}
