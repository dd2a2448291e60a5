"""SIC, speech-image contrastive learning: scores against a bank, soft-target cross entropy."""

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays


def similarity_logits(queries: jax.Array, bank: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Divide cosine similarities by the temperature: l_ij = z_i . b_j / tau.

    Args:
      queries: (n, D) L2-normalized embeddings.
      bank: (M, D) L2-normalized embeddings.
      tau: scalar temperature.

    Returns:
      (n, M) float32, whatever the type of the embeddings.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Li et al. 2021 (ALBEF), section 3.2.

    >>> similarity_logits(jnp.array([[1., 0.]]), jnp.array([[1., 0.], [0., 1.]]), 0.5).tolist()
    [[2.0, 0.0]]
    """
    check_arrays(
        queries=(queries, "float[n, D]"), bank=(bank, "float[M, D]"), tau=(tau, "number[]")
    )

    # In float32 and full precision whatever the compute type: a small tau magnifies rounding.
    queries, bank = queries.astype(jnp.float32), bank.astype(jnp.float32)
    return jnp.matmul(queries, bank.T, precision="highest") / tau  # (n, D) . (D, M) -> (n, M)


def branch_logits(
    queries: jax.Array, bank: jax.Array, tau: jax.Array | float, branches: int
) -> jax.Array:
    """Compute ``similarity_logits`` of each branch: l_bij = z_ib . k_jb / tau.

    For encoders of several branches, each with its own SIC loss. The branches' parts z_ib and k_jb
    of the embeddings are scaled to length 1, so the mean over the branches is ``similarity_logits``
    of the whole embeddings.

    Args:
      queries: (n, B D), B embeddings of length 1 / sqrt(B) in each row.
      bank: (M, B D), likewise.
      tau: scalar temperature.
      branches: B.

    Returns:
      (B, n, M) float32.

    Raises:
      ValueError: an argument has another shape or type, or the width is no multiple of B.

    Reference:
      Lee et al. 2015, "Why M Heads are Better than One" (TreeNets).

    >>> z = jnp.array([[0.6, 0.8, 1.0, 0.0]]) / jnp.sqrt(2.0)
    >>> branch_logits(z, z, 0.5, 2).round(4).tolist()
    [[[2.0]], [[2.0]]]
    """
    sizes = check_arrays(
        queries=(queries, "float[n, D]"), bank=(bank, "float[M, D]"), tau=(tau, "number[]")
    )
    if branches < 1 or sizes["D"] % branches:
        raise ValueError(f"branches={branches} must divide the width of the queries, {sizes['D']}")

    of_branches = []
    query_parts, bank_parts = (jnp.split(x, branches, axis=-1) for x in (queries, bank))
    for query_part, bank_part in zip(query_parts, bank_parts, strict=True):
        of_branches.append(similarity_logits(query_part, bank_part, tau))

    # Each part has length 1 / sqrt(B), so B times their product is a cosine.
    return branches * jnp.stack(of_branches)


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """Compute the cross entropy of each row: -sum_j t_ij log softmax(l_i)_j over the valid columns.

    Its gradient with respect to the logits is softmax(l) - t.

    Args:
      logits: (n, M).
      targets: (n, M), rows sum to 1, 0 where not valid.
      valid: (n, M) or (M,) bool; False columns leave the softmax.

    Returns:
      (n,) loss of each row, float32.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Li et al. 2021 (ALBEF), equation 6.

    >>> targets, valid = jnp.array([[1., 0., 0.]]), jnp.array([True, True, False])
    >>> loss = soft_target_cross_entropy(jnp.zeros((1, 3)), targets, valid)
    >>> round(float(loss[0]), 4)  # ln 2: two columns are valid
    0.6931
    """
    check_arrays(
        logits=(logits, "float[n, M]"),
        targets=(targets, "number[n, M]"),
        valid=(valid, "bool[n, M] | bool[M]"),
    )
    valid = jnp.broadcast_to(valid, logits.shape)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1, where=valid)
    # log_softmax leaves -inf in masked columns, where 0 * -inf would be nan.
    log_probabilities = jnp.where(valid, log_probabilities, 0.0)
    return -jnp.sum(jnp.where(valid, targets * log_probabilities, 0.0), axis=-1)


def sic_loss(
    logits_s2i: jax.Array,
    logits_i2s: jax.Array,
    targets_s2i: jax.Array,
    targets_i2s: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Compute L_SIC of each row: 1/2 [CE(t_s2i, z_s . I*/tau) + CE(t_i2s, z_i . S*/tau)].

    Args:
      logits_s2i: (n, M) logits of each speech against the bank of images.
      logits_i2s: (n, M) logits of each image against the bank of speech.
      targets_s2i: (n, M) soft targets of the speech.
      targets_i2s: (n, M) soft targets of the images.
      valid: (n, M) or (M,) bool, the columns that take part.

    Returns:
      (n,) loss of each row, float32. Average it with ``collectives.pmean(jnp.mean(loss), axis)``.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Zhou and Li 2024 (C2F), speech-image contrastive learning.

    >>> eye = jnp.eye(2)
    >>> round(float(sic_loss(eye * 0, eye * 0, eye, eye, jnp.ones(2, bool)).mean()), 4)
    0.6931
    """
    check_arrays(
        logits_s2i=(logits_s2i, "float[n, M]"),
        logits_i2s=(logits_i2s, "float[n, M]"),
        targets_s2i=(targets_s2i, "number[n, M]"),
        targets_i2s=(targets_i2s, "number[n, M]"),
        valid=(valid, "bool[n, M] | bool[M]"),
    )
    loss_s2i = soft_target_cross_entropy(logits_s2i, targets_s2i, valid)
    loss_i2s = soft_target_cross_entropy(logits_i2s, targets_i2s, valid)
    return 0.5 * (loss_s2i + loss_i2s)
