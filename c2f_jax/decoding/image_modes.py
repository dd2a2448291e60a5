"""Images of any mode, depth and color profile to 8 bit RGB."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

Note = tuple[str, str]  # kind and detail of an oddity, see `data_check.findings.KINDS`

# Depths of cameras and scanners, whose values often lie at the bottom of a wider type.
DEPTHS = (8, 10, 12, 14, 16)
SAME_COLOR = 3  # of 255, between two profiles that look the same
_HEAD = 4096  # bytes in which an image says what its colors are
# White, red, green and blue, x and y of each.
_SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_ROWS = 256  # converted at once, so that wide types take little memory
_GRAY = ("1", "L", "LA", "La")
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_BITS, _PHOTOMETRIC, _MOST_VALUE, _PLANES = 258, 262, 281, 284  # tags of TIFF


def load_rgb(
    image: Image.Image, reopen: Callable[[], Image.Image]
) -> tuple[Image.Image, list[Note]]:
    """Load an image of any mode as RGB.

    Transparency becomes white, deep images become 8 bits, and colors become sRGB.

    Args:
      image: an opened image, not loaded.
      reopen: opens the same file again.

    Returns:
      The image, RGB, and what is odd about how it was read.

    Raises:
      ValueError: it holds values that are not numbers; or whatever Pillow raises.
    """
    _join_planes(image)
    rawmode = _rawmode(image)  # loading forgets it
    everything = (0, 0, *image.size)
    tiles: Any = getattr(image, "tile", None)
    box = tiles[0][1] if image.format == "GIF" and tiles else everything
    image.load()
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image = image.convert("RGB")  # as in browsers: the program left alpha out

    notes: list[Note] = []
    if image.mode == "CMYK":
        notes.append(("print colors", "CMYK"))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        notes.append(("transparency", "shown on white"))

    if image.mode.startswith(("I", "F")):
        rgb = _deep_gray_to_rgb(image, notes)
    elif ";16" in rawmode and image.mode != "CMYK":
        rgb = _deep_color_to_rgb(image, rawmode, reopen, notes)
    else:
        rgb = _shallow_to_rgb(image)
    if box != everything:  # of an animation, whose canvas is transparent
        notes = [("transparency", f"the first image covers {box} alone, the rest is white")]
        canvas = Image.new("RGB", rgb.size, "white")
        canvas.paste(rgb.crop(box), box)
        rgb = canvas

    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if profile:
        rgb = _to_srgb(image, rgb, profile, notes)
    elif gamma and "srgb" not in image.info and abs(gamma - 1 / 2.2) > 0.05:
        notes.append(("odd metadata", f"a gamma of {gamma:.3g} is ignored"))
    return rgb, notes


def color_notes(encoded: bytes, image: Image.Image) -> list[Note]:
    """Say whether an image without a color profile names other colors than those of sRGB.

    Args:
      encoded: its file.
      image: the image.

    Returns:
      A note, or none.
    """
    if image.info.get("icc_profile"):
        return []
    chromaticity = image.info.get("chromaticity")
    head, told = encoded[:_HEAD], ""
    if image.format == "PNG" and (place := head.find(b"cICP")) > 0:
        told = _coded_colors(*head[place + 4 : place + 6])
    elif image.format in ("AVIF", "HEIF") and (place := head.find(b"colrnclx")) > 0:
        told = _coded_colors(head[place + 9], head[place + 11])
    elif chromaticity and "srgb" not in image.info:
        if np.abs(np.subtract(chromaticity, _SRGB)).max() > 0.01:
            told = "primaries that are not those of sRGB"
    return [("odd metadata", f"{told}: ignored, colors are taken for sRGB")] if told else []


def _coded_colors(primaries: int, transfer: int) -> str:
    """Describe colors by their codes in ITU-T H.273; "" for those that look like sRGB."""
    if primaries in (1, 2, 5, 6, 7) and transfer in (1, 2, 6, 13, 14, 15):
        return ""
    known = {9: "BT.2020", 12: "Display P3", 16: "PQ", 18: "HLG"}
    told = (known.get(primaries, primaries), known.get(transfer, transfer))
    return f"primaries {told[0]}, transfer {told[1]} of H.273"


def _shallow_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of at most 8 bits; transparency shows white."""
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _join_planes(image: Any) -> None:
    """Let libtiff read a TIFF of 16 bits whose colors are stored apart.

    Pillow alone would read them as 8 bits.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) != 2 or tags.get(_BITS, (8,))[0] != 16 or image.tile[0][0] != "raw":
        return
    # A tile of the size before the orientation is applied.
    width, height = tags[256], tags[257]
    args = (f"{image.mode};16N", False, tags.offset)
    whole = image.tile[0]._replace(
        codec_name="libtiff", extents=(0, 0, width, height), offset=0, args=args
    )
    image.use_load_libtiff, image.tile = True, [whole]


def _rawmode(image: Any) -> str:
    """Return how the pixels are stored, such as "RGB;16B"; "" if there is no telling."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _white_of(most: int) -> int:
    """Return the value that is white, given the largest value of an image.

    >>> _white_of(4012), _white_of(40_000), _white_of(70_000)
    (4095, 65535, 70000)
    """
    for bits in DEPTHS:
        if most < 2**bits:
            return 2**bits - 1
    return most


