"""Checks of ranks, shapes and types while jax traces; they cost a compiled step nothing."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SPEC = re.compile(r"(\w+)\[(.*)\]")
_KINDS = {
    "float": (jnp.floating,),
    "int": (jnp.integer,),
    "number": (jnp.floating, jnp.integer),
    "bool": (jnp.bool_,),
    "any": (np.generic,),
}


def check_arrays(**arguments: tuple[Any, str]) -> dict[str, int]:
    """Check types and shapes; a letter is the same size wherever it occurs.

    Args:
      **arguments: name -> (value, specification), such as ``"float[n, D]"``, ``"number[]"`` for a
        scalar, ``"any[n, ...]"`` for any shape after n, or ``"bool[n, M] | bool[M]"``. The kinds
        are float, int, number (either), bool and any.

    Returns:
      The size of each letter.

    Raises:
      ValueError: names the argument, its shape and type, and what it must be.

    >>> check_arrays(ids=(jnp.zeros(3, int), "int[n]"), bank_ids=(jnp.zeros(5, int), "int[M]"))
    {'n': 3, 'M': 5}
    >>> check_arrays(ids=(jnp.zeros((3, 1), int), "int[n]"))
    Traceback (most recent call last):
    ValueError: ids has shape (3, 1) and type int32; it must be int[n]
    """
    sizes: dict[str, int] = {}
    for name, (value, specification) in arguments.items():
        shape, dtype = np.shape(value), _dtype(value)

        # The first alternative that fits fixes the sizes for all later arguments.
        for one in specification.split(" | "):
            found = _match(shape, dtype, one, sizes)
            if found is not None:
                sizes |= found
                break
        else:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise ValueError(
                f"{name} has shape {tuple(shape)} and type {dtype}; it must be "
                + specification.replace(" | ", " or ")
                + (f" with {known}" if known else "")
            )
    return sizes


def check_keys(name: str, keys: Any, rows: int) -> None:
    """Check that there is one PRNG key for each row.

    Args:
      name: name of the argument.
      keys: (n,) typed keys, or (n, words) raw ones.
      rows: n.

    Raises:
      ValueError: names the argument, its shape and type, and what it must be.
    """
    shape, dtype = np.shape(keys), _dtype(keys)
    is_typed = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if shape[:1] != (rows,) or len(shape) != (1 if is_typed else 2):
        raise ValueError(
            f"{name} has shape {tuple(shape)} and type {dtype}; it must be one key for each row: "
            f"({rows},) typed keys"
        )


def is_known(value: Any) -> bool:
    """Return whether a number is known while jax traces, as constants are."""
    return np.shape(value) == () and not isinstance(value, jax.core.Tracer)


def check_ids(name: str, ids: Any) -> None:
    """Check that numpy ids keep their values in jax, which has 32 bits unless it is told otherwise.

    Args:
      name: name of the argument.
      ids: array; one of jax passes.

    Raises:
      ValueError: names the argument and an id that would become another.
    """
    if isinstance(ids, np.ndarray) and np.issubdtype(ids.dtype, np.integer):
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(ids.dtype))
        wide = ids[(ids > limits.max) | (ids < limits.min)]
        if wide.size:
            raise ValueError(
                f"{name} has {wide[0]}, which jax would cut to 32 bits: number the ids from 0, or "
                "set jax_enable_x64"
            )


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Check that a number is in a range, unless it is known only when the program runs.

    Args:
      name: name of the argument.
      value: scalar.
      low: smallest value.
      high: largest value.

    Raises:
      ValueError: names the argument and its range.
    """
    if is_known(value) and not low <= float(value) <= high:
        raise ValueError(f"{name} is {float(value):g}; it must be from {low:g} to {high:g}")


def check_positive(name: str, value: Any) -> None:
    """Check that a number is above 0, unless it is known only when the program runs.

    Args:
      name: name of the argument.
      value: scalar.

    Raises:
      ValueError: names the argument.
    """
    if is_known(value) and not float(value) > 0:
        raise ValueError(f"{name} is {float(value):g}; it must be above 0")


def check_rows(name: str, tree: Any, *rows: int) -> None:
    """Check that every leaf of a pytree has the same first axes.

    Args:
      name: name of the argument.
      tree: pytree of arrays.
      *rows: n, or n and m.

    Raises:
      ValueError: names the argument, the leaf and its shape, and what it must be.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.shape(leaf)[: len(rows)] != rows:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}; "
                f"it must be ({', '.join(map(str, rows))}, ...)"
            )


def _dtype(value: Any) -> Any:
    """Return the type of an array or of a Python number."""
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype


def _match(
    shape: tuple[int, ...], dtype: Any, specification: str, sizes: dict[str, int]
) -> dict[str, int] | None:
    """Return the sizes of the letters in one specification, or None if it does not fit."""
    parts = _SPEC.fullmatch(specification)
    assert parts is not None, specification
    kind, axes = parts[1], [axis.strip() for axis in parts[2].split(",") if axis.strip()]
    if not any(jnp.issubdtype(dtype, one) for one in _KINDS[kind]):
        return None

    # Three dots stand for any further axes.
    if axes and axes[-1] == "...":
        axes = axes[:-1]
        shape = shape[: len(axes)]
    if len(shape) != len(axes):
        return None

    # A number must be that size, a letter the size that it had before.
    found: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True):
        expected = int(axis) if axis.isdigit() else {**sizes, **found}.get(axis, size)
        if expected != size:
            return None
        if not axis.isdigit():
            found[axis] = size
    return found
