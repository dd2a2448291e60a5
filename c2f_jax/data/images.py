"""Encoded images to square RGB arrays."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from c2f_jax.data.audio import read_bytes
from c2f_jax.errors import BadFileError

MOST_PIXELS = 100_000_000  # larger images are treated as decompression bombs

# No others: one of Pillow's readers starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
RESIZE = ("square", "short_side", "squash")

Box = tuple[float, float, float, float]  # left, top, width, height


def decode_image(
    data: bytes | str,
    size: int,
    *,
    resize: str = "square",
    resize_side: int = 0,
    name: str | None = None,
) -> np.ndarray:
    """Decode an image and make it square.

    It is rotated as its EXIF tag says, transparency becomes white, 16 bits become 8, and the image
    is resized with antialiased bicubic interpolation.

    Args:
      data: the encoded bytes, or a path.
      size: side of the square in pixels.
      resize: "square" takes the largest center square. Published networks saw others: with
        "short_side" the short side is resized to resize_side and the center cut out (CLIP, DINOv2),
        with "squash" the whole image is resized to a square (BLIP-2, SigLIP).
      resize_side: length of the short side for "short_side"; 0 for size.
      name: what error messages call it; by default the path.

    Returns:
      uint8 (size, size, 3) RGB.

    Raises:
      BadFileError: the file is missing, unreadable, cut off or larger than 100 million pixels.
    """
    # The other ways follow references that decode at full scale.
    rgb = open_rgb(data, size, reduce=resize == "square", name=name)
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
    """Decode a whole image, as `decode_image` does.

    Args:
      data: the encoded bytes, or a path.
      size: side in pixels that it will be resized to.
      reduce: whether to decode large JPEGs at a reduced scale, with sides of 2 * size or more.
      name: what error messages call it; by default the path.

    Returns:
      The image, RGB.

    Raises:
      BadFileError: as `decode_image`.
    """
    name = name or (data if isinstance(data, str) else "image")
    encoded = data if isinstance(data, bytes) else read_bytes(data)
    if not encoded:
        raise BadFileError(f"{name}: the file is empty", "zero length")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadFileError(
                    f"{name}: {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} "
                    "are allowed",
                    "too large",
                )

            # JPEG decodes at a half, a quarter or an eighth of its size for less time.
            if reduce:
                image.draft(image.mode, (2 * size, 2 * size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much as decoding
            return _to_rgb(image)
    except BadFileError:
        raise
    except UnidentifiedImageError as e:
        raise BadFileError(
            f"{name}: not a readable image; use {', '.join(FORMATS)}", "unreadable"
        ) from e
    except Exception as e:  # Pillow's plugins raise nearly anything on damaged files
        kind = "truncated" if "truncated" in str(e) else "unreadable"
        raise BadFileError(f"{name}: not a readable image ({e})", kind) from e


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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return _deep_gray_to_rgb(image)

    # Transparency shows white.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
    """Convert 16 or 32 bit gray, which Pillow's own conversion would clip to white."""
    gray = np.array(image, np.float32)
    if not np.isfinite(gray).all():
        raise ValueError("it holds values that are not numbers")

    # Floats have no fixed white.
    top = max(1.0, float(gray.max())) if image.mode == "F" else 65535
    np.multiply(gray, 255 / top, out=gray)
    np.round(gray, out=gray)
    return Image.fromarray(np.clip(gray, 0, 255, out=gray).astype(np.uint8)).convert("RGB")
