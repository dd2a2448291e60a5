"""Keys of random draws: one for each row of the global batch, folded in for each use."""

import jax


def row_keys(key, rows):
    """One key for each row: fold_in(key, row). Keys of global rows give the same draws on any number of devices.

    Args:
      key: a typed PRNG key.
      rows: (n,) int global row numbers.

    Returns:
      (n,) typed keys.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_keys(keys, site):
    """Keys for one use: fold_in(key, site) for each of (n,) keys; None (deterministic) stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, site)