def _deep_gray_to_rgb(image: Image.Image, notes: list[Note]) -> Image.Image:
    """Convert gray of 12, 16 or 32 bits, or floats, which Pillow's conversion would clip."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not numbers")
    white = _gray_white(image, values, notes)

    transparent = image.info.get("transparency")
    gray = np.empty(values.shape, np.uint8)
    for start in range(0, len(gray), _ROWS):
        part = values[start : start + _ROWS]
        scaled = np.clip(np.round(part.astype(np.float32) * (255 / white)), 0, 255)
        if transparent is not None:
            scaled[part == transparent] = 255
        gray[start : start + _ROWS] = scaled
    # White may be zero; Pillow takes care of that only up to 8 bits.
    if tags.get(_PHOTOMETRIC) == 0:
        np.subtract(255, gray, out=gray)
    return Image.fromarray(gray).convert("RGB")


def _gray_white(image: Image.Image, values: np.ndarray, notes: list[Note]) -> float:
    """Return the value that is white in a deep gray image."""
    tags: Any = getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    told = f"values from {low:.4g} to {high:.4g}"
    # Floats have no fixed white.
    if image.mode == "F":
        white = max(1.0, float(high))
        notes.append(("deep image", f"floats: {told}, {white:.4g} is white"))
        return white

    # A TIFF may say what its largest value is, or have 12 bits.
    most = tags.get(_MOST_VALUE, 0)
    most = most[0] if isinstance(most, tuple) else most
    if tags.get(_BITS, (16,))[0] < 16:
        most = 2 ** tags[_BITS][0] - 1
    white = int(most) if most and most >= high else _white_of(int(high))
    if white != 65535 or low < 0:
        notes.append(("deep image", f"{told}, {white} is white"))
    return white


def _deep_color_to_rgb(
    image: Image.Image, rawmode: str, reopen: Callable[[], Image.Image], notes: list[Note]
) -> Image.Image:
    """Convert 16 bit color, of which Pillow keeps the upper 8 bits."""
    ranges: Any = image.getextrema()
    brightest = max(high for _, high in ranges[:3])
    exact = isinstance(image.info.get("transparency"), tuple)  # a color of 16 bits
    if rawmode.startswith("RGBa") or (_white_of(256 * brightest) == 65535 and not exact):
        return _shallow_to_rgb(image)

    if getattr(image, "tag_v2", {}).get(_PLANES) == 2:
        raise ValueError("dark colors of 16 bits, stored apart; store them together")

    # The lower 8 bits are what Pillow keeps of the other byte order.
    other: Any = reopen()
    swapped = _swapped(rawmode)
    other.tile = [
        tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
        for tile in other.tile
    ]
    other.load()
    upper, lower = np.asarray(image), np.asarray(other)
    # Gray with alpha is read as bytes: both of the gray, both of the alpha.
    order = [1, 1, 1, 3] if rawmode.startswith("LA") else list(range(upper.shape[2]))

    def rows(start: int) -> np.ndarray:
        high = upper[start : start + _ROWS].astype(np.uint16)
        return high << 8 | lower[start : start + _ROWS, :, order]

    starts = range(0, len(upper), _ROWS)
    most = np.max([rows(start).max(axis=(0, 1)) for start in starts], axis=0)
    white = _white_of(int(most[:3].max()))
    if white != 65535:
        notes.append(("deep image", f"values up to {most[:3].max()}, {white} is white"))

    rgb = np.empty((*upper.shape[:2], 3), np.uint8)
    for start in starts:
        values = rows(start)
        scaled: np.ndarray = values[..., :3] * np.float32(255 / white)
        if len(order) == 4:
            alpha = values[..., 3:] / np.float32(_white_of(int(most[3])))
            scaled = scaled * alpha + 255 * (1 - alpha)
        if exact:
            scaled[(values == image.info["transparency"]).all(axis=-1)] = 255
        rgb[start : start + _ROWS] = np.round(scaled)
    return Image.fromarray(rgb)


def _swapped(rawmode: str) -> str:
    """Return the raw mode that reads the lower bytes where another reads the upper ones."""
    if rawmode.startswith("LA"):
        return "RGBA"
    name, order = rawmode.split(";16")
    big = order == "B" or (order == "N" and sys.byteorder == "big")
    return f"{name};16{'L' if big else 'B'}"


def _to_srgb(
    image: Image.Image, rgb: Image.Image, profile: bytes, notes: list[Note]
) -> Image.Image:
    """Convert colors by the profile of an image, unless that looks like sRGB."""
    try:
        mode, name, transform = _conversion(profile)
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        notes.append(("odd metadata", "the color profile cannot be read and is ignored"))
        return rgb

    gray = image.mode in _GRAY or image.mode.startswith(("I", "F"))
    fits = {"RGB": image.mode != "CMYK", "L": gray, "CMYK": image.mode == "CMYK"}
    if not fits.get(mode, False):
        notes.append(("odd metadata", f"the color profile {name} is of other colors: ignored"))
        return rgb
    if transform is None:
        return rgb
    notes.append(("color profile", f"{name}, converted to sRGB"))
    source = {"RGB": rgb, "L": rgb.getchannel(0), "CMYK": image}[mode]
    converted = ImageCms.applyTransform(source, transform)
    assert converted is not None  # it is not in place
    return converted


@functools.lru_cache(maxsize=8)
def _conversion(profile: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Return mode and name of a color profile, and what converts it to sRGB.

    The last is None if the profile looks like sRGB.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    name = (opened.profile.profile_description or space).strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space, "")
    if not mode:
        return mode, name, None
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )

    # A few hundred colors tell.
    if mode != "CMYK":
        steps = np.arange(0, 256, 51 if mode == "RGB" else 1, dtype=np.uint8)
        colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        probe = Image.fromarray(colors if mode == "RGB" else steps[None])
        seen: Any = ImageCms.applyTransform(probe, transform)
        change = np.asarray(seen).astype(int) - np.asarray(probe.convert("RGB"))
        if np.abs(change).max() <= SAME_COLOR:
            return mode, name, None
    return mode, name, transform
