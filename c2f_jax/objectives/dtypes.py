"""Types of numbers: losses are computed in float32 at least, whatever comes in."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return x in float32, or in float64 if it is (``jax_enable_x64``).

    Args:
      x: array of any shape and type.

    Returns:
      The same numbers in float32 or float64.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
