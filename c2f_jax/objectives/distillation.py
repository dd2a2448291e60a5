"""Targets of SIC: identity targets by id policy, and the soft targets of momentum distillation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_range
from c2f_jax.objectives.dtypes import at_least_float32

ID_POLICIES = ("multi_positive", "mask", "diagonal")


class IdentityTargets(NamedTuple):
    """Hard targets, and the columns that stay in the softmax.

    Attributes:
      targets: (n, M) float32, float64 under jax_enable_x64; rows sum to 1.
      valid: (n, M) bool.
    """

    targets: jax.Array
    valid: jax.Array


def identity_targets(
    ids: jax.Array,
    bank_ids: jax.Array,
    pair_columns: jax.Array,
    bank_valid: jax.Array,
    policy: str = "multi_positive",
) -> IdentityTargets:
    """Make the hard targets y and choose the columns that stay in the softmax.

    * ``multi_positive``: y_ij = [g_i = g*_j] / row sum. Other captions of an image and its copies
      in the queue are positives.
    * ``mask``: only the pair is positive; other columns with its id leave the softmax.
    * ``diagonal``: only the pair is positive; all others are negatives, whatever their id.

    Args:
      ids: (n,) int image ids g of the queries.
      bank_ids: (M,) int image ids g* of the bank.
      pair_columns: (n,) int, the column of each query's own pair, from 0 to M - 1: the row's number
        in the global batch. For a column outside the bank no pair is marked.
      bank_valid: (M,) bool, False for slots never written.
      policy: one of ``ID_POLICIES``.

    Returns:
      IdentityTargets (targets, valid).

    Raises:
      ValueError: unknown policy, or an argument has another shape or type.

    Reference:
      Li et al. 2021 (ALBEF): fine-tuning takes all captions of an image as positives.

    >>> args = jnp.array([7]), jnp.array([7, 7, 3]), jnp.array([0]), jnp.ones(3, bool)
    >>> identity_targets(*args).targets.tolist()
    [[0.5, 0.5, 0.0]]
    >>> identity_targets(*args, policy="mask").valid.tolist()
    [[True, False, True]]
    """
    if policy not in ID_POLICIES:
        raise ValueError(f"unknown id policy {policy!r}: choose one of {', '.join(ID_POLICIES)}")
    check_arrays(
        ids=(ids, "int[n]"),
        bank_ids=(bank_ids, "int[M]"),
        pair_columns=(pair_columns, "int[n]"),
        bank_valid=(bank_valid, "bool[M]"),
    )

    # Slots never written hold id 0, which an image may have: only valid columns can match.
    is_pair = pair_columns[:, None] == jnp.arange(bank_ids.shape[0])[None, :]  # (n, M)
    same_id = (ids[:, None] == bank_ids[None, :]) & bank_valid[None, :]
    valid = jnp.broadcast_to(bank_valid, same_id.shape)

    # The pair itself is positive even if its column were not valid, so no row sums to 0.
    if policy == "multi_positive":
        positives = (same_id | is_pair).astype(float)
        count = jnp.sum(positives, axis=-1, keepdims=True)
        return IdentityTargets(positives / jnp.maximum(count, 1.0), valid)

    # The other policies have one positive; they differ in what they do with the rest of its id.
    if policy == "mask":
        valid = valid & (is_pair | ~same_id)
    return IdentityTargets(is_pair.astype(float), valid)


def distillation_targets(
    momentum_logits: jax.Array, targets: jax.Array, valid: jax.Array, alpha: jax.Array | float
) -> jax.Array:
    """Soften targets, without gradient: t = alpha softmax(z' . bank / tau) + (1 - alpha) y.

    Args:
      momentum_logits: (n, M) logits of the momentum embeddings.
      targets: (n, M) hard targets y.
      valid: (n, M) bool, or (1, M) for all rows: the columns of the softmax.
      alpha: scalar from 0 to 1.

    Returns:
      (n, M) float32; rows sum to 1, columns that are not valid are 0.

    Raises:
      ValueError: an argument has another shape, type or range.

    Reference:
      Li et al. 2021 (ALBEF), equations 6 and 7.

    >>> logits, hard, valid = jnp.zeros((1, 2)), jnp.array([[1., 0.]]), jnp.ones((1, 2), bool)
    >>> distillation_targets(logits, hard, valid, 0.5).tolist()
    [[0.75, 0.25]]
    """
    check_arrays(
        momentum_logits=(momentum_logits, "float[n, M]"),
        targets=(targets, "number[n, M]"),
        valid=(valid, "bool[n, M] | bool[1, M]"),
        alpha=(alpha, "number[]"),
    )
    check_range("alpha", alpha, 0.0, 1.0)
    valid = jnp.broadcast_to(valid, targets.shape)

    # The teacher's distribution over the valid columns.
    pseudo = jax.nn.softmax(at_least_float32(momentum_logits), axis=-1, where=valid)
    pseudo = jnp.where(valid, pseudo, 0.0)
    targets = targets.astype(pseudo.dtype)
    return jax.lax.stop_gradient(alpha * pseudo + (1.0 - alpha) * targets)


def alpha_at(step: jax.Array | int, alpha: float, ramp_steps: int) -> jax.Array:
    """Ramp the distillation weight linearly: alpha min(1, step / ramp_steps).

    Args:
      step: int scalar, steps since the ramp began.
      alpha: the weight after the ramp.
      ramp_steps: length of the ramp; 0 for none.

    Returns:
      float32 scalar; 0 before the ramp.

    Raises:
      ValueError: ramp_steps is not an int of at least 0, or an argument is no scalar or out of
        range.

    Reference:
      Li et al. 2021 (ALBEF), which ramps over the first epoch.

    >>> [round(float(alpha_at(s, 0.4, 100)), 2) for s in (0, 50, 200)]
    [0.0, 0.2, 0.4]
    """
    check_arrays(step=(step, "number[]"), alpha=(alpha, "number[]"))
    check_range("alpha", alpha, 0.0, 1.0)
    if not isinstance(ramp_steps, int) or ramp_steps < 0:
        raise ValueError(f"ramp_steps is {ramp_steps!r}; it must be an int of at least 0")
    if ramp_steps == 0:
        return jnp.asarray(alpha, jnp.float32)
    return alpha * jnp.clip(jnp.asarray(step, jnp.float32) / ramp_steps, 0.0, 1.0)
