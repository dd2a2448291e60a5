"""Collectives that accept ``axis_name=None``: the same code runs with and without a device axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays

AxisName = str | Sequence[str] | None


def axis_index(axis_name: AxisName = None) -> jax.Array:
    """Return the index of this device on the axis; 0 without an axis.

    Args:
      axis_name: device axis.

    Returns:
      int32 scalar.
    """
    return jnp.zeros((), jnp.int32) if axis_name is None else jax.lax.axis_index(axis_name)


def all_gather(tree: Any, axis_name: AxisName = None) -> Any:
    """Concatenate every leaf over the devices, in device order, with gradient.

    Args:
      tree: pytree of arrays (n, ...).
      axis_name: device axis, or None for the local rows only.

    Returns:
      The same pytree with leaves (N, ...).

    >>> all_gather(jnp.ones((2, 3))).shape
    (2, 3)
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def pmean(tree: Any, axis_name: AxisName = None) -> Any:
    """Average every leaf over the devices.

    Args:
      tree: pytree of arrays.
      axis_name: device axis, or None, which changes nothing.

    Returns:
      The same pytree, equal on all devices.
    """
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree: Any, axis_name: AxisName = None) -> Any:
    """Sum every leaf over the devices.

    Args:
      tree: pytree of arrays.
      axis_name: device axis, or None, which changes nothing.

    Returns:
      The same pytree, equal on all devices.
    """
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def masked_mean(values: jax.Array, valid: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Average the valid entries of all devices: sum(values * valid) / max(sum(valid), 1).

    Unlike a mean of per-device means it does not depend on how the valid rows are spread.

    Args:
      values: (n,) float.
      valid: (n,) bool; False entries are left out of both sums.
      axis_name: device axis, or None for the local rows only.

    Returns:
      Scalar.

    Raises:
      ValueError: an argument has another shape or type.

    >>> float(masked_mean(jnp.array([1., 3., 9.]), jnp.array([True, True, False])))
    2.0
    """
    check_arrays(values=(values, "number[n]"), valid=(valid, "bool[n]"))

    # Sums and counts are added up over the devices before the division.
    total = psum(jnp.sum(jnp.where(valid, values, 0.0)), axis_name)
    count = psum(jnp.sum(valid.astype(jnp.float32)), axis_name)
    return total / jnp.maximum(count, 1.0)
