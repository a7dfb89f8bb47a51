"""Planting a fault: the code of a function, or a value, is replaced while a context lasts.

A function is changed in place (its code object), so that whoever has imported it has the fault,
too. Whatever is not where the fault expects it is a `LookupError`: a fault is never planted into
nothing.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any


def _find(target: str) -> tuple[Any, str, Any]:
    """(owner, name, value) of "module:name" or "module:Class.name"."""
    module, _, path = target.partition(":")
    owner, (*parents, name) = importlib.import_module(module), path.split(".")
    for parent in parents:
        owner = vars(owner)[parent]
    try:
        return owner, name, vars(owner)[name]
    except KeyError:
        raise LookupError(f"{target} is not there any more") from None


def _function(target: str) -> FunctionType:
    """The plain function behind a method, a property or a wrapper."""
    found = _find(target)[2]
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(getattr(found, "__func__", found))
    if not inspect.isfunction(found):
        raise LookupError(f"{target} is no function any more")
    return found


@dataclasses.dataclass(frozen=True)
class Edit:
    """In the source of a function, each of `count` places that read `old` reads `new`."""

    target: str
    old: str
    new: str
    count: int = 1

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        function = _function(self.target)
        source = textwrap.dedent(inspect.getsource(function))
        if (found := source.count(self.old)) != self.count:
            raise LookupError(
                f"{self.target} has {self.old!r} {found} times, not {self.count}: the fault must "
                "follow the code that it is about"
            )
        tree = ast.parse(source.replace(self.old, self.new))
        tree.body[0].decorator_list = []
        made = dict(function.__globals__)
        exec(compile(tree, inspect.getsourcefile(function), "exec"), made)
        changed = made[function.__name__]
        before = function.__code__, function.__defaults__, function.__kwdefaults__
        if changed.__code__.co_freevars != before[0].co_freevars:
            raise LookupError(f"{self.target}: a fault cannot change what it closes over")
        try:
            function.__code__ = changed.__code__
            function.__defaults__, function.__kwdefaults__ = (
                changed.__defaults__,
                changed.__kwdefaults__,
            )
            yield
        finally:
            function.__code__, function.__defaults__, function.__kwdefaults__ = before


@dataclasses.dataclass(frozen=True)
class Value:
    """A module's or a class's attribute has another value."""

    target: str
    new: Any

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        owner, name, before = _find(self.target)
        if before == self.new:
            raise LookupError(f"{self.target} is {before!r} already: that is no fault")
        try:
            setattr(owner, name, self.new)
            yield
        finally:
            setattr(owner, name, before)


# Of which only what other libraries optimise is remembered, for seconds.
_KEPT = ("fedasr.privacy.correlated",)


def forget() -> None:
    """Empties whatever remembers what code has computed, or was compiled to, before."""
    import jax

    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        ours = name.split(".")[0] in ("fedasr", "experiments") and name not in _KEPT
        if ours and module is not None:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def planted(*changes: Edit | Value) -> Iterator[None]:
    """With all the changes, and nothing remembered from before, nor afterwards."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change.planted())
        forget()
        try:
            yield
        finally:
            forget()
