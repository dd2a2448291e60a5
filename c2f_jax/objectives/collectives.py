"""Collectives that accept ``axis_name=None``: the same code runs with and without a device axis."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from c2f_jax.objectives.checks import check_arrays
from c2f_jax.objectives.dtypes import at_least_float32

# Whether jax can be told that a gathered array is the same on all devices.
_CAN_DECLARE = "to" in inspect.signature(jax.lax.all_gather).parameters

AxisName = str | Sequence[str] | None


def axis_index(axis_name: AxisName = None) -> jax.Array:
    """Return the index of this device on the axis; 0 without an axis.

    Args:
      axis_name: device axis.

    Returns:
      int32 scalar.
    """
    return jnp.zeros((), jnp.int32) if axis_name is None else jax.lax.axis_index(axis_name)


def axis_size(axis_name: AxisName = None) -> int:
    """Return the number of devices on the axis; 1 without an axis.

    Args:
      axis_name: device axis.
    """
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def all_gather(tree: Any, axis_name: AxisName = None) -> Any:
    """Concatenate every leaf over the devices, in device order, with gradient.

    Without an axis, rows sharded over explicit axes of a mesh (``jax.make_mesh`` as it comes) are
    replicated; all others are the global batch already.

    Args:
      tree: pytree of arrays (n, ...).
      axis_name: device axis under ``pmap``, ``shard_map`` or ``vmap``; None without one.

    Returns:
      The same pytree with leaves (N, ...), equal on all devices.

    >>> all_gather(jnp.ones((2, 3))).shape
    (2, 3)
    """
    if axis_name is None:
        return jax.tree.map(_replicate, tree)

    is_checked = any(varies(x, axis_name) for x in jax.tree.leaves(tree))

    def gather(x: jax.Array) -> jax.Array:
        if not is_checked:
            return jax.lax.all_gather(x, axis_name, tiled=True)

        # Under shard_map with check_vma the result is declared equal on all devices, so that it
        # may leave with out_specs=P(). Elsewhere jax 0.10 would give it wrong gradients.
        if not _CAN_DECLARE:
            raise NotImplementedError(
                f"shard_map with check_vma=True needs jax 0.10 (this is {jax.__version__}): pass "
                "check_vma=False"
            )
        if not varies(x, axis_name):
            x = jax.lax.pcast(x, axis_name, to="varying")
        return jax.lax.all_gather(x, axis_name, tiled=True, to="invarying")

    return jax.tree.map(gather, tree)


def gather_groups(tree: Any, size: int, axis_name: AxisName = None) -> Any:
    """Concatenate every leaf over groups of neighboring devices, with gradient.

    Args:
      tree: pytree of arrays (n, ...).
      size: devices of a group; divides their number. 1 changes nothing with an axis.
      axis_name: device axis; None as for ``all_gather``, all rows.

    Returns:
      The same pytree with leaves (size n, ...), equal within a group.
    """
    devices = axis_size(axis_name)
    if axis_name is None or size == devices:
        return all_gather(tree, axis_name)
    if size == 1:
        return tree
    groups = [list(range(first, first + size)) for first in range(0, devices, size)]

    def gather(x: jax.Array) -> jax.Array:
        try:
            return jax.lax.all_gather(x, axis_name, tiled=True, axis_index_groups=groups)
        except NotImplementedError:  # vmap knows no groups
            whole = all_gather(x, axis_name)
            rows = size * x.shape[0]
            first = axis_index(axis_name) // size * rows
            return jax.lax.dynamic_slice_in_dim(whole, first, rows)

    return jax.tree.map(gather, tree)


def row_numbers(ids: jax.Array, axis_name: AxisName = None) -> jax.Array:
    """Number this device's rows in the global batch: d n + r.

    They are the columns of the rows' own pairs in a bank, and what ``row_keys`` makes keys of.

    Args:
      ids: (n,) array with one entry for each row of this device.
      axis_name: device axis, or None.

    Returns:
      (n,) int32, sharded as ``ids``.

    Raises:
      ValueError: ids has another shape.

    >>> row_numbers(jnp.array([7, 7, 9])).tolist()
    [0, 1, 2]
    """
    n = check_arrays(ids=(ids, "any[n]"))["n"]
    numbers = axis_index(axis_name) * n + jnp.arange(n, dtype=jnp.int32)
    sharding = _explicit_sharding(ids)
    return numbers if sharding is None else jax.sharding.reshard(numbers, sharding)


def take_rows(tree: Any, rows: jax.Array) -> Any:
    """Pick rows of every leaf, also by numbers that are sharded over explicit axes of a mesh.

    Args:
      tree: pytree of arrays (M, ...), the same on all devices.
      rows: int array of any shape, from 0 to M - 1.

    Returns:
      The same pytree with leaves (*rows.shape, ...), sharded as ``rows``.

    >>> take_rows({"id": jnp.array([7, 8, 9])}, jnp.array([2, 0]))["id"].tolist()
    [9, 7]
    """
    sharding = _explicit_sharding(rows)
    if sharding is None:
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], tree)
    return jax.tree.map(lambda x: jnp.asarray(x).at[rows].get(out_sharding=sharding), tree)


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
    values = at_least_float32(values)
    total = psum(jnp.sum(jnp.where(valid, values, 0.0)), axis_name)
    count = psum(jnp.sum(valid.astype(values.dtype)), axis_name)
    return total / jnp.maximum(count, 1.0)


def is_sharded(x: jax.Array) -> bool:
    """Return whether an array is sharded over explicit axes of a mesh."""
    return _explicit_sharding(x) is not None


def _explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Return the sharding over explicit axes that is part of an array's type, if there is one."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        if AxisType.Explicit in sharding.mesh.axis_types:
            return sharding
    return None


def _replicate(x: jax.Array) -> jax.Array:
    """Give all devices the whole array, where explicit axes shard it."""
    sharding = _explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def varies(x: jax.Array, axis_name: AxisName) -> bool:
    """Return whether jax types x as varying over the axis: in shard_map with check_vma=True."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    varying = getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return any(name in varying for name in names)
