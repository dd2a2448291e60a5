"""SIC, speech-image contrastive learning: scores against a bank, soft-target cross entropy."""

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_positive
from c2f_jax.objectives.dtypes import at_least_float32

Precision = str | jax.lax.Precision | None


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scale vectors to length 1: x / max(|x|, 1e-6), which has a gradient at 0 too.

    Args:
      x: (..., D) float.

    Returns:
      (..., D) float32, or float64 if x is.

    Raises:
      ValueError: x has another type.

    >>> l2_normalize(jnp.array([0.0, 2.0])).tolist()
    [0.0, 1.0]
    """
    check_arrays(x=(x, "float[...]"))
    x = at_least_float32(x)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def similarity_logits(
    queries: jax.Array,
    bank: jax.Array,
    tau: jax.Array | float,
    precision: Precision = "highest",
) -> jax.Array:
    """Divide cosine similarities by the temperature: l_ij = z_i . b_j / tau.

    Args:
      queries: (n, D) L2-normalized embeddings.
      bank: (M, D) L2-normalized embeddings.
      tau: scalar temperature, above 0.
      precision: of the matrix product, as ``jax.lax.Precision``. "highest" is float32 everywhere;
        "default" is faster on accelerators, which round the embeddings to bfloat16 or TF32 first.

    Returns:
      (n, M) float32, whatever the type of the embeddings; float64 if they are.

    Raises:
      ValueError: an argument has another shape, type or range.

    Reference:
      Li et al. 2021 (ALBEF), section 3.2.

    >>> similarity_logits(jnp.array([[1., 0.]]), jnp.array([[1., 0.], [0., 1.]]), 0.5).tolist()
    [[2.0, 0.0]]
    """
    check_arrays(
        queries=(queries, "float[n, D]"), bank=(bank, "float[M, D]"), tau=(tau, "number[]")
    )
    check_positive("tau", tau)

    # In float32 and full precision whatever the compute type: a small tau magnifies rounding.
    queries, bank = at_least_float32(queries), at_least_float32(bank)
    tau = jnp.asarray(tau).astype(jnp.result_type(queries, bank))
    return jnp.matmul(queries, bank.T, precision=precision) / tau  # (n, D) . (D, M) -> (n, M)


def branch_logits(
    queries: jax.Array,
    bank: jax.Array,
    tau: jax.Array | float,
    branches: int,
    precision: Precision = "highest",
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
      precision: as in ``similarity_logits``.

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
        of_branches.append(similarity_logits(query_part, bank_part, tau, precision))

    # Each part has length 1 / sqrt(B), so B times their product is a cosine.
    return branches * jnp.stack(of_branches)


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """Compute the cross entropy of each row: -sum_j t_ij log softmax(l_i)_j over the valid columns.

    Its gradient with respect to the logits is softmax(l) - t. A target of 0 contributes 0, also
    where the logit is -inf.

    Args:
      logits: (n, M).
      targets: (n, M), rows sum to 1, 0 where not valid.
      valid: (n, M) bool, or (1, M) for all rows; False columns leave the softmax. To leave out
        rows, average the result by ``masked_mean``.

    Returns:
      (n,) loss of each row, float32.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Li et al. 2021 (ALBEF), equation 6.

    >>> targets, valid = jnp.array([[1., 0., 0.]]), jnp.array([[True, True, False]])
    >>> loss = soft_target_cross_entropy(jnp.zeros((1, 3)), targets, valid)
    >>> round(float(loss[0]), 4)  # ln 2: two columns are valid
    0.6931
    """
    check_arrays(
        logits=(logits, "float[n, M]"),
        targets=(targets, "number[n, M]"),
        valid=(valid, "bool[n, M] | bool[1, M]"),
    )
    valid = jnp.broadcast_to(valid, logits.shape)
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits), axis=-1, where=valid)

    targets = targets.astype(log_probabilities.dtype)

    # log_softmax leaves -inf in masked columns and at logits of -inf, where 0 * -inf would be nan.
    counted = valid & (targets != 0)
    log_probabilities = jnp.where(counted, log_probabilities, 0.0)
    return -jnp.sum(jnp.where(counted, targets * log_probabilities, 0.0), axis=-1)


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
      valid: (n, M) bool, or (1, M) for all rows: the columns that take part.

    Returns:
      (n,) loss of each row, float32. Average it by ``masked_mean``, with the device axis if there
      is one.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Zhou and Li 2024 (C2F), speech-image contrastive learning.

    >>> eye = jnp.eye(2)
    >>> round(float(sic_loss(eye * 0, eye * 0, eye, eye, jnp.ones((1, 2), bool)).mean()), 4)
    0.6931
    """
    check_arrays(
        logits_s2i=(logits_s2i, "float[n, M]"),
        logits_i2s=(logits_i2s, "float[n, M]"),
        targets_s2i=(targets_s2i, "number[n, M]"),
        targets_i2s=(targets_i2s, "number[n, M]"),
        valid=(valid, "bool[n, M] | bool[1, M]"),
    )
    loss_s2i = soft_target_cross_entropy(logits_s2i, targets_s2i, valid)
    loss_i2s = soft_target_cross_entropy(logits_i2s, targets_i2s, valid)
    return 0.5 * (loss_s2i + loss_i2s)


def sigmoid_loss(logits: jax.Array, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """Compute SigLIP's loss of each row: -sum_j log sigmoid(y_ij l_ij), y = 1 or -1.

    An alternative to the softmax of SIC: each pair is its own decision. Add a learned bias to the
    logits (SigLIP starts it at -10, and tau at 0.1), since nearly all pairs are negatives.

    Args:
      logits: (n, M), cosine / tau + bias.
      positives: (n, M) bool, y = 1.
      valid: (n, M) bool, or (1, M) for all rows: the columns that take part.

    Returns:
      (n,) loss of each row, float32.

    Raises:
      ValueError: an argument has another shape or type.

    Reference:
      Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1.

    >>> eye = jnp.eye(2, dtype=bool)
    >>> round(float(sigmoid_loss(jnp.zeros((2, 2)), eye, eye | True)[0]), 4)  # 2 ln 2
    1.3863
    """
    check_arrays(
        logits=(logits, "float[n, M]"),
        positives=(positives, "bool[n, M]"),
        valid=(valid, "bool[n, M] | bool[1, M]"),
    )
    # Masked before the logarithm: a NaN in a masked column must not reach the gradient.
    logits = jnp.where(valid, at_least_float32(logits), 0.0)
    log_probabilities = jax.nn.log_sigmoid(jnp.where(positives, logits, -logits))
    return -jnp.sum(jnp.where(valid, log_probabilities, 0.0), axis=-1)
