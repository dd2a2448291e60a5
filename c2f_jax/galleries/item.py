"""What an index knows of an item, and what it holds of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Metadata = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Item:
    """An image or a recording of a gallery.

    Attributes:
      name: path below the folder of the gallery, or id in a data set.
      stamp: [state, hash of the content] by which a change is found, see ``data.files.Stamp``.
      metadata: what can be asked for: "date", "width", "caption", ...
      notes: [kind, detail] of each oddity in how it was read.
      left_out: [kind, reason] if it cannot be read; such an item has no row.
    """

    name: str
    stamp: Sequence[Any]
    metadata: Metadata = dataclasses.field(default_factory=dict)
    notes: Sequence[Sequence[str]] = ()
    left_out: Sequence[str] | None = None

    @property
    def content(self) -> str:
        """Hash of the content."""
        return self.stamp[1]

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Item:
        """Read what ``to_json`` returned."""
        return cls(**values)


@dataclass(frozen=True)
class EncodedItems:
    """The rows of a chunk or of a whole index: what is encoded of each item.

    Attributes:
      thumbnails: n small files (bytes) that show or play the items.
      embeddings: (n, D) float32, L2-normalized.
      tokens: (sum of lengths, W) bfloat16, the valid tokens of all items, one after another.
      lengths: (n,) number of tokens of each.
    """

    thumbnails: Sequence[bytes]
    embeddings: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.embeddings)

    @classmethod
    def join(cls, parts: Sequence[EncodedItems]) -> EncodedItems:
        """Return the rows of all parts, in order."""
        return cls(
            [thumbnail for part in parts for thumbnail in part.thumbnails],
            np.concatenate([part.embeddings for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )
