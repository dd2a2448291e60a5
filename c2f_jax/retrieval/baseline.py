"""Embeddings that another model made, as files or arrays: read, checked and paired."""

import io
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from c2f_jax.data.files import content_hash
from c2f_jax.errors import UserError
from c2f_jax.models.c2f import Encoded
from c2f_jax.retrieval.encoded import EncodedSplit

ROUNDING = 1e-5  # of a norm; float32 keeps normalized rows closer to 1
SAVE = "save it as np.save(path, rows.astype(np.float32))"

Path = str | PathLike[str]


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all recordings or all images.

    Attributes:
      rows: (n, D) float32, L2-normalized.
      name: path of the file, or what an array is called.
      content: hash of the file, as ``b2sum -l 128`` prints it, or of what np.save writes of an
        array.
      was_normalized: whether the rows came normalized; if not, they were divided by their norms.
    """

    rows: np.ndarray
    name: str
    content: str
    was_normalized: bool

    def to_json(self) -> dict[str, Any]:
        """Return what a result says about them."""
        return {
            "file": self.name,
            "content": self.content,
            "rows": len(self.rows),
            "width": self.rows.shape[1],
            "was_normalized": self.was_normalized,
        }


def read_embeddings(values: ArrayLike | Path, name: str) -> Embeddings:
    """Read and normalize embeddings.

    Args:
      values: (n, D) float32 or float64, or the path of a .npy file of them, local or gs://.
      name: what an array is called in messages and results.

    Returns:
      The rows, each divided by its norm unless all norms are 1.

    Raises:
      UserError: the file cannot be read, or the array has another type or shape, or a row that is
        not finite or zero.
    """
    if isinstance(values, str | PathLike):
        name = str(values)
        array = _load(name)
        content = content_hash(name)
    else:
        array = np.asarray(values)
        written = io.BytesIO()
        np.save(written, array)
        content = content_hash(written.getvalue())
    _check_table(name, array)

    largest = np.abs(array).max(axis=1, keepdims=True).astype(np.float64)
    zero = np.flatnonzero(largest == 0)
    if len(zero):
        raise UserError(
            f"{name}: {len(zero):,} of {len(array):,} rows are zero, the first is row {zero[0]}; a "
            "zero row has no direction: embed what failed again"
        )
    # Scaled first, so that no square overflows or vanishes.
    scaled = array / largest
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    was_normalized = bool(np.all(np.abs(norms * largest - 1) <= ROUNDING))
    rows = array if was_normalized else scaled / norms
    return Embeddings(np.ascontiguousarray(rows, np.float32), name, content, was_normalized)


def read_ids(path: Path) -> np.ndarray:
    """Read ids.

    Args:
      path: .npy file of (n,) integers or text, or any other file with one id a line.

    Returns:
      (n,) integers or text.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    name = str(path)
    if name.endswith(".npy"):
        return _checked_ids(name, _load(name))
    try:
        lines = epath.Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as text, one id a line ({error})") from error
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise UserError(f"{name}: line {blank[0]} is empty; give one id a line, one for each row")
    return _checked_ids(name, np.array([line.strip() for line in lines], str))


