"""An index as a table of LanceDB, for galleries of millions and approximate search.

The table ``rows.lance`` beside the header has a line for each row. The header names the version of
the table that the index is, so that a write that was interrupted leaves no trace: the next writer
goes on from that version. Each column of a row has its checksum, which is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.gallery_index import GalleryIndex, Header
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.retrieval.ranking import Block

TABLE = "rows"
CHECKED = ("item", "embedding", "tokens", "thumbnail")  # columns with a checksum each
MOST_REMOVED = 0.25  # share of the rows that may be dead before the table is written anew
MOST_KEPT = 1 << 32  # bytes of embeddings that stay in memory between searches
DELETED_AT_ONCE = 4096  # rows
FEWEST = 10_000  # rows that approximate search is for; fewer are searched exactly
MOST_UNINDEXED = 0.1  # share of the rows beyond which partitions are found anew
METRIC = "l2"  # of unit vectors: the order of cosine; partitions by "dot" would be of any size
PROBED = 0.25  # share of the partitions that approximate search looks into
FEWEST_PROBED = 20
ROWS_OF_PARTITION = 1000


class IndexTable(GalleryIndex):
    """An index whose rows are in a table of LanceDB.

    A row has a number that is not used again.
    """

    store = "lance"

    def __init__(self, path: epath.Path, header: Header) -> None:
        super().__init__(path, header)
        # Of the table: version, number of rows, checksum of their numbers, rows that are dead.
        nothing = {"version": None, "count": 0, "crc": 0, "removed": 0, "next": 0}
        self._state: dict[str, Any] = header.contents or {
            **nothing,
            "approximate": False,
            "left_out": [],
        }
        self._lancedb = _import_lancedb()

    @property
    def contents(self) -> dict[str, Any]:
        """What the header says of the table."""
        return self._state

    @cached_property
    def rows(self) -> np.ndarray:
        """(n,) int64, the rows that can be found, rising."""
        return np.sort(self._stored_rows)

    def items(self) -> Iterator[tuple[int, Item]]:
        """Yield the row and the item of all that can be found."""
        for batch in self._scan("item"):
            texts = _bytes_of(batch["item"])
            self._check(texts, batch["item_crc"])
            rows = batch["row"].to_numpy(zero_copy_only=False).tolist()
            yield from zip(rows, (Item.from_json(json.loads(text)) for text in texts), strict=True)

    def items_of(self, rows: Sequence[int] | np.ndarray) -> list[Item]:
        """Return the items of some rows."""
        return [Item.from_json(json.loads(text)) for text in self._take(rows, "item")["item"]]

    def left_out(self) -> list[Item]:
        """Return the items that cannot be read."""
        return [Item.from_json(values) for values in self._state["left_out"]]

    def thumbnail(self, row: int) -> bytes:
        """Return the small file that shows or plays an item."""
        return self._take([row], "thumbnail")["thumbnail"][0]

    def tokens_of(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the valid tokens (T, W) of each of some rows, bfloat16."""
        return list(map(self._as_tokens, self._take(rows, "tokens")["tokens"]))

    def encoded(self, rows: Sequence[int]) -> EncodedItems:
        """Return all that is stored of some rows."""
        if not len(rows):
            return self.nothing()
        found = self._take(rows, "embedding", "tokens", "thumbnail")
        tokens = list(map(self._as_tokens, found["tokens"]))
        return EncodedItems(
            found["thumbnail"],
            np.stack([np.frombuffer(data, np.float32) for data in found["embedding"]]),
            np.concatenate(tokens),
            np.array(list(map(len, tokens)), np.int32),
        )

    def blocks(self) -> Iterator[Block]:
        """Yield rows, embeddings and which of them can be found, a part of the table at a time."""
        if "_kept_blocks" in self.__dict__ or 4 * len(self) * self._size <= MOST_KEPT:
            yield from self._kept_blocks
        else:
            yield from self._read_blocks()

    def verify(self) -> None:
        """Read everything; raise UserError if it is not what was written."""
        seen = 0
        for batch in self._scan(*CHECKED):
            for name in CHECKED:
                self._check(_bytes_of(batch[name]), batch[f"{name}_crc"])
            seen += batch.num_rows
        if seen != len(self):
            raise self._damaged(f"{seen} rows of {len(self)}")
        if self._state["approximate"]:
            some = np.zeros((1, self._size), np.float32)
            self.approximate_top_k(some, min(1, len(self)))

    def add(self, items: Sequence[Item], encoded: EncodedItems, replaced: Iterable[str]) -> None:
        """Add rows by an append; see the base class."""
        table = self._delete(self._writable(), set(replaced))
        good = [item for item in items if item.left_out is None]
        if good:
            first = self._state["next"]
            numbers = np.arange(first, first + len(good))
            with self._guarded("written"):
                table.add(_lines(numbers, good, encoded))
            self._stored_rows = np.append(self._stored_rows, numbers)
            self._rows_by_name.update(zip((i.name for i in good), numbers.tolist(), strict=True))
            self._state["next"] = first + len(good)
        bad = [item.to_json() for item in items if item.left_out is not None]
        self._state["left_out"] = [*self._state["left_out"], *bad]
        self._commit(table)

    def remove(self, names: Iterable[str]) -> None:
        """Take items away."""
        self._commit(self._delete(self._writable(), set(names)))

    def finish(self, gallery: str, root: str | None) -> None:
        """Write the table anew if much of it is dead or in small parts; say complete."""
        self.about = dataclasses.replace(self.about, gallery=gallery, root=root)
        table = self._writable()
        with self._guarded("written"):
            parts = table.stats()["fragment_stats"]["num_fragments"]
            removed, full = self._state["removed"], self.about.chunk_rows
            crowded = parts > 8 + 2 * (len(self) // full)
            crowded |= removed > MOST_REMOVED * len(self) + full
            if crowded:
                # The version of the header must stay until the next header is written.
                table.optimize(cleanup_older_than=datetime.timedelta(days=365_000))
                # Rows are in another order there.
                self._state |= {"removed": 0, "version": table.version}
                self._forget("_table", "_stored_rows")
        self.complete = True
        self._commit(table)
        if crowded:
            with self._guarded("written"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of readers, which are told to open it again
                table.optimize(cleanup_older_than=datetime.timedelta(0), delete_unverified=True)
            self._commit(table)
        if self._state["approximate"]:
            self.build_approximate()

    def build_approximate(self) -> None:
        """Divide the rows into partitions of near ones (IVF), unless most are divided already."""
        from lancedb.index import IvfFlat

        table = self._writable()
        with self._guarded("written"):
            known = [index.name for index in table.list_indices()]
            unknown = table.index_stats(known[0]).num_unindexed_rows if known else len(self)
            if len(self) >= FEWEST and unknown > MOST_UNINDEXED * len(self):
                partitions = max(1, len(self) // ROWS_OF_PARTITION)
                config = IvfFlat(distance_type=METRIC, num_partitions=partitions)
                table.create_index("embedding", config=config, replace=True)
        self._state["approximate"] = True
        self._commit(table)

    def check_approximate(self) -> None:
        """Raise UserError unless the index is prepared for approximate search."""
        if not self._state["approximate"]:
            super().check_approximate()

    def approximate_top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find nearest items as ``search`` does, of which some may be missed."""
        if len(self) < FEWEST:
            return self.search(queries, k)
        queries = np.ascontiguousarray(queries, np.float32)
        probes = max(FEWEST_PROBED, int(PROBED * len(self) / ROWS_OF_PARTITION))
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), int)
        for number, query in enumerate(queries):
            found = self._near(query, k, probes)
            if len(found) < k:  # so few are in these partitions
                found = self._near(query, k, len(self))
            if len(found) != k:
                raise self._damaged(f"{len(found)} rows are found of {k}")
            embeddings = _bytes_of(found["embedding"])
            self._check(embeddings, found["embedding_crc"])
            near = np.frombuffer(b"".join(embeddings), np.float32).reshape(-1, self._size) @ query
            known = found["row"].to_numpy()
            order = np.lexsort((known, -near))
            scores[number], rows[number] = near[order], known[order]
        return scores, rows

    def _near(self, query: np.ndarray, k: int, probes: int) -> Any:
        """Return a record batch of the rows nearest to a query (D,) in the nearest partitions."""
        columns = ["row", "embedding", "embedding_crc", "_distance"]
        with self._guarded("read"):
            ask = self._table.search(query, vector_column_name="embedding").distance_type(METRIC)
            found = ask.nprobes(probes).limit(k).select(columns).to_arrow().combine_chunks()
            return found.to_batches()[0] if len(found) else found

    @property
    def _size(self) -> int:
        return self.about.embedding_size

    @cached_property
    def _table(self) -> Any:
        """The table, at the version of the header."""
        with self._guarded("read"):
            table = self._lancedb.connect(str(self.path)).open_table(TABLE)
            table.checkout(self._state["version"])
        return table

    @cached_property
    def _stored_rows(self) -> np.ndarray:
        """(n,) int64, the numbers of the rows in the order of the table."""
        if self._state["version"] is None:
            return np.zeros(0, np.int64)
        parts = [batch["row"].to_numpy() for batch in self._scan()]
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
        if len(rows) != self._state["count"] or _crc_of_rows(rows) != self._state["crc"]:
            raise self._damaged("other rows than were written")
        return rows

    @cached_property
    def _rows_by_name(self) -> dict[str, int]:
        """Row of each item, while the index is changed."""
        return {item.name: row for row, item in self.items()}

    @cached_property
    def _kept_blocks(self) -> list[Block]:
        return list(self._read_blocks())

    def _read_blocks(self) -> Iterator[Block]:
        for batch in self._scan("embedding"):
            data = _bytes_of(batch["embedding"])
            self._check(data, batch["embedding_crc"])
            embeddings = np.frombuffer(b"".join(data), np.float32).reshape(-1, self._size)
            yield batch["row"].to_numpy(), embeddings, np.ones(len(data), bool)

    def _scan(self, *columns: str) -> Iterator[Any]:
        """Yield record batches of the whole table: rows, and columns with their checksums."""
        if self._state["version"] is None:
            return
        names = ["row", *columns, *(f"{name}_crc" for name in columns)]
        with self._guarded("read"):
            batches = self._table.search().select(names).limit(None).to_batches()
        while True:
            with self._guarded("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _take(self, rows: Sequence[int] | np.ndarray, *columns: str) -> dict[str, list[bytes]]:
        """Return columns of some rows, in their order, as bytes."""
        if not len(rows):
            return {name: [] for name in columns}
        order = np.argsort(self._stored_rows)
        places = order[np.searchsorted(self._stored_rows, rows, sorter=order)]
        different, back = np.unique(places, return_inverse=True)  # the table returns them in order
        names = ["row", *columns, *(f"{name}_crc" for name in columns)]
        with self._guarded("read"):
            taken = self._table.take_offsets(different.tolist()).select(names).to_arrow()
        if not np.array_equal(taken["row"].to_numpy()[back], rows):
            raise self._damaged("other rows than were written")
        found = {}
        for name in columns:
            data = _bytes_of(taken[name].combine_chunks())
            self._check(data, taken[f"{name}_crc"])
            found[name] = [data[place] for place in back]
        return found

    def _as_tokens(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, ml_dtypes.bfloat16).reshape(-1, self.about.token_width)

    def _writable(self) -> Any:
        """Open the table to change it, without what an interrupted write has left."""
        with self._guarded("written"):
            database = self._lancedb.connect(str(self.path))
            version = self._state["version"]
            if version is None:
                return database.create_table(TABLE, schema=_schema(self._size), mode="overwrite")
            table = database.open_table(TABLE)
            if table.version != version:
                table.restore(version)
        return table

    def _delete(self, table: Any, names: set[str]) -> Any:
        """Delete the rows of items from the table, which it returns."""
        if not names:
            return table
        bad = [values for values in self._state["left_out"] if values["name"] not in names]
        self._state["left_out"] = bad
        found = [self._rows_by_name.pop(name, None) for name in names]
        gone = sorted(row for row in found if row is not None)
        with self._guarded("written"):
            for start in range(0, len(gone), DELETED_AT_ONCE):
                part = ", ".join(map(str, gone[start : start + DELETED_AT_ONCE]))
                table.delete(f"row in ({part})")
        self._stored_rows = self._stored_rows[~np.isin(self._stored_rows, gone)]
        self._state["removed"] += len(gone)
        return table

    def _commit(self, table: Any) -> None:
        """Make a version of the table the index, on disk and here."""
        rows = self._stored_rows
        with self._guarded("written"):
            version = table.version
        self._state |= {"version": version, "count": len(rows), "crc": _crc_of_rows(rows)}
        self._forget("_table", "_kept_blocks", "rows")
        self.write_header()

    def _forget(self, *names: str) -> None:
        for name in names:
            self.__dict__.pop(name, None)

    def _check(self, data: Sequence[bytes], checksums: Any) -> None:
        """Raise UserError unless columns have their checksums."""
        found = np.fromiter(map(zlib.crc32, data), np.uint32, len(data))
        if not np.array_equal(found, checksums.to_numpy()):
            raise self._damaged("its checksum is another than when it was written")

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path / TABLE}.lance is damaged ({what}), or was changed since it was opened: "
            "open it again, or delete the index and make it again with `c2f index`"
        )

    def _guarded(self, verb: str) -> _Guard:
        return _Guard(lambda error: self._failed(verb, error))

    def _failed(self, verb: str, error: BaseException) -> UserError:
        if verb == "read":
            return self._damaged(str(error).splitlines()[0] if str(error) else "it is missing")
        return UserError(f"{self.path / TABLE}.lance cannot be written: {error}")


class _Guard:
    """Turns what LanceDB raises into a UserError."""

    def __init__(self, convert: Callable[[BaseException], UserError]) -> None:
        self.convert = convert

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        # LanceDB raises ValueError, RuntimeError and OSError, and for a bug of its own a
        # PanicException, which is no Exception.
        panic = kind is not None and kind.__name__ == "PanicException"
        if error is not None and (panic or isinstance(error, Exception)):
            if not isinstance(error, UserError | ImportError):
                raise self.convert(error) from error


def _import_lancedb() -> Any:
    """Import LanceDB, which says on standard error what it creates unless told not to."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        import lancedb
    except ImportError as error:
        raise UserError(
            'an index in a table needs LanceDB: pip install "c2f_jax[index]"'
        ) from error
    return lancedb


def _schema(size: int) -> Any:
    """Return the columns of a row; D is ``size``."""
    import pyarrow as pa

    columns = {
        "row": pa.int64(),
        "name": pa.string(),
        "item": pa.string(),
        "embedding": pa.list_(pa.float32(), size),
        "tokens": pa.binary(),
        "length": pa.int32(),
        "thumbnail": pa.binary(),
    }
    checksums = {f"{name}_crc": pa.uint32() for name in CHECKED}
    return pa.schema([pa.field(name, kind, False) for name, kind in (columns | checksums).items()])


def _lines(rows: np.ndarray, items: Sequence[Item], encoded: EncodedItems) -> Any:
    """Return the rows of a table."""
    import pyarrow as pa

    embeddings = np.ascontiguousarray(encoded.embeddings, np.float32)
    stored = np.ascontiguousarray(encoded.tokens)
    parts = np.split(stored, np.cumsum(encoded.lengths)[:-1])
    texts = [json.dumps(item.to_json()) for item in items]
    columns = {
        "item": [text.encode() for text in texts],
        "embedding": [row.tobytes() for row in embeddings],
        "tokens": [part.tobytes() for part in parts],
        "thumbnail": list(map(bytes, encoded.thumbnails)),
    }
    checksums = {f"{name}_crc": list(map(zlib.crc32, data)) for name, data in columns.items()}
    size = embeddings.shape[1]
    values = {
        "row": rows,
        # For other programs; characters that are not UTF-8 are right in "item".
        "name": [item.name.encode(errors="replace").decode() for item in items],
        "item": texts,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), size),
        "tokens": columns["tokens"],
        "length": encoded.lengths,
        "thumbnail": columns["thumbnail"],
        **checksums,
    }
    schema = _schema(size)
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, schema.field(name).type)
        for name, value in values.items()
    ]
    return pa.table(arrays, schema=schema)


def _bytes_of(column: Any) -> list[bytes]:
    """Return the content of each row of an Arrow column; an embedding as its float32."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        rows = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        return [row.tobytes() for row in rows]
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    return column.to_pylist()


def _crc_of_rows(rows: np.ndarray) -> int:
    return zlib.crc32(np.sort(rows).astype(np.int64).tobytes())
