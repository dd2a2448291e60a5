"""A persisted index: encode a gallery of pictures or recordings once, query it many times."""

import dataclasses
import io

import numpy as np
from etils import epath

from c2f_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclasses.dataclass(frozen=True)
class GalleryIndex:
    """Encoded gallery items.

    Attributes:
      kind: "image" or "speech".
      model: the run and step that encoded it; a query must be encoded by the same.
      names: (G,) str, path or caption of each item.
      media: G encoded files (bytes), to show and play the answers.
      embeddings: (G, D) float32, L2-normalised.
      tokens: (G, T, W) token sequences for the fine stage.
      lengths: (G,) int32 valid tokens.
    """

    kind: str
    model: str
    names: list
    media: list
    embeddings: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    def save(self, path):
        """Write one .npz file, local or gs://; tokens as float16."""
        offsets = np.cumsum([0] + [len(m) for m in self.media])
        buffer = io.BytesIO()
        np.savez(
            buffer,
            kind=self.kind,
            model=self.model,
            names=np.array(self.names, dtype=np.str_),
            media=np.frombuffer(b"".join(self.media), np.uint8),
            offsets=offsets,
            embeddings=self.embeddings,
            tokens=self.tokens.astype(np.float16),
            lengths=self.lengths,
        )
        path = epath.Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error}): give the path of a file"
            ) from error

    @classmethod
    def load(cls, path):
        """Read a file of ``save``.

        Raises:
          UserError: missing or not an index.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path} does not exist: make an index with `c2f index`")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                data, offsets = stored["media"].tobytes(), stored["offsets"]
                index = cls(
                    str(stored["kind"]),
                    str(stored["model"]),
                    [str(name) for name in stored["names"]],
                    [data[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)],
                    stored["embeddings"],
                    stored["tokens"].astype(np.float32),
                    stored["lengths"],
                )
                rows = {
                    len(x)
                    for x in (
                        index.names,
                        index.media,
                        index.embeddings,
                        index.tokens,
                        index.lengths,
                    )
                }
                if len(rows) > 1 or offsets[-1] != len(data):
                    raise ValueError("its parts are of different lengths")
                return index
        except Exception as error:  # numpy and zipfile raise nearly anything on damaged files
            raise UserError(
                f"{path} is not an index that can be read: make it again with `c2f index`"
            ) from error


def list_media(folder, suffixes):
    """Paths of the files below ``folder`` with one of the suffixes, sorted.

    Raises:
      UserError: no such folder, or nothing in it.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = sorted(str(p) for p in _files(folder) if p.suffix.lower() in suffixes)
    if not found:
        raise UserError(f"{folder} holds no file that ends in {', '.join(suffixes)}")
    return found


def _files(folder):
    """All files below a folder; epath has no recursive glob."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
