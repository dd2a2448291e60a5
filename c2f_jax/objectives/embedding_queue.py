"""The embedding queue: a ring buffer of the latest momentum embeddings and ids, kept in the train state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class EmbeddingQueue(NamedTuple):
    """The last K rows that were enqueued.

    Attributes:
      entries: name -> (K, ...) rows. C2F stores ``speech`` and ``image`` embeddings with their image ``id``; the
        queue of the ``queue`` negatives also stores momentum token sequences.
      cursor: int32 [], slot that the next row is written to.
      count: int32 [], rows written so far, at most K. Slots at ``count`` and above were never written.
    """

    entries: dict[str, jax.Array]
    cursor: jax.Array
    count: jax.Array

    @property
    def size(self):
        """K, the number of slots."""
        return next(iter(self.entries.values())).shape[0]

    @property
    def valid(self):
        """(K,) bool, False for slots that were never written."""
        return jnp.arange(self.size) < self.count


def create_queue(size, rows):
    """An empty queue with ``size`` slots (0 is legal).

    Args:
      size: K.
      rows: name -> array or ShapeDtypeStruct (n, ...): what will be enqueued.

    >>> create_queue(4, {"id": jnp.zeros((2,), jnp.int32)}).valid.tolist()
    [False, False, False, False]
    """
    entries = {name: jnp.zeros((size, *row.shape[1:]), row.dtype) for name, row in rows.items()}
    return EmbeddingQueue(entries, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def enqueue(queue, rows):
    """Write n rows, the oldest ones falling out; equals ``collections.deque(maxlen=K).extend``.

    n and K are free: n need not divide K, and of n > K rows the last K stay.

    Args:
      queue: EmbeddingQueue with K slots.
      rows: name -> (n, ...), the same names as the entries.

    Source: He et al. 2020 (MoCo), section 3.2, there with K a multiple of n.

    >>> queue = create_queue(3, {"id": jnp.zeros((2,), jnp.int32)})
    >>> for ids in ([1, 2], [3, 4]):
    ...     queue = enqueue(queue, {"id": jnp.array(ids)})
    >>> queue.entries["id"].tolist(), int(queue.cursor), int(queue.count)
    ([4, 2, 3], 1, 3)
    """
    size = queue.size
    if size == 0:
        return queue
    written = min(next(iter(rows.values())).shape[0], size)
    # Scatter by index: dynamic_update_slice would clamp at the end of the buffer instead of wrapping around.
    slots = (queue.cursor + jnp.arange(written)) % size
    entries = {
        name: entry.at[slots].set(jax.lax.stop_gradient(rows[name][-written:]).astype(entry.dtype))
        for name, entry in queue.entries.items()
    }
    return EmbeddingQueue(
        entries, (queue.cursor + written) % size, jnp.minimum(queue.count + written, size)
    )


def bank(batch_rows, queue, name):
    """What queries are scored against: the global batch, then the queue; (N, ...), (K, ...) -> (N + K, ...)."""
    return jnp.concatenate([batch_rows, queue.entries[name].astype(batch_rows.dtype)])


def bank_valid(batch_size, queue):
    """(N + K,) bool: the batch's columns and the written slots of the queue."""
    return jnp.concatenate([jnp.ones((batch_size,), bool), queue.valid])
