"""Fields of a configuration: what each may hold, checked where it is declared.

A configuration is a tree whose leaves are declared by a `Field` each: default, kind, range or
choices, unit, meaning. Frozen dataclasses hold it: `setting` declares a leaf of one, `section` a
branch, and `declared` gives the tree of declarations. `check` walks a configuration against such a
tree before anything else looks at it. That comes first because what follows is lossy: JSON has no
NaN, a comparison with NaN is false, `None` stands for "not given".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from fedasr.errors import UserError

INT32 = 2**31 - 1
_SHOWN = 60  # characters of a value in a message

Choices = Collection[str] | Callable[[], Collection[str]]


def bucket(place: str) -> str | None:
    """What is to be done instead of naming a bucket ("gs://..."), or None for a path."""
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+::?)+/", place) is None:
        return None
    return (
        "is not on a file system: only --workdir, init_from and a model or checkpoint that is read "
        "may be URLs (gs://BUCKET/FOLDER); mount the bucket (such as by gcsfuse or s3fs), or copy "
        "it (gcloud storage rsync, aws s3 sync)"
    )


def check_local(name: str, place: object) -> None:
    """Raises UserError for a URL in place of a path: a folder would be made of its name."""
    if wrong := bucket(str(place)):
        raise UserError(f"{name}={place} {wrong}")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: what it is where nothing else is said.
      check: from a value to what is wrong with it ("must be ..."), or None; of a value of any kind.
      unit: what is counted or measured; "" for what has no unit.
      kind: the type in a few words, for people.
      span: the range, likewise: "1 to 10"; "" where there is none.
      doc: what it means; "" where the name says it.
    """

    default: Any
    check: Callable[[Any], str | None]
    unit: str = ""
    kind: str = ""
    span: str = ""
    doc: str = ""


Spec = Mapping[str, "Field | Spec"]


def whole(default: int, least: int = 0, most: int = INT32, unit: str = "") -> Field:
    """A whole number within [least, most]."""
    span = f"{least} to {most}" if most < INT32 else f"at least {least}"
    return Field(default, lambda value: _whole(value, least, most), unit, "whole number", span)


def real(
    default: float,
    least: float | None = None,
    most: float = 1e6,
    *,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> Field:
    """A finite number within [least, most] or (above, below); 0 is the least if nothing is said."""
    if least is None and above is None:
        least = 0.0

    def check(value: Any) -> str | None:
        return _real(value, least, most, above, below)

    low = f"above {above:g}" if above is not None else f"at least {least:g}"
    high = f"below {below:g}" if below is not None else f"at most {most:g}"
    return Field(default, check, unit, "number", f"{low}, {high}")


def flag(default: bool) -> Field:
    """True or False."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, bool) else "must be True or False"

    return Field(default, check, "", "True or False")


def text(default: str, pattern: str = r"[^\x00-\x1f]*", what: str = "text on one line") -> Field:
    """A string that a regular expression matches whole."""

    def check(value: Any) -> str | None:
        good = isinstance(value, str) and re.fullmatch(pattern, value)
        return None if good else f"must be {what}"

    return Field(default, check, "", "text")


def choice(default: str, choices: Choices) -> Field:
    """One of several names; a callable is asked for them when a value is checked."""

    def check(value: Any) -> str | None:
        names = choices() if callable(choices) else choices
        if isinstance(value, str) and value in names:
            return None
        return f"is unknown: choose one of {', '.join(map(repr, sorted(names)))}"

    return Field(default, check, "", "one of several names")


def several(
    default: Sequence[Any], check_item: Callable[[Any], str | None], least: int = 0, what: str = ""
) -> Field:
    """A sequence, each item of which is checked."""

    def check(value: Any) -> str | None:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return f"must be a sequence of {what or 'values'}"
        if len(value) < least:
            return f"must hold at least {least}"
        wrong = [(item, found) for item in value if (found := check_item(item))]
        return f"{wrong[0][0]!r} {wrong[0][1]}" if wrong else None

    return Field(default, check, "", f"sequence of {what or 'values'}")


def checked(default: Any, check: Callable[[Any], str | None], kind: str, unit: str = "") -> Field:
    """Whatever `check` has nothing against."""
    return Field(default, check, unit, kind)


def setting(field: Field, doc: str = "") -> Any:
    """Declares a leaf of a frozen dataclass; a callable default is asked when one is made.

    Args:
      field: its default and what it may hold.
      doc: what it means.
    """
    field = dataclasses.replace(field, doc=doc)
    if callable(field.default):
        return dataclasses.field(default_factory=field.default, metadata={"field": field})
    return dataclasses.field(default=field.default, metadata={"field": field})


def section(kind: type) -> Any:
    """Declares a branch of a frozen dataclass: another one."""
    return dataclasses.field(default_factory=kind, metadata={"section": kind})


def declared(kind: type) -> Spec:
    """The tree of declarations of a dataclass; fields that are no settings are not in it."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if "section" in field.metadata:
            tree[field.name] = declared(field.metadata["section"])
        elif "field" in field.metadata:
            leaf = field.metadata["field"]
            default = leaf.default() if callable(leaf.default) else leaf.default
            tree[field.name] = dataclasses.replace(leaf, default=default)
    return tree


Kind = TypeVar("Kind")


def parse(kind: type[Kind], tree: Mapping[str, Any]) -> Kind:
    """A dataclass of settings from a tree that `check` has passed; sequences become tuples.

    Args:
      kind: of `setting`s and `section`s.
      tree: by name; what is not declared is left out, what is missing has its default.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in tree or not field.metadata:
            continue
        value, inner = tree[field.name], field.metadata.get("section")
        found[field.name] = _frozen(value) if inner is None else parse(inner, value)
    return kind(**found)


def unparse(value: Any) -> dict[str, Any]:
    """The tree of a dataclass of settings, as JSON holds it: what `parse` reads."""
    return {
        field.name: unparse(getattr(value, field.name))
        if "section" in field.metadata
        else _thawed(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.metadata
    }


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _frozen(item) for name, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thawed(item) for name, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, list | tuple) else value


def is_number(value: Any) -> bool:
    """Whether it is a finite number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: float, most: float) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return "must be a whole number"
    return _range(value, least, most)


