"""Images whose metadata are damaged, or that lack only their last bytes."""

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageChops

from c2f_jax.decoding.image_modes import Note

MOST_MISSING = 0.01  # of the pixels of a JPEG

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"iCCP", b"sRGB", b"gAMA")
_MOST_PROFILE = 2**20  # bytes of a color profile in a PNG that Pillow reads
_WEBP_METADATA = (b"EXIF", b"XMP ")
_EXIF_ENTRY = re.compile(rb"(infe.{8})Exif", re.DOTALL)
_END = b"\xff\xd9"  # of a JPEG
# What no encoder would have written, to see which pixels the missing bytes decide.
_OTHER_BYTES = bytes(range(1, 255)) + _END


def repairs(encoded: bytes) -> Iterator[tuple[bytes, Note]]:
    """Yield files to read in place of one that cannot be read.

    Args:
      encoded: content of the file.

    Yields:
      The content of another file with the same pixels, and the kind and detail of what is odd.
    """
    ignored = ("odd metadata", "metadata that cannot be read are ignored")
    bare = _without_metadata(encoded)
    whole = _with_end(encoded)
    if whole is not None:
        yield whole, ("last bytes missing", "the JPEG has no end")
    if bare != encoded:
        yield bare, ignored
        whole = _with_end(bare)
        if whole is not None:
            yield whole, ignored


def _without_metadata(encoded: bytes) -> bytes:
    """Drop the metadata that an image looks the same without."""
    if encoded[:8] == _PNG:
        return _PNG + b"".join(_png_chunks(encoded))
    if encoded[:2] == b"\xff\xd8":
        return b"\xff\xd8" + b"".join(_jpeg_segments(encoded))
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        content = b"WEBP" + b"".join(_webp_chunks(encoded))
        return b"RIFF" + struct.pack("<I", len(content)) + content
    # AVIF lists what it holds; an entry of an unknown type is passed over.
    return _EXIF_ENTRY.sub(rb"\1skip", encoded) if encoded[4:8] == b"ftyp" else encoded


def _png_chunks(encoded: bytes) -> Iterator[bytes]:
    """Yield the chunks that matter, as they are: size, name, content, checksum."""
    place = 8
    while place + 8 <= len(encoded):
        size, name = struct.unpack_from(">I4s", encoded, place)
        chunk = encoded[place : place + 12 + size]
        place += 12 + size
        critical = name[:1].isupper()
        if not critical and name not in _PNG_KEPT:
            continue
        damaged = zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")
        if not critical and (damaged or (name == b"iCCP" and _is_large_profile(chunk[8:-4]))):
            continue
        yield chunk


def _is_large_profile(content: bytes) -> bool:
    """Return whether the color profile in a chunk of a PNG is damaged or too large for Pillow."""
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(content.partition(b"\0")[2][1:], _MOST_PROFILE)
    except zlib.error:
        return True
    return bool(inflater.unconsumed_tail)


def _jpeg_segments(encoded: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG up to its pixels, without metadata, then the rest."""
    place = 2
    while encoded[place : place + 1] == b"\xff" and place + 4 <= len(encoded):
        marker, size = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker == 0xDA:
            break
        # JFIF and Adobe say how colors are stored; the other segments of programs do not.
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield encoded[place : place + 2 + size]
        place += 2 + size
    yield encoded[place:]


def _webp_chunks(encoded: bytes) -> Iterator[bytes]:
    """Yield the chunks of a WebP that are whole, without metadata."""
    place = 12
    while place + 8 <= len(encoded):
        name, size = struct.unpack_from("<4sI", encoded, place)
        chunk = encoded[place : place + 8 + size + size % 2]
        place += len(chunk)
        if len(chunk) < 8 + size or name in _WEBP_METADATA:
            continue
        # The first chunk says which others there are.
        if name == b"VP8X" and size:
            chunk = chunk[:8] + bytes([chunk[8] & ~0x0C]) + chunk[9:]
        yield chunk + b"\0" * (size % 2 and len(chunk) % 2)


def _with_end(encoded: bytes) -> bytes | None:
    """Give a JPEG its end, unless more than a hundredth of its pixels is missing."""
    if encoded[:2] != b"\xff\xd8":
        return None
    # Interrupted downloads are filled with zeros.
    body = encoded.rstrip(b"\0").removesuffix(b"\xff")
    block_rows = _block_rows(body)
    if not block_rows:
        return None

    # Pixels that the bytes at the end decide are missing, and all that follow in their order.
    try:
        images = [_decoded(body + _END), _decoded(body + _OTHER_BYTES)]
    except Exception:  # Pillow raises nearly anything on damaged files
        return None
    width, height = images[0].size
    box = ImageChops.difference(*images).getbbox()
    if box is not None:
        rows = height - box[1]
        # Blocks are smoothed into the row above.
        missing = rows * (width - box[0] if rows <= block_rows + 2 else width)
        if missing > MOST_MISSING * width * height:
            return None
    return body + _END


def _decoded(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
        image.load()
        return image


def _block_rows(encoded: bytes) -> int:
    """Return the height of a row of blocks of a JPEG.

    It is 0 unless the last of its scans has begun, so that no detail is missing.
    """
    components, rows = b"", 8
    # (component, coefficient) -> bits that a later scan brings
    missing: dict[tuple[int, int], int] = {}
    place = 2
    for _ in range(10_000):  # segments
        marker = _NEXT_MARKER.search(encoded, place)
        if marker is None or marker.end() + 2 > len(encoded):
            break
        kind, start = encoded[marker.end() - 1], marker.end()
        size = int.from_bytes(encoded[start : start + 2], "big")
        content = encoded[start + 2 : start + size]
        if 0xC0 <= kind <= 0xC2 and len(content) >= 6:
            components = content[6::3]
            if len(components) > 1:
                rows = 8 * max(sampling & 15 for sampling in content[7::3])
        elif kind == 0xDA and content and len(content) >= 4 + 2 * content[0]:
            first, last, bits = content[1 + 2 * content[0] :][:3]
            for component in content[1 : 1 + 2 * content[0] : 2]:
                for number in range(first, min(last, 63) + 1):
                    missing[component, number] = bits & 15
        place = start + size
    wanted = [(component, number) for component in components for number in range(64)]
    return rows if wanted and not any(missing.get(key, 1) for key in wanted) else 0


# Within pixels, a byte of 255 is followed by zero or a restart marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")
