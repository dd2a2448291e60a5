"""Encoded images to square RGB arrays."""

import dataclasses
import datetime
import io
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from c2f_jax.decoding.audio import read_bytes
from c2f_jax.decoding.image_modes import Note, color_notes, load_rgb
from c2f_jax.decoding.image_repair import repairs
from c2f_jax.decoding.jpeg_data import JpegWatch
from c2f_jax.errors import BadFileError, missing_extra

MOST_PIXELS = 100_000_000  # larger images are treated as decompression bombs

# No others: one of Pillow's readers starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# The format that the end of a name promises. The content decides.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIF"),
    ".webp": "WEBP",
    ".gif": "GIF",
}
RESIZE = ("square", "short_side", "squash")

Box = tuple[float, float, float, float]  # left, top, width, height

_ORIENTATION = 274  # a tag of EXIF and of TIFF, as are the next
_EXIF, _TAKEN, _CHANGED = 0x8769, 36867, 306
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BLANK = 8  # of 255; pixels that differ by more show something
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """A whole image, and how it was read.

    Attributes:
      rgb: the image, RGB.
      notes: kind and detail of each oddity, see `data_check.findings.KINDS`.
      size: width and height of all its pixels; those of rgb may be fewer.
      date: when it was taken, as "2026-05-31 17:45:00"; None if its EXIF does not say.
    """

    rgb: Image.Image
    notes: tuple[Note, ...]
    size: tuple[int, int]
    date: str | None


def decode_image(
    data: bytes | str,
    size: int,
    *,
    resize: str = "square",
    resize_side: int = 0,
    name: str | None = None,
) -> np.ndarray:
    """Decode an image and make it square.

    Args:
      data: the encoded bytes, or a path.
      size: side of the square in pixels.
      resize: how it becomes a square, see `make_square`.
      resize_side: length of the short side for "short_side"; 0 for size.
      name: what error messages call it; by default the path.

    Returns:
      uint8 (size, size, 3) RGB.

    Raises:
      BadFileError: as `read_image`.
    """
    # The other ways follow references that decode at full scale.
    rgb = open_rgb(data, size, reduce=resize == "square", name=name)
    return make_square(rgb, size, resize=resize, resize_side=resize_side)


def make_square(
    rgb: Image.Image, size: int, *, resize: str = "square", resize_side: int = 0
) -> np.ndarray:
    """Make an image square, with antialiased bicubic interpolation.

    Args:
      rgb: the image.
      size: side of the square in pixels.
      resize: "square" takes the largest center square. Published networks saw others: with
        "short_side" the short side is resized to resize_side and the center cut out (CLIP, DINOv2),
        with "squash" the whole image is resized to a square (BLIP-2, SigLIP).
      resize_side: length of the short side for "short_side"; 0 for size.

    Returns:
      uint8 (size, size, 3).
    """
    if resize == "squash":
        return resize_box(rgb, (0, 0, *rgb.size), size)
    if resize == "short_side":
        return _short_side(rgb, resize_side or size, size)
    return resize_box(rgb, center_square(*rgb.size), size)


