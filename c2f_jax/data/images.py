"""Encoded pictures to square RGB arrays."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from c2f_jax.data.audio import read_bytes
from c2f_jax.errors import BadFileError

MOST_PIXELS = 100_000_000  # larger files are taken for decompression bombs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: one of them starts a program
RESIZE = ("square", "short_side", "squash")


def decode_image(
    data: bytes | str,
    size: int,
    *,
    resize: str = "square",
    resize_side: int = 0,
    name: str | None = None,
) -> np.ndarray:
    """The centre square of a picture, uint8 (size, size, 3) RGB, from bytes or a file.

    Turned as its EXIF tag says, transparency laid on white, 16 bit reduced to 8, resized with antialiased bicubic.
    "square" takes the largest centre square. Published networks saw other ones: with "short_side" the short side is
    resized to resize_side (size unless given) and the centre cut out (CLIP, DINOv2), with "squash" the whole picture is
    made a square (BLIP-2, SigLIP).
    Raises `BadFileError` naming the item when it is missing, unreadable, cut off or larger than 100 million pixels.
    """
    rgb = open_rgb(data, size, reduce=resize == "square", name=name)
    if resize == "squash":
        return resize_box(rgb, (0, 0, *rgb.size), size)
    if resize == "short_side":
        return _short_side(rgb, resize_side or size, size)
    side = min(rgb.size)
    return resize_box(rgb, ((rgb.width - side) / 2, (rgb.height - side) / 2, side, side), size)


def open_rgb(
    data: bytes | str, size: int, *, reduce: bool = True, name: str | None = None
) -> Image.Image:
    """The whole picture, RGB, as `decode_image` reads it; reduce decodes large JPEGs at 2 * size or more."""
    name = name or (data if isinstance(data, str) else "image")
    encoded = data if isinstance(data, bytes) else read_bytes(data)
    if not encoded:
        raise BadFileError(f"{name}: the file is empty", "zero length")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadFileError(
                    f"{name}: {image.width} x {image.height} pixels are more than {MOST_PIXELS:,}",
                    "too large",
                )
            if reduce:
                image.draft(image.mode, (2 * size, 2 * size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much as decoding
            return _to_rgb(image)
    except BadFileError:
        raise
    except UnidentifiedImageError as e:
        raise BadFileError(
            f"{name}: not a picture that can be read; {', '.join(FORMATS)} can", "unreadable"
        ) from e
    except Exception as e:  # Pillow's plugins raise nearly anything on damaged files
        kind = "truncated" if "truncated" in str(e) else "unreadable"
        raise BadFileError(f"{name}: not a picture that can be read ({e})", kind) from e


def resize_box(rgb: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The box (left, top, width, height) of a picture as uint8 (size, size, 3), antialiased bicubic."""
    left, top, width, height = box
    # Cutting before resizing gives the same picture, and a strip of 1 x 10,000 does not grow to gigabytes.
    resized = rgb.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return np.asarray(resized, np.uint8)


def _short_side(rgb: Image.Image, resize_side: int, size: int) -> np.ndarray:
    short = min(rgb.size)
    whole = [
        resize_side * side // short for side in rgb.size
    ]  # the long side is rounded down, as the references do
    if (
        max(whole) > 8 * resize_side
    ):  # a strip of 1 x 10,000 would grow to gigabytes: cut its middle out first
        half = 2 * short
        centre = [side // 2 for side in rgb.size]
        box = [max(c - half, 0) for c in centre] + [
            min(c + half, n) for c, n in zip(centre, rgb.size, strict=True)
        ]
        return _short_side(rgb.crop(box), resize_side, size)
    resized = rgb.resize(whole, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in whole)
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith(
        ("I", "F")
    ):  # 16 or 32 bit grey: Pillow's own conversion would clip it to white
        grey = np.array(image, np.float32)
        if not np.isfinite(grey).all():
            raise ValueError("it holds values that are not numbers")
        top = 65535 if image.mode != "F" else max(1.0, float(grey.max()))
        np.multiply(grey, 255 / top, out=grey)
        np.round(grey, out=grey)
        return Image.fromarray(np.clip(grey, 0, 255, out=grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
