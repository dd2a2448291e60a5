"""A persisted index: encode a gallery of images or recordings once, search it many times."""

import dataclasses
import io
from collections.abc import Sequence
from os import PathLike
from typing import Self

import numpy as np
from etils import epath

from c2f_jax.errors import UserError


@dataclasses.dataclass(frozen=True, repr=False)
class GalleryIndex:
    """Encoded gallery items.

    Attributes:
      kind: "image" or "speech".
      model: the run and step that encoded it, for messages.
      fingerprint: of the model, which must be that of the queries; see ``TrainedModel``.
      names: (G,) str, path or caption of each item.
      media: G small files (bytes), to show and play the answers.
      embeddings: (G, D) float32, L2-normalized.
      tokens: (G, T, W) token sequences for the fine stage.
      lengths: (G,) int32 valid tokens.
    """

    kind: str
    model: str
    names: Sequence[str]
    media: Sequence[bytes]
    embeddings: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    fingerprint: str = ""

    def save(self, path: str | PathLike[str]) -> None:
        """Write one .npz file, local or gs://, with tokens as float16.

        Raises:
          UserError: the file cannot be written.
        """
        # numpy has no ragged arrays: all files are joined, with the places where they begin.
        sizes = [len(data) for data in self.media]
        buffer = io.BytesIO()
        np.savez(
            buffer,
            kind=self.kind,
            model=self.model,
            fingerprint=self.fingerprint,
            names=np.array(self.names, dtype=np.str_),
            media=np.frombuffer(b"".join(self.media), np.uint8),
            offsets=np.cumsum([0, *sizes]),
            embeddings=self.embeddings,
            tokens=self.tokens.astype(np.float16),
            lengths=self.lengths,
        )

        file = epath.Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(buffer.getvalue())
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error}): give the path of a file"
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file of ``save``.

        Raises:
          UserError: the file is missing, or is not an index.
        """
        file = epath.Path(path)
        if not file.exists():
            raise UserError(f"{file} does not exist: make an index with `c2f index`")
        try:
            return cls._read(file.read_bytes())
        except Exception as error:  # numpy and zipfile raise nearly anything on damaged files
            raise UserError(
                f"{file} is not a readable index: make it again with `c2f index`"
            ) from error

    @classmethod
    def _read(cls, content: bytes) -> Self:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            data, offsets = stored["media"].tobytes(), stored["offsets"]
            index = cls(
                kind=str(stored["kind"]),
                model=str(stored["model"]),
                fingerprint=str(stored["fingerprint"]) if "fingerprint" in stored else "",
                names=[str(name) for name in stored["names"]],
                media=[data[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)],
                embeddings=stored["embeddings"],
                tokens=stored["tokens"].astype(np.float32),
                lengths=stored["lengths"],
            )

        # A file that was cut off or edited may still be a valid .npz.
        parts = (index.names, index.media, index.embeddings, index.tokens, index.lengths)
        if len({len(part) for part in parts}) > 1 or offsets[-1] != len(data):
            raise ValueError("its parts have different lengths")
        return index

    def __repr__(self) -> str:
        return f"GalleryIndex({len(self.names):,} {self.kind} items, encoded by {self.model})"
