"""Checks of arrays that come from outside; the messages name the array."""

import numpy as np

from c2f_jax.errors import UserError


def check_rank(name: str, values: np.ndarray, *axes: str) -> None:
    """Check that an array has one axis for each name in ``axes``.

    Raises:
      UserError: it has another rank.

    >>> check_rank("embeddings", np.zeros((3, 8)), "rows", "D")
    """
    if values.ndim != len(axes):
        shape = ", ".join(axes) + "," * (len(axes) == 1)
        raise UserError(
            f"{name} must have rank {len(axes)}, shape ({shape}); got shape {values.shape}"
        )


def check_finite(name: str, values: np.ndarray) -> None:
    """Check that no value is NaN or infinite.

    Raises:
      UserError: one is; the message counts the bad rows and names the first.
    """
    rows = np.asarray(values, np.float32).reshape(len(values), -1)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(
            f"{name}: {len(bad)} of {len(values)} rows contain NaN or infinity, the first is row "
            f"{bad[0]}; training diverged or an input is broken: evaluate an earlier checkpoint, "
            "check the data"
        )
