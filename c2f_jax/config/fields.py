"""Options as dataclass fields: known names, types, ranges, and values read from text.

An option is stated once, as a field of the dataclass of what it configures. The metadata of the
field give its range: "min" and "max" (inclusive), "above" and "below" (exclusive), "choices".
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from c2f_jax.errors import UserError

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def options_of(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields of a dataclass by name."""
    return {option.name: option for option in dataclasses.fields(cls)}


def default_values(options: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    """Return the default of each option; None if there is no default."""
    values = {}
    for name, option in options.items():
        values[name] = option.default
        if option.default is dataclasses.MISSING:
            values[name] = None
    return values


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from checked plain values, whose lists become tuples."""
    built = {}
    for name, value in values.items():
        if isinstance(value, list):  # as JSON has it
            value = tuple(value)
        built[name] = value
    return cls(**built)


def check_values(
    where: str, options: Mapping[str, dataclasses.Field], values: Mapping[str, Any]
) -> None:
    """Check the names, types and ranges of a section's values.

    Args:
      where: name of the section, such as "data"; "" for the top level.
      options: options of the section.
      values: their values; options that are left out have their defaults.

    Raises:
      UserError: for the first option that does not exist, is missing, has another type or is out of
        range.
    """
    names = [dotted(where, name) for name in options]
    for name in values:
        check_known(dotted(where, name), names)

    for name, option in options.items():
        key = dotted(where, name)
        required = option.default is dataclasses.MISSING
        if required and values.get(name) is None:
            raise UserError(f"{key} is not set: give it a value")
        if name not in values:
            continue

        # A range holds for each entry of a list.
        value = values[name]
        if not of_type(value, option.type):
            raise UserError(f"{key}={value!r}: must be {describe(option.type)}")
        entries = value if isinstance(value, list | tuple) else [value]
        for entry in entries:
            _check_range(key, value, entry, option.metadata)


def check_known(key: str, known: Sequence[str], prefix: str = "") -> None:
    """Check that an option exists.

    Args:
      key: dotted name.
      known: dotted names that exist.
      prefix: what the user writes before a name, such as "--config.".

    Raises:
      UserError: if it does not exist, with the nearest known name.
    """
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    else:
        hint = f"the options are {', '.join(known)}"
    raise UserError(f"there is no option {prefix}{key}: {hint}")


def _check_range(key: str, value: Any, entry: Any, metadata: Mapping[str, Any]) -> None:
    """Raise UserError if an entry of an option's value is out of its range."""
    if entry is None:
        return

    choices = metadata.get("choices")
    if choices is not None and entry not in choices:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(map(str, choices))}")
    # Only numbers have bounds, and nan and infinity are outside of all of them.
    if not isinstance(entry, int | float) or isinstance(entry, bool):
        return
    inside = (
        math.isfinite(entry)
        and entry >= metadata.get("min", -math.inf)
        and entry <= metadata.get("max", math.inf)
        and entry > metadata.get("above", -math.inf)
        and entry < metadata.get("below", math.inf)
    )
    if not inside:
        raise UserError(f"{key}={value!r}: must be {describe_range(metadata)}")


def describe_range(metadata: Mapping[str, Any]) -> str:
    """Return the range of a number in words.

    >>> describe_range({"min": 1}), describe_range({"above": 0, "below": 1})
    ('at least 1', 'above 0 and below 1')
    """
    words = {"min": "at least", "above": "above", "max": "at most", "below": "below"}
    bounds = [f"{word} {metadata[name]:g}" for name, word in words.items() if name in metadata]
    return " and ".join(bounds) or "a finite number"


def of_type(value: Any, kind: Any) -> bool:
    """Return whether a plain value has the type of an option; integers are floats too.

    >>> of_type(3, float), of_type([1.5, 2], tuple[float, ...]), of_type(None, int)
    (True, True, False)
    """
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(of_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        entry_kind = typing.get_args(kind)[0]
        is_list = isinstance(value, list | tuple)
        return is_list and all(of_type(entry, entry_kind) for entry in value)
    if typing.get_origin(kind) is not None:
        return isinstance(value, typing.get_origin(kind))

    # To Python, True is an integer.
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind is float:
        kind = int | float
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """Return a type in words.

    >>> describe(tuple[float, ...]), describe(int | None)
    ('a list of numbers', 'an integer or None')
    """
    if isinstance(kind, types.UnionType):
        return " or ".join(describe(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        one_entry = describe(typing.get_args(kind)[0])  # such as "a number"
        return f"a list of {one_entry.partition(' ')[2]}s"
    if kind is type(None):
        return "None"
    return KINDS.get(kind, "a section")


def parse(key: str, text: str, kind: Any) -> Any:
    """Read the value of an option from the command line.

    Args:
      key: the option as the user wrote it, for messages.
      text: what follows the equals sign.
      kind: type of the option.

    Raises:
      UserError: if the text is no such value.
    """
    value = _read(text, kind)
    if not of_type(value, kind):
        raise UserError(f"{key}={text}: must be {describe(kind)}")
    return value


def _read(text: str, kind: Any) -> Any:
    """Return the value that a text spells; it may be of another type than ``kind``."""
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if type(None) in kinds and text in ("None", "none", "null", ""):
            return None
        for one in kinds:
            value = _read(text, one)
            if of_type(value, one):
                return value
        return text
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)

    # Numbers and lists are written as in Python.
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # such as 1e5
    if kind is float and of_type(value, float):
        return float(value)
    return value


def dotted(where: str, name: str) -> str:
    """Return the full name of an option in a section; the top level is ""."""
    return f"{where}.{name}" if where else name


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested sections as one dict with dotted names.

    >>> flatten({"steps": 3, "data": {"bucket_seconds": (1.0,)}})
    {'steps': 3, 'data.bucket_seconds': [1.0]}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, dotted(where, name))
            continue
        if isinstance(value, tuple):  # as JSON has it
            value = list(value)
        flat[dotted(where, name)] = value
    return flat
