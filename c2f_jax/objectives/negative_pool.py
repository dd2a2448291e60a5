"""Where SIM's hard negatives come from: the rows of a block of the global batch, or the queue."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.collectives import (
    AxisName,
    all_gather,
    axis_index,
    gather_groups,
    take_rows,
)
from c2f_jax.objectives.contrastive import Precision, similarity_logits
from c2f_jax.objectives.embedding_queue import EmbeddingQueue, bank_valid, pad_rows
from c2f_jax.objectives.hard_negatives import HardNegatives
from c2f_jax.objectives.pairs import Pair, Rows

NEGATIVE_POOLS = ("batch", "global", "queue")


class NegativePool(NamedTuple):
    """The P candidates of hard negatives: N rows of the global batch, then a queue.

    A row draws from its own block of the batch, and only those tokens are on its device.

    Attributes:
      tokens: Pair of pytrees with leaves (G + P - N, ...): those of G rows of the batch, which hold
        the blocks of this device's rows, then those of the queue.
      ids: (P,) int image ids.
      valid: (P,) bool.
      first: number of the first of the G rows.
      kept: G.
      in_batch: N.
      block: rows of a block.
      queued: Pair of (P - N, D) embeddings of the token queue; None without one.
    """

    tokens: Pair[Any]
    ids: jax.Array
    valid: jax.Array
    first: jax.Array | int
    kept: int
    in_batch: int
    block: int
    queued: Pair[jax.Array] | None = None


def make_pool(
    candidates: Pair[Any],
    rows: Rows,
    token_queue: EmbeddingQueue | None,
    negatives: str,
    block: int | None,
    axis_name: AxisName,
) -> NegativePool:
    """Collect the candidates.

    Args:
      candidates: Pair of token pytrees of this device's rows.
      rows: Rows.
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      negatives: one of ``NEGATIVE_POOLS``.
      block: rows of the global batch that share candidates; None for all. "batch" makes it the rows
        of a device.
      axis_name: device axis.

    Returns:
      NegativePool.

    Raises:
      ValueError: the blocks do not divide the batch.
    """
    n = rows.ids.shape[0]
    ids, valid = all_gather((rows.ids, rows.valid), axis_name)
    total = ids.shape[0]
    if negatives == "batch":
        block = n
    if block is None or block >= total:
        block = total
    if total % block:
        raise ValueError(f"mining_rows is {block}; it must divide the batch of {total} rows")

    # Gathered with gradient: a negative on another device trains the encoders like a local one. As
    # few devices exchange tokens as have whole blocks together.
    kept = total if axis_name is None else math.lcm(n, block)
    tokens = gather_groups(candidates, kept // n, axis_name)
    first = 0 if kept == total else axis_index(axis_name) * n // kept * kept
    if negatives != "queue":
        return NegativePool(tokens, ids, valid, first, kept, total, block)

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
        first=first,
        kept=kept,
        in_batch=total,
        block=block,
        queued=Pair(speech=queued["speech"], image=queued["image"]),
    )


def pool_logits(
    pool: NegativePool,
    logits: jax.Array,
    numbers: jax.Array,
    queries: jax.Array,
    queued: jax.Array | None,
    tau: jax.Array | float,
    precision: Precision,
) -> jax.Array:
    """Return the logits of some queries against all candidates, -inf outside a query's block.

    Args:
      pool: NegativePool.
      logits: (n, M) SIC logits of the queries, whose first N columns are the global batch.
      numbers: (n,) int32 row numbers of the queries in the global batch.
      queries: (n, D) embeddings.
      queued: (P - N, D) embeddings in the token queue; None without one.
      tau: temperature of the logits.
      precision: as in ``similarity_logits``.

    Returns:
      (n, P).
    """
    in_batch = logits[:, : pool.in_batch]
    if pool.block < pool.in_batch:
        of_candidates = jnp.arange(pool.in_batch) // pool.block
        same = (numbers // pool.block)[:, None] == of_candidates[None, :]
        in_batch = jnp.where(same, in_batch, -jnp.inf)
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

    def place(columns: jax.Array) -> jax.Array:
        if pool.kept == pool.in_batch:
            return columns
        # A column that is not valid is 0, wherever the tokens begin.
        in_batch = jnp.clip(columns - pool.first, 0, pool.kept - 1)
        return jnp.where(columns < pool.in_batch, in_batch, columns - pool.in_batch + pool.kept)

    return Pair(
        speech=take_rows(pool.tokens.speech, place(speech.columns)),
        image=take_rows(pool.tokens.image, place(image.columns)),
    )


def _append(name: str, batch: Any, queued: Any) -> Any:
    """Append queued rows in the type of the batch, and pad the batch's to their length."""
    padded = pad_rows(name, batch, queued)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), padded, queued)
