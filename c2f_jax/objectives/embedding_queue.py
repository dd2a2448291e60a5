"""The embedding queue: a ring buffer of the latest momentum embeddings and image ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EmbeddingQueue:
    """The last K rows that were enqueued.

    Attributes:
      entries: name -> (K, ...) rows. C2F stores ``speech`` and ``image`` embeddings with their
        image ``id``; the token queue, which hard negatives are mined from, also stores momentum
        token sequences.
      cursor: int32 scalar, slot that the next row is written to.
      count: int32 scalar, rows written so far, at most K. Slots from ``count`` on were never
        written.
    """

    entries: dict[str, jax.Array]
    cursor: jax.Array
    count: jax.Array

    @property
    def size(self) -> int:
        """K, the number of slots."""
        return next(iter(self.entries.values())).shape[0]

    @property
    def valid(self) -> jax.Array:
        """(K,) bool, False for slots that were never written."""
        return jnp.arange(self.size) < self.count


def create_queue(size: int, rows: Mapping[str, Any]) -> EmbeddingQueue:
    """Make an empty queue.

    Args:
      size: K, the number of slots; 0 is legal.
      rows: name -> array or ShapeDtypeStruct (n, ...), what will be enqueued.

    Returns:
      EmbeddingQueue.

    Raises:
      ValueError: a negative size, or no rows.

    >>> create_queue(4, {"id": jnp.zeros((2,), jnp.int32)}).valid.tolist()
    [False, False, False, False]
    """
    if size < 0:
        raise ValueError(f"size is {size}; it must be at least 0")
    if not rows:
        raise ValueError("rows is empty; it must name at least one array")

    entries = {}
    for name, row in rows.items():
        entries[name] = jnp.zeros((size, *row.shape[1:]), row.dtype)
    return EmbeddingQueue(entries, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def enqueue(queue: EmbeddingQueue, rows: Mapping[str, jax.Array]) -> EmbeddingQueue:
    """Write n rows; the oldest ones fall out, as with ``collections.deque(maxlen=K).extend``.

    n need not divide K, and if n > K the last K rows stay. Under a device axis every device must
    write the same rows: gather them first.

    Args:
      queue: EmbeddingQueue with K slots.
      rows: name -> (n, ...), the same names and row shapes as the entries.

    Returns:
      The queue after the write.

    Raises:
      ValueError: names, row shapes or the numbers of rows differ.

    Reference:
      He et al. 2020 (MoCo), section 3.2, where K is a multiple of n.

    >>> queue = create_queue(3, {"id": jnp.zeros((2,), jnp.int32)})
    >>> for ids in ([1, 2], [3, 4]):
    ...     queue = enqueue(queue, {"id": jnp.array(ids)})
    >>> queue.entries["id"].tolist(), int(queue.cursor), int(queue.count)
    ([4, 2, 3], 1, 3)
    """
    _check_rows(queue, rows)
    size = queue.size
    if size == 0:
        return queue

    # Scatter by index: dynamic_update_slice would clamp at the end of the buffer, not wrap around.
    written = min(next(iter(rows.values())).shape[0], size)
    slots = (queue.cursor + jnp.arange(written)) % size
    entries = {}
    for name, entry in queue.entries.items():
        newest = jax.lax.stop_gradient(rows[name][-written:])
        entries[name] = entry.at[slots].set(newest.astype(entry.dtype))

    # The oldest row is at the cursor once the queue is full.
    cursor = (queue.cursor + written) % size
    return EmbeddingQueue(entries, cursor, jnp.minimum(queue.count + written, size))


def bank(batch_rows: jax.Array, queue: EmbeddingQueue, name: str) -> jax.Array:
    """Append the queue to the global batch: what queries are scored against.

    Args:
      batch_rows: (N, ...) rows of the global batch.
      queue: EmbeddingQueue with K slots.
      name: which of its entries.

    Returns:
      (N + K, ...) in the type of the batch.

    Raises:
      ValueError: the queue has no such entry, or rows of another shape.

    Reference:
      He et al. 2020 (MoCo), section 3.1.

    >>> queue = create_queue(2, {"id": jnp.zeros((1,), jnp.int32)})
    >>> bank(jnp.array([7]), queue, "id").tolist()
    [7, 0, 0]
    """
    if name not in queue.entries:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(queue.entries)}")
    queued = queue.entries[name]
    if batch_rows.shape[1:] != queued.shape[1:]:
        raise ValueError(
            f"batch_rows has shape {batch_rows.shape}; it must be (N, ...) with rows of shape "
            f"{queued.shape[1:]}, as the entry {name!r} of the queue"
        )
    return jnp.concatenate([batch_rows, queued.astype(batch_rows.dtype)])


def bank_valid(batch_size: int, queue: EmbeddingQueue) -> jax.Array:
    """Mark the columns of a bank that hold something: the batch's, and the written slots.

    Args:
      batch_size: N, rows of the global batch.
      queue: EmbeddingQueue with K slots.

    Returns:
      (N + K,) bool.

    >>> bank_valid(1, create_queue(2, {"id": jnp.zeros((1,), jnp.int32)})).tolist()
    [True, False, False]
    """
    return jnp.concatenate([jnp.ones((batch_size,), bool), queue.valid])


def _check_rows(queue: EmbeddingQueue, rows: Mapping[str, jax.Array]) -> None:
    """Raise ValueError unless rows fit the queue: names, shapes, one number of rows."""
    if set(rows) != set(queue.entries):
        raise ValueError(
            f"rows has the names {', '.join(rows)}; they must be {', '.join(queue.entries)}"
        )

    # jax would silently broadcast one row over all slots, or pair n rows with fewer ids.
    count = next(iter(rows.values())).shape[:1]
    for name, entry in queue.entries.items():
        expected = (*count, *entry.shape[1:])
        if rows[name].shape != expected:
            raise ValueError(f"rows[{name!r}] has shape {rows[name].shape}; it must be {expected}")
