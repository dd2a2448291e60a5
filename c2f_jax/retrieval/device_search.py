"""Exact and approximate coarse search on accelerators that keep the gallery between calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from c2f_jax.retrieval.ranking import Block, inner_products

MOST_MEMORY = 0.5  # share of a device's free memory that the gallery may take
MOST_SCORES = 1 << 26  # that a device holds at once


class DeviceGallery:
    """Embeddings on the devices of this process, each with an equal share of the rows.

    Of equal scores the lower row is first. Memory holds the embeddings, and 2^26 scores a device.
    """

    def __init__(
        self, blocks: Iterable[Block], count: int, size: int, devices: list | None = None
    ) -> None:
        """Place a gallery on devices.

        Args:
          blocks: rows (n,), embeddings (n, D) and which of them can be found (n,) bool; in any
            order.
          count: number of rows that can be found.
          size: D.
          devices: where to; None for all devices of this process.
        """
        devices = devices or jax.local_devices()
        mesh = Mesh(np.array(devices), ("devices",))
        self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
        padded = -(-max(count, 1) // len(devices)) * len(devices)
        rows, embeddings, filled = np.empty(count, np.int64), np.zeros((padded, size), "f4"), 0
        for block_rows, block, wanted in blocks:
            stop = filled + int(wanted.sum())
            rows[filled:stop], embeddings[filled:stop] = block_rows[wanted], block[wanted]
            filled = stop
        # top_k takes the first of equals, which must be the lower row.
        order = np.argsort(rows, kind="stable")
        if (np.diff(order) != 1).any():
            embeddings[:count] = embeddings[order]
        self._rows = rows[order]
        self._embeddings = jax.device_put(embeddings, self._sharding)

    @staticmethod
    def fits(count: int, size: int) -> bool:
        """Return whether there are accelerators with room for a gallery.

        Args:
          count: its rows.
          size: D.
        """
        if jax.default_backend() == "cpu":
            return False
        devices = jax.local_devices()
        free = []
        for device in devices:
            memory = device.memory_stats() or {}
            free.append(memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0))
        return 4 * count * size / len(devices) < MOST_MEMORY * min(free)

    def top_k(
        self,
        queries: np.ndarray,
        k: int,
        chosen: np.ndarray | None = None,
        approximate: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k items nearest to each query by inner product.

        Args:
          queries: (Q, D), L2-normalized.
          k: items per query, at most the number of those that can be found.
          chosen: rows that can be found; None for all.
          approximate: whether a TPU may miss some, by ``jax.lax.approx_max_k``; on other devices
            the search is exact.

        Returns:
          Scores (Q, k) float32 and rows (Q, k) int64, best first.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = np.zeros(len(self._embeddings), bool)
        wanted[: len(self._rows)] = True if chosen is None else np.isin(self._rows, chosen)
        wanted = jax.device_put(wanted, self._sharding)
        shard = len(self._embeddings) // self._sharding.mesh.size
        approximate = approximate and jax.default_backend() == "tpu"

        # A shape is compiled once: the last queries are padded.
        chunk = min(len(queries), max(1, MOST_SCORES // shard))
        found = []
        for start in range(0, len(queries), chunk):
            part = np.zeros((chunk, queries.shape[1]), np.float32)
            part[: len(queries) - start] = queries[start : start + chunk]
            best = _top_k_of_shards(
                part, self._embeddings, wanted, min(k, shard), approximate, self._sharding.mesh
            )
            found.append(_merge(np.asarray(best[0]), np.asarray(best[1]), k))
        scores = np.concatenate([scores for scores, _ in found])[: len(queries)]
        places = np.concatenate([places for _, places in found])[: len(queries)]
        return scores, self._rows[places]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _top_k_of_shards(
    queries: jax.Array,
    embeddings: jax.Array,
    wanted: jax.Array,
    k: int,
    approximate: bool,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Return the k best of each shard: scores and places (Q, shards k)."""
    rows, columns = PartitionSpec("devices"), PartitionSpec(None, "devices")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=columns
    )
    def search(queries: jax.Array, items: jax.Array, wanted: jax.Array) -> tuple:
        scores = jnp.where(wanted, inner_products(queries, items), -jnp.inf)  # (Q, n)
        find = jax.lax.approx_max_k if approximate else jax.lax.top_k
        best, places = find(scores, k)
        return best, places + jax.lax.axis_index("devices") * len(items)

    return search(queries, embeddings, wanted)


def _merge(scores: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of all shards; stable, since the lower rows are in the first shards."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
