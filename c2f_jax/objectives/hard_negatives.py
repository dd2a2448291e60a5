"""Hard negatives for SIM, mined by the contrastive similarities that SIC has computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_keys
from c2f_jax.objectives.dtypes import at_least_float32


class HardNegatives(NamedTuple):
    """The mined candidates of each row.

    Attributes:
      columns: (n,) int32 columns of the candidates, 0 where not valid; (n, m) for several.
      valid: likewise, bool; False where no legal candidate is left: that pair must leave the loss.
    """

    columns: jax.Array
    valid: jax.Array


def sample_hard_negatives(
    keys: jax.Array,
    logits: jax.Array,
    ids: jax.Array,
    candidate_ids: jax.Array,
    candidate_valid: jax.Array,
    per_row: int | None = None,
) -> HardNegatives:
    """Draw negatives for each row, with probability softmax(l_i) over candidates of another id.

    Gumbel-max on masked logits: argmax_j (l_ij + G_ij). Candidates with the same id and slots never
    written are -inf *before* the softmax, so the draw is defined however much mass the positive
    has. Several negatives are drawn one after the other without replacement: the m largest.

    Args:
      keys: (n,) typed PRNG keys, one for each row. Each direction needs its own keys: equal
        keys would draw equal columns.
      logits: (n, M) SIC logits (cosine / tau). A candidate of -inf or NaN is never drawn as valid.
      ids: (n,) int image ids of the rows.
      candidate_ids: (M,) int image ids of the candidates.
      candidate_valid: (M,) bool.
      per_row: m, from 1 to M; None for one negative without the axis of m.

    Returns:
      HardNegatives (columns, valid), (n,) or (n, m).

    Raises:
      ValueError: an argument has another shape or type, or there are too few candidates.

    Reference:
      Li et al. 2021 (ALBEF), section 3.3, with the mask moved before the softmax; Kool et al. 2019,
      "Stochastic Beams and Where to Find Them", for several.

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> ids, candidate_ids = jnp.array([5, 6]), jnp.array([5, 5, 6])
    >>> columns, valid = sample_hard_negatives(
    ...     keys, jnp.zeros((2, 3)), ids, candidate_ids, jnp.ones(3, bool)
    ... )
    >>> int(columns[0]), valid.tolist()
    (2, [True, True])
    """
    sizes = check_arrays(
        logits=(logits, "float[n, M]"),
        ids=(ids, "int[n]"),
        candidate_ids=(candidate_ids, "int[M]"),
        candidate_valid=(candidate_valid, "bool[M]"),
    )
    check_keys("keys", keys, sizes["n"])
    if sizes["M"] == 0:
        raise ValueError("candidate_ids has shape (0,); there must be at least one candidate")
    if per_row is not None and not 1 <= per_row <= sizes["M"]:
        raise ValueError(
            f"per_row is {per_row}; it must be from 1 to the number of candidates, {sizes['M']}"
        )

    # What may be drawn: another image, from a slot that was written.
    legal = (ids[:, None] != candidate_ids[None, :]) & candidate_valid[None, :]  # (n, M)

    # The row's key draws its noise, so the draw does not depend on the number of devices.
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[1],), jnp.float32))(keys)

    # The index of the largest l + G is distributed as softmax(l).
    perturbed = at_least_float32(jax.lax.stop_gradient(logits)) + gumbel
    perturbed = jnp.where(legal, perturbed, -jnp.inf)
    if per_row is None:
        columns, largest = jnp.argmax(perturbed, axis=-1), jnp.max(perturbed, axis=-1)
    else:
        largest, columns = jax.lax.top_k(perturbed, per_row)
    valid = largest > -jnp.inf
    return HardNegatives(jnp.where(valid, columns, 0).astype(jnp.int32), valid)
