"""Where SIM's hard negatives come from: the rows of this device, of all devices, or the queue."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.collectives import AxisName, all_gather, axis_index, take_rows
from c2f_jax.objectives.contrastive import Precision, similarity_logits
from c2f_jax.objectives.embedding_queue import EmbeddingQueue, bank_valid, pad_rows
from c2f_jax.objectives.hard_negatives import HardNegatives
from c2f_jax.objectives.pairs import Pair, Rows

NEGATIVE_POOLS = ("batch", "global", "queue")


class NegativePool(NamedTuple):
    """The P candidates that hard negatives are drawn from.

    Attributes:
      tokens: Pair of pytrees with leaves (P, ...).
      ids: (P,) int image ids.
      valid: (P,) bool.
      first: which column of the SIC logits is the first candidate.
      in_batch: how many candidates are columns of the SIC logits; the others are in the token
        queue.
      queued: Pair of (P - in_batch, D) embeddings of the token queue; None without one.
    """

    tokens: Pair[Any]
    ids: jax.Array
    valid: jax.Array
    first: jax.Array | int
    in_batch: int
    queued: Pair[jax.Array] | None = None


def make_pool(
    candidates: Pair[Any],
    rows: Rows,
    token_queue: EmbeddingQueue | None,
    negatives: str,
    axis_name: AxisName,
) -> NegativePool:
    """Collect the candidates.

    Args:
      candidates: Pair of token pytrees of this device's rows.
      rows: Rows.
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      negatives: one of ``NEGATIVE_POOLS``.
      axis_name: device axis.

    Returns:
      NegativePool.
    """
    n = rows.ids.shape[0]
    if negatives == "batch" and axis_name is not None:
        return NegativePool(candidates, rows.ids, rows.valid, axis_index(axis_name) * n, n)

    # Gathered with gradient: a negative on another device trains the encoders like a local one.
    tokens, ids, valid = all_gather((candidates, rows.ids, rows.valid), axis_name)
    total = ids.shape[0]
    if negatives != "queue":
        return NegativePool(tokens, ids, valid, 0, total)

    # The token queue also keeps the embeddings of its rows, to score them by.
    assert token_queue is not None
    queued = token_queue.entries
    return NegativePool(
        tokens=Pair(
            speech=_append("speech.tokens", tokens.speech, queued["speech_tokens"]),
            image=_append("image.tokens", tokens.image, queued["image_tokens"]),
        ),
        ids=jnp.concatenate([ids, queued["id"]]),
        valid=bank_valid(valid, token_queue),
        first=0,
        in_batch=total,
        queued=Pair(speech=queued["speech"], image=queued["image"]),
    )


def pool_logits(
    pool: NegativePool,
    logits: jax.Array,
    queries: jax.Array,
    queued: jax.Array | None,
    tau: jax.Array | float,
    precision: Precision,
) -> jax.Array:
    """Return the logits of some queries against all candidates.

    Args:
      pool: NegativePool.
      logits: (n, M) SIC logits of the queries, whose first N columns are the global batch.
      queries: (n, D) embeddings.
      queued: (P - in_batch, D) embeddings in the token queue; None without one.
      tau: temperature of the logits.
      precision: as in ``similarity_logits``.

    Returns:
      (n, P).
    """
    in_batch = logits[:, : pool.in_batch]
    if not isinstance(pool.first, int):
        in_batch = jax.lax.dynamic_slice_in_dim(logits, pool.first, pool.in_batch, axis=1)
    if queued is None:
        return in_batch
    return jnp.concatenate([in_batch, similarity_logits(queries, queued, tau, precision)], axis=1)


def take_negatives(pool: NegativePool, speech: HardNegatives, image: HardNegatives) -> Pair[Any]:
    """Take the tokens of the drawn candidates.

    Args:
      pool: NegativePool.
      speech: HardNegatives (n, m) among the speech.
      image: HardNegatives (n, m) among the images.

    Returns:
      Pair of pytrees with leaves (n, m, ...).
    """
    return Pair(
        speech=take_rows(pool.tokens.speech, speech.columns),
        image=take_rows(pool.tokens.image, image.columns),
    )


def _append(name: str, batch: Any, queued: Any) -> Any:
    """Append queued rows in the type of the batch, and pad the batch's to their length."""
    padded = pad_rows(name, batch, queued)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), padded, queued)