def number_ids(speech_ids: ArrayLike, image_ids: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Number ids of any kind, equal ids alike.

    Args:
      speech_ids: (R,) integers or text: the image that each recording describes.
      image_ids: (G,) of the same kind.

    Returns:
      (R,) and (G,) int32.

    Raises:
      UserError: the ids are not (n,) integers or text, or one side is numbers and the other text.

    >>> number_ids(["b", "a", "b"], ["a", "b"])
    (array([1, 0, 1], dtype=int32), array([0, 1], dtype=int32))
    """
    speech = _checked_ids("the ids of the recordings", np.asarray(speech_ids))
    image = _checked_ids("the ids of the images", np.asarray(image_ids))
    if (speech.dtype.kind == "U") != (image.dtype.kind == "U"):
        raise UserError(
            f"the ids of the recordings are {_kind(speech)}, those of the images {_kind(image)}: "
            "give both as one kind"
        )
    if {speech.dtype.kind, image.dtype.kind} == {"i", "u"}:
        speech, image = speech.astype(str), image.astype(str)  # together they would become floats
    numbers = np.unique(np.concatenate([speech, image]), return_inverse=True)[1].astype(np.int32)
    return numbers[: len(speech)], numbers[len(speech) :]


def pair_embeddings(
    speech: Embeddings,
    image: Embeddings,
    speech_ids: np.ndarray,
    image_ids: np.ndarray,
    where: str,
) -> EncodedSplit:
    """Put embeddings and ids into an encoded split, without tokens.

    Args:
      speech: those of the recordings.
      image: those of the images.
      speech_ids: (R,) integers: the image that each recording describes.
      image_ids: (G,) integers.
      where: what the ids are of, for messages.

    Raises:
      UserError: the files are swapped, there is not one row for each item, or the widths differ.
    """
    rows, wanted = (len(speech.rows), len(image.rows)), (len(speech_ids), len(image_ids))
    if rows != wanted and rows == wanted[::-1]:
        raise UserError(
            f"{speech.name} has {rows[0]:,} rows and {image.name} has {rows[1]:,}, but {where} has "
            f"{wanted[0]:,} recordings and {wanted[1]:,} images: the two look swapped; give the "
            "recordings first"
        )
    sides = ((speech, "recordings", wanted[0]), (image, "images", wanted[1]))
    for side, kind, count in sides:
        if len(side.rows) != count:
            raise UserError(
                f"{side.name} has {len(side.rows):,} rows, but {where} has {count:,} {kind}: give "
                "one row for each, in their order"
            )
    if speech.rows.shape[1] != image.rows.shape[1]:
        raise UserError(
            f"{speech.name} has rows of {speech.rows.shape[1]:,} numbers, {image.name} of "
            f"{image.rows.shape[1]:,}: a cosine needs both in one space"
        )
    nothing: Any = None  # without tokens there is no fine stage
    encoded = [Encoded(side.rows, nothing, nothing) for side in (speech, image)]  # type: ignore[arg-type]
    return EncodedSplit(encoded[0], encoded[1], speech_ids, image_ids)


def _load(name: str) -> np.ndarray:
    """Load a .npy file without running anything that is in it."""
    try:
        with epath.Path(name).open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such file") from error
    except (OSError, EOFError, ValueError) as error:
        if "Object arrays" in str(error):
            raise UserError(
                f"{name} holds Python objects, as np.save writes rows of unequal length; {SAVE}"
            ) from error
        raise UserError(f"{name}: not a whole .npy file ({error}); {SAVE}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{name} is an archive of several arrays (.npz); {SAVE}")
    return array


def _check_table(name: str, array: np.ndarray) -> None:
    """Raise UserError unless an array is (n, D) float32 or float64, finite and not empty."""
    if array.dtype == np.float16:
        raise UserError(
            f"{name} is float16, whose rounding makes neighbors tie; save the model's float32 "
            "output, or rows.astype(np.float32) if it has none"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise UserError(f"{name} is {array.dtype}, not float32 or float64; {SAVE}")
    if array.ndim != 2 or not array.size:
        raise UserError(
            f"{name} has shape {array.shape}; it must be (rows, D): one row for each item"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise UserError(
            f"{name}: {len(bad):,} of {len(array):,} rows contain NaN or infinity, the first is "
            f"row {bad[0]}: embed what failed again"
        )


def _checked_ids(name: str, ids: np.ndarray) -> np.ndarray:
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iuU":
        raise UserError(
            f"{name}: must be (rows,) integers or text, one id for each row; got {ids.dtype} of "
            f"shape {ids.shape}"
        )
    return ids


def _kind(ids: np.ndarray) -> str:
    return "text" if ids.dtype.kind == "U" else "numbers"
