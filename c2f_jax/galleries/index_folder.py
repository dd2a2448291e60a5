"""An index: a gallery that is encoded once and searched many times, as a folder of plain files.

``index.json`` is the header: which model encoded the items and how they were prepared for it, and
the list of chunks (see ``chunk.py``) with their checksums. Chunks are written once. What is added,
replaced or removed later goes into further chunks and into the header, which is written last and as
a whole, so that an index is complete up to its last chunk whenever its writer is stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.chunk import Chunk, delete_chunk, write_chunk
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.galleries.item_filter import select_rows
from c2f_jax.retrieval.ranking import top_k_of_blocks

FORMAT, VERSION = "c2f_jax index", 1
HEADER = "index.json"
LOCK = "index.lock"
NOT_FULL = 0.5  # share of a full chunk below which chunks are joined


@dataclass(frozen=True)
class About:
    """What an index is of.

    Attributes:
      kind: "image" or "speech".
      gallery: folder, data set or manifest, as a message names it.
      root: absolute path of the folder that the names of items are below; None for a data set.
      model: the run and step that encoded it, for messages.
      fingerprint: of the model, which must be that of the queries; see ``TrainedModel``.
      preprocessing: how items are prepared for the model.
      embedding_size: D, entries of an embedding.
      token_width: W, entries of a token.
      max_tokens: the most tokens that an item has.
      chunk_rows: items of a full chunk.
    """

    kind: str
    gallery: str
    root: str | None
    model: str
    fingerprint: str
    preprocessing: Mapping[str, Any]
    embedding_size: int
    token_width: int
    max_tokens: int
    chunk_rows: int


class IndexFolder:
    """An index on disk or in a bucket.

    Rows are numbered through all chunks; those of items that were removed stay, and are not alive.

    Attributes:
      path: its folder.
      about: what it is of.
      complete: whether its last update came to its end.
    """

    def __init__(self, path: epath.Path, about: About, complete: bool, chunks: list[dict]) -> None:
        self.path, self.about, self.complete = path, about, complete
        self._entries = chunks
        self._copies: tempfile.TemporaryDirectory | None = None  # of files of a bucket

    @classmethod
    def create(cls, path: str | PathLike[str], about: About) -> IndexFolder:
        """Make an empty index.

        Args:
          path: its folder, local or gs://, which must be missing or empty.
          about: what it is of.

        Raises:
          UserError: there is something else, or the folder cannot be made.
        """
        folder = epath.Path(path)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} holds something else: give a path that does not exist")
            folder.mkdir(parents=True, exist_ok=True)
            index = cls(folder, about, complete=False, chunks=[])
            index._write_header()
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error}): give the path of a folder"
            ) from error
        return index

    @classmethod
    def open(cls, path: str | PathLike[str]) -> IndexFolder:
        """Open an index; its chunks are read when they are asked for.

        Raises:
          UserError: it is missing, damaged, or written by a later version.
        """
        folder = epath.Path(path)
        try:
            text = (folder / HEADER).read_text()
        except OSError as error:
            what = "is not an index" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {what}: make an index with `c2f index`") from error
        try:
            stored = json.loads(text)
            checksum = stored.pop("checksum")
            if stored.get("format") != FORMAT or checksum != _checksum(stored):
                raise ValueError
            version = stored["version"]
            if version <= VERSION:
                return cls(folder, About(**stored["about"]), stored["complete"], stored["chunks"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{folder / HEADER} is damaged: delete the index and make it again with `c2f index`"
            ) from error
        raise UserError(
            f"{folder} was written by a later c2f_jax (format {version}, this one reads "
            f"{VERSION}): install that, or make the index again"
        )

    @staticmethod
    def exists(path: str | PathLike[str]) -> bool:
        """Return whether there is an index at a path."""
        return (epath.Path(path) / HEADER).exists()

    def __len__(self) -> int:
        """Return the number of items that can be found."""
        return int(self.alive.sum())

    def __repr__(self) -> str:
        about = self.about
        return f"IndexFolder({self.path}, {len(self):,} {about.kind} items, by {about.model})"

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks, in the order of their rows."""
        return [Chunk(entry, self._local) for entry in self._entries]

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of each chunk, and the number of all rows."""
        return np.cumsum([0, *map(len, self.chunks)])

    @cached_property
    def alive(self) -> np.ndarray:
        """(rows,) bool, False for items that were removed or replaced."""
        alive = np.ones(self.starts[-1], bool)
        for entry, start in zip(self._entries, self.starts[:-1], strict=True):
            alive[start + np.array(entry.get("removed", []), int)] = False
        return alive

    def item(self, row: int) -> Item:
        """Return the item of a row."""
        chunk, place = self._find(row)
        return chunk.items[place]

    def items(self) -> Iterator[tuple[int, Item]]:
        """Yield the row and the item of all that can be found."""
        for chunk, start in zip(self.chunks, self.starts[:-1], strict=True):
            for place, item in enumerate(chunk.items):
                if self.alive[start + place]:
                    yield int(start + place), item

    def left_out(self) -> list[Item]:
        """Return the items that cannot be read."""
        return [item for chunk in self.chunks for item in chunk.left_out]

    def thumbnail(self, row: int) -> bytes:
        """Return the small file that shows or plays an item."""
        chunk, place = self._find(row)
        return chunk.thumbnail(place)

    def tokens(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of some rows for the fine stage.

        Args:
          rows: n rows.

        Returns:
          (n, max_tokens, W) bfloat16, zeros behind the valid ones, and their numbers (n,) int32.
        """
        found = []
        for row in rows:
            chunk, place = self._find(row)
            found.append(chunk.tokens(place))
        lengths = np.array(list(map(len, found)), np.int32)
        shape = len(found), self.about.max_tokens, self.about.token_width
        padded = np.zeros(shape, ml_dtypes.bfloat16)
        for target, tokens in zip(padded, found, strict=True):
            target[: len(tokens)] = tokens
        return padded, lengths

    def encoded(self, rows: Sequence[int]) -> EncodedItems:
        """Return all that is stored of some rows."""
        parts = []
        for row in rows:
            chunk, place = self._find(row)
            parts.append(chunk.encoded(np.array([place])))
        nothing = EncodedItems(
            [],
            np.zeros((0, self.about.embedding_size), np.float32),
            np.zeros((0, self.about.token_width), ml_dtypes.bfloat16),
            np.zeros(0, np.int32),
        )
        return EncodedItems.join([nothing, *parts])

    def search(
        self, queries: np.ndarray, k: int, where: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest items of each query by cosine, exactly.

        Args:
          queries: (Q, D), L2-normalized.
          k: items per query; cut to the number of items.
          where: SQL condition on the metadata, such as ``date > '2025'``.

        Returns:
          Cosines (Q, k) float32 and rows (Q, k) int64, best first; of equal ones the first row.

        Raises:
          UserError: the condition cannot be understood, or a file is damaged.
        """
        wanted = self._wanted(where)
        blocks = (
            (start, chunk.embeddings, wanted[start : start + len(chunk)])
            for chunk, start in zip(self.chunks, self.starts[:-1], strict=True)
        )
        return top_k_of_blocks(queries, blocks, min(k, int(wanted.sum())))

    def count(self, where: str | None = None) -> int:
        """Return the number of items that meet a condition; see ``search``."""
        return int(self._wanted(where).sum())

    def verify(self) -> None:
        """Read all files; raise UserError if a byte is not what was written."""
        for chunk in self.chunks:
            chunk.verify()

    def add(self, items: Sequence[Item], encoded: EncodedItems, replaced: Iterable[str]) -> None:
        """Add a chunk.

        Args:
          items: its items; those that are not left out are the rows, in order.
          encoded: the rows.
          replaced: names of items that are taken away at the same time.
        """
        name = self._next_name()
        entry = write_chunk(self.path, name, items, encoded)
        self._remove(set(replaced))
        self._commit([*self._entries, entry])

    def remove(self, names: Iterable[str]) -> None:
        """Take items away."""
        self._remove(set(names))
        self._commit(self._entries)

    def finish(self, gallery: str, root: str | None) -> None:
        """Join small chunks, drop rows that are not alive where they are many, and say complete.

        Args:
          gallery: the gallery, as messages name it.
          root: absolute path of its folder, which may have moved.
        """
        self.about = dataclasses.replace(self.about, gallery=gallery, root=root)
        full = self.about.chunk_rows
        kept: list[Chunk] = []
        small: list[tuple[Chunk, int, int]] = []
        for chunk, start in zip(self.chunks, self.starts[:-1], strict=True):
            living = int(self.alive[start : start + len(chunk)].sum())
            if living > NOT_FULL * full:
                kept.append(chunk)
            else:
                small.append((chunk, start, living))
        entries, dropped = self._entries, []
        crowded = len(small) > 1 or any(living < len(chunk) for chunk, _, living in small)
        if crowded:
            entries = [chunk.entry for chunk in kept]
            entries += self._joined([(chunk, start) for chunk, start, _ in small])
            dropped = [chunk.name for chunk, *_ in small]
        self.complete = True
        self._commit(entries)
        for name in dropped:
            delete_chunk(self.path, name)

    def _wanted(self, where: str | None) -> np.ndarray:
        """Return (rows,) bool, True for items that can be found and meet a condition."""
        if not where:
            return self.alive
        wanted = np.zeros_like(self.alive)
        wanted[select_rows(self.items(), where)] = True
        return wanted

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from changing the index meanwhile, on machines that share its file locks.

        Raises:
          UserError: another process is changing it.
        """
        if "://" in str(self.path):
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self.path} is being changed by another process: wait for its end"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
        try:
            yield
        finally:
            lock.release()

    def _joined(self, small: Sequence[tuple[Chunk, int]]) -> list[dict]:
        """Write the living rows of small chunks into as few as hold them; return their entries."""
        items: list[Item] = []
        parts: list[EncodedItems] = []
        entries: list[dict] = []

        def write() -> None:
            if items:
                name = self._next_name(len(entries))
                joined = EncodedItems.join(parts)
                entries.append(write_chunk(self.path, name, items, joined))
            items.clear()
            parts.clear()

        for chunk, start in small:
            places = np.flatnonzero(self.alive[start : start + len(chunk)])
            if sum(map(len, parts)) + len(places) > self.about.chunk_rows:
                write()
            items += [*(chunk.items[place] for place in places), *chunk.left_out]
            parts.append(chunk.encoded(places))
        write()
        return entries

    def _remove(self, names: set[str]) -> None:
        """Note in the entries that items are gone."""
        if not names:
            return
        for chunk in self.chunks:
            gone = [place for place, item in enumerate(chunk.items) if item.name in names]
            if gone:
                removed = {*chunk.entry.get("removed", []), *gone}
                chunk.entry["removed"] = sorted(removed)
            gone_bad = names.intersection(item.name for item in chunk.left_out)
            if gone_bad:
                forgotten = {*chunk.entry.get("forgotten", []), *gone_bad}
                chunk.entry["forgotten"] = sorted(forgotten)

    def _next_name(self, ahead: int = 0) -> str:
        last = max((int(entry["name"]) for entry in self._entries), default=-1)
        return f"{last + 1 + ahead:06d}"

    def _commit(self, entries: list[dict]) -> None:
        """Make the entries those of the index, on disk and here."""
        self._entries = entries
        self._write_header()
        for name in ("chunks", "starts", "alive"):
            self.__dict__.pop(name, None)

    def _write_header(self) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "about": dataclasses.asdict(self.about),
            "chunks": self._entries,
        }
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"
        if "://" in str(self.path):  # an object of a bucket is replaced as a whole
            (self.path / HEADER).write_text(text)
            return
        written = self.path / f"{HEADER}.part"
        written.write_text(text)
        written.replace(self.path / HEADER)

    def _find(self, row: int) -> tuple[Chunk, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.chunks[number], int(row - self.starts[number])

    def _local(self, name: str) -> Path:
        """Return the local path of a file, a copy if it is in a bucket."""
        source = self.path / name
        try:
            if "://" not in str(self.path):
                source.stat()
                return Path(source)
            if self._copies is None:
                self._copies = tempfile.TemporaryDirectory(prefix="c2f-index-")
            copy = Path(self._copies.name) / name
            if not copy.exists():
                copy.write_bytes(source.read_bytes())
            return copy
        except OSError as error:
            raise UserError(
                f"{source} is missing, or cannot be read ({error}): delete the index and make it "
                "again with `c2f index`"
            ) from error


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps({name: content[name] for name in sorted(content) if name != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()
