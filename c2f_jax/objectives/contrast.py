"""The contrastive stage: banks, SIC of each row against them, and its draw of hard negatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import is_known
from c2f_jax.objectives.collectives import AxisName, all_gather, is_sharded
from c2f_jax.objectives.contrastive import (
    Precision,
    branch_logits,
    sic_loss,
    sigmoid_loss,
    similarity_logits,
)
from c2f_jax.objectives.distillation import distillation_targets, identity_targets
from c2f_jax.objectives.embedding_queue import Queues, bank, bank_valid
from c2f_jax.objectives.hard_negatives import HardNegatives, sample_hard_negatives
from c2f_jax.objectives.keys import Site, fold_keys
from c2f_jax.objectives.negative_pool import NegativePool, pool_logits
from c2f_jax.objectives.pairs import Directions, Features, Pair, Rows


class Banks(NamedTuple):
    """What the queries are scored against: the global batch, then the queue; M = N + K columns.

    Attributes:
      speech: (M, D) momentum embeddings; online ones without a momentum model.
      image: (M, D), likewise.
      ids: (M,) int image ids.
      valid: (M,) bool, False for slots never written and for padding.
    """

    speech: jax.Array
    image: jax.Array
    ids: jax.Array
    valid: jax.Array


class Contrast(NamedTuple):
    """What the contrastive stage finds for each row.

    Attributes:
      loss: (n,) L_SIC.
      hit: (n,) float, whether the best column of speech to image is a positive.
      negatives: Pair of HardNegatives (n, m), drawn for the other modality; None without SIM.
    """

    loss: jax.Array
    hit: jax.Array
    negatives: Pair[HardNegatives] | None = None


class SicOptions(NamedTuple):
    """How SIC scores and mines; the names are those of ``c2f_losses``.

    Attributes:
      tau: temperature.
      alpha: weight of momentum distillation.
      id_policy: how columns of the same id count.
      negatives_per_row: m.
      mining_tau: temperature of mining; None for tau.
      sigmoid_bias: bias of the sigmoid loss; None for the softmax.
      branches: B.
      precision: of the similarities.
    """

    tau: jax.Array | float
    alpha: jax.Array | float
    id_policy: str
    negatives_per_row: int
    mining_tau: float | None
    sigmoid_bias: jax.Array | float | None
    branches: int
    precision: Precision


def make_banks(
    encoded: Pair[Features], rows: Rows, queues: Queues | None, axis_name: AxisName
) -> Banks:
    """Gather the embeddings and ids of the global batch and append the queue.

    Args:
      encoded: Pair of Features of this device's rows, by the momentum model if there is one.
      rows: Rows.
      queues: Queues, or None.
      axis_name: device axis.

    Returns:
      Banks.
    """
    # In device order, so that row r of device d is column d n + r.
    speech, image, ids, valid = all_gather(
        (encoded.speech.embedding, encoded.image.embedding, rows.ids, rows.valid), axis_name
    )
    if queues is None:
        return Banks(speech, image, ids, valid)
    queue = queues.embeddings
    return Banks(
        speech=bank(speech, queue, "speech"),
        image=bank(image, queue, "image"),
        ids=bank(ids, queue, "id"),
        valid=bank_valid(valid, queue),
    )


def contrast_rows(
    queries: Pair[jax.Array],
    momentum: Pair[jax.Array] | None,
    rows: Rows,
    banks: Banks,
    pool: NegativePool | None,
    options: SicOptions,
) -> Contrast:
    """Compute SIC of some rows and draw their hard negatives.

    Args:
      queries: Pair of (n, D) online embeddings.
      momentum: Pair of (n, D) momentum embeddings; None without a momentum model.
      rows: Rows of the queries.
      banks: Banks.
      pool: NegativePool; None without SIM.
      options: SicOptions.

    Returns:
      Contrast.
    """
    tau, precision = options.tau, options.precision

    # Hard targets: other captions of the same image may be positives, by the id policy.
    hard, valid = identity_targets(
        rows.ids, banks.ids, rows.numbers, banks.valid, options.id_policy
    )

    # Soft targets: what the momentum model finds similar. All branches together are the teacher.
    soft = Directions(s2i=hard, i2s=hard)
    if momentum is not None and is_used(options.alpha):
        momentum_s2i = similarity_logits(momentum.speech, banks.image, tau, precision)
        momentum_i2s = similarity_logits(momentum.image, banks.speech, tau, precision)
        soft = Directions(
            s2i=distillation_targets(momentum_s2i, hard, valid, options.alpha),
            i2s=distillation_targets(momentum_i2s, hard, valid, options.alpha),
        )

    # (n, D) . (D, M) -> (B, n, M): each branch has its own loss against the same targets.
    branch_s2i = branch_logits(queries.speech, banks.image, tau, options.branches, precision)
    branch_i2s = branch_logits(queries.image, banks.speech, tau, options.branches, precision)

    def loss_of_branch(s2i: jax.Array, i2s: jax.Array) -> jax.Array:
        if options.sigmoid_bias is None:
            return sic_loss(s2i, i2s, *soft, valid)
        losses = [sigmoid_loss(x + options.sigmoid_bias, hard > 0, valid) for x in (s2i, i2s)]
        return 0.5 * (losses[0] + losses[1])

    loss = jnp.mean(jax.vmap(loss_of_branch)(branch_s2i, branch_i2s), axis=0)

    # What retrieval ranks by: the mean cosine of the branches.
    logits = Directions(s2i=jnp.mean(branch_s2i, axis=0), i2s=jnp.mean(branch_i2s, axis=0))
    best = jnp.argmax(jnp.where(valid, logits.s2i, -jnp.inf), axis=-1)
    hit = (jnp.take_along_axis(hard, best[:, None], axis=-1)[:, 0] > 0).astype(jnp.float32)
    if pool is None:
        return Contrast(loss, hit)

    # Each direction has its own keys: equal keys would draw equal columns.
    def draw(site: Site, queries: jax.Array, queued: Any, logits: jax.Array) -> HardNegatives:
        scores = pool_logits(pool, logits, rows.numbers, queries, queued, tau, precision)
        if options.mining_tau is not None:
            # Logits are cosines over tau; rescaled, they are cosines over the mining temperature.
            scores = scores * (tau / options.mining_tau)
        keys = fold_keys(rows.keys, site)
        return sample_hard_negatives(
            keys, scores, rows.ids, pool.ids, pool.valid, options.negatives_per_row
        )

    queued = Pair(None, None) if pool.queued is None else pool.queued
    image = draw(Site.IMAGE_NEGATIVES, queries.speech, queued.image, logits.s2i)
    speech = draw(Site.SPEECH_NEGATIVES, queries.image, queued.speech, logits.i2s)
    return Contrast(loss, hit, Pair(speech=speech, image=image))


def map_rows(function: Callable[..., Contrast], rows: Any, chunk: int | None) -> Contrast:
    """Apply a function of rows a chunk at a time, recomputed in the backward pass.

    Args:
      function: of the rows; returns a pytree with leaves (n, ...).
      rows: tuple of pytrees with leaves (n, ...), Rows last.
      chunk: rows at a time; None for all at once.

    Returns:
      What the function returns for all rows.

    Raises:
      ValueError: the rows are sharded over explicit axes.
    """
    n = rows[-1].ids.shape[0]
    if chunk is None or chunk >= n:
        return function(*rows)
    if any(is_sharded(x) for x in jax.tree.leaves(rows)):
        raise ValueError(
            "chunk cannot cut rows that are sharded over explicit axes: use shard_map and axis_name"
        )

    # Whole chunks one after the other, then the remainder.
    function = jax.checkpoint(function)
    whole = n - n % chunk
    stacked = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), rows)
    found = jax.lax.map(lambda part: function(*part), stacked)
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    if whole == n:
        return found
    rest = function(*jax.tree.map(lambda x: x[whole:], rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, rest)


def is_used(alpha: jax.Array | float) -> bool:
    """Return False where the weight of distillation is known to be 0 while jax traces."""
    return not (is_known(alpha) and float(alpha) == 0)
