"""What a kind of adaptation is, and what kinds share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from fedasr.errors import UserError

Init = Callable[[jax.Array], jax.Array]  # from a key to a variable


@dataclass(frozen=True)
class PeftConfig:
    """How a recogniser is adapted.

    Attributes:
      kind: of `fedasr.models.peft.KINDS`.
      rank: of the factors of "lora" and "ffa_lora".
      alpha: their product counts alpha / rank times.
      patterns: regular expressions, searched for in paths such as "block_0/attention/qkv/kernel":
        of the matrices that get factors, the blocks that get adapters, or what is the head; () for
        the kind's own.
      bottleneck: units of an adapter.
      also: patterns of the base's variables that are trained beside, such as a new head.
      frozen_dtype: of the matrices that are not trained, "float32" or "bfloat16".
    """

    kind: str = "full"
    rank: int = 8
    alpha: float = 16.0
    patterns: tuple[str, ...] = ()
    bottleneck: int = 32
    also: tuple[str, ...] = ()
    frozen_dtype: str = "float32"


@dataclass(frozen=True)
class Kind:
    """A kind of adaptation: pure functions of parameters, or of their shapes.

    Attributes:
      trained: patterns of what is trained; None for everything.
      added: from a base's parameters to {path: init} of what is added.
      fold: from all parameters to what the base's code takes.
      merged: from all parameters to a base's that score alike; it may raise UserError.
      reads: fields of `PeftConfig` that it reads, beside those of all kinds.
    """

    trained: Callable[[PeftConfig], tuple[str, ...] | None]
    added: Callable[[Any, PeftConfig], Mapping[str, Init]] = lambda params, config: {}
    fold: Callable[[Any, PeftConfig], Any] = lambda params, config: params
    merged: Callable[[Any, PeftConfig], Any] = lambda params, config: params
    reads: tuple[str, ...] = ()


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Leaves by paths such as "block_0/attention/qkv/kernel", in order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def insert(params: Any, new: Mapping[str, Any]) -> Any:
    """Nested dicts with leaves added by path; those that are given are not changed."""
    for path, leaf in new.items():
        params = _inserted(params, path.split("/"), leaf)
    return params


def _inserted(tree: Any, path: Sequence[str], leaf: Any) -> Any:
    first, *rest = path
    inner = _inserted(tree.get(first, {}), rest, leaf) if rest else leaf
    return {**tree, first: inner}


def matching(names: Sequence[str], patterns: Sequence[str], what: str) -> list[str]:
    """Those of some names that one of the patterns matches.

    Args:
      names: to search. patterns: regular expressions.
      what: they name, for messages.

    Raises:
      UserError: a pattern that is none, or matches no name.
    """
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"peft.patterns: {pattern!r}: {error}") from error
        if not found:
            known = ", ".join(list(names)[:5]) or "none"
            raise UserError(f"peft.patterns: {pattern!r} matches no {what} of the model ({known})")
    return [name for name in names if any(re.search(p, name) for p in patterns)]
