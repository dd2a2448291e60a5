"""An index as a folder of plain files.

The header lists chunks (see ``chunk.py``) with their checksums. Chunks are written once. What is
added, replaced or removed later goes into further chunks and into the header.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.chunk import Chunk, delete_chunk, write_chunk
from c2f_jax.galleries.gallery_index import GalleryIndex, Header
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.retrieval.ranking import Block

NOT_FULL = 0.5  # share of a full chunk below which chunks are joined


class IndexFolder(GalleryIndex):
    """An index whose rows are in chunks.

    Rows are numbered through all chunks; those of items that were removed stay, and are not alive.
    """

    store = "folder"

    def __init__(self, path: epath.Path, header: Header) -> None:
        super().__init__(path, header)
        self._entries: list[dict] = header.contents or []
        self._copies: tempfile.TemporaryDirectory | None = None  # of files of a bucket

    @property
    def contents(self) -> list[dict]:
        """What the header says of each chunk."""
        return self._entries

    @cached_property
    def rows(self) -> np.ndarray:
        """(n,) int64, the rows that can be found, rising."""
        return np.flatnonzero(self.alive)

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

    def items_of(self, rows: Sequence[int] | np.ndarray) -> list[Item]:
        """Return the items of some rows."""
        return [chunk.items[place] for chunk, place in map(self._find, rows)]

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

    def tokens_of(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the valid tokens (T, W) of each of some rows, bfloat16."""
        return [chunk.tokens(place) for chunk, place in map(self._find, rows)]

    def encoded(self, rows: Sequence[int]) -> EncodedItems:
        """Return all that is stored of some rows."""
        found = [chunk.encoded(np.array([place])) for chunk, place in map(self._find, rows)]
        return EncodedItems.join([self.nothing(), *found])

    def blocks(self) -> Iterator[Block]:
        """Yield rows, embeddings and which of them can be found, of a chunk at a time."""
        for chunk, start in zip(self.chunks, self.starts[:-1], strict=True):
            stop = start + len(chunk)
            yield np.arange(start, stop), chunk.embeddings, self.alive[start:stop]

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
        self.write_header()
        for name in ("chunks", "starts", "alive", "rows"):
            self.__dict__.pop(name, None)

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
