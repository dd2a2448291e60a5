"""SIC, speech-image contrastive learning: scores against the banks and cross entropy with soft targets."""

import jax
import jax.numpy as jnp


def similarity_logits(queries, bank, tau):
    """Cosine similarities divided by the temperature: l_ij = z_i . b_j / tau.

    Args:
      queries: (n, D) L2-normalised embeddings.
      bank: (M, D) L2-normalised embeddings.
      tau: scalar temperature.

    Returns:
      (n, M) float32, whatever the type of the embeddings.

    >>> similarity_logits(jnp.array([[1., 0.]]), jnp.array([[1., 0.], [0., 1.]]), 0.5).tolist()
    [[2.0, 0.0]]
    """
    # (n, D) . (D, M) -> (n, M)
    return (
        jnp.matmul(queries.astype(jnp.float32), bank.astype(jnp.float32).T, precision="highest")
        / tau
    )


def branch_logits(queries, bank, tau, branches):
    """``similarity_logits`` of each of M branches: l_mij = z_im . b_jm / tau with z_im and b_jm of length 1.

    Their mean over the branches is ``similarity_logits`` of the whole embeddings.

    Args:
      queries: (n, M D), M embeddings of length 1 / sqrt(M) in each row.
      bank: (K, M D), likewise.
      tau: scalar temperature.
      branches: M.

    Returns:
      (M, n, K) float32.

    For SIC of a TreeNet (Lee et al. 2015, "Why M Heads are Better than One"), each branch with a loss of its own.

    >>> z = jnp.array([[0.6, 0.8, 1.0, 0.0]]) / jnp.sqrt(2.0)
    >>> branch_logits(z, z, 0.5, 2).round(4).tolist()
    [[[2.0]], [[2.0]]]
    """
    parts = zip(
        jnp.split(queries, branches, axis=-1), jnp.split(bank, branches, axis=-1), strict=True
    )
    return branches * jnp.stack([similarity_logits(own, other, tau) for own, other in parts])


def soft_target_cross_entropy(logits, targets, valid):
    """Cross entropy of each row with a target distribution: -sum_j t_ij log softmax(l_i)_j over the valid columns.

    Args:
      logits: (n, M).
      targets: (n, M), rows sum to 1, zero where not valid.
      valid: (n, M) or (M,) bool; False columns leave the softmax.

    Returns:
      (n,) per-row loss, float32. Gradient with respect to the logits: softmax(l) - t.

    Source: C2F's L_SIC in the soft-target form of ALBEF (Li et al. 2021), equation 6.

    >>> loss = soft_target_cross_entropy(jnp.zeros((1, 3)), jnp.array([[1., 0., 0.]]), jnp.array([True, True, False]))
    >>> round(float(loss[0]), 4)  # ln 2: two columns are valid
    0.6931
    """
    valid = jnp.broadcast_to(valid, logits.shape)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1, where=valid)
    # log_softmax leaves -inf in masked columns, where 0 * -inf would be nan.
    return -jnp.sum(
        jnp.where(valid, targets * jnp.where(valid, log_probabilities, 0.0), 0.0), axis=-1
    )


def sic_loss(logits_s2i, logits_i2s, targets_s2i, targets_i2s, valid):
    """L_SIC of each row: 1/2 [CE(t_s2i, z_s . I*/tau) + CE(t_i2s, z_i . S*/tau)].

    Args:
      logits_s2i, logits_i2s: (n, M) similarity logits of the two directions.
      targets_s2i, targets_i2s: (n, M) soft targets.
      valid: (n, M) or (M,) bool, the columns that take part.

    Returns:
      (n,) per-row loss, float32.

    Source: C2F, section "speech-image contrastive learning".

    >>> eye = jnp.eye(2)
    >>> round(float(sic_loss(eye * 0, eye * 0, eye, eye, jnp.ones(2, bool)).mean()), 4)
    0.6931
    """
    s2i = soft_target_cross_entropy(logits_s2i, targets_s2i, valid)
    i2s = soft_target_cross_entropy(logits_i2s, targets_i2s, valid)
    return 0.5 * (s2i + i2s)
