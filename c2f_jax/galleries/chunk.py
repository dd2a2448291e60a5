"""A chunk of an index: three files that are written once and never changed.

``<name>.items.jsonl`` has a line for each item, ``<name>.embeddings.npy`` its embeddings, and
``<name>.details.safetensors`` tokens (bfloat16) and thumbnails with the places where those of a row
begin. Checksums of the first two and of what finds a row are in the header of the index; those of a
row's tokens and thumbnail are beside them, and checked when the row is read.
"""

import functools
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from c2f_jax.errors import UserError
from c2f_jax.galleries.item import EncodedItems, Item

_PLACES = ("token_ends", "token_crc", "thumbnail_ends", "thumbnail_crc")


def write_chunk(
    folder: epath.Path, name: str, items: Sequence[Item], encoded: EncodedItems
) -> dict[str, Any]:
    """Write the files of a chunk.

    Args:
      folder: folder of the index, local or gs://.
      name: name of the chunk.
      items: its items; those that are not left out are the rows, in order.
      encoded: the rows.

    Returns:
      What the header of the index says of it: name, rows and checksums.
    """
    import safetensors.numpy

    lines = "".join(json.dumps(item.to_json()) + "\n" for item in items).encode()
    embeddings = io.BytesIO()
    np.save(embeddings, np.ascontiguousarray(encoded.embeddings, np.float32))

    token_ends = np.cumsum(encoded.lengths, dtype=np.int64)
    thumbnail_ends = np.cumsum([len(data) for data in encoded.thumbnails], dtype=np.int64)
    rows = np.split(encoded.tokens, token_ends[:-1]) if len(encoded) else []
    details = {
        "tokens": np.ascontiguousarray(encoded.tokens),
        "thumbnails": np.frombuffer(b"".join(encoded.thumbnails), np.uint8),
        "token_ends": token_ends,
        "thumbnail_ends": thumbnail_ends,
        "token_crc": np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32),
        "thumbnail_crc": np.array(list(map(zlib.crc32, encoded.thumbnails)), np.uint32),
    }
    (folder / f"{name}.items.jsonl").write_bytes(lines)
    (folder / f"{name}.embeddings.npy").write_bytes(embeddings.getvalue())
    (folder / f"{name}.details.safetensors").write_bytes(safetensors.numpy.save(details))
    return {
        "name": name,
        "rows": len(encoded),
        "items_crc": zlib.crc32(lines),
        "embeddings_crc": zlib.crc32(embeddings.getvalue()),
        "places_crc": _crc_of_places(details),
    }


def delete_chunk(folder: epath.Path, name: str) -> None:
    """Delete the files of a chunk; those that are missing do no harm."""
    for ending in ("items.jsonl", "embeddings.npy", "details.safetensors"):
        (folder / f"{name}.{ending}").unlink(missing_ok=True)


@dataclass(frozen=True)
class Chunk:
    """A chunk on disk, which is read when it is asked for.

    Attributes:
      entry: what the header says of it.
      local: function that returns the local path of a file of the index.
    """

    entry: dict[str, Any]
    local: Callable[[str], Path]

    @property
    def name(self) -> str:
        """Name of the chunk."""
        return self.entry["name"]

    def __len__(self) -> int:
        return self.entry["rows"]

    @functools.cached_property
    def all_items(self) -> list[Item]:
        """Items of the chunk, those that are left out too."""
        path = self._file("items.jsonl")
        lines = path.read_bytes()
        _check(zlib.crc32(lines) == self.entry["items_crc"], path)
        return [Item.from_json(json.loads(line)) for line in lines.splitlines()]

    @functools.cached_property
    def items(self) -> list[Item]:
        """Item of each row."""
        return [item for item in self.all_items if item.left_out is None]

    @property
    def left_out(self) -> list[Item]:
        """Items that cannot be read, but for those that are gone."""
        gone = set(self.entry.get("forgotten", []))
        bad = [item for item in self.all_items if item.left_out is not None]
        return [item for item in bad if item.name not in gone]

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """(n, D) float32, memory-mapped."""
        path = self._file("embeddings.npy")
        _check(_crc_of_file(path) == self.entry["embeddings_crc"], path)
        return np.load(path, mmap_mode="r" if len(self) else None)  # nothing cannot be mapped

    def tokens(self, row: int) -> np.ndarray:
        """Return the tokens (T, W) of a row, bfloat16."""
        return self._row("token", row, self._details["tokens"])

    def thumbnail(self, row: int) -> bytes:
        """Return the small file of a row."""
        return self._row("thumbnail", row, self._details["thumbnails"]).tobytes()

    def encoded(self, rows: np.ndarray) -> EncodedItems:
        """Return some rows."""
        tokens = [self.tokens(row) for row in rows]
        return EncodedItems(
            [self.thumbnail(row) for row in rows],
            np.asarray(self.embeddings[rows]),
            np.concatenate([self._details["tokens"][:0], *tokens]),
            np.array(list(map(len, tokens)), np.int32),
        )

    def verify(self) -> None:
        """Read everything; raise UserError if a byte is not what was written."""
        _ = self.all_items, self.embeddings
        for row in range(len(self)):
            _ = self.tokens(row), self.thumbnail(row)

    def _file(self, ending: str) -> Path:
        return self.local(f"{self.name}.{ending}")

    def _row(self, kind: str, row: int, stored: np.ndarray) -> np.ndarray:
        ends = self._details[f"{kind}_ends"]
        found = stored[ends[row - 1] if row else 0 : ends[row]]
        valid = zlib.crc32(found.tobytes()) == self._details[f"{kind}_crc"][row]
        _check(valid, self._file("details.safetensors"))
        return found

    @functools.cached_property
    def _details(self) -> dict[str, np.ndarray]:
        path = self._file("details.safetensors")
        try:
            details = _map_safetensors(path)
            valid = _crc_of_places(details) == self.entry["places_crc"]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            valid = False
        _check(valid, path)
        return details


def _check(valid: bool, path: Path) -> None:
    if not valid:
        raise UserError(
            f"{path} is damaged: its checksum is another than when it was written. Delete the "
            "index and make it again with `c2f index`"
        )


def _crc_of_file(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _crc_of_places(details: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in _PLACES:
        crc = zlib.crc32(np.ascontiguousarray(details[name]).tobytes(), crc)
    return crc


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a .safetensors file; the library's numpy loader has no bfloat16."""
    import ml_dtypes

    types = {"BF16": ml_dtypes.bfloat16, "U8": np.uint8, "I64": np.int64, "U32": np.uint32}
    data = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    arrays = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + size + place for place in about["data_offsets"])
        arrays[name] = data[start:stop].view(types[about["dtype"]]).reshape(about["shape"])
    return arrays
