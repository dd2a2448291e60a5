"""An index: a gallery that is encoded once and searched many times, whatever it is stored in.

``index.json`` is the header: which model encoded the items and how they were prepared for it, what
stores the rows, and which of them belong to the index. It is written last and as a whole, so that
an index is complete up to its last change whenever its writer is stopped.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.item import EncodedItems, Item
from c2f_jax.galleries.item_filter import ItemTable
from c2f_jax.retrieval.device_search import DeviceGallery
from c2f_jax.retrieval.ranking import Block, top_k_of_blocks

FORMAT, VERSION = "c2f_jax index", 1
HEADER = "index.json"
LOCK = "index.lock"


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


@dataclass(frozen=True)
class Header:
    """Content of ``index.json``.

    Attributes:
      about: what the index is of.
      complete: whether its last update came to its end.
      store: what stores the rows: "folder" or "lance".
      contents: which rows belong to the index, in the terms of that store.
    """

    about: About
    complete: bool
    store: str
    contents: Any


class GalleryIndex(abc.ABC):
    """An index on disk or in a bucket.

    An item has a row, a number that is its own until ``finish``. ``folder`` and ``lance`` differ in
    where rows are kept; searches give the same answers.

    Attributes:
      store: its name in the header.
      path: its folder.
      about: what it is of.
      complete: whether its last update came to its end.
    """

    store: ClassVar[str]

    def __init__(self, path: epath.Path, header: Header) -> None:
        self.path, self.about, self.complete = path, header.about, header.complete
        self._selected: dict[str, np.ndarray] = {}

    @property
    @abc.abstractmethod
    def contents(self) -> Any:
        """What the header says of the rows."""

    @property
    @abc.abstractmethod
    def rows(self) -> np.ndarray:
        """(n,) int64, the rows that can be found, rising."""

    @abc.abstractmethod
    def items(self) -> Iterator[tuple[int, Item]]:
        """Yield the row and the item of all that can be found."""

    @abc.abstractmethod
    def items_of(self, rows: Sequence[int] | np.ndarray) -> list[Item]:
        """Return the items of some rows."""

    @abc.abstractmethod
    def left_out(self) -> list[Item]:
        """Return the items that cannot be read."""

    @abc.abstractmethod
    def thumbnail(self, row: int) -> bytes:
        """Return the small file that shows or plays an item."""

    @abc.abstractmethod
    def tokens_of(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the valid tokens (T, W) of each of some rows, bfloat16."""

    @abc.abstractmethod
    def encoded(self, rows: Sequence[int]) -> EncodedItems:
        """Return all that is stored of some rows."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Yield rows, embeddings and which of them can be found, a part of the index at a time."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Read everything; raise UserError if it is not what was written."""

    @abc.abstractmethod
    def add(self, items: Sequence[Item], encoded: EncodedItems, replaced: Iterable[str]) -> None:
        """Add items in one step, after which an interrupted update goes on.

        Args:
          items: the items; those that are not left out are the rows, in order.
          encoded: the rows.
          replaced: names of items that are taken away at the same time.
        """

    @abc.abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Take items away."""

    @abc.abstractmethod
    def finish(self, gallery: str, root: str | None) -> None:
        """Make room that is not needed free, and say complete.

        Args:
          gallery: the gallery, as messages name it.
          root: absolute path of its folder, which may have moved.
        """

    def build_approximate(self) -> None:
        """Prepare approximate search of all rows.

        Raises:
          UserError: the store has none.
        """
        raise UserError(
            f"{self.path}: approximate search needs --store=lance; in a folder, and on a TPU "
            "always, search is fast without one"
        )

    def __len__(self) -> int:
        """Return the number of items that can be found."""
        return len(self.rows)

    def __repr__(self) -> str:
        about, name = self.about, type(self).__name__
        return f"{name}({self.path}, {len(self):,} {about.kind} items, by {about.model})"

    def item(self, row: int) -> Item:
        """Return the item of a row."""
        return self.items_of([row])[0]

    def file_of(self, item: Item) -> str:
        """Return the path of an item's file, or its id in a data set."""
        root, name = self.about.root, item.name
        if root is None or "://" in name or os.path.isabs(name):  # a manifest may list any path
            return name
        return f"{root}/{name}"

    def tokens(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of some rows for the fine stage.

        Args:
          rows: n rows.

        Returns:
          (n, max_tokens, W) bfloat16, zeros behind the valid ones, and their numbers (n,) int32.
        """
        found = self.tokens_of(rows)
        lengths = np.array(list(map(len, found)), np.int32)
        shape = len(found), self.about.max_tokens, self.about.token_width
        padded = np.zeros(shape, ml_dtypes.bfloat16)
        for target, tokens in zip(padded, found, strict=True):
            target[: len(tokens)] = tokens
        return padded, lengths

    def search(
        self, queries: np.ndarray, k: int, where: str | None = None, approximate: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest items of each query by cosine.

        Args:
          queries: (Q, D), L2-normalized.
          k: items per query; cut to the number of items.
          where: SQL condition on the metadata, such as ``date > '2025'``.
          approximate: whether some of the nearest may be missed, to search faster. Where there is
            a condition, or few items, the search is exact all the same.

        Returns:
          Cosines (Q, k) float32 and rows (Q, k) int64, best first; of equal ones the first row.

        Raises:
          UserError: the condition cannot be understood, a file is damaged, or the index is not
            prepared for approximate search.
        """
        chosen = self._select(where) if where else None
        k = min(k, len(self) if chosen is None else len(chosen))
        if self._on_devices is not None:
            return self._on_devices.top_k(queries, k, chosen, approximate)
        if approximate:
            self.check_approximate()
            if chosen is None:
                return self.approximate_top_k(queries, k)
        return top_k_of_blocks(queries, self._chosen_blocks(chosen), k)

    def count(self, where: str | None = None) -> int:
        """Return the number of items that meet a condition; see ``search``."""
        return len(self._select(where)) if where else len(self)

    def check_approximate(self) -> None:
        """Raise UserError unless the index is prepared for approximate search."""
        raise UserError(
            f"{self.path} is not prepared for approximate search: make an index by `c2f index "
            "--store=lance --approximate`, or search without --approximate"
        )

    def approximate_top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find nearest items as ``search`` does, of which some may be missed."""
        raise NotImplementedError

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

    def nothing(self) -> EncodedItems:
        """Return no rows, in the shapes of this index."""
        return EncodedItems(
            [],
            np.zeros((0, self.about.embedding_size), np.float32),
            np.zeros((0, self.about.token_width), ml_dtypes.bfloat16),
            np.zeros(0, np.int32),
        )

    def write_header(self) -> None:
        """Make ``about``, ``complete`` and ``contents`` those of the index on disk."""
        for kept in ("_on_devices", "_table"):
            self.__dict__.pop(kept, None)
        self._selected = {}
        header = Header(self.about, self.complete, self.store, self.contents)
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"
        if "://" in str(self.path):  # an object of a bucket is replaced as a whole
            (self.path / HEADER).write_text(text)
            return
        written = self.path / f"{HEADER}.part"
        written.write_text(text)
        written.replace(self.path / HEADER)

    def _select(self, where: str) -> np.ndarray:
        """Return the rows (n,) that meet a condition; the last condition is remembered."""
        if where not in self._selected:
            self._selected = {where: np.array(self._table.select(where), np.int64)}
        return self._selected[where]

    def _chosen_blocks(self, chosen: np.ndarray | None) -> Iterator[Block]:
        """Yield the blocks, of which only chosen rows can be found; None for all."""
        if chosen is None:
            yield from self.blocks()
            return
        member = np.zeros(self.rows[-1] + 1 if len(self) else 0, bool)
        member[chosen] = True
        for rows, embeddings, wanted in self.blocks():
            # Rows behind the last are of items that were removed.
            wanted = wanted & member[np.minimum(rows, len(member) - 1)]
            yield rows, embeddings, wanted

    @cached_property
    def _table(self) -> ItemTable:
        """What conditions are asked of; reading a million items takes some seconds."""
        return ItemTable(self.items())

    @cached_property
    def _on_devices(self) -> DeviceGallery | None:
        """The embeddings on the accelerators, if there are any and they have the room."""
        size = self.about.embedding_size
        if not DeviceGallery.fits(len(self), size):
            return None
        return DeviceGallery(self.blocks(), len(self), size)


def read_header(path: str | PathLike[str]) -> Header:
    """Read the header of an index.

    Raises:
      UserError: it is missing, damaged, or written by a later version.
    """
    folder = epath.Path(path)
    try:
        data = (folder / HEADER).read_bytes()
    except OSError as error:
        what = "is not an index" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: make an index with `c2f index`") from error
    try:
        stored = json.loads(data.decode())
        checksum = stored.pop("checksum")
        if stored.get("format") != FORMAT or checksum != _checksum(stored):
            raise ValueError
        version, about = stored["version"], About(**stored["about"])
        if version <= VERSION:
            return Header(about, stored["complete"], stored["store"], stored["contents"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder / HEADER} is damaged: delete the index and make it again with `c2f index`"
        ) from error
    raise UserError(
        f"{folder} was written by a later c2f_jax (format {version}, this one reads "
        f"{VERSION}): install that, or make the index again"
    )


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps({name: content[name] for name in sorted(content) if name != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()