def _real(
    value: Any, least: float | None, most: float, above: float | None, below: float | None
) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "must be a number"
    if not math.isfinite(value):
        return "must be a finite number"
    if above is not None and value <= above:
        return f"must be above {above:g}"
    if below is not None and value >= below:
        return f"must be below {below:g}"
    return _range(value, -math.inf if least is None else least, most)


def _range(value: float, least: float, most: float) -> str | None:
    if value < least:
        return f"must be at least {least:g}" if least else "must be at least 0"
    return f"must be at most {most:g}" if value > most else None


def defaults(spec: Spec) -> dict[str, Any]:
    """The tree of default values."""
    return {
        name: field.default if isinstance(field, Field) else defaults(field)
        for name, field in spec.items()
    }


def flatten(spec: Spec, prefix: str = "") -> dict[str, Field]:
    """Fields by "section.name"."""
    flat: dict[str, Field] = {}
    for name, field in spec.items():
        path = f"{prefix}{name}"
        flat |= {path: field} if isinstance(field, Field) else flatten(field, f"{path}.")
    return flat


def check(config: Any, spec: Spec, prefix: str = "") -> None:
    """Raises UserError for the first field that is wrong, missing or undeclared.

    Args:
      config: any mapping of mappings; values as they were given, before they became JSON.
      spec: what is declared.
      prefix: of the names in messages.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'} must be a section of fields")
    if unknown := sorted(map(str, config.keys() - spec.keys())):
        raise UserError(f"no such field in the configuration: {prefix}{unknown[0]}")
    for name, field in spec.items():
        if name not in config:
            raise UserError(f"the configuration lacks {prefix}{name}")
        if not isinstance(field, Field):
            check(config[name], field, f"{prefix}{name}.")
        elif wrong := field.check(config[name]):
            raise UserError(f"{prefix}{name}={_shown(config[name])} {wrong}")


def _shown(value: Any) -> str:
    shown = value if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)
    shown = " ".join(str(shown).split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def check_dataclass(
    value: Any, what: str, ranges: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Checks the fields of a dataclass of numbers, names and flags against their annotations.

    Args:
      value: an instance whose annotations are int, float, bool or str.
      what: for messages, such as "the model's".
      ranges: (least, most) of numbers; without one, 0 to 1e6.

    Raises:
      UserError: for a value of another type, one that is not finite or one out of range.
    """
    for field in dataclasses.fields(value):
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        found = getattr(value, field.name)
        least, most = (ranges or {}).get(field.name, (0, 1e6))
        if wrong := _annotated(kind, found, least, most):
            raise UserError(f"{what} {field.name}={_shown(found)} {wrong}")


def _annotated(kind: str, value: Any, least: float, most: float) -> str | None:
    if kind == "int":
        return _whole(value, least, most)
    if kind == "float":
        return _real(value, least, most, None, None)
    if kind == "bool":
        return None if isinstance(value, bool) else "must be True or False"
    return None if isinstance(value, str) and value.isprintable() else "must be text on one line"
