"""Candidates for SIM's hard negatives, and the rows that enter the queues."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax import objectives
from c2f_jax.models.c2f import Encoded
from c2f_jax.objectives.collectives import all_gather
from c2f_jax.objectives.embedding_queue import bank_valid


class Rows(NamedTuple):
    """This device's rows of the global batch.

    Attributes:
      ids: (n,) int32 image ids.
      index: (n,) int32 rows in the global batch.
      keys: (n,) typed PRNG keys, one for each (seed, step, global row): all draws come from them.
    """

    ids: jax.Array
    index: jax.Array
    keys: jax.Array


def negative_pool(token_queue, rows, speech, image, logits, tau, pool, axis_name):
    """Candidates for SIM's hard negatives, with the SIC logits that they are drawn by.

    Args:
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      rows: Rows.
      speech, image: Encoded of ``rows``: candidates by their tokens, queries by their embeddings.
      logits: SIC logits (s2i, i2s) whose first N columns are the global batch.
      tau, pool, axis_name: temperature, one of ``NEGATIVE_POOLS``, device axis.

    Returns:
      speech and image candidates (Encoded without embeddings, leaves (C, ...)), logits (s2i, i2s) each (n, C),
      ids (C,), valid (C,). "batch": C = n, "global": C = N, "queue": C = N + token queue slots.
    """
    n = rows.ids.shape[0]
    speech_pool, image_pool, pool_ids = (
        without_embedding(speech),
        without_embedding(image),
        rows.ids,
    )
    if pool == "batch":
        own = tuple(jax.lax.dynamic_slice_in_dim(x, rows.index[0], n, axis=1) for x in logits)
        return speech_pool, image_pool, own, pool_ids, jnp.ones((n,), bool)
    # Gathered with gradient: a negative on another device trains the encoders as one on this device would.
    speech_pool, image_pool, pool_ids = all_gather((speech_pool, image_pool, pool_ids), axis_name)
    total = pool_ids.shape[0]
    in_batch = tuple(x[:, :total] for x in logits)
    if pool == "global":
        return speech_pool, image_pool, in_batch, pool_ids, jnp.ones((total,), bool)
    entries = token_queue.entries
    scores = tuple(
        jnp.concatenate([own, objectives.similarity_logits(z, entries[name], tau)], axis=1)
        for own, z, name in (
            (in_batch[0], speech.embedding, "image"),
            (in_batch[1], image.embedding, "speech"),
        )
    )
    padded = pad_tokens(speech_pool, entries["speech_tokens"].shape[1])
    queued_speech = Encoded(
        None, entries["speech_tokens"].astype(padded.tokens.dtype), entries["speech_lengths"]
    )
    queued_image = Encoded(
        None, entries["image_tokens"].astype(image_pool.tokens.dtype), entries["image_lengths"]
    )
    append = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)  # noqa: E731
    return (
        append(padded, queued_speech),
        append(image_pool, queued_image),
        scores,
        jnp.concatenate([pool_ids, entries["id"]]),
        bank_valid(total, token_queue),
    )


def replace_rows(pairs, chosen, encoded):
    """Pairs whose first n token sequences are those of ``encoded`` where ``chosen`` (n,)."""
    n, length = encoded.tokens.shape[:2]
    tokens = pairs.tokens.at[:n, :length].set(
        jnp.where(chosen[:, None, None], encoded.tokens, pairs.tokens[:n, :length])
    )
    return pairs._replace(tokens=tokens)


def without_embedding(encoded):
    return encoded._replace(embedding=None)


def pad_tokens(encoded, length):
    """Tokens padded to ``length``, where a shorter bucket meets the queue; the lengths hide the padding."""
    missing = length - encoded.tokens.shape[1]
    return encoded._replace(tokens=jnp.pad(encoded.tokens, ((0, 0), (0, missing), (0, 0))))


def queue_rows(momentum, ids):
    return {"id": ids, "speech": momentum[0].embedding, "image": momentum[1].embedding}


def token_rows(momentum, ids, token_queue):
    speech, image = (
        pad_tokens(momentum[0], token_queue.entries["speech_tokens"].shape[1]),
        momentum[1],
    )
    return queue_rows(momentum, ids) | {
        "speech_tokens": speech.tokens,
        "speech_lengths": speech.lengths,
        "image_tokens": image.tokens,
        "image_lengths": image.lengths,
    }