def center_square(width: int, height: int) -> Box:
    """Return the largest center square of an image."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side


def open_rgb(
    data: bytes | str, size: int, *, reduce: bool = True, name: str | None = None
) -> Image.Image:
    """Decode a whole image, without the notes of `read_image`.

    Args:
      data: the encoded bytes, or a path.
      size: side in pixels that it will be resized to.
      reduce: see `read_image`.
      name: what error messages call it; by default the path.

    Returns:
      The image, RGB.

    Raises:
      BadFileError: as `read_image`.
    """
    return read_image(data, size, reduce=reduce, name=name).rgb


def read_image(
    data: bytes | str, size: int, *, reduce: bool = True, name: str | None = None
) -> DecodedImage:
    """Decode a whole image, and note what is odd about it.

    Reads the formats in `FORMATS`, and HEIC with the extra `heif`; the content decides, not the
    name. The image is rotated as its EXIF tag says, transparency becomes white, 16 bits become 8,
    and colors become sRGB. Of several images in a file the first is read. Metadata that cannot be
    read are ignored. A JPEG may lack a hundredth of its pixels at the end.

    Args:
      data: the encoded bytes, or a path.
      size: side in pixels that it will be resized to.
      reduce: whether to decode large JPEGs at a reduced scale, with sides of 2 * size or more.
      name: what error messages call it; by default the path.

    Returns:
      The image and the notes.

    Raises:
      BadFileError: the file is missing, unreadable, cut off or larger than 100 million pixels, or
        needs an extra that is not installed.
    """
    name = name or (data if isinstance(data, str) else "image")
    encoded = data if isinstance(data, bytes) else read_bytes(data)
    if not encoded:
        raise BadFileError(f"{name}: the file is empty", "zero length")

    side = 2 * size if reduce else None
    try:
        return _read(encoded, side, name)
    except BadFileError:
        raise
    except Exception as e:  # Pillow's plugins raise nearly anything on damaged files
        problem = e

    for repaired, note in repairs(encoded):
        try:
            image = _read(repaired, side, name)
        except BadFileError:
            raise
        except Exception:
            continue
        others = [other for other in image.notes if other[0] != note[0]]
        return dataclasses.replace(image, notes=(note, *others))

    if isinstance(problem, UnidentifiedImageError):
        message = f"{name}: not a readable image; {_advice(encoded)}"
        raise BadFileError(message, "unreadable") from problem
    if isinstance(problem, Image.DecompressionBombError):
        raise BadFileError(f"{name}: {problem}", "too large") from problem
    kind = "truncated" if "truncated" in str(problem) else "unreadable"
    raise BadFileError(f"{name}: not a readable image ({problem})", kind) from problem


def _read(encoded: bytes, side: int | None, name: str) -> DecodedImage:
    """Decode an image; raise whatever Pillow does.

    Args:
      encoded: content of the file.
      side: sides in pixels that a reduced JPEG must have; None for all pixels.
      name: what error messages call it.
    """
    formats = _formats(encoded, name)
    notes: list[Note] = []
    with Image.open(io.BytesIO(encoded), formats=formats) as image:
        if image.width * image.height > MOST_PIXELS:
            raise BadFileError(
                f"{name}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} "
                "are allowed",
                "too large",
            )
        _refuse_raw(image, name)
        content = "JPEG" if image.format == "MPO" else image.format
        if SUFFIXES.get(PurePath(name).suffix.lower(), content) != content:
            notes.append(("wrong suffix", f"the content is {content}"))
        if getattr(image, "is_animated", False):
            which = "main one" if image.format in ("HEIF", "AVIF") else "first"
            notes.append(("several images", f"the {which} is used"))
        if image.format == "PNG" and encoded.rfind(b"IEND") < 0:
            notes.append(("last bytes missing", "the PNG has no end, but all pixels"))
        # An interrupted download may be filled with zeros, which these decode without complaint.
        if content in ("WEBP", "AVIF", "HEIF"):
            zeros = len(encoded) - len(encoded.rstrip(b"\0"))
            if zeros > max(16, len(encoded) / 100):
                notes.append(("zeros at the end", f"{zeros:,} bytes"))

        size = image.size
        # JPEG decodes at a half, a quarter or an eighth of its size for less time.
        if side is not None:
            image.draft(image.mode, (side, side))
        watch = JpegWatch(image, encoded, size[1]) if content == "JPEG" else None
        rgb, odd = load_rgb(image, lambda: Image.open(io.BytesIO(encoded), formats=formats))
        odd += watch.notes() if watch else color_notes(encoded, image)
        # Pillow turns a TIFF while loading, unless the orientation is of an unusual type.
        turn = _orientation(image, notes)
        if turn in _TURNS:
            rgb = rgb.transpose(_TURNS[turn])
        if (rgb.width > rgb.height) != (size[0] > size[1]):  # turned by a quarter
            size = size[::-1]
        if _is_one_color(rgb):
            odd.append(("one color", f"no two pixels differ by more than {_BLANK} of 255"))
        return DecodedImage(rgb, (*notes, *odd), size, _date(image))


def _is_one_color(rgb: Image.Image) -> bool:
    """Return whether there is nothing to see."""
    # A few pixels tell for nearly all images.
    width, height = rgb.size
    few: Any = [rgb.getpixel((width * k // 5, height * k // 5)) for k in (0, 2, 4)]
    if max(max(values) - min(values) for values in zip(*few, strict=True)) > _BLANK:
        return False
    ranges: Any = rgb.getextrema()
    return max(high - low for low, high in ranges) <= _BLANK


def _formats(encoded: bytes, name: str) -> tuple[str, ...]:
    """Return the formats that Pillow may take a file for."""
    if encoded[4:8] != b"ftyp" or encoded[8:12] not in _HEIC or b"avif" in encoded[8:64]:
        return FORMATS
    try:
        import pillow_heif
    except ImportError as e:
        raise BadFileError(f"{name}: {missing_extra('HEIC', e)}", "needs an extra") from e
    pillow_heif.register_heif_opener(thumbnails=False)
    return ("HEIF",)


def _advice(encoded: bytes) -> str:
    """Say what to do about a file that no format reads."""
    for name in FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts and accepts(encoded[:16]) is True:
            rare = " (floats other than 32 bit gray, or 5 bands)" if name == "TIFF" else ""
            return (
                f"a {name} that is damaged or of a kind that is not read{rare}; convert it to PNG"
            )
    return f"use {', '.join(FORMATS)} or HEIC"


def _refuse_raw(image: Image.Image, name: str) -> None:
    """Raise `BadFileError` for a file that begins with a small copy of what it holds."""
    kind = getattr(image, "tag_v2", {}).get(254, 0)
    if isinstance(kind, int) and kind & 1:
        raise BadFileError(
            f"{name}: the raw file of a camera; convert it to JPEG or PNG", "unreadable"
        )


def _orientation(image: Image.Image, notes: list[Note]) -> int:
    """Return the orientation of an image, as EXIF counts it."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        # Usually a number; some programs write bytes, text, a fraction or a list.
        if isinstance(value, tuple):
            value = value[0]
        if isinstance(value, bytes):
            value = value.strip(b"\0 ")
            value = value if value.isdigit() else int.from_bytes(value, "big")
        if 0 <= int(value) <= 8:
            return int(value)
    except Exception:  # damaged EXIF raises nearly anything
        pass
    notes.append(("odd metadata", "the orientation cannot be read"))
    return 1


