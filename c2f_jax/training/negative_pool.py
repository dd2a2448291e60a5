"""Hard negatives: the pool of candidates, the draws, and the rows that enter the queues."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.models.c2f import Encoded
from c2f_jax.objectives import (
    EmbeddingQueue,
    Site,
    all_gather,
    bank_valid,
    fold_keys,
    sample_hard_negatives,
    similarity_logits,
)
from c2f_jax.objectives.collectives import AxisName
from c2f_jax.training.method import MethodConfig
from c2f_jax.training.pairs import Directions, Pair, Rows, Tokens


class NegativePool(NamedTuple):
    """Candidates for hard negatives.

    There are C = n of them ("batch"), N ("global") or N + token queue slots ("queue").

    Attributes:
      candidates: Pair of Tokens, leaves (C, ...).
      logits: Directions of (n, C) SIC logits by which candidates are drawn.
      ids: (C,) int32 image ids.
      valid: (C,) bool, False for slots never written.
    """

    candidates: Pair[Tokens]
    logits: Directions[jax.Array]
    ids: jax.Array
    valid: jax.Array


class MinedNegatives(NamedTuple):
    """A hard negative speech for each image, a hard negative image for each speech.

    Attributes:
      tokens: Pair of Tokens, leaves (n, ...).
      valid: Pair of (n,) bool, False where the pool holds no other image.
      image_from_queue: (n,) bool, whether the negative image comes from the token queue.
    """

    tokens: Pair[Tokens]
    valid: Pair[jax.Array]
    image_from_queue: jax.Array


def mine_negatives(
    token_queue: EmbeddingQueue,
    rows: Rows,
    candidates: Pair[Encoded],
    logits: Directions[jax.Array],
    tau: jax.Array | float,
    method: MethodConfig,
    axis_name: AxisName,
) -> MinedNegatives:
    """Draw hard negatives, with probability softmax(cosine / T), never of the same id.

    T is the mining temperature, ``method.mining_tau`` or tau.

    Args:
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      rows: Rows.
      candidates: Pair of Encoded of ``rows``: candidates by their tokens, queries by their
        embeddings.
      logits: Directions of SIC logits whose first N columns are the global batch.
      tau: temperature of the logits.
      method: MethodConfig.
      axis_name: device axis.

    Returns:
      MinedNegatives.

    Reference:
      Zhou and Li 2024 (C2F); Li et al. 2021 (ALBEF), section 3.3.
    """
    pool = negative_pool(token_queue, rows, candidates, logits, tau, method.negatives, axis_name)

    # Logits are cosines over tau; rescaled, they are cosines over the mining temperature.
    scores = pool.logits
    if method.mining_tau is not None:
        rescale = tau / method.mining_tau
        scores = Directions(s2i=scores.s2i * rescale, i2s=scores.i2s * rescale)

    # Each direction has its own keys: equal keys would draw equal columns.
    image_keys = fold_keys(rows.keys, Site.IMAGE_NEGATIVES)
    image = sample_hard_negatives(image_keys, scores.s2i, rows.ids, pool.ids, pool.valid)
    speech_keys = fold_keys(rows.keys, Site.SPEECH_NEGATIVES)
    speech = sample_hard_negatives(speech_keys, scores.i2s, rows.ids, pool.ids, pool.valid)

    return MinedNegatives(
        tokens=Pair(
            speech=take_rows(pool.candidates.speech, speech.columns),
            image=take_rows(pool.candidates.image, image.columns),
        ),
        valid=Pair(speech=speech.valid, image=image.valid),
        image_from_queue=image.columns >= pool.ids.shape[0] - token_queue.size,
    )


def negative_pool(
    token_queue: EmbeddingQueue,
    rows: Rows,
    candidates: Pair[Encoded],
    logits: Directions[jax.Array],
    tau: jax.Array | float,
    pool: str,
    axis_name: AxisName,
) -> NegativePool:
    """Collect the candidates and the SIC logits that they are drawn by.

    Args:
      token_queue: EmbeddingQueue with token sequences; read for "queue" alone.
      rows: Rows.
      candidates: Pair of Encoded of ``rows``.
      logits: Directions of SIC logits whose first N columns are the global batch.
      tau: temperature of the logits.
      pool: one of ``NEGATIVE_POOLS``.
      axis_name: device axis.

    Returns:
      NegativePool.
    """
    n = rows.ids.shape[0]
    own = Pair(speech=tokens_of(candidates.speech), image=tokens_of(candidates.image))

    # The columns of this device's rows in the global batch.
    if pool == "batch":
        first = rows.numbers[0]
        own_logits = Directions(
            s2i=jax.lax.dynamic_slice_in_dim(logits.s2i, first, n, axis=1),
            i2s=jax.lax.dynamic_slice_in_dim(logits.i2s, first, n, axis=1),
        )
        return NegativePool(own, own_logits, rows.ids, jnp.ones((n,), bool))

    # Gathered with gradient: a negative on another device trains the encoders like a local one.
    gathered, ids = all_gather((own, rows.ids), axis_name)
    total = ids.shape[0]
    in_batch = Directions(s2i=logits.s2i[:, :total], i2s=logits.i2s[:, :total])
    if pool == "global":
        return NegativePool(gathered, in_batch, ids, jnp.ones((total,), bool))

    # The token queue also keeps the embeddings of its rows, to score them by.
    queued = token_queue.entries
    queued_s2i = similarity_logits(candidates.speech.embedding, queued["image"], tau)
    queued_i2s = similarity_logits(candidates.image.embedding, queued["speech"], tau)
    return NegativePool(
        candidates=_append_queue(gathered, token_queue),
        logits=Directions(
            s2i=jnp.concatenate([in_batch.s2i, queued_s2i], axis=1),  # (n, N + slots)
            i2s=jnp.concatenate([in_batch.i2s, queued_i2s], axis=1),
        ),
        ids=jnp.concatenate([ids, queued["id"]]),
        valid=bank_valid(total, token_queue),
    )


def with_momentum_tokens(online: Pair[Encoded], momentum: Pair[Encoded]) -> Pair[Encoded]:
    """Give online embeddings the momentum encoder's tokens.

    The token queue holds momentum tokens. If the batch's candidates kept online ones, the matcher
    would learn which encoder made the tokens of a pair instead of what they mean.

    Args:
      online: Pair of Encoded.
      momentum: Pair of Encoded of the same rows.

    Returns:
      Pair of Encoded.
    """
    return Pair(
        speech=online.speech._replace(tokens=momentum.speech.tokens),
        image=online.image._replace(tokens=momentum.image.tokens),
    )


def replace_first_rows(sequences: Tokens, chosen: jax.Array, other: Encoded) -> Tokens:
    """Replace the tokens of some of the first n rows by those of another encoder.

    Args:
      sequences: Tokens with leaves (m, ...), m >= n.
      chosen: (n,) bool, the rows to replace.
      other: Encoded with leaves (n, ...), with at most as many tokens.

    Returns:
      Tokens with leaves (m, ...).
    """
    n, length = other.tokens.shape[:2]
    replaced = jnp.where(chosen[:, None, None], other.tokens, sequences.tokens[:n, :length])
    return sequences._replace(tokens=sequences.tokens.at[:n, :length].set(replaced))


def tokens_of(encoded: Encoded) -> Tokens:
    """Leave out the embedding, which matching does not read."""
    return Tokens(encoded.tokens, encoded.lengths)


def take_rows(sequences: Tokens, rows: jax.Array) -> Tokens:
    """Pick rows of the token sequences."""
    return Tokens(sequences.tokens[rows], sequences.lengths[rows])


def pad_tokens(sequences: Tokens, length: int) -> Tokens:
    """Pad tokens, where a shorter bucket meets the queue; ``lengths`` hide the padding."""
    missing = length - sequences.tokens.shape[1]
    padded = jnp.pad(sequences.tokens, ((0, 0), (0, missing), (0, 0)))
    return sequences._replace(tokens=padded)


def queue_rows(momentum: Pair[Encoded], ids: jax.Array) -> dict[str, jax.Array]:
    """Name what enters the embedding queue: ids and momentum embeddings."""
    return {"id": ids, "speech": momentum.speech.embedding, "image": momentum.image.embedding}


def token_rows(
    momentum: Pair[Encoded], ids: jax.Array, token_queue: EmbeddingQueue
) -> dict[str, jax.Array]:
    """Name what enters the token queue: also momentum tokens, padded to the longest bucket."""
    speech = pad_tokens(tokens_of(momentum.speech), token_queue.entries["speech_tokens"].shape[1])
    return queue_rows(momentum, ids) | {
        "speech_tokens": speech.tokens,
        "speech_lengths": speech.lengths,
        "image_tokens": momentum.image.tokens,
        "image_lengths": momentum.image.lengths,
    }


def _append_queue(gathered: Pair[Tokens], token_queue: EmbeddingQueue) -> Pair[Tokens]:
    """Append the token queue to the candidates of the global batch."""
    queued = token_queue.entries
    speech = pad_tokens(gathered.speech, queued["speech_tokens"].shape[1])
    image = gathered.image
    return Pair(
        speech=Tokens(
            tokens=_append(speech.tokens, queued["speech_tokens"]),
            lengths=_append(speech.lengths, queued["speech_lengths"]),
        ),
        image=Tokens(
            tokens=_append(image.tokens, queued["image_tokens"]),
            lengths=_append(image.lengths, queued["image_lengths"]),
        ),
    )


def _append(batch: jax.Array, queued: jax.Array) -> jax.Array:
    """Append queued rows in the type of the batch."""
    return jnp.concatenate([batch, queued.astype(batch.dtype)])
