"""Momentum parameters: an exponential moving average of the online ones."""

from typing import Any

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_range


def update_momentum(momentum_params: Any, params: Any, momentum: jax.Array | float) -> Any:
    """Take one step of the moving average: theta' <- m theta' + (1 - m) theta.

    After k steps towards a constant theta, theta' = theta + m^k (theta'_0 - theta). Keep theta' in
    float32 where theta is bfloat16: steps of 1 - m would be lost.

    Args:
      momentum_params: pytree theta' of float arrays alone: filter out keys, counters and functions.
      params: pytree theta of the same structure and shapes. Mind the order: optax's
        ``incremental_update`` takes the new values first.
      momentum: scalar m from 0 to 1.

    Returns:
      The updated theta', each leaf in the type it had.

    Raises:
      ValueError: the two trees differ in structure, or two leaves in shape; a leaf is not an
        array of float32 or float64; m is out of range.

    Reference:
      He et al. 2020 (MoCo), equation 2; Li et al. 2021 (ALBEF), section 3.2.

    >>> update_momentum({"w": jnp.array(1.0)}, {"w": jnp.array(0.0)}, 0.75)["w"].item()
    0.75
    """
    check_arrays(momentum=(momentum, "number[]"))
    check_range("momentum", momentum, 0.0, 1.0)

    def average(path: tuple, old: jax.Array, new: jax.Array) -> jax.Array:
        if not hasattr(old, "dtype") or not jnp.issubdtype(old.dtype, jnp.floating):
            raise ValueError(
                f"momentum_params{jax.tree_util.keystr(path)} is {_describe(old)}; pass "
                "floating-point arrays alone, such as nnx.state(model, nnx.Param) of Flax NNX or "
                "eqx.filter(model, eqx.is_inexact_array) of Equinox"
            )
        if old.dtype.itemsize < 4:
            raise ValueError(
                f"momentum_params{jax.tree_util.keystr(path)} is {_describe(old)}, in which "
                "steps of 1 - m are lost to rounding; keep momentum_params in float32"
            )
        if jnp.shape(old) != jnp.shape(new):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"params{name} has shape {jnp.shape(new)}; "
                f"it must be {jnp.shape(old)}, as momentum_params{name}"
            )
        return (momentum * old + (1.0 - momentum) * new.astype(old.dtype)).astype(old.dtype)

    return jax.tree_util.tree_map_with_path(average, momentum_params, params)


def _describe(leaf: Any) -> str:
    """Say what a leaf is: an array's shape and type, or the type of something else."""
    if hasattr(leaf, "dtype"):
        return f"an array {jnp.shape(leaf)} of {leaf.dtype}"
    return f"a {type(leaf).__name__}"