def _date(image: Image.Image) -> str | None:
    """Return when an image was taken, as its EXIF says."""
    try:
        exif = image.getexif()
        text = str(exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED) or "")
        # Local time of the camera: EXIF's zone is rarely there.
        return str(datetime.datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S"))
    except Exception:  # damaged EXIF raises nearly anything
        return None


def resize_box(rgb: Image.Image, box: Box, size: int) -> np.ndarray:
    """Resize a part of an image, with antialiased bicubic interpolation.

    Args:
      rgb: the image.
      box: left, top, width and height of the part, in pixels.
      size: side of the result in pixels.

    Returns:
      uint8 (size, size, 3).
    """
    left, top, width, height = box
    # Cutting before resizing gives the same, and a strip of 1 x 10,000 does not grow to gigabytes.
    resized = rgb.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return np.asarray(resized, np.uint8)


def _short_side(rgb: Image.Image, resize_side: int, size: int) -> np.ndarray:
    """Resize the short side to resize_side, and cut out the center."""
    short = min(rgb.size)
    # The long side is rounded down, as the references do.
    width, height = (resize_side * side // short for side in rgb.size)
    if max(width, height) > 8 * resize_side:
        # A strip of 1 x 10,000 would grow to gigabytes: cut out its middle first.
        half = 2 * short
        x, y = rgb.width // 2, rgb.height // 2
        middle = (
            max(x - half, 0),
            max(y - half, 0),
            min(x + half, rgb.width),
            min(y + half, rgb.height),
        )
        return _short_side(rgb.crop(middle), resize_side, size)

    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.uint8)
