"""Collectives that accept ``axis_name=None``, so that the same code runs on one device and under a device axis."""

import jax
import jax.numpy as jnp


def axis_index(axis_name=None):
    """Index of this device on ``axis_name``; 0 without an axis."""
    return jnp.zeros((), jnp.int32) if axis_name is None else jax.lax.axis_index(axis_name)


def all_gather(tree, axis_name=None):
    """Concatenate every leaf (n, ...) over the devices, in device order, to (N, ...). Differentiable.

    >>> all_gather(jnp.ones((2, 3))).shape
    (2, 3)
    """
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def pmean(tree, axis_name=None):
    """Mean of every leaf over the devices."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree, axis_name=None):
    """Sum of every leaf over the devices."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def masked_mean(values, valid, axis_name=None):
    """Mean of the valid entries on all devices: sum(values * valid) / max(sum(valid), 1).

    Unlike a mean of per-device means it does not depend on how the valid rows are spread over the devices.

    Args:
      values: (n,) float.
      valid: (n,) bool; False entries count neither above nor below the line.
      axis_name: device axis, or None for local rows only.

    >>> float(masked_mean(jnp.array([1., 3., 9.]), jnp.array([True, True, False])))
    2.0
    """
    total = psum(jnp.sum(jnp.where(valid, values, 0.0)), axis_name)
    count = psum(jnp.sum(valid.astype(jnp.float32)), axis_name)
    return total / jnp.maximum(count, 1.0)
