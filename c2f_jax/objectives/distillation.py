"""Targets of SIC: identity targets by id policy, and momentum distillation's blended soft targets."""

import jax
import jax.numpy as jnp

ID_POLICIES = ("multi_positive", "mask", "diagonal")


def identity_targets(ids, bank_ids, pair_columns, bank_valid, policy="multi_positive"):
    """Hard targets y and the columns that stay in the softmax.

    ``multi_positive``: y_ij = [g_i = g*_j] / row sum, so other captions of a picture and its copies in the queue are
    positives. ``mask``: only the pair is positive and other columns with its id leave the softmax. ``diagonal``: only
    the pair is positive and the rest are negatives, whatever their id.

    Args:
      ids: (n,) int image ids g of the queries.
      bank_ids: (M,) int image ids of the bank.
      pair_columns: (n,) int, the column that holds each query's own pair.
      bank_valid: (M,) bool, False for slots never written.
      policy: one of ``ID_POLICIES``.

    Returns:
      (n, M) float32 targets whose rows sum to 1, and (n, M) bool valid columns.

    Raises:
      ValueError: unknown policy.

    Source: ALBEF (Li et al. 2021), whose retrieval fine-tuning takes all captions of a picture for positives.

    >>> args = jnp.array([7]), jnp.array([7, 7, 3]), jnp.array([0]), jnp.ones(3, bool)
    >>> identity_targets(*args)[0].tolist()
    [[0.5, 0.5, 0.0]]
    >>> identity_targets(*args, policy="mask")[1].tolist()
    [[True, False, True]]
    """
    if policy not in ID_POLICIES:
        raise ValueError(f"unknown id policy {policy!r}: choose one of {', '.join(ID_POLICIES)}")
    is_pair = pair_columns[:, None] == jnp.arange(bank_ids.shape[0])[None, :]
    same_id = (ids[:, None] == bank_ids[None, :]) & bank_valid[None, :]
    valid = jnp.broadcast_to(bank_valid, same_id.shape)
    if policy == "multi_positive":
        positives = (same_id | is_pair).astype(jnp.float32)
        return positives / jnp.sum(positives, axis=-1, keepdims=True), valid
    if policy == "mask":
        valid = valid & (is_pair | ~same_id)
    return is_pair.astype(jnp.float32), valid


def distillation_targets(momentum_logits, targets, valid, alpha):
    """Soft targets: t = alpha softmax(z' . bank / tau) + (1 - alpha) y, without gradient.

    Args:
      momentum_logits: (n, M) logits of the momentum embeddings.
      targets: (n, M) hard targets y.
      valid: (n, M) or (M,) bool, the columns of the softmax.
      alpha: scalar in [0, 1].

    Returns:
      (n, M) float32; rows sum to 1, columns that are not valid are 0.

    Source: ALBEF (Li et al. 2021), equations 6 and 7.

    >>> distillation_targets(jnp.zeros((1, 2)), jnp.array([[1., 0.]]), jnp.ones(2, bool), 0.5).tolist()
    [[0.75, 0.25]]
    """
    valid = jnp.broadcast_to(valid, targets.shape)
    pseudo = jax.nn.softmax(momentum_logits.astype(jnp.float32), axis=-1, where=valid)
    pseudo = jnp.where(valid, pseudo, 0.0)
    return jax.lax.stop_gradient(alpha * pseudo + (1.0 - alpha) * targets)


def alpha_at(step, alpha, ramp_steps):
    """The distillation weight, ramped linearly: alpha min(1, step / ramp_steps); ramp_steps = 0 means no ramp.

    Source: ALBEF ramps over the first epoch.

    >>> [round(float(alpha_at(s, 0.4, 100)), 2) for s in (0, 50, 200)]
    [0.0, 0.2, 0.4]
    """
    if ramp_steps == 0:
        return jnp.asarray(alpha, jnp.float32)
    return alpha * jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / ramp_steps)
