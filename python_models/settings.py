"""TOML tables as dataclasses: unknown keys and values of another type are errors that say what was meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the file and the key."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """What the file holds; ConfigError where it is none."""
    try:
        return parse_toml(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """What the text says; ConfigError naming its origin where it is no TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not a TOML file: {error}") from error


def nearest(name: Any, valid: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or the valid names, to end a message with."""
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, 1, 0.5) or [
        other for other in valid if other.lower() == str(name).lower()
    ]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if valid else "; nothing is expected here"


def build(kind: type[T], found: Mapping[str, Any], prefix: str, origin: str) -> T:
    """A dataclass from a table; each value has the type its field says.

    ConfigError names the key, with `prefix` before it, and the file, `origin`.
    """
    hints = get_type_hints(kind)
    where = f"{prefix}." if prefix else ""
    values = {}
    for name, value in found.items():
        if name not in hints:
            raise ConfigError(f"{origin}: unknown key {where}{name}{nearest(name, hints)}")
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: {where}{name} must be a table; got {value!r}")
            values[name] = build(hints[name], value, where + name, origin)
        else:
            try:
                values[name] = convert(value, hints[name])
            except TypeError as error:
                raise ConfigError(f"{origin}: {where}{name} must be {error}; got {value!r}") from None
    return kind(**values)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type says; TypeError, saying what is expected, where it is another."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise TypeError("one of " + ", ".join(repr(arg) for arg in args))
        return value
    if origin in (typing.Union, types.UnionType):
        problems = []
        for arg in args:
            try:
                return convert(value, arg)
            except TypeError as error:
                problems.append(str(error))
        raise TypeError(" or ".join(problems))
    if hint is type(None):
        if value is not None:
            raise TypeError("nothing")
        return None
    if origin is tuple:
        fixed = args[-1] is not Ellipsis
        names = f"a list of {len(args)}" if fixed else "a list"
        if not isinstance(value, Sequence) or isinstance(value, str) or (fixed and len(value) != len(args)):
            raise TypeError(names)
        try:
            return tuple(convert(entry, args[0]) for entry in value)
        except TypeError as error:
            raise TypeError(f"{names}, each entry {error}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    base = origin or hint
    if not isinstance(value, base) or (base in (int, float) and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TypeError(words.get(base, {dict: "a table", list: "a list"}.get(base, base.__name__)))
    return value
