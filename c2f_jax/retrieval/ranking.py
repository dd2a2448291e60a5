"""Coarse ranking by cosine (SIC), with fixed shapes, so that each function compiles once.

Memory is bounded: a chunk of queries meets a chunk of the gallery at a time. Tie rule: among equal
scores the item that comes first in the gallery ranks first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from c2f_jax.errors import UserError
from c2f_jax.retrieval.checks import check_finite, check_rank

QUERY_CHUNK = 512
GALLERY_CHUNK = 8192
FIRST_PIECE = 1 << 14  # items that `top_k_of_blocks` scores at once; then twice as many, ...
LOWEST = np.finfo(np.float32).min
MOST_SCORES = 1 << 23  # that `top_k_of_blocks` holds at once

Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def coarse_top_k(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    chunk: int = QUERY_CHUNK,
    gallery_chunk: int = GALLERY_CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k gallery items nearest to each query by inner product.

    Args:
      queries: (Q, D), L2-normalized.
      gallery: (G, D), L2-normalized.
      k: items per query; cut to G.
      chunk: queries scored at once.
      gallery_chunk: gallery items scored at once; memory holds chunk x gallery_chunk scores.

    Returns:
      Scores (Q, k) float32 and gallery rows (Q, k) int32, best first.

    Raises:
      UserError: NaN or infinity, k < 1, an empty side, or shapes that do not fit.
    """
    queries, gallery = _checked_sides(queries, gallery)
    if k < 1:
        raise UserError(f"k must be at least 1, the number of items per query; got {k}")

    size = len(gallery)
    # Never more than there are items or queries, so that small inputs waste nothing.
    k = min(k, size)
    chunk, gallery_chunk = min(chunk, len(queries)), min(gallery_chunk, size)

    # The best k so far of each chunk of queries: scores and rows.
    nothing = jnp.full((chunk, k), -jnp.inf, jnp.float32), jnp.zeros((chunk, k), jnp.int32)
    best = [nothing] * -(-len(queries) // chunk)

    # The gallery is the outer loop: each of its blocks travels to the device once.
    for start, block in fixed_blocks(gallery, gallery_chunk):
        items = jnp.asarray(block)
        for number, (_, query_block) in enumerate(fixed_blocks(queries, chunk)):
            best[number] = _merge_top_k(query_block, items, start, size, *best[number])

    # The last chunk of queries was padded.
    scores = np.concatenate([np.asarray(part) for part, _ in best])
    rows = np.concatenate([np.asarray(part) for _, part in best])
    return scores[: len(queries)], rows[: len(queries)]


def top_k_of_blocks(
    queries: ArrayLike, blocks: Iterable[Block], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k items nearest to each query by inner product, in a gallery that comes in blocks.

    Args:
      queries: (Q, D), L2-normalized.
      blocks: rows (n,), embeddings (n, D) and which of them are wanted (n,) bool; in any order.
      k: items per query, at most the number of wanted ones.

    Returns:
      Scores (Q, k) float32 and rows (Q, k) int64, best first; of equal scores the lower row.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best, waiting, count = _Found.none(), [], 0
    worst = np.full(len(queries), -np.inf, np.float32)  # that may enter each list
    for rows, scores in _scored_pieces(queries, blocks) if k else ():
        size = len(rows)
        if size > k and np.isneginf(worst).any():
            # The k-th best of the first piece bounds what is worth sorting.
            worst = np.maximum(worst, np.partition(scores, size - k, axis=1)[:, size - k])
        # One that equals the worst enters if its row is lower.
        enters = scores >= np.maximum(worst, LOWEST)[:, None]
        flat = np.flatnonzero(enters)
        waiting.append(_Found(flat // size, scores.ravel()[flat], rows[flat % size]))
        count += len(flat)
        if count > k * len(queries):
            best, waiting, count = _Found.best([best, *waiting], k), [], 0
            worst = best.worst(worst, k)
    best = _Found.best([best, *waiting], k)
    return best.scores.reshape(len(queries), k), best.rows.reshape(len(queries), k)


class _Found(NamedTuple):
    """Items that may be among the nearest: number of the query, score and row of each, (n,)."""

    queries: np.ndarray
    scores: np.ndarray
    rows: np.ndarray

    @classmethod
    def none(cls) -> "_Found":
        return cls(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))

    @classmethod
    def best(cls, parts: Sequence["_Found"], k: int) -> "_Found":
        """Return the k best of each query, best first, one query after another."""
        queries, scores, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((rows, -scores, queries))
        queries = queries[order]
        places = np.arange(len(order)) - np.searchsorted(queries, queries)
        order = order[places < k]
        return cls(queries[places < k], scores[order], rows[order])

    def worst(self, worst: np.ndarray, k: int) -> np.ndarray:
        """Return the k-th score of the queries that have as many, for the others ``worst``."""
        counts = np.bincount(self.queries, minlength=len(worst))
        last = np.maximum(np.cumsum(counts) - 1, 0)
        return np.where(counts == k, self.scores[last], worst)


def _scored_pieces(
    queries: np.ndarray, blocks: Iterable[Block]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows (n,) and scores (Q, n) of pieces of a gallery, -inf for what is not wanted."""
    on_host = jax.default_backend() == "cpu"  # where jax would copy the block
    for rows, embeddings, wanted in blocks:
        # Small pieces first: once k items are known, few of the others are sorted.
        begin, size = 0, FIRST_PIECE
        while begin < len(embeddings):
            part = slice(begin, begin + size)
            piece = np.asarray(embeddings[part], np.float32)
            # (Q, D) . (D, n) -> (Q, n)
            if on_host and len(queries) == 1:
                # A product of one row is read from memory. The threads of BLAS would wait for each
                # other at each piece: 3 to 10 times as long where others use the processor too.
                scores = np.vecdot(piece, queries)[None]
            elif on_host:
                scores = queries @ piece.T
            else:
                scores = np.asarray(inner_products(jnp.asarray(queries), jnp.asarray(piece)))
            if not wanted[part].all():
                scores = np.where(wanted[part], scores, np.float32(-np.inf))
            yield rows[part], scores
            begin, size = begin + size, min(2 * size, MOST_SCORES // len(queries) + 1)


def first_relevant_rank(
    queries: ArrayLike,
    gallery: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    *,
    chunk: int = QUERY_CHUNK,
    gallery_chunk: int = GALLERY_CHUNK,
) -> np.ndarray:
    """Compute the exact coarse rank of each query's best correct item in the whole gallery.

    rank = 1 + #{wrong j: s_j > s*} + #{wrong j: s_j = s*, j < j*},

    where (s*, j*) is the best correct item, the first among equals. An item is correct if its id
    equals that of the query.

    Args:
      queries: (Q, D), L2-normalized.
      gallery: (G, D), L2-normalized.
      query_ids: (Q,) identities.
      gallery_ids: (G,) identities.
      chunk: queries scored at once.
      gallery_chunk: gallery items scored at once.

    Returns:
      (Q,) int64, from 1.

    Raises:
      UserError: a query has no correct item, an embedding is not finite, or shapes do not fit.
    """
    queries, gallery = _checked_sides(queries, gallery)
    dense_query_ids, dense_gallery_ids = _checked_ids(queries, gallery, query_ids, gallery_ids)
    chunk, gallery_chunk = min(chunk, len(queries)), min(gallery_chunk, len(gallery))

    def walk(step: Callable[..., tuple], carries: list[tuple]) -> list[tuple]:
        """Update the carry of each block of queries with each block of the gallery."""
        # -1 and -2 pad queries and gallery, so padding never matches.
        item_blocks = fixed_blocks(gallery, gallery_chunk)
        item_id_blocks = fixed_blocks(dense_gallery_ids, gallery_chunk, -2)
        for (start, items), (_, item_ids) in zip(item_blocks, item_id_blocks, strict=True):
            device_items = jnp.asarray(items)
            blocks = zip(
                fixed_blocks(queries, chunk), fixed_blocks(dense_query_ids, chunk, -1), strict=True
            )
            for number, ((_, block), (_, ids)) in enumerate(blocks):
                carries[number] = step(block, device_items, ids, item_ids, start, *carries[number])
        return carries

    # First the best correct item of each query, then the wrong items ahead of it.
    nothing = jnp.full(chunk, -jnp.inf), jnp.zeros(chunk, jnp.int32)
    best = walk(_best_relevant, [nothing] * -(-len(queries) // chunk))
    counted = walk(_count_ahead, [(*pair, jnp.ones(chunk, jnp.int32)) for pair in best])
    ranks = np.concatenate([np.asarray(rank) for *_, rank in counted])
    return ranks[: len(queries)].astype(np.int64)


def inner_products(queries: jax.Array, items: jax.Array) -> jax.Array:
    """Return the inner products (q, c) of queries (q, D) and items (c, D) in full float32.

    The defaults of TPU and GPU would round the ranking.
    """
    # (q, D) . (c, D) -> (q, c)
    return jnp.matmul(queries, items.T, precision=jax.lax.Precision.HIGHEST)


def fixed_blocks(rows: np.ndarray, size: int, fill: Any = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, block) over rows, every block of exactly ``size`` rows, the last padded."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        missing = size - len(block)
        if missing:
            padding = np.full((missing, *rows.shape[1:]), fill, rows.dtype)
            block = np.concatenate([block, padding])
        yield start, block


def _checked_sides(queries: ArrayLike, gallery: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return queries (Q, D) and gallery (G, D) as finite float32, or raise UserError."""
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    check_rank("queries", queries, "Q", "D")
    check_rank("gallery", gallery, "G", "D")
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries (Q, D) and gallery (G, D) must share D; got {queries.shape} and "
            f"{gallery.shape}"
        )
    if not len(queries) or not len(gallery):
        raise UserError(
            f"nothing to search: {len(queries)} queries and {len(gallery)} gallery items"
        )
    # NaN would silently rank first.
    check_finite("queries", queries)
    check_finite("gallery", gallery)
    return queries, gallery


def _checked_ids(
    queries: np.ndarray, gallery: np.ndarray, query_ids: ArrayLike, gallery_ids: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of both sides, renumbered from 0 to fit int32 whatever they were."""
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    check_rank("query_ids", query_ids, "Q")
    check_rank("gallery_ids", gallery_ids, "G")
    if len(query_ids) != len(queries) or len(gallery_ids) != len(gallery):
        raise UserError(
            f"{len(query_ids)} query ids for {len(queries)} queries and {len(gallery_ids)} gallery "
            f"ids for {len(gallery)} items; give one id each"
        )

    # A query without a correct item has no rank.
    orphans = np.flatnonzero(~np.isin(query_ids, gallery_ids))
    if len(orphans):
        raise UserError(
            f"{len(orphans)} queries have no correct item in the gallery, the first is query "
            f"{orphans[0]}, id {query_ids[orphans[0]]}; leave such queries out"
        )

    both = np.concatenate([query_ids, gallery_ids])
    dense = np.unique(both, return_inverse=True)[1].astype(np.int32)
    return dense[: len(queries)], dense[len(queries) :]


@jax.jit
def _merge_top_k(
    queries: jax.Array,
    items: jax.Array,
    start: int,
    size: int,
    best_scores: jax.Array,
    best_rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merge a block of the gallery into the best k of each query: scores and rows (q, k)."""
    rows = start + jnp.arange(items.shape[0], dtype=jnp.int32)
    scores = jnp.where(rows[None, :] < size, inner_products(queries, items), -jnp.inf)

    # Earlier blocks come first, and top_k takes the first of equals: ties keep gallery order.
    scores = jnp.concatenate([best_scores, scores], axis=1)
    rows = jnp.broadcast_to(rows[None, :], (queries.shape[0], rows.size))
    rows = jnp.concatenate([best_rows, rows], axis=1)
    top, places = jax.lax.top_k(scores, best_scores.shape[1])
    return top, jnp.take_along_axis(rows, places, axis=1)


@jax.jit
def _best_relevant(
    queries: jax.Array,
    items: jax.Array,
    query_ids: jax.Array,
    item_ids: jax.Array,
    start: int,
    best_score: jax.Array,
    best_row: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Update the best correct item of each query, (q,) score and row, with a gallery block."""
    right = query_ids[:, None] == item_ids[None, :]  # (q, c)
    scores = jnp.where(right, inner_products(queries, items), -jnp.inf)

    # argmax takes the first of equals, and only a higher score replaces an earlier block.
    row, score = start + scores.argmax(1).astype(jnp.int32), scores.max(1)
    better = score > best_score
    return jnp.where(better, score, best_score), jnp.where(better, row, best_row)


@jax.jit
def _count_ahead(
    queries: jax.Array,
    items: jax.Array,
    query_ids: jax.Array,
    item_ids: jax.Array,
    start: int,
    best_score: jax.Array,
    best_row: jax.Array,
    rank: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add to the rank of each query, (q,), the wrong items of a block ahead of its best match."""
    scores = inner_products(queries, items)
    rows = start + jnp.arange(items.shape[0], dtype=jnp.int32)

    # Padded items have a negative id.
    wrong = (query_ids[:, None] != item_ids[None, :]) & (item_ids[None, :] >= 0)
    tied_before = (scores == best_score[:, None]) & (rows[None, :] < best_row[:, None])
    ahead = wrong & ((scores > best_score[:, None]) | tied_before)
    return best_score, best_row, rank + ahead.sum(1, dtype=jnp.int32)
