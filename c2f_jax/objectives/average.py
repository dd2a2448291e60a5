"""Averages that merge exactly over devices and steps: a sum and a count, never a mean of means."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Average:
    """The average of all values seen so far.

    Attributes:
      total: scalar, their sum.
      count: int32 scalar, their number.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, valid: jax.Array | None = None) -> "Average":
        """Average an array.

        Args:
          values: scalar or (n,).
          valid: (n,) bool, the values that count; None for all.

        Returns:
          Average.

        >>> average = Average.of(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
        >>> float(average.total), int(average.count)
        (4.0, 2)
        """
        values = jnp.atleast_1d(values)
        valid = jnp.ones(values.shape, bool) if valid is None else valid
        total = jnp.sum(jnp.where(valid, values, jnp.zeros_like(values)))
        return cls(total, jnp.sum(valid, dtype=jnp.int32))

    def merge(self, other: "Average") -> "Average":
        """Return the average of the values of both.

        >>> float(Average.of(jnp.array([1.0, 2.0])).merge(Average.of(jnp.array(6.0))).compute())
        3.0
        """
        return Average(self.total + other.total, self.count + other.count)

    def only_if(self, condition: jax.Array) -> "Average":
        """Return the average, or that of no values if the condition is False.

        >>> int(Average.of(jnp.array([jnp.nan])).only_if(jnp.array(False)).count)
        0
        """
        kept = (jnp.where(condition, x, jnp.zeros_like(x)) for x in (self.total, self.count))
        return Average(*kept)

    def compute(self) -> jax.Array:
        """Return total / count, a scalar; NaN if nothing was counted."""
        return self.total / self.count
