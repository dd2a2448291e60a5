"""Hard negatives for SIM, mined by the contrastive similarities that SIC has computed."""

import jax
import jax.numpy as jnp


def sample_hard_negatives(keys, logits, ids, candidate_ids, candidate_valid):
    """Draw one negative for each row with probability softmax(l_i) over the candidates with another id.

    Gumbel-max on masked logits: argmax_j (l_ij + G_ij), where same-id and unwritten candidates are -inf *before* the
    softmax, so the draw is defined however much mass the positive holds.

    Args:
      keys: (n,) typed PRNG keys, one per row.
      logits: (n, M) SIC similarity logits (cosine / tau).
      ids: (n,) int image ids of the rows.
      candidate_ids: (M,) int image ids of the candidates.
      candidate_valid: (M,) bool.

    Returns:
      (n,) int32 candidate columns, and (n,) bool: False where no candidate is legal (the column is then 0 and the
      row must be dropped from the loss).

    Source: ALBEF (Li et al. 2021), section 3.3, with the masking moved before the softmax.

    >>> keys = row_keys(jax.random.key(0), jnp.arange(2))
    >>> ids, candidate_ids = jnp.array([5, 6]), jnp.array([5, 5, 6])
    >>> column, valid = sample_hard_negatives(keys, jnp.zeros((2, 3)), ids, candidate_ids, jnp.ones(3, bool))
    >>> int(column[0]), valid.tolist()
    (2, [True, True])
    """
    legal = (ids[:, None] != candidate_ids[None, :]) & candidate_valid[None, :]
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[1],), jnp.float32))(keys)
    perturbed = jnp.where(
        legal, jax.lax.stop_gradient(logits).astype(jnp.float32) + gumbel, -jnp.inf
    )
    return jnp.argmax(perturbed, axis=-1).astype(jnp.int32), jnp.any(legal, axis=-1)
