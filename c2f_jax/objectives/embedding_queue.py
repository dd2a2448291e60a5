"""The embedding queue: a ring buffer of the latest momentum embeddings and image ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from c2f_jax.objectives.checks import check_arrays, check_ids, check_rows
from c2f_jax.objectives.pairs import Features, Pair, as_features


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EmbeddingQueue:
    """The last K rows that were enqueued.

    Attributes:
      entries: name -> pytree with leaves (K, ...). C2F stores ``speech`` and ``image`` embeddings
        with their image ``id``; the token queue, which hard negatives are mined from, also stores
        momentum token sequences. {} with K = 0: an array of no rows would end the compiler of jax
        0.11 on several devices.
      cursor: int32 scalar, slot that the next row is written to.
      count: int32 scalar, rows written so far, at most K. Slots from ``count`` on were never
        written.
    """

    entries: dict[str, Any]
    cursor: jax.Array
    count: jax.Array

    @property
    def size(self) -> int:
        """K, the number of slots."""
        leaves = jax.tree.leaves(self.entries)
        return leaves[0].shape[0] if leaves else 0

    @property
    def valid(self) -> jax.Array:
        """(K,) bool, False for slots that were never written."""
        return jnp.arange(self.size) < self.count


class Queues(NamedTuple):
    """The queues of C2F.

    Attributes:
      embeddings: K momentum embeddings of each modality and their image ids; SIC's banks end with
        them.
      tokens: the same with momentum tokens, for hard negatives from the queue. Often smaller.
    """

    embeddings: EmbeddingQueue
    tokens: EmbeddingQueue


def create_queue(size: int, rows: Mapping[str, Any]) -> EmbeddingQueue:
    """Make an empty queue.

    Args:
      size: K, the number of slots; with 0 the queue stays empty, whatever is enqueued.
      rows: name -> pytree of arrays or ShapeDtypeStructs (n, ...), what will be enqueued.

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

    entries = jax.tree.map(lambda row: jnp.zeros((size, *row.shape[1:]), row.dtype), dict(rows))
    entries = entries if size else {}
    return EmbeddingQueue(entries, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def create_queues(
    speech: Features, image: Features, ids: Any, *, size: int, token_size: int = 0
) -> Queues:
    """Make the empty queues of C2F for such features.

    Embeddings are kept in float32 and floating-point tokens in bfloat16.

    Args:
      speech: Features of arrays or ShapeDtypeStructs (n, ...), with tokens in their longest shape.
      image: likewise.
      ids: array or ShapeDtypeStruct (n,) of image ids.
      size: K, slots of the embedding queue; 0 for none.
      token_size: slots of the token queue; 0 unless negatives are mined from it.

    Returns:
      Queues.

    Raises:
      ValueError: a negative size.

    >>> features = Features(jnp.zeros((2, 4)), jnp.zeros((2, 9, 3)))
    >>> queues = create_queues(features, features, jnp.arange(2), size=6, token_size=5)
    >>> queues.embeddings.entries["speech"].shape, queues.tokens.entries["image_tokens"].shape
    ((6, 4), (5, 9, 3))
    """

    def stored_as(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        kept = dtype if is_float else jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(x.shape, kept)

    pair = Pair(as_features("speech", speech), as_features("image", image))
    rows, token_rows = _rows_to_keep(pair, ids)
    rows = jax.tree.map(lambda x: stored_as(x, jnp.float32), rows)
    token_rows = jax.tree.map(lambda x: stored_as(x, jnp.bfloat16), token_rows)
    return Queues(create_queue(size, rows), create_queue(token_size, rows | token_rows))


def enqueue_features(
    queues: Queues, momentum: Pair[Features], ids: jax.Array, valid: jax.Array | None = None
) -> Queues:
    """Write momentum features of the global batch into both queues.

    Args:
      queues: Queues.
      momentum: Pair of Features of N rows, the same on all devices. Tokens shorter than the queue's
        are padded with zeros.
      ids: (N,) int image ids.
      valid: (N,) bool, the rows to write; None for all.

    Returns:
      The queues after the write.

    Raises:
      ValueError: the features do not fit the queues.
    """
    rows, token_rows = _rows_to_keep(momentum, ids)
    tokens = queues.tokens
    if tokens.size:
        kept = {name: tokens.entries[name] for name in token_rows}
        tokens = enqueue(tokens, rows | pad_rows("momentum", token_rows, kept), valid)
    return Queues(enqueue(queues.embeddings, rows, valid), tokens)


def pad_rows(name: str, tree: Any, like: Any) -> Any:
    """Pad every leaf with zeros to the row shape of another tree.

    Args:
      name: what to call the tree in an error.
      tree: pytree with leaves (n, ...).
      like: pytree of the same structure with leaves (K, ...).

    Returns:
      The tree with leaves (n, ...) in the row shapes of ``like``.

    Raises:
      ValueError: the structures differ, or a leaf is larger than in ``like``.

    >>> pad_rows("tokens", jnp.ones((1, 2)), jnp.zeros((5, 3))).tolist()
    [[1.0, 1.0, 0.0]]
    """
    found, expected = str(jax.tree.structure(tree)), str(jax.tree.structure(like))
    if found != expected:
        raise ValueError(
            f"{name} is {found}; it must be {expected}, as what the queue was created with"
        )

    def pad(path: tuple, x: jax.Array, target: jax.Array) -> jax.Array:
        missing = [b - a for a, b in zip(x.shape[1:], target.shape[1:], strict=False)]
        if x.ndim != target.ndim or any(width < 0 for width in missing):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {x.shape}; its rows must fit into "
                f"{target.shape[1:]}, the shape that the queue was created with"
            )
        if not any(missing):
            return x
        return jnp.pad(x, [(0, 0), *((0, width) for width in missing)])

    return jax.tree_util.tree_map_with_path(pad, tree, like)


def enqueue(
    queue: EmbeddingQueue, rows: Mapping[str, Any], valid: jax.Array | None = None
) -> EmbeddingQueue:
    """Write n rows; the oldest ones fall out, as with ``collections.deque(maxlen=K).extend``.

    n need not divide K, and if n > K the last K rows stay. Under a device axis every device must
    write the same rows: gather them first.

    Args:
      queue: EmbeddingQueue with K slots.
      rows: name -> pytree with leaves (n, ...), the same names and row shapes as the entries.
      valid: (n,) bool, the rows to write; None for all. Leave out the padding of a batch, and rows
        that are not finite: a NaN would stay for K / n steps.

    Returns:
      The queue after the write.

    Raises:
      ValueError: names, row shapes, integer types or the numbers of rows differ.

    Reference:
      He et al. 2020 (MoCo), section 3.2, where K is a multiple of n.

    >>> queue = create_queue(3, {"id": jnp.zeros((2,), jnp.int32)})
    >>> for ids in ([1, 2], [3, 4]):
    ...     queue = enqueue(queue, {"id": jnp.array(ids)})
    >>> queue.entries["id"].tolist(), int(queue.cursor), int(queue.count)
    ([4, 2, 3], 1, 3)
    """
    n = _check_enqueued(queue, rows)
    if valid is not None:
        check_arrays(valid=(valid, f"bool[{n}]"))
    size = queue.size
    if size == 0:
        return queue

    # Where each row goes. Scattered by index: dynamic_update_slice would clamp at the end of the
    # buffer, not wrap around. A row that stays out gets slot K, which the scatter drops.
    written: int | jax.Array
    if valid is None:
        written = min(n, size)
        rows = jax.tree.map(lambda x: x[n - size if n > size else 0 :], dict(rows))
        slots = (queue.cursor + jnp.arange(written)) % size
    else:
        order = jnp.cumsum(valid, dtype=jnp.int32) - 1
        count = jnp.sum(valid, dtype=jnp.int32)
        skipped = jnp.maximum(count - size, 0)
        written = count - skipped
        slots = (queue.cursor + order - skipped) % size
        slots = jnp.where(valid & (order >= skipped), slots, size)

    def write(entry: jax.Array, newest: jax.Array) -> jax.Array:
        newest = jax.lax.stop_gradient(newest).astype(entry.dtype)
        return jnp.asarray(entry).at[slots].set(newest, mode="drop")

    # The oldest row is at the cursor once the queue is full.
    entries = jax.tree.map(write, queue.entries, dict(rows))
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
      ValueError: the queue has no such entry, or rows of another shape or integer type.

    Reference:
      He et al. 2020 (MoCo), section 3.1.

    >>> queue = create_queue(2, {"id": jnp.zeros((1,), jnp.int32)})
    >>> bank(jnp.array([7]), queue, "id").tolist()
    [7, 0, 0]
    """
    if queue.size == 0:
        return jnp.asarray(batch_rows)
    if name not in queue.entries:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(queue.entries)}")
    queued = queue.entries[name]
    if batch_rows.shape[1:] != queued.shape[1:]:
        raise ValueError(
            f"batch_rows has shape {batch_rows.shape}; it must be (N, ...) with rows of shape "
            f"{queued.shape[1:]}, as the entry {name!r} of the queue"
        )
    _check_integers("batch_rows", batch_rows, queued)
    return jnp.concatenate([batch_rows, queued.astype(batch_rows.dtype)])


def bank_valid(batch: int | jax.Array, queue: EmbeddingQueue) -> jax.Array:
    """Mark the columns of a bank that hold something: the batch's, and the written slots.

    Args:
      batch: N, rows of the global batch; or (N,) bool, False for the padding of a batch.
      queue: EmbeddingQueue with K slots.

    Returns:
      (N + K,) bool.

    Raises:
      ValueError: the mask has another shape or type.

    >>> bank_valid(1, create_queue(2, {"id": jnp.zeros((1,), jnp.int32)})).tolist()
    [True, False, False]
    """
    if isinstance(batch, int):
        batch = jnp.ones((batch,), bool)
    check_arrays(batch=(batch, "bool[N]"))
    return jnp.concatenate([batch, queue.valid])


def _rows_to_keep(momentum: Pair[Features], ids: jax.Array) -> tuple[dict, dict]:
    """Name what enters both queues, and what enters the token queue alone."""
    rows = {"id": ids, "speech": momentum.speech.embedding, "image": momentum.image.embedding}
    tokens = {"speech_tokens": momentum.speech.tokens, "image_tokens": momentum.image.tokens}
    return rows, tokens


def _check_enqueued(queue: EmbeddingQueue, rows: Mapping[str, Any]) -> int:
    """Raise ValueError unless rows fit the queue: names, shapes, one number of rows. Return it."""
    if queue.size and set(rows) != set(queue.entries):
        raise ValueError(
            f"rows has the names {', '.join(rows)}; they must be {', '.join(queue.entries)}"
        )

    # jax would silently broadcast one row over all slots, or pair n rows with fewer ids.
    count = jax.tree.leaves(dict(rows))[0].shape[:1]

    def check(path: tuple, entry: jax.Array, row: jax.Array) -> None:
        name = f"rows{jax.tree_util.keystr(path)}"
        expected = (*count, *entry.shape[1:])
        if row.shape != expected:
            raise ValueError(f"{name} has shape {row.shape}; it must be {expected}")
        _check_integers(name, row, entry)

    if queue.size:
        jax.tree_util.tree_map_with_path(check, queue.entries, dict(rows))
    check_rows("rows", dict(rows), *count)
    return count[0]


def _check_integers(name: str, rows: jax.Array, entry: jax.Array) -> None:
    """Raise ValueError where a conversion between integer types would change ids."""
    check_ids(name, rows)
    found, stored = jnp.result_type(rows), entry.dtype
    are_floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (found, stored)]
    if not all(are_floats) and found != stored:
        raise ValueError(f"{name} has type {found}; the queue was created with {stored}")
